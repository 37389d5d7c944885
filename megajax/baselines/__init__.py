"""What one would do instead of a search: each method a function and a registry entry beside it."""

from megajax.baselines.given import BASELINES as BASELINES
from megajax.baselines.given import Given as Given
from megajax.baselines.given import Result as Result
from megajax.baselines.given import baseline as baseline

# The order of the tables: a module lists its methods when it is imported.
from megajax.baselines.averages import slerp as slerp  # isort: skip
from megajax.baselines.averages import uniform_average as uniform_average  # isort: skip
from megajax.baselines.selection import greedy_soup as greedy_soup  # isort: skip
from megajax.baselines.fisher import fisher_average as fisher_average  # isort: skip
from megajax.baselines.fisher import fisher_information as fisher_information  # isort: skip
from megajax.baselines.regmean import pleas as pleas  # isort: skip
from megajax.baselines.regmean import regmean as regmean  # isort: skip
from megajax.baselines.regmean import regmean_plus as regmean_plus  # isort: skip
from megajax.baselines.task_arithmetic import dare as dare  # isort: skip
from megajax.baselines.task_arithmetic import task_arithmetic as task_arithmetic  # isort: skip
from megajax.baselines.task_arithmetic import ties as ties  # isort: skip
from megajax.baselines import searches as _searches  # noqa: F401  # isort: skip
from megajax.baselines.registry import BaselinesConfig as BaselinesConfig  # isort: skip
from megajax.baselines.registry import run_baselines as run_baselines  # isort: skip
