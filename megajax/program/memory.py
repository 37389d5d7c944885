"""What a program takes of the memory, told before it runs.

Knows programs and devices; nothing of networks or populations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from megajax.errors import DeviceError, first_line
from megajax.types import ApplyFn, PyTree

__all__ = ["check_fits", "live_bytes"]


def check_fits(compiled: Callable[[], Any]) -> None:
    """Checks that a program fits in the memory of its device, where that can be told.

    Args:
        compiled: gives the compiled program; called only where the device tells its memory.

    Raises:
        DeviceError: it does not fit; says what it takes and what there is.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return
    try:
        found = compiled().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise DeviceError(
                f"a generation does not fit in the memory: {first_line(error)}"
            ) from error
        raise
    needed = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if needed > free:
        raise DeviceError(
            f"a generation takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: lower "
            "fitness.population_chunk, fitness.batch_size or evolution.population_size"
        )


def live_bytes(apply_fn: ApplyFn, variables: PyTree, inputs: PyTree) -> int:
    """The most bytes of results that are alive at once if a network runs as it is written.

    Equation by equation; compilers fuse equations and need less, but convolutions may take a
    workspace. The weights do not count.

    Args:
        apply_fn: the network.
        variables: of one network, or their shapes and dtypes.
        inputs: one batch, or its shapes and dtypes.

    Example:
        >>> import jax.numpy as jnp
        >>> live_bytes(lambda w, x: jnp.tanh(x @ w), jnp.ones((3, 2)), jnp.ones((5, 3)))
        80
    """
    return _peak(jax.make_jaxpr(apply_fn)(variables, inputs).jaxpr)


def _size(atom: Any) -> int:
    return int(atom.aval.size) * int(atom.aval.dtype.itemsize)


def _peak(jaxpr: core.Jaxpr) -> int:
    """The most bytes of results that are alive at once; arguments apart."""
    last_use = {
        atom: number
        for number, equation in enumerate(jaxpr.eqns)
        for atom in equation.invars
        if not isinstance(atom, core.Literal)
    }
    last_use |= dict.fromkeys(
        (atom for atom in jaxpr.outvars if not isinstance(atom, core.Literal)), len(jaxpr.eqns)
    )
    alive: dict[Any, int] = {}
    peak = 0
    for number, equation in enumerate(jaxpr.eqns):
        inside = max(map(_peak, core.jaxprs_in_params(equation.params)), default=0)
        alive |= {atom: _size(atom) for atom in equation.outvars}
        peak = max(peak, sum(alive.values()) + inside)
        alive = {atom: size for atom, size in alive.items() if last_use.get(atom, 0) > number}
    return peak
