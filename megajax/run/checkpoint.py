"""Checkpoints: pytrees of arrays with a step number, written in the background, whole or not.

Knows arrays and files, nothing of searches or training. Orbax writes the files, renames a finished
checkpoint into place and keeps the last few. Before the renaming the SHA-256 digests of the files
are written beside them: a checkpoint that they do not fit is damaged, and the one before is used.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization, traverse_util

from megajax.errors import WorkdirError, first_line
from megajax.io import file_digest, sync, write_bytes
from megajax.run import processes as distributed
from megajax.sections import Section, at_least
from megajax.types import PyTree

__all__ = ["Checkpoint", "CheckpointConfig", "Checkpoints", "alone", "fit"]

_log = logging.getLogger(__name__)
_STATE, _ABOUT, _SEAL = "state", "about", "SHA256SUMS"


class CheckpointConfig(Section):
    """How often a run saves its state. It has no influence on what the run finds.

    A state is saved as soon as one of the two is due, always after a whole chunk of generations or
    epoch of training, and once more when the search ends or the run is asked to stop.

    Attributes:
        every_generations: save after so many generations (for training: epochs); None never does.
        every_seconds: save after so many seconds; None never does.
        keep: newest checkpoints to keep; with more than one, a damaged one costs little.
    """

    section = "checkpoint"
    every_generations: Annotated[int, at_least(1)] | None = None
    every_seconds: Annotated[float, at_least(0)] | None = 60.0
    keep: Annotated[int, at_least(1)] = 3


class Checkpoint(NamedTuple):
    """A state read back.

    Attributes:
        step: its number.
        state: NumPy arrays, in the containers that were asked for.
    """

    step: int
    state: Any


class Checkpoints:
    """The checkpoints of one state in a folder. A context manager: leaving it waits for the writer.

    Args:
        folder: made with the first checkpoint.
        identity: of the state; checkpoints that were saved under another identity are not used.
        config: how often to save, and how many to keep.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "checkpoints"
        >>> with Checkpoints(folder, "example", CheckpointConfig(every_seconds=0)) as checkpoints:
        ...     for step in (1, 2):
        ...         checkpoints.offer(step, {"weights": np.full(2, step)})
        >>> with Checkpoints(folder, "example", CheckpointConfig()) as checkpoints:
        ...     step, state = checkpoints.restore()
        >>> step, state["weights"].tolist()
        (2, [2, 2])
    """

    def __init__(self, folder: Path, identity: str, config: CheckpointConfig) -> None:
        self._folder = folder.absolute()
        self._identity = identity
        self._config = config
        self._manager: ocp.CheckpointManager | None = None
        self._saved_step: int | None = None
        self._saved_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except WorkdirError:
            if error is None:  # otherwise the first error is the one to tell
                raise

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
        if not self._folder.exists():
            return None
        manager = self._open()
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                state = self._read(manager, step)
                state = state if like is None else fit(like, state)
            except Exception as error:  # Orbax raises every kind of error for damaged files
                _log.warning(
                    "checkpoint %s is not used: %s", self._folder / str(step), _line(error)
                )
                self._guarded(partial(manager.delete, step))
                continue
            self._saved_step, self._saved_at = step, time.monotonic()
            return Checkpoint(step, state)
        return None

    def offer(self, step: int, state: PyTree) -> None:
        """Saves if the configuration says that it is time. Arguments and errors as for `save`."""
        every, seconds = self._config.every_generations, self._config.every_seconds
        done = step - (self._saved_step or 0)
        late = time.monotonic() - self._saved_at
        if (every is not None and done >= every) or (seconds is not None and late >= seconds):
            self.save(step, state)

    def save(self, step: int, state: PyTree) -> None:
        """Saves in the background; does nothing if this step was saved last.

        Of several processes of one run, only the first one saves.

        Args:
            step: above all steps saved before.
            state: pytree of arrays in containers that Flax can serialise.

        Raises:
            WorkdirError: this checkpoint or the one before cannot be written.
        """
        if step == self._saved_step or not distributed.is_first():
            # Nobody goes on from the checkpoints of others. And Orbax signals such things as that a
            # folder is made on one board for all processes: two that save would be mixed up.
            return
        leaves = {name: np.asarray(leaf) for name, leaf in _flat(jax.device_get(state)).items()}
        empty = {name: leaf for name, leaf in leaves.items() if not leaf.size}
        about = {
            "identity": self._identity,
            "step": step,
            "empty": {name: [leaf.shape, leaf.dtype.name] for name, leaf in empty.items()},
        }
        filled = {name: leaf for name, leaf in leaves.items() if leaf.size}  # as Orbax wants it
        items = {_STATE: ocp.args.StandardSave(filled), _ABOUT: ocp.args.JsonSave(about)}
        self.wait()
        self._saved_step, self._saved_at = step, time.monotonic()
        manager = self._open()
        self._guarded(lambda: manager.save(step, args=ocp.args.Composite(**items)))

    def wait(self) -> None:
        """Waits until what was saved is on the disk.

        Raises:
            WorkdirError: it cannot be written.
        """
        if self._manager is not None:
            self._guarded(self._manager.wait_until_finished)
            self._guarded(lambda: sync(self._folder))

    def close(self) -> None:
        """Waits and lets go of the folder.

        Raises:
            WorkdirError: the last checkpoint cannot be written.
        """
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._guarded(self._manager.close)
                self._manager = None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            for unfinished in self._folder.glob("*.*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            own = alone()
            own_options = {} if own is None else {"multiprocessing_options": own, "create": False}
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._config.keep,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._finish),
                **own_options,
            )

            def create() -> ocp.CheckpointManager:
                self._folder.mkdir(parents=True, exist_ok=True)
                return ocp.CheckpointManager(self._folder, options=options)

            self._manager = self._guarded(create)
        return self._manager

    def _finish(self) -> None:
        """Seals the checkpoint that Orbax has just written and is about to rename to `STEP`."""
        _seal(next(self._folder.glob(f"{self._saved_step}.*")))

    def _read(self, manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
        _check_seal(self._folder / str(step))
        items = {_STATE: ocp.args.StandardRestore(), _ABOUT: ocp.args.JsonRestore()}
        found = manager.restore(step, args=ocp.args.Composite(**items))
        leaves, about = found[_STATE], found[_ABOUT]
        if about["identity"] != self._identity or about["step"] != step:
            raise WorkdirError("it is of another configuration")
        for name, (shape, dtype) in about["empty"].items():
            leaves[name] = np.zeros(shape, dtype)
        tree: dict[str, Any] = traverse_util.unflatten_dict(leaves, sep="/")
        return tree

    def _guarded(self, action: Callable[[], Any]) -> Any:
        """What goes wrong while writing is told in one line that names the folder."""
        try:
            return action()
        except Exception as error:  # from whichever thread and library
            raise WorkdirError(f"{self._folder} cannot be written: {_line(error)}") from error


def fit(like: PyTree, state: Mapping[str, Any]) -> PyTree:
    """Puts a restored state into the containers that it was saved from.

    Args:
        like: a pytree of the same structure, whose leaves have the shapes and dtypes to be.
        state: nested dictionaries of arrays.

    Returns:
        The arrays in the structure of `like`.

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
    leaves, treedef = jax.tree.flatten(like)
    positions = _flat(jax.tree.unflatten(treedef, range(len(leaves))))
    found = _flat(state)
    for name in {**positions, **found}:
        there = _describe(found.get(name))
        here = _describe(leaves[positions[name]] if name in positions else None)
        if there != here:
            raise WorkdirError(f"leaf {name} is {there} in the checkpoint, {here} here")
    by_position = {position: found[name] for name, position in positions.items()}
    return jax.tree.unflatten(treedef, [by_position[i] for i in range(len(leaves))])


def alone() -> ocp.options.MultiprocessingOptions | None:
    """How Orbax is to write where each process of a distributed run does so for itself.

    The first one saves when its clock says so, and all of them read, each in a folder of its own;
    Orbax would otherwise wait for all of them.

    Returns:
        Options; None in a run of one process.

    Example:
        >>> alone() is None
        True
    """
    if not distributed.several():
        return None
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process{process}",
    )


def _flat(tree: PyTree) -> dict[str, Any]:
    """The leaves by names such as `population/fitness`."""
    flat: dict[str, Any] = traverse_util.flatten_dict(serialization.to_state_dict(tree), sep="/")
    return flat


def _describe(leaf: Any) -> str:
    return "absent" if leaf is None else f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _seal(folder: Path) -> None:
    """Brings the files to the disk, where a power cut leaves them, and notes their digests."""
    for path in folder.rglob("*"):
        sync(path)
    lines = [f"{digest}  {name}\n" for name, digest in _digests(folder).items()]
    write_bytes(folder / _SEAL, "".join(lines).encode())


def _check_seal(folder: Path) -> None:
    try:
        noted = dict(line.split("  ")[::-1] for line in (folder / _SEAL).read_text().splitlines())
    except ValueError:
        raise WorkdirError(f"{_SEAL} is damaged") from None
    found = _digests(folder)
    wrong = [name for name in {**noted, **found} if noted.get(name) != found.get(name)]
    if wrong:
        raise WorkdirError(f"{wrong[0]} is damaged")


def _digests(folder: Path) -> dict[str, str]:
    files = [path for item in (_STATE, _ABOUT) for path in sorted((folder / item).rglob("*"))]
    return {
        path.relative_to(folder).as_posix(): file_digest(path) for path in files if path.is_file()
    }


def _line(error: Exception) -> str:
    """The first line of an error's text, without TensorStore's appendix."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error).split(" [tensorstore_spec=")[0]
