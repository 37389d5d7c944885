"""What racing saves, and what that costs, on really trained pairs.

    python benchmarks/racing.py [--seeds 10] [--first 0] [--races 64:0.15625:60 32:0.125:90]
                                [--calibration 256 0] [--json FILE]

Pairs of CNNs on class-skewed digits, aligned by activations, merged by channel masks: the default
search, the same stopped early at about the cost of the races, and races on
`racing_examples:racing_finalists:generations`, all from the same parents with the same keys.
`--calibration` are the images on which every
candidate is recalibrated; 0 is without. For each: validation fitness and accuracy, test accuracy
(mean and standard error over the pairs), the difference of the validation accuracy to the default
search (paired), examples x networks on the validation images, how many times fewer, and the same
with the passes over calibration images, which come before each scoring: before the first look no
more than it has validation images.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pairs

import megajax as mj
from megajax.run.config import Config
from megajax.zoo.data import DataConfig, ParentsConfig

CONFIG = Config(
    data=DataConfig(validation_fraction=0.3), parents=ParentsConfig(shards="skewed", skew=0.95)
)
DEFAULT = "all examples"
RACES = ["64:0.15625:60", "64:0.09375:75", "48:0.125:70", "32:0.125:90", "32:0.0625:130"]
SHORT = "all examples, 18 generations"  # about the cost of the races


def choices(races: list[str]) -> dict[str, dict[str, Any]]:
    """Fields of the configuration for each search, by its name."""
    found: dict[str, dict[str, Any]] = {DEFAULT: {}, SHORT: {"generations": 18}}
    for race in races:
        examples, share, generations = race.split(":")
        name = f"race on {examples}, {float(share):.3g} in full, {generations} generations"
        found[name] = {
            "racing_examples": int(examples),
            "racing_finalists": float(share),
            "generations": int(generations),
        }
    return found


def search(pair: pairs.Pair, calibration: int, fields: dict[str, Any]) -> dict[str, float]:
    """One search's figures."""
    validation, test = pair.dataset.validation, pair.dataset.test
    races = {name: value for name, value in fields.items() if name.startswith("racing")}
    others = {name: value for name, value in fields.items() if name not in races}
    result = mj.merge(
        pair.key,
        pair.apply_fn,
        pair.parents,
        (validation.images, validation.labels),
        calibration=jax.numpy.asarray(pair.dataset.train.images[:256]),
        align=mj.AlignConfig(method="activations"),
        recalibrate=mj.RecalibrateConfig(enabled=calibration > 0, examples=max(calibration, 2)),
        fitness=mj.FitnessConfig(**races),
        evolution=mj.EvolutionConfig(generations_per_chunk=20, **others),
    )

    def accuracy(split: Any) -> float:
        logits = mj.predict(pair.apply_fn, result.variables, split.images)
        return float(mj.measure(logits, split.labels).accuracy)

    completed = int(result.state.completed)
    recalibrated = completed * calibration
    if races:
        looks = result.evaluations - mj.EvolutionConfig().population_size
        recalibrated += looks * min(calibration, fields["racing_examples"])
    return {
        "fitness": result.fitness,
        "validation": accuracy(validation),
        "test": accuracy(test),
        "networks": result.evaluations,
        "examples": result.examples_scored,
        "passes": result.examples_scored + recalibrated,
    }


def with_error(values: np.ndarray, digits: int = 2, sign: str = "") -> str:
    """Mean and standard error."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{values.mean():{sign}.{digits}f} +- {error:.{digits}f}"


def row(name: str, found: list[dict[str, float]], default: list[dict[str, float]]) -> str:
    """A line of the table."""
    mine, theirs = (
        {figure: np.array([one[figure] for one in many]) for figure in many[0]}
        for many in (found, default)
    )
    cells = [
        name,
        with_error(mine["fitness"], 4),
        with_error(100 * mine["validation"]),
        with_error(100 * (mine["validation"] - theirs["validation"]), sign="+"),
        with_error(100 * mine["test"]),
        f"{mine['networks'].mean():,.0f}",
        f"{mine['examples'].mean():,.0f}",
        f"{theirs['examples'].sum() / mine['examples'].sum():.2f}",
        f"{theirs['passes'].sum() / mine['passes'].sum():.2f}",
    ]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "search",
    "validation fitness [nats]",
    "validation accuracy [%]",
    "to the default [points]",
    "test accuracy [%]",
    "networks",
    "examples x networks",
    "times fewer",
    "times fewer, with calibration",
)


def main() -> None:
    """Prints a table for each calibration and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--races", nargs="*", default=RACES)
    parser.add_argument("--calibration", nargs="*", type=int, default=[256, 0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    searches = choices(options.races)
    found: dict[int, dict[str, list[dict[str, float]]]] = {
        count: {name: [] for name in searches} for count in options.calibration
    }
    for seed in range(options.first, options.first + options.seeds):
        jax.clear_caches()  # a process can hold the compiled programs of about a hundred runs
        pair = pairs.train(seed, CONFIG)
        for count, rows in found.items():
            for name, fields in searches.items():
                rows[name].append(search(pair, count, fields))
                print(seed, count, name, rows[name][-1], flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=2) + "\n")
    for count, rows in found.items():
        print(f"\nRecalibrated on {count} images:\n" if count else "\nNot recalibrated:\n")
        print(f"| {' | '.join(HEADER)} |")
        print(f"|{' --- |' * len(HEADER)}")
        for name, many in rows.items():
            print(row(name, many, rows[DEFAULT]))


if __name__ == "__main__":
    main()
