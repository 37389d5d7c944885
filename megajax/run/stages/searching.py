"""The search: all parents at once, or two by two in a tree; a line of metrics a generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megajax.errors import SearchError
from megajax.io import digest, write_lines
from megajax.merging.masks import Masks
from megajax.merging.merge import MergeResult, merge
from megajax.merging.shares import channel_shares, projected_shares
from megajax.merging.tree import Node, NodeResult, TreeResult, merge_tree
from megajax.run import processes as distributed
from megajax.run.checkpoint import Checkpoints
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
from megajax.search.loop import COUNTS, Info, State

__all__ = ["search"]

_TREE = ("align", "recalibrate", "genome", "fitness", "evolution", "hierarchy")


def search(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
    """Merges the parents into one network."""
    if task.config.hierarchy.enabled:
        return _by_tree(task, outcomes, checkpoints)
    return _at_once(task, outcomes, checkpoints)


class _Progress:
    """A search under way: what the run saves of it, and where it goes on from."""

    def __init__(self, task: Task, checkpoints: Checkpoints, node: Node | None = None) -> None:
        self._task, self._checkpoints, self._node = task, checkpoints, node
        self._number = 0 if node is None else node.number
        self.state: State | None = None  # of an earlier start: nested dictionaries
        self.history: dict[str, np.ndarray] = {}  # column by column
        self.clock = Clock()
        restored = checkpoints.restore()
        if restored is not None and int(restored.state["node"]) == self._number:
            self.state, stored = restored.state["search"], restored.state["history"]
            self.history = {name: stored[name] for name in (*Info._fields, "seconds")}
            self.clock = Clock(float(self.history["seconds"][-1]))
            done = int(self.history["generation"][-1])
            task.console.print(f"merging goes on after generation {done}")
            evolution, why = task.config.evolution, f"the search that it continues did {done}"
            evolution.require(done <= evolution.generations, "generations", f"{why} already")
        _note(task, self.history, node, append=node is not None)

    def note(self, state: State, infos: Info) -> None:
        """Takes in new generations, and writes their lines."""
        seconds = np.full(len(infos.generation), round(self.clock.seconds(), 3))
        lines = {**infos._asdict(), "seconds": seconds}
        before = self.history or {name: column[:0] for name, column in lines.items()}
        self.history = {name: np.append(before[name], column) for name, column in lines.items()}
        self.state = state
        _note(self._task, lines, self._node)

    def save(self, *, at_once: bool) -> None:
        """Saves the state, at once or if it is time to."""
        if self.state is None or not self.history:
            return
        generation = int(self.history["generation"][-1])
        content = {"node": np.int32(self._number), "search": self.state, "history": self.history}
        when = self._checkpoints.save if at_once else self._checkpoints.offer
        when(self._number * 1_000_000 + generation, content)


def _at_once(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
    """One search among all parents; goes on from a checkpoint."""
    config, evolution = task.config, task.config.evolution
    here = _Progress(task, checkpoints)
    if evolution.time_budget is not None:
        left = max(evolution.time_budget - here.clock.seconds(), 0.0)
        evolution = evolution.replace(time_budget=left)

    with progress(task.console, "merging", evolution.generations) as update:

        def on_chunk(state: State, infos: Info) -> None:
            here.note(state, infos)
            generation = int(state.generation)
            update(generation, f"merging, {float(state.best.fitness):.4f}")
            if task.stopping() and generation < evolution.generations:
                here.save(at_once=True)
                raise interrupted("generation", generation)
            here.save(at_once=False)

        try:
            merged = merge(
                stream(config, "search"),
                task.apply_fn,
                networks_in(outcomes["align"], "aligned"),
                task.selection,
                base=outcomes["parents"].networks.get("base"),
                keep=dict(config.parents.keep),
                state=here.state,
                callback=on_chunk,
                **task.sections | {"align": "none", "evolution": evolution},  # they are aligned
            )
        except SearchError:
            here.save(at_once=True)
            raise
    here.save(at_once=True)
    figures = {
        "generations": int(merged.state.generation),
        "shares": _shares(merged),
        "genes": merged.genome.num_genes,
        "plan": merged.problem.layout.plain(),
        "tasks": _of_tasks(merged) if task.tasks or task.held_out else {},
    }
    return _outcome(merged, figures, here.clock.seconds())


def _by_tree(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
    """Two by two, round after round; nodes that are done are not searched again."""
    config = task.config
    sections = to_dict(config)
    before = [outcomes["parents"].identity, *(sections[name] for name in _TREE)]
    earlier = 0.0
    here: _Progress | None = None
    _note(task, {}, None, append=False)

    def key_of(node: Node) -> str:
        return digest([before, node._asdict()])

    def load(node: Node) -> NodeResult | None:
        nonlocal earlier
        stored = common.load(task, _node_name(node), key_of(node))
        if stored is None:
            return None
        earlier += stored.seconds or 0.0
        result = _node_result(stored)
        _note(task, result.history._asdict(), node)
        return result

    def resume(node: Node) -> State | None:
        nonlocal here
        here = _Progress(task, checkpoints, node)
        return here.state

    def save(node: Node, result: NodeResult) -> None:
        nonlocal earlier
        assert here is not None
        whole = Info(**{name: here.history[name] for name in Info._fields})
        outcome = _node_outcome(node, result._replace(history=whole))
        seconds = here.clock.seconds()
        earlier += seconds
        common.save(task, _node_name(node), key_of(node), outcome._replace(seconds=seconds))

    total = (config.parents.count - 1) * config.evolution.generations
    with progress(task.console, "merging by a tree", total) as update:
        done = 0

        def on_chunk(node: Node, state: State, infos: Info) -> None:
            nonlocal done
            assert here is not None
            here.note(state, infos)
            done += int((infos.generation > 0).sum())
            update(done, f"merging, round {node.round}")
            if task.stopping():
                here.save(at_once=True)
                generation = f"generation {int(state.generation)} of pair {node.position} of round"
                raise interrupted(generation, node.round)
            here.save(at_once=False)

        tree = merge_tree(
            stream(config, "search"),
            task.apply_fn,
            networks_in(outcomes["parents"], "parents"),
            task.selection,
            hierarchy=config.hierarchy,
            load=load,
            resume=resume,
            save=save,
            callback=on_chunk,
            **task.sections,
        )
    nodes = [
        {
            **node._asdict(),
            "fitness": result.fitness,
            "parent_fitness": result.parent_fitness,
            "evaluations": result.evaluations,
        }
        for node, result in zip(tree.nodes, tree.results, strict=True)
    ]
    aligned = networks_in(outcomes["align"], "aligned")
    figures = {
        "generations": sum(int(result.history.generation[-1]) for result in tree.results),
        "shares": projected_shares(tree.variables, aligned),
        "genes": tree.num_genes,
        "plan": None if tree.layout is None else tree.layout.plain(),
        "nodes": nodes,
        "tasks": _of_tasks(tree) if task.tasks or task.held_out else {},
    }
    return _outcome(tree, figures, earlier)


def _outcome(found: MergeResult | TreeResult, figures: dict[str, Any], seconds: float) -> Outcome:
    names = ("fitness", "parent_fitness", "evaluations", "examples_scored")
    values = {name: getattr(found, name) for name in names} | figures
    networks = {"merged": found.variables}
    return Outcome(networks, values, files=(METRICS,), seconds=seconds)


def _shares(merged: MergeResult) -> Mapping[str, Any]:
    """For each module, the parents' shares: channel by channel for masks, else one row."""
    if not isinstance(merged.genome, Masks):
        return projected_shares(merged.variables, merged.parents)
    return channel_shares(merged.genome, merged.genes, merged.variables)


def _of_tasks(merged: MergeResult | TreeResult) -> dict[str, Any]:
    """What `results.json` says of each task: its metric, and everybody's score on it."""
    return {
        name: {
            "metric": merged.metrics[name],
            "merged": score,
            "parents": merged.parent_scores[name].tolist(),
        }
        for name, score in merged.scores.items()
    }


def _node_name(node: Node) -> str:
    return f"nodes/{node.round}-{node.position}"


def _node_outcome(node: Node, result: NodeResult) -> Outcome:
    values = {**result._asdict(), "history": result.history._asdict()}
    return Outcome(networks={_node_name(node): values.pop("variables")}, values=values)


def _node_result(stored: Outcome) -> NodeResult:
    (variables,) = stored.networks.values()
    columns = {  # where a file has null, an array has NaN
        name: np.array(column, np.int32 if name in COUNTS else np.float32)
        for name, column in stored.values["history"].items()
    }
    own = {
        "variables": variables,
        "parent_fitness": np.array(stored.values["parent_fitness"], np.float32),
        "parent_scores": {
            name: np.array(scores, np.float32)
            for name, scores in stored.values["parent_scores"].items()
        },
        "history": Info(**columns),
    }
    return NodeResult(**{**stored.values, **own})


def _note(
    task: Task, columns: Mapping[str, np.ndarray], node: Node | None, *, append: bool = True
) -> None:
    """Writes a line for each generation, with the node's place in the tree."""
    place = {} if node is None else {"round": node.round, "position": node.position}
    lists = [column.tolist() for column in columns.values()]
    rows = [place | dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]
    if distributed.is_first():
        write_lines(task.folder / METRICS, rows, append=append)
