"""The file formats, one module each, and from a path to an opened file.

A module here that has a `FORMAT` is a format: a new one is added by adding its module, and nothing
else.

Example:
    >>> list(FORMATS)
    ['msgpack', 'npz', 'orbax', 'safetensors']
"""

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megajax.errors import InterchangeError
from megajax.formats.arrays import Format, Stored
from megajax.formats.disk import check_sums, one_line

__all__ = ["FORMATS", "open_network", "read_arrays"]

_modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
FORMATS: dict[str, Format] = {module.FORMAT.name: module.FORMAT for module in _modules}
"""Name -> format."""

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".joblib")
_ALLOWANCE = 64 * 2**20


def open_network(path: Path, nbytes: int | None = None) -> Stored:
    """Opens a file, or what a folder holds, once its sums are right.

    Args:
        path: of a file or folder of any format.
        nbytes: size of the network in memory; a file that must be read whole to be opened, and is
            more than eight times as large (an optimizer's state included), is not read.

    Raises:
        InterchangeError: it is not there, of no known format, damaged, or far too large.

    Example:
        >>> open_network(Path("net.pt"))
        Traceback (most recent call last):
        ...
        megajax.errors.InterchangeError: net.pt does not exist
    """
    with one_line(path):
        if not path.exists():
            raise InterchangeError(f"{path} does not exist")
        format, file = _in_folder(path) if path.is_dir() else (_of_file(path), path)
        size = file.stat().st_size
        if format.whole and nbytes is not None and size > 8 * nbytes + _ALLOWANCE:
            raise InterchangeError(f"{file} has {size} bytes: the network needs about {nbytes}")
    check_sums(file)
    return format.open(file)


def read_arrays(stored: Stored, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads arrays, which must be what the file said.

    Raises:
        InterchangeError: they are not, cannot be read, or are no arrays.
    """
    for name in names:
        if stored.specs[name].dtype.hasobject:
            raise InterchangeError(f"{stored.path}: {name} is not an array")
    arrays = stored.read(names)
    for name, array in arrays.items():
        spec = stored.specs[name]
        if array.shape != spec.shape or array.dtype != spec.dtype:
            raise InterchangeError(f"{stored.path} is damaged: {name} is not {spec}")
    return arrays


def _of_file(path: Path) -> Format:
    if path.suffix in _PICKLES:
        raise InterchangeError(
            f"{path} is a pickle, which can run any code and is never loaded: where it was made, "
            "write safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        )
    for format in FORMATS.values():
        if path.name.endswith(format.suffixes):
            return format
    suffixes = ", ".join(format.suffixes[0] for format in FORMATS.values() if format.suffixes)
    raise InterchangeError(f"{path} has no known format: {suffixes} and folders of Orbax are read")


def _in_folder(path: Path) -> tuple[Format, Path]:
    for format in FORMATS.values():
        found = _found(format, path)
        if len(found) == 1:
            return format, found[0]
        if found:
            names = ", ".join(at.name for at in found)
            raise InterchangeError(f"{path} holds several networks: choose one of {names}")
    names = ", ".join(name for format in FORMATS.values() for name in format.files)
    folders = sorted(
        (at for at in path.iterdir() if at.is_dir()), key=lambda at: (len(at.name), at)
    )
    inside = [at.name for at in folders if any(_found(format, at) for format in FORMATS.values())]
    what = "steps" if all(name.isdigit() for name in inside) else "folders"
    hint = f"; choose one of its {what} {', '.join(inside)}" if inside else ""
    raise InterchangeError(f"{path} holds none of {names}{hint}")


def _found(format: Format, folder: Path) -> list[Path]:
    if format.find:
        return format.find(folder)
    return [folder / name for name in format.files if (folder / name).exists()][:1]
