"""What the stages of a run do, a file for each; `megajax.run.pipeline` says in which order.

Each stage is a function of the task (the configuration, its data and network), of the outcomes of
the stages before it, and of the checkpoints that it may go on from and save to. It returns its
outcome, networks and figures; how outcomes are stored is up to the pipeline.
"""

from megajax.run.stages.aligning import align as align
from megajax.run.stages.comparing import run_baselines as run_baselines
from megajax.run.stages.finetuning import finetune as finetune
from megajax.run.stages.measuring import measure as measure
from megajax.run.stages.parents import obtain_parents as obtain_parents
from megajax.run.stages.reporting import write_report as write_report
from megajax.run.stages.searching import search as search
from megajax.run.stages.task import Outcomes as Outcomes
from megajax.run.stages.task import Task as Task
from megajax.run.stages.task import prepare as prepare
