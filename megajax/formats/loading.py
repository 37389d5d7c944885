"""Networks from files, whatever their format.

Opens the file, lets `naming` say which array becomes which leaf, and only then reads.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from megajax.errors import InterchangeError
from megajax.formats.adapters import expect, form_of, from_linen, from_nnx
from megajax.formats.arrays import Spec, Stored, is_number, native, nested, specs_of
from megajax.formats.kinds import open_network, read_arrays
from megajax.formats.layouts import from_file
from megajax.formats.mapping import NameMap
from megajax.formats.naming import find_mapping
from megajax.formats.state_dict import Layers
from megajax.formats.uses import find_modules
from megajax.trees import keep_leaves, leaf_owners, leaves_by_path
from megajax.types import ApplyFn, PyTree

__all__ = ["check_logits", "load_network", "load_parents", "map_names"]

_INFERENCE = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
}
_MOST_COMPRESSION = 1032


def load_network(
    path: Path | str,
    like: Any = None,
    *,
    inputs: Any = None,
    rename: Mapping[str, str] | None = None,
    ignore: str | None = None,
    cast: bool = False,
    logits: Any = None,
    tolerance: float = 1e-4,
) -> PyTree:
    """Loads a network from Flax msgpack, Orbax, safetensors or npz; also PyTorch's state dicts.

    Structure, shapes, dtypes and sizes are compared with `like` before anything is read, and no
    format that can hold code (a pickle) is ever opened.

    Args:
        path: a file (`.msgpack`, `.npz`, `.safetensors` or the index of several), an Orbax
            checkpoint's folder, or a folder that one of them is in, such as a run's `merged`.
        like: the network that the file holds: its variables (arrays, or their shapes and dtypes), a
            `Network`, a Linen module (with `inputs`) or an NNX model. Without it the result is
            made of dictionaries, and a state dict stays as it is.
        inputs: a batch of inputs, or its shape and dtype, images with channels last. Needed for a
            Linen module, to match a state dict, and to check `logits`.
        rename: names in the file, or regular expressions for the whole name, -> path of the leaf
            (groups as in `re.sub`), where the automatic match is not enough. The other tensors of
            a PyTorch module follow one that is renamed.
        ignore: regular expression; arrays whose name it matches (anywhere) are left out.
        cast: floating-point arrays may have another precision than their leaf, and are converted.
        logits: what the network gave for `inputs` where it came from, to check that it gives the
            same here.
        tolerance: largest difference of a logit.

    Returns:
        The variables in the structure of `like` (as from `from_nnx` for an NNX model), NumPy
        arrays.

    Raises:
        InterchangeError: the file cannot be read, is damaged, or does not hold this network; or it
            gives other logits. Names the file, and the leaf.

    Example:
        >>> import tempfile
        >>> from megajax import save_network
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = save_network(folder / "a.npz", {"layers": [{"w": np.eye(2)}]})
        >>> load_network(folder / "a.npz", like={"layers": [{"w": np.zeros((2, 2))}]})
        {'layers': [{'w': array([[1., 0.], [0., 1.]])}]}
        >>> load_network(folder / "a.npz", like={"layers": [{"w": np.zeros((2, 3))}]})
        Traceback (most recent call last):
        ...
        megajax.errors.InterchangeError: .../a.npz: leaf layers/0/w is float64[2,3] but
        float64[2,2] in the file
    """
    (network,) = load_parents(
        [path],
        like,
        inputs=inputs,
        rename=rename,
        ignore=ignore,
        cast=cast,
        logits=None if logits is None else [logits],
        tolerance=tolerance,
    )
    return network


def load_parents(
    paths: Sequence[Path | str],
    like: Any = None,
    *,
    inputs: Any = None,
    rename: Mapping[str, str] | None = None,
    ignore: str | None = None,
    cast: bool = False,
    keep: Mapping[str, int] | None = None,
    logits: Sequence[Any] | None = None,
    tolerance: float = 1e-4,
    callback: Callable[[NameMap], None] | None = None,
) -> list[PyTree]:
    """Loads the parents of a merge, each from any format; see `load_network`.

    Args:
        paths: one for each parent.
        like: the network that they all are.
        inputs: as for `load_network`, like `rename`, `ignore`, `cast` and `tolerance`.
        rename: names in the files -> paths of leaves.
        ignore: arrays that are left out.
        cast: whether the precision may be converted.
        keep: regular expression for paths -> number of the parent that those leaves come from. The
            other parents may have other shapes there, or nothing; they get that parent's leaves.
        logits: for each parent what it gave for `inputs`, or None.
        tolerance: largest difference of a logit.
        callback: called with each file's mapping before it is read, to print or keep it.

    Raises:
        InterchangeError: see `load_network`.
        ParentsError: `keep` matches no leaf, or names no parent.

    Example:
        >>> import tempfile
        >>> from megajax import save_network
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name, classes in (("a", 2), ("b", 5)):
        ...     _ = save_network(folder / name, {"body": np.ones(3), "head": np.ones(classes)})
        >>> like = {"body": np.ones(3), "head": np.ones(2)}
        >>> parents = load_parents([folder / "a", folder / "b"], like, keep={"head": 0})
        >>> parents[1]["head"].shape
        (2,)
    """
    if like is None:
        parents = [_as_stored(open_network(Path(path))) for path in paths]
        return keep_leaves(parents, keep) if keep else parents
    if logits is not None and len(logits) != len(paths):
        raise InterchangeError(f"logits of {len(logits)} parents are given, and {len(paths)} paths")
    apply_fn, variables, layers = _target(like, inputs)
    specs = specs_of(variables)
    owners = leaf_owners(list(specs), keep or {}, len(paths))
    loaded: list[dict[str, np.ndarray]] = []
    for k, path in enumerate(paths):
        stored = open_network(Path(path), _size(specs))
        free = {leaf for leaf, owner in owners.items() if owner != k}
        mapping = find_mapping(
            stored, specs, layers, rename=rename, ignore=ignore, cast=cast, free=free
        )
        if callback is not None:
            callback(mapping)
        loaded.append(_read(stored, mapping, specs, free))
    treedef = jax.tree.structure(variables)
    parents = [
        jax.tree.unflatten(treedef, [loaded[owners.get(leaf, k)][leaf] for leaf in specs])
        for k in range(len(paths))
    ]
    for parent, expected, path in zip(parents, logits or (), paths, strict=False):
        if expected is not None:
            if apply_fn is None or inputs is None:
                raise InterchangeError("logits can be checked with inputs and a module only")
            check_logits(apply_fn, parent, inputs, expected, tolerance=tolerance, name=str(path))
    return parents


def map_names(
    path: Path | str,
    like: Any,
    *,
    inputs: Any = None,
    rename: Mapping[str, str] | None = None,
    ignore: str | None = None,
    cast: bool = False,
) -> NameMap:
    """Which array of a file becomes which leaf, without reading the arrays.

    `print(mapping.describe())` shows it; `save_network(..., names=mapping)` writes a network with
    these names and layouts. The arguments and the errors are those of `load_network`.

    Example:
        >>> import tempfile
        >>> from megajax import Network, save_network
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = save_network(folder / "a.npz", {"0.weight": np.ones((8, 4))})
        >>> network = Network(lambda w, x: x @ w["w"], {"w": np.ones((4, 8))})
        >>> map_names(folder / "a.npz", network, inputs=np.ones((1, 4))).entries[0].layout.note
        'transposed'
    """
    _, variables, layers = _target(like, inputs)
    specs = specs_of(variables)
    stored = open_network(Path(path), _size(specs))
    return find_mapping(stored, specs, layers, rename=rename, ignore=ignore, cast=cast)


def check_logits(
    apply_fn: ApplyFn,
    variables: PyTree,
    inputs: Any,
    logits: Any,
    *,
    tolerance: float = 1e-4,
    name: str = "the network",
) -> float:
    """Compares a network's logits, or other outputs, with those it gave where it came from.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> logits`, in inference mode.
        variables: of the network.
        inputs: a batch.
        logits: what it gave for it: an array, or a pytree of arrays.
        tolerance: largest difference.
        name: what the network is called in the message.

    Returns:
        The largest difference.

    Raises:
        InterchangeError: it is larger than the tolerance; names the first logit that differs.

    Example:
        >>> check_logits(lambda w, x: x * w, 2.0, np.ones((1, 2)), np.array([[2.0, 2.5]]))
        Traceback (most recent call last):
        ...
        megajax.errors.InterchangeError: the network: logit [0, 1] is 2.0 here and 2.5 in the
        reference; the largest of 1 differences over 0.0001 is 0.5
    """
    ours = leaves_by_path(jax.jit(apply_fn)(variables, inputs))
    theirs = leaves_by_path(logits)
    if ours.keys() != theirs.keys():
        raise InterchangeError(f"{name}: outputs {[*ours]}, and {[*theirs]} in the reference")
    largest = 0.0
    for path, expected in theirs.items():
        here, there = (np.asarray(outputs, np.float64) for outputs in (ours[path], expected))
        of = f" of {path}" if path else ""
        if here.shape != there.shape:
            raise InterchangeError(
                f"{name}: the logits{of} have shape {here.shape}, those of the reference "
                f"{there.shape}"
            )
        with np.errstate(invalid="ignore"):  # where both are infinite
            most = float(np.nanmax(np.abs(here - there), initial=0.0))
        differs = ~np.isclose(here, there, rtol=0, atol=tolerance, equal_nan=True)
        if differs.any():
            at = tuple(int(i) for i in np.argwhere(differs)[0])
            raise InterchangeError(
                f"{name}: logit {list(at)}{of} is {here[at]:.6} here and {there[at]:.6} in the "
                f"reference; the largest of {int(differs.sum())} differences over {tolerance:g} is "
                f"{most:.3g}"
            )
        largest = max(largest, most)
    return largest


def _size(specs: Mapping[str, Spec]) -> int:
    return sum(spec.nbytes for spec in specs.values())


def _as_stored(stored: Stored) -> PyTree:
    """All arrays of a file, in dictionaries."""
    if stored.path.is_dir():  # Orbax has no limit: it stores no blocks of zeros
        on_disk = sum(at.stat().st_size for at in stored.path.rglob("*") if at.is_file())
        claimed = _size(stored.specs)
        if claimed > _MOST_COMPRESSION * on_disk:
            raise InterchangeError(
                f"{stored.path} has {on_disk} bytes and says it holds {claimed}: give like="
            )
    arrays = read_arrays(stored, list(stored.specs))
    return nested({tuple(name.split("/")): array for name, array in arrays.items()})


def _read(
    stored: Stored, mapping: NameMap, specs: Mapping[str, Spec], free: Collection[str]
) -> dict[str, np.ndarray]:
    """The leaves that are not free, in the dtypes of the network."""
    entries = [entry for entry in mapping.entries if entry.path not in free]
    arrays = read_arrays(stored, [entry.name for entry in entries])
    # Arrays without elements may be missing.
    leaves = {
        path: np.zeros(spec.shape, spec.dtype) for path, spec in specs.items() if not spec.nbytes
    }
    for name, path, layout in entries:
        leaf, dtype = native(from_file(layout, arrays[name])), specs[path].dtype
        bare = not is_number(leaf.dtype)  # bfloat16 and the like, as NumPy alone stores them
        leaves[path] = leaf.view(dtype) if bare else leaf.astype(dtype, copy=False)
    return leaves


def _target(like: Any, inputs: Any) -> tuple[ApplyFn | None, PyTree, Layers | None]:
    """The function and variables that `like` stands for, and what finds its layers."""
    form = form_of(like)
    if form == "an NNX model":
        network = from_nnx(like)
    elif form == "a Network":
        network = like
    elif form == "a Linen module":
        if inputs is None:
            raise InterchangeError("like is a Linen module: inputs= must be a batch of its inputs")
        parameters = inspect.signature(type(like).__call__).parameters
        inference: dict[str, Any] = {n: value for n, value in _INFERENCE.items() if n in parameters}
        init = functools.partial(like.init, **inference)
        variables = jax.eval_shape(init, jax.random.key(0), inputs)
        network = from_linen(like, variables, **inference)
    else:
        expect(like, "a pytree of arrays", "like")
        return None, like, None
    find = functools.cache(functools.partial(find_modules, *network, inputs))
    return *network, None if inputs is None else find
