"""The tree: who meets whom, what it may cost, and that neither a stop nor company changes a bit."""

import itertools
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import megajax as mj
from megajax.alignment import permute, random_permutations
from megajax.merging import tree as hierarchy
from megajax.merging.fitness import negative_cross_entropy
from megajax.merging.tree import (
    NodeResult,
    match_pairs,
    merge_tree,
    node_key,
    plan,
    share_budget,
    weight_similarity,
)
from megajax.search.genetic import GAInfo
from megajax.zoo.networks import build

KEY = jax.random.key(0)


# Expert k knows class k and nothing else.


def expert(k, strength=8.0):
    return {"head": {"kernel": jnp.diag(jnp.zeros(5).at[k].set(strength))}}


def apply_fn(variables, x):
    return x @ variables["head"]["kernel"]


EXPERTS = [expert(k) for k in range(5)]
DATA = np.eye(5, dtype=np.float32), np.arange(5)
TRACED, SCORED = [], []


def counting(logits, labels):
    """Counts how often it is traced, and how often it is run."""
    TRACED.append(logits.shape)
    jax.debug.callback(lambda: SCORED.append(1))
    return negative_cross_entropy(logits, labels)


# 93 evaluations for four nodes: 2, 3, 3 and 3 generations, and three evaluations are left over.
SMALL = mj.EvolutionConfig(
    population_size=6, evaluation_budget=93, generations_per_chunk=2, crossover="uniform"
)
IN_TURN = mj.FitnessConfig(metric=counting, population_chunk=1)
SIDE_BY_SIDE = mj.FitnessConfig(metric=counting, population_chunk=6)


@pytest.fixture(autouse=True, scope="module")
def compile_once():
    """Trees of one configuration share their setup, and so their programs, to save time."""
    prepare, setups = hierarchy.prepare, {}

    def prepare_once(apply_fn, parents, validation, **choices):
        key = choices["fitness"], choices["evolution"]
        if key not in setups:
            setups[key] = prepare(apply_fn, parents, validation, **choices)
        return setups[key]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(hierarchy, "prepare", prepare_once)
        yield


def tree(parents=EXPERTS, fitness=IN_TURN, load=None, save=None, callback=None, **choices):
    TRACED.clear()
    SCORED.clear()
    result = merge_tree(
        KEY,
        apply_fn,
        parents,
        DATA,
        hierarchy=mj.HierarchyConfig(**choices),
        fitness=fitness,
        evolution=SMALL,
        load=load,
        save=save,
        callback=callback,
    )
    jax.effects_barrier()
    return result


@pytest.fixture(scope="module")
def alone():
    """The five experts merged one node at a time, and what could be seen of it."""
    seen = []
    result = tree(
        nodes_at_once=1, callback=lambda node, info: seen.append((node, info, len(TRACED)))
    )
    return SimpleNamespace(result=result, seen=seen, scored=len(SCORED), traced=len(TRACED))


# The plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(2, 10))
@pytest.mark.parametrize("odd", ["carry", "drop"])
def test_a_plan_halves_until_one_is_left(count, odd):
    rounds = plan(count, odd)
    sizes, left = [], count
    while left > 1:
        sizes.append(left // 2)
        left = -(-left // 2) if odd == "carry" else left // 2
    assert [len(nodes) for nodes in rounds] == sizes
    leaves, number = {k: [k] for k in range(count)}, count
    for r, nodes in enumerate(rounds, start=1):
        for p, node in enumerate(nodes):
            assert node[:3] == (r, p, number)
            first, second = node.parents
            leaves[number] = leaves.pop(first) + leaves.pop(second)  # nobody meets twice
            number += 1
    # Carried, all parents get to the root; dropped, the first ones, as many as fill a whole tree.
    kept = count if odd == "carry" else 2 ** int(np.log2(count))
    assert sorted(leaves[number - 1]) == list(range(kept))


def test_neighbours_meet_and_the_odd_one_comes_last():
    parents = [[node.parents for node in nodes] for nodes in plan(7)]
    assert parents == [[(0, 1), (2, 3), (4, 5)], [(7, 8), (9, 6)], [(10, 11)]]
    parents = [[node.parents for node in nodes] for nodes in plan(7, "drop")]
    assert parents == [[(0, 1), (2, 3), (4, 5)], [(7, 8)]]


def test_what_is_no_tree_is_named():
    with pytest.raises(mj.ConfigError, match="num_parents is 1"):
        plan(1)
    with pytest.raises(mj.ConfigError, match=r"hierarchy.odd is 'keep': choose one of carry, drop"):
        plan(3, "keep")
    with pytest.raises(mj.ParentsError, match="1 parent given"):
        tree(EXPERTS[:1])


# The budget -----------------------------------------------------------------------------------


def test_a_budget_is_spent_as_far_as_whole_generations_go_and_never_exceeded():
    rng = np.random.default_rng(0)
    for nodes, population in rng.integers((1, 2), (9, 12), (50, 2)).tolist():
        offspring = int(rng.integers(1, population + 1))
        budget = nodes * population + int(rng.integers(0, 200))
        shared = share_budget(budget, nodes, population, offspring)
        assert budget - offspring < shared.total <= budget
        assert shared.total == sum(shared.evaluations)
        assert shared.generations[-1] - shared.generations[0] <= 1
        assert list(shared.generations) == sorted(shared.generations)
        costs = [population + generations * offspring for generations in shared.generations]
        assert list(shared.evaluations) == costs
    with pytest.raises(mj.ConfigError, match=r"evaluation_budget is 79: .* of 4 nodes need 80"):
        share_budget(79, 4, 20, 20)


def test_a_tree_and_one_search_of_all_parents_cost_the_same_up_to_a_generation():
    # 7 * 20 + 97 * 19 = 1983 and 20 + 104 * 19 = 1996: one more generation would be too much.
    assert share_budget(2000, 7, 20, 19).total == 1983
    assert share_budget(2000, 1, 20, 19).total == 1996


# The search -----------------------------------------------------------------------------------


def known(variables):
    logits = np.asarray(apply_fn(variables, DATA[0]))
    return [k for k in range(5) if logits[k].argmax() == k and logits[k, k] > 0]


def test_the_root_knows_what_any_parent_knew(alone):
    assert [known(parent) for parent in EXPERTS] == [[0], [1], [2], [3], [4]]
    assert known(alone.result.variables) == [0, 1, 2, 3, 4]
    assert alone.result.fitness > alone.result.parent_fitness.max()
    nll = [mj.measure(np.asarray(apply_fn(parent, DATA[0])), DATA[1]).nll for parent in EXPERTS]
    np.testing.assert_allclose(alone.result.parent_fitness, -np.array(nll), rtol=1e-5)


def test_a_dropped_parent_leaves_nothing():
    result = tree(odd="drop", nodes_at_once=1)
    assert known(result.variables) == [0, 1, 2, 3]
    assert np.isnan(result.parent_fitness).tolist() == [False] * 4 + [True]
    assert [node.parents for node in result.nodes] == [(0, 1), (2, 3), (5, 6)]
    assert result.evaluations == len(SCORED) == 3 * 6 + 12 * 6


def test_what_a_tree_costs_is_what_was_scored(alone):
    shared = share_budget(93, 4, 6, 6)
    assert alone.scored == alone.result.evaluations == shared.total == 90
    assert [result.evaluations for result in alone.result.results] == list(shared.evaluations)
    lengths = [len(result.history.generation) for result in alone.result.results]
    assert lengths == [1 + generations for generations in shared.generations]


def test_results_tell_the_tree(alone):
    result = alone.result
    assert result.nodes == tuple(itertools.chain(*plan(5)))
    fitness = dict(enumerate(result.parent_fitness))
    for node, found in zip(result.nodes, result.results, strict=True):
        met = [fitness[number] for number in node.parents]
        np.testing.assert_allclose(found.parent_fitness, met, rtol=1e-6)
        assert found.history.best_ever[-1] == np.float32(found.fitness)
        assert found.fitness >= max(met)
        fitness[node.number] = found.fitness
        seen = [info for of, info, _ in alone.seen if of == node]
        chex.assert_trees_all_equal(
            jax.tree.map(lambda *leaves: np.concatenate(leaves), *seen), found.history
        )


def test_a_node_is_a_merge_with_its_own_key(alone):
    node, found = alone.result.nodes[2], alone.result.results[2]
    assert node.parents == (5, 6)
    merged = mj.merge(
        node_key(KEY, node),
        apply_fn,
        [result.variables for result in alone.result.results[:2]],
        DATA,
        fitness=IN_TURN,
        evolution=SMALL.replace(evaluation_budget=None, generations=3),
    )
    chex.assert_trees_all_equal(merged.variables, found.variables)
    chex.assert_trees_all_equal(merged.history, found.history)


def test_in_turn_nodes_at_once_get_the_bits_they_get_alone_in_one_trace(alone):
    together = tree(nodes_at_once=2)
    assert_same(together, alone.result)
    # Alone, the first node was traced and the others were not.
    second = next(traced for node, _, traced in alone.seen if node.number == 6)
    assert second == alone.traced
    # The programs of one node are there by now; those of two are traced as if they were of one.
    assert 0 < len(TRACED) <= alone.traced


@pytest.mark.slow
def test_side_by_side_nodes_are_close_to_alone_and_the_same_when_one_is_loaded(alone):
    def first_round(loaded):
        """What is saved of both nodes, which run at once: there are no convolutions."""
        found = {}

        def save(node, result):
            found[node.number] = result
            if node.number == 6:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tree(fitness=SIDE_BY_SIDE, load=lambda node: loaded.get(node.number), save=save)
        return found

    both = first_round({})
    for found, expected in zip(both.values(), alone.result.results[:2], strict=True):
        first, other = (jax.tree.map(lambda x: x[0], r.history) for r in (found, expected))
        chex.assert_trees_all_close(first, other, rtol=1e-5)  # later on they may part
        assert found.evaluations == expected.evaluations
        assert found.fitness > found.parent_fitness.max()
    again = first_round({5: both[5]})  # node 6 keeps its place in the program
    assert list(again) == [6]
    chex.assert_trees_all_equal(again[6], both[6])


def assert_same(first, second):
    assert first.nodes == second.nodes
    chex.assert_trees_all_equal(first.variables, second.variables)
    chex.assert_trees_all_equal(first.results, second.results)
    assert first[1] == second[1]
    np.testing.assert_array_equal(first.parent_fitness, second.parent_fitness)


# Stopping and going on ------------------------------------------------------------------------

LIKE = NodeResult(EXPERTS[0], 0.0, np.zeros(2), GAInfo(*[np.zeros(1)] * len(GAInfo._fields)), 0, 0)


@pytest.mark.parametrize("nodes_at_once", [1, 2])
@pytest.mark.parametrize("stop", range(5))
def test_killed_anywhere_and_started_again(alone, tmp_path, nodes_at_once, stop):
    def folder(node):
        return tmp_path / f"{node.round}-{node.position}"

    def load(node):
        return mj.load_network(folder(node), LIKE) if folder(node).exists() else None

    def save(node, result):
        if node.number - 5 == stop:
            raise KeyboardInterrupt
        mj.save_network(folder(node), result)

    if stop < 4:
        with pytest.raises(KeyboardInterrupt):
            tree(nodes_at_once=nodes_at_once, load=load, save=save)
    else:
        tree(nodes_at_once=nodes_at_once, load=load, save=save)
    saved = []
    result = tree(
        nodes_at_once=nodes_at_once, load=load, save=lambda node, result: saved.append(node)
    )
    assert saved == list(result.nodes[stop:])
    assert len(SCORED) == sum(found.evaluations for found in result.results[stop:])
    assert_same(result, alone.result)


def test_a_loaded_node_that_does_not_fit_is_named(alone):
    found = alone.result.results[1]._replace(variables={"head": {"kernel": np.zeros((5, 4))}})
    with pytest.raises(mj.ParentsError, match=r"node 1 of round 1, as loaded, .* leaf head/kernel"):
        tree(nodes_at_once=1, load={alone.result.nodes[1]: found}.get)


# Pairing --------------------------------------------------------------------------------------


def matchings(rest):
    """All ways to pair all but at most one."""
    if len(rest) < 2:
        yield []
        return
    first, *others = rest
    for k, other in enumerate(others):
        for pairs in matchings(others[:k] + others[k + 1 :]):
            yield [(first, other), *pairs]
    if len(rest) % 2:
        yield from matchings(others)


@pytest.mark.parametrize("count", range(2, 8))
def test_pairs_are_the_best_of_all_matchings(count):
    rng = np.random.default_rng(count)
    for _ in range(5):
        similarity = rng.normal(size=(count, count))
        similarity += similarity.T
        pairs = match_pairs(similarity)
        best = max(sum(similarity[p] for p in m) for m in matchings(list(range(count))))
        assert sum(similarity[p] for p in pairs) == pytest.approx(best)
        assert len(set(itertools.chain(*pairs))) == 2 * (count // 2)
        assert pairs == sorted(pairs)


def test_similarity_finds_twins_whose_units_were_shuffled_and_shaken():
    images = np.zeros((4, 3, 3, 1), np.float32)
    model = build("mlp", 3, {"hidden": (12, 8), "norm": "batch"})
    network = mj.from_linen(model, {}, train=False).apply_fn
    like = jax.eval_shape(model.init, KEY, images)
    symmetries = mj.find_symmetries(network, like, images)
    rng = np.random.default_rng(0)

    def normal():
        return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), like)

    def twin(of, seed):
        shuffle = random_permutations(jax.random.key(seed), symmetries)
        shaken = jax.tree.map(lambda leaf, noise: leaf + 0.05 * noise, of, normal())
        return permute(symmetries, shuffle, shaken)

    one, two, single = normal(), normal(), normal()
    networks = [one, two, single, twin(two, 0), twin(one, 1)]
    similarity = weight_similarity(KEY, network, networks, images)
    assert match_pairs(similarity) == [(0, 4), (1, 3)]
    assert min(similarity[0, 4], similarity[1, 3]) > 0.99
    assert np.partition(similarity[np.triu_indices(5, 1)], -3)[-3] < 0.9
    unaligned = weight_similarity(
        KEY, network, networks, images, align=mj.AlignConfig(method="none")
    )
    assert max(unaligned[0, 4], unaligned[1, 3]) < 0.9
    np.testing.assert_array_equal(similarity, similarity.T)


def test_a_tree_pairs_by_similarity_anew_in_each_round():
    twins = [expert(0), expert(1), expert(2), expert(1, 7.0), expert(0, 7.0)]
    result = tree(twins, pairing="similarity", nodes_at_once=1)
    assert [node.parents for node in result.nodes[:2]] == [(0, 4), (1, 3)]
    assert len(result.nodes) == 4
    assert known(result.variables) == [0, 1, 2]

    asked = []

    def first_and_last(networks):
        asked.append(len(networks))
        return np.eye(len(networks))[::-1]

    result = tree(pairing=first_and_last, nodes_at_once=1)
    assert asked == [5, 3, 2]
    assert [node.parents for node in result.nodes] == [(0, 4), (1, 3), (5, 2), (7, 6)]


def test_a_pairing_that_is_no_similarity_is_named():
    for returned, message in (
        (np.ones(5), r"hierarchy.pairing returned shape \(5,\) for 5 networks"),
        (np.full((5, 5), np.nan), "a square of finite numbers is needed"),
    ):
        with pytest.raises(mj.ConfigError, match=message):
            tree(pairing=lambda networks, returned=returned: returned)
    with pytest.raises(mj.ConfigError, match=r"hierarchy.pairing is 'random': choose one of order"):
        mj.HierarchyConfig(pairing="random")


# How many at once -----------------------------------------------------------------------------


def test_auto_takes_as_many_nodes_as_fit_and_one_where_networks_are_scored_in_turn(monkeypatch):
    side_by_side, in_turn = (
        hierarchy.prepare(apply_fn, EXPERTS[:2], DATA, fitness=fitness, evolution=SMALL)
        for fitness in (SIDE_BY_SIDE, IN_TURN)
    )
    monkeypatch.setattr(hierarchy, "footprint", lambda *_: 1000)

    def at_once(setup, limit, choice="auto"):
        device = SimpleNamespace(memory_stats=lambda: limit and {"bytes_limit": limit})
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
        return hierarchy._at_once(choice, setup, EXPERTS[0], 4)

    assert at_once(in_turn, None) == 1
    assert at_once(side_by_side, None) == 4
    assert at_once(side_by_side, 3 * 2 * 6 * 1000) == 3  # half of the memory, six networks a node
    assert at_once(side_by_side, 10) == 1
    assert at_once(side_by_side, 10, choice=2) == 2


def test_a_round_is_cut_evenly():
    nodes = plan(16)[0]
    sizes = {size: [len(g) for g in hierarchy._groups(nodes, size)] for size in (1, 3, 5, 8, 99)}
    assert sizes == {1: [1] * 8, 3: [3, 3, 2], 5: [4, 4], 8: [8], 99: [8]}


# A network with everything ----------------------------------------------------------------------


@pytest.mark.slow
def test_aligned_and_recalibrated_convolutions_in_company_and_alone():
    images = np.random.default_rng(0).normal(size=(24, 6, 6, 1)).astype(np.float32)
    labels = np.arange(24) % 3
    model = build("cnn", 3, {"width": 4})
    networks = [model.init(jax.random.key(k), images) for k in range(4)]
    alone, together = (
        merge_tree(
            KEY,
            mj.from_linen(model, {}, train=False).apply_fn,
            networks,
            (images, labels),
            hierarchy=mj.HierarchyConfig(nodes_at_once=nodes_at_once),
            calibration=images,
            align=mj.AlignConfig(method="activations"),
            recalibrate=mj.RecalibrateConfig(enabled=True, examples=16),
            evolution=mj.EvolutionConfig(population_size=6, generations=3),
        )
        for nodes_at_once in ("auto", 2)
    )
    assert_same(together, alone)
    assert alone.fitness > alone.parent_fitness.max()
