"""How a population is cut for its evaluation, and which devices share it.

A `Layout` says how many networks are evaluated side by side, on how many examples in a pass, and on
which devices; it decides how fast a population is scored, not what comes out of it.

The mesh has two axes. Along `population` the individuals are split: every device scores its share
and knows nothing of the others'. Along `network` each network's weights may be split, where they
do not fit on one device; how the devices work together there is left to the compiler. Devices of
several processes make one mesh as those of one process do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.dtypes import canonicalize_dtype
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from megajax.errors import ConfigError
from megajax.program.memory import live_bytes
from megajax.types import ApplyFn, PyTree

__all__ = [
    "NETWORK",
    "POPULATION",
    "Layout",
    "choose_layout",
    "network_specs",
    "over_population",
    "place",
    "population_mesh",
]

POPULATION, NETWORK = "population", "network"
_WHOLE = PartitionSpec()

_CPU_BYTES = 16e6
"""What a CPU keeps in its caches of one network's pass (benchmarks/population.py)."""
_SMALLEST, _LARGEST = 32, 512
_GPU_BATCH, _GPU_PASS = 1250, 5000
"""Examples of a pass, and of all networks side by side, on an accelerator (benchmarks/gpu.py)."""


@dataclass(frozen=True)
class Layout:
    """How a population is evaluated.

    Attributes:
        population_chunk: networks side by side (`vmap`), chunk after chunk (`lax.map`).
        batch_size: the most examples in one pass of a network.
        mesh: devices that share the population; None is one device.
        one_core: each of them is a core of a CPU.
    """

    population_chunk: int
    batch_size: int
    mesh: Mesh | None = None
    one_core: bool = False

    def plain(self) -> dict[str, Any]:
        """The layout as plain data: of the mesh, how many devices there are along each axis.

        Example:
            >>> Layout(1, 512).plain()
            {'population_chunk': 1, 'batch_size': 512, 'mesh': None}
        """
        mesh = None if self.mesh is None else dict(self.mesh.shape)
        return {
            "population_chunk": self.population_chunk,
            "batch_size": self.batch_size,
            "mesh": mesh,
        }


def choose_layout(
    apply_fn: ApplyFn, variables: PyTree, inputs: PyTree, config: Any, population_size: int
) -> Layout:
    """The layout that `FitnessConfig` asks for, `auto` replaced by a choice.

    The choice follows from the backend and the network's program alone, so that it is the same in
    every run. On a CPU networks go one by one, because that is never much slower there than side by
    side, and many times faster where `vmap` over kernels makes grouped convolutions; and a pass has
    as many examples as fit in the caches. On an accelerator a pass has 1,250 examples, and as many
    networks go side by side as make 5,000 (docs/gpu.md).

    Args:
        apply_fn: the network.
        variables: of one network, or their shapes and dtypes.
        inputs: the examples, or their shapes and dtypes.
        config: `population_chunk`, `batch_size`, `devices` and `devices_per_network`.
        population_size: individuals P. Devices beyond so many are left idle.

    Raises:
        ConfigError: there are not so many devices, or the numbers do not divide.
    """
    mesh = population_mesh(config.devices, config.devices_per_network, population_size)
    chunk, batch_size = config.population_chunk, config.batch_size
    total = jax.tree.leaves(inputs)[0].shape[0]
    on_cpu = jax.default_backend() == "cpu"
    if batch_size == "auto" and on_cpu:
        some = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                (_SMALLEST, *leaf.shape[1:]), canonicalize_dtype(leaf.dtype)
            ),
            inputs,
        )
        of_example = max(live_bytes(apply_fn, variables, some) / _SMALLEST, 1)
        batch_size = max(_SMALLEST, min(_LARGEST, int(_CPU_BYTES / of_example)))
    elif batch_size == "auto":
        batch_size = _GPU_BATCH
    if chunk == "auto":
        side_by_side = max(_GPU_PASS // min(batch_size, total), 1)
        chunk = 1 if on_cpu else min(side_by_side, population_size)
    one_core = on_cpu and mesh is not None and len(mesh.local_devices) >= (os.cpu_count() or 1)
    return Layout(chunk, batch_size, mesh, one_core)


def population_mesh(
    devices: int | str = "auto", devices_per_network: int = 1, population_size: int | None = None
) -> Mesh | None:
    """The mesh that `fitness.devices` and `fitness.devices_per_network` ask for.

    Args:
        devices: how many; `all` are those of all processes, and `auto` is one, or all where a
            network takes several.
        devices_per_network: how many of them share one network's weights.
        population_size: individuals, each on a device of its own at most; more devices than that
            are left idle. None uses all that are asked for.

    Returns:
        A mesh with the axes `population` and `network`; None for one device, which needs none.

    Raises:
        ConfigError: there are not so many devices, or the numbers do not divide.

    Example:
        >>> population_mesh(1) is None
        True
        >>> population_mesh(10**6)
        Traceback (most recent call last):
        ...
        megajax.errors.ConfigError: fitness.devices is 1000000: there are only ...
    """
    if devices == "auto" and devices_per_network == 1:
        devices = 1
    if devices == 1 == devices_per_network:
        return None  # and no question to the backend
    there = jax.devices()
    count = len(there) if isinstance(devices, str) else devices
    if count > len(there):
        raise ConfigError(f"fitness.devices is {count}: there are only {len(there)}")
    if jax.process_count() > 1 and count < len(there):
        raise ConfigError(
            f"fitness.devices is {count}: several processes need all {len(there)} ('all')"
        )
    if count % devices_per_network:
        raise ConfigError(
            f"fitness.devices_per_network is {devices_per_network}: it must divide the {count} "
            "of fitness.devices"
        )
    if population_size is not None and jax.process_count() == 1:
        count = min(count, population_size * devices_per_network)
    if count == 1:
        return None
    grid = np.array(there[:count]).reshape(-1, devices_per_network)
    return Mesh(grid, (POPULATION, NETWORK), axis_types=(AxisType.Auto, AxisType.Auto))


def over_population(
    function: Callable[[PyTree, PyTree], PyTree], mesh: Mesh, shared: PyTree, xs: PyTree
) -> PyTree:
    """Maps over the leading axis of `xs`, each device its share of it.

    A leading axis that does not divide evenly is filled up with repetitions of the last element,
    whose results are dropped.

    Args:
        function: `function(shared, xs [M, ...]) -> results [M, ...]`, element by element.
        mesh: from `population_mesh`.
        shared: what every device needs, whole or split along `network` (see `place`).
        xs: leaves `[P, ...]`.

    Returns:
        Leaves `[P, ...]`, whole on every device.

    Example:
        >>> mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), (POPULATION, NETWORK))
        >>> over_population(lambda a, x: a * x, mesh, 2.0, jnp.arange(3.0)).tolist()
        [0.0, 2.0, 4.0]
    """
    size = jax.tree.leaves(xs)[0].shape[0]
    share = -(-size // mesh.shape[POPULATION])
    padded = share * mesh.shape[POPULATION]
    split = PartitionSpec(POPULATION)

    def whole(tree: PyTree) -> PyTree:
        # Without this the compiler may spread what comes before and after over the devices, and
        # sums over the population would depend on their number.
        return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, _WHOLE))

    @jax.jit  # a no-op in a program; by itself, shard_map would run operation by operation
    def mapped(shared: PyTree, xs: PyTree) -> PyTree:
        if padded > size:
            repeated = np.minimum(np.arange(padded), size - 1)
            xs = jax.tree.map(lambda leaf: leaf[repeated], xs)
        results = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(_WHOLE, split),
            out_specs=split,
            axis_names={POPULATION},
            check_vma=False,  # a network may hold loops whose carry starts equal on all devices
        )(shared, whole(xs))
        return jax.tree.map(lambda leaf: leaf[:size], whole(results))

    return mapped(shared, xs)


def network_specs(tree: PyTree, mesh: Mesh) -> PyTree:
    """How leaves are split along `network`: at their largest axis that divides, or not at all.

    Args:
        tree: arrays, or shapes and dtypes.
        mesh: from `population_mesh`.

    Returns:
        A `PartitionSpec` for each leaf.

    Example:
        >>> mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), (POPULATION, NETWORK))
        >>> network_specs({"w": np.zeros((2, 3, 5))}, mesh)
        {'w': P()}
    """
    parts = mesh.shape[NETWORK]

    def spec(leaf: Any) -> PartitionSpec:
        axes = [axis for axis, size in enumerate(leaf.shape) if size and size % parts == 0]
        if parts == 1 or not axes:
            return _WHOLE
        largest = max(axes, key=lambda axis: leaf.shape[axis])
        return PartitionSpec(*[None] * largest, NETWORK)

    return jax.tree.map(spec, tree)


def place(tree: PyTree, mesh: Mesh | None, *, split: bool = False) -> PyTree:
    """Puts arrays where the population is scored, once, and not again in every generation.

    Args:
        tree: arrays, equal in all processes.
        mesh: None is the default device.
        split: along `network` (see `network_specs`); otherwise every device gets all.

    Returns:
        The arrays.

    Example:
        >>> place(np.arange(2), None).tolist()
        [0, 1]
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    specs = network_specs(tree, mesh) if split else jax.tree.map(lambda _: _WHOLE, tree)
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs
    )
