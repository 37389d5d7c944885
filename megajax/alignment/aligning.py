"""Temporary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from megajax.alignment.matching import Alignment
from megajax.alignment.matching import align as match
from megajax.alignment.symmetries import find_symmetries, verify
from megajax.config import AlignConfig
from megajax.errors import ConfigError
from megajax.program.batchnorm import find_statistics
from megajax.trees import keep_leaves, leaf_owners, leaf_paths
from megajax.types import ApplyFn, Key, PyTree


def align(
    key: Key,
    apply_fn: ApplyFn,
    parents: Sequence[PyTree],
    inputs: Any,
    calibration: Any | None = None,
    config: AlignConfig | None = None,
    *,
    keep: Mapping[str, int] | None = None,
) -> tuple[list[PyTree], Alignment | None]:
    """Temporary."""
    config = config or AlignConfig()
    if isinstance(config.reference, int) and config.reference >= len(parents):
        raise ConfigError(
            f"align.reference is {config.reference}: the parents are 0 to {len(parents) - 1}"
        )
    keep = keep or {}
    parents = keep_leaves(parents, keep)
    if config.method == "none":
        return parents, None
    symmetries = find_symmetries(apply_fn, parents[0], inputs)
    if not symmetries.groups:
        return parents, None
    verify_key, align_key = jax.random.split(key)
    verify(verify_key, symmetries, apply_fn, parents[0], inputs)
    kept = leaf_owners(leaf_paths(parents[0]), keep, len(parents))
    aligned, alignment = match(
        align_key,
        symmetries,
        parents,
        method=config.method,
        reference=config.reference,
        apply_fn=apply_fn,
        inputs=calibration,
        ignore=_statistics_paths(apply_fn, parents[0], inputs) | set(kept),
    )
    return keep_leaves(aligned, keep), alignment



def _statistics_paths(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> set[str]:
    paths = leaf_paths(variables)
    statistics = find_statistics(apply_fn, variables, inputs)
    return {paths[index] for s in statistics for index in (s.mean, s.variance)}
