"""MeGA as published, against a NumPy transliteration of it that is fed with the same draws."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

import megajax as mj
from megajax.run.config import Config, merge_sections
from megajax.run.presets import mega_paper
from megajax.search import operators
from megajax.trees import leaf_paths
from megajax.zoo import data, training
from megajax.zoo import networks as models
from megajax.zoo.data import DataConfig, ParentsConfig
from megajax.zoo.training import TrainingConfig

KEY = jax.random.key(4)
ROUNDS, POPULATION, CHILDREN = 20, 20, 19


class Draws(NamedTuple):
    """Everything random in the algorithm, for two parents of T tensors."""

    shares: np.ndarray  # [20], the place of each first individual between the parents
    contestants: np.ndarray  # [19 rounds, 19 children, 2 tournaments, 3]
    blends: np.ndarray  # [19, 19], the share of the first winner
    hits: np.ndarray  # [19, 19, T]
    noise: list[list[np.ndarray]]  # 19 rounds of T arrays [19, ...]


def transliteration(first, second, score, draws):
    """MeGA as its paper and reference describe it: lists of tensors, loops, one thing at a time.

    Yields the population, its scores, the selected pairs and the best so far, for each round.
    """
    population = [
        [(1 - a) * w1 + a * w2 for w1, w2 in zip(first, second, strict=True)] for a in draws.shares
    ]
    best, best_score = None, -np.inf
    for g in range(ROUNDS):
        scores = [score(individual) for individual in population]
        leader = int(np.argmax(scores))
        if scores[leader] > best_score:
            best, best_score = population[leader], scores[leader]
        if g == ROUNDS - 1:
            yield population, scores, None, best
            return
        pairs, children = [], [best]
        for i in range(CHILDREN):
            one, two = (max(three, key=scores.__getitem__) for three in draws.contestants[g, i])
            b = draws.blends[g, i]
            child = []
            for t, (w1, w2) in enumerate(zip(population[one], population[two], strict=True)):
                weight = b * w1 + (1 - b) * w2
                if draws.hits[g, i, t]:
                    weight = weight + draws.noise[g][t][i]
                child.append(weight)
            pairs.append((one, two))
            children.append(child)
        yield population, scores, pairs, best
        population = children


def draws_of(key, shapes):
    """The numbers that `merge` draws with this key: the same keys, written out."""
    _, genes_key, _, run_key = jax.random.split(key, 4)
    # Two waiting times, as shares of their sum: uniform on the segment.
    waits = jax.random.exponential(genes_key, (POPULATION, 1, 2))[:, 0]
    shares = waits[:, 1] / waits.sum(-1)
    contestants, blends, hits, noise = [], [], [], []
    for g in range(ROUNDS - 1):
        select_key, cross_key, mutate_key, _ = jax.random.split(jax.random.fold_in(run_key, g), 4)
        of_first_and_second = operators._distinct(select_key, POPULATION, 2 * CHILDREN, 3)
        contestants.append(of_first_and_second.reshape(2, CHILDREN, 3).swapaxes(0, 1))
        blends.append(jax.random.uniform(cross_key, (CHILDREN,)))
        keys = jax.random.split(jax.random.fold_in(mutate_key, 0), len(shapes))
        pairs = [jax.random.split(key) for key in keys]
        hits.append(
            np.stack([jax.random.bernoulli(hit, 0.02, (CHILDREN,)) for hit, _ in pairs], axis=1)
        )
        noise.append(
            [
                0.1 * np.asarray(jax.random.normal(key, (CHILDREN, *shape)))
                for (_, key), shape in zip(pairs, shapes, strict=True)
            ]
        )
    return Draws(*map(np.asarray, (shares, contestants, blends, hits)), noise)


class Run(NamedTuple):
    paths: list[str]
    parents: list
    split: data.Split
    result: mj.MergeResult
    states: list
    draws: Draws


@pytest.fixture(scope="module")
def finished():
    """Two small networks with BatchNorm, trained on digits, merged as published."""
    digits = data.load(0, DataConfig(validation_fraction=0.3))
    model = models.build("mlp", 10, {"hidden": (12,), "norm": "batch"})
    parents, _ = training.train(
        KEY,
        model,
        digits.train,
        data.shards(0, digits.train.labels, 10, ParentsConfig()),
        TrainingConfig(epochs=3, learning_rate=0.02),
    )
    states = []
    result = mj.merge(
        KEY,
        mj.from_linen(model, {}, train=False).apply_fn,
        parents,
        (digits.validation.images, digits.validation.labels),
        **merge_sections(mega_paper()),
        callback=lambda state, infos: states.append(jax.device_get(state)),
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(parents[0])]
    draws = draws_of(KEY, shapes)
    return Run(leaf_paths(parents[0]), parents, digits.validation, result, states, draws)


def score(paths, split, weights):
    """Accuracy of the multilayer perceptron, in NumPy."""
    w = dict(zip(paths, weights, strict=True))
    z = split.images.reshape(len(split.images), -1) @ w["params/dense1/kernel"]
    z = z + w["params/dense1/bias"] - w["batch_stats/norm1/mean"]
    z = z / np.sqrt(w["batch_stats/norm1/var"] + 1e-5)
    z = np.maximum(z * w["params/norm1/scale"] + w["params/norm1/bias"], 0)
    logits = z @ w["params/head/kernel"] + w["params/head/bias"]
    return np.mean(logits.argmax(axis=1) == split.labels)


def test_every_generation_is_that_of_the_published_algorithm(finished):
    paths, parents, split, result, states, draws = finished
    first, second = (
        [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(parent)] for parent in parents
    )
    rounds = list(transliteration(first, second, lambda w: score(paths, split, w), draws))
    assert len(rounds) == len(states) == ROUNDS
    run_key = jax.random.split(KEY, 4)[3]
    for g, (state, (population, scores, pairs, best)) in enumerate(
        zip(states, rounds, strict=True)
    ):
        np.testing.assert_allclose(state.population.fitness, scores, atol=1e-6)
        for t, leaf in enumerate(jax.tree.leaves(state.population.genes)):
            expected = np.stack([individual[t] for individual in population])
            np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-5, err_msg=paths[t])
        for leaf, expected in zip(jax.tree.leaves(state.best.genes), best, strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-5)
        if pairs is not None:
            key = jax.random.split(jax.random.fold_in(run_key, g), 4)[0]
            picks = operators.tournament(key, state.population.fitness, 2 * CHILDREN, size=3)
            assert list(zip(*np.asarray(picks).reshape(2, -1).tolist(), strict=True)) == pairs
    np.testing.assert_allclose(result.fitness, max(rounds[-1][1]), atol=1e-6)


def test_the_comparison_had_something_to_compare(finished):
    paths, _, _, result, states, draws = finished
    assert result.parent_fitness.min() > 0.7  # trained
    assert (np.diff(result.history.best_ever) > 0).any()
    assert (np.diff(result.history.best_ever) == 0).any()
    hit = draws.hits.any(axis=(0, 1))
    assert all(hit[t] for t, path in enumerate(paths) if path.startswith("batch_stats"))
    assert any(len(np.unique(state.population.fitness)) < POPULATION for state in states)  # ties


def test_parents_are_scored_though_they_are_not_in_the_population(finished):
    paths, parents, split, result, states, _ = finished
    for parent, fitness in zip(parents, result.parent_fitness, strict=True):
        expected = score(paths, split, jax.tree.leaves(parent))
        np.testing.assert_allclose(fitness, expected, atol=1e-6)
        kernel = parent["params"]["head"]["kernel"]
        assert (states[0].population.genes["params"]["head"]["kernel"] != kernel).any((1, 2)).all()


def test_evaluations_are_those_of_twenty_rounds_without_the_elite_again(finished):
    assert finished.result.evaluations == POPULATION + (ROUNDS - 1) * CHILDREN
    assert finished.result.history.generation.tolist() == list(range(ROUNDS))


def test_elsewhere_the_doubtful_choices_are_the_other_way_round():
    paper, default = mega_paper(), Config()
    for name in ("parents_first", "relative_noise", "noise_on_statistics", "clip_variances"):
        assert getattr(paper.genome, name) is not getattr(default.genome, name)
    assert paper.align.method == "none" != default.align.method
