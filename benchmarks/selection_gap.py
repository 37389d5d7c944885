"""How much of what a search finds on its validation images does it keep on others?

    python benchmarks/selection_gap.py [--seeds 5] [--networks 960] [--only PREFIX] [--json FILE]

Pairs of CNNs on class-skewed digits (those of the default experiment), aligned by activations,
statistics measured anew for every candidate, merged by the genetic algorithm with masks of every
granularity, and by gradients with element masks, on so many validation images; each search gets as
many passes as scoring that many networks on them takes. Beside them, as many gradients spent on the
weights themselves (Adam at 0.001, statistics as they are), from the better parent and from the
aligned average: fine-tuning, which needs no second parent, or no search. Printed: accuracy on the
images that the search saw minus that on the test images, in points, with its 95 % interval over the
pairs (t distribution), and the test accuracy.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pairs
from search_metric import CONFIG

import megajax as mj
from megajax.evaluation.statistics import paired_t

BATCH = 64
EXAMPLES = (25, 50, 100, 200, 404)
SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "global masks": ("global", {}),
    "layer masks": ("layer", {}),
    "channel masks": ("channel", {}),
    "element masks": ("element", {}),
    "element masks, gradient": ("element", {"method": "gradient", "gradient_examples": BATCH}),
}


@partial(jax.jit, static_argnums=(0, 1))
def tuned(apply_fn: Any, steps: int, key: Any, variables: Any, images: Any, labels: Any) -> Any:
    """The network after so many steps of Adam on its parameters, by the cross-entropy."""
    adam, batch = optax.adam(1e-3), min(BATCH, len(labels))
    rest = {name: leaves for name, leaves in variables.items() if name != "params"}

    def step(i: Any, state: Any) -> Any:
        rows = jax.random.choice(jax.random.fold_in(key, i), len(labels), (batch,), replace=False)

        def loss(params: Any) -> Any:
            logits = apply_fn({"params": params, **rest}, images[rows])
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
            return losses.mean()

        params, moments = state
        updates, moments = adam.update(jax.grad(loss)(params), moments)
        return optax.apply_updates(params, updates), moments

    start = variables["params"], adam.init(variables["params"])
    return {"params": jax.lax.fori_loop(0, steps, step, start)[0], **rest}


def pair(seed: int, networks: int, only: str) -> dict[str, dict[int, list[float]]]:
    """Search -> images -> genes, accuracy on those images and test accuracy, in percent."""
    trained = pairs.train(seed, CONFIG)
    apply_fn, (train, validation, test) = trained.apply_fn, trained.dataset[:3]
    aligned = pairs.aligned(trained)

    middle = jax.jit(mj.recalibrate, static_argnums=0)(
        apply_fn, pairs.midpoint(aligned), train.images[:64]
    )
    starts = {"the better parent": pairs.best_parent(trained), "the aligned average": middle}

    def seen_of(examples: int) -> tuple[Any, Any]:
        return validation.images[:examples], validation.labels[:examples]

    def accuracies(network: Any, examples: int) -> list[float]:
        both = (seen_of(examples), (test.images, test.labels))
        return [100 * mj.measure(mj.predict(apply_fn, network, x), y).accuracy for x, y in both]

    def fine_tuned(start: Any, examples: int) -> list[float]:
        steps = networks * examples // (3 * min(BATCH, examples))
        found = tuned(apply_fn, steps, trained.key, start, *seen_of(examples))
        genes = sum(leaf.size for leaf in jax.tree.leaves(start["params"]))
        return [genes, *accuracies(found, examples)]

    def case(masks: str, fields: dict[str, Any], examples: int) -> list[float]:
        result = mj.merge(
            trained.key,
            apply_fn,
            aligned,
            seen_of(examples),
            calibration=train.images,
            align=mj.AlignConfig(method="none"),
            recalibrate=mj.RecalibrateConfig(enabled=True, examples=64),
            genome=mj.GenomeConfig(granularity=masks),
            evolution=mj.EvolutionConfig(
                generations=networks, evaluation_budget=networks, **fields
            ),
        )
        return [result.genome.num_genes, *accuracies(result.variables, examples)]

    cases = {name: partial(case, *search) for name, search in SEARCHES.items()}
    cases |= {f"{name}, fine-tuned": partial(fine_tuned, start) for name, start in starts.items()}
    return {
        name: {examples: one(examples) for examples in EXAMPLES}
        for name, one in cases.items()
        if name.startswith(only)
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--networks", type=int, default=960)
    parser.add_argument("--only", default="", help="rows whose name begins so")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = [pair(seed, options.networks, options.only) for seed in range(options.seeds)]
    print("| search | genes |", *(f"{examples} images |" for examples in EXAMPLES))
    print("| --- | ---: |", *("--- |" for _ in EXAMPLES))
    for name in found[0]:
        cells = []
        for examples in EXAMPLES:
            genes, seen, test = np.array([one[name][examples] for one in found]).T
            gap = paired_t(seen, test)
            cells.append(
                f"{gap.estimate:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}], {test.mean():.1f} |"
            )
        print(f"| {name} | {genes[0]:,.0f} |", *cells)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
