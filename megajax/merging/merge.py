"""The main job: parents and validation data in, one merged network out.

`merge` wires genome, fitness, operators and evolution as the configuration sections say; it writes
no file and prints nothing. Whoever wants other wiring calls the pieces: this module is short.
`prepare` does the wiring, `merge_many` searches for several groups of parents in one program, and
`merge` is the case of one group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from megajax.alignment import Alignment, find_symmetries, match, unit_labels, verify
from megajax.config import (
    AlignConfig,
    EvolutionConfig,
    FitnessConfig,
    GenomeConfig,
    RecalibrateConfig,
)
from megajax.errors import ConfigError, DataError
from megajax.merging.devices import POPULATION, place
from megajax.merging.fitness import METRICS, Batches, Evaluate, batches, evaluator
from megajax.merging.genome import Genome, masks, recalibrated, weights
from megajax.merging.plans import Plan, check_memory, free_memory, plan_evaluation, predict_memory
from megajax.merging.shares import parent_shares, projected_shares
from megajax.program.folding import for_backend
from megajax.program.prefix import features_size, own_leaves
from megajax.program.roles import find_layers, find_statistics
from megajax.search import operators
from megajax.search.genetic import (
    GAInfo,
    GAState,
    GeneticAlgorithm,
    check_alive,
    describe,
    genetic_algorithm,
    init_many,
    rescored,
    run_many,
)
from megajax.search.racing import Racing, Scoring, examples_scored, on_sample
from megajax.trees import (
    check_parents,
    keep_leaves,
    leaf_owners,
    leaf_paths,
    num_parents,
    one_of,
    stack_parents,
    stacked_shapes,
)
from megajax.types import ApplyFn, Genes, Key, PyTree

__all__ = [
    "MergeResult",
    "Setup",
    "algorithm_for",
    "align_parents",
    "check_labels",
    "genome_for",
    "merge",
    "merge_many",
    "prepare",
    "shares_of",
    "statistics_paths",
]

_SELECTIONS = {
    "tournament": operators.tournament,
    "roulette": operators.roulette,
    "rank": operators.rank,
}
_CROSSOVERS: dict[str, Callable[..., Any]] = {
    "arithmetic": operators.arithmetic,
    "arithmetic_per_gene": partial(operators.arithmetic, per_gene=True),
    "uniform": operators.uniform,
    "one_point": operators.one_point,
    "two_point": operators.two_point,
    "blx_alpha": operators.blx_alpha,
}
_SURVIVALS = {"plus": operators.plus, "generational": operators.generational}


class MergeResult(NamedTuple):
    """What a merge found.

    Attributes:
        variables: the merged network, a pytree like each parent.
        fitness: its fitness on the validation data.
        parent_fitness: `[K]`, of the parents on the same data; never above `fitness` as long as the
            parents are in the first population (`genome.parents_first`).
        genes: the merged network's genes.
        history: one entry for the first population and one for each generation, NumPy `[1 + G]`;
            for a search that went on from a state, the generations after it.
        evaluations: networks scored in all, a child once, however many examples it was scored on.
        examples_scored: what that cost: passes of a validation example through a network. Without
            racing, `evaluations` times the examples. Passes of calibration examples
            (`recalibrate.examples` before each scoring of a network) come on top.
        genome: what the genes mean.
        parents: the K parents as they were mixed, hidden units aligned.
        state: the search's last state, from which it can go on.
        plan: how the population was cut for its evaluation.
    """

    variables: PyTree
    fitness: float
    parent_fitness: np.ndarray
    genes: jax.Array
    history: GAInfo
    evaluations: int
    examples_scored: int
    genome: Genome
    parents: list[PyTree]
    state: GAState
    plan: Plan


def merge(
    key: Key,
    apply_fn: ApplyFn,
    parents: Sequence[PyTree],
    validation: tuple[Any, Any],
    *,
    calibration: Any | None = None,
    align: AlignConfig | None = None,
    recalibrate: RecalibrateConfig | None = None,
    genome: GenomeConfig | None = None,
    fitness: FitnessConfig | None = None,
    evolution: EvolutionConfig | None = None,
    labels: PyTree | None = None,
    state: GAState | None = None,
    keep: Mapping[str, int] | None = None,
    callback: Callable[[GAState, GAInfo], bool | None] | None = None,
) -> MergeResult:
    """Merges networks of one architecture by a genetic algorithm, over mixing masks or weights.

    The parents are in the first population (unless `genome.parents_first` is off), and the best
    individual is never lost: the result's fitness is at least the best parent's. On other data it
    may not be; keep a test set aside.

    Args:
        key: PRNG key; the same key gives the same result.
        apply_fn: `apply_fn(variables, inputs [b, ...]) -> logits [b, C]`, in inference mode.
        parents: K >= 2 variable pytrees of one structure.
        validation: inputs `[N, ...]` and labels `[N]`, which no parent was trained on.
        calibration: training inputs `[n, ...]`, without labels: what activations are matched and
            statistics measured on. Needed only where `align` or `recalibrate` ask for it.
        align: how hidden units are brought into correspondence; None takes the defaults, here as
            below.
        recalibrate: whether BatchNorm statistics are measured anew for every candidate.
        genome: what a gene is.
        fitness: how an individual is scored.
        evolution: the search.
        labels: the user's own genes instead of `genome.granularity`, for masks; see
            `megajax.merging.genome.masks`.
        state: where an earlier call with the same other arguments got to; the search goes on from
            it exactly as it would have. None starts anew.
        keep: regular expression for leaf paths -> number of the parent that those leaves come from,
            unmixed; the other parents may have other shapes there (another number of classes). The
            network that stands for a parent in the search, and in `parent_fitness`, has the kept
            leaves too.
        callback: called with the state and the infos after each chunk of generations, and, for a
            search that starts anew, once before the first; a true result stops the search.

    Returns:
        The merged network and how it was found.

    Raises:
        ParentsError: parents that do not fit together or are not finite.
        DataError: validation data that is empty or has impossible labels.
        ConfigError: choices that cannot work, or a state of another search.
        SearchError: none of the networks of a generation has a finite fitness.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply_fn(variables, x):
        ...     return x @ variables["kernel"]
        >>> parents = [{"kernel": jnp.diag(jnp.array(d))} for d in ([1.0, 1, 0], [0.0, 1, 1])]
        >>> result = merge(jax.random.key(0), apply_fn, parents, (jnp.eye(3), jnp.arange(3)),
        ...                evolution=EvolutionConfig(population_size=8, generations=30))
        >>> bool(result.fitness > result.parent_fitness.max())
        True

    Source: Yun, "Merging Multiple Independently Trained Neural Networks Based on Genetic
    Algorithm", arXiv 2406.04607; `megajax.run.presets.mega_paper` is its algorithm to the letter. The
    search over masks is megajax's own.
    """
    setup = prepare(
        apply_fn,
        parents,
        validation,
        calibration=calibration,
        align=align,
        recalibrate=recalibrate,
        genome=genome,
        fitness=fitness,
        evolution=evolution,
        labels=labels,
        keep=keep,
    )
    (result,) = merge_many(
        [key],
        setup,
        [parents],
        states=None if state is None else [state],
        callback=callback and (lambda states, infos: callback(states[0], infos[0])),
    )
    assert result is not None
    return result


class Setup(NamedTuple):
    """What all merges of one network on the same data have in common: all but keys and parents.

    Attributes:
        apply_fn: the network.
        genome: what genes mean.
        algorithm: `algorithm(context)` is the search in the context of parents, leaves `[K, ...]`,
            or of parents and `examples`. All searches share their compiled programs.
        num_offspring: networks that a generation scores.
        score: `score(parents)` is the fitness `[K]` of the parents, leaves `[K, ...]`, where they
            are not in the first population; else None.
        inputs: one batch of validation inputs.
        calibration: training inputs `[n, ...]` to match activations on, or None.
        examples: training inputs to measure statistics on, or None where they are not measured.
        keep: patterns of leaves that come from one parent, and from which.
        align: how hidden units are brought into correspondence.
        evolution: population, generations and limits.
        plan: how a population is cut for its evaluation.
        num_examples: validation examples N.
        racing: how children race, or None.
    """

    apply_fn: ApplyFn
    genome: Genome
    algorithm: Callable[[PyTree], GeneticAlgorithm]
    num_offspring: int
    score: Callable[[PyTree], jax.Array] | None
    inputs: jax.Array
    calibration: Any | None
    examples: jax.Array | None
    keep: Mapping[str, int]
    align: AlignConfig
    evolution: EvolutionConfig
    plan: Plan
    num_examples: int
    racing: Racing | None


def prepare(
    apply_fn: ApplyFn,
    parents: Sequence[PyTree],
    validation: tuple[Any, Any],
    *,
    calibration: Any | None = None,
    align: AlignConfig | None = None,
    recalibrate: RecalibrateConfig | None = None,
    genome: GenomeConfig | None = None,
    fitness: FitnessConfig | None = None,
    evolution: EvolutionConfig | None = None,
    labels: PyTree | None = None,
    keep: Mapping[str, int] | None = None,
) -> Setup:
    """Wires everything that merges of one network have in common. Arguments and errors of `merge`.

    Returns:
        The setup of merges of K parents each.

    Example:
        >>> parents, data = [jnp.eye(3), -jnp.eye(3)], (jnp.eye(3), jnp.arange(3))
        >>> prepare(lambda kernel, x: x @ kernel, parents, data).genome.num_genes
        3
    """
    align, recalibrate = align or AlignConfig(), recalibrate or RecalibrateConfig()
    genome, fitness = genome or GenomeConfig(), fitness or FitnessConfig()
    evolution = evolution or EvolutionConfig()

    keep = keep or {}
    parents = keep_leaves(parents, keep)
    check_parents(parents)
    one = parents[0]
    inputs = np.asarray(validation[0])
    plan = plan_evaluation(apply_fn, one, inputs, fitness, evolution.population_size)
    data = batches(inputs, validation[1], plan.batch_size)
    batch = data.images[0]
    check_labels(validation[1], jax.eval_shape(apply_fn, one, batch).shape[-1])

    if calibration is None and (recalibrate.enabled or align.method in ("activations", "both")):
        raise DataError("calibration inputs are missing: align or recalibrate needs them")

    stacked = stacked_shapes(one, len(parents))
    masked = genome_for(apply_fn, stacked, batch, genome, labels=labels, freeze=tuple(keep))
    fast, examples = for_backend(apply_fn), None
    if recalibrate.enabled:
        masked = recalibrated(masked, fast)
        examples = jnp.asarray(calibration)[: recalibrate.examples]
    common = _check_memory(fast, one, data, masked, stacked, plan, evolution, examples)
    chunk = plan.population_chunk
    metric = METRICS[fitness.metric] if isinstance(fitness.metric, str) else fitness.metric
    mesh = plan.mesh
    score_all = partial(evaluator, population_chunk=chunk, mesh=mesh)
    evaluate: Any = score_all(masked.express, fast, metric, None, data, common=common)
    express = masked.express if examples is None else _at_a_glance(masked, fitness)
    racing = _racing(fitness, data, partial(score_all, express, fast, metric, None, common=common))
    side_by_side = chunk if mesh is None else chunk * mesh.shape[POPULATION]
    scoring = Scoring(evolution.reuse_fitness, side_by_side, racing)
    algorithm = algorithm_for(masked, evaluate, evolution, binary=genome.binary, scoring=scoring)
    score = None
    if not genome.parents_first:  # for the record only: the search does not know it
        itself = score_all(_itself, fast, metric, (), data)
        score = partial(_scores, itself)
    return Setup(
        apply_fn=apply_fn,
        genome=masked,
        algorithm=lambda context: rescored(
            algorithm, Partial(evaluate.func, place(context, mesh, split=True), evaluate.args[1])
        ),
        num_offspring=algorithm.num_offspring,
        score=score,
        inputs=batch,
        calibration=calibration,
        examples=examples,
        keep=keep,
        align=align,
        evolution=evolution,
        plan=plan,
        num_examples=len(inputs),
        racing=racing,
    )


def _racing(
    config: FitnessConfig, data: Batches, score: Callable[[Batches], Evaluate]
) -> Racing | None:
    """How children race as a configuration says; a sample's size has an evaluation of its own."""
    count, total = config.racing_examples, int(data.valid.sum())
    if count is None:
        return None
    if count > total:
        raise ConfigError(
            f"fitness.racing_examples is {count}: there are only {total} validation examples"
        )
    sample = Batches(*(leaf.reshape(-1, 1, *leaf.shape[2:])[:count] for leaf in data))
    evaluate: Any = score(sample)
    return Racing(
        partial(on_sample, evaluate.func, count, total), count, total, config.racing_finalists
    )


def _at_a_glance(genome: Genome, config: FitnessConfig) -> Callable[[Genes, Any], PyTree]:
    """A recalibrated genome's networks, on no more calibration examples than the race takes."""

    def express(genes: Genes, context: tuple[PyTree, jax.Array]) -> PyTree:
        parents, examples = context
        return genome.express(genes, (parents, examples[: config.racing_examples]))

    return express


def merge_many(
    keys: Sequence[Key],
    setup: Setup,
    groups: Sequence[Sequence[PyTree]],
    *,
    generations: Sequence[int | None] | None = None,
    states: Sequence[GAState] | None = None,
    callback: Callable[[list[GAState], list[GAInfo]], bool | None] | None = None,
) -> list[MergeResult | None]:
    """Merges n groups of K parents, each group into one network, with one program for all searches.

    Each search is the one that `merge` does with its key. Where networks are evaluated in turn
    (`setup.plan.population_chunk` below the population), so are the searches. Otherwise they run
    side by side: floating point sums may then differ in the last bits from those of a search alone,
    and a search may take another course where fitnesses are close.

    Args:
        keys: n PRNG keys.
        setup: from `prepare`.
        groups: n groups of parents.
        generations: for each group, when to stop, instead of `evolution.generations`; None is for a
            group that is not to be merged: it keeps its place in the program, so that the others
            get the bits that they would get beside it.
        states: where earlier calls with the same other arguments got to; None starts anew.
        callback: called with the states and the infos of all searches after each chunk of
            generations, and, when they start anew, once before the first; a true result stops them
            all.

    Returns:
        n results; None for a group that was not to be merged.

    Raises:
        ParentsError: parents that do not fit together or are not finite.
        ConfigError: choices that cannot work.

    Example:
        >>> parents, data = [jnp.eye(3), -jnp.eye(3)], (jnp.eye(3), jnp.arange(3))
        >>> small = EvolutionConfig(population_size=4, generations=1)
        >>> setup = prepare(lambda kernel, x: x @ kernel, parents, data, evolution=small)
        >>> keys = list(jax.random.split(jax.random.key(0)))
        >>> [bool(r.fitness > -1) for r in merge_many(keys, setup, [parents, parents[::-1]])]
        [True, True]
    """
    config, genome = setup.evolution, setup.genome
    if generations is None:
        generations = [config.generations] * len(keys)
    skip = [limit is None for limit in generations]
    align_keys, genes_keys, init_keys, run_keys = zip(
        *(jax.random.split(key, 4) for key in keys), strict=True
    )
    aligned = [
        list(parents)
        if skipped
        else align_parents(
            key,
            setup.apply_fn,
            parents,
            setup.inputs,
            setup.calibration,
            setup.align,
            keep=setup.keep,
        )[0]
        for key, parents, skipped in zip(align_keys, groups, skip, strict=True)
    ]
    stacked = [stack_parents(parents) for parents in aligned]
    examples = setup.examples
    contexts = stacked if examples is None else [(parents, examples) for parents in stacked]
    algorithms = [setup.algorithm(context) for context in contexts]
    side_by_side = setup.plan.population_chunk >= config.population_size

    init = jax.jit(genome.init, static_argnums=1)
    genes = [
        init(key, config.population_size, parents)
        for key, parents in zip(genes_keys, stacked, strict=True)
    ]
    start = init_many(init_keys, algorithms, genes, side_by_side=side_by_side, skip=skip)
    parent_fitness = [
        np.asarray(setup.score(parents) if setup.score else state.population.fitness[: len(group)])
        for state, group, parents in zip(start, groups, stacked, strict=True)
    ]
    history, stopped = [], False
    if states is None:
        first = [
            jax.tree.map(lambda leaf: np.asarray(leaf)[None], describe(state)) for state in start
        ]
        now, history = start, [first]
        stopped = bool(callback is not None and callback(now, first))
        for infos, skipped in zip(first, skip, strict=True):
            if not skipped:
                check_alive(infos, config.population_size)
    else:
        now = [_check_state(*pair) for pair in zip(states, start, strict=True)]
    if not stopped:
        now, rest = run_many(
            run_keys,
            algorithms,
            now,
            [limit or 0 for limit in generations],
            side_by_side=side_by_side,
            generations_per_chunk=config.generations_per_chunk,
            patience=config.patience,
            time_budget=config.time_budget,
            evaluation_budget=config.evaluation_budget,
            callback=callback,
        )
        history.append(rest)
    express = jax.jit(genome.express)
    return [
        None
        if skip[i]
        else MergeResult(
            variables=express(state.best.genes, contexts[i]),
            fitness=float(state.best.fitness),
            parent_fitness=parent_fitness[i],
            genes=state.best.genes,
            history=jax.tree.map(
                lambda *leaves: np.concatenate(leaves), *(part[i] for part in history)
            ),
            evaluations=int(state.evaluations),
            examples_scored=examples_scored(
                setup.racing,
                setup.num_examples,
                config.population_size,
                int(state.evaluations),
                int(state.completed),
            ),
            genome=genome,
            parents=aligned[i],
            state=state,
            plan=setup.plan,
        )
        for i, state in enumerate(now)
    ]


def _check_state(state: GAState, start: GAState) -> GAState:
    """The state on the device, if it is one of a search that starts so."""

    def kinds(state: GAState) -> dict[str, str]:
        leaves = zip(leaf_paths(state), jax.tree.leaves(state), strict=True)
        return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}

    there, here = kinds(state), kinds(start)
    for path in {**here, **there}:
        if there.get(path) != here.get(path):
            raise ConfigError(
                f"the state is of another search: {path} is {there.get(path, 'absent')} there, "
                f"{here.get(path, 'absent')} here"
            )
    placed: GAState = jax.tree.map(jnp.asarray, state)
    return placed


def align_parents(
    key: Key,
    apply_fn: ApplyFn,
    parents: Sequence[PyTree],
    inputs: Any,
    calibration: Any | None = None,
    config: AlignConfig | None = None,
    *,
    keep: Mapping[str, int] | None = None,
) -> tuple[list[PyTree], Alignment | None]:
    """Finds a network's symmetries and brings the parents' hidden units into correspondence.

    That the permuted parents are the same functions is verified on `inputs`. BatchNorm statistics
    move along and do not count.

    Args:
        key: PRNG key.
        apply_fn: the network.
        parents: K variable pytrees of one structure.
        inputs: one batch.
        calibration: training inputs, to match activations on.
        config: method and reference; None takes the defaults.
        keep: as for `merge`: leaves that all parents have from one of them. They do not count, and
            come out in the order of their own parent's hidden units.

    Returns:
        The aligned parents, and how they were permuted; with the method `none`, or for a network
        without symmetries, the parents as they are, and None.

    Raises:
        ConfigError: choices that cannot work.
        SymmetryError: a permuted network is not the same function.

    Example:
        >>> def mlp(w, x):
        ...     return jax.nn.relu(x @ w["u"]) @ w["v"]
        >>> net = {"u": jnp.array([[1.0, -1.0]]), "v": jnp.array([[1.0], [2.0]])}
        >>> swapped = {"u": net["u"][:, ::-1], "v": net["v"][::-1]}
        >>> (_, back), _ = align_parents(jax.random.key(0), mlp, [net, swapped], jnp.ones((1, 1)))
        >>> back["u"].tolist()
        [[1.0, -1.0]]
    """
    config = config or AlignConfig()
    if isinstance(config.reference, int) and config.reference >= len(parents):
        raise ConfigError(
            f"align.reference is {config.reference}: the parents are 0 to {len(parents) - 1}"
        )
    keep = keep or {}
    parents = keep_leaves(parents, keep)
    if config.method == "none":
        return parents, None
    symmetries = find_symmetries(apply_fn, parents[0], inputs)
    if not symmetries.groups:
        return parents, None
    verify_key, align_key = jax.random.split(key)
    verify(verify_key, symmetries, apply_fn, parents[0], inputs)
    kept = leaf_owners(leaf_paths(parents[0]), keep, len(parents))
    aligned, alignment = match(
        align_key,
        symmetries,
        parents,
        method=config.method,
        reference=config.reference,
        apply_fn=apply_fn,
        inputs=calibration,
        ignore=statistics_paths(apply_fn, parents[0], inputs) | set(kept),
    )
    return keep_leaves(aligned, keep), alignment


def statistics_paths(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> set[str]:
    """The paths of BatchNorm's statistics, which matching moves and does not count.

    Args:
        apply_fn: the network.
        variables: of one network.
        inputs: one batch, or its shape and dtype.

    Returns:
        Paths as in `megajax.trees.leaf_paths`.

    Example:
        >>> def apply_fn(w, x):
        ...     return (x - w["mean"]) * jax.lax.rsqrt(w["var"] + 1e-5)
        >>> sorted(statistics_paths(apply_fn, {"mean": np.zeros(1), "var": np.ones(1)}, np.ones(1)))
        ['mean', 'var']
    """
    paths = leaf_paths(variables)
    statistics = find_statistics(apply_fn, variables, inputs)
    return {paths[index] for s in statistics for index in (s.mean, s.variance)}


def genome_for(
    apply_fn: ApplyFn,
    parents: PyTree,
    inputs: Any,
    config: GenomeConfig,
    *,
    labels: PyTree | None = None,
    freeze: Sequence[str] = (),
) -> Genome:
    """The genome that a configuration section describes, for a network.

    Args:
        apply_fn: the network.
        parents: leaves `[K, ...]`, or their shapes and dtypes.
        inputs: one batch, or its shape and dtype; needed to find the layers.
        config: kind, granularity and what is frozen.
        labels: the user's own genes instead of the granularity, for masks.
        freeze: patterns of leaves that are frozen besides `config.freeze`.

    Returns:
        A genome of masks or weights.

    Raises:
        ConfigError: choices that cannot work.

    Example:
        >>> parents = jax.ShapeDtypeStruct((2, 4, 3), "float32")
        >>> genome_for(lambda w, x: x @ w, parents, np.ones((1, 4)), GenomeConfig()).num_genes
        3
    """
    one = one_of(parents)
    frozen = [*freeze] if config.freeze is None else [config.freeze, *freeze]
    if config.kind == "weights":
        if labels is not None:
            raise ConfigError("genome.kind is 'weights': labels are for masks")
        return weights(
            parents,
            statistics=find_statistics(apply_fn, one, inputs),
            freeze=frozen,
            parents_first=config.parents_first,
            relative_noise=config.relative_noise,
            noise_on_statistics=config.noise_on_statistics,
            clip_variances=config.clip_variances,
        )
    layers = None
    if labels is None and config.granularity in ("layer", "channel"):
        if config.granularity == "channel":
            labels = unit_labels(apply_fn, one, inputs)
        else:
            layers = find_layers(apply_fn, one, inputs)
    return masks(
        parents,
        granularity=config.granularity,
        layers=layers,
        labels=labels,
        freeze=frozen,
        binary=config.binary,
    )


def algorithm_for(
    genome: Genome,
    evaluate: Evaluate,
    config: EvolutionConfig,
    *,
    binary: bool = False,
    scoring: Scoring | None = None,
) -> GeneticAlgorithm:
    """The genetic algorithm that a configuration section describes, for a genome.

    Args:
        genome: whose genes vary.
        evaluate: `evaluate(genes [M, ...]) -> (fitness [M], aux)`.
        config: names of operators, or functions in their place.
        binary: the genes pick parents, so that `mutation=None` means `reset`.
        scoring: which children are scored, and on how many examples; None is all, on all.

    Returns:
        The algorithm.

    Raises:
        ConfigError: the evaluation budget does not even cover the first population.

    Example:
        >>> import jax.numpy as jnp
        >>> genome = masks({"w": jnp.zeros((2, 3))}, granularity="element")
        >>> evaluate = lambda genes: (genes[:, :, 0].mean(axis=1), ())
        >>> algorithm_for(genome, evaluate, EvolutionConfig(population_size=8)).num_offspring
        8
    """
    budget = config.evaluation_budget
    if budget is not None and budget < config.population_size:
        raise ConfigError(
            f"evolution.evaluation_budget is {budget}: the first population alone needs "
            f"{config.population_size}"
        )
    ndim = genome.gene_ndim
    rate = config.mutation_rate
    if rate is None:
        rate = max(0.01, 1 / genome.num_genes)

    select: Any = config.selection
    if isinstance(select, str):
        select = _SELECTIONS[select]
        if config.selection == "tournament":
            select = partial(select, size=config.tournament_size)

    cross: Any = config.crossover
    if isinstance(cross, (str, tuple)):
        names = (cross,) if isinstance(cross, str) else cross
        among = [partial(_CROSSOVERS[name], gene_ndim=ndim) for name in names]
        cross = among[0] if len(among) == 1 else partial(operators.choose_one, among=among)

    mutate: Any = config.mutation or ("reset" if binary else "gaussian")
    if isinstance(mutate, (str, tuple)):
        mutations = {
            "gaussian": partial(genome.noise, rate=rate, scale=config.mutation_scale),
            "reset": partial(operators.reset, rate=rate, sample=genome.sample, gene_ndim=ndim),
        }
        chosen = [mutations[name] for name in ((mutate,) if isinstance(mutate, str) else mutate)]
        mutate = partial(operators.apply_all, mutations=chosen)

    survive: Any = config.survival
    if isinstance(survive, str):
        survive = _SURVIVALS[survive]
    elites = config.elites if config.survival == "generational" else 0
    return genetic_algorithm(
        evaluate,
        num_offspring=config.population_size - elites,
        select=select,
        cross=cross,
        mutate=mutate,
        repair=genome.repair,
        survive=survive,
        scoring=scoring,
    )


def shares_of(result: MergeResult) -> dict[str, list[float]]:
    """How much of each parent there is in each module of the merged network.

    Args:
        result: of a merge.

    Returns:
        For each module K numbers that sum to one: the mean coefficients of its mask or, for a
        genome of weights, the place of its weights between the parents'.

    Example:
        >>> def apply_fn(variables, x):
        ...     return x @ variables["head"]["kernel"]
        >>> parents = [{"head": {"kernel": scale * jnp.eye(3)}} for scale in (1.0, 0.0)]
        >>> small = EvolutionConfig(population_size=4, generations=0)
        >>> data = jnp.eye(3), jnp.arange(3)
        >>> shares_of(merge(jax.random.key(0), apply_fn, parents, data, evolution=small))
        {'head': [1.0, 0.0]}
    """
    if result.genome.labels is None:
        return projected_shares(result.variables, stack_parents(result.parents))
    return parent_shares(result.genome, result.genes, result.variables)


@jax.jit
def _scores(evaluate: Evaluate, networks: PyTree) -> jax.Array:
    return evaluate(networks)[0]


def _check_memory(
    apply_fn: ApplyFn,
    one: PyTree,
    data: Batches,
    genome: Genome,
    stacked: PyTree,
    plan: Plan,
    evolution: EvolutionConfig,
    examples: jax.Array | None,
) -> bool:
    """Checks that the search fits, and says whether what frozen layers give is to be kept too."""
    size, free = evolution.population_size, free_memory()
    first = one_of(
        jax.eval_shape(
            lambda key, parents: genome.init(key, size, parents), jax.random.key(0), stacked
        )
    )
    memory = predict_memory(
        apply_fn,
        one,
        jax.eval_shape(lambda images: images.reshape(-1, *images.shape[2:]), data.images),
        first,
        num_parents=num_parents(stacked),
        batch_size=plan.batch_size,
        calibration=examples,
    )
    kept = 0
    if examples is None:  # recalibrated networks differ in every leaf
        own = own_leaves(genome.express, first, stacked)
        kept = features_size(apply_fn, one, data.images, own)
    common = kept > 0 and (free is None or kept <= free // 4)
    if common:
        memory = memory._replace(fixed=memory.fixed + kept)
    share = size if plan.mesh is None else -(-size // plan.mesh.shape[POPULATION])
    check_memory(memory, size, min(plan.population_chunk, share), free)
    return common


def _itself(variables: PyTree, context: PyTree) -> PyTree:
    del context
    return variables


def check_labels(labels: Any, num_classes: int) -> None:
    """Checks that labels are class numbers of a network's logits.

    Args:
        labels: `[N]`.
        num_classes: C, the length of the logits.

    Raises:
        DataError: labels are not integers, or one lies outside [0, C).

    Example:
        >>> check_labels([0, 3], 3)
        Traceback (most recent call last):
        ...
        megajax.errors.DataError: labels run from 0 to 3, but the network has 3 classes (0 to 2)
    """
    array = np.asarray(labels)
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"labels are {array.dtype}: whole numbers are needed")
    if array.min() < 0 or array.max() >= num_classes:
        raise DataError(
            f"labels run from {array.min()} to {array.max()}, but the network has {num_classes} "
            f"classes (0 to {num_classes - 1})"
        )
