"""Which fitness makes the better search: accuracy or negative cross-entropy?

    python benchmarks/search_metric.py [--seeds 5] [--json FILE]

Pairs of CNNs on class-skewed digits (the default experiment), merged with each metric from the same
parents, at the same number of evaluations, with the same keys. Printed: test figures, mean and
standard error over the pairs, and the paired differences to the best parent (chosen on validation).
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import megajax as mj
from megajax import data, models, training
from megajax.config import Config, DataConfig, FitnessConfig, ParentsConfig

CONFIG = Config(
    data=DataConfig(validation_fraction=0.3), parents=ParentsConfig(shards="skewed", skew=0.95)
)
METRICS = ("accuracy", "cross_entropy")
ROWS = ("best parent", "uniform average", "ensemble", *(f"merged by {name}" for name in METRICS))


def pair(seed: int) -> dict[str, dict[str, float]]:
    """Test accuracy and NLL of one pair of parents, their baselines and both searches."""
    data_key, shard_key, train_key, merge_key = jax.random.split(jax.random.key(seed), 4)
    dataset = data.load(data_key, CONFIG.data)
    model = models.build(CONFIG.model.name, dataset.num_classes, CONFIG.model.options)
    shards = data.shards(shard_key, dataset.train.labels, dataset.num_classes, CONFIG.parents)
    parents, _ = training.train(train_key, model, dataset.train, shards, CONFIG.training)
    apply_fn = mj.from_linen(model, {}, train=False).apply_fn

    def logits(variables: Any, split: data.Split) -> np.ndarray:
        return mj.predict(apply_fn, variables, split.images)

    validation, test = dataset.validation, dataset.test
    accuracies = [mj.measure(logits(p, validation), validation.labels).accuracy for p in parents]
    average = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *parents)
    predictions = {
        "best parent": logits(parents[int(np.argmax(accuracies))], test),
        "uniform average": logits(average, test),
        "ensemble": mj.ensemble(np.stack([logits(parent, test) for parent in parents])),
    }
    for metric in METRICS:
        result = mj.merge(
            merge_key,
            apply_fn,
            parents,
            (validation.images, validation.labels),
            genome=CONFIG.genome,
            fitness=FitnessConfig(metric=metric),
            evolution=dataclasses.replace(CONFIG.evolution, generations_per_chunk=20),
        )
        predictions[f"merged by {metric}"] = logits(result.variables, test)
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
    pairs = [pair(seed) for seed in range(options.seeds)]
    column = {
        (row, figure): np.array([figures[row][figure] for figures in pairs])
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
        options.json.write_text(json.dumps(pairs, indent=2) + "\n")


if __name__ == "__main__":
    main()
