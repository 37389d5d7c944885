"""Five hundred random mistakes, each one line that names the field, the leaf or the file.

Drawn by hypothesis from a fixed seed: the same five hundred every time.
"""

import string
import types
import typing

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import megajax as mj
from megajax.run.config import Config, from_dict
from megajax.sections import Section
from megajax.trees import check_parents, checked_parents, leaf_paths

KINDS = ("msgpack", "npz", "safetensors")


def mistakes(count):
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


def one_line(error, exception, *parts):
    """The documented exception, in one line that has these parts."""
    assert isinstance(error, exception)
    assert isinstance(error, mj.MegajaxError)
    message = str(error)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


SECTIONS = {
    name: kind
    for name, kind in typing.get_type_hints(Config).items()
    if isinstance(kind, type) and issubclass(kind, Section)
}
FIELDS = [
    (section, name, typing.get_type_hints(kind)[name])
    for section, kind in SECTIONS.items()
    for name in kind.model_fields
]


def full_name(section, name):
    return f"{SECTIONS[section].section}.{name}"


# What a field of this type (as it is written) can certainly not be.
NEVER = [b"bytes", {1, 2}, 1j, range(3), [object()], [[["deep"]]], NotImplemented]
WRONG = {
    int: [2.5, "many", "", True, None, [1]],
    float: ["much", "", True, None, [0.5]],
    str: [3, 0.5, False, None, ["a"]],
    bool: [0, 1, "yes", None, [True]],
    tuple: [3, 0.5, True, None, [1], [["a"], 2]],
}


def wrong_values(annotation):
    """Values that have no type that the annotation allows."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = typing.get_args(annotation) if union else (annotation,)
    items = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is tuple]
    of_integers = any(int in (item, *typing.get_args(item)) for item in items)
    kinds = [typing.get_origin(kind) or kind for kind in kinds]
    values = [*NEVER]
    if not any(kind in WRONG for kind in kinds):
        values += [3, "text", None]
    for kind in kinds:
        values += WRONG.get(kind, [])

    def allowed(value):
        if value is None:
            return type(None) in kinds
        if value == [1]:
            return of_integers
        if isinstance(value, bool):
            return bool in kinds
        if isinstance(value, (int, float, str)):
            numbers = (int, float) if isinstance(value, int) else (type(value),)
            return any(kind in numbers for kind in kinds)
        return False

    return [value for value in values if not allowed(value)]


@st.composite
def wrong_types(draw):
    section, name, annotation = draw(st.sampled_from(FIELDS))
    return section, name, draw(st.sampled_from(wrong_values(annotation)))


@mistakes(120)
@given(wrong_types())
def test_a_value_of_a_wrong_type_names_its_field(mistake):
    section, name, value = mistake
    with pytest.raises(mj.MegajaxError) as error:
        from_dict({section: {name: value}})
    one_line(error.value, mj.ConfigError, full_name(section, name))


below = st.integers(-(10**9), -1)
tiny = st.floats(-1e9, -1e-6) | st.just(float("nan"))
outside = tiny | st.floats(1.000001, 1e9)
word = st.text(string.ascii_letters, min_size=1).map(lambda text: f"no_{text}")
OUT_OF_RANGE = {
    "data.validation_fraction": outside,
    "data.test_fraction": outside,
    "data.limit": st.integers(-(10**9), 0),
    "data.image_size": st.integers(-(10**9), 0),
    "data.name": st.just(""),
    "parents.count": st.integers(-(10**9), 1),
    "parents.shards": word,
    "parents.skew": outside,
    "parents.paths": st.lists(st.text(min_size=1), min_size=1, max_size=1),
    "parents.keep": st.tuples(st.tuples(st.text(), below | st.integers(2))),
    "training.epochs": st.integers(-(10**9), 0),
    "training.batch_size": st.integers(-(10**9), 0),
    "training.learning_rate": tiny,
    "training.warmup_epochs": tiny,
    "training.weight_decay": tiny,
    "training.momentum": outside,
    "training.optimizer": word,
    "training.schedule": word,
    "training.augment": st.lists(word, min_size=1),
    "align.method": word,
    "align.reference": below | word,
    "recalibrate.examples": st.integers(-(10**9), 1),
    "genome.granularity": word,
    "fitness.batch_size": st.integers(-(10**9), 0),
    "fitness.population_chunk": st.integers(-(10**9), 0) | word,
    "fitness.metric": word,
    "evolution.population_size": st.integers(-(10**9), 1),
    "evolution.generations": below,
    "evolution.elites": below,
    "evolution.selection": word,
    "evolution.tournament_size": st.integers(-(10**9), 0) | st.integers(33),
    "evolution.crossover": word | st.lists(word, max_size=3),
    "evolution.mutation": word | st.lists(word, max_size=3),
    "evolution.mutation_rate": outside,
    "evolution.mutation_scale": tiny,
    "evolution.survival": word,
    "evolution.generations_per_chunk": st.integers(-(10**9), 0),
    "evolution.patience": st.integers(-(10**9), 0),
    "evolution.time_budget": tiny,
    "evolution.evaluation_budget": below,
}


@st.composite
def out_of_range(draw):
    field = draw(st.sampled_from(sorted(OUT_OF_RANGE)))
    return field, draw(OUT_OF_RANGE[field]), draw(st.booleans())


@mistakes(120)
@given(out_of_range())
def test_a_value_out_of_range_names_its_field(mistake):
    field, value, edited = mistake
    section, name = field.split(".")
    build = (lambda values: Config().replace(**values)) if edited else from_dict
    with pytest.raises(mj.MegajaxError) as error:
        build({section: {name: value}})
    one_line(error.value, mj.ConfigError, field)


@mistakes(60)
@given(st.sampled_from(["", *SECTIONS]), st.text(string.printable[:95], min_size=1), st.integers())
def test_a_field_or_section_that_does_not_exist_is_named(section, name, value):
    known = SECTIONS.get(section, Config).model_fields
    unknown = name if name not in known else f"{name}_"
    with pytest.raises(mj.MegajaxError) as error:
        from_dict({section: {unknown: value}} if section else {unknown: value})
    one_line(error.value, mj.ConfigError, f"{section}.{unknown}" if section else unknown)


def parent(seed):
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "conv": {"kernel": rng.normal(size=(3, 3, 2, 4)).astype(np.float32)},
            "head": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)},
        },
        "half": (rng.normal(size=5).astype(ml_dtypes.bfloat16), rng.normal(size=(2, 2))),
        "steps": np.arange(seed + 1, seed + 3),
    }


PATHS = leaf_paths(parent(0))
LEAF_MISTAKES = {
    "longer": lambda leaf: np.concatenate([leaf, leaf]),
    "shorter": lambda leaf: leaf[:-1],
    "one more axis": lambda leaf: leaf[None],
    "flat": lambda leaf: np.append(leaf.ravel(), leaf.ravel()),
    "empty": lambda leaf: leaf[:0],
    "scalar": lambda leaf: leaf.ravel()[0],
    "dtype": lambda leaf: leaf.astype(np.int8),
    "precision": lambda leaf: leaf.astype(np.float16),
    "missing": None,
    "extra": None,
}
VALUES = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


def spoilt(seed, path, mistake, place):
    """A parent with a mistake at a leaf, and the path that must be named."""
    tree = dict(zip(PATHS, jax.tree.leaves(parent(seed)), strict=True))
    if mistake in VALUES:
        leaf = tree[path].copy()
        leaf.flat[place % leaf.size] = VALUES[mistake]
        tree[path] = leaf
    elif mistake == "missing":
        del tree[path]
    elif mistake == "extra":
        path = f"{path}_{place}"
        tree[path] = np.ones(2)
    else:
        tree[path] = LEAF_MISTAKES[mistake](tree[path])
    return tree, path


flat_parent = dict(zip(PATHS, jax.tree.leaves(parent(0)), strict=True))


@mistakes(100)
@given(
    st.sampled_from(PATHS),
    st.sampled_from([*LEAF_MISTAKES, *VALUES]),
    st.integers(0, 10**6),
    st.integers(1, 3),
)
def test_a_parent_that_does_not_fit_names_its_leaf(path, mistake, place, where):
    if mistake in VALUES and path == "steps":
        path = "params/head/bias"  # whole numbers are always finite
    bad, named = spoilt(where, path, mistake, place)
    parents = [{p: leaf * 2 for p, leaf in flat_parent.items()} for _ in range(4)]
    parents[where] = bad
    for check in (check_parents, checked_parents):
        with pytest.raises(mj.MegajaxError) as error:
            check(parents)
        one_line(error.value, mj.ParentsError, f"leaf {named}", f"parent {where}")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@mistakes(60)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(PATHS),
    st.sampled_from(sorted(LEAF_MISTAKES)),
    st.integers(0, 10**6),
)
def test_a_file_of_another_network_names_itself_and_the_leaf(files, kind, path, mistake, place):
    bad, named = spoilt(0, path, mistake, place)
    file = mj.save_network(files / f"{mistake.replace(' ', '_')}.{kind}", bad)
    with pytest.raises(mj.MegajaxError) as error:
        mj.load_parents([file], like=flat_parent)
    one_line(error.value, mj.InterchangeError, str(file), named)


@mistakes(60)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(["truncated", "flipped", "junk", "swapped"]),
    st.integers(0, 10**9),
    st.binary(max_size=300),
)
def test_a_damaged_file_names_itself(files, kind, damage, place, junk):
    file = mj.save_network(files / f"{damage}.{kind}", flat_parent)
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        data = data[: place % len(data)]
    elif damage == "flipped":
        data[place % len(data)] ^= 1 << place % 8
    else:
        file.with_name(file.name + ".sha256").unlink()
        data = junk
        if damage == "swapped":  # whole, but of another format than its name says
            other = KINDS[(KINDS.index(kind) + 1) % len(KINDS)]
            data = mj.save_network(files / f"other.{other}", flat_parent).read_bytes()
    file.write_bytes(data)
    with pytest.raises(mj.MegajaxError) as error:
        mj.load_network(file, like=flat_parent)
    one_line(error.value, mj.InterchangeError, str(file))
