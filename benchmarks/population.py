"""How fast is a population scored, and how far is that from what this machine can do?

    python benchmarks/population.py                      # a grid for the backend at hand
    python benchmarks/population.py --networks resnet20 --population 20 --examples 5000
    python benchmarks/population.py --torch              # and PyTorch's loops; needs PyTorch
    python benchmarks/population.py --keras              # and the reference's loop; needs Keras 3

First the machine's ceilings: a large matrix product and a large copy. Then, for each network,
number type and population, one evaluation of the population on the examples by each method:

    keras      for each network `set_weights` and `evaluate`, as MeGA's reference does (JAX backend)
    torch      for each network `load_state_dict` and a forward pass in inference mode
    frozen     for each network PyTorch's frozen graph (BatchNorm folded); freezing is not counted
    host loop  for each network one call of a jitted function that scores it
    vmap       the whole population side by side
    chunk n    n networks side by side, chunk after chunk; chunk 1 is `lax.map`
    auto       the layout that follows from backend and network, on one device
    all        the same on all devices; of a CPU, every core is one

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
from timing import copy_rate, score_one, seconds

import megajax as mj
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
        parents: two of them.
        population: P.
        images: `[N, 32, 32, 3]`.
        labels: `[N]`.
        flops: of one pass of one example.
    """

    name: str
    apply_fn: Callable[[Any, Any], Any]
    parents: list[Any]
    population: int
    images: np.ndarray
    labels: np.ndarray
    flops: float


class Timing(NamedTuple):
    """One method on one case: median of the runs and compilation in seconds, and how it was cut."""

    seconds: float
    compilation: float
    layout: tuple[int, int]


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
    init = jax.jit(model.init)
    parents = [init(jax.random.key(k), images[:1]) for k in range(2)]
    apply_fn = mj.from_linen(model, {}, train=False).apply_fn
    flops = jax.jit(apply_fn).lower(parents[0], images[:1]).cost_analysis()["flops"]
    labels = rng.integers(0, 10, examples)
    return Case(f"{network} {dtype}", apply_fn, parents, population, images, labels, flops)


def floor(case: Case, rate: float, bandwidth: float) -> float:
    """The least seconds that the case can take on this machine."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(case.parents[0]))
    # Two parents are read and one network is written; then come the images.
    moved = case.population * (3 * weights + case.images.nbytes)
    return max(case.population * len(case.images) * case.flops / rate, moved / bandwidth)


def in_one_program(case: Case, config: mj.FitnessConfig) -> Timing:
    """The library's evaluation."""
    problem = mj.problem_for(
        case.apply_fn,
        case.parents,
        (case.images, case.labels),
        genome=mj.GenomeConfig(granularity="leaf"),
        fitness=config,
        population_size=case.population,
    )
    genes = problem.genome.init(jax.random.key(2), case.population)
    start = time.perf_counter()
    compiled = jax.jit(mj.evaluate).lower(problem, genes).compile()
    compilation = time.perf_counter() - start
    layout = problem.layout.population_chunk, problem.layout.batch_size
    return Timing(seconds(compiled, problem, genes, repeats=3), compilation, layout)


def host_loop(case: Case, batch_size: int) -> Timing:
    """One call of a jitted function for each network: what a user would write."""
    count = len(case.images) // batch_size
    images, labels = (
        jnp.asarray(x[: count * batch_size]).reshape(count, batch_size, *x.shape[1:])
        for x in (case.images, case.labels)
    )
    shares = jax.random.uniform(jax.random.key(2), (case.population,))

    start = time.perf_counter()
    others = (*case.parents, images, labels)
    score_one(case.apply_fn, shares[0], *others).block_until_ready()
    compilation = time.perf_counter() - start
    loop = seconds(
        lambda: [float(score_one(case.apply_fn, share, *others)) for share in shares], repeats=3
    )
    return Timing(loop * len(case.images) / (count * batch_size), compilation, (1, batch_size))


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
    loop = seconds(lambda: [evaluate() for _ in range(case.population)], repeats=3)
    return Timing(loop, compilation, (1, batch_size))


def torch_loop(case: Case, batch_size: int, *, frozen: bool) -> Timing:
    """A forward pass for each network, eager or from a frozen graph."""
    import torch
    import torch_networks

    model = torch_networks.build(case.name.split()[0]).eval()
    images = torch.from_numpy(case.images).permute(0, 3, 1, 2).contiguous()
    images = images.to(memory_format=torch.channels_last)
    weights = model.state_dict()
    start = time.perf_counter()
    with torch.inference_mode():
        run: Any = model
        if frozen:
            traced = torch.jit.trace(model, images[:batch_size])
            run = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
            run(images[:batch_size]), run(images[:batch_size])
        compilation = time.perf_counter() - start

        def score() -> list[int]:
            found = []
            for _ in range(case.population):
                if not frozen:
                    model.load_state_dict(weights)
                parts = images.split(batch_size)
                found.append(sum(int(run(part).argmax(1).sum()) for part in parts))
            return found

        return Timing(seconds(score, repeats=3), compilation, (1, batch_size))


def methods(case: Case, options: argparse.Namespace) -> Iterator[tuple[str, list[Any]]]:
    """Each method's name, and the calls of which the fastest counts."""
    examples = len(case.images)
    sizes = sorted({min(size, examples) for size in options.batches})
    if options.keras and "float32" in case.name:
        yield "keras", [lambda size=size: keras_loop(case, size) for size in sizes[-1:]]
    if options.torch and "float32" in case.name:
        for name in ("torch", "frozen"):
            yield (
                name,
                [
                    lambda size=size, name=name: torch_loop(case, size, frozen=name == "frozen")
                    for size in sizes
                ],
            )
    yield "host loop", [lambda size=size: host_loop(case, size) for size in sizes]
    for chunk in (*(c for c in options.chunks if c < case.population), case.population):
        configs = [mj.FitnessConfig(population_chunk=chunk, batch_size=size) for size in sizes]
        name = "vmap" if chunk == case.population else f"chunk {chunk}"
        yield name, [lambda config=config: in_one_program(case, config) for config in configs]
    for name, devices in (("auto", 1), ("all", "all")):
        config = mj.FitnessConfig(metric="accuracy", devices=devices)
        yield name, [lambda config=config: in_one_program(case, config)]


def measure(case: Case, least: float, options: argparse.Namespace) -> dict[str, Any]:
    """All methods on one case, each with its fastest cut."""
    rows: dict[str, Any] = {}
    for name, calls in methods(case, options):
        if options.methods and name not in options.methods:
            continue
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
        rate = case.population * len(case.images) * case.flops / best.seconds / 1e9
        print(
            f"  {name:<10} {best.seconds:9.3f} s {rate:9.1f} GFLOP/s, "
            f"{best.seconds / least:5.2f} x the floor   {best.layout}, "
            f"compiled in {best.compilation:.1f} s",
            flush=True,
        )
    others = {name: row for name, row in rows.items() if name in ("keras", "torch", "frozen")}
    others |= {"host loop": rows["host loop"]} if "host loop" in rows else {}
    if others and "all" in rows:
        peer = min(others, key=lambda name: others[name]["seconds"])
        ratio = rows["all"]["seconds"] / others[peer]["seconds"]
        print(f"  all devices take {ratio:.2f} times as long as the fastest peer ({peer})")
        rows["ratio"] = {"to": peer, "of_all": ratio}
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
    parser.add_argument("--methods", nargs="+", help="names from the list above; default all")
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--keras", action="store_true")
    parser.add_argument("--torch", action="store_true")
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
                rows = measure(case, least, options)
                table.append(
                    {
                        "case": case.name,
                        "population": population,
                        "examples": options.examples,
                        "flops": case.flops,
                        "floor": least,
                        "matrix_product": rate,
                        "copy": bandwidth,
                        "methods": rows,
                    }
                )
    if options.json:
        options.json.write_text(json.dumps({"device": device, "table": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
