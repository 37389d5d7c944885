"""The genetic algorithm: `init`, `step`, and `run`, which scans steps on the device.

Knows genes, fitness and operators; nothing of networks, masks or files. State is what must be
carried to go on, Info is what a generation has to tell. `init_many` and `run_many` do several
searches in one program; `run` is the case of one.

Example:
    >>> def evaluate(genes):
    ...     return -jnp.sum((genes - 0.3) ** 2, axis=-1), ()
    >>> ga = genetic_algorithm(evaluate, num_offspring=64)
    >>> key, genes = jax.random.key(0), jax.random.uniform(jax.random.key(1), (64, 5))
    >>> state, history = run(key, ga, ga.init(key, genes), 100)
    >>> bool(jnp.abs(state.best.genes - 0.3).max() < 0.05)
    True
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from megajax.errors import SearchError
from megajax.merging.fitness import Evaluate
from megajax.search import operators
from megajax.search.operators import Crossover, Mutation, Population, Selection, Survival
from megajax.search.racing import (
    Racing,
    Scoring,
    evaluated,
    examples_per_generation,
    examples_scored,
    score_offspring,
)
from megajax.types import Genes, Key, PyTree

__all__ = [
    "GAInfo",
    "GAState",
    "GeneticAlgorithm",
    "best_ever",
    "check_alive",
    "describe",
    "evaluated",
    "genetic_algorithm",
    "init_many",
    "rescored",
    "run",
    "run_many",
]


class GAState(NamedTuple):
    """What the search needs to go on.

    Attributes:
        population: P individuals with their fitness.
        best: the best individual ever seen, without a population axis.
        generation: generations done, int32.
        evaluations: networks scored so far, int32.
        stale: generations since the best last improved, int32.
        completed: of the networks scored, those that were scored on all examples, int32; all of
            them unless children race.
    """

    population: Population
    best: Population
    generation: jax.Array
    evaluations: jax.Array
    stale: jax.Array
    completed: jax.Array


class GAInfo(NamedTuple):
    """What a generation has to tell; float32 unless stated. Statistics are over finite fitnesses.

    Attributes:
        generation: its number, from 1; 0 is the first population. int32.
        evaluations: networks scored up to and including it, int32.
        best_ever: best fitness seen so far.
        best: best fitness in the population.
        median: median fitness in the population.
        mean: mean fitness in the population.
        std: standard deviation of the fitness in the population.
        worst: worst fitness in the population.
        diversity: standard deviation of a gene over the population, mean over the genes.
        invalid: offspring whose fitness was not a finite number, int32; of those that lost a race
            it is not known.
        completed: networks scored on all examples up to and including it, int32.
        valid: offspring whose fitness is a finite number, int32.
    """

    generation: jax.Array
    evaluations: jax.Array
    best_ever: jax.Array
    best: jax.Array
    median: jax.Array
    mean: jax.Array
    std: jax.Array
    worst: jax.Array
    diversity: jax.Array
    invalid: jax.Array
    completed: jax.Array
    valid: jax.Array


class GeneticAlgorithm(NamedTuple):
    """A pair of pure functions. Both are pytrees too, if the evaluation is one (see `evaluator`).

    Attributes:
        init: `init(key, genes) -> state` scores the first population.
        step: `step(key, state) -> (state, info)` makes one generation.
        num_offspring: networks that a step makes, and scores unless it need not.
        racing: how the offspring race, or None: what a step costs depends on it.
    """

    init: Callable[[Key, Genes], GAState]
    step: Callable[[Key, GAState], tuple[GAState, GAInfo]]
    num_offspring: int
    racing: Racing | None = None


def genetic_algorithm(
    evaluate: Evaluate,
    *,
    num_offspring: int,
    select: Selection = operators.tournament,
    cross: Crossover = operators.uniform,
    mutate: Mutation = operators.gaussian,
    repair: Callable[[Genes], Genes] = lambda genes: genes,
    survive: Survival = operators.plus,
    scoring: Scoring | None = None,
) -> GeneticAlgorithm:
    """Composes a genetic algorithm from its operators.

    A generation: select two parents for each child, cross, mutate, repair, evaluate the children
    (and nobody else), and let survivors be chosen. Fitness that is not finite counts as -inf.

    Args:
        evaluate: `evaluate(genes [M, ...]) -> (fitness [M], aux)`, maximised. Large arrays that it
            needs should be leaves of a `jax.tree_util.Partial`, not closed over.
        num_offspring: children M of a generation. With `generational` survival and a population of
            P, there are P - M elites.
        select: see `megajax.search.operators`, as the three below.
        cross: crossover.
        mutate: mutation.
        repair: puts genes back into the search space.
        survive: survival.
        scoring: which of the children are scored, and on how many examples (see `megajax.search.racing`);
            None is all of them, on all.

    Returns:
        The algorithm.

    Example:
        >>> ga = genetic_algorithm(lambda genes: (genes.sum(-1), ()), num_offspring=8)
        >>> state = ga.init(jax.random.key(0), jnp.eye(8))
        >>> state, info = ga.step(jax.random.key(1), state)
        >>> int(info.evaluations)
        16
    """
    scored = evaluate if isinstance(evaluate, Partial) else Partial(evaluate)
    scoring = scoring or Scoring()
    vary = _Variation(select, cross, mutate, repair, survive)
    return GeneticAlgorithm(
        Partial(_init, scored),
        Partial(partial(_step, vary, scoring, num_offspring), scored),
        num_offspring,
        scoring.racing,
    )


def rescored(algorithm: GeneticAlgorithm, evaluate: Evaluate) -> GeneticAlgorithm:
    """The same algorithm with another evaluation.

    Args:
        algorithm: from `genetic_algorithm`.
        evaluate: a `jax.tree_util.Partial`. If it has the function of the former evaluation and
            other arrays, both algorithms share their compiled programs.

    Returns:
        The algorithm.

    Example:
        >>> def evaluate(target, genes):
        ...     return -jnp.abs(genes - target).sum(-1), ()
        >>> near_0 = genetic_algorithm(Partial(evaluate, jnp.zeros(2)), num_offspring=2)
        >>> near_1 = rescored(near_0, Partial(evaluate, jnp.ones(2)))
        >>> float(near_1.init(jax.random.key(0), jnp.array([[0.0, 0], [1, 1]])).best.genes[0])
        1.0
    """
    old: Any = algorithm
    return algorithm._replace(
        init=Partial(old.init.func, evaluate), step=Partial(old.step.func, evaluate)
    )


def run(
    key: Key,
    algorithm: GeneticAlgorithm,
    state: GAState,
    generations: int,
    *,
    generations_per_chunk: int = 10,
    patience: int | None = None,
    time_budget: float | None = None,
    evaluation_budget: int | None = None,
    callback: Callable[[GAState, GAInfo], bool | None] | None = None,
) -> tuple[GAState, GAInfo]:
    """Runs until a number of generations is done, or a limit is reached.

    Generation g uses `fold_in(key, g)`, so a search continued from a saved state goes on exactly as
    it would have. Generations run as one `lax.scan` on the device, `generations_per_chunk` at a
    time; only between chunks does the host look at them. One program serves chunks of any length.

    Args:
        key: PRNG key of the whole search.
        algorithm: from `genetic_algorithm`.
        state: from its `init`, or a later one.
        generations: stop when `state.generation` gets there.
        generations_per_chunk: generations between two looks of the host.
        patience: stop at the end of a chunk when so many generations brought no better best.
        time_budget: stop at the end of a chunk when so many seconds have passed in this call.
        evaluation_budget: do no generation that could score more networks in all than this. Where
            children race, it counts passes over all examples, so that a network that was scored on
            a tenth of them is a tenth of a network. What `reuse` saves is there to be spent.
        callback: called after each chunk with the state and the chunk's infos (NumPy, leaves
            `[generations]`); a true result stops.

    Returns:
        The last state, and the infos of all generations that this call did (NumPy, leaves `[G]`).

    Raises:
        SearchError: none of the offspring of a generation has a finite fitness. The callback has
            seen the state by then.

    Example:
        >>> ga = genetic_algorithm(lambda genes: (genes.sum(-1), ()), num_offspring=8)
        >>> key = jax.random.key(0)
        >>> state, infos = run(key, ga, ga.init(key, jnp.eye(8)), 9, evaluation_budget=30)
        >>> infos.evaluations.tolist()
        [16, 24]
    """
    (state,), (infos,) = run_many(
        [key],
        [algorithm],
        [state],
        [generations],
        generations_per_chunk=generations_per_chunk,
        patience=patience,
        time_budget=time_budget,
        evaluation_budget=evaluation_budget,
        callback=callback and (lambda states, infos: callback(states[0], infos[0])),
    )
    return state, infos


def init_many(
    keys: Sequence[Key],
    algorithms: Sequence[GeneticAlgorithm],
    genes: Sequence[Genes],
    *,
    side_by_side: bool = False,
    skip: Sequence[bool] | None = None,
) -> list[GAState]:
    """Scores the first populations of n independent searches in one program.

    Args:
        keys: n PRNG keys.
        algorithms: n algorithms that differ in their arrays only; see `rescored`. Arrays that they
            have in common (the very same object in all) are passed, and kept, once.
        genes: n first populations.
        side_by_side: `vmap` over the searches; otherwise `lax.map`, one after the other, which
            gives each of them the bits that it has alone.
        skip: searches that are not to be done: their place in the program is kept, so that the
            others run in the same program, but nothing is scored in it.

    Returns:
        n states; those skipped hold zeros.

    Example:
        >>> ga = genetic_algorithm(lambda genes: (genes.sum(-1), ()), num_offspring=2)
        >>> keys = list(jax.random.split(jax.random.key(0)))
        >>> [float(s.best.fitness) for s in init_many(keys, [ga, ga], [jnp.eye(2), 2 * jnp.eye(2)])]
        [1.0, 2.0]
    """
    common, own = _split([algorithm.init for algorithm in algorithms])
    wanted = jax.device_put([np.bool_(not s) for s in skip or [False] * len(keys)])
    states: list[GAState] = _init_all(common, own, list(keys), list(genes), wanted, side_by_side)
    return states


def run_many(
    keys: Sequence[Key],
    algorithms: Sequence[GeneticAlgorithm],
    states: Sequence[GAState],
    generations: Sequence[int],
    *,
    side_by_side: bool = False,
    generations_per_chunk: int = 10,
    patience: int | None = None,
    time_budget: float | None = None,
    evaluation_budget: int | None = None,
    callback: Callable[[list[GAState], list[GAInfo]], bool | None] | None = None,
) -> tuple[list[GAState], list[GAInfo]]:
    """Runs n independent searches in one program, each as `run` would.

    Args:
        keys: n PRNG keys.
        algorithms: as for `init_many`.
        states: n states.
        generations: for each search, the generation to stop at.
        side_by_side: as for `init_many`. Side by side, floating point may be summed in another
            order than alone, and a search may take another course where fitnesses are close.
        generations_per_chunk: as for `run`, as the rest.
        patience: each search's own.
        time_budget: of all searches together.
        evaluation_budget: each search's own.
        callback: called with all states and each search's infos of the chunk, which are empty for
            searches that have ended.

    Returns:
        The last states and the infos of all generations that this call did, for each search.

    Example:
        >>> ga = genetic_algorithm(lambda genes: (genes.sum(-1), ()), num_offspring=8)
        >>> keys = list(jax.random.split(jax.random.key(0)))
        >>> states = init_many(keys, [ga, ga], [jnp.eye(8), jnp.eye(8)])
        >>> _, infos = run_many(keys, [ga, ga], states, [2, 3])
        >>> [info.generation.tolist() for info in infos]
        [[1, 2], [1, 2, 3]]
    """
    started = time.monotonic()
    steps = [algorithm.step for algorithm in algorithms]
    common, own = _split(steps)
    now = list(states)
    done, stale, left = _counters(algorithms, now, evaluation_budget)
    history: list[list[GAInfo]] = [[] for _ in steps]
    while True:
        goals = np.minimum(generations, done + left)
        going = done < goals
        if patience is not None:
            going &= stale < patience
        if not going.any():
            break
        if time_budget is not None and time.monotonic() - started >= time_budget:
            break
        last = np.where(going, goals, done).astype(np.int32)
        now, infos = _run_chunk(
            common,
            own,
            list(keys),
            now,
            jax.device_put(list(last)),
            generations_per_chunk,
            side_by_side,
        )
        counts = np.minimum(generations_per_chunk, last - done)
        infos = [
            jax.tree.map(lambda leaf, count=count: leaf[:count], of_one)
            for of_one, count in zip(jax.device_get(infos), counts, strict=True)
        ]
        for of_one, chunks in zip(infos, history, strict=True):
            chunks.append(of_one)
        done, stale, left = _counters(algorithms, now, evaluation_budget)
        stop = callback is not None and callback(now, infos)
        for of_one, algorithm in zip(infos, algorithms, strict=True):
            check_alive(of_one, algorithm.num_offspring)
        if stop:
            break
    if not all(history):
        info = jax.eval_shape(steps[0], keys[0], now[0])[1]
        nothing = jax.tree.map(lambda leaf: np.zeros(0, leaf.dtype), info)
        history = [chunks or [nothing] for chunks in history]
    joined = [jax.tree.map(lambda *leaves: np.concatenate(leaves), *chunks) for chunks in history]
    return now, joined


def check_alive(infos: GAInfo, scored: int) -> None:
    """Checks that every generation had a network with a finite fitness.

    Args:
        infos: of some generations, NumPy, leaves `[G]`.
        scored: networks that each of them scored.

    Raises:
        SearchError: one had none; names the generation.

    Example:
        >>> ga = genetic_algorithm(lambda genes: (genes.sum(-1), ()), num_offspring=2)
        >>> info = describe(ga.init(jax.random.key(0), jnp.full((2, 1), jnp.nan)))
        >>> check_alive(jax.tree.map(lambda leaf: np.array([leaf]), info), 2)
        Traceback (most recent call last):
        ...
        megajax.errors.SearchError: generation 0: none of the 2 networks has a finite fitness; check
        fitness.metric and evolution.mutation_scale
    """
    dead = infos.generation[infos.valid == 0]
    if len(dead):
        raise SearchError(
            f"generation {dead[0]}: none of the {scored} networks has a finite fitness; check "
            "fitness.metric and evolution.mutation_scale"
        )


def describe(
    state: GAState, invalid: jax.Array | int | None = None, valid: jax.Array | int | None = None
) -> GAInfo:
    """The figures of a state, as `step` reports them.

    Args:
        state: any state.
        invalid: how many of the last individuals scored had no finite fitness; None counts the
            population's, as is right for a first one.
        valid: how many of them have one; likewise.

    Returns:
        The infos, scalars.

    Example:
        >>> ga = genetic_algorithm(lambda genes: (genes.sum(-1), ()), num_offspring=2)
        >>> float(describe(ga.init(jax.random.key(0), jnp.array([[1.0], [3.0]]))).mean)
        2.0
    """
    fitness = state.population.fitness
    finite = jnp.isfinite(fitness)
    if invalid is None:
        invalid = jnp.sum(~finite)
    if valid is None:
        valid = jnp.sum(finite)
    known = jnp.where(finite, fitness, jnp.nan)
    spread = [_std(leaf).mean() for leaf in jax.tree.leaves(state.population.genes)]
    sizes = [leaf[0].size for leaf in jax.tree.leaves(state.population.genes)]
    return GAInfo(
        generation=state.generation,
        evaluations=state.evaluations,
        best_ever=state.best.fitness,
        best=jnp.nanmax(known),
        median=jnp.nanmedian(known),
        mean=jnp.nanmean(known),
        std=jnp.nanstd(known),
        worst=jnp.nanmin(known),
        diversity=jnp.average(jnp.stack(spread), weights=jnp.array(sizes, jnp.float32)),
        invalid=jnp.asarray(invalid, jnp.int32),
        completed=state.completed,
        valid=jnp.asarray(valid, jnp.int32),
    )


def _std(genes: jax.Array) -> jax.Array:
    """Standard deviation over the population.

    XLA on a CPU reduces a leading axis number by number, far apart in memory; here whole
    individuals are added, two by two. Moments are about the first, lest digits cancel.
    """

    def mean(x: jax.Array) -> jax.Array:
        size, odd = len(x), jnp.zeros_like(x[0])
        while len(x) > 1:
            half = len(x) // 2
            if len(x) % 2:
                odd += x[-1]
            x = x[:half] + x[half : 2 * half]
        return (x[0] + odd) / size

    wide = genes.astype(jnp.promote_types(genes.dtype, jnp.float32))
    from_first = wide - wide[:1]
    return jnp.sqrt(jnp.maximum(mean(from_first**2) - mean(from_first) ** 2, 0))


def best_ever(offspring: Population, best: Population) -> tuple[Population, jax.Array]:
    """The best individual ever seen, after a generation.

    Args:
        offspring: of the generation.
        best: the best one before, without a population axis.

    Returns:
        The best one, the earlier of equals, and whether it is new.

    Example:
        >>> offspring = Population(jnp.array([3.0, 5.0]), jnp.array([0.1, 0.9]))
        >>> best, improved = best_ever(offspring, Population(jnp.array(7.0), jnp.array(0.5)))
        >>> float(best.genes), bool(improved)
        (5.0, True)
    """
    child: Population = operators.take(offspring, jnp.argmax(offspring.fitness))
    improved = child.fitness > best.fitness
    kept: Population = jax.tree.map(lambda new, old: jnp.where(improved, new, old), child, best)
    return kept, improved


class _Variation(NamedTuple):
    select: Selection
    cross: Crossover
    mutate: Mutation
    repair: Callable[[Genes], Genes]
    survive: Survival


@jax.jit
def _init(evaluate: Evaluate, key: Key, genes: Genes) -> GAState:
    del key  # the first population is given; part of the signature for algorithms that draw it
    population = evaluated(evaluate, genes)
    zero = jnp.zeros((), jnp.int32)
    best: Population = operators.take(population, jnp.argmax(population.fitness))
    count = jnp.full_like(zero, population.fitness.size)
    return GAState(population, best, zero, count, zero, count)


def _step(
    vary: _Variation,
    scoring: Scoring,
    num_offspring: int,
    evaluate: Evaluate,
    key: Key,
    state: GAState,
) -> tuple[GAState, GAInfo]:
    select_key, cross_key, mutate_key, survive_key, *sample_key = jax.random.split(
        key, 4 if scoring.racing is None else 5
    )
    population = state.population
    pairs = vary.select(select_key, population.fitness, 2 * num_offspring)
    first, second = (operators.take(population.genes, half) for half in jnp.split(pairs, 2))
    genes = vary.repair(vary.mutate(mutate_key, vary.cross(cross_key, first, second)))
    scored = score_offspring(scoring, next(iter(sample_key), None), evaluate, genes, population)
    offspring = scored.offspring
    population = vary.survive(survive_key, population, offspring)

    best, improved = best_ever(offspring, state.best)
    state = GAState(
        population,
        best,
        state.generation + 1,
        state.evaluations + scored.evaluations,
        jnp.where(improved, 0, state.stale + 1),
        state.completed + scored.completed,
    )
    valid = jnp.sum(jnp.isfinite(offspring.fitness))
    return state, describe(state, scored.invalid, valid)


@partial(jax.jit, static_argnames="side_by_side")
def _init_all(
    common: PyTree,
    own: list[PyTree],
    keys: list[Key],
    genes: list[Genes],
    wanted: list[jax.Array],
    side_by_side: bool,
) -> list[GAState]:
    def one(own: PyTree, key: Key, genes: Genes, wanted: jax.Array) -> Any:
        init = _joined(common, own)
        return jax.lax.cond(wanted, init, lambda *_: _blank(init, key, genes), key, genes)

    return _map_lists(one, side_by_side, own, keys, genes, wanted)


@partial(jax.jit, static_argnames=("length", "side_by_side"))
def _run_chunk(
    common: PyTree,
    own: list[PyTree],
    keys: list[Key],
    states: list[GAState],
    last: list[jax.Array],
    length: int,
    side_by_side: bool,
) -> tuple[list[GAState], list[GAInfo]]:
    """`length` generations of each search; those after its `last` are skipped and leave zeros."""

    def one(own: PyTree, key: Key, state: GAState, last: jax.Array) -> Any:
        step = _joined(common, own)

        def generation(state: GAState, _: None) -> Any:
            return jax.lax.cond(
                state.generation < last,
                lambda state: step(jax.random.fold_in(key, state.generation), state),
                lambda state: (state, _blank(step, key, state)[1]),
                state,
            )

        return jax.lax.scan(generation, state, None, length)

    done = _map_lists(one, side_by_side, own, keys, states, last)
    return [state for state, _ in done], [infos for _, infos in done]


def _blank(function: Any, *arguments: Any) -> Any:
    shapes = jax.eval_shape(function, *arguments)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _map_lists(function: Any, side_by_side: bool, *lists: list[PyTree]) -> list[Any]:
    """`[function(*elements) for elements in zip(*lists)]`, traced once."""
    elements = list(zip(*lists, strict=True))
    if len(elements) == 1:
        return [function(*elements[0])]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *elements)
    mapped = (
        jax.vmap(function)(*stacked)
        if side_by_side
        else jax.lax.map(lambda element: function(*element), stacked)
    )
    return [jax.tree.map(lambda leaf, i=i: leaf[i], mapped) for i in range(len(elements))]


def _split(trees: Sequence[PyTree]) -> tuple[PyTree, list[PyTree]]:
    """The leaves that all trees have in common, and the others of each; None in their places."""
    shared = jax.tree.map(lambda *leaves: all(leaf is leaves[0] for leaf in leaves), *trees)
    common = jax.tree.map(lambda same, leaf: leaf if same else None, shared, trees[0])
    own = [jax.tree.map(lambda same, leaf: None if same else leaf, shared, tree) for tree in trees]
    return common, own


def _joined(common: PyTree, own: PyTree) -> PyTree:
    def either(mine: Any, ours: Any) -> Any:
        return ours if mine is None else mine

    return jax.tree.map(either, own, common, is_leaf=lambda leaf: leaf is None)


def _counters(
    algorithms: Sequence[GeneticAlgorithm], states: Sequence[GAState], budget: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each search: generations done, those without a better best, and those it can afford."""
    counters = [(s.generation, s.stale, s.evaluations, s.completed) for s in states]
    done, stale, evaluations, completed = np.asarray(jax.device_get(counters)).T
    left = np.full(len(states), np.iinfo(np.int32).max, np.int64)
    if budget is not None:
        for i, (algorithm, state) in enumerate(zip(algorithms, states, strict=True)):
            racing, size = algorithm.racing, state.population.fitness.size
            total = 1 if racing is None else racing.total
            spent = examples_scored(racing, total, size, evaluations[i], completed[i])
            most = examples_per_generation(racing, total, algorithm.num_offspring)
            left[i] = max(budget * total - spent, 0) // most
    return done, stale, left
