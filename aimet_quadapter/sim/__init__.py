"""An AIMET sim seen from outside, whatever model is in it.

Comes in: a `QuantizationSimModel` and a loader. Goes out: a recording of its operations, checked
samples, ranges, its activation quantizers one by one, the loss of the whole.

Modules, each importing only what stands above it:

- values: NaN, inf and tensors without data refused
- outputs: what a model returned, and which of it are the logits
- operations: kinds of operations by name and class
- inputs: what a model is called with: given, made up, varied
- identity: what a sim computes with, for the mark of a checkpoint
- trace: a forward pass recorded operation by operation
- replay: gone through again, a part at a time
- kernels: fake quantization in vectorized operations
- gradients: the same with gradients, a part of a tensor at a time
- checks: what must hold of a sim before long work
- padding: left out of a sample, where that changes nothing
- samples: what a loader yields, as single samples
- weights: quantized once for many passes, not tried on fine grids
- ranges: ranges of quantizers: set, from the batch, off, restored
- losses: the loss of the whole model
- sites: activation quantizers one by one, and the loss with one changed
- sensitivity: what each of them costs
- stream: how large each token is
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
