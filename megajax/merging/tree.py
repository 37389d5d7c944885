"""Many parents merged by a tree: two by two, round after round, until one network is left.

Knows which networks meet (`plan`, `match_pairs`) and what each meeting may cost (`share_budget`);
the meetings themselves are merges of two, `megajax.merging.merge`. It touches no file: `load` and `save`
are the caller's, and with them a tree that was stopped goes on node by node.

    round 1   (0 1) (2 3) (4 5) (6 7)      networks are numbered: parents first, from 0,
    round 2      (8   9)    (10  11)       then the nodes in the order in which they are made
    round 3            (12   13)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from megajax.alignment import find_symmetries, match
from megajax.config import (
    AlignConfig,
    EvolutionConfig,
    FitnessConfig,
    GenomeConfig,
    HierarchyConfig,
    RecalibrateConfig,
)
from megajax.errors import ConfigError, ParentsError
from megajax.merging.genome import Genome
from megajax.merging.merge import MergeResult, Setup, merge_many, prepare, statistics_paths
from megajax.merging.plans import Plan, footprint
from megajax.search.genetic import GAInfo, GAState
from megajax.search.racing import examples_per_generation
from megajax.trees import check_parents, leaf_paths
from megajax.types import ApplyFn, Key, PyTree

__all__ = [
    "Budget",
    "Node",
    "NodeResult",
    "TreeResult",
    "match_pairs",
    "merge_tree",
    "node_key",
    "plan",
    "share_budget",
    "weight_similarity",
]


class Node(NamedTuple):
    """A meeting of two networks.

    Attributes:
        round: from 1.
        position: in its round, from 0.
        number: of the network that it makes.
        parents: the numbers of the two networks that meet.
    """

    round: int
    position: int
    number: int
    parents: tuple[int, int]


class NodeResult(NamedTuple):
    """What a node found; plain data, made of NumPy arrays and numbers.

    Attributes:
        variables: the merged network.
        fitness: its fitness on the validation data.
        parent_fitness: `[2]`, of the two that met.
        history: one entry for the first population and one for each generation, `[1 + G]`.
        evaluations: networks scored.
        examples_scored: what that cost, as in `megajax.merging.merge.MergeResult`.
    """

    variables: PyTree
    fitness: float
    parent_fitness: np.ndarray
    history: GAInfo
    evaluations: int
    examples_scored: int


class TreeResult(NamedTuple):
    """What a tree of merges found.

    Attributes:
        variables: the network at the root.
        fitness: its fitness on the validation data.
        parent_fitness: `[N]`, of the parents on the same data, never above `fitness`; NaN for one
            that was dropped before it was scored.
        nodes: who met whom, in the order of their numbers.
        results: what each node found, in the same order.
        evaluations: networks scored in all nodes together.
        examples_scored: what that cost, as in `megajax.merging.merge.MergeResult`.
        genome: what genes mean in each node.
        plan: how a population was cut for its evaluation.
    """

    variables: PyTree
    fitness: float
    parent_fitness: np.ndarray
    nodes: tuple[Node, ...]
    results: tuple[NodeResult, ...]
    evaluations: int
    examples_scored: int
    genome: Genome
    plan: Plan


class Budget(NamedTuple):
    """Evaluations shared out among nodes.

    Attributes:
        generations: of each node, in the order of their numbers.
        evaluations: networks that each node scores.
        total: networks scored in all.
    """

    generations: tuple[int, ...]
    evaluations: tuple[int, ...]
    total: int


def plan(num_parents: int, odd: str = "carry") -> tuple[tuple[Node, ...], ...]:
    """Who meets whom when neighbours meet: 8 -> 4 -> 2 -> 1.

    Args:
        num_parents: N, at least 2.
        odd: what becomes of the last one of an odd number: `carry` makes it the last of the next
            round, `drop` leaves it out, as MeGA's reference does.

    Returns:
        The nodes, round by round: N - 1 of them, if none is dropped.

    Raises:
        ConfigError: there are fewer than two parents, or no such `odd`.

    Example:
        >>> for nodes in plan(5):
        ...     print([f"{a} {b} -> {node.number}" for node in nodes for a, b in [node.parents]])
        ['0 1 -> 5', '2 3 -> 6']
        ['5 6 -> 7']
        ['7 4 -> 8']
    """
    if num_parents < 2:
        raise ConfigError(f"num_parents is {num_parents}: a tree has at least two")
    HierarchyConfig(odd=odd)  # checks it
    rounds: list[tuple[Node, ...]] = []
    numbers, following = list(range(num_parents)), num_parents
    while len(numbers) > 1:
        nodes, numbers = _meet(len(rounds) + 1, numbers, _neighbours(len(numbers)), following, odd)
        rounds.append(nodes)
        following += len(nodes)
    return tuple(rounds)


def share_budget(
    evaluations: int, num_nodes: int, population_size: int, num_offspring: int
) -> Budget:
    """Shares evaluations out among nodes, as evenly as whole generations allow.

    The total is never above the given number, and less than one generation below it. With one node
    it is the budget of a single search, so that a tree and one search of all parents are compared
    at equal cost.

    Args:
        evaluations: networks that may be scored in all.
        num_nodes: searches.
        population_size: networks of the first population of each.
        num_offspring: networks that a generation scores.

    Returns:
        The generations of each node, those near the root having the larger share, and what they
        cost.

    Raises:
        ConfigError: the first populations alone cost more.

    Example:
        >>> share_budget(1000, 7, 20, 20)
        Budget(generations=(6, 6, 6, 6, 6, 6, 7), evaluations=(140, ..., 160), total=1000)
        >>> share_budget(1000, 1, 20, 20).total
        1000
    """
    left = evaluations - num_nodes * population_size
    if left < 0:
        raise ConfigError(
            f"evolution.evaluation_budget is {evaluations}: the first populations of {num_nodes} "
            f"nodes need {num_nodes * population_size}"
        )
    each, more = divmod(left // num_offspring, num_nodes)
    generations = tuple(each + (node >= num_nodes - more) for node in range(num_nodes))
    costs = tuple(population_size + g * num_offspring for g in generations)
    return Budget(generations, costs, sum(costs))


def node_key(key: Key, node: Node) -> Key:
    """The key of a node's search: the tree's key folded with its round and its position.

    Args:
        key: PRNG key of the tree.
        node: its place in the tree.

    Returns:
        The key with which `megajax.merging.merge.merge` does what the node does.

    Example:
        >>> key = jax.random.key(0)
        >>> keys = [node_key(key, node) for nodes in plan(4) for node in nodes]
        >>> len({tuple(jax.random.key_data(key).tolist()) for key in keys})
        3
    """
    return jax.random.fold_in(jax.random.fold_in(key, node.round), node.position)


def merge_tree(
    key: Key,
    apply_fn: ApplyFn,
    parents: Sequence[PyTree],
    validation: tuple[Any, Any],
    *,
    hierarchy: HierarchyConfig | None = None,
    calibration: Any | None = None,
    align: AlignConfig | None = None,
    recalibrate: RecalibrateConfig | None = None,
    genome: GenomeConfig | None = None,
    fitness: FitnessConfig | None = None,
    evolution: EvolutionConfig | None = None,
    labels: PyTree | None = None,
    load: Callable[[Node], NodeResult | None] | None = None,
    save: Callable[[Node, NodeResult], None] | None = None,
    callback: Callable[[Node, GAInfo], None] | None = None,
) -> TreeResult:
    """Merges N parents two by two, round after round (MeGA's hierarchical merge).

    Each node is a `megajax.merging.merge.merge` of two networks with a key of its own, see `node_key`.
    The result's fitness is at least that of every parent that was not dropped.

    Nodes of a round share one program, as many at once as the configuration says. One at a time, or
    where networks are evaluated in turn (`fitness.population_chunk` below the population), they get
    the bits that `merge` gives. Side by side on the device their fitness is that of `merge` up to
    floating point rounding, so that a search may take another course where fitnesses are close.

    Args:
        key: PRNG key; the same key gives the same result.
        apply_fn: `apply_fn(variables, inputs [b, ...]) -> logits [b, C]`, in inference mode.
        parents: N >= 2 variable pytrees of one structure.
        validation: inputs and labels, which no parent was trained on.
        hierarchy: who meets whom, and how many nodes run at once; None takes the defaults.
        calibration: as for `megajax.merging.merge.merge`, and so the rest; what they say of parents holds
            for the two of each node. `evolution.evaluation_budget` is that of the whole tree, see
            `share_budget`; `evolution.generations` is each node's, and `evolution.time_budget` that
            of the nodes that run at once.
        align: see above.
        recalibrate: see above.
        genome: see above.
        fitness: see above.
        evolution: see above.
        labels: see above.
        load: what an earlier start of the same tree saved for a node, or None. Nodes that are
            loaded are not searched again, and the final bits are the same.
        save: called with each node that was searched, as soon as it is done.
        callback: called with a node and its infos after each chunk of generations, and once before
            the first.

    Returns:
        The network at the root and how it came about.

    Raises:
        ParentsError: parents, or loaded nodes, that do not fit together or are not finite.
        DataError: validation data that is empty or has impossible labels.
        ConfigError: choices that cannot work.

    Example:
        >>> def apply_fn(kernel, x):
        ...     return x @ kernel
        >>> parents = [jnp.diag(jnp.arange(4.0) == k) * 1.0 for k in range(3)]
        >>> small = EvolutionConfig(population_size=4, evaluation_budget=24)
        >>> data = jnp.eye(4), jnp.arange(4)
        >>> result = merge_tree(jax.random.key(0), apply_fn, parents, data, evolution=small)
        >>> [node.parents for node in result.nodes], result.evaluations
        ([(0, 1), (3, 2)], 24)
        >>> bool(result.fitness > result.parent_fitness.max())
        True

    Source: Yun, "Merging Multiple Independently Trained Neural Networks Based on Genetic
    Algorithm", arXiv 2406.04607.
    """
    hierarchy, evolution = hierarchy or HierarchyConfig(), evolution or EvolutionConfig()
    check_parents(parents)
    setup = prepare(
        apply_fn,
        parents[:2],
        validation,
        calibration=calibration,
        align=align,
        recalibrate=recalibrate,
        genome=genome,
        fitness=fitness,
        evolution=evolution,
        labels=labels,
    )
    count = len(parents)
    generations = _generations(setup, sum(map(len, plan(count, hierarchy.odd))))
    networks = dict(enumerate(parents))
    numbers = list(range(count))
    nodes: list[Node] = []
    results: list[NodeResult] = []
    while len(numbers) > 1:
        round_ = nodes[-1].round + 1 if nodes else 1
        pairs = _pairs(key, round_, setup, [networks[k] for k in numbers], hierarchy.pairing)
        made, numbers = _meet(round_, numbers, pairs, count + len(nodes), hierarchy.odd)
        for group in _groups(made, _at_once(hierarchy.nodes_at_once, setup, parents[0], len(made))):
            limits = [generations[node.number - count] for node in group]
            found = _search(key, setup, group, networks, limits, load, save, callback)
            networks |= {node.number: r.variables for node, r in zip(group, found, strict=True)}
            results += found
        for number in [k for k in networks if k not in numbers]:
            del networks[number]
        nodes += made

    parent_fitness = np.full(count, np.nan, np.float32)
    for node, result in zip(nodes, results, strict=True):
        for number, value in zip(node.parents, result.parent_fitness, strict=True):
            if number < count:
                parent_fitness[number] = value
    return TreeResult(
        variables=results[-1].variables,
        fitness=results[-1].fitness,
        parent_fitness=parent_fitness,
        nodes=tuple(nodes),
        results=tuple(results),
        evaluations=sum(result.evaluations for result in results),
        examples_scored=sum(result.examples_scored for result in results),
        genome=setup.genome,
        plan=setup.plan,
    )


def weight_similarity(
    key: Key,
    apply_fn: ApplyFn,
    networks: Sequence[PyTree],
    inputs: Any,
    *,
    calibration: Any | None = None,
    align: AlignConfig | None = None,
) -> np.ndarray:
    """How alike the weights of networks are, two by two, once their hidden units are aligned.

    The search mixes aligned weights, so what lies between two networks is the better the nearer
    they are; that they predict alike says nothing of it, for well-trained networks all do.

    Args:
        key: PRNG key, for matching.
        apply_fn: the network.
        networks: n variable pytrees of one structure.
        inputs: one batch.
        calibration: training inputs, to match activations on.
        align: how units are matched; None takes the defaults.

    Returns:
        `[n, n]` float64, symmetric: the cosines of the angles between all weights of two networks,
        BatchNorm statistics apart.

    Example:
        >>> def mlp(w, x):
        ...     return jnp.tanh(x @ w["u"]) @ w["v"]
        >>> net = {"u": jnp.array([[1.0, 2.0]]), "v": jnp.array([[3.0], [4.0]])}
        >>> twin = {"u": net["u"][:, ::-1], "v": net["v"][::-1]}
        >>> other = {"u": -net["u"], "v": net["v"]}
        >>> networks = [net, twin, other]
        >>> weight_similarity(jax.random.key(0), mlp, networks, jnp.ones((1, 1))).round(2).tolist()
        [[1.0, 1.0, 0.67], [1.0, 1.0, 0.67], [0.67, 0.67, 1.0]]
    """
    align = align or AlignConfig()
    symmetries = find_symmetries(apply_fn, networks[0], inputs)
    ignore = statistics_paths(apply_fn, networks[0], inputs)
    similarity = np.eye(len(networks))
    for i, j in itertools.combinations(range(len(networks)), 2):
        pair: Sequence[PyTree] = networks[i], networks[j]
        if align.method != "none" and symmetries.groups:
            pair, _ = match(
                jax.random.fold_in(jax.random.fold_in(key, i), j),
                symmetries,
                pair,
                method=align.method,
                apply_fn=apply_fn,
                inputs=calibration,
                ignore=ignore,
            )
        similarity[i, j] = similarity[j, i] = _cosine(pair[0], pair[1], ignore)
    return similarity


def match_pairs(similarity: np.ndarray) -> list[tuple[int, int]]:
    """Pairs all but at most one, so that the similarities of the pairs have the largest sum.

    Args:
        similarity: `[n, n]`, symmetric.

    Returns:
        n // 2 pairs, in the order of their first members.

    Raises:
        ConfigError: the similarities are not a square of finite numbers.

    Example:
        >>> match_pairs(np.array([[1, 0.9, 0.8], [0.9, 1, 0.1], [0.8, 0.1, 1]]))
        [(0, 1)]
    """
    similarity = np.asarray(similarity, np.float64)
    n = len(similarity)
    if similarity.shape != (n, n) or not np.isfinite(similarity).all():
        raise ConfigError(
            f"similarities have shape {similarity.shape}: a square of finite numbers is needed"
        )
    first, second = np.triu_indices(n, 1)
    meets = np.stack([(first == k) | (second == k) for k in range(n)]).astype(float)
    chosen = milp(
        -similarity[first, second],
        integrality=np.ones(len(first)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(meets, ub=1),
            LinearConstraint(np.ones(len(first)), n // 2, n // 2),
        ],
        options={"mip_rel_gap": 0},
    ).x
    return [(int(first[k]), int(second[k])) for k in np.flatnonzero(chosen > 0.5)]


def _neighbours(count: int) -> list[tuple[int, int]]:
    return [(k, k + 1) for k in range(0, count - 1, 2)]


def _pairs(
    key: Key,
    round_: int,
    setup: Setup,
    networks: Sequence[PyTree],
    pairing: str | Callable[..., Any],
) -> list[tuple[int, int]]:
    """Who meets whom in a round, as places in the list."""
    if pairing == "order":
        return _neighbours(len(networks))
    if callable(pairing):
        similarity = np.asarray(pairing(networks))
        if similarity.shape != (len(networks), len(networks)):
            raise ConfigError(
                f"hierarchy.pairing returned shape {similarity.shape} for {len(networks)} networks"
            )
        return match_pairs(similarity)
    return match_pairs(
        weight_similarity(
            jax.random.fold_in(jax.random.fold_in(key, 0), round_),  # rounds of nodes are from 1
            setup.apply_fn,
            networks,
            setup.inputs,
            calibration=setup.calibration,
            align=setup.align,
        )
    )


def _meet(
    round_: int,
    numbers: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    following: int,
    odd: str,
) -> tuple[tuple[Node, ...], list[int]]:
    """The nodes of a round, the first of them numbered `following`, and who is in the next."""
    nodes = tuple(
        Node(round_, position, following + position, (numbers[i], numbers[j]))
        for position, (i, j) in enumerate(pairs)
    )
    met = set(itertools.chain.from_iterable(pairs))
    left = [number for k, number in enumerate(numbers) if k not in met]
    return nodes, [node.number for node in nodes] + (left if odd == "carry" else [])


def _generations(setup: Setup, num_nodes: int) -> list[int]:
    """When the search of each node stops; what `reuse_fitness` saves is not shared out again."""
    config, total = setup.evolution, setup.num_examples
    if config.evaluation_budget is None:
        return [config.generations] * num_nodes
    nodes, size = num_nodes, config.population_size
    budget = share_budget(config.evaluation_budget, nodes, size, setup.num_offspring)
    if setup.racing is not None:  # then the unit is an example
        most = examples_per_generation(setup.racing, total, setup.num_offspring)
        budget = share_budget(config.evaluation_budget * total, nodes, size * total, most)
    return [min(config.generations, share) for share in budget.generations]


def _at_once(choice: int | str, setup: Setup, one: PyTree, num_nodes: int) -> int:
    """How many nodes of a round run in one program."""
    if isinstance(choice, int):
        return choice
    population_size = setup.evolution.population_size
    if setup.plan.population_chunk < population_size:
        return 1  # nothing is won by more, and each node is saved as soon as it is done
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return num_nodes
    inputs = [x for x in (setup.inputs, setup.examples) if x is not None]
    network = max(footprint(setup.apply_fn, one, x) for x in inputs)
    fit = int(limit) // 2 // (population_size * network)  # the other half is for workspaces
    return max(1, fit)


def _groups(nodes: Sequence[Node], size: int) -> Iterator[Sequence[Node]]:
    """Cuts a round into groups of equal size, as far as can be, so that they share a program."""
    size = math.ceil(len(nodes) / math.ceil(len(nodes) / size))
    for start in range(0, len(nodes), size):
        yield nodes[start : start + size]


def _search(
    key: Key,
    setup: Setup,
    nodes: Sequence[Node],
    networks: dict[int, PyTree],
    limits: Sequence[int],
    load: Callable[[Node], NodeResult | None] | None,
    save: Callable[[Node, NodeResult], None] | None,
    callback: Callable[[Node, GAInfo], None] | None,
) -> list[NodeResult]:
    """Loads or searches nodes of one round, all that are searched in one program."""
    loaded = [load(node) if load is not None else None for node in nodes]
    for node, found in zip(nodes, loaded, strict=True):
        if found is not None:
            _check_loaded(node, found, networks[node.parents[0]])

    def observe(states: list[GAState], infos: list[GAInfo]) -> None:
        del states
        for node, found, info in zip(nodes, loaded, infos, strict=True):
            if callback is not None and found is None and len(info.generation):
                callback(node, info)

    searched: Sequence[MergeResult | None] = [None] * len(nodes)
    if any(found is None for found in loaded):
        searched = merge_many(
            [node_key(key, node) for node in nodes],
            setup,
            [[networks[k] for k in node.parents] for node in nodes],
            generations=[
                limit if found is None else None
                for limit, found in zip(limits, loaded, strict=True)
            ],
            callback=observe,
        )
    results = []
    for node, found, merged in zip(nodes, loaded, searched, strict=True):
        if found is None:
            assert merged is not None
            found = NodeResult(
                variables=jax.device_get(merged.variables),
                fitness=merged.fitness,
                parent_fitness=merged.parent_fitness,
                history=merged.history,
                evaluations=merged.evaluations,
                examples_scored=merged.examples_scored,
            )
            if save is not None:
                save(node, found)
        results.append(found)
    return results


def _check_loaded(node: Node, found: NodeResult, like: PyTree) -> None:
    try:
        check_parents([like, found.variables])
    except ParentsError as error:
        raise ParentsError(
            f"node {node.position} of round {node.round}, as loaded, does not fit: {error}"
        ) from None


def _cosine(first: PyTree, second: PyTree, ignore: set[str]) -> float:
    """The cosine of the angle between the floating point leaves of two networks."""

    def flat(network: PyTree) -> np.ndarray:
        leaves = zip(leaf_paths(network), jax.tree.leaves(network), strict=True)
        return np.concatenate(
            [
                np.asarray(leaf, np.float64).ravel()
                for path, leaf in leaves
                if path not in ignore and jnp.issubdtype(leaf.dtype, jnp.floating)
            ]
        )

    a, b = flat(first), flat(second)
    return float(a @ b / max(float(np.sqrt((a @ a) * (b @ b))), np.finfo(np.float64).tiny))
