"""Which fitness makes the better search: accuracy or negative cross-entropy?

    python benchmarks/search_metric.py [--seeds 5] [--json FILE]

Pairs of CNNs on class-skewed digits (those of the default experiment), aligned by weights and not
recalibrated, merged with each metric from the same parents, at the same number of evaluations, with
the same keys. Printed: test figures, mean and standard error over the pairs, and the paired
differences to the best parent (chosen on validation).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pairs

import megajax as mj
from megajax.merging.problem import FitnessConfig
from megajax.run.config import Config
from megajax.zoo.data import DataConfig, ParentsConfig

CONFIG = Config(
    data=DataConfig(validation_fraction=0.3), parents=ParentsConfig(shards="skewed", skew=0.95)
)
METRICS = ("accuracy", "cross_entropy")
ROWS = ("best parent", "uniform average", "ensemble", *(f"merged by {name}" for name in METRICS))


def pair(seed: int) -> dict[str, dict[str, float]]:
    """Test accuracy and NLL of one pair of parents, their baselines and both searches."""
    trained = pairs.train(seed, CONFIG)
    apply_fn, parents = trained.apply_fn, trained.parents
    validation, test = trained.dataset.validation, trained.dataset.test

    def logits(variables: Any) -> np.ndarray:
        return mj.predict(apply_fn, variables, test.images)

    predictions = {
        "best parent": logits(pairs.best_parent(trained)),
        "uniform average": logits(pairs.midpoint(parents)),
        "ensemble": mj.ensemble(np.stack([logits(parent) for parent in parents])),
    }
    for metric in METRICS:
        result = mj.merge(
            trained.key,
            apply_fn,
            parents,
            (validation.images, validation.labels),
            genome=CONFIG.genome,
            fitness=FitnessConfig(metric=metric),
            evolution=CONFIG.evolution.replace(generations_per_chunk=20),
        )
        predictions[f"merged by {metric}"] = logits(result.variables)
    return {name: mj.measure(p, test.labels)._asdict() for name, p in predictions.items()}


def with_error(values: np.ndarray) -> str:
    """Mean and standard error, in points."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{100 * values.mean():.1f} +- {100 * error:.1f}"


def main() -> None:
    """Prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = [pair(seed) for seed in range(options.seeds)]
    column = {
        (row, figure): np.array([figures[row][figure] for figures in found])
        for row in ROWS
        for figure in ("accuracy", "nll")
    }
    print("| network | test accuracy [%] | against the best parent [points] | test NLL [nats] |")
    print("| --- | --- | --- | --- |")
    for row in ROWS:
        gain = column[row, "accuracy"] - column["best parent", "accuracy"]
        print(
            f"| {row} | {with_error(column[row, 'accuracy'])} | {with_error(gain)} | "
            f"{column[row, 'nll'].mean():.3f} |"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
