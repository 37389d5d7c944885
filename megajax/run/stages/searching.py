"""The search: all parents at once, or two by two in a tree; a line of metrics a generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from megajax.config import AlignConfig
from megajax.errors import ConfigError, SearchError
from megajax.io import digest, write_lines
from megajax.merging.merge import MergeResult, merge, shares_of
from megajax.merging.shares import channel_shares, projected_shares
from megajax.merging.tree import Node, NodeResult, TreeResult, merge_tree
from megajax.run import processes as distributed
from megajax.run.checkpoint import Checkpoints
from megajax.run.choices import fitness_of
from megajax.run.config import to_dict
from megajax.run.stages import task as common
from megajax.run.stages.task import (
    Clock,
    Outcomes,
    Task,
    interrupted,
    networks_in,
    progress,
    stream,
)
from megajax.run.store import METRICS, Outcome
from megajax.search.genetic import GAInfo, GAState
from megajax.search.operators import Population
from megajax.trees import stack_parents
from megajax.types import PyTree

__all__ = ["search"]

_TREE = ("align", "recalibrate", "genome", "fitness", "evolution", "hierarchy")


def search(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
    """Merges the parents into one network."""
    if task.config.hierarchy.enabled:
        return _by_tree(task, outcomes)
    return _at_once(task, outcomes, checkpoints)


def _at_once(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
    """One search among all parents; goes on from a checkpoint."""
    config, evolution, clock = task.config, task.config.evolution, Clock()
    state: GAState | None = None
    history: dict[str, np.ndarray] = {}  # column by column
    restored = checkpoints.restore()
    if restored is not None:
        state, stored = _search_state(restored.state["search"]), restored.state["history"]
        history = {name: stored[name] for name in (*GAInfo._fields, "seconds")}
        clock = Clock(float(history["seconds"][-1]))
        task.console.print(f"merging goes on after generation {restored.step}")
        if restored.step > evolution.generations:
            raise ConfigError(
                f"evolution.generations is {evolution.generations}: the search that it is to go on "
                f"from did {restored.step} already"
            )
    _note(task, _rows(history), append=False)
    if evolution.time_budget is not None:
        left = max(evolution.time_budget - clock.seconds(), 0.0)
        evolution = evolution.replace(time_budget=left)

    def save(when: Callable[[int, PyTree], None]) -> None:
        assert state is not None
        when(int(state.generation), {"search": state, "history": history})

    with progress(task.console, "merging", evolution.generations) as update:

        def on_chunk(reached: GAState, infos: GAInfo) -> None:
            nonlocal state, history
            seconds = np.full(len(infos.generation), round(clock.seconds(), 3))
            lines = {**infos._asdict(), "seconds": seconds}
            _note(task, _rows(lines))
            before = history or {name: column[:0] for name, column in lines.items()}
            history = {name: np.append(before[name], column) for name, column in lines.items()}
            state = reached
            generation = int(state.generation)
            update(generation, f"merging, {float(state.best.fitness):.4f}")
            if task.stopping() and generation < evolution.generations:
                save(checkpoints.save)
                raise interrupted("generation", generation)
            save(checkpoints.offer)

        try:
            merged = merge(
                stream(config, "search"),
                task.apply_fn,
                networks_in(outcomes["align"], "aligned"),
                (task.selection.images, task.selection.labels),
                calibration=task.calibration,
                align=AlignConfig(method="none"),  # they are
                recalibrate=config.recalibrate,
                genome=config.genome,
                fitness=fitness_of(config),
                evolution=evolution,
                keep=dict(config.parents.keep),
                state=state,
                callback=on_chunk,
            )
        except SearchError:
            save(checkpoints.save)
            raise
    save(checkpoints.save)
    figures = {"generations": int(merged.state.generation), "shares": _shares(merged)}
    return _outcome(merged, figures, clock.seconds())


def _by_tree(task: Task, outcomes: Outcomes) -> Outcome:
    """Two by two, round after round; nodes that are done are not searched again."""
    config, clock = task.config, Clock()
    sections = to_dict(config)
    before = [outcomes["parents"].identity, *(sections[name] for name in _TREE)]
    earlier, started = 0.0, 0.0
    _note(task, [], append=False)

    def key_of(node: Node) -> str:
        return digest([before, node._asdict()])

    def note(node: Node, result: NodeResult) -> None:
        place = {"round": node.round, "position": node.position}
        _note(task, [place | row for row in _rows(result.history._asdict())])

    def load(node: Node) -> NodeResult | None:
        nonlocal earlier
        stored = common.load(task, _node_name(node), key_of(node))
        if stored is None:
            return None
        earlier += stored.seconds or 0.0
        result = _node_result(stored)
        note(node, result)
        return result

    def save(node: Node, result: NodeResult) -> None:
        nonlocal started
        now = clock.seconds()
        outcome = _node_outcome(node, result)._replace(seconds=now - started)
        started = now
        common.save(task, _node_name(node), key_of(node), outcome)
        note(node, result)

    total = (config.parents.count - 1) * config.evolution.generations
    with progress(task.console, "merging by a tree", total) as update:
        done = 0

        def on_chunk(node: Node, infos: GAInfo) -> None:
            nonlocal done
            done += int((infos.generation > 0).sum())
            update(done, f"merging, round {node.round}")
            if task.stopping():
                raise interrupted(f"the pairs before number {node.position} of round", node.round)

        tree = merge_tree(
            stream(config, "search"),
            task.apply_fn,
            networks_in(outcomes["parents"], "parents"),
            (task.selection.images, task.selection.labels),
            hierarchy=config.hierarchy,
            calibration=task.calibration,
            align=config.align,
            recalibrate=config.recalibrate,
            genome=config.genome,
            fitness=fitness_of(config),
            evolution=config.evolution,
            load=load,
            save=save,
            callback=on_chunk,
        )
    nodes = [
        {
            **node._asdict(),
            "parents": list(node.parents),
            "fitness": result.fitness,
            "parent_fitness": result.parent_fitness.tolist(),
            "evaluations": result.evaluations,
        }
        for node, result in zip(tree.nodes, tree.results, strict=True)
    ]
    aligned = networks_in(outcomes["align"], "aligned")
    figures = {
        "generations": sum(len(result.history.generation) - 1 for result in tree.results),
        "shares": projected_shares(tree.variables, stack_parents(aligned)),
        "nodes": nodes,
    }
    return _outcome(tree, figures, earlier + clock.seconds())


def _outcome(
    found: MergeResult | TreeResult, figures: Mapping[str, Any], seconds: float
) -> Outcome:
    return Outcome(
        networks={"merged": found.variables},
        values={
            "fitness": found.fitness,
            "parent_fitness": found.parent_fitness.tolist(),
            "evaluations": found.evaluations,
            "examples_scored": found.examples_scored,
            "genes": found.genome.num_genes,
            "plan": found.plan.plain(),
            **figures,
        },
        files=(METRICS,),
        seconds=seconds,
    )


def _shares(merged: MergeResult) -> dict[str, Any]:
    """For each module, the parents' shares: channel by channel for masks, else one row."""
    if merged.genome.labels is None:
        return shares_of(merged)
    found = channel_shares(merged.genome, merged.genes, merged.variables)
    return {name: shares.tolist() for name, shares in found.items()}


def _node_name(node: Node) -> str:
    return f"nodes/{node.round}-{node.position}"


def _node_outcome(node: Node, result: NodeResult) -> Outcome:
    history = {name: column.tolist() for name, column in result.history._asdict().items()}
    return Outcome(
        networks={_node_name(node): result.variables},
        values={
            "fitness": result.fitness,
            "parent_fitness": result.parent_fitness.tolist(),
            "evaluations": result.evaluations,
            "examples_scored": result.examples_scored,
            "history": history,
        },
    )


def _node_result(stored: Outcome) -> NodeResult:
    (variables,) = stored.networks.values()
    values = stored.values
    columns: dict[str, Any] = {}
    for name, column in values["history"].items():
        whole = name in ("generation", "evaluations", "invalid", "completed", "valid")
        known = [np.nan if value is None else value for value in column]
        columns[name] = np.array(known, np.int32 if whole else np.float32)
    return NodeResult(
        variables=variables,
        fitness=values["fitness"],
        parent_fitness=np.array(values["parent_fitness"], np.float32),
        history=GAInfo(**columns),
        evaluations=values["evaluations"],
        examples_scored=values["examples_scored"],
    )


def _search_state(saved: Mapping[str, Any]) -> GAState:
    """The state from the nested dictionaries of a checkpoint, which `merge` checks."""
    population, best = (
        Population(saved[name]["genes"], saved[name]["fitness"], saved[name].get("aux", ()))
        for name in ("population", "best")
    )
    counters = ("generation", "evaluations", "stale", "completed")
    return GAState(population, best, *(saved[name] for name in counters))


def _rows(columns: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    lists = [column.tolist() for column in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def _note(task: Task, rows: list[dict[str, Any]], *, append: bool = True) -> None:
    if distributed.is_first():
        write_lines(task.folder / METRICS, rows, append=append)
