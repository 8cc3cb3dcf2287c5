"""Which operation of a sim carries which encoding, and why one carries none.

Comes in: a sim. Goes out: a table, a row an operation.

Modules, each importing only what stands above it:

- encoding: an encoding in short, the row of one operation
- sources: which operation made a tensor, and the quantizer it carries from there
- carriers: which operation carries the encoding of a tensor that has none where it is made
- rows: the encodings of each operation of a recording
- coverage_table: `coverage`, and a sim reduced to AIMET's own sites
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
