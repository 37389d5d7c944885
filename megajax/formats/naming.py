"""Finds out which array of a file becomes which leaf, and that it can, before anything is read.

A file whose names are the leaves' paths is taken by name; a state dict of PyTorch is left to
`state_dict`. Everything that does not fit is named, with both shapes and dtypes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp

from megajax.errors import InterchangeError, did_you_mean
from megajax.formats.arrays import Spec, Stored, is_number
from megajax.formats.layouts import as_is
from megajax.formats.mapping import Entry, NameMap, some
from megajax.formats.state_dict import Layers, is_state_dict, match_state_dict

__all__ = ["find_mapping"]

_MOST = 5


def find_mapping(
    stored: Stored,
    wanted: Mapping[str, Spec],
    layers: Layers | None = None,
    *,
    rename: Mapping[str, str] | None = None,
    ignore: str | None = None,
    cast: bool = False,
    free: Collection[str] = (),
) -> NameMap:
    """Finds out which array of a file becomes which leaf, and checks that it can.

    Args:
        stored: the opened file.
        wanted: path -> shape and dtype of every leaf, in flattening order.
        layers: finds the modules that the leaves would be in PyTorch, in the order of the program
            (see `uses.find_modules`); None if there is no program to find them in.
        rename: names in the file, or regular expressions for the whole name, -> path of the leaf
            (groups as in `re.sub`). For a tensor of a state dict, the other tensors of its module
            follow it.
        ignore: regular expression; arrays whose name it matches (anywhere) are left out.
        cast: floating-point arrays may have another precision than their leaf.
        free: paths of leaves that are not loaded, and whose shapes need not agree.

    Returns:
        The mapping; it has an entry for each leaf that is not free.

    Raises:
        InterchangeError: the file does not hold the network, or in more than one way.

    Example:
        >>> import numpy as np
        >>> specs = {"fc/kernel": Spec((2, 3), np.dtype("float32"))}
        >>> stored = Stored(Path("a.npz"), specs, lambda names: {})
        >>> find_mapping(stored, {"fc/kernel": Spec((2, 4), np.dtype("float32"))})
        Traceback (most recent call last):
        ...
        megajax.errors.InterchangeError: a.npz: leaf fc/kernel is float32[2,4] but float32[2,3] in
        the file
    """
    pattern = None if ignore is None else _compiled("ignore", ignore)
    names = [name for name in stored.specs if not (pattern and pattern.search(name))]
    renamed = _renamed(stored.path, names, rename or {}, wanted)
    if is_state_dict(names, wanted):
        entries = match_state_dict(stored, layers, names, renamed, wanted, free)
    else:
        entries = _by_name(stored, names, renamed, wanted, free)
    _check([entry for entry in entries if entry.path not in free], stored, wanted, cast)
    taken = {entry.name for entry in entries}
    left = tuple(name for name in stored.specs if name not in taken)
    return NameMap(str(stored.path), tuple(entries), left)


def _compiled(what: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InterchangeError(f"{what} {pattern!r} is not a regular expression: {error}") from None


def _renamed(
    path: Path, names: Sequence[str], rename: Mapping[str, str], wanted: Mapping[str, Spec]
) -> dict[str, str]:
    """The names that the user gave a leaf."""
    result: dict[str, str] = {}
    for old, new in rename.items():
        if old in names:
            chosen = {old: new}
        else:
            pattern = _compiled("rename", old)
            try:
                chosen = {it: match.expand(new) for it in names if (match := pattern.fullmatch(it))}
            except (re.error, IndexError) as error:
                raise InterchangeError(f"rename {old!r} to {new!r}: {error}") from None
        if not chosen:
            raise InterchangeError(f"rename {old!r} matches nothing in {path}{_near(old, names)}")
        for name, leaf in chosen.items():
            if leaf not in wanted:
                raise InterchangeError(
                    f"rename {name!r} to {leaf!r}: there is no such leaf{_near(leaf, wanted)}"
                )
            result[name] = leaf
    twice = [leaf for leaf, count in Counter(result.values()).items() if count > 1]
    if twice:
        both = " and ".join(name for name, leaf in result.items() if leaf == twice[0])
        raise InterchangeError(f"rename gives leaf {twice[0]} to both {both}")
    return result


def _near(name: str, names: Collection[str]) -> str:
    hint = did_you_mean(name, names)
    return hint and f"; {hint}"


def _by_name(
    stored: Stored,
    names: Sequence[str],
    renamed: Mapping[str, str],
    wanted: Mapping[str, Spec],
    free: Collection[str],
) -> list[Entry]:
    """Takes arrays by the path of their leaf: with dots for slashes, without NNX's `value`.

    A network that is one array, whose path is empty, is called `value` where it needs a name.
    """
    dotted = not any("/" in name for name in names)

    def plain(name: str) -> str:
        name = "/" + (name.replace(".", "/") if dotted else name)
        return name.removesuffix("/value").removeprefix("/")

    ours: dict[str, str] = {}
    for leaf in wanted:
        if ours.setdefault(plain(leaf), leaf) != leaf:
            raise InterchangeError(f"leaves {ours[plain(leaf)]} and {leaf} cannot be told apart")
    found = {leaf: name for name, leaf in renamed.items()}
    extra = []
    for name in names:
        path = ours.get(plain(name))
        if name not in renamed and (path is None or found.setdefault(path, name) != name):
            extra.append(name)
    # Arrays without elements need no storage, and Orbax has none for them.
    missing = [
        leaf for leaf in wanted if leaf not in found and leaf not in free and wanted[leaf].nbytes
    ]
    if missing or extra:
        lacks = [f"leaf {leaf} ({wanted[leaf]})" for leaf in missing]
        has = [f"{name} ({stored.specs[name]})" for name in extra]
        parts = [f"lacks {some(lacks)}"] if lacks else []
        parts += [f"has {some(has)}, which the network does not have"] if has else []
        hint = _hint(missing, extra, [*found.values()])
        raise InterchangeError(f"{stored.path} {' and '.join(parts)}{hint}")
    return [Entry(found[leaf], leaf, as_is(wanted[leaf].shape)) for leaf in wanted if leaf in found]


def _hint(missing: Sequence[str], extra: Sequence[str], found: Sequence[str]) -> str:
    """The arguments that would help, where it is clear which."""
    rename, moved = _renaming(missing, extra)
    used = {*found, *moved}
    rest = sorted({_outside(name, used) for name in extra if name not in moved})
    ignore = f"^({'|'.join(map(re.escape, rest))})"
    advice = [f"rename={rename}"] if rename else []
    if rest and len(rest) <= _MOST and not any(re.search(ignore, name) for name in used):
        advice.append(f"ignore={ignore!r}")
    if not advice or bool(missing) != bool(rename):
        return ""
    return f"; {' and '.join(advice)} would help"


def _renaming(missing: Sequence[str], extra: Sequence[str]) -> tuple[dict[str, str], set[str]]:
    """What would give each missing leaf an array, if only a container more or less is between."""
    for name in extra if missing else ():
        if name.endswith(f"/{missing[0]}"):
            outer = name.removesuffix(missing[0])
            rename, moved = {f"{re.escape(outer)}(.*)": r"\1"}, {outer + leaf for leaf in missing}
        else:
            outer = missing[0].removesuffix(name)
            rename = {"(.*)": rf"{outer}\1"}
            moved = {leaf.removeprefix(outer) for leaf in missing}
        if moved <= {*extra}:
            return rename, moved
    return {}, set()


def _outside(name: str, used: Collection[str]) -> str:
    """The first part of a name that no array in use shares."""
    parts = name.split("/")
    starts = ("/".join(parts[:depth]) for depth in range(1, len(parts)))
    return next((it for it in starts if not any(u.startswith(f"{it}/") for u in used)), name)


def _check(
    entries: Sequence[Entry], stored: Stored, wanted: Mapping[str, Spec], cast: bool
) -> None:
    """Checks shape and dtype of every entry; all that do not fit are named."""
    wrong = []
    for name, path, layout in entries:
        have, need = stored.specs[name], wanted[path]
        what = f"leaf {path}" + (f" ({name})" if name != path else "")
        castable = any(
            jnp.issubdtype(have.dtype, kind) and jnp.issubdtype(need.dtype, kind)
            for kind in (jnp.floating, jnp.complexfloating)
        )
        # NumPy alone stores bfloat16 and the like as nameless bytes.
        nameless = have.dtype.kind == "V" and not is_number(have.dtype)
        same = have.dtype == need.dtype or (
            nameless and need.dtype.kind == "V" and have.dtype.itemsize == need.dtype.itemsize
        )
        shape_fits = have.shape == layout.source
        if not shape_fits or not (same or (castable and cast)):
            hint = "; cast=True converts it" if shape_fits and castable else ""
            wrong.append(f"{what} is {need} but {have} in the file{hint}")
    if wrong:
        raise InterchangeError(f"{stored.path}: {'; '.join(wrong)}")
