"""What a pair is, which there are, that each is exact, and α in and out of the weights.

Comes in: a sim. Goes out: `Pairs`, each proven, and weights with α in them.

Modules, each importing only what stands above it:

- pair: a pair, and the maths of its scale, written once
- commute: which operations a scale per channel passes
- attachment: α inside a sim's modules while it is learned
- sharing: who shares memory with whom
- proof: the numerical check that nothing changes
- flow: where the channels of one producer go
- discovery: `find_pairs`
- folding: α into the weights
- channels: the range of each channel
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
