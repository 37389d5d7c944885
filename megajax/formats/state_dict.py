"""PyTorch's state dicts: their modules are matched to the layers of a program.

A module's tensors must have the shapes that a layer's leaves have in PyTorch's layout, and the
order of the modules must be that of the program. What fits in more than one way is an error that
lists the candidates, never a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from megajax.errors import InterchangeError
from megajax.formats.arrays import Spec, Stored
from megajax.formats.layouts import as_is
from megajax.formats.mapping import Entry, dims, some
from megajax.formats.ordering import orders
from megajax.formats.uses import Slot

__all__ = ["Layers", "is_state_dict", "match_state_dict"]

Layers: TypeAlias = Callable[[], Sequence[tuple[Slot, ...]]]

_TENSORS = ("weight", "bias", "running_mean", "running_var")
_COUNTER = "num_batches_tracked"  # of BatchNorm: it plays no part in inference


def is_state_dict(names: Collection[str], paths: Collection[str] = ()) -> bool:
    """Whether names are those of a state dict: dotted, ending in `weight` and the like.

    Args:
        names: of the arrays in a file.
        paths: of our leaves; names of which most are just these are not a state dict's.

    Example:
        >>> is_state_dict(["fc.weight", "fc.bias"]), is_state_dict(["params/fc/kernel"])
        (True, False)
        >>> is_state_dict(["scale", "bias"], paths=["scale", "bias"])
        False
    """
    slashes = any("/" in name for name in names)
    ours = 2 * sum(name in paths for name in names) >= len(names)
    return not (slashes or ours) and any(name.rpartition(".")[2] in _TENSORS for name in names)


def match_state_dict(
    stored: Stored,
    find_layers: Layers | None,
    names: Sequence[str],
    renamed: Mapping[str, str],
    wanted: Mapping[str, Spec],
    free: Collection[str] = (),
) -> list[Entry]:
    """Matches the modules of a state dict to the layers of a program.

    Args:
        stored: the opened file.
        find_layers: finds the layers, in the order of the program; None if there is no program.
        names: the tensors of the file that count.
        renamed: tensors -> paths of the leaves that the user says they are.
        wanted: path -> shape and dtype of every leaf, in flattening order.
        free: paths of leaves that may have other shapes in the file, or be missing there.

    Returns:
        An entry for each leaf, in flattening order; a free leaf may have none.

    Raises:
        InterchangeError: there is no way to match them, or more than one.

    Example:
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from megajax.formats.layouts import linear
        >>> shapes = {"0.weight": (8, 4), "2.weight": (8, 8), "4.weight": (8, 8)}
        >>> specs = {name: Spec(shape, np.dtype("float32")) for name, shape in shapes.items()}
        >>> wanted = {"a": Spec((4, 8), np.dtype("float32")), "b": specs["2.weight"],
        ...           "c": specs["2.weight"]}
        >>> layers = [(Slot(i, "weight", linear(spec.shape, [0])),)
        ...           for i, spec in enumerate(wanted.values())]
        >>> stored = Stored(Path("net.npz"), specs, lambda names: {})
        >>> entries = match_state_dict(stored, lambda: layers, list(specs), {}, wanted)
        >>> [(entry.name, entry.path) for entry in entries]
        [('0.weight', 'a'), ('2.weight', 'b'), ('4.weight', 'c')]
    """
    if find_layers is None:
        raise InterchangeError(
            f"{stored.path} is a PyTorch state dict: to match it, like= must be a module or a "
            "megajax.Network, and inputs= a batch of inputs (or its shape and dtype)"
        )
    paths, layers = list(wanted), list(find_layers())
    used = {slot.leaf for layer in layers for slot in layer}
    unused = [leaf for leaf in range(len(paths)) if leaf not in used]
    layers += [(Slot(leaf, None, as_is(wanted[paths[leaf]].shape)),) for leaf in unused]
    names = [name for name in names if name.rpartition(".")[2] != _COUNTER or name in renamed]
    sides = _Sides(stored, paths, wanted, free, layers, _modules(names))
    pins = _pins(sides, renamed)
    pairs = _by_own_names(sides)
    if not pairs or any(pairs[layer] != module for layer, module in pins.items()):
        lost = [i for i in range(len(layers) - len(unused), len(layers)) if i not in pins]
        if lost:
            raise InterchangeError(
                f"{stored.path}: the program does not use {_leaves(sides, lost)}; say with rename= "
                "what becomes of it"
            )
        pairs = _in_order(sides, pins)
    entries = [entry for layer, module in pairs.items() for entry in _entries(sides, layer, module)]
    return sorted(entries, key=lambda entry: paths.index(entry.path))


class _Sides(NamedTuple):
    """What is to be matched.

    Attributes:
        stored: the file.
        paths: of our leaves.
        wanted: their shapes and dtypes.
        free: paths of leaves of any shape.
        layers: our leaves, in groups, in the order of the program.
        modules: the file's tensors: module -> tensor (`weight`, ...) -> its full name. A parameter
            of any other name is a module of its own, whose only tensor has no name.
    """

    stored: Stored
    paths: Sequence[str]
    wanted: Mapping[str, Spec]
    free: Collection[str]
    layers: Sequence[tuple[Slot, ...]]
    modules: Mapping[str, Mapping[str, str]]


def _modules(names: Collection[str]) -> dict[str, dict[str, str]]:
    modules: dict[str, dict[str, str]] = {}
    for name in names:
        outer, _, last = name.rpartition(".")
        module, tensor = (outer, last) if last in _TENSORS else (name, "")
        modules.setdefault(module, {})[tensor] = name
    return modules


def _entries(sides: _Sides, layer: int, module: str) -> list[Entry]:
    """What a module's tensors become in a layer, whatever their shapes; none if they are others."""
    tensors, slots = sides.modules[module], sides.layers[layer]
    if {slot.tensor for slot in slots} == {*tensors}:
        return [Entry(tensors[s.tensor or ""], sides.paths[s.leaf], s.layout) for s in slots]
    if len(slots) == len(tensors) == 1 and ("" in tensors or slots[0].tensor is None):
        (slot,), (name,) = slots, tensors.values()  # a parameter of its own
        return [Entry(name, sides.paths[slot.leaf], as_is(slot.layout.shape))]
    return []


def _fits(sides: _Sides, layer: int, module: str, lengths: bool = True) -> bool:
    """Whether a module has just a layer's tensors, in their shapes or, without `lengths`, ranks."""
    entries = _entries(sides, layer, module)
    for name, path, layout in entries:
        shape, any_length = sides.stored.specs[name].shape, path in sides.free or not lengths
        if shape != layout.source and not (any_length and len(shape) == len(layout.source)):
            return False
    return bool(entries)


def _is_free(sides: _Sides, layer: int) -> bool:
    return all(sides.paths[slot.leaf] in sides.free for slot in sides.layers[layer])


def _pins(sides: _Sides, renamed: Mapping[str, str]) -> dict[int, str]:
    """Layer -> module, where the user has named a leaf for one of its tensors."""
    layer_of = {sides.paths[s.leaf]: i for i, layer in enumerate(sides.layers) for s in layer}
    module_of = {name: m for m, tensors in sides.modules.items() for name in tensors.values()}
    pins: dict[int, str] = {}
    for name, path in renamed.items():
        layer, module = layer_of[path], module_of[name]
        if not _fits(sides, layer, module):
            raise InterchangeError(f"{sides.stored.path}: {_unlike(sides, layer, module)}")
        if all((name, path) != entry[:2] for entry in _entries(sides, layer, module)):
            raise InterchangeError(f"rename {name!r} to {path!r}: it is another of the tensors")
        others = [m for i, m in pins.items() if (i == layer) != (m == module)]
        if others:
            raise InterchangeError(f"rename {name!r} to {path!r} contradicts that of {others[0]}")
        pins[layer] = module
    return pins


def _by_own_names(sides: _Sides) -> dict[int, str]:
    """Layer -> module, if all modules have our own names."""
    result = {}
    for i, layer in enumerate(sides.layers):
        paths = [sides.paths[slot.leaf] for slot in layer]
        containers = [path.rpartition("/")[0] for path in paths]
        ways = (containers, paths)  # a parameter of its own has its own name
        for names in [*ways, *([path.partition("/")[2] for path in way] for way in ways)]:
            name = names[0].replace("/", ".")
            if {*names} == {names[0]} and name in sides.modules and _fits(sides, i, name):
                result[i] = name
                break
    all_of_them = len(set(result.values())) == len(sides.layers) == len(sides.modules)
    return result if all_of_them else {}


def _in_order(sides: _Sides, pins: Mapping[int, str]) -> dict[int, str]:
    """Layer -> module, in the one order that the program and the names allow."""
    layers, modules = list(range(len(sides.layers))), list(sides.modules)
    if len(layers) > len(modules):  # free leaves need not be there
        optional = [i for i in layers if i not in pins and _is_free(sides, i)]
        layers = [i for i in layers if i not in optional[: len(layers) - len(modules)]]
    _check_counts(sides, layers, pins)
    pinned = set(pins.values())

    def may_be(place: int, module: str) -> bool:
        if layers[place] in pins or module in pinned:
            return pins.get(layers[place]) == module
        return _fits(sides, layers[place], module)

    found, complete = orders(modules, may_be)
    apart: Mapping[int, str] = {}
    if not found and complete and pins:  # the user knows better than the names' numbers
        apart = pins
        layers = [layer for layer in layers if layer not in pins]
        modules = [module for module in modules if module not in pinned]
        found, complete = orders(modules, may_be)
    if len(found) == 1 and complete:
        return {**apart, **dict(zip(layers, found[0], strict=True))}
    if found:
        options = [sorted({*names}) for names in zip(*found, strict=True)]
        place = next((n for n, names in enumerate(options) if len(names) > 1), 0)
        candidates, why = options[place], ""
    else:
        place = next(n for n in range(len(layers)) if layers[n] not in pins)
        candidates = [name for name in modules if may_be(place, name)]
        why = ", but no order of all modules is the program's"
    tensor, path, _ = _entries(sides, layers[place], candidates[0])[0]
    raise InterchangeError(
        f"{sides.stored.path}: leaf {path} could be {' or '.join(candidates)}{why}; say which one "
        f"it is, for example by rename={{{tensor!r}: {path!r}}}"
    )


def _check_counts(sides: _Sides, layers: Sequence[int], pins: Mapping[int, str]) -> None:
    """Checks that each side has as many modules of a kind as the other."""
    left = [module for module in sides.modules if module not in pins.values()]
    without = []
    loose = [layer for layer in layers if layer not in pins]
    for layer in sorted(loose, key=lambda i: _is_free(sides, i)):  # those of any shape come last
        module = next((module for module in left if _fits(sides, layer, module)), None)
        if module is None:
            without.append(layer)
        else:
            left.remove(module)
    wrong = []
    for layer in [*without]:
        alike = [module for module in left if _fits(sides, layer, module, lengths=False)]
        rivals = [i for i in without if any(_fits(sides, i, m, lengths=False) for m in alike)]
        if len(alike) == 1 and rivals == [layer]:  # surely meant for each other
            wrong.append(_unlike(sides, layer, alike[0]))
            without.remove(layer)
            left.remove(alike[0])
    if without:
        wrong.append(f"nothing there becomes {_leaves(sides, without)}")
    if left:
        names = [name for module in left for name in sides.modules[module].values()]
        described = some([f"{name} {dims(sides.stored.specs[name].shape)}" for name in names])
        wrong.append(f"no leaf for {described} (ignore= leaves tensors out)")
    if wrong:
        raise InterchangeError(f"{sides.stored.path}: {'; '.join(wrong)}")


def _unlike(sides: _Sides, layer: int, module: str) -> str:
    """Where a module does not have the shapes of a layer."""
    entries = _entries(sides, layer, module)
    if not entries:
        names = ", ".join(sides.modules[module].values())
        return f"{names} cannot be {_leaves(sides, [layer])}"
    differing = []
    for name, path, layout in entries:
        shape, ours = sides.stored.specs[name].shape, sides.wanted[path]
        if shape != layout.source:
            before = f" ({dims(layout.source)} in PyTorch)" if ours.shape != layout.source else ""
            differing.append(f"leaf {path} is {ours}{before} but {name} is {dims(shape)}")
    return "; ".join(differing)


def _leaves(sides: _Sides, layers: Sequence[int]) -> str:
    paths = [sides.paths[slot.leaf] for layer in layers for slot in sides.layers[layer]]
    return some([f"leaf {path} ({sides.wanted[path]})" for path in paths])
