"""Orbax checkpoints: folders of arrays, whose metadata is read and checked before any of them is.

Orbax is imported only when a checkpoint is opened or written. It stores no arrays without elements;
they need no storage, and are there again where the network is known that they belong to.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from megajax.errors import InterchangeError, first_line
from megajax.formats.files import Spec, Stored, write_sums
from megajax.formats.trees import native, nested

__all__ = ["is_orbax", "open_orbax", "write_orbax"]

_METADATA = "_METADATA"


def is_orbax(path: Path) -> bool:
    """Whether a folder is an Orbax checkpoint of a pytree, or one step of a checkpoint manager.

    Args:
        path: of the folder.

    Returns:
        The answer.

    Example:
        >>> is_orbax(Path("."))
        False
    """
    return any((at / _METADATA).is_file() for at in (path, path / "default"))


def open_orbax(path: Path) -> Stored:
    """Opens an Orbax checkpoint and reads its metadata.

    Args:
        path: the checkpoint's folder, or that of one step of a checkpoint manager.

    Returns:
        What it holds.

    Raises:
        InterchangeError: it cannot be read or is damaged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "checkpoint"
        >>> write_orbax(path, {("params", "w"): np.ones(2, np.float32)})
        >>> stored = open_orbax(path)
        >>> str(stored.specs["params/w"]), stored.read(["params/w"])["params/w"].tolist()
        ('float32[2]', [1.0, 1.0])
    """
    import orbax.checkpoint as ocp

    folder = (path if (path / _METADATA).is_file() else path / "default").resolve()
    try:
        with _quiet(), _checkpointer() as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata.tree
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
        raise InterchangeError(
            f"{path} is no Orbax checkpoint, or damaged: {_line(error)}"
        ) from None
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in flat]
    if len(set(names)) < len(names):
        raise InterchangeError(f"{path} has two leaves of one name")
    specs = {}
    for name, (_, entry) in zip(names, flat, strict=True):
        shape, dtype = getattr(entry, "shape", None), getattr(entry, "dtype", None)
        if shape is None or dtype is None:
            shape, dtype = (), object
        specs[name] = Spec(tuple(shape), np.dtype(dtype))

    def read(wanted: Sequence[str]) -> dict[str, np.ndarray]:
        chosen = set(wanted)
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        arguments = [as_numpy if name in chosen else ocp.PLACEHOLDER for name in names]
        asked = [0 if name in chosen else ocp.PLACEHOLDER for name in names]
        try:
            with _quiet(), _checkpointer() as checkpointer:
                restored = checkpointer.restore(
                    folder,
                    item=jax.tree.unflatten(treedef, asked),
                    restore_args=jax.tree.unflatten(treedef, arguments),
                )
            leaves = jax.tree.leaves(restored)
        except Exception as error:
            raise InterchangeError(f"{path} is damaged: {_line(error)}") from None
        arrays = dict(zip(names, leaves, strict=True))
        return {name: native(np.asarray(arrays[name])) for name in wanted}

    return Stored(path, specs, read)


def write_orbax(path: Path, arrays: Mapping[tuple[str, ...], np.ndarray]) -> None:
    """Writes an Orbax checkpoint, with the sums of its files.

    A checkpoint that is there already is replaced once the new one is whole.

    Args:
        path: of the folder.
        arrays: keys that lead to each array -> the array; those without elements are left out.

    Raises:
        InterchangeError: it cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "checkpoint"
        >>> write_orbax(path, {("w",): np.ones(2)})
        >>> is_orbax(path)
        True
    """
    tree: dict[str, Any] = nested({keys: array for keys, array in arrays.items() if array.size})
    temporary = path.with_name(f".{path.name}.partial").absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        with _checkpointer() as checkpointer:
            checkpointer.save(temporary, tree)
        write_sums(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except OSError as error:
        raise InterchangeError(f"{path} cannot be written: {error.strerror or error}") from None
    except ValueError as error:
        raise InterchangeError(f"{path} cannot be written: {_line(error)}") from None


def _checkpointer() -> Any:
    """Orbax's, which in a run of several processes each of them uses for itself."""
    import orbax.checkpoint as ocp

    from megajax.run.checkpoint import alone

    own = alone()
    if own is None:
        return ocp.PyTreeCheckpointer()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=own)
    return ocp.Checkpointer(handler, multiprocessing_options=own)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from logging, and its threads from reporting, what becomes one line here.

    When one array cannot be read, those that are being read still report to an event loop that is
    closed by then.
    """
    logger, report = logging.getLogger("absl"), sys.unraisablehook
    disabled = logger.disabled

    def others(unraisable: sys.UnraisableHookArgs) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            report(unraisable)

    logger.disabled, sys.unraisablehook = True, others
    try:
        yield
    except Exception:
        time.sleep(0.1)  # for those reports
        raise
    finally:
        logger.disabled, sys.unraisablehook = disabled, report


def _line(error: Exception) -> str:
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"[:300]
