"""Parents: K variable pytrees of one structure, checked, and stacked leaf by leaf to `[K, ...]`.

Knows pytrees and nothing of networks, masks or files.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megajax.errors import ParentsError
from megajax.types import PyTree

__all__ = [
    "Static",
    "check_parents",
    "checked_base",
    "checked_parents",
    "cosine",
    "described",
    "is_key",
    "is_mixable",
    "keep_leaves",
    "leaf_owners",
    "leaf_paths",
    "leaves_by_path",
    "not_finite",
    "on_host",
    "told",
    "unlike",
]


def leaf_paths(tree: PyTree) -> list[str]:
    """Paths of the leaves in flattening order, such as `params/Dense_0/kernel`.

    Example:
        >>> leaf_paths({"b": [1, 2], "a": 3})
        ['a', 'b/0', 'b/1']
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves by their paths, in flattening order.

    Example:
        >>> leaves_by_path({"params": {"kernel": 1, "bias": 2}})
        {'params/bias': 2, 'params/kernel': 1}
    """
    return dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def check_parents(parents: Sequence[PyTree]) -> None:
    """Checks that the parents can be mixed leaf by leaf.

    Args:
        parents: K >= 2 variable pytrees whose leaves are arrays or numbers.

    Raises:
        ParentsError: fewer than two parents, or none of a form that is one; a parent without
            leaves; a leaf that is not an array; leaves that are missing, or that have another shape
            or dtype than in parent 0 (all such leaves are named, with shapes and dtypes); a leaf
            with a value that is not finite.

    Example:
        >>> check_parents([{"w": np.zeros((2, 3))}, {"w": np.zeros((2, 4))}])
        Traceback (most recent call last):
        ...
        megajax.errors.ParentsError: leaf w: float64[2,3] in parent 0 but float64[2,4] in parent 1;
        keep={pattern: parent} can leave leaves to one parent
    """
    _check_forms(parents)
    leaves = [leaves_by_path(parent) for parent in parents]
    differing, shapes_differ = [], False
    for path in dict.fromkeys(path for of_one in leaves for path in of_one):
        first, *others = (described(of_one.get(path)) for of_one in leaves)
        unlike = [f"{it} in parent {k}" for k, it in enumerate(others, start=1) if it != first]
        shapes = {tuple(np.shape(of_one[path])) for of_one in leaves if path in of_one}
        shapes_differ = shapes_differ or len(shapes) > 1
        if unlike:
            differing.append(f"leaf {path}: {first} in parent 0 but {', '.join(unlike)}")
    if differing:
        hint = "; keep={pattern: parent} can leave leaves to one parent"
        raise ParentsError("; ".join(differing) + (hint if shapes_differ else ""))
    for k, parent in enumerate(parents[1:], start=1):
        found, wanted = (str(jax.tree.structure(tree)) for tree in (parent, parents[0]))
        if found != wanted:
            raise ParentsError(
                f"parent {k} has the leaves of parent 0 in other containers: "
                f"{found} instead of {wanted}"
            )
    for k, of_one in enumerate(leaves):
        for path, leaf in of_one.items():
            bad = not_finite(leaf) if is_mixable(leaf) else 0
            if bad:
                raise ParentsError(
                    f"leaf {path} of parent {k}: {bad} of {np.size(leaf)} values are not finite"
                )


def checked_parents(
    parents: Sequence[PyTree], keep: Mapping[str, int] | None = None
) -> list[PyTree]:
    """The parents on the host, checked, with the leaves that are left to one of them.

    Example:
        >>> checked_parents([{"w": 1.0}, {"w": 2.0}])
        [{'w': array(1.)}, {'w': array(2.)}]
    """
    _check_forms(parents)
    parents = keep_leaves(parents, keep) if keep else parents
    check_parents(parents)
    return [on_host(parent) for parent in parents]


def checked_base(base: PyTree, parent: PyTree) -> PyTree:
    """The network that the parents were trained from on the host, checked against one of them.

    Example:
        >>> checked_base({"w": 1.0}, {"w": 2.0})
        {'w': array(1.)}
    """
    try:
        check_parents([parent, base])
    except ParentsError as error:
        raise ParentsError(f"the base network (as parent 1) does not fit: {error}") from None
    return on_host(base)


def _check_forms(parents: Any) -> None:
    """Checks that there are several pytrees of arrays, before any of them is looked into."""
    if not isinstance(parents, (list, tuple)) or hasattr(parents, "_fields"):
        raise ParentsError(
            f"parents is a {type(parents).__name__}: a list of variable pytrees is needed"
        )
    if len(parents) < 2:
        raise ParentsError(f"{len(parents)} parent given: a merge needs at least two")
    for k, parent in enumerate(parents):
        if hasattr(parent, "apply_fn") and hasattr(parent, "variables"):
            raise ParentsError(f"parent {k} is a Network: give its .variables")
        leaves = leaves_by_path(parent)
        if not leaves:
            raise ParentsError(f"parent {k} has no leaves: its variables are empty")
        for path, leaf in leaves.items():
            dtype = getattr(leaf, "dtype", None) if hasattr(leaf, "shape") else None
            kinds = (np.number, np.bool_, jax.dtypes.prng_key)
            array = dtype is not None and any(jnp.issubdtype(dtype, kind) for kind in kinds)
            if array or isinstance(leaf, (bool, int, float, complex)):
                continue
            hint = "; of a Flax NNX model take mj.from_nnx(model).variables" if not path else ""
            kind = type(leaf).__name__ + (f" of {dtype}" if dtype is not None else "")
            raise ParentsError(
                f"leaf {path or '(the whole tree)'} of parent {k} is a {kind}: "
                f"arrays or numbers are needed{hint}"
            )


def is_mixable(leaf: Any) -> bool:
    """Whether a leaf holds real or complex floating-point numbers, which alone can be mixed.

    Integers, booleans, PRNG keys and 8-bit floats are taken over from one parent as they are.

    Example:
        >>> is_mixable(np.zeros(3)), is_mixable(np.zeros(3, int)), is_mixable(1.5)
        (True, False, True)
    """
    dtype = jnp.result_type(leaf) if isinstance(leaf, (int, float, complex)) else leaf.dtype
    return bool(jnp.issubdtype(dtype, jnp.inexact)) and (
        dtype.itemsize > 1 or jnp.issubdtype(dtype, jnp.complexfloating)
    )


def not_finite(leaf: Any) -> int:
    """How many numbers of a floating-point array are not finite as a device holds them.

    Example:
        >>> not_finite(np.array([1.0, np.nan, 1e300]))  # the last is for 64 bits
        2
    """
    values = np.asarray(leaf)
    with np.errstate(over="ignore"):
        held = values.astype(jax.dtypes.canonicalize_dtype(values.dtype))
    wide = np.complex128 if np.iscomplexobj(held) else np.float64
    return values.size - int(np.isfinite(held.astype(wide)).sum())


def on_host(tree: PyTree) -> PyTree:
    """A pytree with NumPy arrays, wherever its arrays were; PRNG keys stay what they are.

    Example:
        >>> on_host({"n": 3, "w": jnp.ones(2)})
        {'n': array(3), 'w': array([1., 1.], dtype=float32)}
    """
    return jax.tree.map(lambda leaf: leaf if is_key(leaf) else np.asarray(leaf), tree)


def is_key(leaf: Any) -> bool:
    """Whether a leaf holds typed PRNG keys.

    Example:
        >>> is_key(jax.random.key(0)), is_key(jax.random.PRNGKey(0)), is_key(1.5)
        (True, False, False)
    """
    return bool(jnp.issubdtype(getattr(leaf, "dtype", bool), jax.dtypes.prng_key))


def described(leaf: Any) -> str:
    """The dtype and shape of one leaf in words; of None, that there is no such leaf.

    Example:
        >>> described(np.zeros((2, 3)))
        'float64[2,3]'
    """
    if leaf is None:
        return "no such leaf"
    array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def told(tree: PyTree) -> PyTree:
    """The dtypes and shapes of a pytree's leaves in words.

    Example:
        >>> told({"w": np.zeros((2, 3))})
        {'w': 'float64[2, 3]'}
    """
    return jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree)


def unlike(there: PyTree, here: PyTree) -> Iterator[tuple[str, str, str]]:
    """Leaves in which two pytrees differ in shape or dtype: their paths, and both in words.

    Example:
        >>> list(unlike({"v": np.zeros(2)}, {"w": 1.5}))
        [('w', 'absent', 'float64[]'), ('v', 'float64[2]', 'absent')]
    """

    def words(leaf: Any) -> Any:
        return told(leaf if hasattr(leaf, "dtype") else np.asarray(leaf))

    theirs, ours = leaves_by_path(there), leaves_by_path(here)
    for path in {**ours, **theirs}:
        one, other = (words(side[path]) if path in side else "absent" for side in (theirs, ours))
        if one != other:
            yield path, one, other


def cosine(networks: Sequence[PyTree], places: Collection[int]) -> float:
    """The cosine of the angle between networks, mean over their pairs.

    Args:
        networks: at least two.
        places: of the leaves that count, in flattening order.

    Example:
        >>> cosine([{"w": np.array([1.0, 0.0])}, {"w": np.array([3.0, 4.0])}], [0])
        0.6
    """
    leaves = [jax.tree.leaves(network) for network in networks]
    flat = [np.concatenate([np.ravel(x[i]).astype(np.float64) for i in places]) for x in leaves]
    least = np.finfo(np.float64).tiny
    pairs = itertools.combinations(flat, 2)
    return float(np.mean([a @ b / max(np.sqrt((a @ a) * (b @ b)), least) for a, b in pairs]))


class Static:
    """A pytree of NumPy arrays as a value: hashable, and equal to others with the same content.

    For what belongs to a compiled program and is data all the same, such as the genes' places.

    Attributes:
        tree: the pytree.

    Example:
        >>> Static({"a": np.arange(2)}) == Static({"a": np.arange(2)})
        True
    """

    def __init__(self, tree: PyTree) -> None:
        self.tree = jax.tree.map(np.asarray, tree)
        digest = hashlib.sha256(str(jax.tree.structure(self.tree)).encode())
        for leaf in jax.tree.leaves(self.tree):
            digest.update(f"{leaf.dtype}{leaf.shape}".encode())
            digest.update(np.ascontiguousarray(leaf).tobytes())
        self._digest = digest.digest()

    def __hash__(self) -> int:
        return hash(self._digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self._digest == other._digest


def leaf_owners(paths: Sequence[str], keep: Mapping[str, int], num: int) -> dict[str, int]:
    """Which leaves are left to one parent.

    Args:
        paths: of the leaves.
        keep: regular expression -> number of a parent; leaves whose path it matches (anywhere) are
            that parent's alone.
        num: the number of parents K.

    Returns:
        Path -> number of the parent, for those leaves.

    Raises:
        ParentsError: a pattern is none, matches no leaf or a leaf of another pattern's parent; or
            there is no such parent.

    Example:
        >>> leaf_owners(["body/w", "head/w"], {"head": 1}, num=2)
        {'head/w': 1}
    """
    owners: dict[str, int] = {}
    for pattern, k in keep.items():
        if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < num:
            raise ParentsError(f"keep {pattern!r} is {k!r}: the parents are 0 to {num - 1}")
        try:
            matches = [path for path in paths if re.search(pattern, path)]
        except re.error as error:
            raise ParentsError(f"keep {pattern!r} is not a regular expression: {error}") from None
        if not matches:
            example = f", such as {paths[0]}" if paths else ""
            raise ParentsError(f"keep {pattern!r} matches no leaf{example}")
        for path in matches:
            if owners.setdefault(path, k) != k:
                raise ParentsError(f"keep gives leaf {path} to both parent {owners[path]} and {k}")
    return owners


def keep_leaves(parents: Sequence[PyTree], keep: Mapping[str, int]) -> list[PyTree]:
    """Leaves some leaves to one parent: all parents then have that parent's there.

    So parents that differ in these leaves only, such as in the number of classes, fit together.

    Args:
        parents: K variable pytrees.
        keep: regular expression for paths -> number of the parent; see `leaf_owners`.

    Returns:
        The parents with those leaves replaced; a parent that lacks one still does.

    Raises:
        ParentsError: see `leaf_owners`; the parent that a leaf is left to has no such leaf.

    Example:
        >>> first, second = {"w": 1, "head": 2}, {"w": 3, "head": 4}
        >>> keep_leaves([first, second], {"head": 1})
        [{'head': 4, 'w': 1}, {'head': 4, 'w': 3}]
    """
    leaves = [leaves_by_path(parent) for parent in parents]
    paths = list(dict.fromkeys(path for of_one in leaves for path in of_one))
    owners = leaf_owners(paths, keep, len(parents))
    for path, k in owners.items():
        if path not in leaves[k]:
            raise ParentsError(f"leaf {path} is left to parent {k}, which has no such leaf")
    return [
        jax.tree.unflatten(
            jax.tree.structure(parent),
            [leaves[owners[p]][p] if p in owners else leaf for p, leaf in of_one.items()],
        )
        for parent, of_one in zip(parents, leaves, strict=True)
    ]
