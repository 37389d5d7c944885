"""How much of what a search finds on its validation images does it keep on others?

    python benchmarks/selection_gap.py [--seeds 5] [--networks 960] [--json FILE]

Pairs of CNNs on class-skewed digits (those of the default experiment), aligned by activations,
statistics measured anew for every candidate, merged by the genetic algorithm with masks of every
granularity, and by gradients with element masks, on so many validation images; each search gets as
many passes as scoring that many networks on them takes. Printed: accuracy on the images that the
search saw minus that on the test images, in points, with its 95 % interval over the pairs (t
distribution), and the test accuracy.
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

EXAMPLES = (25, 50, 100, 200, 404)
SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "global masks": ("global", {}),
    "layer masks": ("layer", {}),
    "channel masks": ("channel", {}),
    "element masks": ("element", {}),
    "element masks, gradient": ("element", {"method": "gradient", "gradient_examples": 64}),
}


def pair(seed: int, networks: int) -> dict[str, dict[int, tuple[int, float, float]]]:
    """Search -> images -> genes, accuracy on those images and test accuracy, in percent."""
    trained = pairs.train(seed, CONFIG)
    apply_fn, (train, validation, test) = trained.apply_fn, trained.dataset[:3]
    aligned, _ = mj.align(
        trained.key,
        apply_fn,
        trained.parents,
        validation.images[:8],
        calibration=train.images[:256],
        config=mj.AlignConfig(method="activations"),
    )

    def case(masks: str, fields: dict[str, Any], examples: int) -> tuple[int, float, float]:
        seen = validation.images[:examples], validation.labels[:examples]
        result = mj.merge(
            trained.key,
            apply_fn,
            aligned,
            seen,
            calibration=train.images,
            align=mj.AlignConfig(method="none"),
            recalibrate=mj.RecalibrateConfig(enabled=True, examples=64),
            genome=mj.GenomeConfig(granularity=masks),
            evolution=mj.EvolutionConfig(
                generations=networks, evaluation_budget=networks, **fields
            ),
        )
        on_seen, on_test = (
            100 * float(mj.measure(mj.predict(apply_fn, result.variables, x), y).accuracy)
            for x, y in (seen, (test.images, test.labels))
        )
        return result.genome.num_genes, on_seen, on_test

    return {
        name: {examples: case(masks, fields, examples) for examples in EXAMPLES}
        for name, (masks, fields) in SEARCHES.items()
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--networks", type=int, default=960)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = [pair(seed, options.networks) for seed in range(options.seeds)]
    print("| search | genes |", *(f"{examples} images |" for examples in EXAMPLES))
    print("| --- | ---: |", *("--- |" for _ in EXAMPLES))
    for name in SEARCHES:
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
