"""Whether parents fit together, told in seconds and before anything is searched."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from megajax.alignment import AlignConfig, align
from megajax.entry import check_inputs
from megajax.errors import ConfigError
from megajax.evaluation.measures import Kind, mean_prediction, predict
from megajax.evaluation.robustness import calibration_error
from megajax.merging.merge import first_examples
from megajax.merging.metrics import METRICS
from megajax.merging.tasks import as_tasks, check_task, score_of
from megajax.program.batchnorm import recalibrate
from megajax.program.roles import find_roles
from megajax.trees import check_parents, checked_parents, cosine, is_mixable, leaf_paths, on_host
from megajax.types import ApplyFn, Key, PyTree

__all__ = ["Diagnosis", "diagnose"]

_GONE, _SAME, _RELATED = 0.02, 0.995, 0.5
_ACCURACIES = {"cross_entropy": "accuracy", "binary_cross_entropy": "binary_accuracy"}


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What is known of parents before a search; printed, it is a table for people.

    Attributes:
        metric: of all scores: accuracy where the targets are classes.
        parents: score of each.
        ensemble: score of their mean prediction.
        midpoints: score of their mean: `as they are`, `aligned` (where the network has symmetries)
            and `recalibrated` (where it has BatchNorm; aligned, too).
        agreement: share of predictions that two of them have in common; None without classes.
        calibration_error: of each; None without one class for an example.
        similarity: path of a layer's kernel -> cosine of two parents' kernels, once aligned.
        cosine: of all kernels as they are: about 0 for independent parents.
        same_base: whether they come from one base, to judge by cosines.
    """

    metric: str
    parents: tuple[float, ...]
    ensemble: float
    midpoints: dict[str, float]
    agreement: float | None
    calibration_error: tuple[float, ...] | None
    similarity: dict[str, float]
    cosine: float
    same_base: bool

    @property
    def barriers(self) -> dict[str, float]:
        """How far each midpoint is below the parents' mean score."""
        return {name: float(np.mean(self.parents)) - x for name, x in self.midpoints.items()}

    @property
    def advice(self) -> str:
        """Which method fits, in words."""
        if self.agreement is not None and self.agreement >= _SAME:
            return "agree on everything: nothing to gain"
        size = max(abs(float(np.mean(self.parents))), 1e-12)
        lost = {name: barrier / size for name, barrier in self.barriers.items()}
        least = min(lost.values())
        best = next(name for name in lost if lost[name] <= least + _GONE)
        if least <= _GONE and best == "as they are":
            how = "task vectors or masks" if self.same_base else "masks"
            return f"no barrier: {how} between the parents as they are"
        if least <= _GONE:
            more = {"recalibrated": (" and recalibration", ", `recalibrate` on")}
            by, how = more.get(best, ("", ""))
            return f"barrier gone after alignment{by}: masks between aligned parents{how}"
        if "aligned" not in lost:
            return "no symmetry and a large barrier: distil or choose the better one"
        if least <= 0.25:
            return f"a barrier of {least:.0%} is left ({best}): masks by gradient, or distil"
        return "a large barrier stays: distil or choose the better one"

    def __repr__(self) -> str:
        rows: dict[str, Any] = {self.metric: self.parents, "ensemble": self.ensemble}
        for name, score in self.midpoints.items():
            rows[f"midpoint {name}"] = f"{score:.3f}, barrier {self.barriers[name]:.3f}"
        rows |= {"agreement": self.agreement, "calibration error": self.calibration_error}
        origin = "of one base" if self.same_base else "independent"
        rows["weights"] = f"{origin}: cosine {self.cosine:.2f}"
        rows |= {f"aligned {path}": one for path, one in self.similarity.items()}
        width = max(map(len, rows))
        lines = (f"{name:{width}}  {_text(row)}" for name, row in rows.items() if row is not None)
        return "\n".join([*lines, f"-> {self.advice}"])


def diagnose(
    key: Key | int,
    apply_fn: ApplyFn,
    parents: Sequence[PyTree],
    data: Any,
    *,
    calibration: PyTree | None = None,
    base: PyTree | None = None,
) -> Diagnosis:
    """Tells whether parents fit together, and which method of merging fits them.

    Args:
        key: PRNG key, or a whole number.
        apply_fn: the network, in inference mode; this and the others as for `megajax.merge`.
        parents: K >= 2 variable pytrees of one structure.
        data: validation inputs and targets, or one `Task`.
        calibration: training inputs to align and measure statistics on (the first 512); None takes
            those of `data`.
        base: the network that the parents were trained from, if there is one.

    Example:
        >>> parents = [np.diag(np.float32(d)) for d in ([1, 1, 0.1], [0.1, 1, 1])]
        >>> data = np.eye(3, dtype=np.float32), np.arange(3)
        >>> diagnose(jax.random.key(0), lambda w, x: x @ w, parents, data).advice
        'agree on everything: nothing to gain'
    """
    networks, tasks = checked_parents(parents), as_tasks(data)
    if len(tasks) > 1:
        raise ConfigError(f"data holds {len(tasks)} tasks: a diagnosis takes one")
    task = check_task(tasks[0], apply_fn, networks[0])
    apply_fn, metric = task.apply_fn or apply_fn, METRICS.get(_ACCURACIES.get(task.metric.name, ""))
    task = task if metric is None or tasks[0].metric else task._replace(metric=metric)
    examples = task.inputs if calibration is None else on_host(calibration)
    check_inputs(examples, "calibration inputs", 2)
    examples, few = jax.tree.map(lambda x: x[:512], examples), first_examples(task.inputs)
    both = AlignConfig(method="both")
    aligned, alignment = align(key, apply_fn, networks, few, calibration=examples, config=both)
    roles = find_roles(apply_fn, networks[0], few)
    middles = {"as they are": _mean(networks)}
    if alignment is not None:
        middles["aligned"] = _mean(aligned)
    if roles.statistics:
        middles["recalibrated"] = recalibrate(apply_fn, _mean(aligned), examples)

    def outputs_of(network: PyTree) -> Any:
        return predict(apply_fn, network, task.inputs)

    outputs = [outputs_of(network) for network in networks]
    kind: Kind = task.metric.kind or "values"
    classes = kind == "classes"
    chosen = [one.argmax(-1) for one in outputs] if classes else []
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *outputs)
    mean = mean_prediction(stacked, kind)
    plain = classes and outputs[0].ndim == 2 and getattr(task.targets, "ndim", 0) == 1
    leaves, paths = jax.tree.leaves(networks[0]), leaf_paths(networks[0])
    mixed = [i for i, leaf in enumerate(leaves) if is_mixable(leaf)]
    kernels = [i for i in mixed if np.ndim(leaves[i]) > 1] or mixed
    kernels.sort(key=lambda i: roles.leaves[i].layer)
    angle = cosine(networks, kernels)
    if base is not None:
        check_parents([networks[0], base])
    sources = [cosine([base, one], kernels) for one in networks] if base is not None else [angle]
    pairs = itertools.combinations(chosen, 2)
    return Diagnosis(
        metric=task.metric.name,
        parents=tuple(score_of(task, one) for one in outputs),
        ensemble=score_of(task, mean),
        midpoints={name: score_of(task, outputs_of(one)) for name, one in middles.items()},
        agreement=float(np.mean([a == b for a, b in pairs])) if classes else None,
        calibration_error=tuple(calibration_error(one, task.targets) for one in outputs)
        if plain
        else None,
        similarity={paths[i]: cosine(aligned, [i]) for i in kernels},
        cosine=angle,
        same_base=min(sources) > _RELATED,
    )


def _text(row: Any) -> str:
    return row if isinstance(row, str) else ", ".join(f"{x:.3f}" for x in np.ravel(row))


def _mean(networks: Sequence[PyTree]) -> PyTree:
    def mean(first: Any, *others: Any) -> Any:
        if not is_mixable(first):
            return first
        wide = np.promote_types(first.dtype, np.float32)
        return np.mean([first, *others], axis=0, dtype=wide).astype(first.dtype)

    return jax.tree.map(mean, *networks)
