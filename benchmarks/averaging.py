"""The last of Adam's steps, their mean, or a learning rate that falls?

    python benchmarks/averaging.py [--seeds 5] [--networks 240] [--json FILE]

Pairs of CNNs on class-skewed digits (those of the default experiment), aligned by activations and
recalibrated, merged by gradients towards the parents' mean prediction on 800 training images,
without labels, with masks between the parents and beyond them. Compared: where the last step of a
search led, the exponentially weighted mean of its steps, and that mean where the learning rate fell
to zero. Printed: the distance to the teacher on those images in nats and the test accuracy, means
over the pairs, and the gains on the test images, of the mean and of the fall on top of it, with
their 95 % intervals, paired (Student's t).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pairs
from search_metric import CONFIG

import megajax as mj
from megajax.evaluation.statistics import paired_t
from megajax.merging.problem import expressed

CASES = [
    (masks, low, batch)
    for masks in ("channel", "element")
    for low in (0.0, -0.5)
    for batch in (32, 256)
]
WAYS = ("last", "mean", "falling")


def pair(seed: int, networks: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Case -> one of `WAYS` -> (distance, test accuracy in percent)."""
    trained = pairs.train(seed, CONFIG)
    test, images = trained.dataset.test, trained.dataset.train.images[:800]
    aligned, _ = mj.align(
        trained.key,
        trained.apply_fn,
        trained.parents,
        images[:8],
        calibration=images[:256],
        config=mj.AlignConfig(method="activations"),
    )

    def case(masks: str, low: float, batch: int) -> dict[str, tuple[float, float]]:
        evolution = mj.EvolutionConfig(
            method="gradient",
            gradient_examples=batch,
            generations=networks,
            evaluation_budget=networks,
        )

        def search(evolution: mj.EvolutionConfig) -> mj.MergeResult:
            return mj.merge(
                trained.key,
                trained.apply_fn,
                aligned,
                mj.Task(images, metric="distill"),
                calibration=images,
                align=mj.AlignConfig(method="none"),
                recalibrate=mj.RecalibrateConfig(enabled=True),
                genome=mj.GenomeConfig(granularity=masks, low=low),
                evolution=evolution,
            )

        def figures(result: mj.MergeResult, free: Any) -> tuple[float, float]:
            genes = result.genome.decode(free)
            stacked = jax.tree.map(lambda leaf: leaf[None], genes)
            fitness = jax.jit(mj.evaluate)(result.problem, stacked)[0][0]
            logits = mj.predict(trained.apply_fn, expressed(result.problem, genes), test.images)
            return -float(fitness), 100 * float(mj.measure(logits, test.labels).accuracy)

        result = search(evolution)
        walk, generations = result.state.memory, len(result.history.best_ever) - 1
        falling = search(evolution.replace(decay_generations=generations))
        return {
            "last": figures(result, walk.free),
            "mean": figures(result, walk.mean),
            "falling": figures(falling, falling.state.memory.mean),
        }

    return {
        f"{masks} masks from {low:g}, batches of {batch}": case(masks, low, batch)
        for masks, low, batch in CASES
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--networks", type=int, default=240)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = [pair(seed, options.networks) for seed in range(options.seeds)]
    print("|  | nats: last | mean | falling ", end="")
    print("| test [%]: last | mean | falling | mean, gain | fall, gain |")
    print("| --- " * 9 + "|")
    for name in found[0]:
        values = np.array([[one[name][way] for way in WAYS] for one in found])  # pairs, ways, 2
        nats, accuracy = values.mean(axis=0).T
        cells = [*(f"{one:.4f}" for one in nats), *(f"{one:.1f}" for one in accuracy)]
        for better, worse in ((1, 0), (2, 1)):
            d = paired_t(values[:, better, 1], values[:, worse, 1])
            cells.append(f"{d.estimate:+.1f} [{d.low:+.1f}, {d.high:+.1f}]")
        print(f"| {name} | {' | '.join(cells)} |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
