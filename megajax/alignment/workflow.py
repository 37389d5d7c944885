"""What a user calls: the symmetries of a network are found, verified and used to match parents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax

from megajax.alignment.matching import Alignment, match
from megajax.alignment.symmetries import find_symmetries
from megajax.alignment.verification import verify
from megajax.entry import taken
from megajax.errors import ConfigError, DataError
from megajax.keys import as_key
from megajax.sections import Section, at_least, one_of
from megajax.trees import checked_parents, keep_leaves, leaf_owners, leaf_paths
from megajax.types import ApplyFn, Key, PyTree

__all__ = ["AlignConfig", "align", "as_align"]

METHODS = ("weights", "activations", "both", "none")
_ON_ACTIVATIONS = ("activations", "both")


class AlignConfig(Section):
    """How the parents' hidden units are brought into correspondence before the search.

    Attributes:
        method: `weights` (Git Re-Basin's weight matching), `activations` (correlations on the
            calibration inputs), `both` (activations, then weights from there) or `none`.
        reference: the number of the parent that the others are aligned to, or `mean` for their
            common mean.
    """

    section = "align"
    method: Annotated[str, one_of(METHODS)] = "weights"
    reference: Annotated[int, at_least(0)] | Annotated[str, one_of(("mean",))] = 0

    def _check(self) -> None:
        ok = self.reference != "mean" or self.method != "activations"
        self.require(ok, "reference", "only weights can be matched to a mean")


def as_align(align: AlignConfig | str) -> AlignConfig:
    """A section as it is, or that of a method.

    Example:
        >>> as_align("both") == AlignConfig(method="both")
        True
    """
    return AlignConfig(method=align) if isinstance(align, str) else align


def align(
    key: Key | int,
    apply_fn: ApplyFn,
    parents: Sequence[PyTree],
    inputs: Any,
    *,
    calibration: Any | None = None,
    config: AlignConfig | str | None = None,
    keep: Mapping[str, int] | None = None,
) -> tuple[list[PyTree], Alignment | None]:
    """Finds a network's symmetries and brings the parents' hidden units into correspondence.

    That the permuted parents are the same functions is verified on `inputs`. BatchNorm statistics
    move along and do not count.

    Args:
        key: PRNG key, or a whole number.
        apply_fn: the network.
        parents: K variable pytrees of one structure.
        inputs: one batch.
        calibration: training inputs, to match activations on.
        config: method and reference, or a method alone; None takes the defaults.
        keep: regular expression -> number of a parent: leaves that all parents have from this one.
            They do not count, and come out in the order of their own parent's hidden units.

    Returns:
        The aligned parents, and how they were permuted; with the method `none`, or for a network
        without symmetries, the parents as they are, and None.

    Raises:
        ConfigError: choices that cannot work.
        DataError: inputs are missing, not finite or do not fit, or something makes activations that
            are no numbers.
        ParentsError: the parents differ in structure.
        SymmetryError: a permuted network is not the same function.

    Example:
        >>> import jax.numpy as jnp
        >>> def mlp(w, x):
        ...     return jax.nn.relu(x @ w["u"]) @ w["v"]
        >>> net = {"u": jnp.array([[1.0, -1.0]]), "v": jnp.array([[1.0], [2.0]])}
        >>> swapped = {"u": net["u"][:, ::-1], "v": net["v"][::-1]}
        >>> (_, back), _ = align(jax.random.key(0), mlp, [net, swapped], jnp.ones((1, 1)))
        >>> back["u"].tolist()
        [[1.0, -1.0]]
    """
    key, config = as_key(key), as_align(config or AlignConfig())
    parents = checked_parents(parents, keep)
    _, inputs = taken(apply_fn, parents[0], inputs)
    if config.method in _ON_ACTIVATIONS and calibration is not None:
        _, calibration = taken(apply_fn, parents[0], calibration, "calibration inputs")
    return align_checked(
        key, apply_fn, parents, inputs, calibration=calibration, config=config, keep=keep
    )


def align_checked(
    key: Key,
    apply_fn: ApplyFn,
    parents: Sequence[PyTree],
    inputs: Any,
    *,
    calibration: Any | None,
    config: AlignConfig,
    keep: Mapping[str, int] | None,
) -> tuple[list[PyTree], Alignment | None]:
    """`align` of parents and inputs that are checked already."""
    if isinstance(config.reference, int) and config.reference >= len(parents):
        raise ConfigError(
            f"align.reference is {config.reference}: the parents are 0 to {len(parents) - 1}"
        )
    if config.method in _ON_ACTIVATIONS and calibration is None:
        raise DataError(f"calibration inputs are missing: align.method is {config.method!r}")
    keep = keep or {}
    parents = keep_leaves(parents, keep)
    if config.method == "none":
        return parents, None
    symmetries = find_symmetries(apply_fn, parents[0], inputs)
    if not symmetries.groups:
        return parents, None
    verify_key, match_key = jax.random.split(key)
    verify(verify_key, symmetries, apply_fn, parents[0], inputs)
    aligned, alignment = match(
        match_key,
        symmetries,
        parents,
        method=config.method,
        reference=config.reference,
        apply_fn=apply_fn,
        inputs=calibration,
        ignore={*symmetries.statistics, *leaf_owners(leaf_paths(parents[0]), keep, len(parents))},
    )
    return keep_leaves(aligned, keep), alignment
