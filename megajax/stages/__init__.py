"""What the stages of a run do, a file for each; `megajax.pipeline` says in which order.

Each stage is a function of the task (the configuration, its data and network), of the outcomes of
the stages before it, and of the checkpoints that it may go on from and save to. It returns its
outcome, networks and figures; how outcomes are stored is up to the pipeline.
"""

from megajax.stages.aligning import align as align
from megajax.stages.comparing import run_baselines as run_baselines
from megajax.stages.finetuning import finetune as finetune
from megajax.stages.measuring import measure as measure
from megajax.stages.parents import obtain_parents as obtain_parents
from megajax.stages.reporting import write_report as write_report
from megajax.stages.searching import search as search
from megajax.stages.task import Outcomes as Outcomes
from megajax.stages.task import Task as Task
from megajax.stages.task import prepare as prepare
