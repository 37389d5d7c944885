"""The main job: never worse than the best parent, reproducible, clear about bad input."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import megajax as mj
from megajax.config import CROSSOVERS, GRANULARITIES, MUTATIONS, SELECTIONS, SURVIVALS
from megajax.merging import merge as merging

KEY = jax.random.key(0)


def apply_fn(variables, x):
    """An MLP in plain JAX."""
    *hidden, (w, b) = variables
    for u, v in hidden:
        x = jnp.tanh(x @ u + v)
    return x @ w + b


def parent(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = [(6, 16), (16, 16), (16, 3)]
    return [
        (jax.random.normal(key, size) / size[0] ** 0.5, jnp.zeros(size[1]))
        for key, size in zip(keys, sizes, strict=True)
    ]


INPUTS = jax.random.normal(jax.random.key(9), (120, 6))
LABELS = np.asarray(jnp.argmax(apply_fn(parent(77), INPUTS), axis=-1))
PARENTS = [parent(0), parent(1)]
NO_ALIGNMENT = mj.AlignConfig(method="none")
SMALL = mj.EvolutionConfig(population_size=10, generations=6, tournament_size=3)


def merge(key=KEY, parents=PARENTS, validation=(INPUTS, LABELS), evolution=SMALL, **options):
    return mj.merge(key, apply_fn, parents, validation, evolution=evolution, **options)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("binary", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_result_is_never_below_the_best_parent_and_its_fitness_is_its_own(granularity, binary):
    result = merge(genome=mj.GenomeConfig(granularity=granularity, binary=binary))
    assert result.fitness >= result.parent_fitness.max()
    chex.assert_trees_all_equal_shapes_and_dtypes(result.variables, PARENTS[0])
    for k, variables in enumerate([*PARENTS, result.variables]):
        nll = mj.measure(mj.predict(apply_fn, variables, INPUTS), LABELS).nll
        expected = result.fitness if k == 2 else result.parent_fitness[k]
        np.testing.assert_allclose(-nll, expected, rtol=1e-5)


def test_the_same_key_gives_the_same_bits_and_another_key_another_network():
    first, again, other = merge(), merge(), merge(key=jax.random.key(1))
    chex.assert_trees_all_equal(first.variables, again.variables)
    chex.assert_trees_all_equal(first.history, again.history)
    assert not np.array_equal(first.genes, other.genes)


@pytest.mark.slow
@pytest.mark.parametrize("field", ["selection", "crossover", "mutation", "survival"])
def test_every_operator_by_name(field):
    choices = {
        "selection": SELECTIONS,
        "crossover": [*CROSSOVERS, CROSSOVERS],
        "mutation": [*MUTATIONS, MUTATIONS],
        "survival": SURVIVALS,
    }
    for choice in choices[field]:
        result = merge(evolution=SMALL.replace(**{field: choice}))
        assert result.fitness >= result.parent_fitness.max()
        coefficients = np.asarray(result.state.population.genes)
        assert (coefficients >= 0).all()
        np.testing.assert_allclose(coefficients.sum(-1), 1, atol=1e-5)


def test_evaluations_are_counted_and_elites_are_free():
    assert merge().evaluations == 10 + 6 * 10
    elites = SMALL.replace(survival="generational", elites=3)
    assert merge(evolution=elites).evaluations == 10 + 6 * 7
    budget = SMALL.replace(evaluation_budget=35)
    assert merge(evolution=budget).evaluations == 30


def test_history_begins_with_the_first_population():
    result = merge()
    assert result.history.generation.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert result.history.best_ever[0] >= result.parent_fitness.max()
    assert result.history.best_ever[-1] == np.float32(result.fitness)


def test_callback_sees_every_generation_and_may_stop_before_the_first():
    seen = []
    merge(callback=lambda state, infos: seen.extend(infos.generation.tolist()))
    assert seen == [0, 1, 2, 3, 4, 5, 6]
    assert merge(callback=lambda state, infos: True).evaluations == 10


def test_many_parents_and_a_users_own_labels_and_metric():
    parents = [parent(seed) for seed in range(5)]
    labels = [(0, 0), (1, 1), (-1, -1)]
    result = merge(
        parents=parents,
        labels=labels,
        fitness=mj.FitnessConfig(metric=lambda logits, y: -jnp.square(logits).mean(-1)),
    )
    assert result.genome.num_genes == 2
    assert result.genes.shape == (2, 5)
    chex.assert_trees_all_equal(result.variables[2], parents[0][2])
    assert result.fitness >= result.parent_fitness.max()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"parents": PARENTS[:1]}, mj.ParentsError, "1 parent given"),
        (
            {"parents": [PARENTS[0], PARENTS[1][:2]]},
            mj.ParentsError,
            r"leaf 2/0: float32\[16,3\] in parent 0 but no such leaf in parent 1",
        ),
        ({"validation": (INPUTS[:0], LABELS[:0])}, mj.DataError, "validation set is empty"),
        ({"validation": (INPUTS, LABELS + 1)}, mj.DataError, "labels run from 1 to 3.* 3 classes"),
        ({"validation": (INPUTS, LABELS - 1)}, mj.DataError, "labels run from -1 to 1"),
        ({"validation": (INPUTS, LABELS * 1.0)}, mj.DataError, "labels are float"),
        (
            {"evolution": mj.EvolutionConfig(population_size=3, elites=0), "parents": PARENTS * 2},
            mj.ConfigError,
            "evolution.population_size is 3: .* 4 parents and their mean, so at least 5",
        ),
        (
            {"evolution": SMALL.replace(evaluation_budget=9)},
            mj.ConfigError,
            "evolution.evaluation_budget is 9: the first population alone needs 10",
        ),
    ],
)
def test_what_cannot_work_is_named(options, error, message):
    with pytest.raises(error, match=message) as caught:
        merge(**options)
    assert isinstance(caught.value, mj.MegajaxError)
    assert "\n" not in str(caught.value)


def test_continued_from_a_state_it_ends_bit_identical_and_another_searchs_state_is_refused():
    parents = [{"kernel": jnp.diag(jnp.array(d))} for d in ([1.0, 1, 0], [0.0, 1, 1])]
    merge = partial(
        mj.merge,
        KEY,
        lambda variables, x: x @ variables["kernel"],
        parents,
        (jnp.eye(3), jnp.arange(3)),
        align=NO_ALIGNMENT,
        evolution=SMALL.replace(crossover="uniform"),
    )
    seen = []
    whole = merge(callback=lambda state, infos: seen.append(jax.device_get(state)))
    rest = merge(state=seen[2])
    chex.assert_trees_all_equal(rest.variables, whole.variables)
    chex.assert_trees_all_equal(rest.state, whole.state)
    np.testing.assert_array_equal(rest.parent_fitness, whole.parent_fitness)
    assert rest.history.generation.tolist() == [3, 4, 5, 6]
    assert rest.evaluations == whole.evaluations
    smaller = jax.tree.map(lambda leaf: leaf[:8], seen[2].population)
    with pytest.raises(mj.ConfigError, match=r"population/genes is float32\[8, .* there, .*\[10, "):
        merging._check_state(seen[2]._replace(population=smaller), seen[0])


def test_parents_without_finite_outputs_stop_before_the_search():
    with pytest.raises(mj.SearchError, match="generation 0: none of the 10 networks"):
        mj.merge(
            KEY,
            lambda variables, x: x @ variables * jnp.nan,
            [jnp.eye(3), -jnp.eye(3)],
            (jnp.eye(3), jnp.arange(3)),
            evolution=SMALL,
            align=NO_ALIGNMENT,
        )
