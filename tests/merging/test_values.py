"""Choices are values and parents are arguments: a second merge compiles nothing."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import megajax as mj
from megajax.trees import Static

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: COMPILED.append(event) if "backend_compile" in event else None
)


def mapped():
    """Pieces of memory that are mapped into this process; compiled programs take some each."""
    return len(Path("/proc/self/maps").read_text().splitlines())


def network(w, x):
    x = jnp.tanh(x @ w["first"] + w["bias"])
    x = (x - w["mean"]) * jax.lax.rsqrt(w["var"] + 1e-5) * w["scale"]
    return x @ w["head"]


SHAPES = {"first": (6, 8), "bias": (8,), "mean": (8,), "var": (8,), "scale": (8,), "head": (8, 3)}


def parent(seed):
    rng = np.random.default_rng(seed)
    tree = {name: rng.normal(size=size).astype(np.float32) for name, size in SHAPES.items()}
    return tree | {"var": tree["var"] ** 2}


def merge(seed, **options):
    """A merge of its own parents, key and data, and of sections that are made anew."""
    rng = np.random.default_rng(100 + seed)
    data = rng.normal(size=(50, 6)).astype(np.float32), rng.integers(0, 3, 50)
    options = options | {
        name: type(section)(**section.model_dump())
        for name, section in options.items()
        if isinstance(section, mj.sections.Section)
    }
    return mj.merge(
        jax.random.key(seed),
        network,
        [parent(2 * seed), parent(2 * seed + 1)],
        data,
        align=mj.AlignConfig(method="none"),
        evolution=options.pop("evolution", mj.EvolutionConfig(population_size=6, generations=2)),
        **options,
    )


CALIBRATION = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
CHOICES = {
    "default": {},
    "recalibrated": {
        "calibration": CALIBRATION,
        "recalibrate": mj.RecalibrateConfig(enabled=True),
    },
    "weights": {"genome": mj.GenomeConfig(kind="weights")},
    "vectors": {"genome": mj.GenomeConfig(kind="task_vectors", trim=True), "base": parent(99)},
    "binary": {"genome": mj.GenomeConfig(binary=True, freeze="first")},
    "racing": {"fitness": mj.FitnessConfig(racing_examples=10)},
    "devices": {"fitness": mj.FitnessConfig(devices=2)},
    "kept": {"keep": {"head": 1}},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_merges_of_equal_shapes_and_choices_share_all_their_programs(choice):
    results = [merge(0, **CHOICES[choice])]
    before = len(COMPILED)
    assert before > 0  # the listener hears
    maps = mapped()
    results += [merge(seed, **CHOICES[choice]) for seed in (1, 2)]
    assert COMPILED[before:] == []
    assert mapped() - maps < 50  # noise
    firsts = {float(result.parent_fitness[0]) for result in results}
    assert len(firsts) == 3  # other parents, other data
    trees = [jax.tree.structure(result.problem) for result in results]
    assert trees[0] == trees[1] == trees[2]


@pytest.mark.slow
def test_three_hundred_merges_in_one_process_map_no_more_memory_than_two():
    """Each compiled program has memory mapped for it; some 65,000 pieces end the process."""
    for seed in range(2):
        merge(seed)
    maps, compiled = mapped(), len(COMPILED)
    for seed in range(2, 302):
        merge(seed)
    assert len(COMPILED) == compiled
    assert mapped() - maps < 50  # noise


def test_sections_are_values():
    for make in (
        lambda: mj.EvolutionConfig(crossover=["uniform", "arithmetic"], mutation_rate=0.5),
        lambda: mj.GenomeConfig(granularity="leaf", freeze="head"),
        lambda: mj.FitnessConfig(racing_examples=4),
        lambda: mj.HierarchyConfig(odd="drop"),
        lambda: mj.BaselinesConfig(names=["line", "ties"]),
    ):
        assert make() == make()
        assert hash(make()) == hash(make())
    assert mj.GenomeConfig() != mj.GenomeConfig(granularity="leaf")


def test_static_trees_are_values_by_their_content():
    tree = {"a": np.arange(3), "b": [np.zeros((2, 2))]}
    again = {"a": np.arange(3), "b": [np.zeros((2, 2))]}
    assert Static(tree) == Static(again)
    assert hash(Static(tree)) == hash(Static(again))
    for other in (
        {"a": np.arange(1, 4), "b": [np.zeros((2, 2))]},
        {"a": np.arange(3, dtype=np.int32), "b": [np.zeros((2, 2))]},
        {"a": np.arange(3), "b": (np.zeros((2, 2)),)},
        {"a": np.arange(3), "b": [np.zeros(4)]},
        {"c": np.arange(3), "b": [np.zeros((2, 2))]},
    ):
        assert Static(tree) != Static(other)
    assert Static(tree) != tree
