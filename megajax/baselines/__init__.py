"""What one would do instead: merging methods and searches to compare with.

One file per family, each of pure functions that can be called by themselves:

    averages      uniform, weighted, on the sphere      selection   best parent, greedy soup
    fisher        Fisher-weighted average               regmean     linear layers in closed form
    task_vectors  task arithmetic, TIES, DARE           searches    line, random search, evosax
    leaves        statistics and integers kept apart    registry    all of them by name

`run_baselines` runs all that apply. The parents' ensemble, the ceiling at K times the cost, is no
network of their architecture: see `megajax.evaluation.measures.ensemble`.
"""

from megajax.baselines.averages import slerp as slerp
from megajax.baselines.averages import uniform_average as uniform_average
from megajax.baselines.averages import weighted_average as weighted_average
from megajax.baselines.fisher import fisher_average as fisher_average
from megajax.baselines.fisher import fisher_information as fisher_information
from megajax.baselines.leaves import on_weights as on_weights
from megajax.baselines.leaves import statistic_paths as statistic_paths
from megajax.baselines.registry import BASELINES as BASELINES
from megajax.baselines.registry import Baseline as Baseline
from megajax.baselines.registry import Result as Result
from megajax.baselines.registry import applicable as applicable
from megajax.baselines.registry import run_baselines as run_baselines
from megajax.baselines.registry import table as table
from megajax.baselines.regmean import find_kernels as find_kernels
from megajax.baselines.regmean import gram_matrices as gram_matrices
from megajax.baselines.regmean import regmean as regmean
from megajax.baselines.searches import best_point as best_point
from megajax.baselines.searches import from_evosax as from_evosax
from megajax.baselines.searches import random_search as random_search
from megajax.baselines.searches import simplex_lattice as simplex_lattice
from megajax.baselines.selection import best_of as best_of
from megajax.baselines.selection import best_parent as best_parent
from megajax.baselines.selection import greedy_soup as greedy_soup
from megajax.baselines.selection import scorer as scorer
from megajax.baselines.task_vectors import dare as dare
from megajax.baselines.task_vectors import task_arithmetic as task_arithmetic
from megajax.baselines.task_vectors import ties as ties
