"""How a population is cut for its evaluation: networks side by side, and examples in one pass.

Knows programs, shapes and devices; nothing of genes, fitness or files. A plan decides how fast a
population is scored and how much memory that takes, not what comes out of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.sharding import Mesh

from megajax.config import FitnessConfig
from megajax.sharding import population_mesh
from megajax.types import ApplyFn, PyTree

__all__ = ["Plan", "footprint", "has_convolutions", "plan_evaluation"]

# What a CPU keeps in its caches of one network's pass (benchmarks/population.py); elsewhere, the
# most examples in a pass.
_CPU_BYTES = 32e6
_SMALLEST, _LARGEST = 32, 512


class Plan(NamedTuple):
    """How a population is evaluated.

    Attributes:
        population_chunk: networks side by side (`vmap`), chunk after chunk (`lax.map`).
        batch_size: the most examples in one pass of a network.
        mesh: devices that share the population; None is one device.
    """

    population_chunk: int
    batch_size: int
    mesh: Mesh | None = None

    def plain(self) -> dict[str, Any]:
        """The plan as plain data: of the mesh, how many devices there are along each axis.

        Example:
            >>> Plan(1, 512).plain()
            {'population_chunk': 1, 'batch_size': 512, 'mesh': None}
        """
        mesh = None if self.mesh is None else dict(self.mesh.shape)
        return {**self._asdict(), "mesh": mesh}


def plan_evaluation(
    apply_fn: ApplyFn,
    variables: PyTree,
    inputs: Any,
    config: FitnessConfig,
    population_size: int,
) -> Plan:
    """The plan that a configuration asks for, `auto` replaced by a choice.

    The choice follows from the backend and the network's program alone, so that it is the same in
    every run. On a CPU, networks with convolutions go one by one, because `vmap` over kernels makes
    grouped convolutions, which are several times slower there, and a pass has as many examples as
    fit in the caches. Otherwise the whole population goes side by side.

    Args:
        apply_fn: the network.
        variables: of one network, or their shapes and dtypes.
        inputs: any number of examples, or their shape and dtype.
        config: `population_chunk` and `batch_size`, as numbers or `auto`; the devices.
        population_size: individuals P.

    Returns:
        The plan.

    Raises:
        ConfigError: there are not so many devices, or the numbers do not divide.

    Example:
        >>> import jax.numpy as jnp
        >>> inputs = jax.ShapeDtypeStruct((1000, 3), jnp.float32)
        >>> plan_evaluation(lambda w, x: x @ w, jnp.ones((3, 2)), inputs, FitnessConfig(), 20)
        Plan(population_chunk=20, batch_size=512, mesh=None)
    """
    chunk, batch_size = config.population_chunk, config.batch_size
    one_by_one = jax.default_backend() == "cpu" and has_convolutions(apply_fn, variables, inputs)
    if isinstance(batch_size, str):
        batch_size = _LARGEST
        if one_by_one:
            few = jax.ShapeDtypeStruct((_SMALLEST, *inputs.shape[1:]), inputs.dtype)
            one = footprint(apply_fn, variables, few) / _SMALLEST
            batch_size = max(_SMALLEST, min(_LARGEST, int(_CPU_BYTES / one)))
    if isinstance(chunk, str):
        chunk = 1 if one_by_one else population_size
    return Plan(chunk, batch_size, population_mesh(config.devices, config.devices_per_network))


def has_convolutions(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> bool:
    """Whether there are convolutions in a network's program.

    Args:
        apply_fn: the network.
        variables: of one network, or their shapes and dtypes.
        inputs: a batch, or its shape and dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> has_convolutions(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((1, 3)))
        False
    """
    program = jax.make_jaxpr(apply_fn)(variables, inputs)
    return "conv_general_dilated" in _primitives(program.jaxpr)


def footprint(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> int:
    """About how much memory one network takes while it is evaluated on one batch.

    Its weights, and the most that is alive at once if its program runs equation by equation, as it
    is written. Compilers fuse equations and need less, but convolutions may take a workspace.

    Args:
        apply_fn: the network.
        variables: of one network, or their shapes and dtypes.
        inputs: one batch, or its shape and dtype.

    Returns:
        Bytes.

    Example:
        >>> import jax.numpy as jnp
        >>> footprint(lambda w, x: jnp.tanh(x @ w), jnp.ones((3, 2)), jnp.ones((5, 3)))
        104
    """
    program = jax.make_jaxpr(apply_fn)(variables, inputs)
    weights = program.jaxpr.invars[: len(jax.tree.leaves(variables))]
    return sum(map(_size, weights)) + _peak(program.jaxpr)


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


def _primitives(jaxpr: core.Jaxpr) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in core.jaxprs_in_params(equation.params):
            yield from _primitives(inner)
