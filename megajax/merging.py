"""The main job: parents and validation data in, one merged network out.

`merge` wires genome, fitness, operators and evolution as the configuration sections say; it writes
no file and prints nothing. Whoever wants other wiring calls the pieces: this module is short.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megajax import operators
from megajax.alignment import Alignment, find_symmetries, verify
from megajax.alignment import align as match
from megajax.config import (
    AlignConfig,
    EvolutionConfig,
    FitnessConfig,
    GenomeConfig,
    RecalibrateConfig,
)
from megajax.errors import ConfigError, DataError
from megajax.evolution import (
    GAInfo,
    GAState,
    GeneticAlgorithm,
    describe,
    genetic_algorithm,
    run,
)
from megajax.fitness import METRICS, Evaluate, auto_chunk, batches, evaluator
from megajax.genome import Genome, masks
from megajax.layers import find_layers
from megajax.normalization import find_statistics, recalibrated
from megajax.parents import check_parents, keep_leaves, leaf_owners, leaf_paths, stack_parents
from megajax.types import ApplyFn, Key, PyTree

__all__ = ["MergeResult", "algorithm_for", "align_parents", "check_labels", "genome_for", "merge"]

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
        parent_fitness: `[K]`, of the parents on the same data; never above `fitness`.
        genes: the merged network's genes.
        history: one entry for the first population and one for each generation, NumPy `[1 + G]`.
        evaluations: networks scored in all.
        genome: what the genes mean.
        parents: the K parents as they were mixed, hidden units aligned.
        state: the search's last state, from which it can go on.
        population_chunk: networks that were evaluated side by side.
    """

    variables: PyTree
    fitness: float
    parent_fitness: np.ndarray
    genes: jax.Array
    history: GAInfo
    evaluations: int
    genome: Genome
    parents: list[PyTree]
    state: GAState
    population_chunk: int


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
    keep: Mapping[str, int] | None = None,
    callback: Callable[[GAState, GAInfo], bool | None] | None = None,
) -> MergeResult:
    """Merges networks of one architecture by a genetic algorithm over mixing masks (MeGA).

    The parents are in the first population, and the best individual is never lost: the result's
    fitness is at least the best parent's. On other data it may not be; keep a test set aside.

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
        labels: the user's own genes instead of `genome.granularity`; see `megajax.genome.masks`.
        keep: regular expression for leaf paths -> number of the parent that those leaves come from,
            unmixed; the other parents may have other shapes there (another number of classes). The
            network that stands for a parent in the search, and in `parent_fitness`, has the kept
            leaves too.
        callback: called with the state and the infos after each chunk of generations, and once
            before the first; a true result stops the search.

    Returns:
        The merged network and how it was found.

    Raises:
        ParentsError: parents that do not fit together or are not finite.
        DataError: validation data that is empty or has impossible labels.
        ConfigError: choices that cannot work.

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
    Algorithm", arXiv 2406.04607. The search over masks is megajax's own.
    """
    align, recalibrate = align or AlignConfig(), recalibrate or RecalibrateConfig()
    genome, fitness = genome or GenomeConfig(), fitness or FitnessConfig()
    evolution = evolution or EvolutionConfig()
    align_key, genes_key, init_key, run_key = jax.random.split(key, 4)

    keep = keep or {}
    parents = keep_leaves(parents, keep)
    check_parents(parents)
    one = parents[0]
    data = batches(*validation, fitness.batch_size)
    batch = data.images[0]
    check_labels(validation[1], jax.eval_shape(apply_fn, one, batch).shape[-1])

    if calibration is None and (recalibrate.enabled or align.method in ("activations", "both")):
        raise DataError("calibration inputs are missing: align or recalibrate needs them")

    kept = leaf_owners(leaf_paths(one), keep, len(parents))
    aligned, _ = align_parents(align_key, apply_fn, parents, batch, calibration, align, ignore=kept)
    aligned = keep_leaves(aligned, keep)  # as their own parent's hidden units are aligned
    stacked = stack_parents(aligned)
    masked = genome_for(apply_fn, stacked, batch, genome, labels=labels, freeze=tuple(keep))
    context = stacked
    if recalibrate.enabled:
        masked = recalibrated(masked, apply_fn)
        context = (stacked, jnp.asarray(calibration)[: recalibrate.examples])
    chunk = fitness.population_chunk
    if isinstance(chunk, str):
        chunk = auto_chunk(apply_fn, one, batch, evolution.population_size)
    metric = METRICS[fitness.metric] if isinstance(fitness.metric, str) else fitness.metric
    evaluate = evaluator(masked.express, apply_fn, metric, context, data, population_chunk=chunk)
    algorithm = algorithm_for(masked, evaluate, evolution, binary=genome.binary)

    genes = jax.jit(masked.init, static_argnums=1)(genes_key, evolution.population_size)
    state = algorithm.init(init_key, genes)
    first = jax.device_get(jax.tree.map(lambda leaf: leaf[None], describe(state)))
    parent_fitness = np.asarray(state.population.fitness[: len(parents)])
    history = [first]
    if not (callback is not None and callback(state, first)):
        state, infos = run(
            run_key,
            algorithm,
            state,
            evolution.generations,
            generations_per_chunk=evolution.generations_per_chunk,
            patience=evolution.patience,
            time_budget=evolution.time_budget,
            evaluation_budget=evolution.evaluation_budget,
            callback=callback,
        )
        history.append(infos)
    return MergeResult(
        variables=jax.jit(masked.express)(state.best.genes, context),
        fitness=float(state.best.fitness),
        parent_fitness=parent_fitness,
        genes=state.best.genes,
        history=jax.tree.map(lambda *leaves: np.concatenate(leaves), *history),
        evaluations=int(state.evaluations),
        genome=masked,
        parents=aligned,
        state=state,
        population_chunk=chunk,
    )


def align_parents(
    key: Key,
    apply_fn: ApplyFn,
    parents: Sequence[PyTree],
    inputs: Any,
    calibration: Any | None = None,
    config: AlignConfig | None = None,
    ignore: Collection[str] = (),
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
        ignore: paths of leaves that move along and do not count, besides BatchNorm statistics.

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
    if config.method == "none":
        return list(parents), None
    symmetries = find_symmetries(apply_fn, parents[0], inputs)
    if not symmetries.groups:
        return list(parents), None
    verify_key, align_key = jax.random.split(key)
    verify(verify_key, symmetries, apply_fn, parents[0], inputs)
    paths = leaf_paths(parents[0])
    statistics = find_statistics(apply_fn, parents[0], inputs)
    return match(
        align_key,
        symmetries,
        parents,
        method=config.method,
        reference=config.reference,
        apply_fn=apply_fn,
        inputs=calibration,
        ignore={paths[i] for s in statistics for i in (s.mean, s.variance)} | set(ignore),
    )


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
        config: granularity, kind and what is frozen.
        labels: the user's own genes instead of the granularity.
        freeze: patterns of leaves that are frozen besides `config.freeze`.

    Returns:
        A genome of masks.

    Raises:
        ConfigError: choices that cannot work.

    Example:
        >>> parents = jax.ShapeDtypeStruct((2, 4, 3), "float32")
        >>> genome_for(lambda w, x: x @ w, parents, np.ones((1, 4)), GenomeConfig()).num_genes
        3
    """
    layers = None
    if labels is None and config.granularity in ("layer", "channel"):
        one = jax.eval_shape(lambda parents: jax.tree.map(lambda leaf: leaf[0], parents), parents)
        layers = find_layers(apply_fn, one, inputs)
    return masks(
        parents,
        granularity=config.granularity,
        layers=layers,
        labels=labels,
        freeze=[*freeze] if config.freeze is None else [config.freeze, *freeze],
        binary=config.binary,
    )


def algorithm_for(
    genome: Genome, evaluate: Evaluate, config: EvolutionConfig, *, binary: bool = False
) -> GeneticAlgorithm:
    """The genetic algorithm that a configuration section describes, for a genome.

    Args:
        genome: whose genes vary.
        evaluate: `evaluate(genes [M, ...]) -> (fitness [M], aux)`.
        config: names of operators, or functions in their place.
        binary: the genes pick parents, so that `mutation=None` means `reset`.

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
            "gaussian": partial(
                operators.gaussian, rate=rate, scale=config.mutation_scale, gene_ndim=ndim
            ),
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
    )


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
