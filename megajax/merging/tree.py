"""Many parents merged by a tree: two by two, round after round, until one network is left.

Knows which networks meet (`plan`, `match_pairs`); the meetings themselves are merges of two. It
touches no file: `load`, `resume` and `save` are the caller's, and with them a tree that was stopped
goes on where it was.

    round 1   (0 1) (2 3) (4 5) (6 7)      networks are numbered: parents first, from 0,
    round 2      (8   9)    (10  11)       then the nodes in the order in which they are made
    round 3            (12   13)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from megajax.alignment import AlignConfig
from megajax.alignment.workflow import align_checked, as_align
from megajax.entry import check_inputs
from megajax.errors import ConfigError, ParentsError
from megajax.keys import as_key
from megajax.merging.devices import Layout
from megajax.merging.merge import MergeResult, merge
from megajax.merging.problem import FitnessConfig, relative
from megajax.merging.tasks import Task, as_tasks, examples_in
from megajax.program.roles import find_statistics
from megajax.search.loop import Info, State
from megajax.search.methods import EvolutionConfig
from megajax.sections import Section
from megajax.trees import check_parents, cosine, is_mixable, keep_leaves, leaf_owners, leaf_paths
from megajax.types import ApplyFn, Key, PyTree

__all__ = [
    "HierarchyConfig",
    "Node",
    "NodeResult",
    "TreeResult",
    "match_pairs",
    "merge_tree",
    "node_key",
    "plan",
    "weight_similarity",
]


class HierarchyConfig(Section):
    """Merging many parents two by two, round after round, instead of all of them in one search.

    Each node of the tree is a merge of two networks as the other sections describe it.
    `evolution.generations` is each node's, and `evolution.evaluation_budget` that of the whole
    tree, shared out among its nodes, so that a tree and one search can be compared at equal cost.

    Attributes:
        enabled: merge by a tree.
        pairing: who merges with whom: `order` (neighbours, as given), `similarity` (those whose
            aligned weights are most alike, chosen anew in each round), or a function
            `(networks) -> similarities [n, n]` in its place.
        odd: what happens to the network left over in a round with an odd number of them: `carry` it
            to the next round, or `drop` it, as MeGA's reference does.
    """

    section = "hierarchy"
    enabled: bool = False
    pairing: Literal["order", "similarity"] | Callable[..., Any] = "order"
    odd: Literal["carry", "drop"] = "carry"


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
        examples_scored: what that cost, as in `megajax.MergeResult`.
        scores: the score on each task by name, of the merged network.
        parent_scores: likewise `[2]`, of the two that met.
        metrics: the metric of each task by name.
    """

    variables: PyTree
    fitness: float
    parent_fitness: np.ndarray
    history: Info
    evaluations: int
    examples_scored: int
    scores: dict[str, float]
    parent_scores: dict[str, np.ndarray]
    metrics: dict[str, str]


class TreeResult(NamedTuple):
    """What a tree of merges found.

    Attributes:
        variables: the network at the root.
        fitness: its fitness on the validation data; for several tasks in units of the best parent's
            scores, in those of the best of all parents, while a node's is in those of its own two.
        parent_fitness: `[N]`, of the parents on the same data, never above `fitness` where that is
            not in their units; NaN for one that was dropped before it was scored.
        scores: the score on each task by name, of the network at the root.
        parent_scores: likewise `[N]`, of the parents.
        metrics: the metric of each task by name.
        nodes: who met whom, in the order of their numbers.
        results: what each node found, in the same order.
        evaluations: networks scored in all nodes together.
        examples_scored: what that cost, as in `megajax.MergeResult`.
        num_genes: genes of an individual in each node.
        layout: how a population was cut for its evaluation; None if all nodes were loaded.
    """

    variables: PyTree
    fitness: float
    parent_fitness: np.ndarray
    scores: dict[str, float]
    parent_scores: dict[str, np.ndarray]
    metrics: dict[str, str]
    nodes: tuple[Node, ...]
    results: tuple[NodeResult, ...]
    evaluations: int
    examples_scored: int
    num_genes: int | None
    layout: Layout | None

    def __repr__(self) -> str:
        of_parents = ", ".join(f"{value:.4g}" for value in self.parent_fitness)
        return (
            f"TreeResult(fitness={self.fitness:.4g}, parent_fitness=[{of_parents}], "
            f"metrics={self.metrics}, nodes={len(self.nodes)}, evaluations={self.evaluations})"
        )


def plan(num_parents: int, odd: Literal["carry", "drop"] = "carry") -> tuple[tuple[Node, ...], ...]:
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


def node_key(key: Key, node: Node) -> Key:
    """The key of a node's search: the tree's key folded with its round and its position.

    Args:
        key: PRNG key of the tree.
        node: its place in the tree.

    Returns:
        The key with which `megajax.merge` does what the node does.

    Example:
        >>> key = jax.random.key(0)
        >>> keys = [node_key(key, node) for nodes in plan(4) for node in nodes]
        >>> len({tuple(jax.random.key_data(key).tolist()) for key in keys})
        3
    """
    return jax.random.fold_in(jax.random.fold_in(key, node.round), node.position)


def merge_tree(
    key: Key | int,
    apply_fn: ApplyFn,
    parents: Sequence[PyTree],
    data: Any,
    *,
    hierarchy: HierarchyConfig | None = None,
    evolution: EvolutionConfig | None = None,
    load: Callable[[Node], NodeResult | None] | None = None,
    resume: Callable[[Node], State | None] | None = None,
    save: Callable[[Node, NodeResult], None] | None = None,
    callback: Callable[[Node, State, Info], bool | None] | None = None,
    **options: Any,
) -> TreeResult:
    """Merges N parents two by two, round after round (MeGA's hierarchical merge).

    Each node is a `megajax.merge` of two networks with a key of its own, see `node_key`; they share
    one compiled program. The result's fitness is at least that of every parent that was not
    dropped; several tasks are weighed anew in each node, unless `fitness.combine` is `raw`.

    Args:
        key: PRNG key, or a whole number; the same one gives the same result.
        apply_fn: `apply_fn(variables, inputs) -> outputs`, in inference mode.
        parents: N >= 2 variable pytrees of one structure.
        data: validation data, as for `megajax.merge`.
        hierarchy: who meets whom; None takes the defaults.
        evolution: the search of each node. Its `evaluation_budget` is that of the whole tree: each
            node gets an equal share of what is left, so that the nodes near the root have what
            others did not spend.
        load: what an earlier start of the same tree saved for a node, or None. Nodes that are
            loaded are not searched again, and the final bits are the same.
        resume: where an earlier start got to within a node, or None.
        save: called with each node that was searched, as soon as it is done.
        callback: called with a node, its state and its infos as in `megajax.merge`; a true result
            ends that node's search.
        **options: the other arguments of `megajax.merge`, for each node. What they say of parents
            holds for the two that meet.

    Returns:
        The network at the root and how it came about.

    Raises:
        ParentsError: parents, or loaded nodes, that do not fit together or are not finite.
        DataError: see `megajax.merge`.
        ConfigError: choices that cannot work.

    Example:
        >>> parents = [np.diag(np.float32(row)) for row in np.eye(4) + 0.1]
        >>> small = EvolutionConfig(population_size=6, generations=1)
        >>> data = np.eye(4, dtype=np.float32), np.arange(4)
        >>> result = merge_tree(jax.random.key(0), lambda w, x: x @ w, parents, data,
        ...                     evolution=small)
        >>> [node.parents for node in result.nodes], result.evaluations
        ([(0, 1), (2, 3), (4, 5)], 36)

    Source: Yun, "MeGA: Merging Multiple Independently Trained Neural Networks Based on Genetic
    Algorithm", arXiv 2406.04607.
    """
    key = as_key(key)
    hierarchy, evolution = hierarchy or HierarchyConfig(), evolution or EvolutionConfig()
    keep = options.get("keep") or {}
    check_parents(keep_leaves(parents, keep) if keep else parents)
    tasks = as_tasks(data)
    for task in tasks:
        check_inputs(task.inputs, "inputs")
    num_examples = examples_in(tasks)
    count = len(parents)
    left = sum(map(len, plan(count, hierarchy.odd)))
    budget = evolution.evaluation_budget
    first = left * evolution.population_size
    evolution.require(
        budget is None or budget >= first,
        "evaluation_budget",
        f"the first populations of {left} nodes need {first}",
    )
    networks, numbers = dict(enumerate(parents)), list(range(count))
    nodes: list[Node] = []
    results: list[NodeResult] = []
    merged: MergeResult | None = None
    while len(numbers) > 1:
        round_ = nodes[-1].round + 1 if nodes else 1
        here = [networks[k] for k in numbers]
        pairs = _pairs(key, round_, apply_fn, here, tasks, hierarchy.pairing, options)
        made, numbers = _meet(round_, numbers, pairs, count + len(nodes), hierarchy.odd)
        for node in made:
            found = load(node) if load is not None else None
            pair = [networks[k] for k in node.parents]
            if found is not None:
                _check_loaded(node, found, keep_leaves(pair, keep)[0])
            else:
                spent = sum(result.examples_scored for result in results)
                merged = merge(
                    node_key(key, node),
                    apply_fn,
                    pair,
                    data,
                    evolution=_share(evolution, num_examples, spent, left),
                    state=resume(node) if resume is not None else None,
                    callback=callback and partial(callback, node),
                    **options,
                )
                found = _plain(merged)
                if save is not None:
                    save(node, found)
            left -= 1
            results.append(found)
            networks[node.number] = found.variables
        networks = {k: networks[k] for k in numbers}
        nodes += made

    root = results[-1]

    def of_parents(of_nodes: Iterable[np.ndarray]) -> np.ndarray:
        found = np.full(count, np.nan, np.float32)
        for node, values in zip(nodes, of_nodes, strict=True):
            for number, value in zip(node.parents, values, strict=True):
                if number < count:
                    found[number] = value
        return found

    scores = {
        name: of_parents(result.parent_scores[name] for result in results) for name in root.scores
    }
    fitness, parent_fitness = root.fitness, of_parents(result.parent_fitness for result in results)
    config = options.get("fitness") or FitnessConfig()
    if len(tasks) > 1 and config.combine == "relative":
        fitness, *of_each = _relative_fitness(tasks, root.scores, scores)
        parent_fitness = np.array(of_each, np.float32)
    return TreeResult(
        variables=root.variables,
        fitness=fitness,
        parent_fitness=parent_fitness,
        scores=root.scores,
        parent_scores=scores,
        metrics=root.metrics,
        nodes=tuple(nodes),
        results=tuple(results),
        evaluations=sum(result.evaluations for result in results),
        examples_scored=sum(result.examples_scored for result in results),
        num_genes=None if merged is None else merged.genome.num_genes,
        layout=None if merged is None else merged.problem.layout,
    )


def weight_similarity(
    key: Key,
    apply_fn: ApplyFn,
    networks: Sequence[PyTree],
    inputs: PyTree,
    *,
    calibration: PyTree | None = None,
    config: AlignConfig | str | None = None,
    keep: Mapping[str, int] | None = None,
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
        config: how units are matched; None takes the defaults.
        keep: leaves that one of two networks has for both, as for `megajax.merge`.

    Returns:
        `[n, n]` float64, symmetric: the cosines of the angles between all weights of two networks,
        BatchNorm statistics and kept leaves apart.

    Example:
        >>> def apply_fn(w, x):
        ...     return jax.numpy.tanh(x @ w["u"]) @ w["v"]
        >>> net = {"u": np.array([[1.0, 2.0]]), "v": np.array([[3.0], [4.0]])}
        >>> swapped = {"u": net["u"][:, ::-1], "v": net["v"][::-1]}
        >>> key, x = jax.random.key(0), np.ones((4, 1), np.float32)
        >>> weight_similarity(key, apply_fn, [net, swapped], x).round(2).tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    statistics = find_statistics(apply_fn, networks[0], inputs)
    ignore = {index for one in statistics for index in (one.mean, one.variance)}
    paths = leaf_paths(networks[0])
    ignore |= {paths.index(path) for path in leaf_owners(paths, keep or {}, 2)}
    leaves = enumerate(jax.tree.leaves(networks[0]))
    places = [i for i, leaf in leaves if i not in ignore and is_mixable(leaf)]
    config, similarity = as_align(config or AlignConfig()), np.eye(len(networks))
    for i, j in itertools.combinations(range(len(networks)), 2):
        own_key = jax.random.fold_in(jax.random.fold_in(key, i), j)
        pair = [networks[i], networks[j]]
        aligned, _ = align_checked(
            own_key, apply_fn, pair, inputs, calibration=calibration, config=config, keep=keep
        )
        similarity[i, j] = similarity[j, i] = cosine(aligned, places)
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
    from scipy.optimize import Bounds, LinearConstraint, milp

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


def _pairs(
    key: Key,
    round_: int,
    apply_fn: ApplyFn,
    networks: Sequence[PyTree],
    tasks: Sequence[Task],
    pairing: str | Callable[..., Any],
    options: Mapping[str, Any],
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
    own_key = jax.random.fold_in(jax.random.fold_in(key, 0), round_)  # rounds of nodes are from 1
    inputs = jax.tree.map(lambda leaf: np.asarray(leaf)[:8], tasks[0].inputs)
    similarity = weight_similarity(
        own_key,
        apply_fn,
        networks,
        inputs,
        calibration=options.get("calibration"),
        config=options.get("align"),
        keep=options.get("keep"),
    )
    return match_pairs(similarity)


def _share(
    evolution: EvolutionConfig, num_examples: int, spent: int, nodes_left: int
) -> EvolutionConfig:
    """A node's share of what is left of the tree's budget."""
    if evolution.evaluation_budget is None:
        return evolution
    left = evolution.evaluation_budget * num_examples - spent
    return evolution.replace(evaluation_budget=left // (nodes_left * num_examples))


def _relative_fitness(
    tasks: Sequence[Task], root: Mapping[str, float], parents: Mapping[str, np.ndarray]
) -> list[float]:
    """The fitness of the root and of each parent, in units of the best of all parents."""
    scores = np.array([[root[name], *parents[name]] for name in root])
    best = np.where(np.isfinite(scores), scores, -np.inf)[:, 1:].max(axis=1)
    weights = np.array([task.weight for task in tasks])
    found: list[float] = (weights / weights.sum() @ relative(scores.T, best).T).tolist()
    return found


def _plain(merged: MergeResult) -> NodeResult:
    found = NodeResult(*(getattr(merged, name) for name in NodeResult._fields))
    return found._replace(variables=jax.device_get(merged.variables))


def _check_loaded(node: Node, found: NodeResult, like: PyTree) -> None:
    try:
        check_parents([like, found.variables])
    except ParentsError as error:
        raise ParentsError(
            f"node {node.position} of round {node.round}, as loaded, does not fit: {error}"
        ) from None
