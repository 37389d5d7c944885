"""Checkpoints: the arrays of a state with a step number, one file each, whole or absent.

Knows pytrees and files, nothing of searches or training. A checkpoint is a safetensors file,
`STEP.DIGEST.safetensors`. One that its digest does not fit is damaged, and the one before is used.
"""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from megajax.errors import WorkdirError
from megajax.io import file_digest, pack, unpack, write_bytes
from megajax.run import processes as distributed
from megajax.sections import Section, at_least
from megajax.trees import is_key, leaves_by_path, unlike
from megajax.types import PyTree

__all__ = ["Checkpoint", "CheckpointConfig", "Checkpoints", "fit"]

_log = logging.getLogger(__name__)
_SHOWN = 16  # digits of a digest


class CheckpointConfig(Section):
    """How often a run saves its state. It has no influence on what the run finds.

    A state is saved as soon as one of the two is due, always after a whole chunk of generations or
    epoch of training, and once more when the search ends or the run is asked to stop.

    Attributes:
        every_generations: save every so many generations (in training: epochs); None switches it
            off.
        every_seconds: save every so many seconds; None switches it off.
        keep: newest checkpoints to keep; with more than one, a damaged one costs little.
    """

    section = "checkpoint"
    every_generations: Annotated[int, at_least(1)] | None = None
    every_seconds: Annotated[float, at_least(0)] | None = 60.0
    keep: Annotated[int, at_least(1)] = 3


class Checkpoint(NamedTuple):
    """A state read back: its number, and the arrays in the structure that was asked for."""

    step: int
    state: Any


class Checkpoints:
    """The checkpoints of one state in a folder.

    Of several processes of one run only the first one writes, and all go on from what it finds.

    Args:
        folder: made with the first checkpoint.
        identity: of the state; checkpoints that were saved under another identity are not used.
        config: how often to save, and how many to keep.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "checkpoints"
        >>> checkpoints = Checkpoints(folder, "example", CheckpointConfig(every_seconds=0))
        >>> for step in (1, 2):
        ...     checkpoints.offer(step, {"weights": np.full(2, step)})
        >>> Checkpoints(folder, "example").restore({"weights": np.zeros(2, int)})
        Checkpoint(step=2, state={'weights': array([2, 2])})
    """

    def __init__(self, folder: Path, identity: str, config: CheckpointConfig | None = None) -> None:
        self._folder = folder
        self._identity = identity
        self._config = config or CheckpointConfig()
        self._saved_step: int | None = None
        self._saved_at = time.monotonic()

    def restore(self, like: PyTree | None = None) -> Checkpoint | None:
        """The newest checkpoint that is whole; newer ones, if any, are removed with a warning.

        Args:
            like: a pytree of the structure, shapes and dtypes that the state must have; None takes
                any state, as nested dictionaries.

        Returns:
            The checkpoint; None if there is none that can be used.

        Raises:
            WorkdirError: the folder cannot be read or written.
        """
        found = self._newest(like) if distributed.is_first() else None
        step = int(distributed.of_first(-1 if found is None else found.step))
        if step < 0:
            return None
        with distributed.together():
            found = found or self._read(dict(self._files())[step], like)
        self._saved_step, self._saved_at = found.step, time.monotonic()
        return found

    def offer(self, step: int, state: PyTree) -> None:
        """Saves if the configuration says that it is time. Arguments and errors as for `save`."""
        every, seconds = self._config.every_generations, self._config.every_seconds
        done = step - (self._saved_step or 0)
        late = time.monotonic() - self._saved_at
        if (every is not None and done >= every) or (seconds is not None and late >= seconds):
            self.save(step, state)

    def save(self, step: int, state: PyTree) -> None:
        """Saves; does nothing if this step was saved last.

        Args:
            step: above all steps saved before.
            state: pytree of arrays, PRNG keys and numbers.

        Raises:
            WorkdirError: it cannot be written.
        """
        if step == self._saved_step or not distributed.is_first():
            return
        arrays = leaves_by_path(jax.device_get(jax.tree.map(_data, state)))
        data = pack(arrays, {"identity": self._identity, "step": step})
        shown = hashlib.sha256(data).hexdigest()[:_SHOWN]
        write_bytes(self._folder / f"{step}.{shown}.safetensors", data)
        for _, old in self._files()[: -self._config.keep]:
            old.unlink(missing_ok=True)
        self._saved_step, self._saved_at = step, time.monotonic()

    def _files(self) -> list[tuple[int, Path]]:
        """The steps and files of all checkpoints, oldest first."""
        files = [path for path in self._folder.glob("*.*.safetensors") if path.name[0].isdecimal()]
        return sorted((int(file.name.split(".")[0]), file) for file in files)

    def _newest(self, like: PyTree | None) -> Checkpoint | None:
        for unfinished in self._folder.glob(".*.partial"):
            unfinished.unlink(missing_ok=True)
        for _, file in reversed(self._files()):
            try:
                return self._read(file, like)
            except WorkdirError as error:
                _log.warning("checkpoint %s is not used: %s", file, error)
                file.unlink(missing_ok=True)
        return None

    def _read(self, file: Path, like: PyTree | None) -> Checkpoint:
        step, shown, _ = file.name.split(".")
        if file_digest(file)[:_SHOWN] != shown:
            raise WorkdirError("it is damaged")
        arrays, about = unpack(file)
        if about != {"identity": self._identity, "step": int(step)}:
            raise WorkdirError("it is of another configuration")
        nested = traverse_util.unflatten_dict(arrays, sep="/")
        return Checkpoint(int(step), nested if like is None else fit(like, arrays))


def fit(like: PyTree, arrays: dict[str, np.ndarray]) -> PyTree:
    """Puts arrays into the structure that they were saved from.

    Args:
        like: a pytree of the same structure, whose leaves have the shapes and dtypes to be.
        arrays: by the paths of the leaves.

    Raises:
        WorkdirError: a leaf is missing, left over, or of another shape or dtype; names it.

    Example:
        >>> fit((np.zeros(2),), {"0": np.ones(2)})
        (array([1., 1.]),)
        >>> fit((np.zeros(2),), {"0": np.ones(3)})
        Traceback (most recent call last):
        ...
        megajax.errors.WorkdirError: leaf 0 is float64[3] in the checkpoint, float64[2] here
    """
    for name, there, here in unlike(arrays, jax.tree.map(_data, like)):
        raise WorkdirError(f"leaf {name} is {there} in the checkpoint, {here} here")
    leaves = [_as(leaf, arrays[name]) for name, leaf in leaves_by_path(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _data(leaf: Any) -> Any:
    """A leaf as arrays hold it."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def _as(leaf: Any, array: np.ndarray) -> Any:
    """The array as what the leaf is: a PRNG key, a Python number, or an array."""
    if is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
    return type(leaf)(array) if isinstance(leaf, (bool, int, float)) else array
