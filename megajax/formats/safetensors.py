"""Safetensors: a header of names, shapes and dtypes, then plain bytes.

The library of that name checks the header (its size, that the arrays tile the file); this module
turns it into the shapes and dtypes of NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megajax.errors import InterchangeError
from megajax.formats.files import Spec, Stored, write_bytes
from megajax.formats.trees import native

__all__ = ["open_safetensors", "write_safetensors"]

_DTYPES = {
    "BOOL": np.dtype(bool),
    **{f"I{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "C64": np.dtype("complex64"),
}


def open_safetensors(path: Path) -> Stored:
    """Opens a safetensors file and reads its header.

    Args:
        path: of the file.

    Returns:
        What it holds.

    Raises:
        InterchangeError: it cannot be read or is damaged, or has a dtype that NumPy has not.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> write_safetensors(path, {("fc.weight",): np.ones((2, 3), np.float32)})
        >>> str(open_safetensors(path).specs["fc.weight"])
        'float32[2,3]'
        >>> _ = path.write_bytes(path.read_bytes()[:-1])
        >>> open_safetensors(path)
        Traceback (most recent call last):
        ...
        megajax.errors.InterchangeError: .../model.safetensors is no safetensors file, or damaged:
        Error while deserializing header: ...
    """
    try:
        with safe_open(path, framework="np"):
            pass  # all checks are made when it is opened
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except OSError as error:
        raise InterchangeError(f"{path} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError) as error:
        raise InterchangeError(f"{path} is no safetensors file, or damaged: {error}") from None
    header.pop("__metadata__", None)
    specs: dict[str, Spec] = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise InterchangeError(f"{path}: {name} has the dtype {entry['dtype']}")
        specs[name] = Spec(tuple(entry["shape"]), _DTYPES[entry["dtype"]])

    def read(names: Sequence[str]) -> dict[str, np.ndarray]:
        arrays = {}
        try:
            with path.open("rb") as file:
                for name in names:
                    begin, end = header[name]["data_offsets"]
                    file.seek(8 + length + begin)
                    data = file.read(end - begin)
                    flat = np.frombuffer(bytearray(data), specs[name].dtype.newbyteorder("<"))
                    arrays[name] = flat.astype(specs[name].dtype).reshape(specs[name].shape)
        except OSError as error:
            raise InterchangeError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise InterchangeError(f"{path} is damaged: {error}") from None
        return arrays

    return Stored(path, specs, read)


def write_safetensors(path: Path, arrays: Mapping[tuple[str, ...], np.ndarray]) -> None:
    """Writes a safetensors file.

    Args:
        path: of the file.
        arrays: keys that lead to each array -> the array; `/` joins the keys.

    Raises:
        InterchangeError: it cannot be written, or the format has not the dtype of an array.

    Example:
        >>> write_safetensors(Path("x"), {("w",): np.ones(2, complex)})
        Traceback (most recent call last):
        ...
        megajax.errors.InterchangeError: leaf w is complex128, which safetensors has not
    """
    for keys, array in arrays.items():
        if array.dtype not in _DTYPES.values():
            raise InterchangeError(
                f"leaf {'/'.join(keys)} is {array.dtype}, which safetensors has not"
            )
    # Metadata "format" is what PyTorch's own loaders ask for.
    # The library reads plain memory: of an array that is not contiguous it would get other numbers.
    named = {"/".join(keys): native(array) for keys, array in arrays.items()}
    try:
        data = save(named, {"format": "pt"})
    except SafetensorError as error:
        raise InterchangeError(f"{path} cannot be written: {error}") from None
    write_bytes(path, data)
