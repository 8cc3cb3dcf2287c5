"""Result files → tables, figures, one HTML page.

Comes in: a folder of result files. Goes out: a page that needs nothing else.

Modules, each importing only what stands above it:

- files: result files, checked, and the rows they are
- plots: numbers as small SVG
- figures: the figures of an experiment
- page: `report`
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
