"""Bytes on disk: whatever goes wrong is one line that names the file, and whole files have sums.

Knows paths and nothing of networks. A file may have its SHA-256 beside it (`NAME.sha256`, or
`SHA256SUMS` inside a folder, as `sha256sum` writes them); where there is one, it is compared before
anything else is read.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from megajax import io
from megajax.errors import InterchangeError, MegajaxError, WorkdirError, first_line

__all__ = ["check_sums", "fingerprint", "one_line", "remove_sums", "write_sums", "write_whole"]

_SUFFIX, _SUMS = ".sha256", "SHA256SUMS"
_LONGEST = 300


@contextlib.contextmanager
def one_line(path: Path, wrong: str = "is damaged", verb: str = "read") -> Iterator[None]:
    """Whatever is raised inside becomes an InterchangeError of one line.

    Libraries raise a great many kinds of errors for damaged bytes, so none is told from another.

    Example:
        >>> with one_line(Path("a.npz")):
        ...     raise KeyError("w")
        Traceback (most recent call last):
        ...
        megajax.errors.InterchangeError: a.npz is damaged: KeyError: 'w'
    """
    try:
        yield
    except WorkdirError as error:  # of megajax.io: it names the file
        raise InterchangeError(str(error)) from None
    except MegajaxError:
        raise
    except OSError as error:
        raise InterchangeError(f"{path} cannot be {verb}: {error.strerror or error}") from None
    except Exception as error:
        kind, line = type(error).__name__, first_line(error)
        text = line if line == kind else f"{kind}: {line}"
        raise InterchangeError(f"{path} {wrong}: {text[:_LONGEST]}") from None


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all; see `megajax.io.write_bytes`.

    Raises:
        InterchangeError: it cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "folder" / "file"
        >>> write_whole(path, b"abc")
        >>> path.read_bytes()
        b'abc'
    """
    with one_line(path):
        io.write_bytes(path, data)


def fingerprint(path: Path | str) -> str:
    """The SHA-256 of a file; of a folder, that of the list of its files' sums.

    Raises:
        InterchangeError: it cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "file"
        >>> write_whole(path, b"abc")
        >>> fingerprint(path)[:8]
        'ba7816bf'
    """
    path = Path(path)
    if path.is_dir():
        return hashlib.sha256(_listed(path).encode()).hexdigest()
    with one_line(path):
        return io.file_digest(path)


def write_sums(path: Path) -> None:
    """Writes the sums of a file beside it, or of a folder into it.

    Raises:
        InterchangeError: they cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "file"
        >>> write_whole(path, b"abc")
        >>> write_sums(path)
        >>> check_sums(path)
        >>> write_whole(path, b"abd")
        >>> check_sums(path)
        Traceback (most recent call last):
        ...
        megajax.errors.InterchangeError: .../file is damaged: it does not have the SHA-256 that
        file.sha256 says
    """
    text = _listed(path) if path.is_dir() else f"{fingerprint(path)}  {path.name}\n"
    write_whole(_sums(path), text.encode())


def remove_sums(path: Path) -> None:
    """Removes the sums of a file that is about to be replaced, if there are any.

    Raises:
        InterchangeError: they cannot be removed.

    Example:
        >>> remove_sums(Path("file_without_sums"))
    """
    with (
        one_line(_sums(path), verb="replaced"),
        contextlib.suppress(FileNotFoundError, NotADirectoryError),
    ):
        _sums(path).unlink()


def check_sums(path: Path) -> None:
    """Compares a file or folder with its sums, where there are any.

    Raises:
        InterchangeError: it has changed since the sums were written.

    Example:
        >>> check_sums(Path("file_without_sums"))
    """
    if not _sums(path).is_file():
        return
    with one_line(_sums(path)):
        said = _sums(path).read_bytes()
    if path.is_dir():
        found, wanted = _listed(path).encode().splitlines(), said.splitlines()
        if found != wanted:
            changed = {line[66:].decode(errors="replace") for line in {*found} ^ {*wanted}}
            name = min(changed, default=_SUMS)
            raise InterchangeError(f"{path} is damaged: {name} is not as {_SUMS} says")
    elif said[:64] != fingerprint(path).encode():
        raise InterchangeError(
            f"{path} is damaged: it does not have the SHA-256 that {_sums(path).name} says"
        )


def _sums(path: Path) -> Path:
    return path / _SUMS if path.is_dir() else path.with_name(path.name + _SUFFIX)


def _listed(folder: Path) -> str:
    inside = (path for path in folder.rglob("*") if path.is_file() and path != folder / _SUMS)
    named = sorted((path.relative_to(folder).as_posix(), path) for path in inside)
    return "".join(f"{fingerprint(path)}  {name}\n" for name, path in named)
