"""How many images does recalibration need?

    python benchmarks/recalibration.py [--seeds 10] [--networks 480] [--json FILE]

Pairs of CNNs on class-skewed digits (those of the default experiment), aligned by activations,
merged by channel masks with statistics measured anew on so many training images for every
candidate, the returned network included. All rows score as many networks. Printed: mean over the
pairs on the test images, the paired difference to the default of 256 images with its 95 % interval
(Student's t), and the images that pass through a network for each one that is scored.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pairs
from search_metric import CONFIG

import megajax as mj
from megajax.evaluation.statistics import paired_t

DEFAULT = mj.RecalibrateConfig().examples
SIZES = (16, 32, 64, 128, DEFAULT, 512)


def pair(seed: int, networks: int) -> tuple[dict[int, float], int]:
    """Test accuracy in percent for each number of images, and the size of the validation set."""
    trained = pairs.train(seed, CONFIG)
    validation, test = trained.dataset[1:3]
    calibration = trained.dataset.train.images
    aligned = pairs.aligned(trained)

    def accuracy(size: int) -> float:
        merged: Any = mj.merge(
            trained.key,
            trained.apply_fn,
            aligned,
            (validation.images, validation.labels),
            calibration=calibration,
            align=mj.AlignConfig(method="none"),
            recalibrate=mj.RecalibrateConfig(enabled=True, examples=size),
            evolution=mj.EvolutionConfig(generations=networks, evaluation_budget=networks),
        )
        logits = mj.predict(trained.apply_fn, merged.variables, test.images)
        return 100 * float(mj.measure(logits, test.labels).accuracy)

    return {size: accuracy(size) for size in SIZES}, len(validation.labels)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--networks", type=int, default=480)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found, (scored, *_) = zip(
        *(pair(seed, options.networks) for seed in range(options.seeds)), strict=True
    )
    columns = {size: np.array([one[size] for one in found]) for size in SIZES}
    print(f"| recalibrated on | test [%] | against {DEFAULT} | images for each of {scored} |")
    print("| --- | --- | --- | --- |")
    for size, values in columns.items():
        d = paired_t(values, columns[DEFAULT])
        gain = "" if size == DEFAULT else f"{d.estimate:+.1f} [{d.low:+.1f}, {d.high:+.1f}]"
        print(f"| {size} | {values.mean():.1f} | {gain} | {1 + size / scored:.2f} |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
