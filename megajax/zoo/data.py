"""Images: load them, split them, check them, and deal them out to the parents.

`load` gives three disjoint splits of scikit-learn's bundled digits or of any image classification
set that tensorflow-datasets (TFDS) has prepared. The first reading leaves all arrays of the set in
`DATA_DIR/megajax/NAME.npz` (in `~/.cache/megajax` if DATA_DIR is read-only); where that file is,
TFDS is not needed, so it may be copied to a machine without. Nothing here ever touches the network,
with one exception that the user has to ask for by name:

    pip install -e ".[prepare]"
    python -m megajax.data prepare cifar10 --data_dir DIR

All randomness comes from the key given: an integer or a JAX key.

Example:
    >>> dataset = load(0, DataConfig(limit=100))
    >>> dataset.train.images.shape, dataset.train.labels.shape, dataset.num_classes
    ((100, 8, 8, 1), (100,), 10)
    >>> [len(s) for s in shards(0, dataset.train.labels, 10, ParentsConfig(shards="disjoint"))]
    [50, 50]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from megajax.errors import DataError, MegajaxError, first_line
from megajax.sections import Fraction, Pattern, Place, Section, at_least, one_of

__all__ = [
    "SHARDS",
    "DataConfig",
    "Dataset",
    "ParentsConfig",
    "Split",
    "check_dataset",
    "class_names",
    "load",
    "load_part",
    "prepare",
    "shards",
]

DIGITS = "digits"
BLOCK = 1000  # records per read: twice as fast as one by one
Array: TypeAlias = npt.NDArray[Any]
_PARTS = ("train", "validation", "test")


class DataConfig(Section):
    """Which images and how they are split.

    Attributes:
        name: `digits` (scikit-learn's, bundled) or the name of a TFDS image classification set; or
            a function of your own without arguments that returns a dictionary of pairs (images `[N,
            H, W, C]`, labels `[N]`): `train` and, optionally, `validation` and `test`.
        data_dir: TFDS directory that holds the prepared set; None takes TFDS's own default.
        validation_fraction: share of the training images set aside for validation.
        test_fraction: share of all images set aside for the test, for sets without a test split.
        limit: at most this many images in each split (for quick trials); None takes all.
        standardize: subtract each channel's mean over the training images and divide by its
            standard deviation; otherwise pixels stay in [0, 1].
        image_size: resize the images of a TFDS set to this many pixels on each side; None keeps
            their size.
    """

    section = "data"
    name: str | Callable[..., Any] = "digits"
    data_dir: Place | None = None
    validation_fraction: Fraction = 0.1
    test_fraction: Fraction = 0.25
    limit: Annotated[int, at_least(1)] | None = None
    standardize: bool = False
    image_size: Annotated[int, at_least(1)] | None = None

    def _check(self) -> None:
        self.require(bool(self.name), "name", "a data set must be named")


class Split(NamedTuple):
    """Images with their labels.

    Attributes:
        images: float32 [N, H, W, C].
        labels: int32 [N].
        ids: int32 [N], the number of each image in its source (training images first, then the
            official validation and test images), or None where the images have no such number.
    """

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]
    ids: npt.NDArray[np.int32] | None = None


class Dataset(NamedTuple):
    """Three disjoint splits of one image classification set.

    Attributes:
        train: what the parents learn from.
        validation: what the search is scored on.
        test: what nothing but the final report looks at.
        num_classes: labels lie in [0, num_classes).
        name: name of the set, with its version where it has one.
        mean: float32 [C], subtracted from the channels of images in [0, 1].
        std: float32 [C], divided by after that.
    """

    train: Split
    validation: Split
    test: Split
    num_classes: int
    name: str
    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]


class _Source(NamedTuple):
    """A set as it comes: the official parts by name, images uint8 or in [0, 1]."""

    parts: dict[str, tuple[Array, Array]]
    num_classes: int
    name: str


def load(key: int | jax.Array, config: DataConfig) -> Dataset:
    """Loads a set and splits it into training, validation and test images.

    An official test split is the test split, and an official validation split the validation
    split. Where one is missing, `config.test_fraction` of all images, then
    `config.validation_fraction` of the training images, are drawn from the official training
    split. Each split is in random order and cut to `config.limit`.

    Args:
        key: seed of the draw, an integer or a JAX key. Equal keys give equal splits.
        config: which images, and how they are split.

    Returns:
        The checked set, images scaled to [0, 1] (and standardised with the mean and standard
        deviation of the training images, if the config says so).

    Raises:
        DataError: the set is unknown, not prepared or no image classification set, or a split
            ends up empty. Never waits for a network.

    Example:
        >>> dataset = load(0, DataConfig(name="digits"))
        >>> [len(split.labels) for split in (dataset.train, dataset.validation, dataset.test)]
        [1213, 135, 449]
    """
    if callable(config.name):
        source = _load_own(config.name)
    else:
        source = _load_digits() if config.name == DIGITS else _load_tfds(config)
    if "train" not in source.parts:
        raise DataError(f"{source.name} has no train split, only {', '.join(source.parts)}")
    sizes = {part: len(labels) for part, (_, labels) in source.parts.items()}
    starts = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
    rows = _draw(_generator(key), sizes, config)

    def split(name: str) -> Split:
        part, chosen = name if name in sizes else "train", rows[name]
        images, labels = source.parts[part]
        ids = (starts[part] + chosen).astype(np.int32)
        return Split(_to_unit(images[chosen]), labels[chosen].astype(np.int32), ids)

    train, validation, test = map(split, _PARTS)
    channels = train.images.shape[-1]
    mean, std = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    if config.standardize and len(train.labels):
        mean = train.images.mean(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
        std = train.images.std(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
        std = np.maximum(std, np.float32(1e-6))
        train, validation, test = (
            part._replace(images=(part.images - mean) / std) for part in (train, validation, test)
        )
    dataset = Dataset(train, validation, test, source.num_classes, source.name, mean, std)
    check_dataset(dataset)
    return dataset


def load_part(config: DataConfig, part: str) -> Split:
    """One official part of a prepared TFDS set as it is: whole, in the set's order, in [0, 1].

    Args:
        config: the set's `name` and `data_dir`, and the `image_size` to resize to.
        part: `train`, `validation` or `test`.

    Returns:
        The images and labels, without ids.

    Raises:
        DataError: the set is unknown, not prepared, no image classification set, or has no such
            part. Never waits for a network.
    """
    source = _load_tfds(config)
    if part not in source.parts:
        raise DataError(f"{config.name} has no {part} split, only {', '.join(source.parts)}")
    images, labels = source.parts[part]
    return Split(_to_unit(images), labels)


def class_names(config: DataConfig) -> list[str]:
    """The names of the classes, as a prepared TFDS set has them in a file; none for other sets.

    Example:
        >>> class_names(DataConfig(name="digits"))
        []
    """
    if callable(config.name):
        return []
    folder = _data_dir(config) / config.name.partition(":")[0]
    files = sorted(folder.rglob("label.labels.txt"))
    return files[-1].read_text().splitlines() if files else []


def check_dataset(dataset: Dataset) -> None:
    """Checks that three splits can be trained, searched and tested on.

    Args:
        dataset: the set to check; splits without `ids` are not checked for overlap.

    Raises:
        DataError: a split is empty, images are not finite floats [N, H, W, C] of one shape, labels
            are not integers [N] in [0, num_classes), or two splits share an image. Names the split.

    Example:
        >>> dataset = load(0, DataConfig(limit=10))
        >>> check_dataset(dataset)
        >>> check_dataset(dataset._replace(num_classes=2))
        Traceback (most recent call last):
        ...
        megajax.errors.DataError: digits, train split: labels must lie in [0, 2), one is ...
    """
    splits = {name: getattr(dataset, name) for name in _PARTS}
    for name, split in splits.items():
        fault = _fault(np.asarray(split.images), np.asarray(split.labels), dataset)
        if fault:
            raise DataError(f"{dataset.name}, {name} split: {fault}")
    for (one, first), (other, second) in itertools.combinations(splits.items(), 2):
        if first.ids is not None and second.ids is not None:
            shared = np.intersect1d(first.ids, second.ids)
            if len(shared):
                raise DataError(
                    f"{dataset.name}: the {one} and {other} splits share {len(shared)} images, "
                    f"one is number {shared[0]}"
                )


def _fault(images: Array, labels: Array, dataset: Dataset) -> str:
    """What is wrong with a split by itself, or nothing."""
    if not len(labels):
        return "it is empty"
    if images.ndim != 4 or not np.issubdtype(images.dtype, np.floating):
        return f"images must be floats [N, H, W, C], they are {images.dtype} {list(images.shape)}"
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        return f"labels must be integers [N], they are {labels.dtype} {list(labels.shape)}"
    if len(images) != len(labels):
        return f"{len(images)} images have {len(labels)} labels"
    size, wanted = list(images.shape[1:]), list(dataset.train.images.shape[1:])
    if size != wanted:
        return f"images are {size}, in the train split {wanted}"
    outside = labels[(labels < 0) | (labels >= dataset.num_classes)]
    if len(outside):
        return f"labels must lie in [0, {dataset.num_classes}), one is {outside[0]}"
    return "" if np.isfinite(images).all() else "an image holds values that are not finite"


def _same(
    rng: np.random.Generator, labels: Array, num_classes: int, config: ParentsConfig
) -> list[Array]:
    return [np.arange(len(labels))] * config.count


def _disjoint(
    rng: np.random.Generator, labels: Array, num_classes: int, config: ParentsConfig
) -> list[Array]:
    return np.array_split(rng.permutation(np.arange(len(labels))), config.count)


def _skewed(
    rng: np.random.Generator, labels: Array, num_classes: int, config: ParentsConfig
) -> list[Array]:
    parents = np.arange(config.count)
    homes = min(config.count, num_classes)
    dealt: list[list[Array]] = [[] for _ in parents]
    for c in range(num_classes):
        members = rng.permutation(np.flatnonzero(labels == c))
        at_home = parents % homes == c % homes
        cut = len(members) if at_home.all() else round(config.skew * len(members))
        for group, portion in ((at_home, members[:cut]), (~at_home, members[cut:])):
            # In random order, because the first parts of an uneven cut are the larger ones.
            takers = rng.permutation(parents[group])
            parts = np.array_split(portion, max(len(takers), 1))
            for parent, part in zip(takers, parts, strict=False):
                dealt[parent].append(part)
    return [np.concatenate(parts) for parts in dealt]


SHARDS: dict[str, Callable[..., list[Array]]] = {
    "same": _same,
    "disjoint": _disjoint,
    "skewed": _skewed,
}
"""What the parents see: name -> `(rng, labels, num_classes, config) -> indices of each parent`."""


class ParentsConfig(Section):
    """How many parents there are, and what each one saw or where it comes from.

    Attributes:
        paths: files or folders of trained parents, at least two (see `load_parents`); these are
            loaded, and none is trained. Empty: `count` parents are trained.
        keep: pairs (regular expression for leaf paths, number of a parent): those leaves come from
            that parent alone, and may have other shapes in the others.
        rename: pairs (name in a file, or regular expression for it; path of the leaf), where the
            automatic match is not enough.
        ignore: regular expression; arrays of the files whose name it matches are left out.
        cast: floating-point arrays of the files may have another precision.
        count: number of parents K; with `paths`, their number.
        shards: `same` (all training images for each), `disjoint` (equal parts) or `skewed` (each
            parent is at home in its own classes and sees few images of the others).
        skew: for `skewed`, the share of a class's images that goes to the parent at home in it;
            1 means that a parent never sees the other classes.
        shared_initialization: all parents start from the same weights.
    """

    section = "parents"
    paths: tuple[Place, ...] = ()
    keep: tuple[tuple[Pattern, int], ...] = ()
    rename: tuple[tuple[Pattern, str], ...] = ()
    ignore: Pattern | None = None
    cast: bool = False
    count: int = 2
    shards: Annotated[str, one_of(SHARDS)] = "same"
    skew: Fraction = 0.8
    shared_initialization: bool = False

    def _check(self) -> None:
        if self.paths:
            named = len(self.paths) >= 2 and all(self.paths)
            self.require(named, "paths", "at least two paths are needed for a merge")
            fits = self.count in (type(self).model_fields["count"].default, len(self.paths))
            self.require(fits, "count", f"parents.paths names {len(self.paths)}")
            object.__setattr__(self, "count", len(self.paths))
        self.require(self.count >= 2, "count", "at least two parents are needed for a merge")
        there = all(0 <= parent < self.count for _, parent in self.keep)
        self.require(there, "keep", f"the parents are 0 to {self.count - 1}")
        for name in ("rename", "ignore"):
            ok = bool(self.paths) or not getattr(self, name)
            self.require(ok, name, "it is for parents from files, and parents.paths is empty")


def shards(
    key: int | jax.Array, labels: npt.ArrayLike, num_classes: int, config: ParentsConfig
) -> list[npt.NDArray[np.int32]]:
    """Deals the training images out to the parents.

    `same` gives every parent every image, `disjoint` gives equal random parts. With `skewed`,
    parent k is at home in the classes c with c % K == k (with more parents than classes, several
    parents share a home). A share `config.skew` of a class goes to the parents at home in it, the
    rest evenly to the others.

    Args:
        key: seed of the draw, an integer or a JAX key.
        labels: int [N], in [0, num_classes).
        num_classes: number of classes.
        config: the number of parents K and the kind of shards.

    Returns:
        K arrays of indices into `labels`, int32, each in ascending order.

    Raises:
        DataError: a parent would receive no image.

    Example:
        >>> skewed = ParentsConfig(shards="skewed", skew=1.0)
        >>> shards(0, [0, 1, 2, 3, 0, 1], 4, skewed)
        [array([0, 2, 4], dtype=int32), array([1, 3, 5], dtype=int32)]
    """
    labels = np.asarray(labels)
    dealt = SHARDS[config.shards](_generator(key), labels, num_classes, config)
    for parent, shard in enumerate(dealt):
        if not len(shard):
            raise DataError(
                f"parent {parent} of {config.count} receives no training image: "
                f"{len(labels)} images, parents.shards is {config.shards}"
            )
    return [np.sort(shard).astype(np.int32) for shard in dealt]


def prepare(name: str, data_dir: str | None = None) -> Path:
    """Downloads a TFDS set and prepares it in the format that `load` reads. Needs TensorFlow.

    Args:
        name: name of the TFDS set, for example `cifar10`.
        data_dir: TFDS directory; None takes TFDS's own default.

    Returns:
        The directory of the prepared set.

    Raises:
        DataError: the set is unknown, or TensorFlow is missing.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            f"preparing {name} needs TensorFlow (once), which is not installed: "
            'pip install -e ".[prepare]"'
        )
    builder = _builder(name, data_dir)
    builder.download_and_prepare()
    return Path(builder.data_dir)


def _generator(key: int | jax.Array) -> np.random.Generator:
    if isinstance(key, (int, np.integer)):
        return np.random.default_rng(int(key))
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return np.random.default_rng(np.asarray(jax.random.key_data(key) if typed else key).ravel())


def _to_unit(images: Array) -> npt.NDArray[np.float32]:
    if images.dtype == np.uint8:
        return images.astype(np.float32) / np.float32(255)
    return images.astype(np.float32)


def _draw(rng: np.random.Generator, sizes: dict[str, int], config: DataConfig) -> dict[str, Array]:
    """For each split, the rows of its images; a split that is no official part has training's."""
    rows = {part: rng.permutation(size) for part, size in sizes.items()}
    fractions = {"test": config.test_fraction, "validation": config.validation_fraction}
    for name, fraction in fractions.items():
        if name not in rows:
            cut = round(fraction * len(rows["train"]))
            rows[name], rows["train"] = rows["train"][:cut], rows["train"][cut:]
    return {name: of_split[: config.limit] for name, of_split in rows.items()}


def _load_digits() -> _Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    return _Source({"train": (images, digits.target)}, 10, DIGITS)


def _load_own(function: Callable[[], Any]) -> _Source:
    """What a user's function returns; `check_dataset` checks the rest."""
    name, parts = getattr(function, "__name__", repr(function)), function()
    wanted = "a dictionary of pairs (images, labels) by train, validation and test is needed"
    if not isinstance(parts, dict) or not set(parts) <= set(_PARTS):
        told = ", ".join(map(str, parts)) if isinstance(parts, dict) else type(parts).__name__
        raise DataError(f"data.name: {name}() returned {told}: {wanted}")
    if not all(isinstance(part, tuple) and len(part) == 2 for part in parts.values()):
        raise DataError(f"data.name: {name}() returned parts that are not pairs: {wanted}")
    parts = {part: (np.asarray(x), np.asarray(y)) for part, (x, y) in parts.items()}
    most = max((y.max(initial=0) for _, y in parts.values()), default=0)
    return _Source(parts, int(most) + 1, name)


def _load_tfds(config: DataConfig) -> _Source:
    """A set from its cache or, where that is absent, damaged or older, from TFDS."""
    for path in _cache_files(config):
        source = _read_cache(path, _stamp(config))
        if source is not None:
            return source
    with _from_tfds(config):
        builder = _opened(config)
        there = [name for name in _PARTS if name in builder.info.splits]
        parts = {name: _read(builder, name, config) for name in there}
        num_classes = builder.info.features[builder.info.supervised_keys[1]].num_classes
        source = _Source(parts, int(num_classes), str(builder.info.full_name))
    for path in _cache_files(config):
        # It only saves time: a full disk must not stop a run.
        with contextlib.suppress(OSError):
            _write_cache(path, source, _stamp(config))
            break
    return source


@contextlib.contextmanager
def _from_tfds(config: DataConfig) -> Iterator[None]:
    """Whatever TFDS raises for files that are missing, cut or damaged becomes one line.

    Its own remarks (no OpenCV, an empty folder) are kept off the terminal.
    """
    where, logger = f"{config.name} in {_data_dir(config)}", logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except MegajaxError:
        raise
    except ImportError as error:
        raise DataError(
            f"{where} cannot be read without {error.name}: pip install tensorflow-datasets "
            f"array_record importlib_resources pillow, or copy {_cache_files(config)[0]} from a "
            "machine that has read it"
        ) from None
    except Exception as error:  # of many kinds
        raise DataError(
            f"{where} cannot be read: {first_line(error)}; is a file missing or damaged? To make "
            f"it anew, delete the folder and {_how_to_prepare(config)}"
        ) from error
    finally:
        logger.setLevel(level)


def _opened(config: DataConfig) -> Any:
    """The builder of a prepared set of labelled images."""
    builder = _builder(str(config.name), config.data_dir)
    if not builder.is_prepared():
        raise DataError(f"{config.name} is not prepared; {_how_to_prepare(config)}")
    features, keys = builder.info.features, builder.info.supervised_keys or ()
    image, label = (features[key] for key in keys) if len(keys) == 2 else (None, None)
    shape, num_classes = getattr(image, "shape", ()), getattr(label, "num_classes", None)
    if len(shape) != 3 or num_classes is None:
        raise DataError(f"{config.name} is not a set of labelled images: its keys are {keys}")
    if None in shape and config.image_size is None:
        raise DataError(
            f"{config.name} holds images of several sizes: give the one to resize to as "
            "data.image_size"
        )
    return builder


def _builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        # The format must always be given: with a data_dir alone it is not the default.
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise DataError(f"{name} is not a data set of tensorflow-datasets, nor digits") from None
    except (ValueError, AssertionError) as error:
        if "File format is already set" in str(error):
            raise DataError(
                f"{name} is prepared in {data_dir or 'the default directory'} in a format that "
                "only TensorFlow can read; prepare it elsewhere: "
                f"python -m megajax.data prepare {name} --data_dir ANOTHER_DIRECTORY"
            ) from error
        reason = first_line(error)
        raise DataError(f"{name} cannot be opened by tensorflow-datasets: {reason}") from error


def _how_to_prepare(config: DataConfig) -> str:
    where = f" --data_dir {config.data_dir}" if config.data_dir else ""
    return (
        'run once: pip install -e ".[prepare]" && '
        f"python -m megajax.data prepare {config.name}{where}"
    )


def _read(
    builder: Any, part: str, config: DataConfig
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Decodes all images of an official part: uint8 [N, H, W, C] with labels int32 [N]."""
    image_key, label_key = builder.info.supervised_keys
    images, labels = [], []
    source = builder.as_data_source(part)
    for start in range(0, len(source), BLOCK):
        for record in source.__getitems__(range(start, min(start + BLOCK, len(source)))):
            images.append(_resized(record[image_key], config.image_size))
            labels.append(record[label_key])
    return np.stack(images), np.asarray(labels, np.int32)


def _resized(image: npt.NDArray[np.uint8], size: int | None) -> npt.NDArray[np.uint8]:
    """The largest central square of an image, resized."""
    height, width, channels = image.shape
    if size is None or (height, width) == (size, size):
        return image
    from PIL import Image

    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(image[..., 0] if channels == 1 else image).resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    return np.asarray(square, np.uint8).reshape(size, size, channels)


def _data_dir(config: DataConfig) -> Path:
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(config.data_dir or default).expanduser().resolve()


def _cache_files(config: DataConfig) -> list[Path]:
    """Where a set is cached: in the TFDS directory or, where that is read-only, at the user's."""
    folder = _data_dir(config)
    size = "" if config.image_size is None else f"-{config.image_size}"
    name = re.sub(r"\W+", "-", str(config.name)) + size
    own = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "megajax"
    place = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    return [folder / "megajax" / f"{name}.npz", own / f"{name}-{place}.npz"]


def _stamp(config: DataConfig) -> str | None:
    """A digest of what TFDS says about the prepared set; None where only its cache is there."""
    folder = _data_dir(config) / str(config.name).partition(":")[0]
    about = sorted(folder.rglob("dataset_info.json"))
    parts = [str(path.relative_to(folder)).encode() + path.read_bytes() for path in about]
    return hashlib.sha256(b"".join(parts)).hexdigest() if parts else None


def _read_cache(path: Path, stamp: str | None) -> _Source | None:
    """The set, if the file is there, whole and made from what is prepared now."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            about = json.loads(str(stored["about"]))
            if stamp not in (None, about["stamp"]):
                return None
            parts = {
                part: (stored[f"{part}_images"], stored[f"{part}_labels"])
                for part in about["parts"]
            }
            return _Source(parts, about["num_classes"], about["name"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _write_cache(path: Path, source: _Source, stamp: str | None) -> None:
    """Writes the arrays under a temporary name first, so that no reader sees half a file."""
    if not _is_writable(path.parent):
        raise OSError(f"{path.parent} is read-only")
    about = {**source._asdict(), "parts": list(source.parts), "stamp": stamp}
    arrays: dict[str, Any] = {"about": json.dumps(about)}
    for part, (images, labels) in source.parts.items():
        arrays |= {f"{part}_images": images, f"{part}_labels": labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_writable(folder: Path) -> bool:
    """The mode is asked too, since a superuser may write even where nobody is meant to."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return bool(there.stat().st_mode & 0o222) and os.access(there, os.W_OK)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m megajax.data prepare NAME [--data_dir DIR]`.

    Args:
        arguments: the words after the module's name; None takes the command line's.

    Returns:
        The exit code: 0, or 2 after one line on the standard error that names what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megajax.data",
        description="Downloads a TFDS image set and prepares it for megajax. Needs TensorFlow.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("prepare", help="download and prepare a TFDS set, once")
    command.add_argument("name", help="name of the TFDS set, for example cifar10")
    command.add_argument("--data_dir", help="TFDS directory (default: TFDS's own)")
    options = parser.parse_args(arguments)
    try:
        print(prepare(options.name, options.data_dir))
    except MegajaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
