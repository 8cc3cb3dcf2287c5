"""The architectures that `prepare` knows: a file of facts each, found here by itself.

Files that others build on, each importing only what stands above it:

- llama: what most of today's decoders share
- phi: rotary positions on a part of each head
- gpt2: learned positions
- gpt_neox: fused projections head by head
- falcon: as GPT-NeoX, under other names
"""

import importlib
import pkgutil

from ..description import FAMILIES

__all__ = ["FAMILIES"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
