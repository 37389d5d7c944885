"""What a generation costs beside its fitness: selection, crossover, mutation, survival.

    python benchmarks/ga_step.py [--population 4096] [--genes 10000] [--json FILE]

A step of the default search over masks of two parents with a fitness that costs nothing, the same
over plain vectors of genes, and each operator alone. The floor is what has to be moved at the
least, at the rate of a large copy: two parents of each child and the child, then population and
children read and the survivors written.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from timing import seconds

from megajax import operators
from megajax.config import EvolutionConfig
from megajax.evolution import genetic_algorithm
from megajax.genome import masks
from megajax.merging import algorithm_for


def free(genes: jax.Array) -> tuple[jax.Array, tuple[()]]:
    """A fitness that costs nothing."""
    return genes.reshape(len(genes), -1)[:, 0], ()


def main() -> None:
    """Prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--population", type=int, default=4096)
    parser.add_argument("--genes", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    P, G = options.population, options.genes
    key = jax.random.key(0)

    large = jnp.ones(2**26, jnp.float32)
    bandwidth = 2 * large.nbytes / seconds(jax.jit(lambda x: x + 1), large)
    rate = max(0.01, 1 / G)
    genome = masks({"w": jnp.zeros((2, G))}, granularity="element")
    config = EvolutionConfig(population_size=P)
    plain = genetic_algorithm(
        free, num_offspring=P, mutate=partial(operators.gaussian, rate=rate, scale=0.3)
    )
    searches = {"masks": (algorithm_for(genome, free, config), (P, G, 2)), "plain": (plain, (P, G))}
    print(f"{jax.devices()[0].device_kind}, P = {P}, G = {G}, copy {bandwidth / 1e9:.1f} GB/s")
    found = {"copy": bandwidth}
    for name, (algorithm, shape) in searches.items():
        genes = jax.random.uniform(key, shape)
        genes = genome.repair(genes) if name == "masks" else genes
        state = algorithm.init(key, genes)
        fitness = state.population.fitness
        least = 6 * genes.nbytes / bandwidth * 1e3
        parts: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
            "step": (algorithm.step, (key, state)),
            "tournament": (
                lambda key, fitness: operators.tournament(key, fitness, 2 * P),
                (key, fitness),
            ),
            "uniform": (operators.uniform, (key, genes, genes)),
            "arithmetic": (operators.arithmetic, (key, genes, genes)),
            "gaussian": (partial(operators.gaussian, rate=rate, scale=0.3), (key, genes)),
            "plus": (operators.plus, (key, state.population, state.population)),
        }
        if name == "masks":
            ndim = {"gene_ndim": 1}
            parts["uniform"] = (partial(operators.uniform, **ndim), (key, genes, genes))
            parts["gaussian"] = (partial(genome.noise, rate=rate, scale=0.3), (key, genes))
            parts["repair"] = (genome.repair, (genes,))
        print(f"{name}: floor {least:.0f} ms")
        for part, (function, arguments) in parts.items():
            found[f"{name}, {part}"] = 1e3 * seconds(jax.jit(function), *arguments, repeats=5)
            print(f"  {part:<12} {found[f'{name}, {part}']:8.1f} ms", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
