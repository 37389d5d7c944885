"""What the processes of one run must agree on.

Every process does the whole run, the same stages in the same order, and they work together only
where a program spans the devices of all (`megajax.merging.devices`). So they must hold the same
parents, stop at the same place and fail together; and only the first of them writes to the workdir,
which all of them read. In a run of one process every function here returns at once.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from megajax.errors import ProcessError, first_line
from megajax.types import PyTree

__all__ = ["connect", "cores", "is_first", "largest", "of_first", "several", "together"]

# Seconds that a process that ends waits for the others; they may be stuck where it has failed.
_PATIENCE = 60


def connect(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: int = 300,
) -> None:
    """Makes this process one of several; to be called before JAX looks for devices.

    Args:
        coordinator: `host:port` of the first process; None takes what the cluster's environment
            says (SLURM, Open MPI, Kubernetes, ...).
        processes: how many there are; None likewise.
        process: the number of this one, from 0; None likewise.
        timeout: seconds to wait for the others.

    Raises:
        ProcessError: the others are not there, or the environment says too little.

    Example:
        >>> connect("localhost:1234", 2, 2)
        Traceback (most recent call last):
        ...
        megajax.errors.ProcessError: --distributed: no connection: ...
    """
    if coordinator is not None and 0 < (process or 0) < (processes or 0):
        _wait_for(coordinator, timeout)  # JAX would end the process where nobody answers
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=timeout,
            shutdown_timeout_seconds=_PATIENCE,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise ProcessError(f"--distributed: no connection: {first_line(error)}") from None


def cores() -> int:
    """How many cores this process may use.

    Example:
        >>> cores() > 0
        True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def several() -> bool:
    """Whether this run has several processes.

    Example:
        >>> several()
        False
    """
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes to the workdir.

    Example:
        >>> is_first()
        True
    """
    return not several() or jax.process_index() == 0


def largest(number: int) -> int:
    """The largest of all processes' numbers, in all of them.

    Args:
        number: this process's, from 0 to 2**31 - 1.

    Example:
        >>> largest(3)
        3
    """
    return max(_numbers(number)) if several() else number


def of_first(tree: PyTree) -> PyTree:
    """The first process's arrays, bit for bit, in all processes.

    Args:
        tree: arrays, of the same shapes and dtypes everywhere.

    Returns:
        The arrays: NumPy, or in a run of one process the very same.

    Example:
        >>> of_first({"a": np.arange(2)})
        {'a': array([0, 1])}
    """
    if not several():
        return tree
    leaves, treedef = jax.tree.flatten(jax.device_get(tree))
    arrays = [np.asarray(leaf) for leaf in leaves]
    # As bytes: the broadcast is a sum, which would lose the sign of zeros.
    sent = np.frombuffer(b"".join(array.tobytes() for array in arrays), np.uint8)
    got = np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes()
    ends = np.cumsum([0, *(array.nbytes for array in arrays)])
    received = [
        np.frombuffer(got[start:end], array.dtype).reshape(array.shape).copy()
        for array, start, end in zip(arrays, ends, ends[1:], strict=False)
    ]
    return jax.tree.unflatten(treedef, received)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is done inside succeeds in all processes, or all of them stop.

    Raises:
        ProcessError: another process failed, and said why.

    Example:
        >>> with together():
        ...     pass
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = _numbers(failure is not None) if several() else []
    if failure is not None:
        raise failure
    if any(failed):
        raise ProcessError(f"process {failed.index(1)} cannot go on; it says why")


def _wait_for(coordinator: str, timeout: int) -> None:
    host, _, port = coordinator.rpartition(":")
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, ValueError) as error:
            if time.monotonic() > until or isinstance(error, ValueError):
                raise ProcessError(
                    f"--distributed: no connection to process 0 at {coordinator}: "
                    f"{first_line(error)}"
                ) from None
        time.sleep(0.2)


def _numbers(number: int) -> list[int]:
    return multihost_utils.process_allgather(np.int32(number)).tolist()
