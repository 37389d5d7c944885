"""M2N2's digits task: M2N2 itself, niches over masks, genetic and gradient search, at equal cost.

    python benchmarks/m2n2.py [--seeds 3] [--networks 4000] [--json FILE]

Data and parents are those of M2N2's public code: scikit-learn's digits, not shuffled, the first
80 % to search on and the rest as test set; two MLPs 64-256-10 from different initialisations,
trained by ten full batches of Adam at 0.003 on the classes 0 to 4 and 5 to 9. Every row makes as
many passes of an example as scoring so many networks on all of the first 80 % takes; a gradient
counts as three. Seeds are those of the search; the parents are the same.
Mean test accuracy in percent, and the standard deviation over the seeds.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import megajax as mj
from megajax.merging.presets import m2n2

SHAPES = [(64, 256), (256,), (256, 10), (10,)]


def apply_fn(variables: Any, inputs: Any) -> Any:
    """An MLP whose leaves are in the order in which M2N2's code lays out its weights."""
    kernel, bias, last_kernel, last_bias = variables
    return jax.nn.relu(inputs @ kernel + bias) @ last_kernel + last_bias


def split() -> tuple[Any, Any]:
    """Inputs and labels to search on, and to test on."""
    inputs, labels = load_digits(return_X_y=True)
    inputs, cut = inputs.astype(np.float32), int(0.8 * len(labels))
    return (inputs[:cut], labels[:cut]), (inputs[cut:], labels[cut:])


def train(key: jax.Array, inputs: Any, labels: Any) -> list[Any]:
    """A parent."""
    sizes = [int(np.prod(shape)) for shape in SHAPES]
    parts = jnp.split(0.01 * jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    variables = [part.reshape(shape) for part, shape in zip(parts, SHAPES, strict=True)]

    @jax.jit
    def slope(variables: Any) -> Any:
        def loss(variables: Any) -> Any:
            logits = apply_fn(variables, inputs)
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.grad(loss)(variables)

    adam = optax.adam(0.003)
    state = adam.init(variables)
    for _ in range(10):
        updates, state = adam.update(slope(variables), state)
        variables = optax.apply_updates(variables, updates)
    return variables


def parents_of(data: Any) -> list[Any]:
    """The two specialists."""
    inputs, labels = data
    first = labels < 5
    keys = jax.random.split(jax.random.PRNGKey(42))
    return [
        train(key, inputs[of], labels[of]) for key, of in zip(keys, (first, ~first), strict=True)
    ]


def accuracy(variables: Any, data: Any) -> float:
    """In percent."""
    logits = mj.predict(apply_fn, variables, data[0])
    return 100 * float(mj.measure(logits, data[1]).accuracy)


def rows(networks: int) -> dict[str, dict[str, Any]]:
    """Sections of each row's merge."""
    size, left = 32, networks - 32
    many = {"population_size": size, "generations": left // size, "generations_per_chunk": 200}
    many["evaluation_budget"] = networks
    found = {"M2N2": m2n2(generations=networks - 2)}
    ablated = {
        "M2N2 without competition": {"sharing": 0.0},
        "M2N2 without matchmaker": {"matchmaker": False},
        "M2N2, whole population at once": {"offspring": 20, "generations": (networks - 2) // 20},
    }
    for name, changes in ablated.items():
        sections = m2n2(generations=networks - 2)
        found[name] = sections | {"evolution": sections["evolution"].replace(**changes)}
    for metric in ("accuracy", "cross_entropy"):
        for method in ("niches", "genetic", "gradient"):
            for granularity in ("channel", "element"):
                found[f"{method}, {granularity} masks, {metric}"] = {
                    "genome": mj.GenomeConfig(granularity=granularity),
                    "fitness": mj.FitnessConfig(metric=metric),
                    "evolution": mj.EvolutionConfig(method=method, **many),
                }
    for low in (-0.2, -0.5, -1.0):
        for granularity in ("channel", "element"):
            found[f"gradient, {granularity} masks from {low} to {1 - low}, cross_entropy"] = {
                "genome": mj.GenomeConfig(granularity=granularity, low=low),
                "fitness": mj.FitnessConfig(metric="cross_entropy"),
                "evolution": mj.EvolutionConfig(method="gradient", **many),
            }
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", type=int, default=4_000)
    parser.add_argument("--only", default="", help="rows whose name begins so")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    data, test = split()
    parents = parents_of(data)
    print(f"parents: {', '.join(f'{accuracy(one, test):.1f} %' for one in parents)}")
    middle = jax.tree.map(lambda a, b: (a + b) / 2, *parents)
    print(f"their midpoint: {accuracy(middle, test):.1f} %\n")
    print(f"| {options.networks} networks | test accuracy | on the 80 % | seconds |")
    print("| --- | --- | --- | --- |")
    results = {}
    for name, sections in rows(options.networks).items():
        if not name.startswith(options.only):
            continue
        started, found = time.monotonic(), []
        for seed in range(options.seeds):
            merged = mj.merge(jax.random.key(seed), apply_fn, parents, data, **sections)
            assert merged.examples_scored <= options.networks * len(data[1])
            found.append((accuracy(merged.variables, test), accuracy(merged.variables, data)))
        seconds = (time.monotonic() - started) / options.seeds
        (mean, seen), (std, _) = np.mean(found, axis=0), np.std(found, axis=0)
        print(f"| {name} | {mean:.1f} ± {std:.1f} | {seen:.1f} | {seconds:.1f} |", flush=True)
        results[name] = {"test": [one for one, _ in found], "seen": [one for _, one in found]}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
