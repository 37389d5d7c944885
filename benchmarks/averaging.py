"""What does the mean of Adam's steps bring over the last one?

    python benchmarks/averaging.py [--seeds 5] [--networks 240] [--json FILE]

Pairs of CNNs on class-skewed digits (those of the default experiment), aligned by activations and
recalibrated, merged by gradients towards the parents' mean prediction on 800 training images,
without labels, with masks between the parents and beyond them. Compared at the end of one and the
same search: where the last step led, and the exponentially weighted mean of the steps. Printed: the
distance to the teacher on those images in nats and the test accuracy, means over the pairs, and the
mean's gain on the test images with its 95 % interval, paired (Student's t).
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


def pair(seed: int, networks: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Case -> `last` or `mean` -> (distance, test accuracy in percent)."""
    trained = pairs.train(seed, CONFIG)
    test, images = trained.dataset.test, trained.dataset.train.images[:800]
    aligned = pairs.aligned(trained)

    def case(masks: str, low: float, batch: int) -> dict[str, tuple[float, float]]:
        result = mj.merge(
            trained.key,
            trained.apply_fn,
            aligned,
            mj.Task(images, metric="distill"),
            calibration=images,
            align=mj.AlignConfig(method="none"),
            recalibrate=mj.RecalibrateConfig(enabled=True),
            genome=mj.GenomeConfig(granularity=masks, low=low),
            evolution=mj.EvolutionConfig(
                method="gradient",
                gradient_examples=batch,
                generations=networks,
                evaluation_budget=networks,
            ),
        )

        def figures(free: Any) -> tuple[float, float]:
            genes = result.genome.decode(free)
            stacked = jax.tree.map(lambda leaf: leaf[None], genes)
            fitness = jax.jit(mj.evaluate)(result.problem, stacked)[0][0]
            logits = mj.predict(trained.apply_fn, expressed(result.problem, genes), test.images)
            return -float(fitness), 100 * float(mj.measure(logits, test.labels).accuracy)

        walk = result.state.memory
        return {"last": figures(walk.free), "mean": figures(walk.mean)}

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
    print("| | last: nats | mean: nats | last: test [%] | mean: test [%] | gain |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in found[0]:
        last, mean = (np.array([one[name][which] for one in found]) for which in ("last", "mean"))
        d = paired_t(mean[:, 1], last[:, 1])
        (nats, accuracy), (mean_nats, mean_accuracy) = last.mean(axis=0), mean.mean(axis=0)
        print(
            f"| {name} | {nats:.4f} | {mean_nats:.4f} | {accuracy:.1f} | {mean_accuracy:.1f} "
            f"| {d.estimate:+.1f} [{d.low:+.1f}, {d.high:+.1f}] |"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
