"""NumPy archives: named arrays in a zip file, never pickled objects.

NumPy itself knows no bfloat16 and the like; such an array is stored as unsigned integers of the
same bits under the name `NAME::bfloat16`.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from megajax.errors import InterchangeError
from megajax.formats.files import Spec, Stored, write_bytes
from megajax.formats.trees import native

__all__ = ["open_npz", "write_npz"]

_DAMAGE = (
    ValueError,  # also of numpy's header parser
    EOFError,
    KeyError,
    NotImplementedError,  # a kind of compression
    RuntimeError,  # encrypted
    SyntaxError,  # of numpy's header parser
    TypeError,
    UnicodeError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
)
_EXTENDED: dict[str, np.dtype] = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4")
}
_DEFLATE_RATIO = 1032  # the most that deflate can shrink anything


def open_npz(path: Path) -> Stored:
    """Opens a NumPy archive and reads the headers of its arrays.

    Args:
        path: of the file.

    Returns:
        What it holds.

    Raises:
        InterchangeError: it cannot be read, is damaged, or holds objects.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "variables.npz"
        >>> np.savez(path, w=np.array([{}]))
        >>> open_npz(path)
        Traceback (most recent call last):
        ...
        megajax.errors.InterchangeError: .../variables.npz: w holds pickled objects, which are never
        loaded
    """
    members: dict[str, str] = {}
    specs: dict[str, Spec] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.filename.endswith(".npy"):
                    raise InterchangeError(f"{path}: {info.filename} is no NumPy array")
                if info.file_size > _DEFLATE_RATIO * info.compress_size + 1:
                    raise InterchangeError(f"{path} is damaged: {info.filename} has no such size")
                member = info.filename.removesuffix(".npy")
                spec = _header(path, member, archive, info)
                name, _, bits = member.partition("::")
                if name in specs:
                    raise InterchangeError(f"{path} has two arrays called {name}")
                specs[name] = spec._replace(dtype=_extended(path, name, bits, spec.dtype))
                members[name] = member
    except OSError as error:
        raise InterchangeError(f"{path} cannot be read: {error.strerror or error}") from None
    except _DAMAGE as error:
        raise InterchangeError(f"{path} is no npz file, or damaged: {error}") from None

    def read(names: Sequence[str]) -> dict[str, np.ndarray]:
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[members[name]] for name in names}
        except OSError as error:
            raise InterchangeError(f"{path} cannot be read: {error.strerror or error}") from None
        except _DAMAGE as error:
            raise InterchangeError(f"{path} is damaged: {error}") from None
        return {
            name: native(array.view(specs[name].dtype) if "::" in members[name] else array)
            for name, array in arrays.items()
        }

    return Stored(path, specs, read)


def write_npz(path: Path, arrays: Mapping[tuple[str, ...], np.ndarray]) -> None:
    """Writes a NumPy archive.

    Args:
        path: of the file.
        arrays: keys that lead to each array -> the array; `/` joins the keys.

    Raises:
        InterchangeError: it cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "variables.npz"
        >>> write_npz(path, {("params", "w"): np.ones(2, ml_dtypes.bfloat16)})
        >>> np.load(path)["params/w::bfloat16"].tolist()
        [16256, 16256]
    """
    members = {}
    for keys, array in arrays.items():
        name = "/".join(keys)
        if array.dtype.name in _EXTENDED:
            name, array = f"{name}::{array.dtype.name}", array.view(f"u{array.dtype.itemsize}")
        elif array.dtype.type.__module__ != "numpy":
            raise InterchangeError(f"leaf {name} is {array.dtype}, which npz has not")
        members[name] = array
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **members)
    write_bytes(path, buffer.getvalue())


def _header(path: Path, name: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Spec:
    """Shape and dtype of a member, whose size must be just that."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise InterchangeError(f"{path}: {name} has the unknown format {version}")
        rest = info.file_size - file.tell()
    if dtype.hasobject:
        raise InterchangeError(f"{path}: {name} holds pickled objects, which are never loaded")
    spec = Spec(shape, dtype.newbyteorder("="))
    if rest != spec.nbytes or any(length < 0 for length in shape):
        raise InterchangeError(
            f"{path} is damaged: {name} is {spec}, {spec.nbytes} bytes, and {rest} are there"
        )
    return spec


def _extended(path: Path, name: str, bits: str, stored: np.dtype) -> np.dtype:
    """The dtype that a member's name says, if it says one."""
    if not bits:
        return stored
    if bits in _EXTENDED and stored == f"u{_EXTENDED[bits].itemsize}":
        return _EXTENDED[bits]
    raise InterchangeError(f"{path}: {name} is stored as {bits} in {stored}, which is unknown")
