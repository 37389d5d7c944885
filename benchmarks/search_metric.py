"""Which fitness makes the better search: accuracy or negative cross-entropy?

    python benchmarks/search_metric.py [--seeds 5] [--json FILE]

Pairs of CNNs on class-skewed digits (the default experiment), merged with each metric from the same
parents, at the same number of evaluations, with the same keys. Printed: test figures, mean over the
pairs, and the paired difference with its standard error.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

import megajax as mj
from megajax import data, models, training
from megajax.config import Config, DataConfig, FitnessConfig, ParentsConfig

CONFIG = Config(
    data=DataConfig(validation_fraction=0.3), parents=ParentsConfig(shards="skewed", skew=0.95)
)
METRICS = ("accuracy", "cross_entropy")


def pair(seed: int) -> dict[str, dict[str, float]]:
    """Test accuracy and NLL of both searches from one pair of parents."""
    data_key, shard_key, train_key, merge_key = jax.random.split(jax.random.key(seed), 4)
    dataset = data.load(data_key, CONFIG.data)
    model = models.build(CONFIG.model.name, dataset.num_classes, CONFIG.model.options)
    shards = data.shards(shard_key, dataset.train.labels, dataset.num_classes, CONFIG.parents)
    parents, _ = training.train(train_key, model, dataset.train, shards, CONFIG.training)
    apply_fn = mj.from_linen(model, {}, train=False).apply_fn
    figures = {}
    for metric in METRICS:
        result = mj.merge(
            merge_key,
            apply_fn,
            parents,
            (dataset.validation.images, dataset.validation.labels),
            genome=CONFIG.genome,
            fitness=FitnessConfig(metric=metric),
            evolution=dataclasses.replace(CONFIG.evolution, generations_per_chunk=20),
        )
        logits = mj.predict(apply_fn, result.variables, dataset.test.images)
        figures[metric] = mj.measure(logits, dataset.test.labels)._asdict()
    return figures


def main() -> None:
    """Prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pairs = [pair(seed) for seed in range(options.seeds)]
    print(f"{'search by':<16}{'test accuracy':>16}{'test NLL [nats]':>18}")
    column = {
        (metric, figure): np.array([figures[metric][figure] for figures in pairs])
        for metric in METRICS
        for figure in ("accuracy", "nll")
    }
    for metric in METRICS:
        accuracy, nll = (column[metric, figure].mean() for figure in ("accuracy", "nll"))
        print(f"{metric:<16}{100 * accuracy:>14.1f} %{nll:>18.3f}")
    gain = 100 * (column["cross_entropy", "accuracy"] - column["accuracy", "accuracy"])
    error = gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else float("nan")
    print(f"cross_entropy - accuracy: {gain.mean():+.1f} +- {error:.1f} points, {len(gain)} pairs")
    if options.json:
        options.json.write_text(json.dumps(pairs, indent=2) + "\n")


if __name__ == "__main__":
    main()
