"""Merge independently trained neural networks by evolution, in JAX.

`merge` does the main job; every piece it is made of can be called by itself:

    parents     check and stack variable pytrees     adapters    from Flax Linen and NNX
    genome      genes <-> variables                  operators   selection, crossover, mutation
    fitness     score a population in one program    evolution   init, step, run
    alignment   symmetries, matching                 normalization  BatchNorm, REPAIR
    evaluation  held-out metrics                     layers      which leaves form a layer
    interchange  networks from files of any format, and back
    hierarchy   many parents, merged by a tree       training    parents, fine-tuning
    baselines   what one would do instead            statistics  intervals, paired tests
    robustness  corruptions, calibration             config      every choice and its default
    errors      what can be caught
"""

from megajax._interrupts import end_at_once as _end_at_once

_end_at_once()  # before the imports that take seconds
# ruff: noqa: E402

from megajax.alignment import align as align
from megajax.alignment import find_symmetries as find_symmetries
from megajax.baselines import run_baselines as run_baselines
from megajax.baselines.registry import BaselinesConfig as BaselinesConfig
from megajax.config import AlignConfig as AlignConfig
from megajax.config import EvolutionConfig as EvolutionConfig
from megajax.config import FitnessConfig as FitnessConfig
from megajax.config import GenomeConfig as GenomeConfig
from megajax.config import HierarchyConfig as HierarchyConfig
from megajax.config import RecalibrateConfig as RecalibrateConfig
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
from megajax.evaluation.measures import ensemble as ensemble
from megajax.evaluation.measures import measure as measure
from megajax.evaluation.measures import predict as predict
from megajax.evaluation.robustness import RobustnessConfig as RobustnessConfig
from megajax.formats import NameMap as NameMap
from megajax.formats import check_logits as check_logits
from megajax.formats import export as export
from megajax.formats import load_network as load_network
from megajax.formats import load_parents as load_parents
from megajax.formats import map_names as map_names
from megajax.formats import save_network as save_network
from megajax.formats.adapters import Network as Network
from megajax.formats.adapters import from_linen as from_linen
from megajax.formats.adapters import from_nnx as from_nnx
from megajax.formats.adapters import to_nnx as to_nnx
from megajax.merging.genome import Genome as Genome
from megajax.merging.genome import masks as masks
from megajax.merging.genome import weights as weights
from megajax.merging.merge import MergeResult as MergeResult
from megajax.merging.merge import merge as merge
from megajax.merging.tree import TreeResult as TreeResult
from megajax.merging.tree import merge_tree as merge_tree
from megajax.program.batchnorm import recalibrate as recalibrate
from megajax.program.batchnorm import repair as repair
from megajax.program.roles import find_layers as find_layers
from megajax.run.checkpoint import CheckpointConfig as CheckpointConfig
from megajax.run.config import Config as Config
from megajax.run.config import merge_sections as merge_sections
from megajax.run.presets import mega_paper as mega_paper
from megajax.run.presets import sound_cifar10 as sound_cifar10
from megajax.search.genetic import genetic_algorithm as genetic_algorithm
from megajax.trees import check_parents as check_parents
from megajax.trees import keep_leaves as keep_leaves
from megajax.trees import stack_parents as stack_parents
from megajax.trees import unstack_parents as unstack_parents
from megajax.zoo.data import DataConfig as DataConfig
from megajax.zoo.data import ParentsConfig as ParentsConfig
from megajax.zoo.networks import ModelConfig as ModelConfig
from megajax.zoo.training import FinetuneConfig as FinetuneConfig
from megajax.zoo.training import TrainingConfig as TrainingConfig

__version__ = "0.1.0"
