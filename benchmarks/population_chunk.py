"""How should the population axis be mapped on this machine: one by one, in chunks, or side by side?

    python benchmarks/population_chunk.py [--population 16] [--examples 256] [--json FILE]

Times one evaluation of a population for each `population_chunk`, for a network without and one with
convolutions. Medians of synchronised runs, compilation apart; read the ratios, not the seconds.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np

import megajax as mj
from megajax import models
from megajax.fitness import accuracy, auto_chunk, batches, evaluator

NETWORKS = {
    "mlp": ("mlp", {}, (8, 8, 1)),
    "cnn": ("cnn", {}, (8, 8, 1)),
    "resnet8": ("resnet", {"depth": 8}, (32, 32, 3)),
}


def seconds(name: str, population: int, examples: int) -> dict[str, float]:
    """Median time of one evaluation for each chunk; the choice of `auto` as `auto`."""
    family, options, shape = NETWORKS[name]
    model = models.build(family, 10, options)
    images = np.random.default_rng(0).normal(size=(examples, *shape)).astype(np.float32)
    data = batches(images, np.zeros(examples, int), 256)
    parents = mj.stack_parents([model.init(jax.random.key(k), images[:1]) for k in range(2)])
    apply_fn = mj.from_linen(model, {}, train=False).apply_fn
    genome = mj.masks(parents, granularity="leaf")
    genes = genome.init(jax.random.key(2), population)
    one = jax.tree.map(lambda leaf: leaf[0], parents)
    measured: dict[str, float] = {}
    for chunk in sorted({1, 4, population}):
        evaluate = evaluator(
            genome.express, apply_fn, accuracy, parents, data, population_chunk=chunk
        )
        compiled = jax.jit(lambda evaluate, genes: evaluate(genes)).lower(evaluate, genes).compile()
        jax.block_until_ready(compiled(evaluate, genes))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(compiled(evaluate, genes))
            times.append(time.perf_counter() - start)
        measured[str(chunk)] = statistics.median(times)
    measured["auto"] = measured[str(auto_chunk(apply_fn, one, images[:1], population))]
    return measured


def main() -> None:
    """Prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"{options.population} networks x {options.examples} examples, {device}, seconds")
    table = {name: seconds(name, options.population, options.examples) for name in NETWORKS}
    columns = list(table["mlp"])
    print(
        f"{'network':<10}" + "".join(f"{f'chunk {c}' if c != 'auto' else c:>12}" for c in columns)
    )
    for name, row in table.items():
        print(f"{name:<10}" + "".join(f"{row[column]:>12.3f}" for column in columns))
    if options.json:
        options.json.write_text(json.dumps({"device": device, "seconds": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
