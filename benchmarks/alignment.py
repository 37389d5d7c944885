"""What alignment, recalibration and the search are worth, on really trained pairs.

    python benchmarks/alignment.py [--pairs 5] [--width 16] [--shards skewed] [--json FILE]
    python benchmarks/alignment.py --width 64 --shards same --granularities

Pairs of the digits experiment's CNNs with seeds 0, 1, ... For each: the best parent (chosen on
validation), the midpoint as it is, aligned by each method, and recalibrated; the network evolved at
each granularity, at an equal number of evaluations; the ensemble. Test accuracy, mean and 95 %
interval (t) over the pairs, the difference to the best parent, paired, and in how many pairs it is
positive. Without any granularity nothing is evolved: the midpoints alone are quick.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pairs
from pairs import midpoint

import megajax as mj
from megajax.evaluation.statistics import mean_interval
from megajax.run.config import Config
from megajax.zoo.data import DataConfig, ParentsConfig
from megajax.zoo.networks import ModelConfig

METHODS = ("weights", "activations", "both")
GRANULARITIES = ("global", "layer", "channel", "element")


def pair(seed: int, config: Config, granularities: list[str]) -> dict[str, dict[str, float]]:
    """Test figures of one pair by every method."""
    trained = pairs.train(seed, config)
    apply_fn, parents, key = trained.apply_fn, trained.parents, trained.key
    validation, test = trained.dataset.validation, trained.dataset.test
    calibration = jax.numpy.asarray(trained.dataset.train.images[:256])

    def logits(variables: Any) -> np.ndarray:
        return mj.predict(apply_fn, variables, test.images)

    predictions = {"best parent": logits(pairs.best_parent(trained))}
    predictions["midpoint as it is"] = logits(midpoint(parents))
    recalibrated = mj.recalibrate(apply_fn, midpoint(parents), calibration)
    predictions["midpoint recalibrated"] = logits(recalibrated)
    for method in METHODS:
        align = mj.AlignConfig(method=method)
        aligned, _ = mj.align(
            key, apply_fn, parents, calibration, calibration=calibration, config=align
        )
        predictions[f"midpoint aligned by {method}"] = logits(midpoint(aligned))
        recalibrated = mj.recalibrate(apply_fn, midpoint(aligned), calibration)
        predictions[f"midpoint aligned by {method}, recalibrated"] = logits(recalibrated)
    for granularity in granularities:
        result = mj.merge(
            key,
            apply_fn,
            parents,
            (validation.images, validation.labels),
            calibration=calibration,
            align=mj.AlignConfig(method="activations"),
            recalibrate=mj.RecalibrateConfig(enabled=True),
            genome=mj.GenomeConfig(granularity=granularity),
            evolution=mj.EvolutionConfig(generations_per_chunk=20),
        )
        predictions[f"evolved, {granularity} masks"] = logits(result.variables)
    predictions["ensemble"] = mj.ensemble(np.stack([logits(parent) for parent in parents]))
    return {name: mj.measure(p, test.labels)._asdict() for name, p in predictions.items()}


def interval(values: np.ndarray, sign: str = "") -> str:
    """Mean and 95 % interval, in points."""
    mean, _, high = mean_interval(values)
    return f"{100 * mean:{sign}.1f} +- {100 * (high - mean):.1f}"


def main() -> None:
    """Prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--shards", default="skewed")
    parser.add_argument("--granularities", nargs="*", choices=GRANULARITIES, default=GRANULARITIES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = Config(
        data=DataConfig(validation_fraction=0.3),
        model=ModelConfig(options={"width": options.width}),
        parents=ParentsConfig(shards=options.shards, skew=0.95),
    )
    figures = [pair(seed, config, options.granularities) for seed in range(options.pairs)]
    accuracy = {row: np.array([p[row]["accuracy"] for p in figures]) for row in figures[0]}
    print("| network | test accuracy [%] | against the best parent | better in |")
    print("| --- | --- | --- | --- |")
    for row, values in accuracy.items():
        gain = values - accuracy["best parent"]
        better = f"{int((gain > 0).sum())} of {len(gain)}"
        print(f"| {row} | {interval(values)} | {interval(gain, '+')} | {better} |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
