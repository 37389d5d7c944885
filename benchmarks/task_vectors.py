"""Two fine-tunes of one base on two tasks: evolved coefficients against one scale for all.

    python benchmarks/task_vectors.py [--seeds 5] [--json FILE]

An MLP 64-64-64-10 learns scikit-learn's digits, and two fine-tunes go on with views of them, labels
as before: noisy images and images shifted by a pixel; or, farther from the base and from each
other, images in negative and images turned by a quarter. Merged networks are
base + sum over k of c_k (parent_k - base). Task arithmetic and TIES have one c for everything, the
best of 41 from 0 to 2; a search has one for each gene and parent, and scores 1,920 networks (a
gradient counts as three). All choose by the mean cross-entropy on 300 images of each task, and are
judged on 497 others of each. A seed draws the split, the noise, the first weights and the search.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy
from sklearn.datasets import load_digits

import megajax as mj
from megajax.baselines import task_arithmetic, ties
from megajax.evaluation.statistics import paired_t

SIZES = (64, 64, 64, 10)
SCALES = np.linspace(0, 2, 41, dtype=np.float32)
NETWORKS = 1920
VIEWS: dict[str, Callable[[Any, Any], Any]] = {
    "noisy": lambda rng, images: images + 0.4 * rng.normal(size=images.shape),
    "shifted": lambda rng, images: np.roll(images, 1, axis=2),
    "negative": lambda rng, images: 1 - images,
    "turned": lambda rng, images: np.rot90(images, axes=(1, 2)),
}
PAIRS = (("noisy", "shifted"), ("negative", "turned"))
REFERENCE = "task arithmetic, the best scale"
SEARCHES = {
    "evolved, a coefficient for each parent": {"granularity": "global"},
    "evolved, for each layer": {"granularity": "layer"},
    "evolved, for each hidden unit": {"granularity": "channel"},
    "evolved, for each hidden unit, trimmed": {"granularity": "channel", "trim": True},
    "evolved, for each weight": {"granularity": "element"},
    "gradient, for each hidden unit": {"granularity": "channel", "method": "gradient"},
}


def apply_fn(layers: Any, x: Any) -> Any:
    """The MLP."""
    x = x.reshape(len(x), -1)
    for number, layer in enumerate(layers):
        x = x @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(x) if number < len(layers) - 1 else x
    return x


@jax.jit
def train(variables: Any, x: Any, y: Any) -> Any:
    """A hundred steps of Adam, each on all images."""

    def step(carry: Any, _: Any) -> Any:
        gradient = jax.grad(lambda v: cross_entropy(apply_fn(v, x), y).mean())(carry[0])
        updates, moments = adam.update(gradient, carry[1])
        return (optax.apply_updates(carry[0], updates), moments), None

    adam = optax.adam(2e-3)
    return jax.lax.scan(step, (variables, adam.init(variables)), length=100)[0][0]


def fine_tuned(seed: int, names: tuple[str, str]) -> tuple[Any, list[Any], list[list[mj.Task]]]:
    """Base, fine-tunes, and the tasks to choose on and to judge on."""
    rng = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    images, labels = (images[order] / 16).reshape(-1, 8, 8).astype(np.float32), labels[order]
    views = {name: VIEWS[name](rng, images).astype(np.float32) for name in names}
    first = [
        {"kernel": rng.normal(scale=(2 / n) ** 0.5, size=(n, m)), "bias": np.zeros(m)}
        for n, m in itertools.pairwise(SIZES)
    ]
    base = train(jax.tree.map(np.float32, first), images[:1000], labels[:1000])
    parents = [train(base, views[name][:1000], labels[:1000]) for name in names]
    tasks = [
        [mj.Task(views[name][part], labels[part], name=name) for name in names]
        for part in (slice(1000, 1300), slice(1300, None))
    ]
    return base, parents, tasks


def judged(variables: Any, tasks: list[mj.Task]) -> list[float]:
    """Accuracy in percent on each task, and the mean cross-entropy of all of them."""
    scores = [
        mj.measure(mj.predict(apply_fn, variables, task.inputs), task.targets) for task in tasks
    ]
    nll = float(np.mean([score.nll for score in scores]))
    return [*(100 * score.accuracy for score in scores), nll]


def rows(seed: int, names: tuple[str, str]) -> dict[str, list[float]]:
    """Each network's figures on the images that nothing was chosen on."""
    base, parents, (choose, test) = fine_tuned(seed, names)
    found = {
        "base": base,
        **{f"fine-tuned, {name}": one for name, one in zip(names, parents, strict=True)},
    }
    for name, method in ((REFERENCE, task_arithmetic), ("TIES, the best scale", ties)):
        scaled = [method(parents, base, scale=scale) for scale in SCALES]
        found[name] = min(scaled, key=lambda one: judged(one, choose)[-1])
    for name, options in SEARCHES.items():
        genome = {field: value for field, value in options.items() if field != "method"}
        found[name] = mj.merge(
            jax.random.key(seed),
            apply_fn,
            parents,
            choose,
            base=base,
            genome=mj.GenomeConfig(kind="task_vectors", **genome),
            fitness=mj.FitnessConfig(combine="raw"),
            evolution=mj.EvolutionConfig(
                method=options.get("method", "genetic"),
                generations=NETWORKS // 32 - 1,
                evaluation_budget=NETWORKS,
                generations_per_chunk=100,
            ),
        ).variables
    return {name: judged(one, test) for name, one in found.items()}


def against(figures: np.ndarray, reference: np.ndarray) -> str:
    """The mean difference and its interval, paired by seed."""
    if len(figures) < 2 or np.array_equal(figures, reference):
        return ""
    found = paired_t(figures, reference)
    return f"{found.estimate:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def main() -> None:
    """Prints a table for each pair of tasks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    for names in PAIRS:
        seeds = [rows(seed, names) for seed in range(options.seeds)]
        figures = {name: np.array([seed[name] for seed in seeds]) for name in seeds[0]}
        reference = figures[REFERENCE]
        first, second = names
        print(f"\n| | {first} [%] | {second} [%] | both, against task arithmetic | nats |")
        print("| --- | --- | --- | --- | --- |")
        for name, of_one in figures.items():
            one, two, nats = of_one.mean(axis=0)
            both = against(of_one[:, :2].mean(axis=1), reference[:, :2].mean(axis=1))
            lower = against(of_one[:, 2], reference[:, 2])
            print(f"| {name} | {one:.1f} | {two:.1f} | {both} | {nats:.2f} {lower} |")
        results[" and ".join(names)] = {name: one.tolist() for name, one in figures.items()}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
