"""Quadapter as a step of other programs: AIMET GenAILab, Microsoft Olive.

Comes in: what the other program hands to its steps. Goes out: what it takes back. Olive is imported
with the module that is for it, and installed by the extra `olive`; GenAILab is in no package.

Modules, each importing only what stands above it:

- genailab: what its generator feeds to a sim → α folded in
- olive: a HuggingFace model → the same with α folded in, for `olive run`
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
