"""The architectures that `prepare` knows: one file each, found here, registered by itself."""

import importlib
import pkgutil

from ..decoder import ARCHITECTURES

__all__ = ["ARCHITECTURES"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
