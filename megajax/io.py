"""Files that are whole or absent, and known by their digests; the rest of the package writes so."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from megajax.errors import WorkdirError

__all__ = ["file_digest", "sync", "write_bytes"]


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, and so that it outlives a power cut.

    Args:
        path: its folder is made if need be.
        data: the content.

    Raises:
        WorkdirError: it cannot be written; names the file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "folder" / "file"
        >>> write_bytes(path, b"content")
        >>> path.read_bytes()
        b'content'
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)
    except OSError as error:
        raise WorkdirError(f"{path} cannot be written: {error.strerror}") from None


def sync(path: Path) -> None:
    """Brings what was written to a file, or the list of a folder's files, to the disk.

    Raises:
        OSError: the disk failed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """The SHA-256 digest of a file, as `sha256sum` prints it.

    Raises:
        WorkdirError: it cannot be read; names the file.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WorkdirError(f"{path} cannot be read: {error.strerror}") from None
