"""What changes a prepared model before a sim is made of it, and not what it computes.

Comes in: a `PreparedDecoder`. Goes out: the same object, with another context or other weights.

Modules, each importing only what stands above it:

- prefix: tokens whose keys and values are constants before every text
- prefix_choice: which tokens, by the loss and the ranges on calibration text
- orthogonal: orthogonal matrices of any size
- rotation: norms into weights, the residual stream in another basis
- rotation_choice: whether to, by the loss of the quantized model on calibration text
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
