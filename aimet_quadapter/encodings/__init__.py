"""Which operation of a sim carries which encoding, and why one carries none.

Comes in: a sim. Goes out: a table, a row an operation.

Modules, each importing only what stands above it:

- encoding: an encoding in short, the row of one operation
- rows: the encodings of each operation of a recording
- coverage_table: `coverage`, and a sim reduced to AIMET's own sites
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
