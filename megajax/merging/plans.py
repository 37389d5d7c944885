"""How a population is cut for its evaluation: networks side by side, and examples in one pass.

Knows programs, shapes and devices; nothing of genes, fitness or files. A plan decides how fast a
population is scored and how much memory that takes, not what comes out of it.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import Mesh

from megajax.config import FitnessConfig
from megajax.errors import DeviceError
from megajax.merging.devices import population_mesh
from megajax.program.folding import for_backend
from megajax.types import ApplyFn, PyTree

__all__ = [
    "Memory",
    "Plan",
    "check_memory",
    "footprint",
    "free_memory",
    "plan_evaluation",
    "predict_memory",
    "trial",
]

# What a CPU keeps in its caches of one network's pass (benchmarks/population.py); elsewhere, the
# most examples in a pass.
_CPU_BYTES = 16e6
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

    By default the choice follows from the backend and the network's program alone, so that it is
    the same in every run. On a CPU networks go one by one, because that is never much slower there
    than side by side, and many times faster where `vmap` over kernels makes grouped convolutions;
    and a pass has as many examples as fit in the caches. Elsewhere as much of the population goes
    side by side as fits in the memory. With `fitness.trial` the choice is measured instead, see
    `trial`.

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
        >>> inputs = jax.ShapeDtypeStruct((1000, 3), jnp.float32)
        >>> plan_evaluation(lambda w, x: x @ w, jnp.ones((3, 2)), inputs, FitnessConfig(), 20)
        Plan(population_chunk=1, batch_size=512, mesh=None)
    """
    chunk, batch_size = config.population_chunk, config.batch_size
    mesh = population_mesh(config.devices, config.devices_per_network)
    if isinstance(chunk, int) and isinstance(batch_size, int):
        return Plan(chunk, batch_size, mesh)
    if config.trial:
        chunks = _powers(1, population_size) if isinstance(chunk, str) else [chunk]
        sizes = _powers(_SMALLEST, _LARGEST) if isinstance(batch_size, str) else [batch_size]
        sizes = [size for size in sizes if size <= inputs.shape[0]] or [inputs.shape[0]]
        candidates = [Plan(chunk, size) for chunk in chunks for size in sizes]
        return trial(apply_fn, variables, inputs, candidates)._replace(mesh=mesh)

    def taken(size: int) -> int:
        some = jax.ShapeDtypeStruct((size, *inputs.shape[1:]), inputs.dtype)
        return footprint(apply_fn, variables, some)

    on_cpu = jax.default_backend() == "cpu"
    if isinstance(batch_size, str):
        batch_size = _LARGEST
        if on_cpu:
            of_example = (taken(_SMALLEST) - _bytes(variables)) / _SMALLEST
            batch_size = max(_SMALLEST, min(_LARGEST, int(_CPU_BYTES / of_example)))
    if isinstance(chunk, str):
        chunk = 1 if on_cpu else population_size
        free = free_memory()
        if chunk > 1 and free is not None:  # the other half is for what else there is
            chunk = max(1, min(chunk, free // (2 * taken(batch_size))))
    return Plan(chunk, batch_size, mesh)


# A trial -----------------------------------------------------------------------------------------


def trial(
    apply_fn: ApplyFn,
    variables: PyTree,
    inputs: Any,
    candidates: list[Plan],
    *,
    seconds: float = 0.2,
) -> Plan:
    """Times one chunk of each candidate on this device, and takes the fastest for its work.

    A chunk is `population_chunk` networks on one batch; all networks of a population and all
    batches are made of such. Candidates that do not fit in the memory are passed over, and so are
    larger chunks once a chunk took a second. The choice is kept for later calls with the same
    program, shapes and device in this process.

    Args:
        apply_fn: the network.
        variables: of one network, or their shapes and dtypes.
        inputs: examples, or their shape and dtype.
        candidates: plans to choose from, at least one.
        seconds: time for the repetitions of a candidate; at least two are made.

    Returns:
        The fastest plan. It depends on the machine and its other work: not reproducible by nature.

    Raises:
        DeviceError: no candidate fits in the memory.

    Example:
        >>> inputs = jax.ShapeDtypeStruct((64, 3), jnp.float32)
        >>> trial(lambda w, x: x @ w, jnp.ones((3, 2)), inputs, [Plan(1, 64)])
        Plan(population_chunk=1, batch_size=64, mesh=None)
    """
    device = jax.devices()[0].device_kind
    few = jax.ShapeDtypeStruct((_SMALLEST, *inputs.shape[1:]), inputs.dtype)
    shapes = jax.eval_shape(lambda tree: tree, variables)
    program = str(jax.make_jaxpr(apply_fn)(shapes, few))
    key = (program, device, tuple(candidates))
    if key not in _CHOSEN:
        speeds = _speeds(apply_fn, shapes, few, candidates, seconds)
        if not speeds:
            raise DeviceError(
                f"fitness.trial: none of {len(candidates)} plans fits in the memory of {device}; "
                "lower fitness.batch_size"
            )
        _CHOSEN[key] = max(speeds, key=lambda plan: speeds[plan])
    return _CHOSEN[key]


_CHOSEN: dict[Any, Plan] = {}


def _speeds(
    apply_fn: ApplyFn, shapes: PyTree, few: Any, candidates: list[Plan], seconds: float
) -> dict[Plan, float]:
    """Networks x examples a second of each candidate that fits in the memory."""
    speeds: dict[Plan, float] = {}
    fast = for_backend(apply_fn)
    largest = max(plan.population_chunk for plan in candidates)
    for plan in sorted(candidates):
        chunk, batch_size = plan.population_chunk, plan.batch_size
        if chunk > largest:
            continue

        def run(networks: PyTree, inputs: jax.Array, chunk: int = chunk) -> jax.Array:
            if chunk > 1:
                return jax.vmap(fast, (0, None))(networks, inputs)
            return fast(jax.tree.map(lambda leaf: leaf[0], networks), inputs)

        try:
            networks = jax.tree.map(
                lambda leaf, chunk=chunk: jnp.ones((chunk, *leaf.shape), leaf.dtype), shapes
            )
            inputs = jnp.ones((batch_size, *few.shape[1:]), few.dtype)
            compiled = jax.jit(run).lower(networks, inputs).compile()
            jax.block_until_ready(compiled(networks, inputs))
            times: list[float] = []
            while len(times) < 2 or sum(times) < seconds:
                start = time.perf_counter()
                jax.block_until_ready(compiled(networks, inputs))
                times.append(time.perf_counter() - start)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            largest = chunk
            continue
        speeds[plan] = chunk * batch_size / statistics.median(times)
        if min(times) > 1:
            largest = chunk
    return speeds


def _powers(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first, ... and last."""
    powers = [first]
    while 2 * powers[-1] < last:
        powers.append(2 * powers[-1])
    return sorted({*powers, last})


# Memory ------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """What an evaluation takes of the memory, in bytes.

    Attributes:
        fixed: parents and examples.
        individual: the genes of one individual, in the population, among the children, and while
            the one becomes the other.
        network: one network of the chunk that is evaluated side by side, its weights included.
    """

    fixed: int
    individual: int
    network: int

    def total(self, population_size: int, chunk: int) -> int:
        """Of a population of which a chunk is evaluated at a time."""
        return (
            self.fixed
            + population_size * self.individual
            + min(chunk, population_size) * self.network
        )


def predict_memory(
    apply_fn: ApplyFn,
    variables: PyTree,
    inputs: Any,
    genes: PyTree,
    *,
    num_parents: int,
    batch_size: int,
    calibration: Any | None = None,
) -> Memory:
    """Predicts what an evaluation takes, from shapes alone.

    Args:
        apply_fn: the network.
        variables: of one network, or their shapes and dtypes.
        inputs: the validation inputs, or their shape and dtype.
        genes: of one individual, or their shapes and dtypes.
        num_parents: K.
        batch_size: examples in one pass.
        calibration: examples that every network's statistics are measured on in one pass, or their
            shape and dtype.

    Returns:
        The prediction. Compilers fuse equations and need less than is counted, or reserve
        workspaces and need more: benchmarks/population.py compares it with what XLA reserves.

    Example:
        >>> shape = jax.ShapeDtypeStruct
        >>> w, x, genes = shape((3, 2), "float32"), shape((5, 3), "float32"), shape((1, 2), "int8")
        >>> predict_memory(lambda w, x: x @ w, w, x, genes, num_parents=2, batch_size=5)
        Memory(fixed=108, individual=6, network=88)
    """
    weights = _bytes(variables)
    passes = [
        jax.ShapeDtypeStruct((min(batch_size, inputs.shape[0]), *inputs.shape[1:]), inputs.dtype)
    ]
    fixed = num_parents * weights + _bytes(inputs)
    if calibration is not None:
        passes.append(calibration)
        fixed += _bytes(calibration)
    network = weights + max(footprint(apply_fn, variables, one) for one in passes)
    return Memory(fixed, 3 * _bytes(genes), network)


def check_memory(memory: Memory, population_size: int, chunk: int, free: int | None) -> None:
    """Checks that an evaluation fits before it is compiled.

    Args:
        memory: from `predict_memory`.
        population_size: individuals P.
        chunk: networks side by side.
        free: bytes that there are, from `free_memory`; None checks nothing.

    Raises:
        DeviceError: it does not fit; names the largest chunk or population that would.

    Example:
        >>> check_memory(Memory(0, 0, 2_000_000_000), 64, 64, 10_000_000_000)
        Traceback (most recent call last):
        ...
        megajax.errors.DeviceError: fitness.population_chunk is 64: scoring takes about 128.0 GB and
        10.0 GB are free; 5 networks fit side by side
    """
    if free is None or memory.total(population_size, chunk) <= free:
        return
    takes = f"scoring takes about {memory.total(population_size, chunk) / 1e9:.1f} GB"
    there = f"{free / 1e9:.1f} GB are free"
    left = free - memory.fixed - memory.network
    if left < memory.individual:
        raise DeviceError(f"{takes} for one network and its parents alone, and {there}")
    if population_size * memory.individual > left:
        fits = left // memory.individual
        raise DeviceError(
            f"evolution.population_size is {population_size}: {takes} and {there}; a population of "
            f"{fits} fits"
        )
    fits = 1 + (left - population_size * memory.individual) // memory.network
    raise DeviceError(
        f"fitness.population_chunk is {chunk}: {takes} and {there}; {fits} "
        f"{'networks fit' if fits > 1 else 'network fits'} side by side"
    )


def free_memory() -> int | None:
    """Bytes that are free on the first device, or None where that cannot be told.

    Example:
        >>> free = free_memory()
        >>> free is None or free > 0
        True
    """
    device = jax.local_devices()[0]
    told = device.memory_stats() or {}
    if "bytes_limit" in told:
        return int(told["bytes_limit"]) - int(told.get("bytes_in_use", 0))
    if device.platform != "cpu":
        return None
    try:  # Linux alone tells how much could be had without swapping
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    return 1024 * free


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


def _bytes(tree: PyTree) -> int:
    return sum(int(leaf.size) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
