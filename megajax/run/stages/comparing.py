"""What one would do instead of evolution, on the same parents and at the same cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

from megajax.baselines import BASELINES, run_baselines
from megajax.baselines.registry import BaselinesConfig
from megajax.errors import Interrupted
from megajax.io import digest
from megajax.merging import tasks as merging
from megajax.run.checkpoint import Checkpoints
from megajax.run.choices import baseline_names
from megajax.run.config import Config, to_dict
from megajax.run.stages.task import Outcomes, Task, kept, networks_in, progress, stream
from megajax.run.store import Outcome

__all__ = ["compare", "facts"]


class _Entry(NamedTuple):
    """A baseline to run: its name, that of its result, and whether it gets aligned parents."""

    method: str
    name: str
    as_searched: bool


def compare(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
    """Runs the baselines on the parents as they are and as the search saw them.

    Each result is stored as soon as it is there. Searches get the cost that the evolution had,
    counted in passes of an image through a network.
    """
    del checkpoints
    sections = to_dict(task.config)
    cost = {name: sections["baselines"][name] for name in ("budget", "examples")}
    searched = [sections[name] for name in ("recalibrate", "genome", "fitness", "evolution")]
    before = [outcomes[stage].identity for stage in ("parents", "align", "search")]
    entries = list(_entries(task.config))
    found: dict[str, Outcome] = {}

    @cache
    def scored_on() -> list[merging.Task]:
        parents = networks_in(outcomes["parents"], "parents")
        return [merging.with_teacher(one, task.apply_fn, parents) for one in task.selection]

    with progress(task.console, "baselines", len(entries)) as update:
        for number, entry in enumerate(entries):

            def make(entry: _Entry = entry) -> Outcome:
                if task.stopping():
                    what = f"stopped before the baseline {entry.name}"
                    raise Interrupted(f"{what}; the same command goes on from it")
                return _run(task, outcomes, entry, scored_on())

            key = digest([before, cost, searched, entry])
            found[entry.name] = kept(task, f"baselines/{entry.name}", key, make)
            update(number + 1, f"baselines, {entry.name.replace('_', ' ')}")
    return Outcome(
        networks=dict(pair for one in found.values() for pair in one.networks.items()),
        values={
            figure: {name: one.values[figure] for name, one in found.items() if one.values}
            for figure in ("evaluations", "examples_scored")
        },
        seconds=sum(one.seconds or 0.0 for one in found.values()),
    )


def facts(config: Config, evaluations: Mapping[str, int]) -> dict[str, dict[str, bool]]:
    """What `results.json` says of each baseline's method: whether it searches, and saw labels.

    Args:
        config: every choice.
        evaluations: networks that each of them scored, which takes the metric's labels.

    Example:
        >>> facts(Config(), {})["fisher"]
        {'searches': False, 'labels': True}
    """
    labelled = config.fitness.metric != "distill"
    found = {}
    for entry in _entries(config):
        method = BASELINES[entry.method]
        scored = labelled and bool(evaluations.get(entry.name))
        found[entry.name] = {
            "searches": method.searches,
            "labels": scored or "labels" in method.needs,
        }
    return found


def _entries(config: Config) -> Iterator[_Entry]:
    """All that apply; searches run only where the evolution did, under their own names.

    What others make of the parents as the search saw them is `aligned_NAME`, recalibrated where the
    search recalibrates, or `recalibrated_NAME` where that is all that was done to them.
    """
    names, aligned = baseline_names(config), config.align.method != "none"
    for name in names:
        if not BASELINES[name].searches:
            yield _Entry(name, name, as_searched=False)
    for name in names:
        if BASELINES[name].searches:
            yield _Entry(name, name, as_searched=True)
        # A base network fits parents as they are: their hidden units come from its own.
        elif "base" not in BASELINES[name].needs and (aligned or config.recalibrate.enabled):
            prefix = "aligned" if aligned else "recalibrated"
            yield _Entry(name, f"{prefix}_{name}", as_searched=True)


def _run(task: Task, outcomes: Outcomes, entry: _Entry, scored_on: list[merging.Task]) -> Outcome:
    config = task.config
    folder, stage = ("aligned", "align") if entry.as_searched else ("parents", "parents")
    examples = config.baselines.examples
    sections = task.sections | {"align": None}  # they are, or are not to be
    if not entry.as_searched:
        sections["recalibrate"] = None
    results = run_baselines(
        stream(config, "baselines"),
        task.apply_fn,
        networks_in(outcomes[stage], folder),
        scored_on,
        parent_inputs=[task.dataset.train.images[shard[:examples]] for shard in task.shards],
        base=None if entry.as_searched else outcomes["parents"].networks.get("base"),
        config=BaselinesConfig(
            names=(entry.method,), budget=config.baselines.budget, examples=examples
        ),
        budget=round(outcomes["search"].values["examples_scored"] / merging.examples_in(scored_on)),
        **sections,
    )
    if entry.method not in results:  # a search without a budget
        return Outcome()
    result = results[entry.method]
    return Outcome(
        networks={f"baselines/{entry.name}": result.variables},
        values={"evaluations": result.evaluations, "examples_scored": result.examples},
    )
