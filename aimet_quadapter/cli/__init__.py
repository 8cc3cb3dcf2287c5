"""The same from a shell: `quadapter run`, `report`, `compile`, `verify`.

Comes in: arguments. Goes out: an exit code, printed tables, files.

Modules, each importing only what stands above it:

- deploy: `compile` and `verify`
- program: `main`, `run` and `report`
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
