"""Architectures that `prepare` knows: one file each, found here, registered by themselves."""

import importlib
import pkgutil

from .base import ARCHITECTURES, PreparedDecoder, register

__all__ = ["ARCHITECTURES", "PreparedDecoder", "register"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
