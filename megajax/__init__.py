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
from megajax.merging.tree import HierarchyConfig as HierarchyConfig
from megajax.merging.tree import TreeResult as TreeResult
from megajax.merging.tree import merge_tree as merge_tree
from megajax.program.batchnorm import recalibrate as recalibrate
from megajax.program.batchnorm import repair as repair
from megajax.program.roles import find_layers as find_layers
from megajax.search.genetic import GeneticAlgorithm as GeneticAlgorithm
from megajax.search.methods import EvolutionConfig as EvolutionConfig

if TYPE_CHECKING:
    from megajax.evaluation.measures import ensemble as ensemble
    from megajax.evaluation.measures import measure as measure
    from megajax.evaluation.measures import predict as predict

__version__ = "0.1.0"

_LATER = {
    "NameMap": "formats",
    "Network": "formats.adapters",
    "ensemble": "evaluation.measures",
    "measure": "evaluation.measures",
    "predict": "evaluation.measures",
    "from_linen": "formats.adapters",
    "from_nnx": "formats.adapters",
    "to_nnx": "formats.adapters",
    "load_network": "formats",
    "load_parents": "formats",
    "save_network": "formats",
}
"""Names that are imported when they are first used, because they bring heavy libraries along."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'megajax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"megajax.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATER])
