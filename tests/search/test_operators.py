"""Operators against closed forms and invariants, and one battery over all of them."""

import inspect
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from megajax.search import operators as ops

KEY = jax.random.key(7)
SELECTIONS = {
    "tournament": ops.tournament,
    "roulette": ops.roulette,
    "rank": ops.rank,
}
CROSSOVERS = {
    "arithmetic": ops.arithmetic,
    "arithmetic_per_gene": partial(ops.arithmetic, per_gene=True),
    "uniform": ops.uniform,
    "one_point": ops.one_point,
    "two_point": ops.two_point,
    "blx_alpha": ops.blx_alpha,
    "choose_one": partial(ops.choose_one, among=[ops.uniform, ops.arithmetic]),
}
MUTATIONS = {
    "gaussian": partial(ops.gaussian, rate=0.5),
    "reset": partial(ops.reset, rate=0.5),
    "apply_all": partial(ops.apply_all, mutations=[ops.gaussian, ops.reset]),
}
SURVIVALS = {"generational": ops.generational, "plus": ops.plus}


def genes_pair(num=64):
    """Two sets of genes in which every number is different, with two leaves of equal shape."""
    shapes = {"a": (num, 6), "b": (num, 6), "c": (num, 2, 3, 2)}
    first, start = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        first[name] = jnp.arange(start, start + size, dtype=jnp.float32).reshape(shape)
        start += size
    return first, jax.tree.map(lambda leaf: leaf + 10_000.0, first)


def from_second(child, first, second):
    """Where a child's numbers come from the second of the pair; every number must be a parent's."""
    for c, a, b in zip(*map(jax.tree.leaves, (child, first, second)), strict=True):
        assert ((c == a) | (c == b)).all()
    return jax.tree.map(lambda c, b: np.asarray(c == b), child, second)


# One battery over all of them -----------------------------------------------------------------


@pytest.mark.parametrize(
    "operator", [*SELECTIONS.values(), *CROSSOVERS.values(), *MUTATIONS.values()]
)
def test_key_is_the_first_parameter(operator):
    assert next(iter(inspect.signature(operator).parameters)) == "key"


def cases():
    fitness = jax.random.normal(jax.random.key(1), (64,))
    first, second = genes_pair()
    population = ops.Population(first, fitness)
    offspring = ops.Population(second, fitness + 0.5)
    for name, select in SELECTIONS.items():
        yield pytest.param(lambda key, s=select: s(key, fitness, 10), id=name)
    for name, cross in CROSSOVERS.items():
        yield pytest.param(lambda key, c=cross: c(key, first, second), id=name)
    for name, mutate in MUTATIONS.items():
        yield pytest.param(lambda key, m=mutate: m(key, first), id=name)
    for name, survive in SURVIVALS.items():
        yield pytest.param(lambda key, s=survive: s(key, population, offspring), id=name)


@pytest.mark.parametrize("operator", list(cases()))
def test_jit_and_vmap_agree_with_plain_calls(operator):
    plain = operator(KEY)
    chex.assert_trees_all_close(jax.jit(operator)(KEY), plain, rtol=1e-5, atol=1e-2)
    chex.assert_trees_all_equal(operator(KEY), plain)
    keys, compiled = jax.random.split(KEY, 3), jax.jit(operator)
    looped = jax.tree.map(lambda *leaves: np.stack(leaves), *[compiled(k) for k in keys])
    mapped = jax.jit(jax.vmap(operator))(keys)
    chex.assert_trees_all_close(mapped, looped, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("operator", [*CROSSOVERS.values(), *MUTATIONS.values()])
def test_structure_shapes_and_dtypes_are_kept(operator):
    first, second = genes_pair()
    genes = (first, second) if operator in CROSSOVERS.values() else (first,)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(operator, KEY, *genes), first)


@pytest.mark.parametrize(
    "name", ["arithmetic_per_gene", "uniform", "blx_alpha", "gaussian", "reset"]
)
def test_leaves_of_equal_shape_do_not_share_noise(name):
    zeros = {"a": jnp.zeros((32, 50)), "b": jnp.zeros((32, 50))}
    ones = jax.tree.map(jnp.ones_like, zeros)
    genes = (zeros, ones) if name in CROSSOVERS else (zeros,)
    result = jax.jit((CROSSOVERS | MUTATIONS)[name])(KEY, *genes)
    assert not np.array_equal(result["a"], result["b"])


@pytest.mark.parametrize("cross", list(CROSSOVERS.values()), ids=list(CROSSOVERS))
def test_a_gene_that_both_share_is_inherited_bit_for_bit(cross):
    genes = {"a": jax.random.normal(KEY, (16, 9)), "b": jax.random.normal(KEY, (16, 3, 2))}
    chex.assert_trees_all_equal(jax.jit(cross)(KEY, genes, genes), genes)


# Selection ------------------------------------------------------------------------------------


def frequency(indices, population_size):
    return np.bincount(np.asarray(indices), minlength=population_size) / len(indices)


def assert_frequencies(indices, expected, sigmas=5):
    """Observed frequencies within a few standard errors of the expected probabilities."""
    num = len(indices)
    error = np.sqrt(np.maximum(expected * (1 - expected), 1e-12) / num)
    assert (np.abs(frequency(indices, len(expected)) - expected) <= sigmas * error + 1e-9).all()


def test_tournament_probabilities_have_their_closed_form():
    P, size, num = 7, 3, 40_000
    fitness = jax.random.permutation(KEY, jnp.arange(P, dtype=jnp.float32))
    winners = jax.jit(partial(ops.tournament, num=num, size=size))(KEY, fitness)
    below = np.arange(P + 1)  # probability that all contestants are among the i worst
    cumulative = below * (below - 1) * (below - 2) / (P * (P - 1) * (P - 2))
    expected = np.diff(cumulative)[np.asarray(fitness).astype(int)]
    assert_frequencies(winners, expected)


def test_tournament_without_replacement_draws_every_ordered_triple_alike():
    drawn = np.asarray(ops._distinct(KEY, 5, 60_000, 3))
    assert all(len(set(row)) == 3 for row in drawn[:2000].tolist())
    codes = drawn @ np.array([25, 5, 1])
    counts = np.bincount(codes, minlength=125)
    assert (counts > 0).sum() == 60
    assert_frequencies(codes, (counts > 0) / 60)


def test_tournament_of_the_whole_population_finds_the_best():
    fitness = jax.random.normal(KEY, (11,))
    winners = jax.jit(partial(ops.tournament, num=50, size=11))(KEY, fitness)
    assert (winners == fitness.argmax()).all()


def test_tournament_larger_than_the_population_is_refused():
    with pytest.raises(ValueError, match="4 distinct from a population of 3"):
        ops.tournament(KEY, jnp.zeros(3), 1, size=4)


def test_roulette_probabilities_are_proportional_to_fitness_above_the_worst():
    fitness = jnp.array([-3.0, -1.0, 0.0, 2.0])
    indices = ops.roulette(KEY, fitness, 40_000)
    assert_frequencies(indices, np.array([0.0, 2.0, 3.0, 5.0]) / 10)


def test_roulette_of_equal_fitness_is_uniform_over_the_finite_ones():
    indices = ops.roulette(KEY, jnp.array([2.0, -jnp.inf, 2.0]), 20_000)
    assert_frequencies(indices, np.array([0.5, 0.0, 0.5]))


@pytest.mark.parametrize("pressure", [1.0, 1.7, 2.0])
def test_rank_probabilities_are_bakers(pressure):
    fitness = jnp.array([0.3, -5.0, 1e6, 7.0, 0.4])
    indices = ops.rank(KEY, fitness, 40_000, pressure=pressure)
    position = np.array([1, 0, 4, 3, 2])
    P = len(position)
    expected = (2 - pressure) / P + 2 * position * (pressure - 1) / (P * (P - 1))
    assert_frequencies(indices, expected)


@pytest.mark.parametrize("select", [ops.roulette, ops.rank])
def test_an_individual_without_fitness_is_never_selected(select):
    fitness = np.full(1000, -np.inf, np.float32)
    fitness[::10] = np.linspace(1.0, 1.0 + 1e-6, 100)
    assert (jax.jit(select, static_argnums=2)(KEY, fitness, 10_000) % 10 == 0).all()


@pytest.mark.parametrize("limit", [1, 7, 1000, 2**16 - 1])
def test_uniform_integers_are_alike_and_below_their_limit(limit):
    drawn = np.asarray(ops.uniform_integers(KEY, (200_000,), limit))
    assert drawn.dtype == np.int32
    assert drawn.min() >= 0
    assert drawn.max() < limit
    counts = np.histogram(drawn, bins=min(limit, 50), range=(0, limit))[0]
    edges = np.ceil(np.linspace(0, limit, min(limit, 50) + 1))  # whole numbers in each bin
    expected = 200_000 * np.diff(edges) / limit
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected)).all()


def test_uniform_integers_of_a_rounded_one_stay_below_their_limit(monkeypatch):
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, 1.0))
    assert ops.uniform_integers(KEY, (3,), np.array([1, 2, 3])).tolist() == [0, 1, 2]


# Crossover ------------------------------------------------------------------------------------


def test_arithmetic_uses_one_coefficient_for_the_whole_child():
    first, second = genes_pair()
    child = ops.arithmetic(KEY, first, second)
    share = jax.tree.map(lambda c, b: np.asarray((b - c) / 10_000.0), child, second)
    flat = np.concatenate([leaf.reshape(64, -1) for leaf in jax.tree.leaves(share)], axis=1)
    np.testing.assert_allclose(flat, np.repeat(flat[:, :1], flat.shape[1], axis=1), atol=1e-5)
    assert 0 <= flat.min() < 0.1 < 0.9 < flat.max() <= 1
    assert len(np.unique(flat[:, 0].round(6))) == 64


def test_arithmetic_per_gene_uses_one_for_each():
    first, second = jnp.zeros((8, 5, 2)), jnp.ones((8, 5, 2))
    child = np.asarray(ops.arithmetic(KEY, first, second, per_gene=True, gene_ndim=1))
    np.testing.assert_array_equal(child[..., 0], child[..., 1])
    assert len(np.unique(child[..., 0])) == 40


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 1.0])
def test_uniform_takes_genes_of_the_second_at_the_given_rate(rate):
    first, second = jnp.zeros((200, 100)), jnp.ones((200, 100))
    share = float(ops.uniform(KEY, first, second, rate=rate).mean())
    assert abs(share - rate) < 5 * np.sqrt(max(rate * (1 - rate), 1e-12) / 20_000) + 1e-9


def test_fair_coins_are_independent_of_their_neighbours():
    coins = np.asarray(ops.uniform(KEY, jnp.zeros((101, 331)), jnp.ones((101, 331)))).ravel()
    bound = 5 / np.sqrt(coins.size)
    for distance in (1, 31, 32, 64, 331):
        both = (2 * coins[distance:] - 1) * (2 * coins[:-distance] - 1)
        assert abs(both.mean()) < bound


@pytest.mark.parametrize(("gene_ndim", "inner"), [(0, 0), (1, 1), (None, 3)])
def test_a_gene_is_inherited_whole(gene_ndim, inner):
    first, second = genes_pair()
    swapped = from_second(ops.uniform(KEY, first, second, gene_ndim=gene_ndim), first, second)["c"]
    by_gene = swapped.reshape(*swapped.shape[: swapped.ndim - inner], -1)
    assert (by_gene.all(-1) | ~by_gene.any(-1)).all()
    assert swapped.any()
    assert not swapped.all()


@pytest.mark.parametrize("gene_ndim", [0, 1, None])
def test_one_point_cuts_once_over_all_leaves(gene_ndim):
    first, second = genes_pair(400)
    swapped = from_second(ops.one_point(KEY, first, second, gene_ndim=gene_ndim), first, second)
    flat = np.concatenate([leaf.reshape(400, -1) for leaf in jax.tree.leaves(swapped)], axis=1)
    assert (np.diff(flat.astype(int), axis=1) >= 0).all()  # first, then second, never back
    assert not flat[:, 0].any()
    assert flat[:, -1].all()
    num_cuts = {0: 6 + 6 + 12 - 1, 1: 1 + 1 + 6 - 1, None: 2}[gene_ndim]
    assert len(np.unique(flat.sum(1))) == num_cuts  # every place is cut


def test_two_point_takes_one_stretch_from_the_second():
    first, second = jnp.zeros((4000, 6)), jnp.ones((4000, 6))
    child = np.asarray(ops.two_point(KEY, first, second)).astype(int)
    edges = np.abs(np.diff(np.pad(child, ((0, 0), (1, 1))), axis=1)).sum(1)
    assert (edges == 2).all()
    assert len(np.unique(child, axis=0)) == 6 + 5 + 4 + 3 + 2  # every stretch of 1 to 5 genes
    single = ops.two_point(KEY, jnp.zeros((9, 1)), jnp.ones((9, 1)))
    assert (single == 1).all()


def test_blx_alpha_fills_the_widened_interval_evenly():
    first, second = jnp.full((400, 100), 1.0), jnp.full((400, 100), 3.0)
    child = np.asarray(ops.blx_alpha(KEY, first, second, alpha=0.25)).ravel()
    assert 0.5 <= child.min() < 0.51
    assert 3.49 < child.max() <= 3.5
    counts = np.histogram(child, bins=10, range=(0.5, 3.5))[0]
    assert (np.abs(counts - 4000) < 5 * np.sqrt(4000)).all()


def test_blx_alpha_keeps_the_sum_of_a_vector_gene():
    first = jax.random.dirichlet(KEY, jnp.ones(3), (50, 20))
    second = jax.random.dirichlet(jax.random.key(9), jnp.ones(3), (50, 20))
    child = ops.blx_alpha(KEY, first, second, gene_ndim=1)
    np.testing.assert_allclose(child.sum(-1), 1.0, atol=1e-5)
    assert (child < 0).any()


def test_choose_one_makes_each_child_with_one_of_them():
    first, second = jnp.zeros((300, 5)), jnp.ones((300, 5))
    constant = [lambda key, a, b, v=v: jnp.full_like(a, v) for v in (0.0, 1.0, 2.0)]
    child = np.asarray(ops.choose_one(KEY, first, second, among=constant))
    assert (child == child[:, :1]).all()
    assert_frequencies(child[:, 0].astype(int), np.full(3, 1 / 3))


# Mutation -------------------------------------------------------------------------------------


def test_gaussian_hits_genes_at_the_rate_with_the_right_noise():
    genes = jnp.zeros((300, 200, 2))
    result = np.asarray(ops.gaussian(KEY, genes, rate=0.1, scale=0.3, gene_ndim=1))
    hit = (result != 0).any(-1)
    assert abs(hit.mean() - 0.1) < 5 * np.sqrt(0.09 / 60_000)
    assert (result[hit] != 0).all()  # both numbers of a gene that is hit
    noise = result[hit].ravel()
    assert abs(noise.std() / 0.3 - 1) < 5 / np.sqrt(2 * noise.size)
    assert abs(noise.mean()) < 5 * 0.3 / np.sqrt(noise.size)


@pytest.mark.parametrize("rate", [0.002, 0.02])
def test_few_hits_among_many_genes_are_independent_coins(rate):
    """The gaps between hits make the same distribution as a coin for each gene."""
    num, count = 2000, 1500
    assert 4 * ops.most_hits(rate, count) <= count
    result = np.asarray(ops.gaussian(KEY, jnp.ones((num, count, 2)), rate=rate, gene_ndim=1))
    hit = (result != 1).any(-1)
    assert (result[hit] != 1).all()
    binomial = stats.binom(count, rate)
    hits = hit.sum(1)
    assert abs(hits.mean() - binomial.mean()) < 5 * binomial.std() / np.sqrt(num)
    assert abs(hits.var() / binomial.var() - 1) < 5 * np.sqrt(3 / num)
    for places in np.split(hit.mean(0), 5):  # the first genes as often as the last
        assert abs(places.mean() - rate) < 5 * np.sqrt(rate / places.size / num)
    together = (hit[:, 1:] & hit[:, :-1]).sum()  # neighbours are independent
    expected = num * (count - 1) * rate**2
    assert abs(together - expected) < 5 * np.sqrt(expected)
    noise = (result[hit] - 1).ravel()
    assert abs(noise.std() / 0.1 - 1) < 5 / np.sqrt(2 * noise.size)
    assert abs(np.corrcoef(result[hit].T)[0, 1]) < 5 / np.sqrt(hit.sum())


def test_reset_of_few_genes_among_many_draws_whole_genes():
    def sample(key, shape, dtype):
        return jnp.broadcast_to(jnp.arange(1.0, shape[-1] + 1), shape)

    genes = jnp.zeros((50, 20, 40, 3))
    result = np.asarray(ops.reset(KEY, genes, rate=0.01, sample=sample, gene_ndim=1))
    hit = result.any(-1)
    assert abs(hit.mean() - 0.01) < 5 * np.sqrt(0.01 / hit.size)
    assert (result[hit] == [1, 2, 3]).all()


@pytest.mark.parametrize("count", [60, 1000, 10**5, 2**24])
@pytest.mark.parametrize("rate", [1e-7, 1e-4, 0.01, 0.1])
def test_there_is_room_for_all_hits(count, rate):
    assert stats.binom(count, rate).sf(ops.most_hits(rate, count)) < 1e-15


def test_whole_leaf_as_one_gene():
    result = ops.gaussian(KEY, {"w": jnp.zeros((500, 4, 4))}, rate=0.3, gene_ndim=None)["w"]
    hit = np.asarray(result != 0).reshape(500, -1)
    assert (hit.all(1) | ~hit.any(1)).all()
    assert abs(hit[:, 0].mean() - 0.3) < 5 * np.sqrt(0.21 / 500)


def test_reset_draws_from_the_sampler_where_it_hits():
    def sample(key, shape, dtype):
        return jnp.full(shape, 5.0, dtype)

    result = np.asarray(ops.reset(KEY, jnp.zeros((100, 100)), rate=0.2, sample=sample))
    assert set(np.unique(result)) == {0.0, 5.0}
    assert abs((result == 5).mean() - 0.2) < 5 * np.sqrt(0.16 / 10_000)


# Survival -------------------------------------------------------------------------------------


def random_population(seed, num):
    key = jax.random.key(seed)
    fitness = jax.random.normal(key, (num,))
    return ops.Population({"g": fitness[:, None] * 2}, fitness, fitness * 3)


def test_plus_keeps_the_best_of_both_with_all_that_belongs_to_them():
    old, new = random_population(0, 10), random_population(1, 30)
    kept = ops.plus(KEY, old, new)
    everyone = np.concatenate([old.fitness, new.fitness])
    np.testing.assert_array_equal(kept.fitness, np.sort(everyone)[::-1][:10])
    np.testing.assert_array_equal(kept.genes["g"][:, 0], kept.fitness * 2)
    np.testing.assert_array_equal(kept.aux, kept.fitness * 3)


def test_generational_keeps_the_elites_and_all_offspring():
    old, new = random_population(0, 10), random_population(1, 7)
    kept = ops.generational(KEY, old, new)
    np.testing.assert_array_equal(kept.fitness[:3], np.sort(old.fitness)[::-1][:3])
    chex.assert_trees_all_equal(ops.take(kept, jnp.arange(3, 10)), new)


def test_best_are_the_fittest_the_first_of_equals_first():
    population = ops.Population(jnp.arange(5), jnp.array([1.0, 3.0, 3.0, -jnp.inf, 2.0]))
    assert ops.best(population, 4).genes.tolist() == [1, 2, 4, 0]


def test_an_individual_without_fitness_is_never_an_elite():
    old = ops.Population(jnp.arange(4), jnp.array([-jnp.inf, -5.0, -jnp.inf, -6.0]))
    new = ops.Population(jnp.array([7, 8]), jnp.array([-jnp.inf, -jnp.inf]))
    assert ops.plus(KEY, old, new).genes[:2].tolist() == [1, 3]
    assert ops.generational(KEY, old, new).genes[:2].tolist() == [1, 3]
