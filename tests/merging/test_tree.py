"""The tree: who meets whom, what it may cost, and that no stop changes a bit."""

import itertools
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest

import megajax as mj
from megajax.alignment import permute, random_permutations
from megajax.merging.metrics import cross_entropy
from megajax.merging.tree import match_pairs, merge_tree, node_key, plan, weight_similarity

KEY = jax.random.key(0)


# Expert k knows class k and nothing else.


def expert(k, strength=8.0):
    return {"head": {"kernel": strength * np.diag(np.eye(5, dtype=np.float32)[k])}}


def apply_fn(variables, x):
    return x @ variables["head"]["kernel"]


EXPERTS = [expert(k) for k in range(5)]
DATA = np.eye(5, dtype=np.float32), np.arange(5)
SCORED = []


def counting(logits, labels):
    """Counts how often it is run."""
    jax.debug.callback(lambda: SCORED.append(1))
    return cross_entropy(logits, labels)


# 93 evaluations for four nodes: 2, 3, 3 and 3 generations, and three evaluations are left over.
SMALL = mj.EvolutionConfig(
    population_size=6, evaluation_budget=93, generations_per_chunk=2, crossover="uniform"
)
IN_TURN = mj.FitnessConfig(metric=counting, population_chunk=1)


def tree(parents=EXPERTS, evolution=SMALL, fitness=IN_TURN, data=DATA, **choices):
    SCORED.clear()
    hierarchy = {name: choices.pop(name) for name in ("pairing", "odd") if name in choices}
    result = merge_tree(
        KEY,
        apply_fn,
        parents,
        data,
        hierarchy=mj.HierarchyConfig(**hierarchy),
        fitness=fitness,
        evolution=evolution,
        **choices,
    )
    jax.effects_barrier()
    return result


@pytest.fixture(scope="module")
def whole():
    """The five experts merged, and what could be seen of it."""
    seen, saved = [], []
    result = tree(
        callback=lambda node, state, infos: seen.append((node, jax.device_get(state), infos)),
        save=lambda node, found: saved.append((node, found)),
    )
    return SimpleNamespace(result=result, seen=seen, saved=saved, scored=len(SCORED))


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
    with pytest.raises(mj.ConfigError, match=r"hierarchy.odd is 'keep': 'carry' or 'drop' is"):
        plan(3, "keep")
    with pytest.raises(mj.ParentsError, match="1 parent given"):
        tree(EXPERTS[:1])


# The budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "budget", "fitness", "data"),
    [
        (1, 6, None, DATA),
        (1, 40, None, DATA),
        (2, 31, None, DATA),
        (3, 18, None, DATA),
        (3, 70, None, DATA),
        (3, 40, mj.FitnessConfig(racing_examples=2, racing_finalists=0.3), DATA),
        (3, 61, None, (np.eye(5, dtype=np.float32), np.array([0, -100, 2, -100, 4]))),
        (2, 40, None, [mj.Task(*DATA, "accuracy"), mj.Task(DATA[0][:3], DATA[1][:3])]),
    ],
)
def test_a_budget_is_spent_as_far_as_whole_generations_go_and_never_exceeded(
    nodes, budget, fitness, data
):
    evolution = SMALL.replace(evaluation_budget=budget, generations=1000, crossover=None)
    result = tree(EXPERTS[: nodes + 1], evolution, fitness or mj.FitnessConfig(), data)
    tasks = [mj.Task(*data)] if isinstance(data, tuple) else data
    examples = sum(int((task.targets >= 0).sum()) for task in tasks)
    a_generation = 6 * examples
    if fitness is not None:
        a_generation = 6 * 2 + 2 * examples + examples  # a node's share is in whole networks
    spent = sum(found.examples_scored for found in result.results)
    assert result.examples_scored == spent
    assert budget * examples - a_generation < spent <= budget * examples
    if fitness is None:
        assert spent == examples * result.evaluations


def test_a_budget_without_room_for_the_first_populations_is_refused():
    evolution = SMALL.replace(evaluation_budget=23)
    message = "evolution.evaluation_budget is 23: the first populations of 4 nodes need 24"
    with pytest.raises(mj.ConfigError, match=message):
        tree(evolution=evolution)


def test_without_a_budget_each_node_has_all_generations():
    result = tree(evolution=SMALL.replace(evaluation_budget=None, generations=2))
    assert [found.evaluations for found in result.results] == [18] * 4
    assert result.evaluations == 72


# The search -----------------------------------------------------------------------------------


def known(variables):
    logits = np.asarray(apply_fn(variables, DATA[0]))
    return [k for k in range(5) if logits[k].argmax() == k and logits[k, k] > 0]


def test_the_root_knows_what_any_parent_knew(whole):
    assert [known(parent) for parent in EXPERTS] == [[0], [1], [2], [3], [4]]
    assert known(whole.result.variables) == [0, 1, 2, 3, 4]
    assert whole.result.fitness > whole.result.parent_fitness.max()
    nll = [mj.measure(np.asarray(apply_fn(parent, DATA[0])), DATA[1]).nll for parent in EXPERTS]
    np.testing.assert_allclose(whole.result.parent_fitness, -np.array(nll), rtol=1e-5)
    assert whole.result.scores == {"task_0": whole.result.fitness}
    np.testing.assert_array_equal(whole.result.parent_scores["task_0"], whole.result.parent_fitness)


def test_a_dropped_parent_leaves_nothing():
    result = tree(odd="drop")
    assert known(result.variables) == [0, 1, 2, 3]
    assert np.isnan(result.parent_fitness).tolist() == [False] * 4 + [True]
    assert [node.parents for node in result.nodes] == [(0, 1), (2, 3), (5, 6)]
    assert result.evaluations == 3 * 6 + 12 * 6
    assert len(SCORED) == result.evaluations + 2 * 3  # and the two that meet in each node


def test_what_a_tree_costs_is_what_was_scored(whole):
    assert whole.result.evaluations == 90
    assert whole.scored == 90 + 2 * 4
    assert [found.evaluations for found in whole.result.results] == [18, 24, 24, 24]
    lengths = [len(found.history.generation) for found in whole.result.results]
    assert lengths == [3, 4, 4, 4]
    assert whole.result.num_genes == 5
    assert whole.result.layout.population_chunk == 1


def test_results_tell_the_tree(whole):
    result = whole.result
    assert result.nodes == tuple(itertools.chain(*plan(5)))
    assert [node for node, _ in whole.saved] == list(result.nodes)
    chex.assert_trees_all_equal([found for _, found in whole.saved], list(result.results))
    fitness = dict(enumerate(result.parent_fitness))
    for node, found in zip(result.nodes, result.results, strict=True):
        met = [fitness[number] for number in node.parents]
        np.testing.assert_allclose(found.parent_fitness, met, rtol=1e-6)
        assert found.history.best_ever[-1] == np.float32(found.fitness)
        assert found.fitness >= max(met) - 1e-6
        fitness[node.number] = found.fitness
        infos = [info for of, _, info in whole.seen if of == node]
        chex.assert_trees_all_equal(
            jax.tree.map(lambda *leaves: np.concatenate(leaves), *infos), found.history
        )
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found.variables))


def test_a_node_is_a_merge_with_its_own_key(whole):
    node, found = whole.result.nodes[2], whole.result.results[2]
    assert node.parents == (5, 6)
    merged = mj.merge(
        node_key(KEY, node),
        apply_fn,
        [result.variables for result in whole.result.results[:2]],
        DATA,
        fitness=IN_TURN,
        evolution=SMALL.replace(evaluation_budget=None, generations=3),
    )
    chex.assert_trees_all_equal(jax.device_get(merged.variables), found.variables)
    chex.assert_trees_all_equal(merged.history, found.history)


def test_a_callback_ends_its_node_and_no_other():
    result = tree(callback=lambda node, state, infos: node.number in (5, 7))
    lengths = [len(found.history.generation) for found in result.results]
    assert lengths[0] == lengths[2] == 1
    assert lengths[1] > 1  # what the first did not spend is shared out
    assert lengths[3] > lengths[1]
    assert 87 < result.evaluations <= 93


def assert_same(first, second):
    assert first.nodes == second.nodes
    chex.assert_trees_all_equal(first.variables, second.variables)
    chex.assert_trees_all_equal(first.results, second.results)
    assert first.fitness == second.fitness
    np.testing.assert_array_equal(first.parent_fitness, second.parent_fitness)


# Stopping and going on ------------------------------------------------------------------------


@pytest.mark.parametrize("stop", range(5))
def test_killed_anywhere_and_started_again(whole, stop):
    shelf = {}

    def save(node, found):
        if node.number - 5 == stop:
            raise KeyboardInterrupt
        shelf[node] = found

    if stop < 4:
        with pytest.raises(KeyboardInterrupt):
            tree(load=shelf.get, save=save)
    else:
        tree(load=shelf.get, save=save)
    saved = []
    result = tree(load=shelf.get, save=lambda node, found: saved.append(node))
    assert saved == list(result.nodes[stop:])
    scored = sum(found.evaluations for found in result.results[stop:])
    assert len(SCORED) == scored + 2 * len(saved)
    assert_same(result, whole.result)
    assert (result.layout is None) is (stop == 4)  # all were loaded


@pytest.mark.parametrize("node", [0, 2])
@pytest.mark.parametrize("generation", [0, 2])
def test_started_again_within_a_node(whole, node, generation):
    """The nodes before were saved, and the search of this one had got so far."""
    done = dict(whole.saved[:node])
    reached = whole.result.nodes[node]
    states = {int(state.generation): state for of, state, _ in whole.seen if of == reached}

    def resume(of):
        return states[generation] if of == reached else None

    result = tree(load=done.get, resume=resume)
    found, expected = result.results[node], whole.result.results[node]
    chex.assert_trees_all_equal(found.variables, expected.variables)
    assert (
        found.history.generation.tolist() == expected.history.generation[generation + 1 :].tolist()
    )
    assert found.evaluations == expected.evaluations
    whole_again = found._replace(history=expected.history)
    results = [*result.results[:node], whole_again, *result.results[node + 1 :]]
    assert_same(result._replace(results=tuple(results)), whole.result)
    left = sum(one.evaluations for one in whole.result.results[node:]) - 6 * (1 + generation)
    assert len(SCORED) == left + 2 * (4 - node)


def test_a_loaded_node_that_does_not_fit_is_named(whole):
    found = whole.result.results[1]._replace(variables={"head": {"kernel": np.zeros((5, 4))}})
    with pytest.raises(mj.ParentsError, match=r"node 1 of round 1, as loaded, .* leaf head/kernel"):
        tree(load={whole.result.nodes[1]: found}.get)


def test_what_cannot_be_merged_is_named_before_anything_runs():
    with pytest.raises(mj.ParentsError, match=r"leaf head/kernel: float32\[5,5\] in parent 0 but"):
        tree([*EXPERTS[:2], {"head": {"kernel": np.zeros((5, 4), np.float32)}}])
    with pytest.raises(mj.DataError, match="the inputs are 0"):
        tree(data=(DATA[0][:0], DATA[1][:0]))
    assert not SCORED


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


def perceptron(w, x):
    x = jax.nn.relu(x @ w["a"])
    x = (x - w["mean"]) * jax.lax.rsqrt(w["var"] + 1e-5)
    return jax.nn.relu(x @ w["b"]) @ w["c"]


def test_similarity_finds_twins_whose_units_were_shuffled_and_shaken():
    inputs = np.zeros((4, 9), np.float32)
    shapes = {"a": (9, 12), "mean": (12,), "var": (12,), "b": (12, 8), "c": (8, 3)}
    rng = np.random.default_rng(0)

    def normal():
        tree = {name: rng.normal(size=size).astype(np.float32) for name, size in shapes.items()}
        return tree | {"var": tree["var"] ** 2}

    symmetries = mj.find_symmetries(perceptron, normal(), inputs)

    def twin(of, seed):
        shuffle = random_permutations(jax.random.key(seed), symmetries)
        shaken = jax.tree.map(lambda leaf, noise: leaf + 0.05 * noise, of, normal())
        return permute(symmetries, shuffle, shaken) | {"mean": 100 * normal()["mean"]}

    one, two, single = normal(), normal(), normal()
    networks = [one, two, single, twin(two, 0), twin(one, 1)]
    similarity = weight_similarity(KEY, perceptron, networks, inputs)
    assert match_pairs(similarity) == [(0, 4), (1, 3)]
    assert min(similarity[0, 4], similarity[1, 3]) > 0.99
    assert np.partition(similarity[np.triu_indices(5, 1)], -3)[-3] < 0.9
    unaligned = weight_similarity(
        KEY, perceptron, networks, inputs, config=mj.AlignConfig(method="none")
    )
    assert max(unaligned[0, 4], unaligned[1, 3]) < 0.9
    np.testing.assert_array_equal(similarity, similarity.T)


def test_a_tree_pairs_by_similarity_anew_in_each_round():
    twins = [expert(0), expert(1), expert(2), expert(1, 7.0), expert(0, 7.0)]
    result = tree(twins, pairing="similarity")
    assert [node.parents for node in result.nodes[:2]] == [(0, 4), (1, 3)]
    assert len(result.nodes) == 4
    assert known(result.variables) == [0, 1, 2]

    asked = []

    def first_and_last(networks):
        asked.append(len(networks))
        return np.eye(len(networks))[::-1]

    result = tree(pairing=first_and_last)
    assert asked == [5, 3, 2]
    assert [node.parents for node in result.nodes] == [(0, 4), (1, 3), (5, 2), (7, 6)]


def test_a_pairing_that_is_no_similarity_is_named():
    for returned, message in (
        (np.ones(5), r"hierarchy.pairing returned shape \(5,\) for 5 networks"),
        (np.full((5, 5), np.nan), "a square of finite numbers is needed"),
    ):
        with pytest.raises(mj.ConfigError, match=message):
            tree(pairing=lambda networks, returned=returned: returned)
    with pytest.raises(mj.ConfigError, match=r"hierarchy.pairing is 'random': 'order' or 'simil"):
        mj.HierarchyConfig(pairing="random")


# A network with everything ----------------------------------------------------------------------


@pytest.mark.slow
def test_aligned_and_recalibrated_convolutions():
    from megajax.zoo.networks import build

    model = build("cnn", 3, {"width": 4})

    def network(variables, x):
        return model.apply(variables, x, train=False)

    images = np.random.default_rng(0).normal(size=(24, 6, 6, 1)).astype(np.float32)
    networks = [model.init(jax.random.key(k), images) for k in range(4)]
    result = merge_tree(
        KEY,
        network,
        networks,
        (images, np.arange(24) % 3),
        calibration=images,
        align=mj.AlignConfig(method="activations"),
        recalibrate=mj.RecalibrateConfig(enabled=True, examples=16),
        evolution=mj.EvolutionConfig(population_size=6, generations=3),
    )
    assert result.fitness > result.parent_fitness.max()
