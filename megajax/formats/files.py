"""Bytes on disk: what a file says it holds before it is read, checksums, and writes that are whole.

Knows paths, shapes and dtypes and nothing of networks. A file of a network may have its SHA-256
beside it (`NAME.sha256`, or `SHA256SUMS` inside a folder, as `sha256sum` writes them); where there
is one, it is compared before anything else is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megajax import io as files
from megajax.errors import InterchangeError, WorkdirError

__all__ = [
    "Spec",
    "Stored",
    "check_sums",
    "fingerprint",
    "read_bytes",
    "remove_sums",
    "write_bytes",
    "write_sums",
]

_SUFFIX, _SUMS = ".sha256", "SHA256SUMS"


class Spec(NamedTuple):
    """Shape and dtype of an array.

    Example:
        >>> str(Spec((2, 3), np.dtype("float32")))
        'float32[2,3]'
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


class Stored(NamedTuple):
    """A file of named arrays, opened and checked in itself, its arrays not yet read.

    Attributes:
        path: of the file.
        specs: what it says it holds: name -> shape and dtype.
        read: `read(names) -> {name: array}`.
    """

    path: Path
    specs: Mapping[str, Spec]
    read: Callable[[Sequence[str]], dict[str, np.ndarray]]


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Args:
        path: of the file.

    Returns:
        Its bytes.

    Raises:
        InterchangeError: it cannot be read.

    Example:
        >>> read_bytes(Path("no/such/file"))
        Traceback (most recent call last):
        ...
        megajax.errors.InterchangeError: no/such/file cannot be read: No such file or directory
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InterchangeError(f"{path} cannot be read: {error.strerror}") from None


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all; see `megajax.io.write_bytes`.

    Args:
        path: of the file; folders are made if need be.
        data: its bytes.

    Raises:
        InterchangeError: it cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "folder" / "file"
        >>> write_bytes(path, b"abc")
        >>> path.read_bytes()
        b'abc'
    """
    try:
        files.write_bytes(path, data)
    except WorkdirError as error:
        raise InterchangeError(str(error)) from None


def fingerprint(path: Path | str) -> str:
    """The SHA-256 of a file; of a folder, that of the list of its files' sums.

    Args:
        path: of a file or folder.

    Returns:
        64 hexadecimal digits.

    Raises:
        InterchangeError: it cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "file"
        >>> write_bytes(path, b"abc")
        >>> fingerprint(path)[:8]
        'ba7816bf'
    """
    path = Path(path)
    if path.is_dir():
        return hashlib.sha256(_sums(path).encode()).hexdigest()
    try:
        return files.file_digest(path)
    except WorkdirError as error:
        raise InterchangeError(str(error)) from None


def write_sums(path: Path) -> None:
    """Writes the sums of a file beside it, or of a folder into it.

    Args:
        path: of the file or folder.

    Raises:
        InterchangeError: they cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "file"
        >>> write_bytes(path, b"abc")
        >>> write_sums(path)
        >>> check_sums(path)
        >>> write_bytes(path, b"abd")
        >>> check_sums(path)
        Traceback (most recent call last):
        ...
        megajax.errors.InterchangeError: .../file is damaged: it does not have the SHA-256 that
        file.sha256 says
    """
    if path.is_dir():
        write_bytes(path / _SUMS, _sums(path).encode())
    else:
        text = f"{fingerprint(path)}  {path.name}\n"
        write_bytes(path.with_name(path.name + _SUFFIX), text.encode())


def remove_sums(path: Path) -> None:
    """Removes the sums of a file that is about to be replaced, if there are any.

    Args:
        path: of the file.

    Raises:
        InterchangeError: they cannot be removed.

    Example:
        >>> remove_sums(Path("file/without/sums"))
    """
    listed = path.with_name(path.name + _SUFFIX)
    try:
        if listed.exists():
            listed.unlink()
    except OSError as error:
        raise InterchangeError(f"{listed} cannot be replaced: {error.strerror}") from None


def check_sums(path: Path) -> None:
    """Compares a file or folder with its sums, where there are any.

    Args:
        path: of the file or folder.

    Raises:
        InterchangeError: it has changed since the sums were written.

    Example:
        >>> check_sums(Path("file/without/sums"))
    """
    if path.is_dir():
        listed = path / _SUMS
        if not listed.is_file():
            return
        found, wanted = _sums(path).encode().splitlines(), read_bytes(listed).splitlines()
        changed = sorted(set(found) ^ set(wanted))
        if found != wanted:
            names = sorted({line[66:].decode(errors="replace") for line in changed}) or [_SUMS]
            raise InterchangeError(f"{path} is damaged: {names[0]} is not as {_SUMS} says")
    else:
        listed = path.with_name(path.name + _SUFFIX)
        if listed.is_file() and read_bytes(listed)[:64] != fingerprint(path).encode():
            raise InterchangeError(
                f"{path} is damaged: it does not have the SHA-256 that {listed.name} says"
            )


def _sums(folder: Path) -> str:
    inside = (path for path in folder.rglob("*") if path.is_file() and path != folder / _SUMS)
    named = sorted((path.relative_to(folder).as_posix(), path) for path in inside)
    return "".join(f"{fingerprint(path)}  {name}\n" for name, path in named)
