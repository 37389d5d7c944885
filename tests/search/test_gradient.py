"""Gradient search and children that learn: planted optima, cost, resumption, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from searches import assert_it_goes_on_bit_identical, started

import megajax as mj
from megajax.merging.masks import Masks
from megajax.search.genetic import Tools
from megajax.search.gradient import from_config
from megajax.search.loop import Limits, examples_scored, run
from megajax.trees import Static

KEY = jax.random.key(0)
SPACE = Masks(Static({"w": np.arange(6)}), num_parents=2, num_genes=6)
GENES = SPACE.init(KEY, 8)
TARGET = jnp.stack([jnp.linspace(0.1, 0.9, 6), 1 - jnp.linspace(0.1, 0.9, 6)], axis=-1)


def evaluate(target, genes):
    return -jnp.sum((genes - target) ** 2, axis=(1, 2))


def objective(key, target, genes, count):
    del key, count
    return -jnp.sum((genes - target) ** 2)


def search_of(objective=objective, evaluate=evaluate, **options):
    config = mj.EvolutionConfig(
        method="gradient", population_size=8, gradient_examples=10, **options
    )
    return from_config(config, Tools(SPACE, evaluate, objective=objective, num_examples=50))


def test_it_finds_a_planted_optimum_and_keeps_the_best():
    search = search_of()
    start = started(search, GENES, TARGET)
    state, infos = run(KEY, search, start, TARGET, Limits(40))
    np.testing.assert_allclose(state.best.genes, TARGET, atol=0.01)
    assert (np.diff(infos.best_ever) >= 0).all()
    assert state.population.fitness.shape == (8,)
    assert float(state.best.fitness) == pytest.approx(float(state.population.fitness.max()))


def test_the_mean_of_the_steps_is_where_noise_throws_the_last_point_about():
    def noisy(key, target, genes, count):
        return objective(key, target + 0.5 * jax.random.normal(key, target.shape), genes, count)

    search = search_of(noisy)
    state, _ = run(KEY, search, started(search, GENES, TARGET), TARGET, Limits(20))
    last, mean = (evaluate(TARGET, SPACE.decode(free)[None])[0] for free in state.memory[:2])
    assert mean > last / 2
    assert state.best.fitness >= mean

    steps = dataclasses.replace(search.descent, steps=1)
    walk, places = steps.start(GENES[0]), []
    for i in range(40):
        walk = steps(jax.random.fold_in(KEY, i), walk, TARGET)
        places.append(np.asarray(walk.free, np.float64))
    expected = np.zeros_like(places[0])
    for count, place in enumerate(places, 1):
        share = max(1 / count, 0.03)
        expected = (1 - share) * expected + share * place
    np.testing.assert_allclose(walk.mean, expected, rtol=1e-4, atol=1e-5)


def test_a_generation_costs_what_a_population_would():
    search = search_of()
    start = started(search, GENES, TARGET)
    state, _ = run(KEY, search, start, TARGET, Limits(3), num_examples=50)
    steps = -(-6 * 50 // (3 * 10))  # of three passes of ten examples each
    assert search.descent.steps == steps
    cost = 8 * 50 + 3 * (steps * 30 + 2 * 50)  # and two points scored
    assert examples_scored(search, 50, jax.device_get(state.counts)) == cost
    limits = Limits(99, examples=cost - 1)
    state, _ = run(KEY, search, start, TARGET, limits, num_examples=50)
    assert int(state.generation) == 2


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_it_goes_on_exactly_as_it_would_have(stop):
    search = search_of()
    assert_it_goes_on_bit_identical(KEY, search, started(search, GENES, TARGET), TARGET, stop)


def test_slopes_that_are_no_numbers_are_not_followed():
    search = search_of(lambda key, target, genes, count: jnp.sum(genes) * jnp.nan)
    start = started(search, GENES, TARGET)
    state, infos = run(KEY, search, start, TARGET, Limits(3))
    assert np.isfinite(infos.best_ever).all()
    assert float(state.best.fitness) >= float(start.best.fitness)


def test_bounds_are_kept():
    low = Masks(SPACE.labels, 2, 6, low=-0.2)
    far = jnp.tile(jnp.array([3.0, -2.0]), (6, 1))
    tools = Tools(low, evaluate, objective=objective, num_examples=50)
    config = mj.EvolutionConfig(method="gradient", population_size=8, learning_rate=1.0)
    search = from_config(config, tools)
    state, _ = run(KEY, search, started(search, low.init(KEY, 8), far), far, Limits(20))
    np.testing.assert_allclose(
        state.best.genes, jnp.tile(jnp.array([1.2, -0.2]), (6, 1)), atol=0.02
    )
    np.testing.assert_allclose(state.best.genes.sum(-1), 1, atol=1e-5)


def linear(w, x):
    return x @ w


def merged(**evolution):
    rng = np.random.default_rng(0)
    parents = [rng.normal(size=(5, 3)).astype(np.float32) for _ in range(2)]
    x = rng.normal(size=(90, 5)).astype(np.float32)
    labels = (x @ (0.3 * parents[0] + 0.7 * parents[1])).argmax(-1)
    options = {"population_size": 8, "generations": 4, "gradient_examples": 64} | evolution
    return mj.merge(KEY, linear, parents, (x, labels), evolution=mj.EvolutionConfig(**options))


@pytest.mark.slow
def test_children_that_learn_do_better_and_pay_for_it():
    plain, memetic = merged(), merged(gradient_steps=5)
    assert memetic.fitness > plain.fitness
    assert memetic.evaluations == plain.evaluations == 8 + 4 * 8
    assert memetic.examples_scored == plain.examples_scored + 4 * 8 * 5 * 3 * 64


def test_what_cannot_descend_is_refused():
    with pytest.raises(mj.ConfigError, match="binary genes have no gradient"):
        from_config(
            mj.EvolutionConfig(method="gradient"),
            Tools(Masks(SPACE.labels, 2, 6, picks=True), evaluate, objective=objective),
        )
