"""Merge independently trained neural networks by evolution, in JAX.

`merge` does the main job; every piece that it is made of can be used by itself. The folders are
layers, each of which knows only those below it:

    run          the command line: configuration, workdir, stages
    report       tables, pages and plots
    baselines    what one would do instead of a search
    formats      networks from files of any format, and back; Flax Linen and NNX
    zoo          networks, data sets, training
    merging      from parents and data to one network: tasks, genes, fitness, `merge`, `merge_tree`
    search       the genetic algorithm and other searches
    evaluation   held-out metrics, statistics, robustness
    alignment    permutation symmetries: found, verified, matched
    program      what a network's program says of its leaves; BatchNorm
"""

import importlib
from typing import TYPE_CHECKING, Any

from megajax._interrupts import end_at_once as _end_at_once

_end_at_once()  # before the imports that take seconds
# ruff: noqa: E402

from megajax.alignment import AlignConfig as AlignConfig
from megajax.alignment import align as align
from megajax.alignment import find_symmetries as find_symmetries
from megajax.baselines import BaselinesConfig as BaselinesConfig
from megajax.baselines import run_baselines as run_baselines
from megajax.errors import ConfigError as ConfigError
from megajax.errors import DataError as DataError
from megajax.errors import DeviceError as DeviceError
from megajax.errors import InterchangeError as InterchangeError
from megajax.errors import Interrupted as Interrupted
from megajax.errors import MegajaxError as MegajaxError
from megajax.errors import ParentsError as ParentsError
from megajax.errors import SearchError as SearchError
from megajax.errors import SymmetryError as SymmetryError
from megajax.errors import WorkdirError as WorkdirError
from megajax.merging.genome import Genome as Genome
from megajax.merging.genome import GenomeConfig as GenomeConfig
from megajax.merging.masks import masks as masks
from megajax.merging.merge import MergeResult as MergeResult
from megajax.merging.merge import merge as merge
from megajax.merging.merge import problem_for as problem_for
from megajax.merging.metrics import Metric as Metric
from megajax.merging.problem import FitnessConfig as FitnessConfig
from megajax.merging.problem import Problem as Problem
from megajax.merging.problem import RecalibrateConfig as RecalibrateConfig
from megajax.merging.problem import evaluate as evaluate
from megajax.merging.tasks import Task as Task
from megajax.merging.tasks import score as score
from megajax.merging.tree import HierarchyConfig as HierarchyConfig
from megajax.merging.tree import TreeResult as TreeResult
from megajax.merging.tree import merge_tree as merge_tree
from megajax.program.batchnorm import recalibrate as recalibrate
from megajax.program.batchnorm import repair as repair
from megajax.program.roles import find_layers as find_layers
from megajax.search.genetic import GeneticAlgorithm as GeneticAlgorithm
from megajax.search.methods import EvolutionConfig as EvolutionConfig

if TYPE_CHECKING:
    from megajax.citations import citation as citation
    from megajax.evaluation.measures import measure as measure
    from megajax.evaluation.measures import predict as predict
    from megajax.evaluation.robustness import RobustnessConfig as RobustnessConfig
    from megajax.formats import NameMap as NameMap
    from megajax.formats import Network as Network
    from megajax.formats import check_logits as check_logits
    from megajax.formats import export as export
    from megajax.formats import from_linen as from_linen
    from megajax.formats import from_nnx as from_nnx
    from megajax.formats import load_network as load_network
    from megajax.formats import load_parents as load_parents
    from megajax.formats import map_names as map_names
    from megajax.formats import save_network as save_network
    from megajax.formats import to_nnx as to_nnx
    from megajax.merging.diagnosis import Diagnosis as Diagnosis
    from megajax.merging.diagnosis import diagnose as diagnose
    from megajax.merging.outputs import ensemble as ensemble
    from megajax.merging.outputs import score_difference as score_difference
    from megajax.run.checkpoint import CheckpointConfig as CheckpointConfig
    from megajax.run.config import Config as Config
    from megajax.run.config import merge_sections as merge_sections
    from megajax.run.presets import mega_paper as mega_paper
    from megajax.run.presets import sound_cifar10 as sound_cifar10
    from megajax.zoo.data import DataConfig as DataConfig
    from megajax.zoo.data import ParentsConfig as ParentsConfig
    from megajax.zoo.networks import ModelConfig as ModelConfig
    from megajax.zoo.training import FinetuneConfig as FinetuneConfig
    from megajax.zoo.training import TrainingConfig as TrainingConfig

__version__ = "0.1.0"

_LATER = {
    "citations": "citation",
    "evaluation.measures": "measure predict",
    "evaluation.robustness": "RobustnessConfig",
    "formats": "NameMap Network check_logits export from_linen from_nnx load_network load_parents "
    "map_names save_network to_nnx",
    "merging.diagnosis": "Diagnosis diagnose",
    "merging.outputs": "ensemble score_difference",
    "run.checkpoint": "CheckpointConfig",
    "run.config": "Config merge_sections",
    "run.presets": "mega_paper sound_cifar10",
    "zoo.data": "DataConfig ParentsConfig",
    "zoo.networks": "ModelConfig",
    "zoo.training": "FinetuneConfig TrainingConfig",
}
"""Modules that bring heavy libraries along, and the names that they are imported for when used."""

_HOME = {name: module for module, names in _LATER.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'megajax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"megajax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
