"""How fast is a population scored, and how far is that from what this machine can do?

    python benchmarks/population.py                      # a grid for the backend at hand
    python benchmarks/population.py --networks resnet20 --population 20 --examples 5000
    python benchmarks/population.py --keras              # and the reference's loop; needs Keras 3

First the machine's ceilings: a large matrix product and a large copy. Then, for each network,
number type and population, one evaluation of the population on the examples by each method:

    keras      for each network `set_weights` and `evaluate`, as MeGA's reference does (JAX backend)
    host loop  for each network one call of a jitted function that scores it
    vmap       the whole population side by side
    chunk n    n networks side by side, chunk after chunk; chunk 1 is `lax.map`
    auto       the plan that follows from backend and network
    trial      the plan that a measured trial chooses
    all        `auto` on all devices; of a CPU, every core is one

The floor of a case is the time that its multiplications take at the rate of the matrix product, or
its bytes at the rate of the copy, whichever is longer. Medians of synchronised runs, compilation
apart; the images of a pass are cut as it suits each method best, out of `--batches`. A run
of more than 20 seconds is not repeated, and no other cut is tried after `--limit` seconds.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from megajax.merging.fitness import accuracy, batches, evaluator, example_scores
from megajax.merging.plans import Plan, plan_evaluation
from timing import copy_rate, seconds

import megajax as mj
from megajax.merging.problem import FitnessConfig
from megajax.program.folding import for_backend
from megajax.zoo import networks as models

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {"hidden": (512, 512, 512)}),
    "resnet20": ("resnet", {"depth": 20}),
    "resnet56": ("resnet", {"depth": 56}),
    "densenet121": ("densenet", {"depth": 121, "stem": "cifar"}),
}
jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
ON_CPU = jax.default_backend() == "cpu"


class Case(NamedTuple):
    """What is scored: P networks of one kind on N examples.

    Attributes:
        name: of the network and its number type.
        apply_fn: the network.
        parents: leaves `[2, ...]`.
        genome: a mask for each leaf.
        genes: of the population.
        images: `[N, 32, 32, 3]`.
        labels: `[N]`.
        flops: of one pass of one example.
        bytes: of the weights of one network and of one example.
    """

    name: str
    apply_fn: Callable[[Any, Any], Any]
    parents: Any
    genome: Any
    genes: Any
    images: np.ndarray
    labels: np.ndarray
    flops: float
    bytes: tuple[float, float]


class Timing(NamedTuple):
    """One method on one case.

    Attributes:
        seconds: median of the runs.
        compilation: seconds.
        plan: networks side by side and images in a pass.
    """

    seconds: float
    compilation: float
    plan: tuple[int, int]


def ceilings(dtype: Any) -> tuple[float, float]:
    """Operations a second of a large matrix product, bytes a second of a large copy."""
    side = 2048 if ON_CPU else 8192
    matrix = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return 2 * side**3 / seconds(product, matrix, matrix), copy_rate()


def make_case(network: str, dtype: str, population: int, examples: int) -> Case:
    """A population between two untrained parents, and random images."""
    family, options = NETWORKS[network]
    if dtype != "float32":
        options = {**options, "dtype": dtype}
    model = models.build(family, 10, options)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(examples, 32, 32, 3)).astype(np.float32)
    parents = mj.stack_parents([model.init(jax.random.key(k), images[:1]) for k in range(2)])
    apply_fn = mj.from_linen(model, {}, train=False).apply_fn
    genome = mj.masks(parents, granularity="leaf")
    one = jax.tree.map(lambda leaf: leaf[0], parents)
    costs = jax.jit(apply_fn).lower(one, images[:1]).cost_analysis()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(one))
    return Case(
        f"{network} {dtype}",
        apply_fn,
        parents,
        genome,
        genome.init(jax.random.key(2), population),
        images,
        rng.integers(0, 10, examples),
        costs["flops"],
        (weights, images[0].nbytes),
    )


def floor(case: Case, rate: float, bandwidth: float) -> float:
    """The least seconds that the case can take on this machine."""
    population, examples = len(case.genes), len(case.images)
    weights, image = case.bytes
    moved = population * (3 * weights + examples * image)  # two parents are read, one is written
    return max(population * examples * case.flops / rate, moved / bandwidth)


def in_one_program(case: Case, plan: Plan) -> Timing:
    """The library's evaluation."""
    data = batches(case.images, case.labels, plan.batch_size)
    evaluate = evaluator(
        case.genome.express,
        for_backend(case.apply_fn),
        accuracy,
        case.parents,
        data,
        population_chunk=plan.population_chunk,
        mesh=plan.mesh,
    )
    start = time.perf_counter()
    compiled = (
        jax.jit(lambda evaluate, genes: evaluate(genes)).lower(evaluate, case.genes).compile()
    )
    compilation = time.perf_counter() - start
    return Timing(seconds(compiled, evaluate, case.genes, repeats=3), compilation, tuple(plan[:2]))


def host_loop(case: Case, batch_size: int) -> Timing:
    """One call of a jitted function for each network."""
    data = batches(case.images, case.labels, batch_size)

    @jax.jit
    def score(genes: Any, parents: Any, data: Any) -> jax.Array:
        variables = case.genome.express(genes, parents)
        return example_scores(case.apply_fn, accuracy, variables, data).sum()

    start = time.perf_counter()
    score(case.genes[0], case.parents, data).block_until_ready()
    compilation = time.perf_counter() - start

    def loop() -> list[float]:
        return [float(score(genes, case.parents, data)) for genes in case.genes]

    return Timing(seconds(loop, repeats=3), compilation, (1, batch_size))


def keras_loop(case: Case, batch_size: int) -> Timing:
    """`set_weights` and `evaluate` for each network, as the reference does."""
    import keras_networks

    model = keras_networks.build(case.name.split()[0])
    rng = np.random.default_rng(1)
    weights = [rng.normal(0.05, 0.02, w.shape).astype(w.dtype) for w in model.get_weights()]

    def evaluate() -> Any:
        model.set_weights(weights)
        return model.evaluate(case.images, case.labels, batch_size=batch_size, verbose=0)

    start = time.perf_counter()
    evaluate()
    compilation = time.perf_counter() - start
    return Timing(
        seconds(lambda: [evaluate() for _ in case.genes], repeats=3), compilation, (1, batch_size)
    )


def methods(case: Case, options: argparse.Namespace) -> Iterator[tuple[str, list[Any]]]:
    """Each method's name, and the calls of which the fastest counts."""
    population, examples = len(case.genes), len(case.images)
    one = jax.tree.map(lambda leaf: leaf[0], case.parents)
    sizes = sorted({min(size, examples) for size in options.batches})
    if options.keras and "float32" in case.name:
        yield "keras", [lambda size=size: keras_loop(case, size) for size in sizes[-1:]]
    yield "host loop", [lambda size=size: host_loop(case, size) for size in sizes]
    for chunk in (*(c for c in options.chunks if c < population), population):
        plans = [Plan(chunk, size) for size in sizes]
        name = "vmap" if chunk == population else f"chunk {chunk}"
        yield name, [lambda plan=plan: in_one_program(case, plan) for plan in plans]
    for name in ("auto", "trial", "all"):
        config = FitnessConfig(trial=name == "trial", devices="all" if name == "all" else 1)
        plan = plan_evaluation(case.apply_fn, one, case.images, config, population)
        yield name, [lambda plan=plan: in_one_program(case, plan)]


def measure(case: Case, least: float, options: argparse.Namespace) -> dict[str, Any]:
    """All methods on one case, each with its fastest plan."""
    rows: dict[str, Any] = {}
    for name, calls in methods(case, options):
        found: list[Timing] = []
        for call in calls:
            before = time.perf_counter()
            try:
                found.append(call())
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                continue
            if time.perf_counter() - before > options.limit:
                break
        if not found:
            print(f"  {name:<10} does not fit in the memory", flush=True)
            continue
        best = min(found)
        rows[name] = best._asdict() | {"of_floor": least / best.seconds}
        rate = len(case.genes) * len(case.images) * case.flops / best.seconds / 1e9
        print(
            f"  {name:<10} {best.seconds:9.3f} s {rate:9.1f} GFLOP/s, "
            f"{best.seconds / least:5.2f} x the floor   {best.plan}, "
            f"compiled in {best.compilation:.1f} s",
            flush=True,
        )
    return rows


def main() -> None:
    """Prints the tables and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32"] if ON_CPU else ["float32", "bfloat16"]
    )
    parser.add_argument(
        "--population", nargs="+", type=int, default=[20] if ON_CPU else [20, 64, 256]
    )
    parser.add_argument("--examples", type=int, default=256 if ON_CPU else 5000)
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[64, 128, 256] if ON_CPU else [500, 1000, 5000]
    )
    parser.add_argument("--chunks", nargs="+", type=int, default=[1, 4] if ON_CPU else [1, 4, 16])
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--keras", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "jax")
    device = jax.devices()[0].device_kind
    print(f"{device}, {os.cpu_count()} CPU cores, JAX {jax.__version__}")
    table = []
    for dtype in options.dtypes:
        rate, bandwidth = ceilings(dtype)
        print(f"{dtype}: matrix product {rate / 1e9:.1f} GFLOP/s, copy {bandwidth / 1e9:.1f} GB/s")
        for network in options.networks:
            for population in options.population:
                case = make_case(network, dtype, population, options.examples)
                least = floor(case, rate, bandwidth)
                print(
                    f"{case.name}, {population} networks x {options.examples} images, "
                    f"{case.flops / 1e6:.1f} MFLOP an image; floor {least:.3f} s"
                )
                table.append(
                    {
                        "case": case.name,
                        "population": population,
                        "examples": options.examples,
                        "flops": case.flops,
                        "floor": least,
                        "matrix_product": rate,
                        "copy": bandwidth,
                        "methods": measure(case, least, options),
                    }
                )
    if options.json:
        options.json.write_text(json.dumps({"device": device, "table": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
