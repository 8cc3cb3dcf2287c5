"""What is known about an architecture: a HuggingFace model becomes an equal one for AIMET.

Comes in: a HuggingFace causal language model. Goes out: a `PreparedDecoder`, in which every
operation that runs on a device is a module of its own.

Modules, each importing only what stands above it:

- attention: attention as modules, the mask, how heads are laid out
- widening: half-precision modules in fp32, one at a time
- activations: activation functions by HuggingFace's names
- copies: layers taken over if they are plain
- norms: RMSNorm as one operation
- generation: HuggingFace's `generate` over a prepared decoder
- decoder: what every prepared decoder has, and the registry
- families: one file an architecture
- proof: what `prepare` promises, checked
- preparation: `prepare`
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
