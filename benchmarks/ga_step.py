"""What a generation costs beside its fitness: selection, crossover, mutation, survival.

    python benchmarks/ga_step.py [--population 4096] [--genes 10000] [--json FILE]

A step of the search over masks of two parents with a fitness that costs nothing, and its parts
alone; each in a loop on the device, as a search runs. The floor is what has to be moved at the
least, at the rate of a large copy: two parents of each child and the child, then population and
children read and the survivors written.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from timing import copy_rate, seconds_in_a_loop

from megajax.merging.masks import masks
from megajax.search import operators
from megajax.search.loop import first_state
from megajax.search.methods import EvolutionConfig, make_search
from megajax.search.operators import Population

KEY = jax.random.key(0)


def free(problem: Any, genes: jax.Array) -> jax.Array:
    """A fitness that costs nothing."""
    del problem
    return genes.reshape(len(genes), -1)[:, 0]


def parts(genome: Any, genes: jax.Array) -> dict[str, float]:
    """Milliseconds of a step and of what it consists of."""
    P, G, _ = genes.shape
    search = make_search(EvolutionConfig(population_size=P), genome, free)
    start = first_state(search, KEY, genes, ())
    survivors = start.population

    def key(i: jax.Array) -> jax.Array:
        return jax.random.fold_in(KEY, i)

    def two(i: jax.Array, genes: jax.Array) -> tuple[jax.Array, jax.Array]:
        pairs = operators.tournament(key(i), survivors.fitness, 2 * P)
        return operators.take(genes, pairs[:P]), operators.take(genes, pairs[P:])

    def next_to(i: jax.Array, state: Any) -> Population:
        fitness = jax.random.uniform(key(i), (P,))
        return operators.plus(key(i), state, Population(genes, fitness))

    rate = max(0.01, 1 / G)
    calls: dict[str, tuple[Callable[[jax.Array, Any], Any], Any]] = {
        "step": (lambda i, state: search.step(key(i), state, ())[0], start),
        "two parents": (lambda i, carry: two(i, carry[0]), (genes, genes)),
        "crossover": (lambda i, g: operators.uniform(key(i), *two(i, g), gene_ndim=1), genes),
        "mutation": (lambda i, g: genome.noise(key(i), g, rate=rate, scale=0.3), genes),
        "survival": (next_to, survivors),
        "repair": (lambda i, g: genome.repair(g), genes),
    }
    found = {}
    for name, (function, carry) in calls.items():
        found[name] = 1e3 * seconds_in_a_loop(function, carry)
        print(f"  {name:<12} {found[name]:8.1f} ms", flush=True)
    return found


def main() -> None:
    """Prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--population", type=int, default=4096)
    parser.add_argument("--genes", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    P, G = options.population, options.genes
    bandwidth = copy_rate()
    print(f"{jax.devices()[0].device_kind}, P = {P}, G = {G}, copy {bandwidth / 1e9:.1f} GB/s")
    genome = masks({"w": jax.numpy.zeros(G)}, 2, granularity="element")
    genes = jax.jit(genome.repair)(jax.random.uniform(KEY, (P, G, 2)))
    least = 6 * genes.nbytes / bandwidth * 1e3
    print(f"floor {least:.0f} ms")
    found = {"copy": bandwidth, "floor": least, **parts(genome, genes)}
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
