"""NumPy archives: named arrays in a zip file, never pickled objects.

NumPy itself knows no bfloat16 and the like; such an array is stored as unsigned integers of the
same bits under the name `NAME::bfloat16`.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from megajax.errors import InterchangeError
from megajax.formats.arrays import Format, Keyed, Spec, Stored, native
from megajax.formats.disk import one_line, write_whole

__all__ = ["FORMAT"]

_EXTENDED = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4")
}
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_DEFLATE_RATIO = 1032  # the most that deflate can shrink anything


def _open(path: Path) -> Stored:
    members: dict[str, str] = {}
    specs: dict[str, Spec] = {}
    with one_line(path, "is no npz file, or damaged"), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            member = info.filename.removesuffix(".npy")
            if member == info.filename:
                raise InterchangeError(f"{path}: {member} is not a NumPy array")
            name, _, bits = member.partition("::")
            if name in specs:
                raise InterchangeError(f"{path} has two arrays called {name}")
            specs[name] = _header(path, archive, info, bits)
            members[name] = member

    def read(names: Sequence[str]) -> dict[str, np.ndarray]:
        with one_line(path), np.load(path, allow_pickle=False) as archive:
            arrays = {name: native(archive[members[name]]) for name in names}
        return {
            name: array.view(specs[name].dtype) if "::" in members[name] else array
            for name, array in arrays.items()
        }

    return Stored(path, specs, read)


def _header(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, bits: str) -> Spec:
    """Shape and dtype of a member, whose size must be just that."""
    name = info.filename.removesuffix(".npy")
    if info.file_size > _DEFLATE_RATIO * info.compress_size + 1:
        raise InterchangeError(f"{path} is damaged: {name} has no such size")
    with archive.open(info) as file:
        shape, _, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
        rest = info.file_size - file.tell()
    if dtype.hasobject:
        raise InterchangeError(f"{path}: {name} holds pickled objects, which are never loaded")
    spec = Spec(shape, dtype.newbyteorder("="))
    if rest != spec.nbytes or any(length < 0 for length in shape):
        raise InterchangeError(
            f"{path} is damaged: {name} is {spec}, {spec.nbytes} bytes, and {rest} are there"
        )
    if not bits:
        return spec
    if bits not in _EXTENDED or dtype != f"u{_EXTENDED[bits].itemsize}":
        raise InterchangeError(f"{path}: {name} is stored in {dtype}, which is unknown")
    return spec._replace(dtype=_EXTENDED[bits])


def _write(path: Path, arrays: Keyed) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # np.savez has arguments of its own: "file"
        for keys, array in arrays.items():
            name = "/".join(keys)
            if "::" in name:
                raise InterchangeError(f"leaf {name} cannot be stored in npz: it has '::' in it")
            if array.dtype.name in _EXTENDED:
                name, array = f"{name}::{array.dtype.name}", array.view(f"u{array.dtype.itemsize}")
            elif array.dtype.type.__module__ != "numpy":
                raise InterchangeError(f"leaf {name} is {array.dtype}, which npz cannot hold")
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    write_whole(path, buffer.getvalue())


_READER = "NumPy: `np.load(file)`; bfloat16 is stored as bits, under `NAME::bfloat16`"
FORMAT = Format("npz", ("variables.npz",), _open, _write, _READER, flat=True)
