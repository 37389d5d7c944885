"""A metric without a gradient: genetic, memetic and gradient search at equal passes.

    python benchmarks/searches.py [--seeds 5] [--networks 480] [--json FILE]

Pairs of CNNs on class-skewed digits (those of the default experiment), aligned by activations,
statistics measured anew for every candidate, merged by channel masks. Each search gets as many
passes of a validation image through a network as scoring so many networks takes, a gradient
counting as three; recalibration comes on top and is not counted. The gradients are those of the
cross-entropy; what is kept is chosen by the metric. PLeaS, which needs no search and no label, is
given 256 training images. Printed: mean over the pairs, and the paired
difference to the genetic algorithm on the test images with its 95 % interval (Student's t).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pairs
from search_metric import CONFIG

import megajax as mj
from megajax.baselines import pleas
from megajax.evaluation.statistics import paired_t
from megajax.merging.metrics import METRICS

ROWS: dict[str, dict[str, Any]] = {
    "genetic": {},
    "genetic, by cross-entropy": {},
    "memetic, 2 steps on 64 images": {"gradient_steps": 2, "gradient_examples": 64},
    "gradient": {"method": "gradient"},
}


def score(name: str, logits: Any, labels: Any) -> float:
    """In percent."""
    metric = METRICS[name]
    statistics = metric.statistics(logits, labels)
    return 100 * float(metric.of(statistics, np.ones(len(labels), bool)))


def pair(seed: int, networks: int) -> dict[str, dict[str, list[float]]]:
    """Metric -> row -> validation score, test score and seconds of one pair."""
    trained = pairs.train(seed, CONFIG)
    (validation, test), apply_fn = (trained.dataset[1:3]), trained.apply_fn
    calibration = trained.dataset.train.images
    aligned = pairs.aligned(trained)

    def figures(metric: str, network: Any) -> list[float]:
        splits = (validation, test)
        logits = [mj.predict(apply_fn, network, split.images) for split in splits]
        return [score(metric, one, own.labels) for one, own in zip(logits, splits, strict=True)]

    solved = pleas(apply_fn, aligned, calibration[:256])
    solved = jax.jit(mj.recalibrate, static_argnums=0)(apply_fn, solved, calibration[:256])
    found: dict[str, dict[str, list[float]]] = {}
    for metric in ("accuracy", "macro_f1"):
        parents = [figures(metric, parent) for parent in trained.parents]
        found[metric] = {"best parent": [*max(parents), 0.0]}
        found[metric]["PLeaS, no search"] = [*figures(metric, solved), 0.0]
        for row, fields in ROWS.items():
            started = time.monotonic()
            own = "cross_entropy" if row.endswith("cross-entropy") else metric
            result = mj.merge(
                trained.key,
                apply_fn,
                aligned,
                (validation.images, validation.labels),
                calibration=calibration,
                align=mj.AlignConfig(method="none"),
                recalibrate=mj.RecalibrateConfig(enabled=True),
                fitness=mj.FitnessConfig(metric=own),
                evolution=mj.EvolutionConfig(
                    generations=networks, evaluation_budget=networks, **fields
                ),
            )
            assert result.examples_scored <= networks * len(validation.labels)
            seconds = time.monotonic() - started
            found[metric][row] = [*figures(metric, result.variables), seconds]
    return found


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--networks", type=int, default=480)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = [pair(seed, options.networks) for seed in range(options.seeds)]
    for metric in found[0]:
        print(f"\n| {metric} [%] | validation | test | test, against genetic | seconds |")
        print("| --- | --- | --- | --- | --- |")
        columns = {row: np.array([one[metric][row] for one in found]) for row in found[0][metric]}
        for row, values in columns.items():
            seen, held_out, _ = values.mean(axis=0)
            d = paired_t(values[:, 1], columns["genetic"][:, 1])
            gain = "" if row == "genetic" else f"{d.estimate:+.1f} [{d.low:+.1f}, {d.high:+.1f}]"
            seconds = np.median(values[:, 2])
            print(f"| {row} | {seen:.1f} | {held_out:.1f} | {gain} | {seconds:.1f} |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
