"""What one would do instead of evolution, on the same parents and at the same cost."""

from __future__ import annotations

from megajax import baselines
from megajax.baselines import BASELINES
from megajax.baselines.registry import BaselinesConfig
from megajax.config import GenomeConfig
from megajax.run.checkpoint import Checkpoints
from megajax.run.stages.task import (
    Outcomes,
    Task,
    baseline_names,
    networks_in,
    planned,
    progress_bar,
    stream,
)
from megajax.run.store import Outcome

__all__ = ["run_baselines"]

# They search where the evolution did, so on the parents as it saw them only.
_SEARCHES = tuple(name for name, baseline in BASELINES.items() if baseline.searches)


def run_baselines(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
    """Runs the baselines on the parents as they are and, with a prefix, as the search saw them.

    The latter are aligned (`aligned_`) and recalibrated where the search recalibrates, or the one
    alone (`recalibrated_`); searches run only there, under their own names, at the cost that the
    evolution had, counted in passes of an image through a network.
    """
    del checkpoints
    config, split = task.config, task.selection
    parents = networks_in(outcomes["parents"], "parents")
    aligned = networks_in(outcomes["align"], "aligned")
    names = baseline_names(config)
    as_they_are = [name for name in names if name not in _SEARCHES]
    # A base network fits parents as they are: their hidden units come from its own.
    as_searched = [name for name in names if "base" not in BASELINES[name].needs]
    seen_as = "aligned_"
    if config.align.method == "none":
        seen_as = "recalibrated_"
        if not config.recalibrate.enabled:
            as_searched = [name for name in names if name in _SEARCHES]
    genome = config.genome
    if genome.kind != "masks":  # the line that weights start from, and no more
        genome = GenomeConfig(granularity="global")
    examples = config.baselines.examples
    own = [task.dataset.train.images[shard[:examples]] for shard in task.shards]
    found = {}
    with progress_bar(task.console) as progress:
        bar = progress.add_task("baselines", total=len(as_they_are) + len(as_searched))

        def done(name: str) -> None:
            progress.update(bar, advance=1, description=f"baselines, {name.replace('_', ' ')}")

        for prefix, networks, chosen in (
            ("", parents, as_they_are),
            (seen_as, aligned, as_searched),
        ):
            if not chosen:
                continue
            results = baselines.run_baselines(
                stream(config, "baselines"),
                task.apply_fn,
                networks,
                (split.images, split.labels),
                calibration=task.calibration,
                parent_inputs=own,
                base=outcomes["parents"].networks.get("base") if prefix == "" else None,
                config=BaselinesConfig(
                    names=tuple(chosen), budget=config.baselines.budget, examples=examples
                ),
                recalibrate=config.recalibrate if prefix else None,
                genome=genome,
                fitness=planned(task, parents[0]),
                evolution=config.evolution,
                budget=round(outcomes["search"].values["examples_scored"] / len(split.labels)),
                callback=done,
            )
            for name, result in results.items():
                found[name if name in _SEARCHES else prefix + name] = result
    return Outcome(
        networks={f"baselines/{name}": result.variables for name, result in found.items()},
        values={
            "evaluations": {name: result.evaluations for name, result in found.items()},
            "examples_scored": {name: result.examples for name, result in found.items()},
        },
    )
