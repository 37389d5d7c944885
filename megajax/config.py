"""The sections of alignment, genome, fitness and search: what `megajax.merge` is told.

Example:
    >>> EvolutionConfig(population_size=64).generations
    60
    >>> EvolutionConfig(population_size=1)
    Traceback (most recent call last):
    ...
    megajax.errors.ConfigError: evolution.population_size is 1: at least 2 (elites + 1) are needed
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from megajax.alignment import AlignConfig as AlignConfig
from megajax.sections import Fraction, Section, at_least, one_of

__all__ = [
    "AlignConfig",
    "EvolutionConfig",
    "FitnessConfig",
    "GenomeConfig",
    "HierarchyConfig",
    "RecalibrateConfig",
]

KINDS: tuple[str, ...] = ("masks", "weights")
GRANULARITIES: tuple[str, ...] = ("global", "layer", "leaf", "channel", "element")
SELECTIONS: tuple[str, ...] = ("tournament", "roulette", "rank")
CROSSOVERS: tuple[str, ...] = (
    "arithmetic",
    "arithmetic_per_gene",
    "uniform",
    "one_point",
    "two_point",
    "blx_alpha",
)
MUTATIONS: tuple[str, ...] = ("gaussian", "reset")
SURVIVALS: tuple[str, ...] = ("plus", "generational")
METRICS: tuple[str, ...] = ("cross_entropy", "accuracy")

_Crossover = Annotated[str, one_of(CROSSOVERS)]
_Mutation = Annotated[str, one_of(MUTATIONS)]
_Positive = Annotated[int, at_least(1)]
_Count = Annotated[int, at_least(0)]
_Auto = Annotated[str, one_of(("auto",))]


class RecalibrateConfig(Section):
    """Whether BatchNorm statistics are measured anew for every candidate, inside the fitness.

    Attributes:
        enabled: for networks with BatchNorm; others are refused.
        examples: training images to measure on, all in one batch.
    """

    section = "recalibrate"
    enabled: bool = False
    examples: Annotated[int, at_least(2)] = 256


class GenomeConfig(Section):
    """What a gene is.

    Attributes:
        kind: `masks` (coefficients with which the parents are mixed) or `weights` (the individual
            is the network itself, as in MeGA; a gene is a whole leaf).
        freeze: regular expression; leaves whose path it matches stay as in parent 0.
        granularity: of masks: `global` (one gene), `layer`, `leaf`, `channel` (one for each hidden
            unit: all that writes it moves together) or `element`.
        binary: for masks: each gene picks one parent, instead of mixing them.
        parents_first: for weights: the parents are in the first population, so that the result
            cannot be worse than the best of them. Otherwise it is random points between them only.
        relative_noise: for weights: `evolution.mutation_scale` is in units of the standard
            deviation of the leaf that the noise hits. Leaves differ in size by orders of magnitude,
            so that one absolute scale drowns some and does nothing to others.
        noise_on_statistics: for weights: noise hits BatchNorm's moving statistics too. They are
            measurements of activations; noise makes them wrong and can bring nothing.
        clip_variances: for weights: negative variances are set to zero. Otherwise a network with
            one gives no number, and is lost.
    """

    section = "genome"
    kind: Annotated[str, one_of(KINDS)] = "masks"
    freeze: str | None = None
    granularity: Annotated[str, one_of(GRANULARITIES)] = "channel"
    binary: bool = False
    parents_first: bool = True
    relative_noise: bool = True
    noise_on_statistics: bool = False
    clip_variances: bool = True

    def _check(self) -> None:
        for_masks = ("granularity", "binary")
        for_weights = ("parents_first", "relative_noise", "noise_on_statistics", "clip_variances")
        for name in for_weights if self.kind == "masks" else for_masks:
            ok = getattr(self, name) == type(self).model_fields[name].default
            self.require(ok, name, f"genome.kind {self.kind!r} has no such choice")


class FitnessConfig(Section):
    """How an individual is scored on the validation images. Fitness is always maximised.

    Attributes:
        metric: `cross_entropy` (its negative, smooth), `accuracy`, or a function
            `(logits [b, C], labels [b]) -> scores [b]` whose mean over the images is the fitness.
        batch_size: validation images per forward pass: a number, or `auto` for a choice by backend
            and network.
        population_chunk: individuals evaluated side by side by `vmap` (the rest in turn by
            `lax.map`): a number, or `auto`.
        trial: `auto` is measured on this machine for some seconds before the search, instead of
            following from backend and network. The workdir keeps the choice; another start of the
            same run elsewhere may make another one, and its last bits differ.
        devices: devices that share the population: a number, or `all` for those of all processes.
            How many there are does not change the search, up to float rounding. `auto` is one for
            `merge`, and all in a run, for which the command line makes every core of a CPU one.
        devices_per_network: how many of them share the weights of one network; it divides
            `devices`. Needed only where one device has no room for a network, or all the parents.
        select_on_test: score on the test images instead, as MeGA's reference does for many parents.
            The search then chooses the network that happens to suit the test images, no figure is
            held out any more, and the report says so. For the command line: `merge` scores on the
            images that it is given.
        racing_examples: score each child on so many validation images first, drawn anew for each
            generation with every label's share, and only the best children on all of them; the
            others are out. Where candidates are recalibrated, the first look takes no more
            calibration images either. None scores every child on all.
        racing_finalists: with `racing_examples`, the share of the offspring scored on all images.
    """

    section = "fitness"
    metric: Annotated[str, one_of(METRICS)] | Callable[..., Any] = "cross_entropy"
    batch_size: _Positive | _Auto = "auto"
    population_chunk: _Positive | _Auto = "auto"
    trial: bool = False
    devices: _Positive | Annotated[str, one_of(("auto", "all"))] = "auto"
    devices_per_network: _Positive = 1
    select_on_test: bool = False
    racing_examples: _Positive | None = None
    racing_finalists: Fraction = 0.125

    def _check(self) -> None:
        self.require(self.racing_finalists > 0, "racing_finalists", "it must be above 0")
        whole = isinstance(self.devices, str) or self.devices % self.devices_per_network == 0
        why = f"it must divide the {self.devices} of fitness.devices"
        self.require(whole, "devices_per_network", why)


class EvolutionConfig(Section):
    """The genetic algorithm.

    The operators are names, or functions of the same signature (see `megajax.search.operators`).

    Attributes:
        population_size: individuals P.
        generations: generations after the first population.
        elites: individuals that a `generational` survival carries over unchanged.
        selection: `tournament`, `roulette` or `rank`, or a function.
        tournament_size: contestants of a tournament.
        crossover: one name or several; each child draws one of them. Or a function.
        mutation: one name (`gaussian`, `reset`) or several, all applied in turn. Or a function.
            None takes `gaussian`, or `reset` for binary masks.
        mutation_rate: probability that a gene mutates; None means one gene in a hundred, but at
            least one gene of a child on average.
        mutation_scale: standard deviation of the `gaussian` mutation.
        survival: `plus` (the best of parents and children) or `generational`, or a function.
        generations_per_chunk: generations in one compiled call, between two looks of the host.
        patience: stop after so many generations without a better best; None never does.
        time_budget: stop after so many seconds; None never does. Not reproducible by nature.
        evaluation_budget: stop before more than so many networks are scored; None never does. With
            `fitness.racing_examples`, passes over all validation images are counted, so that the
            limit is one of cost: a network scored on a tenth of them is a tenth of a network.
        reuse_fitness: a child that is the same, bit for bit, as a member of the population or an
            earlier child takes over its fitness and is not scored. The search is the same; where
            the whole population is scored side by side, little is saved.
    """

    section = "evolution"
    population_size: int = 32
    generations: _Count = 60
    elites: _Count = 1
    selection: Annotated[str, one_of(SELECTIONS)] | Callable[..., Any] = "tournament"
    tournament_size: _Positive = 3
    crossover: _Crossover | tuple[_Crossover, ...] | Callable[..., Any] = ("uniform", "arithmetic")
    mutation: _Mutation | tuple[_Mutation, ...] | Callable[..., Any] | None = None
    mutation_rate: Fraction | None = None
    mutation_scale: Annotated[float, at_least(0)] = 0.3
    survival: Annotated[str, one_of(SURVIVALS)] | Callable[..., Any] = "plus"
    generations_per_chunk: _Positive = 1
    patience: _Positive | None = None
    time_budget: Annotated[float, at_least(0)] | None = None
    evaluation_budget: _Count | None = None
    reuse_fitness: bool = False

    def _check(self) -> None:
        need = max(self.elites + 1, 2)
        enough = self.population_size >= need
        self.require(enough, "population_size", f"at least {need} (elites + 1) are needed")
        why = f"it must not exceed the population of {self.population_size}"
        self.require(self.tournament_size <= self.population_size, "tournament_size", why)
        for name in ("crossover", "mutation"):
            self.require(getattr(self, name) != (), name, "at least one is needed")


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
        odd: what becomes of the one that is left when a round has an odd number: `carry` it to the
            next round, or `drop` it, as MeGA's reference does.
        nodes_at_once: nodes of a round whose searches run in one program: a number, or `auto` for
            as many as fit in memory where they can run side by side, and one where they cannot.
    """

    section = "hierarchy"
    enabled: bool = False
    pairing: Annotated[str, one_of(("order", "similarity"))] | Callable[..., Any] = "order"
    odd: Annotated[str, one_of(("carry", "drop"))] = "carry"
    nodes_at_once: _Positive | _Auto = "auto"
