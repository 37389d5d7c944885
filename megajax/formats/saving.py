"""Networks to files: one format or more, and a model card that says what they are.

The card takes plain data only, so that whoever ran the merge can say what it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from megajax.errors import InterchangeError
from megajax.formats.adapters import expect
from megajax.formats.arrays import Keyed, arrays_of
from megajax.formats.disk import fingerprint, remove_sums, write_sums, write_whole
from megajax.formats.kinds import FORMATS, open_network, read_arrays
from megajax.formats.layouts import to_file
from megajax.formats.mapping import NameMap
from megajax.io import flatten
from megajax.tables import to_markdown
from megajax.types import PyTree

__all__ = ["export", "model_card", "save_network"]

_CARD = "README.md"
_PACKAGES = ("jax", "flax", "numpy")
_HEADER = """\
---
library_name: megajax
tags:
- model-merging
- megajax
---

# {title}

One network out of several of its architecture, merged by megajax."""
_HOW_TO_READ = "`megajax.load_network(file, like=model, inputs=batch)` reads all of them."


def save_network(
    path: Path | str, variables: PyTree, *, format: str | None = None, names: NameMap | None = None
) -> Path:
    """Saves a network, whole or not at all, and its SHA-256 beside it.

    Args:
        path: a file whose suffix says the format, the folder of an Orbax checkpoint, or any other
            folder, which then holds the file (`variables.msgpack`, ...).
        variables: pytree of arrays.
        format: `msgpack`, `npz`, `orbax` or `safetensors`; None takes the suffix's, and `msgpack`
            for a folder.
        names: names and layouts of another file, from `map_names`, to write the same here; for
            safetensors and npz. Tensors of that file that no leaf took are copied from it.

    Returns:
        The path of the file (for Orbax, of the folder).

    Raises:
        InterchangeError: it cannot be written, or the format has not the dtype of a leaf.

    Example:
        >>> import tempfile
        >>> from megajax import load_network
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_network(folder, {"w": np.ones(2)}).name
        'variables.msgpack'
        >>> load_network(folder)
        {'w': array([1., 1.])}
    """
    path = Path(path)
    by_suffix = next((f.name for f in FORMATS.values() if path.suffix in f.suffixes), None)
    chosen = FORMATS[_known(format or by_suffix or "msgpack")]
    if by_suffix not in (None, chosen.name):
        raise InterchangeError(
            f"{path} says {by_suffix} by its suffix, and the format is {chosen.name}"
        )
    if names is not None and not chosen.flat:
        flat = " and ".join(sorted(f.name for f in FORMATS.values() if f.flat)[::-1])
        raise InterchangeError(f"names of {names.file} can be written to {flat} only")
    expect(variables, "a pytree of arrays", "variables")
    file = path if by_suffix or not chosen.suffixes else path / chosen.files[0]
    arrays = arrays_of(variables)
    written = arrays if names is None else _named(arrays, names)
    remove_sums(file)
    chosen.write(file, written)
    write_sums(file)
    return file


def export(
    folder: Path | str,
    variables: PyTree,
    *,
    formats: Sequence[str] = ("msgpack",),
    names: NameMap | None = None,
    parents: Sequence[str | Path | Mapping[str, Any]] = (),
    versions: Mapping[str, str] | None = None,
    **about: Any,
) -> dict[str, Path]:
    """Writes a network in one or more formats, and its model card (`README.md`) beside them.

    Args:
        folder: made if need be.
        variables: of the network.
        formats: of `msgpack`, `npz`, `orbax` and `safetensors`.
        names: names and layouts for safetensors and npz, as in the file that a parent came from
            (`map_names(file, ...)`); None takes the paths of the leaves.
        parents: where the parents came from: paths, whose SHA-256 is then taken, or descriptions
            such as `{"path": ..., "sha256": ..., "test_accuracy": ...}`.
        versions: package -> version; None takes those that are installed here.
        **about: what else the card says: `title`, `method`, `figures`, `seed`; see `model_card`.

    Returns:
        Format -> path, and `card` -> path.

    Raises:
        InterchangeError: unknown format; a file cannot be written; see `save_network`.

    Example:
        >>> import tempfile
        >>> paths = export(tempfile.mkdtemp(), {"w": np.ones(2)}, formats=("msgpack", "npz"))
        >>> [path.name for path in paths.values()]
        ['variables.msgpack', 'variables.npz', 'README.md']
    """
    kinds = [FORMATS[_known(name)] for name in formats]
    described = [
        it if isinstance(it, Mapping) else {"path": str(it), "sha256": fingerprint(it)}
        for it in parents
    ]
    paths, files = {}, []
    for kind in kinds:
        place = Path(folder) / kind.files[0]
        save_network(place, variables, format=kind.name, names=names if kind.flat else None)
        paths[kind.name] = place
        row = {"format": kind.name, "file": place.name, "sha256": fingerprint(place)}
        files.append({**row, "read it with": kind.reader})
    versions = _installed() if versions is None else versions
    card = model_card(files=files, parents=described, versions=versions, **about)
    paths["card"] = Path(folder) / _CARD
    write_whole(paths["card"], card.encode())
    return paths


def model_card(
    *,
    title: str = "Merged network",
    files: Sequence[Mapping[str, Any]] = (),
    parents: Sequence[Mapping[str, Any]] = (),
    method: Mapping[str, Any] | None = None,
    figures: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int | None = None,
    versions: Mapping[str, str] | None = None,
) -> str:
    """A model card in Markdown; what is not given is left out.

    Args:
        title: its heading.
        files: one row for each file.
        parents: one row for each parent.
        method: how they were merged: nested mappings of plain values such as `to_dict(config)`.
        figures: row -> column -> number, such as the figures in `results.json`.
        seed: of the run.
        versions: package -> version.

    Example:
        >>> card = model_card(figures={"parent 0": {"accuracy": 0.75}, "merged": {"accuracy": 0.8}})
        >>> print(card[card.index("## Figures"):])
        ## Figures
        <BLANKLINE>
        |  | accuracy |
        | --- | ---: |
        | parent 0 | 0.75 |
        | merged | 0.8 |
        <BLANKLINE>
    """
    chosen = flatten(method or {})
    tables = {
        "Files": files,
        "Parents": [{"parent": k, **parent} for k, parent in enumerate(parents)],
        "Method": [{"choice": name, "value": value} for name, value in chosen.items()],
        "Figures": [{"": name, **row} for name, row in (figures or {}).items()],
    }
    parts = [_HEADER.format(title=title)]
    for heading, rows in tables.items():
        parts += [f"## {heading}", _table(rows)] if rows else []
        parts += [_HOW_TO_READ] if rows and heading == "Files" else []
    made = [f"Seed {seed}."] if seed is not None else []
    if versions:
        made.append(", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    parts += ["## Made with", " ".join(made)] if made else []
    return "\n\n".join(parts) + "\n"


def _known(format: str) -> str:
    if format not in FORMATS:
        raise InterchangeError(f"format {format!r} is unknown: choose one of {', '.join(FORMATS)}")
    return format


def _named(arrays: Keyed, names: NameMap) -> dict[tuple[str, ...], np.ndarray]:
    """Arrays by the names and in the layouts of another file."""
    ours = {"/".join(keys): array for keys, array in arrays.items()}
    lacking = {*ours} - {entry.path for entry in names.entries}
    if lacking:
        raise InterchangeError(f"leaf {min(lacking)} has no name in {names.file}")
    named = {}
    for name, path, layout in names.entries:
        if path not in ours or ours[path].shape != layout.shape:
            raise InterchangeError(f"leaf {path} is not as {names.file} has it")
        named[name] = to_file(layout, ours[path])
    if names.ignored:
        named |= read_arrays(open_network(Path(names.file)), names.ignored)
    return {(name,): array for name, array in named.items()}


def _installed() -> dict[str, str]:
    from megajax import __version__

    return {"megajax": __version__} | {name: metadata.version(name) for name in _PACKAGES}


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with a column for every key of any row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return to_markdown([columns, *([_cell(row.get(key)) for key in columns] for row in rows)])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
