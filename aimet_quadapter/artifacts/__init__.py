"""The folder of an export, read without AIMET: its files, their hashes, what they must hold.

Comes in: a folder. Goes out: its manifest, files that may be opened, what is missing in them.

Modules, each importing only what stands above it:

- manifest: file names, hashes, and what is checked before a file is opened
- reference: inputs and their logits, as `export` left them
- exported: every operation has its encoding, every encoding its tensor
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
