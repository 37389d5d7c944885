"""A whole run as one record: every section beside the seed, from defaults, mappings or flags.

Knows all sections, and no more of what they configure than what they must agree on.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from megajax.alignment import AlignConfig
from megajax.baselines.registry import BaselinesConfig
from megajax.errors import ConfigError
from megajax.evaluation.robustness import RobustnessConfig
from megajax.formats import FORMATS
from megajax.merging.genome import GenomeConfig
from megajax.merging.problem import FitnessConfig, RecalibrateConfig
from megajax.merging.tree import HierarchyConfig
from megajax.run.checkpoint import CheckpointConfig
from megajax.search.methods import EvolutionConfig
from megajax.sections import Section, at_least, literal, one_of
from megajax.zoo.data import DataConfig, ParentsConfig
from megajax.zoo.networks import ModelConfig
from megajax.zoo.training import FinetuneConfig, TrainingConfig

__all__ = ["Config", "from_dict", "merge_sections", "override", "smoke", "to_dict"]


class Config(Section):
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

    seed: Annotated[int, at_least(0)] = 0
    smoke: bool = False
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    parents: ParentsConfig = ParentsConfig()
    training: TrainingConfig = TrainingConfig()
    align: AlignConfig = AlignConfig()
    recalibrate: RecalibrateConfig = RecalibrateConfig()
    genome: GenomeConfig = GenomeConfig()
    fitness: FitnessConfig = FitnessConfig()
    evolution: EvolutionConfig = EvolutionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    robustness: RobustnessConfig = RobustnessConfig()
    tensorboard: bool = False
    export: tuple[Annotated[str, one_of(FORMATS)], ...] = ()
    baselines: BaselinesConfig = BaselinesConfig()
    hierarchy: HierarchyConfig = HierarchyConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    def _check(self) -> None:
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


def from_dict(values: Mapping[str, Any]) -> Config:
    """A `Config` from nested mappings, such as JSON; missing fields take their defaults.

    Returns:
        The configuration, cut down by `smoke` if its field `smoke` is set.

    Raises:
        ConfigError: a section or field does not exist, or a value cannot work; names it.

    Example:
        >>> from_dict({"evolution": {"generations": 5}}).evolution.generations
        5
        >>> from_dict({"evolution": {"generation": 5}})
        Traceback (most recent call last):
        ...
        megajax.errors.ConfigError: evolution.generation is not a field of the configuration; did
        you mean evolution.generations?
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"config is {values!r}: it is made of sections with fields")
    config = Config(**values)
    return smoke(config) if config.smoke else config


def override(config: Config, changes: Mapping[str, str]) -> Config:
    """A configuration with fields as the command line gives them, checked once all are changed.

    Args:
        config: where to start from.
        changes: texts by field, such as `{"evolution.population_size": "64"}`.

    Raises:
        ConfigError: as for `from_dict`.

    Example:
        >>> override(Config(), {"align.reference": "mean", "model.options.width": "4"}).align
        AlignConfig(method='weights', reference='mean')
    """
    nested: dict[str, Any] = {}
    for field, text in changes.items():
        section, _, name = field.partition(".")
        if not name:
            nested[section] = text
        elif section == "model" and name.startswith("options."):
            option = name.removeprefix("options.")
            options = nested.setdefault(section, {}).setdefault("options", {**config.model.options})
            options[option] = literal(text)
        else:
            nested.setdefault(section, {})[name] = text
    return config.replace(**nested)


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

    Its figures mean nothing. `from_dict` and the command line apply it where the field `smoke` is
    set, so that the stored configuration shows what was run. Nothing becomes larger than it was,
    and a second application changes nothing.

    Example:
        >>> small = smoke(Config(evolution=EvolutionConfig(generations=100)))
        >>> small.model.options, small.evolution.generations
        ({'width': 4}, 3)
    """

    def at_most(high: int, value: int | None) -> int:
        return high if value is None else min(high, value)

    training, fitness, evolution = config.training, config.fitness, config.evolution
    epochs = at_most(2, training.epochs)
    population = at_most(max(8, config.parents.count + 2), evolution.population_size)
    racing = fitness.racing_examples
    options = dict(config.model.options)
    for name, small in _SMOKE_OPTIONS.get(str(config.model.name), {}).items():
        options[name] = _smaller(small, options.get(name, small))
    return config.replace(
        smoke=True,
        data={"limit": at_most(512, config.data.limit)},
        model={"options": options},
        training={
            "epochs": epochs,
            "batch_size": at_most(64, training.batch_size),
            "warmup_epochs": min(training.warmup_epochs, epochs / 2),
        },
        fitness={"racing_examples": None if racing is None else at_most(16, racing)},
        finetune={"epochs": at_most(1, config.finetune.epochs)},
        baselines={"names": ("uniform_average", "random_search")},
        robustness={
            "severities": config.robustness.severities[-1:],
            "examples": at_most(64, config.robustness.examples),
        },
        recalibrate={"examples": at_most(64, config.recalibrate.examples)},
        evolution={
            "population_size": population,
            "generations": at_most(3, evolution.generations),
            "elites": at_most(population - 1, evolution.elites),
            "tournament_size": at_most(population, evolution.tournament_size),
        },
    )


def _smaller(small: Any, value: Any) -> Any:
    """The smaller number or list of numbers; anything else is left for the network to refuse."""
    if isinstance(small, str):
        return small
    try:
        return min(small, value, key=lambda v: v if isinstance(v, int) else sum(v))
    except TypeError:
        return value


def to_dict(config: Section) -> dict[str, Any]:
    """The section as plain nested dictionaries, functions by name and a digest of their source.

    Example:
        >>> to_dict(ParentsConfig())["count"], to_dict(EvolutionConfig(selection=max))["selection"]
        (2, 'builtins.max')
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Section):
            return {name: plain(getattr(value, name)) for name in type(value).model_fields}
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(map(plain, value))
        return _identify(value) if callable(value) else value

    return plain(config)


def _identify(function: Callable[..., Any]) -> str:
    """The name of a function and, if it is not this package's, a digest of what it does.

    An edited metric must not take over the results of the one before.
    """
    kind = function if hasattr(function, "__qualname__") else type(function)
    name = f"{getattr(kind, '__module__', '?')}.{kind.__qualname__}"
    if name.startswith("megajax."):
        return name
    known = _source(function)
    return f"{name}#{hashlib.sha256(known.encode()).hexdigest()[:12]}" if known else name


def _source(value: Any) -> str:
    """The source of a function or an object's class, and of what it holds on to."""
    if isinstance(value, functools.partial):
        return repr([_source(value.func), *map(_source, value.args), _source(value.keywords)])
    if isinstance(value, Mapping):
        return repr({key: _source(item) for key, item in value.items()})
    if not callable(value):
        return repr(value)
    try:
        code = inspect.getsource(value if hasattr(value, "__qualname__") else type(value))
    except (OSError, TypeError):  # builtin, or typed in at a prompt
        return ""
    cells = getattr(value, "__closure__", None) or ()
    return repr([code, *(_source(cell.cell_contents) for cell in cells)])
