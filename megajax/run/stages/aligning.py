"""The parents' hidden units brought into correspondence."""

from __future__ import annotations

from megajax.alignment import align as align_parents
from megajax.run.checkpoint import Checkpoints
from megajax.run.stages.task import Outcomes, Task, networks_in, stream
from megajax.run.store import Outcome

__all__ = ["align"]


def align(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
    """Aligns the parents, as the configuration says; the objective of each sweep is kept."""
    del checkpoints
    config = task.config
    with task.console.status(f"aligning parents by {config.align.method}"):
        aligned, alignment = align_parents(
            stream(config, "align"),
            task.apply_fn,
            networks_in(outcomes["parents"], "parents"),
            task.dataset.validation.images[:2],
            calibration=task.calibration,
            config=config.align,
            keep=dict(config.parents.keep),
        )
    objective = [] if alignment is None else list(alignment.objective)
    if alignment is not None:
        task.console.print(
            f"aligned by {config.align.method}: similarity {objective[0]:.4g} before, "
            f"{objective[-1]:.4g} after",
            highlight=False,
        )
    return Outcome(
        networks={f"aligned/{k}": parent for k, parent in enumerate(aligned)},
        values={"objective": objective},
    )
