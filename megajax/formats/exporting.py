"""Networks for others to use: one or more formats, and a model card that says what they are.

Takes plain data only, so that whoever ran the merge can say what it was; knows nothing of configs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import megajax
from megajax.errors import InterchangeError
from megajax.formats.files import fingerprint, write_bytes
from megajax.formats.mapping import NameMap
from megajax.formats.networks import FORMATS, save_network
from megajax.types import PyTree

__all__ = ["export", "model_card"]

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

"""
_USES = {
    "msgpack": "Flax: `flax.serialization.from_bytes(variables, data)`",
    "npz": "NumPy: `np.load(file)`; bfloat16 is stored as bits, under `NAME::bfloat16`",
    "safetensors": "`safetensors.numpy.load_file(file)`, `safetensors.torch.load_file(file)`",
    "orbax": "Orbax: `PyTreeCheckpointer().restore(folder)`",
}


def export(
    folder: Path | str,
    variables: PyTree,
    *,
    formats: Sequence[str] = ("msgpack",),
    names: NameMap | None = None,
    title: str = "Merged network",
    parents: Sequence[str | Path | Mapping[str, Any]] = (),
    method: Mapping[str, Any] | None = None,
    figures: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int | None = None,
    versions: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """Writes a network in one or more formats, and its model card (`README.md`) beside them.

    Args:
        folder: made if need be.
        variables: of the network.
        formats: of `msgpack`, `orbax`, `safetensors` and `npz`.
        names: names and layouts for safetensors and npz, as in the file that a parent came from
            (`map_names(file, ...)`); None takes the paths of the leaves.
        title: of the card.
        parents: where the parents came from: paths, whose SHA-256 is then taken, or descriptions
            such as `{"path": ..., "sha256": ..., "test_accuracy": ...}`.
        method: how they were merged, nested mappings of plain values such as `to_dict(config)`.
        figures: row -> column -> number, such as the figures in `results.json`.
        seed: of the run.
        versions: package -> version; None takes those that are installed here.

    Returns:
        Format -> path, and `card` -> path.

    Raises:
        InterchangeError: unknown format; a file cannot be written; see `save_network`.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> paths = export(tempfile.mkdtemp(), {"w": np.ones(2)}, formats=("msgpack", "npz"))
        >>> [path.name for path in paths.values()]
        ['variables.msgpack', 'variables.npz', 'README.md']
    """
    folder = Path(folder)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise InterchangeError(
            f"export format {unknown[0] if unknown else None!r}: choose from {', '.join(FORMATS)}"
        )
    described = [
        parent
        if isinstance(parent, Mapping)
        else {"path": str(parent), "sha256": fingerprint(parent)}
        for parent in parents
    ]
    paths = {}
    for name in formats:
        place = folder / FORMATS[name]
        named = names if name in ("safetensors", "npz") else None
        paths[name] = save_network(place, variables, format=name, names=named)
    files = [
        {
            "format": name,
            "file": path.name,
            "sha256": fingerprint(path),
            "read it with": _USES[name],
        }
        for name, path in paths.items()
    ]
    card = model_card(
        title=title,
        files=files,
        parents=described,
        method=method or {},
        figures=figures or {},
        seed=seed,
        versions=_installed() if versions is None else versions,
    )
    write_bytes(folder / _CARD, card.encode())
    return {**paths, "card": folder / _CARD}


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
        method: nested mappings of plain values.
        figures: row -> column -> number.
        seed: of the run.
        versions: package -> version.

    Returns:
        The text.

    Example:
        >>> card = model_card(figures={"parent 0": {"accuracy": 0.75}, "merged": {"accuracy": 0.8}})
        >>> print(card[card.index("## Figures"):])
        ## Figures
        <BLANKLINE>
        |          | accuracy |
        | -------- | -------- |
        | parent 0 | 0.75     |
        | merged   | 0.8      |
        <BLANKLINE>
    """
    parts = [_HEADER.format(title=title)]
    parts.append("One network out of several of its architecture, merged by megajax.\n\n")
    if files:
        parts.append(f"## Files\n\n{_table(files)}\n")
        parts.append(
            "`megajax.load_network(file, like=model, inputs=batch)` reads all of them.\n\n"
        )
    if parents:
        rows = [{"parent": k, **parent} for k, parent in enumerate(parents)]
        parts.append(f"## Parents\n\n{_table(rows)}\n")
    if method:
        rows = [{"choice": name, "value": value} for name, value in _flat(method)]
        parts.append(f"## Method\n\n{_table(rows)}\n")
    if figures:
        rows = [{"": name, **row} for name, row in figures.items()]
        parts.append(f"## Figures\n\n{_table(rows)}\n")
    made = [f"Seed {seed}."] if seed is not None else []
    if versions:
        made.append(", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    if made:
        parts.append(f"## Made with\n\n{' '.join(made)}\n")
    return "".join(parts).rstrip("\n") + "\n"


def _installed() -> dict[str, str]:
    return {"megajax": megajax.__version__} | {name: metadata.version(name) for name in _PACKAGES}


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for name, item in value.items():
        if isinstance(item, Mapping) and item:
            rows += _flat(item, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, item))
    return rows


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with a column for every key of any row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    padded = (
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells
    )
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
