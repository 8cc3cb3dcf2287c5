"""Which activations need more bits, which ranges to clip, what a softmax of 8 bits loses.

Comes in: a sim with α folded and its ranges set. Goes out: the same sim with other bits, ranges
or biases, and a table of what was tried.

Modules, each importing only what stands above it:

- bits: bits of the residual stream, of some weights, of the few activations that need more
- clipping: ranges clipped where the loss allows it
- visible_rows: which rows of an attention count
- softmax_loss: what quantizing a softmax does to the output of its attention
- value_shift: the shift of values that makes up for it
- masked_range: how far down the range of masked scores must reach
- softmax: `compensate_softmax`, which does both
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
