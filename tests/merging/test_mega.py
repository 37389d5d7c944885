"""MeGA as published, against a NumPy transliteration of it that is fed with the same draws."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import megajax as mj
from megajax.search import operators
from megajax.trees import leaf_paths

KEY = jax.random.key(4)
ROUNDS, POPULATION, CHILDREN = 20, 20, 19

PAPER = {
    "align": mj.AlignConfig(method="none"),
    "recalibrate": mj.RecalibrateConfig(enabled=False),
    "genome": mj.GenomeConfig(
        kind="weights",
        parents_first=False,
        relative_noise=False,
        noise_on_statistics=True,
        clip_variances=False,
    ),
    "fitness": mj.FitnessConfig(metric="accuracy"),
    "evolution": mj.EvolutionConfig(
        population_size=20,
        generations=19,
        elites=1,
        selection="tournament",
        tournament_size=3,
        crossover="arithmetic",
        mutation="gaussian",
        mutation_rate=0.02,
        mutation_scale=0.1,
        survival="generational",
    ),
}
"""What `mega_paper` chooses for a merge."""


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
        keys = jax.random.split(mutate_key, len(shapes))
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


def digits():
    """Training and validation images, scaled to [0, 1], with labels."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


TRAINING, VALIDATION = digits()


def forward(variables, x, statistics=None):
    """Dense, BatchNorm, dense; with moving statistics, or those of the batch."""
    params = variables["params"]
    z = x @ params["dense1"]["kernel"] + params["dense1"]["bias"]
    norm = variables["batch_stats"]["norm1"] if statistics is None else statistics(z)
    z = (z - norm["mean"]) * jax.lax.rsqrt(norm["var"] + 1e-5)
    z = jax.nn.relu(z * params["norm1"]["scale"] + params["norm1"]["bias"])
    return z @ params["head"]["kernel"] + params["head"]["bias"], norm


def apply_fn(variables, x):
    return forward(variables, x)[0]


def of_batch(z):
    return {"mean": z.mean(0), "var": z.var(0)}


@jax.jit
def trained(key):
    """A network after 200 steps of Adam on whole batches."""
    first, second = jax.random.split(key)
    params = {
        "dense1": {"kernel": jax.random.normal(first, (64, 12)) / 8, "bias": jnp.zeros(12)},
        "head": {"kernel": jax.random.normal(second, (12, 10)) / 3, "bias": jnp.zeros(10)},
        "norm1": {"scale": jnp.ones(12), "bias": jnp.zeros(12)},
    }
    adam = optax.adam(0.02)

    def loss(params):
        logits, _ = forward({"params": params}, TRAINING[0], of_batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, TRAINING[1]).mean()

    def step(_, carry):
        params, state = carry
        updates, state = adam.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params, _ = jax.lax.fori_loop(0, 200, step, (params, adam.init(params)))
    norm = forward({"params": params}, TRAINING[0], of_batch)[1]
    return {"batch_stats": {"norm1": norm}, "params": params}


class Run(NamedTuple):
    paths: list[str]
    parents: list
    result: mj.MergeResult
    states: list
    draws: Draws


@pytest.fixture(scope="module")
def finished():
    """Two small networks with BatchNorm, trained on digits, merged as published."""
    parents = [jax.device_get(trained(jax.random.key(seed))) for seed in (0, 1)]
    states = []
    result = mj.merge(
        KEY,
        apply_fn,
        parents,
        VALIDATION,
        **PAPER,
        callback=lambda state, infos: states.append(jax.device_get(state)),
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(parents[0])]
    return Run(leaf_paths(parents[0]), parents, result, states, draws_of(KEY, shapes))


def score(paths, weights):
    """Accuracy of the multilayer perceptron, in NumPy."""
    images, labels = VALIDATION
    w = dict(zip(paths, weights, strict=True))
    z = images @ w["params/dense1/kernel"]
    z = z + w["params/dense1/bias"] - w["batch_stats/norm1/mean"]
    with np.errstate(invalid="ignore"):  # a negative variance has no root
        z = z / np.sqrt(w["batch_stats/norm1/var"] + 1e-5)
    z = np.maximum(z * w["params/norm1/scale"] + w["params/norm1/bias"], 0)
    logits = z @ w["params/head/kernel"] + w["params/head/bias"]
    sane = np.isfinite(logits).all(axis=1)
    return np.mean((logits.argmax(axis=1) == labels) & sane)


def test_every_generation_is_that_of_the_published_algorithm(finished):
    paths, parents, result, states, draws = finished
    first, second = (
        [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(parent)] for parent in parents
    )
    rounds = list(transliteration(first, second, lambda w: score(paths, w), draws))
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
    paths, _, result, states, draws = finished
    assert result.parent_fitness.min() > 0.7  # trained
    assert (np.diff(result.history.best_ever) > 0).any()
    assert (np.diff(result.history.best_ever) == 0).any()
    hit = draws.hits.any(axis=(0, 1))
    assert all(hit[t] for t, path in enumerate(paths) if path.startswith("batch_stats"))
    assert any(len(np.unique(state.population.fitness)) < POPULATION for state in states)  # ties


def test_parents_are_scored_though_they_are_not_in_the_population(finished):
    paths, parents, result, states, _ = finished
    for parent, fitness in zip(parents, result.parent_fitness, strict=True):
        expected = score(paths, jax.tree.leaves(parent))
        np.testing.assert_allclose(fitness, expected, atol=1e-6)
        kernel = parent["params"]["head"]["kernel"]
        assert (states[0].population.genes["params"]["head"]["kernel"] != kernel).any((1, 2)).all()


def test_evaluations_are_those_of_twenty_rounds_without_the_elite_again(finished):
    assert finished.result.evaluations == POPULATION + (ROUNDS - 1) * CHILDREN
    assert finished.result.history.generation.tolist() == list(range(ROUNDS))


def test_elsewhere_the_doubtful_choices_are_the_other_way_round():
    paper, default = PAPER["genome"], mj.GenomeConfig()
    for name in ("parents_first", "relative_noise", "noise_on_statistics", "clip_variances"):
        assert getattr(paper, name) is not getattr(default, name)
    assert PAPER["align"].method == "none" != mj.AlignConfig().method


def test_the_named_configuration_is_the_one_that_was_compared():
    presets = pytest.importorskip("megajax.run.presets", exc_type=ImportError)
    paper = presets.mega_paper()
    if not isinstance(paper.genome, mj.GenomeConfig):
        pytest.skip("the configuration still has sections of its own")
    for name, section in PAPER.items():
        assert getattr(paper, name) == section
