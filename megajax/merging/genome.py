"""Genomes: what a gene is, and how the genes of one individual become a network.

    masks          coefficients over the parents, `[P, G, K]`: one array for a population
    task_vectors   coefficients of what training did to a common base
    weights        the networks' own weights, leaf by leaf `[P, ...]`, as in MeGA

A genome is a frozen dataclass of pure functions: hashable, and equal to others with the same
choices. Knows networks' programs as far as genes follow from them; nothing of data or searches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Protocol

import jax

from megajax.alignment.units import unit_labels
from megajax.errors import ConfigError, first_line
from megajax.merging.masks import GRANULARITIES, Masks, masks, mixed_leaves
from megajax.merging.task_vectors import TaskVectors
from megajax.merging.weights import Weights
from megajax.program.roles import find_layers, find_statistics
from megajax.search.genetic import Space
from megajax.sections import Pattern, Section, at_least, between, one_of
from megajax.trees import Static, described, leaves_by_path
from megajax.types import ApplyFn, Genes, PyTree

__all__ = ["GENOMES", "Genome", "GenomeConfig", "make_genome"]


class Genome(Space, Protocol):
    """How genes stand for networks. Static and hashable; `parents` is what `stack` made.

    Attributes:
        labels: pytree like one parent of the gene of each leaf element, -1 where there is none.
        num_parents: K.
    """

    @property
    def labels(self) -> Static: ...  # noqa: D102
    @property
    def num_parents(self) -> int: ...  # noqa: D102

    def stack(self, parents: Sequence[PyTree], *base: PyTree) -> PyTree:
        """The parents as the other functions take them."""

    def rows(self, parents: PyTree) -> list[Any]:
        """For each leaf of a network the parents' `[K, ...]`, or None where it is not mixed."""

    def express(self, genes: Genes, parents: PyTree) -> PyTree:
        """The network of one individual."""


class GenomeConfig(Section):
    """What a gene is.

    Attributes:
        kind: `masks` (coefficients with which the parents are mixed), `task_vectors` (what training
            did to a common base, scaled; needs `base`) or `weights` (the individual is the network
            itself, as in MeGA; a gene is a whole leaf).
        freeze: regular expression; leaves whose path it matches stay as in parent 0.
        granularity: of masks and task vectors: `global` (one gene), `layer`, `leaf`, `channel` (one
            for each hidden unit: all the weights that compute it) or `element`.
        binary: for masks: each gene picks one parent, instead of mixing them.
        low: for masks and task vectors: smallest coefficient; below 0, genes may lie beyond a
            parent.
        high: for task vectors: largest coefficient.
        trim: for task vectors: a density for each gene and parent is searched too (TIES' trimming).
        parents_first: for weights: the parents are in the first population, so that the result
            cannot be worse than the best of them. Otherwise it is random points between them only.
        relative_noise: for weights: `evolution.mutation_scale` is in units of the standard
            deviation of the leaf that the noise hits. Leaves differ in size by orders of magnitude,
            so that one absolute scale drowns some and does nothing to others.
        noise_on_statistics: for weights: noise hits BatchNorm's moving statistics too. They are
            measurements of activations; noise can only make them wrong.
        clip_variances: for weights: negative variances are set to zero. Otherwise a network with a
            negative variance outputs NaN and is lost.
    """

    section = "genome"
    kind: Literal["masks", "task_vectors", "weights"] = "masks"
    freeze: Pattern | None = None
    granularity: Annotated[str, one_of(GRANULARITIES)] = "channel"
    binary: bool = False
    low: Annotated[float, between(-10, 0)] = 0.0
    high: Annotated[float, at_least(1)] = 2.0
    trim: bool = False
    parents_first: bool = True
    relative_noise: bool = True
    noise_on_statistics: bool = False
    clip_variances: bool = True

    def _check(self) -> None:
        """Raises ConfigError for choices that another kind of genome has."""
        own = {
            "masks": {"granularity", "binary", "low"},
            "task_vectors": {"granularity", "low", "high", "trim"},
            "weights": {"parents_first", "relative_noise", "noise_on_statistics", "clip_variances"},
        }
        for name, entry in type(self).model_fields.items():
            elsewhere = any(name in names for names in own.values()) and name not in own[self.kind]
            same = getattr(self, name) == entry.default
            self.require(
                same or not elsewhere, name, f"genome.kind {self.kind!r} has no such choice"
            )
        self.require(not (self.binary and self.low), "low", "binary genes have no coefficients")


def make_genome(
    apply_fn: ApplyFn,
    variables: PyTree,
    inputs: PyTree,
    num_parents: int,
    config: GenomeConfig | None = None,
    *,
    labels: PyTree | None = None,
    freeze: Sequence[str] = (),
) -> Genome:
    """The genome that a configuration section describes, for a network.

    Args:
        apply_fn: the network.
        variables: of one network, or their shapes and dtypes.
        inputs: one batch, or its shapes and dtypes; needed to find the layers.
        num_parents: K.
        config: kind, granularity and what is frozen; None takes the defaults.
        labels: the user's own genes instead of the granularity; see `megajax.masks`.
        freeze: patterns of leaves that are frozen besides `config.freeze`.

    Raises:
        ConfigError: choices that cannot work.

    Example:
        >>> import numpy as np
        >>> kernel, inputs = np.ones((4, 3), np.float32), np.ones((1, 4), np.float32)
        >>> make_genome(lambda w, x: x @ w, kernel, inputs, 2).num_genes
        3
    """
    config = config or GenomeConfig()
    frozen = [*freeze] if config.freeze is None else [config.freeze, *freeze]
    return GENOMES[config.kind](config, apply_fn, variables, inputs, num_parents, labels, frozen)


def check_genome(genome: Genome, size: int, parents: PyTree, variables: PyTree) -> None:
    """Checks what a genome of the user's own returns, before anything runs.

    Args:
        genome: the genome.
        size: individuals of a population.
        parents: what its `stack` made.
        variables: of one parent.

    Raises:
        ConfigError: names the function, what it gave and what was expected.

    Example:
        >>> import numpy as np
        >>> line = masks({"w": np.ones(3)}, 2, granularity="global")
        >>> check_genome(line, 4, line.stack([{"w": np.ones(3)}] * 2), {"w": np.ones(4)})
        Traceback (most recent call last):
        ...
        megajax.errors.ConfigError: genome.express gives leaf w as float32[3]: float32[4] is needed
    """
    key = jax.random.key(0)

    def shapes(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return jax.eval_shape(function, *arguments)
        except Exception as error:  # whatever a user's own function raises
            raise ConfigError(f"genome.{name} failed: {first_line(error)}") from error

    genes = shapes("init", lambda parents: genome.init(key, size, parents), parents)
    for path, leaf in leaves_by_path(genes).items():
        if leaf.shape[:1] != (size,):
            of_leaf = f"leaf {path} as " if path else ""
            raise ConfigError(
                f"genome.init gives {of_leaf}{described(leaf)} for {size} individuals: "
                f"[{size}, ...] is needed"
            )
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), genes)
    wanted = jax.eval_shape(lambda tree: tree, variables)  # as a device holds them
    _check_alike("express", shapes("express", genome.express, one, parents), wanted)
    _check_alike("repair", shapes("repair", genome.repair, genes), genes)


def _check_alike(name: str, found: PyTree, wanted: PyTree) -> None:
    there, here = leaves_by_path(found), leaves_by_path(wanted)
    for path in {**here, **there}:
        gave, needed = described(there.get(path)), described(here.get(path))
        if gave != needed:
            of_leaf = f"leaf {path} as " if path else ""
            raise ConfigError(f"genome.{name} gives {of_leaf}{gave}: {needed} is needed")


def _masks(
    config: GenomeConfig,
    apply_fn: ApplyFn,
    variables: PyTree,
    inputs: PyTree,
    num_parents: int,
    labels: PyTree | None,
    freeze: Sequence[str],
) -> Masks:
    layers = None
    if labels is None and config.granularity == "channel":
        labels = unit_labels(apply_fn, variables, inputs)
    elif labels is None and config.granularity == "layer":
        layers = find_layers(apply_fn, variables, inputs)
    return masks(
        variables,
        num_parents,
        granularity=config.granularity,
        layers=layers,
        labels=labels,
        freeze=freeze,
        binary=config.binary,
        low=config.low if config.kind == "masks" else 0.0,
    )


def _task_vectors(config: GenomeConfig, *arguments: Any) -> TaskVectors:
    found = _masks(config, *arguments)
    return TaskVectors(
        found.labels, found.num_parents, found.num_genes, config.low, config.high, config.trim
    )


def _weights(
    config: GenomeConfig,
    apply_fn: ApplyFn,
    variables: PyTree,
    inputs: PyTree,
    num_parents: int,
    labels: PyTree | None,
    freeze: Sequence[str],
) -> Weights:
    if labels is not None:
        raise ConfigError("genome.kind is 'weights': labels are for masks and task vectors")
    line = masks(variables, num_parents, granularity="global", freeze=freeze)
    statistics = find_statistics(apply_fn, variables, inputs)
    variances = frozenset(one.variance for one in statistics)
    means = frozenset(one.mean for one in statistics)
    layers = jax.tree.leaves(find_layers(apply_fn, variables, inputs))
    evolves = [i for i, has in enumerate(mixed_leaves(line.labels.tree)) if has]
    order = sorted(range(len(evolves)), key=lambda place: layers[evolves[place]])
    return Weights(
        Masks(line.labels, num_parents, 1, parents_first=config.parents_first),
        quiet=frozenset() if config.noise_on_statistics else variances | means,
        clipped=variances if config.clip_variances else frozenset(),
        relative_noise=config.relative_noise,
        order=tuple(order),
    )


GENOMES: dict[str, Callable[..., Genome]] = {
    "masks": _masks,
    "task_vectors": _task_vectors,
    "weights": _weights,
}
"""The kinds of genomes by the names that the configuration gives them."""
