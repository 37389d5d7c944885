"""Networks to and from files, whatever their format: what users call.

Finds the format, lets `matching` say which array becomes which leaf, and only then reads.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

from megajax.errors import InterchangeError
from megajax.formats import msgpack, npz, orbax, safetensors
from megajax.formats.adapters import Network, from_linen, from_nnx
from megajax.formats.files import Stored, check_sums, remove_sums, write_sums
from megajax.formats.layouts import from_file, to_file
from megajax.formats.mapping import NameMap, Target
from megajax.formats.matching import find_mapping
from megajax.formats.trees import arrays_of, is_number, keys_of, native, nested, specs_of
from megajax.formats.uses import find_modules
from megajax.trees import keep_leaves, leaf_owners
from megajax.types import ApplyFn, PyTree

__all__ = ["FORMATS", "check_logits", "load_network", "load_parents", "map_names", "save_network"]

FORMATS = {
    "msgpack": "variables.msgpack",
    "safetensors": "model.safetensors",
    "npz": "variables.npz",
    "orbax": "orbax",
}
"""The formats, and what a network is called in a folder."""

_SUFFIXES = {f".{name}": name for name in ("msgpack", "safetensors", "npz")}
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".joblib")
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
        path: a file (`.msgpack`, `.safetensors`, `.npz`), an Orbax checkpoint's folder, or a folder
            that one of them is in, such as a run's `merged`.
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
        logits: `[b, C]`, what the network gave for `inputs` where it came from, to check that it
            gives the same here.
        tolerance: largest difference of a logit.

    Returns:
        The variables in the structure of `like` (as from `from_nnx` for an NNX model), NumPy
        arrays.

    Raises:
        InterchangeError: the file cannot be read, is damaged, or does not hold this network; or it
            gives other logits. Names the file, and the leaf.

    Example:
        >>> import tempfile
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
    """Loads parents for a merge, each from any format.

    Args:
        paths: one for each parent; see `load_network`, also for what is not described here.
        like: the network that they all are.
        inputs: a batch of inputs.
        rename: names in the files -> paths of leaves.
        ignore: arrays that are left out.
        cast: whether the precision may be converted.
        keep: regular expression for paths -> number of the parent that those leaves come from. The
            other parents may have other shapes there, or nothing; they get that parent's leaves.
        logits: for each parent `[b, C]`, or None, what it gave for `inputs`.
        tolerance: largest difference of a logit.
        callback: called with each file's mapping before it is read, to print or keep it.

    Returns:
        The variables of each parent.

    Raises:
        InterchangeError: see `load_network`.
        ParentsError: `keep` matches no leaf, or names no parent.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name, classes in (("a", 2), ("b", 5)):
        ...     _ = save_network(folder / name, {"body": np.ones(3), "head": np.ones(classes)})
        >>> like = {"body": np.ones(3), "head": np.ones(2)}
        >>> parents = load_parents([folder / "a", folder / "b"], like, keep={"head": 0})
        >>> parents[1]["head"].shape
        (2,)
    """
    if like is None:
        parents = [_as_stored(_opened(Path(path))) for path in paths]
        return keep_leaves(parents, keep) if keep else parents
    if logits is not None and len(logits) != len(paths):
        raise InterchangeError(f"logits of {len(logits)} parents are given, and {len(paths)} paths")
    network, target = _target(like, inputs)
    specs = specs_of(target.variables)
    owners = leaf_owners(list(specs), keep or {}, len(paths))
    nbytes = sum(spec.nbytes for spec in specs.values())
    loaded: list[dict[str, np.ndarray]] = []
    for k, path in enumerate(paths):
        stored = _opened(Path(path), nbytes)
        free = {leaf for leaf, owner in owners.items() if owner != k}
        mapping = find_mapping(stored, target, rename=rename, ignore=ignore, cast=cast, free=free)
        if callback is not None:
            callback(mapping)
        loaded.append(_read(stored, mapping, target, free))
    treedef = jax.tree.structure(target.variables)
    parents = []
    for leaves in loaded:
        whole = [loaded[owners[leaf]][leaf] if leaf in owners else leaves[leaf] for leaf in specs]
        parents.append(jax.tree.unflatten(treedef, whole))
    for k, expected in enumerate(logits or []):
        if expected is not None:
            if network is None or inputs is None:
                raise InterchangeError("logits can be checked with inputs and a module only")
            check_logits(
                network, parents[k], inputs, expected, tolerance=tolerance, name=str(paths[k])
            )
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

    Args:
        path: of the file; see `load_network`, also for all else.
        like: the network that it holds.
        inputs: a batch of inputs.
        rename: names in the file -> paths of leaves.
        ignore: arrays that are left out.
        cast: whether the precision may be converted.

    Returns:
        The mapping: `print(mapping.describe())`; `save_network(..., names=mapping)` writes a
        network with these names and layouts.

    Raises:
        InterchangeError: see `load_network`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = save_network(folder / "a.npz", {"0.weight": np.ones((8, 4))})
        >>> network = Network(lambda w, x: x @ w["w"], {"w": np.ones((4, 8))})
        >>> map_names(folder / "a.npz", network, inputs=np.ones((1, 4))).entries[0].layout.note
        'transposed'
    """
    _, target = _target(like, inputs)
    nbytes = sum(spec.nbytes for spec in specs_of(target.variables).values())
    return find_mapping(
        _opened(Path(path), nbytes), target, rename=rename, ignore=ignore, cast=cast
    )


def check_logits(
    apply_fn: ApplyFn,
    variables: PyTree,
    inputs: Any,
    logits: Any,
    *,
    tolerance: float = 1e-4,
    name: str = "the network",
) -> float:
    """Compares a network's logits with those it gave where it came from.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> logits`, in inference mode.
        variables: of the network.
        inputs: a batch `[b, ...]`.
        logits: `[b, C]`.
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
    found = np.asarray(jax.jit(apply_fn)(variables, inputs), np.float64)
    expected = np.asarray(logits, np.float64)
    if found.shape != expected.shape:
        raise InterchangeError(
            f"{name}: the logits have shape {found.shape}, those of the reference {expected.shape}"
        )
    difference = np.abs(found - expected)
    difference[(found == expected) | (np.isnan(found) & np.isnan(expected))] = 0.0
    differs = ~(difference <= tolerance)
    if differs.any():
        first = tuple(int(i) for i in np.argwhere(differs)[0])
        raise InterchangeError(
            f"{name}: logit {list(first)} is {found[first]:.6} here and {expected[first]:.6} in "
            f"the reference; the largest of {int(differs.sum())} differences over {tolerance:g} is "
            f"{np.nanmax(difference):.3g}"
        )
    return float(difference.max(initial=0.0))


def save_network(
    path: Path | str,
    variables: PyTree,
    *,
    format: str | None = None,
    names: NameMap | None = None,
) -> Path:
    """Saves a network, whole or not at all, and its SHA-256 beside it.

    Args:
        path: a file whose suffix says the format, the folder of an Orbax checkpoint, or any other
            folder, which then holds the file (`variables.msgpack`, ...).
        variables: pytree of arrays.
        format: `msgpack`, `safetensors`, `npz` or `orbax`; None takes the suffix's, and `msgpack`
            for a folder.
        names: names and layouts of another file, from `map_names`, to write the same here; for
            safetensors and npz. Tensors of that file that no leaf took are copied from it.

    Returns:
        The path of the file (for Orbax, of the folder).

    Raises:
        InterchangeError: it cannot be written, or the format has not the dtype of a leaf.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_network(folder, {"w": np.ones(2)}).name
        'variables.msgpack'
        >>> load_network(folder)
        {'w': array([1., 1.])}
    """
    path = Path(path)
    suffix = _SUFFIXES.get(path.suffix)
    kind = format or suffix or "msgpack"
    if kind not in FORMATS:
        raise InterchangeError(f"format {kind!r} is unknown: choose one of {', '.join(FORMATS)}")
    if suffix is not None and suffix != kind:
        raise InterchangeError(f"{path} says {suffix} by its suffix, and the format is {kind}")
    if names is not None and kind not in ("safetensors", "npz"):
        raise InterchangeError(f"names of {names.file} can be written to safetensors and npz only")
    file = path if suffix or kind == "orbax" else path / FORMATS[kind]
    arrays = arrays_of(variables)
    keyed = dict(zip(keys_of(variables), arrays.values(), strict=True))
    if names is not None:
        keyed = {(name,): array for name, array in _named(arrays, names).items()}
    if kind == "orbax":
        orbax.write_orbax(file, keyed)
        return file
    write = {
        "msgpack": msgpack.write_msgpack,
        "safetensors": safetensors.write_safetensors,
        "npz": npz.write_npz,
    }[kind]
    remove_sums(file)
    write(file, keyed)
    write_sums(file)
    return file


def _opened(path: Path, nbytes: int | None = None) -> Stored:
    """Opens a file or folder of any format; `nbytes` is the size of the network."""
    try:
        return _found(path, nbytes)
    except OSError as error:  # on the way to it; the formats say what is wrong with the file
        raise InterchangeError(f"{path} cannot be read: {error.strerror or error}") from None


def _found(path: Path, nbytes: int | None) -> Stored:
    if path.is_dir() and not orbax.is_orbax(path):
        inside = [path / name for name in FORMATS.values() if (path / name).exists()]
        if inside:
            return _found(inside[0], nbytes)
        steps = sorted(at.name for at in path.iterdir() if at.is_dir() and orbax.is_orbax(at))
        hint = f"; choose one of its steps {', '.join(steps)}" if steps else ""
        raise InterchangeError(f"{path} holds none of {', '.join(FORMATS.values())}{hint}")
    if not path.exists():
        raise InterchangeError(f"{path} does not exist")
    if path.suffix in _PICKLES and path.is_file():
        raise InterchangeError(
            f"{path} is a pickle, which can run any code and is never loaded: where it was made, "
            "write safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        )
    kind = "orbax" if path.is_dir() else _SUFFIXES.get(path.suffix)
    if kind is None:
        raise InterchangeError(
            f"{path} has no known format: {', '.join(_SUFFIXES)} and folders of Orbax are read"
        )
    check_sums(path)
    if kind == "msgpack":
        stored = msgpack.open_msgpack(path, nbytes)
    elif kind == "npz":
        stored = npz.open_npz(path)
    elif kind == "safetensors":
        stored = safetensors.open_safetensors(path)
    else:
        stored = orbax.open_orbax(path)
    return stored


def _as_stored(stored: Stored) -> PyTree:
    """All arrays of a file, in dictionaries; their sizes must be likely for a file of its size."""
    files = stored.path.rglob("*") if stored.path.is_dir() else [stored.path]
    on_disk = sum(file.stat().st_size for file in files if file.is_file())
    claimed = sum(spec.nbytes for spec in stored.specs.values())
    if claimed > _MOST_COMPRESSION * on_disk:
        raise InterchangeError(
            f"{stored.path} has {on_disk} bytes and says it holds {claimed}: give like="
        )
    for name, spec in stored.specs.items():
        if spec.dtype.hasobject:
            raise InterchangeError(f"{stored.path}: {name} is no array")
    arrays = _checked(stored, list(stored.specs))
    return nested({tuple(name.split("/")): array for name, array in arrays.items()})


def _checked(stored: Stored, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads arrays, which must be what the file said."""
    arrays = stored.read(names)
    for name, array in arrays.items():
        spec = stored.specs[name]
        if array.shape != spec.shape or array.dtype != spec.dtype:
            raise InterchangeError(f"{stored.path} is damaged: {name} is not {spec}")
    return arrays


def _read(
    stored: Stored, mapping: NameMap, target: Target, free: Collection[str]
) -> dict[str, np.ndarray]:
    """The leaves that are not free, in the dtypes of the network."""
    specs = specs_of(target.variables)
    entries = [entry for entry in mapping.entries if entry.path not in free]
    arrays = _checked(stored, [entry.name for entry in entries])
    # Arrays without elements may be missing.
    leaves = {
        path: np.zeros(spec.shape, spec.dtype) for path, spec in specs.items() if not spec.nbytes
    }
    for name, path, layout in entries:
        leaf, dtype = native(from_file(layout, arrays[name])), specs[path].dtype
        bare = not is_number(leaf.dtype)  # bfloat16 and the like, as NumPy alone stores them
        leaves[path] = leaf.view(dtype) if bare else leaf.astype(dtype, copy=False)
    return leaves


def _named(arrays: Mapping[str, np.ndarray], names: NameMap) -> dict[str, np.ndarray]:
    """Arrays by the names and in the layouts of another file."""
    lacking = set(arrays) - {entry.path for entry in names.entries}
    if lacking:
        raise InterchangeError(f"leaf {min(lacking)} has no name in {names.file}")
    named = {}
    for name, path, layout in names.entries:
        if path not in arrays or arrays[path].shape != layout.shape:
            raise InterchangeError(f"leaf {path} is not as {names.file} has it")
        named[name] = to_file(layout, arrays[path])
    if names.ignored:
        named |= _checked(_opened(Path(names.file)), names.ignored)
    return named


def _target(like: Any, inputs: Any) -> tuple[ApplyFn | None, Target]:
    """The network that `like` stands for, and what a file is matched to."""
    if isinstance(like, nnx.Module):
        network = from_nnx(like)
    elif isinstance(like, Network):
        network = like
    elif isinstance(like, nn.Module):
        if inputs is None:
            raise InterchangeError("like is a Linen module: inputs= must be a batch of its inputs")
        parameters = inspect.signature(type(like).__call__).parameters
        inference: dict[str, Any] = {n: value for n, value in _INFERENCE.items() if n in parameters}
        variables = jax.eval_shape(
            lambda key, x: like.init(key, x, **inference), jax.random.key(0), inputs
        )
        network = from_linen(like, variables, **inference)
    else:
        return None, Target(like)
    layers = None
    if inputs is not None:
        layers = functools.cache(lambda: find_modules(*network, inputs))
    return network.apply_fn, Target(network.variables, layers)
