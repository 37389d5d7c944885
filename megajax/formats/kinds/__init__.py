"""The file formats, one module each: a module here that has a `FORMAT` is a format.

A new one is written by adding its module; nothing else changes.

Example:
    >>> list(FORMATS)
    ['msgpack', 'npz', 'orbax', 'safetensors']
"""

import importlib
import pkgutil

from megajax.formats.arrays import Format

__all__ = ["FORMATS"]

_modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
FORMATS: dict[str, Format] = {module.FORMAT.name: module.FORMAT for module in _modules}
"""Name -> format."""
