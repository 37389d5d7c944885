"""Layers that all individuals have in common are computed once, and nothing else changes."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import megajax as mj
from megajax.merging.genome import GENOMES, make_genome
from megajax.program.jaxprs import walk
from megajax.program.prefix import own_leaves, split
from megajax.trees import leaf_paths
from megajax.zoo import networks as models

KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(22, 8, 8, 3)).astype(np.float32)
LABELS = RNG.integers(0, 10, 22)


def parents_of(name, options):
    model = models.build(name, 10, options)
    networks = [model.init(jax.random.key(k), IMAGES[:1]) for k in range(2)]
    return mj.from_linen(model, networks[0], train=False).apply_fn, networks


def contractions(closed, times=1):
    """How often a program convolves or multiplies matrices, loops counted as often as they run."""
    count = 0

    def visit(number, equation, operands):
        nonlocal count
        name, params = equation.primitive.name, equation.params
        count += times * (name in ("dot_general", "conv_general_dilated"))
        if name == "scan":
            count += contractions(params["jaxpr"], times * params["length"])
        return [None] * len(equation.outvars)

    walk(closed, [None] * len(closed.jaxpr.invars), visit, lambda constant: None)
    return count


CASES = [
    ("mlp", {"hidden": (16, 16)}, "dense1", 1, 6),
    ("cnn", {"width": 4}, "conv1|norm1|conv2|norm2", 2, 3),
    ("resnet", {"depth": 8, "width": 4}, "stem|stage1|stage2_block1_conv", 4, 1),
]


@pytest.mark.parametrize(("name", "options", "freeze", "layers", "chunk"), CASES)
def test_scores_are_the_same_and_frozen_layers_run_once(name, options, freeze, layers, chunk):
    apply_fn, parents = parents_of(name, options)
    problem = mj.problem_for(
        apply_fn,
        parents,
        (IMAGES, LABELS),
        genome=mj.GenomeConfig(granularity="leaf", freeze=freeze),
        fitness=mj.FitnessConfig(metric="cross_entropy", batch_size=8, population_chunk=chunk),
        population_size=6,
    )
    problem = replace(problem, per_example=True)
    assert problem.prefix
    genes = problem.genome.init(KEY, 6)
    results, counts = [], []
    for prefix in (False, True):
        one = replace(problem, prefix=prefix)
        results.append(jax.jit(mj.evaluate)(one, genes))
        counts.append(contractions(jax.make_jaxpr(mj.evaluate)(one, genes)))
    (plain, plain_aux), (once, once_aux) = results
    np.testing.assert_allclose(once, plain, rtol=1e-5)
    np.testing.assert_array_equal(once_aux.right, plain_aux.right)
    runs, passes = 3, 6 // chunk * 3  # of 22 images, 8 at a time
    assert counts[0] - counts[1] == layers * (passes - runs)


def test_nothing_is_split_where_nothing_is_shared_or_nothing_would_be_saved():
    apply_fn, (one, _) = parents_of("mlp", {"hidden": (16,)})
    paths = leaf_paths(one)
    last = ["dense1" not in path for path in paths]
    assert split(apply_fn, one, IMAGES, [True] * len(paths)) is None
    assert split(apply_fn, one, IMAGES, [not own for own in last]) is None  # the last layer only
    assert split(apply_fn, one, IMAGES, last) is not None


def test_what_depends_on_genes_is_told_from_the_program():
    apply_fn, networks = parents_of("cnn", {"width": 4})
    expected = ["conv1" not in path for path in leaf_paths(networks[0])]
    for kind in GENOMES:
        options = {} if kind == "weights" else {"granularity": "leaf"}
        config = mj.GenomeConfig(kind=kind, freeze="conv1", **options)
        genome = make_genome(apply_fn, networks[0], IMAGES, 2, config)
        base = [networks[1]] if kind == "task_vectors" else []
        parents = genome.stack(networks, *base)
        genes = jax.tree.map(lambda leaf: leaf[0], genome.init(KEY, 4, parents))
        assert own_leaves(genome.express, genes, parents) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("recalibrate", "racing"), [(False, 12), (True, None)])
def test_a_merge_with_frozen_layers_finds_what_it_finds_without_sharing(
    monkeypatch, recalibrate, racing
):
    apply_fn, networks = parents_of("cnn", {"width": 4})

    def merge():
        return mj.merge(
            KEY,
            apply_fn,
            networks,
            (IMAGES, LABELS),
            calibration=IMAGES,
            align=mj.AlignConfig(method="none"),
            recalibrate=mj.RecalibrateConfig(enabled=recalibrate, examples=16),
            genome=mj.GenomeConfig(granularity="leaf", freeze="conv1|norm1"),
            fitness=mj.FitnessConfig(racing_examples=racing, batch_size=8),
            evolution=mj.EvolutionConfig(population_size=6, generations=3),
        )

    shared = merge()
    monkeypatch.setattr("megajax.merging.problem._has_frozen", lambda *_: False)
    plain = merge()
    np.testing.assert_allclose(shared.history.best, plain.history.best, rtol=1e-5)
    np.testing.assert_allclose(shared.genes, plain.genes, rtol=1e-5, atol=1e-6)
    assert jnp.isfinite(shared.fitness)


def test_any_pytrees_and_equal_parts():
    def apply_fn(w, x):
        hidden = jnp.tanh(x["a"] @ w["first"])
        return {"hidden": hidden, "logits": (hidden + x["b"]) @ w["second"]}

    w = {"first": jnp.eye(3), "second": jnp.ones((3, 2))}
    x = {"a": IMAGES[:, 0, 0], "b": IMAGES[:, 0, 1]}
    parts = split(apply_fn, w, x, [False, True])
    assert parts == split(apply_fn, w, x, [False, True])
    assert len({parts, split(apply_fn, w, x, (False, True))}) == 1
    found = jax.jit(parts.rest)(w, (x, jax.jit(parts.first)(w, x)))
    chex.assert_trees_all_close(found, apply_fn(w, x), rtol=1e-6)
