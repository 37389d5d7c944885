"""What another first population, other bounds and other mutations are worth to the genetic search.

    python benchmarks/genetic_defaults.py [--seeds 10] [--networks 480] [--json FILE]

Pairs of CNNs on class-skewed digits (those of the default experiment), aligned by activations,
statistics measured anew for every candidate, channel masks, cross-entropy. First populations:
`near` draws the distance to a parent as the square of a uniform number; `dominant` takes up to a
quarter of the genes from the other parent, whole; `prototype` is a third each of parents with a
little noise, dominant ones, and the default's. The parents and their mean are in all of them.
Printed: the fitness of the best on validation images and its accuracy on test images, means over
the pairs, and the paired differences to the default with their 95 % intervals (Student's t).
"""

import argparse
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pairs
from search_metric import CONFIG

import megajax as mj
from megajax.evaluation.statistics import paired_t
from megajax.merging.genome import make_genome
from megajax.merging.masks import Masks

ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "near": {"start": "near"},
    "dominant": {"start": "dominant"},
    "prototype": {"start": "prototype"},
    "from -0.2 to 1.2": {"low": -0.2},
    "prototype, from -0.2 to 1.2": {"start": "prototype", "low": -0.2},
    "population of 16": {"population_size": 16},
    "prototype, from -0.2 to 1.2, population of 16": {
        "start": "prototype",
        "low": -0.2,
        "population_size": 16,
    },
    "mutation rate 0.05": {"mutation_rate": 0.05},
    "mutation rate 0.05, scale 0.5": {"mutation_rate": 0.05, "mutation_scale": 0.5},
}


@dataclass(frozen=True)
class Started(Masks):
    """Masks with another first population."""

    start: str = "default"

    def init(self, key: Any, size: int, parents: Any = None) -> Any:
        """The first population; see the head."""
        default = super().init(key, size, parents)
        founders = self.num_parents + 1
        shape = (size - founders, self.num_genes, self.num_parents)
        home_key, far_key, hit_key, wild_key = jax.random.split(jax.random.fold_in(key, 1), 4)
        home = jax.nn.one_hot(jax.random.randint(home_key, (shape[0], 1), 0, shape[2]), shape[2])
        far = jax.random.uniform(far_key, (shape[0], 1, 1))
        hit = jax.random.bernoulli(hit_key, jnp.broadcast_to(far / 2, (*shape[:2], 1)))
        pick = jax.nn.one_hot(jax.random.randint(wild_key, shape[:2], 0, shape[2]), shape[2])
        wild = self.sample(wild_key, shape, jnp.float32)
        dominant = jnp.where(hit, pick, home)
        noisy = self.repair(home + 0.1 * jax.random.normal(wild_key, shape))
        third = (jnp.arange(shape[0]) % 3)[:, None, None]
        others = {
            "near": (1 - far**2) * home + far**2 * wild,
            "dominant": dominant,
            "prototype": jnp.select(
                [third == 0, third == 1], [noisy, dominant], default[founders:]
            ),
        }
        return jnp.concatenate([default[:founders], others.get(self.start, default[founders:])])


def pair(seed: int, networks: int) -> dict[str, list[float]]:
    """Row -> fitness and test accuracy [%] of one pair."""
    trained = pairs.train(seed, CONFIG)
    calibration, (inputs, labels, _) = trained.dataset.train.images, trained.dataset.validation
    aligned = pairs.aligned(trained)
    found = {}
    for row, changes in ROWS.items():
        choices = dict(changes)
        start, low = choices.pop("start", "default"), choices.pop("low", 0.0)
        masks: Any = make_genome(
            trained.apply_fn, aligned[0], inputs[:8], 2, mj.GenomeConfig(low=low)
        )
        own = {field.name: getattr(masks, field.name) for field in fields(Masks)}
        result = mj.merge(
            trained.key,
            trained.apply_fn,
            aligned,
            (inputs, labels),
            calibration=calibration,
            genome=Started(**own, start=start),
            align=mj.AlignConfig(method="none"),
            recalibrate=mj.RecalibrateConfig(enabled=True),
            evolution=mj.EvolutionConfig(
                generations=networks,
                evaluation_budget=networks,
                generations_per_chunk=30,
                **choices,
            ),
        )
        test = trained.dataset.test
        logits = mj.predict(trained.apply_fn, result.variables, test.images)
        found[row] = [result.fitness, 100 * mj.measure(logits, test.labels).accuracy]
    print(f"pair {seed} done", flush=True)
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--networks", type=int, default=480)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = [pair(seed, options.networks) for seed in range(options.seeds)]
    columns = {row: np.array([one[row] for one in found]) for row in ROWS}
    print("| search | fitness | against default | test [%] | against default |")
    print("| --- | --- | --- | --- | --- |")
    for row, values in columns.items():
        texts = []
        for i, digits in enumerate((3, 1)):
            d = paired_t(values[:, i], columns["default"][:, i])
            low, high = f"{d.low:+.{digits}f}", f"{d.high:+.{digits}f}"
            gain = "" if row == "default" else f"{d.estimate:+.{digits}f} [{low}, {high}]"
            texts += [f"{values[:, i].mean():.{digits}f}", gain]
        print(f"| {row} | {' | '.join(texts)} |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
