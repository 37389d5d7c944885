"""The search: all parents at once, or two by two in a tree; a line of metrics a generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from megajax.config import AlignConfig
from megajax.errors import ConfigError, SearchError
from megajax.merging.merge import MergeResult, merge, shares_of
from megajax.merging.shares import channel_shares, projected_shares
from megajax.merging.tree import Node, NodeResult, merge_tree
from megajax.run import store as workdir
from megajax.run.checkpoint import Checkpoints
from megajax.run.config import to_dict
from megajax.run.stages.task import (
    Clock,
    Outcomes,
    Task,
    interrupted,
    networks_in,
    planned,
    progress_bar,
    stream,
)
from megajax.run.store import Outcome
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
    config, split, clock = task.config, task.selection, Clock()
    metrics_file = task.folder / workdir.METRICS
    state: GAState | None = None
    history: dict[str, np.ndarray] = {}  # column by column
    restored = checkpoints.restore()
    if restored is not None:
        state, stored = _search_state(restored.state["search"]), restored.state["history"]
        history = {name: stored[name] for name in (*GAInfo._fields, "seconds")}
        clock = Clock(float(history["seconds"][-1]))
        task.console.print(f"merging goes on after generation {restored.step}")
        if restored.step > config.evolution.generations:
            raise ConfigError(
                f"evolution.generations is {config.evolution.generations}: the search that it is "
                f"to go on from did {restored.step} already"
            )
    workdir.write_lines(metrics_file, _rows(history))
    evolution = config.evolution
    if evolution.time_budget is not None:
        left = max(evolution.time_budget - clock.seconds(), 0.0)
        evolution = evolution.replace(time_budget=left)

    networks = networks_in(outcomes["align"], "aligned")

    def save(when: Callable[[int, PyTree], None]) -> None:
        assert state is not None
        when(int(state.generation), {"search": state, "history": history})

    with progress_bar(task.console) as progress:
        bar = progress.add_task("merging", total=evolution.generations)

        def on_chunk(reached: GAState, infos: GAInfo) -> None:
            nonlocal state, history
            seconds = np.full(len(infos.generation), round(clock.seconds(), 3))
            lines = {**infos._asdict(), "seconds": seconds}
            workdir.write_lines(metrics_file, _rows(lines), append=True)
            before = history or {name: column[:0] for name, column in lines.items()}
            history = {name: np.append(before[name], column) for name, column in lines.items()}
            state = reached
            generation, fitness = int(state.generation), float(state.best.fitness)
            progress.update(bar, completed=generation, description=f"merging, {fitness:.4f}")
            if task.stopping() and generation < evolution.generations:
                save(checkpoints.save)
                raise interrupted("generation", generation)
            save(checkpoints.offer)

        try:
            merged = merge(
                stream(config, "search"),
                task.apply_fn,
                networks,
                (split.images, split.labels),
                calibration=task.calibration,
                align=AlignConfig(method="none"),  # they are
                recalibrate=config.recalibrate,
                genome=config.genome,
                fitness=planned(task, networks[0]),
                evolution=evolution,
                keep=dict(config.parents.keep),
                state=state,
                callback=on_chunk,
            )
        except SearchError:
            save(checkpoints.save)
            raise
    save(checkpoints.save)
    return Outcome(
        networks={"merged": merged.variables},
        values={
            "fitness": merged.fitness,
            "parent_fitness": merged.parent_fitness.tolist(),
            "evaluations": merged.evaluations,
            "examples_scored": merged.examples_scored,
            "generations": int(merged.state.generation),
            "genes": merged.genome.num_genes,
            "plan": merged.plan.plain(),
            "shares": _shares(merged),
        },
        files=(workdir.METRICS,),
        seconds=clock.seconds(),
    )


def _by_tree(task: Task, outcomes: Outcomes) -> Outcome:
    """Two by two, round after round; nodes that are done are not searched again."""
    config, split, clock = task.config, task.selection, Clock()
    metrics_file = task.folder / workdir.METRICS
    sections = to_dict(config)
    before = [outcomes["parents"].identity, *(sections[name] for name in _TREE)]
    earlier = 0.0
    networks = networks_in(outcomes["parents"], "parents")
    workdir.write_lines(metrics_file, [])

    def key_of(node: Node) -> str:
        return workdir.digest([before, node._asdict()])

    def note(node: Node, result: NodeResult) -> None:
        place = {"round": node.round, "position": node.position}
        rows = [place | row for row in _rows(result.history._asdict())]
        workdir.write_lines(metrics_file, rows, append=True)

    def load(node: Node) -> NodeResult | None:
        nonlocal earlier
        stored = workdir.load_outcome(task.folder, _node_name(node), key_of(node))
        if stored is None:
            return None
        task.console.print(f"round {node.round}, pair {node.position}: taken from {task.folder}")
        earlier += stored.seconds or 0.0
        result = _node_result(stored)
        note(node, result)
        return result

    with progress_bar(task.console) as progress:
        total = (config.parents.count - 1) * config.evolution.generations
        bar = progress.add_task("merging by a tree", total=total)
        started = 0.0

        def save(node: Node, result: NodeResult) -> None:
            nonlocal started
            now = clock.seconds()
            outcome = _node_outcome(node, result)._replace(seconds=now - started)
            started = now
            workdir.save_outcome(task.folder, _node_name(node), key_of(node), outcome)
            note(node, result)
            if task.stopping() and len(result.history.generation):
                raise interrupted(f"pair {node.position} of round", node.round)

        def on_chunk(node: Node, infos: GAInfo) -> None:
            done = int((infos.generation > 0).sum())
            progress.update(bar, advance=done, description=f"merging, round {node.round}")

        tree = merge_tree(
            stream(config, "search"),
            task.apply_fn,
            networks,
            (split.images, split.labels),
            hierarchy=config.hierarchy,
            calibration=task.calibration,
            align=config.align,
            recalibrate=config.recalibrate,
            genome=config.genome,
            fitness=planned(task, networks[0]),
            evolution=config.evolution,
            load=load,
            save=save,
            callback=on_chunk,
        )
    aligned = networks_in(outcomes["align"], "aligned")
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
    return Outcome(
        networks={"merged": tree.variables},
        values={
            "fitness": tree.fitness,
            "parent_fitness": tree.parent_fitness.tolist(),
            "evaluations": tree.evaluations,
            "examples_scored": tree.examples_scored,
            "generations": sum(len(result.history.generation) - 1 for result in tree.results),
            "genes": tree.genome.num_genes,
            "plan": tree.plan.plain(),
            "shares": projected_shares(tree.variables, stack_parents(aligned)),
            "nodes": nodes,
        },
        files=(workdir.METRICS,),
        seconds=earlier + clock.seconds(),
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
