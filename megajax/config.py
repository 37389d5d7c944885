"""Every choice of a run: frozen dataclasses with their defaults, their checks and nothing else.

The library functions take the sections as arguments and the command line takes the whole `Config`,
so a choice has one name, one default and one check wherever it is made. A value that cannot work
raises `ConfigError` naming the field when the section is built.

Example:
    >>> EvolutionConfig(population_size=64).generations
    60
    >>> EvolutionConfig(population_size=1)
    Traceback (most recent call last):
    ...
    megajax.errors.ConfigError: evolution.population_size is 1: at least 2 (elites + 1) are needed
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from megajax.errors import ConfigError

__all__ = [
    "AlignConfig",
    "BaselinesConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvolutionConfig",
    "FinetuneConfig",
    "FitnessConfig",
    "GenomeConfig",
    "HierarchyConfig",
    "ModelConfig",
    "ParentsConfig",
    "RecalibrateConfig",
    "RobustnessConfig",
    "TrainingConfig",
    "default_config",
    "from_dict",
    "merge_sections",
    "smoke",
    "to_dict",
]

KINDS: tuple[str, ...] = ("masks", "weights")
ALIGNMENTS: tuple[str, ...] = ("weights", "activations", "both", "none")
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
SHARDS: tuple[str, ...] = ("same", "disjoint", "skewed")
OPTIMIZERS: tuple[str, ...] = ("sgd", "adam", "adamw")
SCHEDULES: tuple[str, ...] = ("constant", "cosine")
AUGMENTATIONS: tuple[str, ...] = ("flip", "crop")
CORRUPTIONS: tuple[str, ...] = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "gaussian_blur",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg_compression",
)
PUBLISHED_CORRUPTIONS: tuple[str, ...] = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "frosted_glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic",
    "pixelate",
    "jpeg_compression",
)
BASELINES: tuple[str, ...] = (
    "best_parent",
    "uniform_average",
    "slerp",
    "greedy_soup",
    "fisher",
    "regmean",
    "task_arithmetic",
    "ties",
    "dare",
    "line",
    "random_search",
    "cma_es",
    "sep_cma_es",
    "differential_evolution",
)
EXPORTS: tuple[str, ...] = ("safetensors", "npz", "orbax")
PAIRINGS: tuple[str, ...] = ("order", "similarity")
ODD: tuple[str, ...] = ("carry", "drop")


def _annotations(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)


def _is_instance(value: Any, annotation: Any) -> bool:
    for kind in _alternatives(annotation):
        origin = typing.get_origin(kind) or kind
        if origin is tuple:
            inner = typing.get_args(kind)
            if isinstance(value, tuple):
                kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
                same = len(kinds) == len(value)
                if same and all(map(_is_instance, value, kinds)):
                    return True
        elif origin is Callable or origin is typing.get_origin(Callable[..., Any]):
            if callable(value):
                return True
        elif origin is bool or isinstance(value, bool):
            if origin is bool and isinstance(value, bool):
                return True
        elif origin is float:
            if isinstance(value, (int, float)):
                return True
        elif isinstance(value, origin):
            return True
    return False


def _describe(annotation: Any) -> str:
    names = []
    for kind in _alternatives(annotation):
        origin = typing.get_origin(kind) or kind
        name = str(kind) if origin is tuple else getattr(origin, "__name__", str(kind))
        names.append("None" if origin is type(None) else name)
    return " or ".join(names)


@dataclass(frozen=True, kw_only=True)
class _Section:
    """Checks shared by the sections; each check's message starts with the field's full name."""

    _name: ClassVar[str] = ""

    def _require(self, ok: bool, name: str, why: str) -> None:
        if not ok:
            raise ConfigError(f"{self._name}.{name} is {getattr(self, name)!r}: {why}")

    def _one_of(self, name: str, choices: Sequence[str]) -> None:
        self._require(getattr(self, name) in choices, name, f"choose one of {', '.join(choices)}")

    def _all_of(self, name: str, choices: Sequence[str]) -> None:
        ok = all(value in choices for value in getattr(self, name))
        self._require(ok, name, f"choose from {', '.join(choices)}")

    def _at_least(self, low: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._require(value is None or value >= low, name, f"it must be at least {low}")

    def _pattern(self, name: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            self._require(False, name, f"{pattern!r} is no regular expression: {error}")

    def _fraction(self, *names: str) -> None:
        for name in names:
            self._require(0 <= getattr(self, name) <= 1, name, "it must lie between 0 and 1")

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            annotation = _annotations(type(self))[entry.name]
            if not _is_instance(value, annotation):
                raise ConfigError(
                    f"{self._name}.{entry.name} is {value!r} of type {type(value).__name__}: "
                    f"{_describe(annotation)} is needed"
                )
        self._check()

    def _check(self) -> None:
        """Raises ConfigError for values that have the right type and still cannot work."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Section):
    """Which images and how they are split.

    Attributes:
        name: `digits` (scikit-learn's, bundled) or the name of a TFDS image classification set.
        data_dir: TFDS directory that holds the prepared set; None takes TFDS's own default.
        validation_fraction: share of the training images set aside for validation.
        test_fraction: share of all images set aside for the test, for sets without a test split.
        limit: at most this many images in each split (for quick trials); None takes all.
        standardize: subtract each channel's mean over the training images and divide by its
            standard deviation; otherwise pixels stay in [0, 1].
        image_size: resize the images of a TFDS set to so many pixels a side; None keeps them.
    """

    _name: ClassVar[str] = "data"
    name: str = "digits"
    data_dir: str | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.25
    limit: int | None = None
    standardize: bool = False
    image_size: int | None = None

    def _check(self) -> None:
        self._require(bool(self.name), "name", "a data set must be named")
        self._fraction("validation_fraction", "test_fraction")
        self._at_least(1, "limit", "image_size")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Section):
    """Which network of the zoo, and its options.

    Attributes:
        name: a name in `megajax.zoo.networks.MODELS`.
        options: keyword arguments of that network, for example `{"width": 32}`.
    """

    _name: ClassVar[str] = "model"
    name: str = "cnn"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ParentsConfig(_Section):
    """How many parents there are, and what each one saw or where it comes from.

    Attributes:
        paths: files or folders of trained parents, at least two (see `load_parents`); they are then
            loaded and none is trained. Empty: `count` parents are trained.
        keep: pairs (regular expression for leaf paths, number of a parent): those leaves come from
            that parent alone, and may have other shapes in the others.
        rename: pairs (name in a file, or regular expression for it; path of the leaf), where the
            automatic match is not enough.
        ignore: regular expression; arrays of the files whose name it matches are left out.
        cast: floating-point arrays of the files may have another precision.
        count: number of parents K; with `paths`, their number.
        shards: `same` (all training images for each), `disjoint` (equal parts) or `skewed` (each
            parent is at home in its own classes and sees few images of the others).
        skew: for `skewed`, the share of a class's images that goes to the parent at home in it;
            1 means that a parent never sees the other classes.
        shared_initialization: all parents start from the same weights.
    """

    _name: ClassVar[str] = "parents"
    paths: tuple[str, ...] = ()
    keep: tuple[tuple[str, int], ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    ignore: str | None = None
    cast: bool = False
    count: int = 2
    shards: str = "same"
    skew: float = 0.8
    shared_initialization: bool = False

    def _check(self) -> None:
        if self.paths:
            named = len(self.paths) >= 2 and all(self.paths)
            self._require(named, "paths", "at least two paths are needed for a merge")
            default = type(self).count
            ok = self.count in (default, len(self.paths))
            self._require(ok, "count", f"parents.paths names {len(self.paths)}")
            object.__setattr__(self, "count", len(self.paths))
        self._require(self.count >= 2, "count", "at least two parents are needed for a merge")
        for pattern, parent in self.keep:
            self._pattern("keep", pattern)
            exists = 0 <= parent < self.count
            self._require(exists, "keep", f"the parents are 0 to {self.count - 1}")
        for name in ("rename", "ignore"):
            loaded = bool(self.paths) or not getattr(self, name)
            self._require(loaded, name, "it is for parents from files, and parents.paths is empty")
        for pattern, _ in self.rename:
            self._pattern("rename", pattern)
        if self.ignore is not None:
            self._pattern("ignore", self.ignore)
        self._one_of("shards", SHARDS)
        self._fraction("skew")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(_Section):
    """How each parent is trained.

    Attributes:
        epochs: passes over a parent's shard.
        batch_size: images per step and parent.
        optimizer: `sgd` (Nesterov momentum), `adam` or `adamw`.
        learning_rate: peak learning rate.
        schedule: `constant` or `cosine` (to zero).
        warmup_epochs: epochs of linear warm-up before the schedule.
        momentum: for `sgd`.
        weight_decay: decoupled for `adamw`; added to the gradient of kernels for the others.
        augment: any of `flip` (left-right) and `crop` (pad by an eighth of the side, crop back).
    """

    _name: ClassVar[str] = "training"
    epochs: int = 20
    batch_size: int = 64
    optimizer: str = "adam"
    learning_rate: float = 3e-3
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    augment: tuple[str, ...] = ()

    def _check(self) -> None:
        self._at_least(1, "epochs", "batch_size")
        self._at_least(0, "learning_rate", "warmup_epochs", "weight_decay")
        self._fraction("momentum")
        self._one_of("optimizer", OPTIMIZERS)
        self._one_of("schedule", SCHEDULES)
        self._all_of("augment", AUGMENTATIONS)


@dataclass(frozen=True, kw_only=True)
class AlignConfig(_Section):
    """How the parents' hidden units are brought into correspondence before the search.

    Attributes:
        method: `weights` (Git Re-Basin's weight matching), `activations` (correlations on the
            calibration inputs), `both` (activations, then weights from there) or `none`.
        reference: the number of the parent that the others are aligned to, or `mean` for their
            common mean.
    """

    _name: ClassVar[str] = "align"
    method: str = "weights"
    reference: int | str = 0

    def _check(self) -> None:
        self._one_of("method", ALIGNMENTS)
        if isinstance(self.reference, str):
            self._one_of("reference", ("mean",))
            self._require(
                self.method != "activations", "reference", "only weights can be matched to a mean"
            )
        else:
            self._at_least(0, "reference")


@dataclass(frozen=True, kw_only=True)
class RecalibrateConfig(_Section):
    """Whether BatchNorm statistics are measured anew for every candidate, inside the fitness.

    Attributes:
        enabled: for networks with BatchNorm; others are refused.
        examples: training images to measure on, all in one batch.
    """

    _name: ClassVar[str] = "recalibrate"
    enabled: bool = False
    examples: int = 256

    def _check(self) -> None:
        self._at_least(2, "examples")


@dataclass(frozen=True, kw_only=True)
class GenomeConfig(_Section):
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

    _name: ClassVar[str] = "genome"
    kind: str = "masks"
    freeze: str | None = None
    granularity: str = "channel"
    binary: bool = False
    parents_first: bool = True
    relative_noise: bool = True
    noise_on_statistics: bool = False
    clip_variances: bool = True

    def _check(self) -> None:
        self._one_of("kind", KINDS)
        self._one_of("granularity", GRANULARITIES)
        for_masks = ["granularity", "binary"]
        for_weights = ["parents_first", "relative_noise", "noise_on_statistics", "clip_variances"]
        others = for_weights if self.kind == "masks" else for_masks
        for entry in dataclasses.fields(self):
            if entry.name in others:
                ok = getattr(self, entry.name) == entry.default
                self._require(ok, entry.name, f"genome.kind {self.kind!r} has no such choice")


@dataclass(frozen=True, kw_only=True)
class FitnessConfig(_Section):
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

    _name: ClassVar[str] = "fitness"
    metric: str | Callable[..., Any] = "cross_entropy"
    batch_size: int | str = "auto"
    population_chunk: int | str = "auto"
    trial: bool = False
    devices: int | str = "auto"
    devices_per_network: int = 1
    select_on_test: bool = False
    racing_examples: int | None = None
    racing_finalists: float = 0.125

    def _check(self) -> None:
        self._at_least(1, "racing_examples")
        self._require(
            0 < self.racing_finalists <= 1, "racing_finalists", "it must be above 0 and at most 1"
        )
        if isinstance(self.metric, str):
            self._one_of("metric", METRICS)
        words = {"batch_size": (), "population_chunk": (), "devices": ("all",)}
        for name, others in words.items():
            if isinstance(getattr(self, name), str):
                self._one_of(name, ("auto", *others))
            else:
                self._at_least(1, name)
        self._at_least(1, "devices_per_network")
        if isinstance(self.devices, int):
            self._require(
                self.devices % self.devices_per_network == 0,
                "devices_per_network",
                f"it must divide the {self.devices} of fitness.devices",
            )


@dataclass(frozen=True, kw_only=True)
class EvolutionConfig(_Section):
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

    _name: ClassVar[str] = "evolution"
    population_size: int = 32
    generations: int = 60
    elites: int = 1
    selection: str | Callable[..., Any] = "tournament"
    tournament_size: int = 3
    crossover: str | tuple[str, ...] | Callable[..., Any] = ("uniform", "arithmetic")
    mutation: str | tuple[str, ...] | Callable[..., Any] | None = None
    mutation_rate: float | None = None
    mutation_scale: float = 0.3
    survival: str | Callable[..., Any] = "plus"
    generations_per_chunk: int = 1
    patience: int | None = None
    time_budget: float | None = None
    evaluation_budget: int | None = None
    reuse_fitness: bool = False

    def _check(self) -> None:
        self._at_least(0, "elites", "generations", "mutation_scale")
        need = max(self.elites + 1, 2)
        self._require(
            self.population_size >= need,
            "population_size",
            f"at least {need} (elites + 1) are needed",
        )
        self._at_least(1, "tournament_size", "generations_per_chunk", "patience")
        self._at_least(0, "time_budget", "evaluation_budget")
        self._require(
            self.tournament_size <= self.population_size,
            "tournament_size",
            f"it must not exceed the population of {self.population_size}",
        )
        if self.mutation_rate is not None:
            self._fraction("mutation_rate")
        for name, choices in (("selection", SELECTIONS), ("survival", SURVIVALS)):
            if isinstance(getattr(self, name), str):
                self._one_of(name, choices)
        for name, choices in (("crossover", CROSSOVERS), ("mutation", MUTATIONS)):
            value = getattr(self, name)
            if isinstance(value, str):
                self._one_of(name, choices)
            elif isinstance(value, tuple):
                self._require(bool(value), name, "at least one is needed")
                self._all_of(name, choices)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(_Section):
    """How often a run saves its state. It has no influence on what the run finds.

    A state is saved as soon as one of the two is due, always after a whole chunk of generations or
    epoch of training, and once more when the search ends or the run is asked to stop.

    Attributes:
        every_generations: save after so many generations (for training: epochs); None never does.
        every_seconds: save after so many seconds; None never does.
        keep: newest checkpoints to keep; with more than one, a damaged one costs little.
    """

    _name: ClassVar[str] = "checkpoint"
    every_generations: int | None = None
    every_seconds: float | None = 60.0
    keep: int = 3

    def _check(self) -> None:
        self._at_least(1, "every_generations", "keep")
        self._at_least(0, "every_seconds")


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig(_Section):
    """Whether all networks are also tested on corrupted test images, and on which.

    Attributes:
        enabled: measure it, once, after the search.
        published: take the published CIFAR-10-C (`cifar10_corrupted` of TFDS, in `data.data_dir`)
            instead of corrupting the test images here.
        corruptions: names of corruptions; none means all that there are, here or published.
        severities: from 1 to 5.
        examples: at most this many test images, the first ones; None takes all.
    """

    _name: ClassVar[str] = "robustness"
    enabled: bool = True
    published: bool = False
    corruptions: tuple[str, ...] = ()
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    examples: int | None = 1000

    def _check(self) -> None:
        self._all_of("corruptions", PUBLISHED_CORRUPTIONS if self.published else CORRUPTIONS)
        self._require(bool(self.severities), "severities", "at least one is needed")
        self._require(
            all(1 <= severity <= 5 for severity in self.severities),
            "severities",
            "they run from 1 to 5",
        )
        self._at_least(1, "examples")


@dataclass(frozen=True, kw_only=True)
class BaselinesConfig(_Section):
    """What the merged network is compared with.

    Attributes:
        names: methods of `megajax.baselines.BASELINES`, an error where one cannot be applied; or
            one name; or `default` (a few that tell most) or `all`, of which those that need
            something that is not there (a base network, exactly two parents) are left out.
        budget: networks that a search over masks or the straight line may score; None takes as many
            as the evolution did.
        examples: training inputs of each parent that Fisher and RegMean measure on.
    """

    _name: ClassVar[str] = "baselines"
    names: str | tuple[str, ...] = "default"
    budget: int | None = None
    examples: int = 256

    def _check(self) -> None:
        if isinstance(self.names, str):
            self._one_of("names", ("default", "all", *BASELINES))
        else:
            self._all_of("names", BASELINES)
        self._at_least(1, "budget", "examples")


@dataclass(frozen=True, kw_only=True)
class HierarchyConfig(_Section):
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

    _name: ClassVar[str] = "hierarchy"
    enabled: bool = False
    pairing: str | Callable[..., Any] = "order"
    odd: str = "carry"
    nodes_at_once: int | str = "auto"

    def _check(self) -> None:
        if isinstance(self.pairing, str):
            self._one_of("pairing", PAIRINGS)
        self._one_of("odd", ODD)
        if isinstance(self.nodes_at_once, str):
            self._one_of("nodes_at_once", ("auto",))
        else:
            self._at_least(1, "nodes_at_once")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(_Section):
    """Training after the merge; the best parent is trained just as long, to compare with.

    All that is not said here is as in the `training` section, but without warm-up.

    Attributes:
        epochs: passes over the training images; 0 is off. MeGA's many-parent merge has 10.
        learning_rate: peak learning rate; None is a tenth of the training's.
    """

    _name: ClassVar[str] = "finetune"
    epochs: int = 0
    learning_rate: float | None = None

    def _check(self) -> None:
        self._at_least(0, "epochs", "learning_rate")


@dataclass(frozen=True, kw_only=True)
class Config(_Section):
    """A whole run: `python -m megajax.run --config FILE` builds one and follows it.

    Attributes:
        seed: the only source of randomness.
        smoke: cut everything down to a trial of minutes on 2 cores; see `smoke`.
        data: the images.
        model: the network.
        parents: how many, and what they saw.
        training: how they are trained.
        align: how their hidden units are brought into correspondence.
        recalibrate: whether BatchNorm statistics are measured anew.
        genome: what a gene is.
        fitness: how an individual is scored.
        evolution: the search.
        checkpoint: how often the state is saved.
        robustness: the test on corrupted images.
        tensorboard: write the lines of `metrics.jsonl` for TensorBoard too.
        export: formats in which the merged network is saved beside Flax msgpack: any of
            `safetensors` (with the names of parent 0's file, if it is one), `npz` and `orbax`.
        baselines: what the merged network is compared with.
        hierarchy: whether many parents are merged by a tree.
        finetune: training after the merge.
    """

    _name: ClassVar[str] = "config"
    seed: int = 0
    smoke: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parents: ParentsConfig = field(default_factory=ParentsConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    recalibrate: RecalibrateConfig = field(default_factory=RecalibrateConfig)
    genome: GenomeConfig = field(default_factory=GenomeConfig)
    fitness: FitnessConfig = field(default_factory=FitnessConfig)
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    robustness: RobustnessConfig = field(default_factory=RobustnessConfig)
    tensorboard: bool = False
    export: tuple[str, ...] = ()
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)
    hierarchy: HierarchyConfig = field(default_factory=HierarchyConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)

    def _check(self) -> None:
        self._at_least(0, "seed")
        self._all_of("export", EXPORTS)
        if self.hierarchy.enabled and self.parents.keep:
            raise ConfigError(
                "parents.keep names leaves of single parents: a tree (hierarchy.enabled) has none"
            )
        if self.robustness.enabled and self.robustness.published and self.data.name != "cifar10":
            raise ConfigError(
                "robustness.published is True: CIFAR-10-C fits data.name cifar10, which is "
                f"{self.data.name!r}"
            )
        mutation = self.evolution.mutation
        names = (mutation,) if isinstance(mutation, str) else mutation
        if self.genome.kind == "weights" and isinstance(names, tuple) and "reset" in names:
            raise ConfigError(
                f"evolution.mutation is {mutation!r}: genome.kind 'weights' has nothing to draw "
                "new genes from"
            )


def merge_sections(config: Config) -> dict[str, Any]:
    """The sections that `megajax.merge` takes, by the names of its arguments.

    Example:
        >>> sorted(merge_sections(Config()))  # merge(..., **merge_sections(config))
        ['align', 'evolution', 'fitness', 'genome', 'recalibrate']
    """
    names = ("align", "recalibrate", "genome", "fitness", "evolution")
    return {name: getattr(config, name) for name in names}


_SMOKE_OPTIONS: dict[str, dict[str, Any]] = {
    "cnn": {"width": 4},
    "densenet": {"blocks": (2, 2), "growth": 8, "stem": "imagenet"},
    "mlp": {"hidden": (32, 32)},
    "resnet": {"depth": 8, "width": 8},
    "vgg": {"depth": 11, "width": 8},
    "xception": {"width": 4, "middle": 1, "stem": "imagenet"},
}


def smoke(config: Config) -> Config:
    """Cuts a run down to a trial that takes minutes on 2 cores, with every stage still in it.

    Its figures mean nothing. `from_dict` applies it to a configuration whose field `smoke` is set,
    so that `--config.smoke=True` works on any experiment and the stored configuration shows what
    was run. Nothing is made larger than it was, and a second application changes nothing.

    Args:
        config: any configuration.

    Returns:
        The same with a few images, a small network of the same family, and short training and
        search.

    Example:
        >>> small = smoke(Config(evolution=EvolutionConfig(generations=100)))
        >>> small.model.options, small.evolution.generations
        ({'width': 4}, 3)
    """

    def at_most(high: int, value: int | None) -> int:
        return high if value is None else min(high, value)

    training, evolution = config.training, config.evolution
    epochs = at_most(2, training.epochs)
    population = at_most(max(8, config.parents.count + 2), evolution.population_size)
    options = dict(config.model.options)
    for name, small in _SMOKE_OPTIONS.get(config.model.name, {}).items():
        options[name] = _smaller(small, options.get(name, small))
    return dataclasses.replace(
        config,
        smoke=True,
        data=dataclasses.replace(config.data, limit=at_most(512, config.data.limit)),
        model=dataclasses.replace(config.model, options=options),
        training=dataclasses.replace(
            training,
            epochs=epochs,
            batch_size=at_most(64, training.batch_size),
            warmup_epochs=min(training.warmup_epochs, epochs / 2),
        ),
        fitness=dataclasses.replace(
            config.fitness,
            racing_examples=None
            if config.fitness.racing_examples is None
            else at_most(16, config.fitness.racing_examples),
        ),
        finetune=dataclasses.replace(config.finetune, epochs=at_most(1, config.finetune.epochs)),
        baselines=dataclasses.replace(config.baselines, names=("uniform_average", "random_search")),
        robustness=dataclasses.replace(
            config.robustness,
            severities=config.robustness.severities[-1:],
            examples=at_most(64, config.robustness.examples),
        ),
        recalibrate=dataclasses.replace(
            config.recalibrate, examples=at_most(64, config.recalibrate.examples)
        ),
        evolution=dataclasses.replace(
            evolution,
            population_size=population,
            generations=at_most(3, evolution.generations),
            elites=at_most(population - 1, evolution.elites),
            tournament_size=at_most(population, evolution.tournament_size),
        ),
    )


def _smaller(small: Any, value: Any) -> Any:
    """The smaller number or list of numbers; anything else is left for the network to refuse."""
    if isinstance(small, str):
        return small
    try:
        return min(small, value, key=lambda v: v if isinstance(v, int) else sum(v))
    except TypeError:
        return value


def to_dict(config: _Section) -> dict[str, Any]:
    """The section as plain nested dictionaries, functions by their qualified name.

    Example:
        >>> to_dict(ParentsConfig())["count"]
        2
    """

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if callable(value):
            name = getattr(value, "__qualname__", type(value).__qualname__)
            return f"{getattr(value, '__module__', '?')}.{name}"
        return value

    result: dict[str, Any] = plain(config)
    return result


def from_dict(values: Mapping[str, Any]) -> Config:
    """Builds and checks a `Config` from nested mappings; missing fields take their defaults.

    Args:
        values: section name -> field name -> value. Lists become tuples, whole numbers are taken
            where a float is meant.

    Returns:
        The checked configuration, cut down by `smoke` if its field `smoke` is set.

    Raises:
        ConfigError: a section or field does not exist, or a value cannot work; names it.

    Example:
        >>> from_dict({"evolution": {"generations": 5}}).evolution.generations
        5
        >>> from_dict({"evolution": {"generation": 5}})
        Traceback (most recent call last):
        ...
        megajax.errors.ConfigError: evolution.generation is no field of the configuration; did you
        mean evolution.generations?
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"config is {values!r}: it is made of sections with fields")
    result = _build(Config, "", values)
    assert isinstance(result, Config)
    return smoke(result) if result.smoke else result


def _build(section: type[_Section], prefix: str, values: Mapping[str, Any]) -> _Section:
    annotations = _annotations(section)
    known = [f.name for f in dataclasses.fields(section)]
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{prefix}{name} is no field of the configuration; {hint}")
        kind = annotations[name]
        if isinstance(kind, type) and issubclass(kind, _Section):
            if isinstance(value, kind):
                arguments[name] = value
                continue
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{name} is {value!r}: it is a section with fields")
            arguments[name] = _build(kind, f"{prefix}{name}.", value)
        else:
            arguments[name] = _coerce(value, kind)
    return section(**arguments)


def _coerce(value: Any, annotation: Any) -> Any:
    """Takes over what a command line or a JSON file cannot say in the exact type."""
    if isinstance(value, (list, tuple)):
        value = tuple(_coerce(item, None) for item in value)
    if isinstance(value, str) and value.isdigit() and int in _alternatives(annotation):
        return int(value)
    return value


def default_config(config: Config | None = None) -> ConfigDict:
    """The defaults as an editable `ml_collections.ConfigDict`, for a config file's `get_config()`.

    Names and values are checked when the run starts, by `from_dict`.

    Args:
        config: where to start from instead of the defaults, such as a preset's.

    Returns:
        The editable configuration.

    Example:
        >>> config = default_config()
        >>> config.evolution.population_size = 64
        >>> from_dict(config.to_dict()).evolution.population_size
        64
    """

    def editable(section: _Section) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for entry in dataclasses.fields(section):
            value = getattr(section, entry.name)
            if isinstance(value, _Section):
                values[entry.name] = editable(value)
            elif value is None:
                kinds = _alternatives(_annotations(type(section))[entry.name])
                values[entry.name] = placeholder(kinds[0])
            else:
                values[entry.name] = dict(value) if isinstance(value, Mapping) else value
        return values

    return ConfigDict(editable(config or Config()), type_safe=False)
