"""What a generation costs beside its fitness: selection, crossover, mutation, survival.

    python benchmarks/ga_step.py [--population 4096] [--genes 10000] [--json FILE]

A step of the search with a fitness that costs nothing, over masks of two parents and over plain
vectors of genes, and its parts alone; each in a loop on the device, as a search runs. `figures` are
those that every generation reports. The floor is what has to be moved at the least, at the rate of
a large copy: two parents of each child and the child, then population and children read and the
survivors written.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from timing import copy_rate, seconds_in_a_loop

from megajax.merging.genome import masks
from megajax.merging.merge import algorithm_for
from megajax.search import operators
from megajax.search.genetic import describe, genetic_algorithm
from megajax.search.methods import EvolutionConfig
from megajax.search.operators import Population

KEY = jax.random.key(0)


def free(genes: jax.Array) -> tuple[jax.Array, tuple[()]]:
    """A fitness that costs nothing."""
    return genes.reshape(len(genes), -1)[:, 0], ()


def parts(algorithm: Any, genes: jax.Array, mutate: Any, repair: Any) -> dict[str, float]:
    """Milliseconds of a step and of what it consists of."""
    P, gene_ndim = len(genes), genes.ndim - 2
    start = jax.jit(algorithm.init)(KEY, genes)
    told = (start, jax.jit(describe)(start))
    survivors = start.population

    def key(i: jax.Array) -> jax.Array:
        return jax.random.fold_in(KEY, i)

    def two(i: jax.Array, genes: jax.Array) -> tuple[jax.Array, jax.Array]:
        pairs = operators.tournament(key(i), survivors.fitness, 2 * P)
        return operators.take(genes, pairs[:P]), operators.take(genes, pairs[P:])

    def next_to(i: jax.Array, state: Any) -> Population:
        fitness = jax.random.uniform(key(i), (P,))
        return operators.plus(key(i), state, Population(genes, fitness))

    uniform = partial(operators.uniform, gene_ndim=gene_ndim)
    calls: dict[str, tuple[Callable[[jax.Array, Any], Any], Any]] = {
        "step": (lambda i, carry: algorithm.step(key(i), carry[0]), told),
        "two parents": (lambda i, carry: two(i, carry[0]), (genes, genes)),
        "crossover": (lambda i, genes: uniform(key(i), *two(i, genes)), genes),
        "mutation": (lambda i, genes: mutate(key(i), genes), genes),
        "survival": (next_to, survivors),
        "figures": (
            lambda i, carry: (carry[0], describe(carry[0]._replace(generation=i))),
            told,
        ),
    }
    if repair is not None:
        calls["repair"] = (lambda i, genes: repair(genes), genes)
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
    noise = {"rate": max(0.01, 1 / G), "scale": 0.3}
    mutate = partial(operators.gaussian, **noise)
    plain = genetic_algorithm(free, num_offspring=P, mutate=mutate)
    genome = masks({"w": jax.numpy.zeros((2, G))}, granularity="element")
    mixing = algorithm_for(genome, free, EvolutionConfig(population_size=P))
    mixed = jax.jit(genome.repair)(jax.random.uniform(KEY, (P, G, 2)))
    searches = {
        "plain vectors": (plain, jax.random.uniform(KEY, (P, G)), mutate, None),
        "masks": (mixing, mixed, partial(genome.noise, **noise), genome.repair),
    }
    found: dict[str, Any] = {"copy": bandwidth}
    for name, (algorithm, genes, *operations) in searches.items():
        least = 6 * genes.nbytes / bandwidth * 1e3
        print(f"{name}: floor {least:.0f} ms")
        found[name] = {"floor": least, **parts(algorithm, genes, *operations)}
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
