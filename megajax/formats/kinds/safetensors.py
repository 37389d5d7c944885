"""Safetensors: a header of names, shapes and dtypes, then plain bytes; in one file or in several.

Several files come with an index, `NAME.safetensors.index.json`, which says what is where.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import deserialize, safe_open
from safetensors.numpy import save

from megajax.errors import InterchangeError
from megajax.formats.arrays import Format, Keyed, Spec, Stored, native
from megajax.formats.disk import check_sums, one_line, write_whole

__all__ = ["FORMAT"]

_DTYPES = {
    "BOOL": np.dtype(bool),
    **{f"I{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)},
    "C64": np.dtype("complex64"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_INDEX = ".index.json"


def _open(path: Path) -> Stored:
    return _open_index(path) if path.name.endswith(_INDEX) else _open_one(path)


def _open_one(path: Path) -> Stored:
    specs: dict[str, Spec] = {}
    with one_line(path, "is no safetensors file, or damaged"), safe_open(path, "np") as file:
        for name in file.keys():  # noqa: SIM118 - the file is no dictionary
            array = file.get_slice(name)
            if array.get_dtype() not in _DTYPES:
                raise InterchangeError(f"{path}: {name} has the dtype {array.get_dtype()}")
            specs[name] = Spec(tuple(array.get_shape()), _DTYPES[array.get_dtype()])

    def read(names: Sequence[str]) -> dict[str, np.ndarray]:
        # NumPy has no float8, and so neither has `get_tensor`.
        eighths = [name for name in names if specs[name].dtype.name.startswith("float8")]
        with one_line(path), safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in names if name not in eighths}
            raw = dict(deserialize(path.read_bytes())) if eighths else {}  # type: ignore[no-untyped-call]
            for name in eighths:
                flat = np.frombuffer(raw[name]["data"], specs[name].dtype)
                arrays[name] = flat.reshape(specs[name].shape)
        return {name: native(arrays[name]) for name in names}

    return Stored(path, specs, read)


def _open_index(path: Path) -> Stored:
    """All files of an index as one; the index and its files must agree on what is where."""
    with one_line(path, "is no index of safetensors files, or damaged"):
        places: Mapping[str, str] = json.loads(path.read_bytes())["weight_map"]
        files = sorted({str(file) for file in places.values()})
    parts = {}
    for file in files:
        if Path(file).name != file:
            raise InterchangeError(f"{path} names {file}, which is in another folder")
        check_sums(path.parent / file)
        parts[file] = _open_one(path.parent / file)
    inside = {name: file for file, part in parts.items() for name in part.specs}
    for name in sorted({*places.items()} ^ {*inside.items()}):
        raise InterchangeError(f"{path}: {name[0]} is not in {name[1]} alone")
    specs = {name: parts[file].specs[name] for name, file in inside.items()}

    def read(names: Sequence[str]) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        for file, part in parts.items():
            arrays |= part.read([name for name in names if places[name] == file])
        return arrays

    return Stored(path, specs, read)


def _write(path: Path, arrays: Keyed) -> None:
    for keys, array in arrays.items():
        if array.dtype not in _DTYPES.values():
            raise InterchangeError(
                f"leaf {'/'.join(keys)} is {array.dtype}, which safetensors cannot hold"
            )
    # Metadata "format" is what PyTorch's own loaders ask for.
    # The library reads plain memory: of an array that is not contiguous it would get other numbers.
    named = {"/".join(keys): native(array) for keys, array in arrays.items()}
    with one_line(path, "cannot be written"):
        data = save(named, {"format": "pt"})
    write_whole(path, data)


_FILES = ("model.safetensors", f"model.safetensors{_INDEX}")
_READER = "`safetensors.numpy.load_file(file)`, `safetensors.torch.load_file(file)`"
FORMAT = Format("safetensors", _FILES, _open, _write, _READER, flat=True)
