"""Orbax checkpoints: folders of arrays, whose metadata is read and checked before any of them is.

They are read by TensorStore, as Orbax itself does it, and written by Orbax, which is imported only
then. It stores no arrays without elements; they need no storage, and are there again where the
network is known that they belong to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np

from megajax.errors import InterchangeError
from megajax.formats.arrays import NOT_AN_ARRAY, Format, Keyed, Spec, Stored, native, nested
from megajax.formats.disk import one_line

__all__ = ["FORMAT"]

_METADATA = "_METADATA"


def _find(path: Path) -> list[Path]:
    """The pytrees at a path: itself, or the items of a step or of the version-1 layout."""
    return [at for at in (path, *sorted(path.iterdir())) if (at / _METADATA).is_file()]


def _open(path: Path) -> Stored:
    specs: dict[str, Spec] = {}
    stores: dict[str, Any] = {}
    with one_line(path, "is no Orbax checkpoint, or damaged"):
        metadata = json.loads((path / _METADATA).read_bytes())
        for entry in metadata["tree_metadata"].values():
            keys = [str(key["key"]) for key in entry["key_metadata"]]
            name, kind = "/".join(keys), entry["value_metadata"]
            if name in specs:
                raise InterchangeError(f"{path} has two leaves called {name}")
            if kind["value_type"] == "string":
                specs[name] = NOT_AN_ARRAY
            elif not kind["skip_deserialize"]:  # an empty container, or None
                stores[name] = _store(path, ".".join(keys), metadata)
        for name, store in stores.items():
            stores[name] = store.result()
            specs[name] = Spec(tuple(stores[name].shape), stores[name].dtype.numpy_dtype)

    def read(names: Sequence[str]) -> dict[str, np.ndarray]:
        with one_line(path):
            arrays = {name: stores[name].read() for name in names}
            return {name: native(np.asarray(array.result())) for name, array in arrays.items()}

    return Stored(path, specs, read)


def _store(path: Path, name: str, metadata: Mapping[str, Any]) -> Any:
    """A TensorStore that is being opened."""
    import tensorstore

    file = {"driver": "file", "path": f"{path.resolve()}/"}
    together = {"driver": "ocdbt", "base": file, "path": f"{name}/"}
    apart = {**file, "path": f"{path.resolve()}/{name}/"}
    spec = {
        "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
        "kvstore": together if metadata.get("use_ocdbt", True) else apart,
    }
    return tensorstore.open(spec, open=True, read=True, context=tensorstore.Context())


def _check(path: Path, arrays: Keyed) -> None:
    """Refuses what Orbax would write as something else, or stop at without saying why."""
    import tensorstore

    if not any(array.size for array in arrays.values()):
        leaves = ", ".join(map("/".join, arrays)) or "none"
        raise InterchangeError(f"{path}: Orbax needs a leaf with elements, and has {leaves}")
    leaf_of: dict[str, str] = {}
    for keys, array in arrays.items():
        leaf, name = "/".join(keys), ".".join(keys)
        if str(PurePosixPath("/", name)) != f"/{name}" or ".." in name.split("/"):
            raise InterchangeError(f"leaf {leaf} cannot be stored by Orbax under that name")
        if leaf_of.setdefault(name, leaf) != leaf:
            raise InterchangeError(f"leaves {leaf_of[name]} and {leaf} have one name in Orbax")
        try:
            tensorstore.dtype(array.dtype)
        except ValueError:
            raise InterchangeError(
                f"leaf {leaf} is {array.dtype}, which Orbax cannot hold"
            ) from None


def _write(path: Path, arrays: Keyed) -> None:
    """Writes a checkpoint; one that is there is replaced once the new one is whole."""
    import orbax.checkpoint as ocp

    _check(path, arrays)
    temporary = path.with_name(f".{path.name}.partial").absolute()
    process = jax.process_index()  # each process of a run writes for itself
    options = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process{process}",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    with one_line(path, "cannot be written", verb="written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
            checkpointer.save(temporary, nested({k: a for k, a in arrays.items() if a.size}))
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)


_READER = "Orbax: `PyTreeCheckpointer().restore(folder)`"
FORMAT = Format("orbax", ("orbax",), _open, _write, _READER, find=_find)
