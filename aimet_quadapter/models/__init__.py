"""What is known about an architecture: a HuggingFace model becomes an equal one for AIMET.

Comes in: a HuggingFace causal language model. Goes out: a `PreparedDecoder`, in which every
operation that runs on a device is a module of its own, proven equal.

Modules, each importing only what stands above it:

- wrappers: models inside another's class
- widening: half-precision modules in fp32, one at a time
- activations: activation functions by HuggingFace's names
- attention: attention as modules, the mask, how heads are laid out
- norms: norms, found by what they compute
- rotary: rotary positions and their tables
- description: a decoder as data, and the registry of families
- weight_map: which weight lies where, both ways
- prepended: keys and values before a text's own
- parts: modules under HuggingFace's names
- mixture: a mixture of experts
- block: one layer, built from its description
- generation: HuggingFace's `generate` over a prepared decoder
- decoder: a prepared decoder, built from its description
- families: a file of facts for each architecture
- proof: what `prepare` promises, checked
- preparation: `prepare`
- stock: a HuggingFace model as it is, for AIMET
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
