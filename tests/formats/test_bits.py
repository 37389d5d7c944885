"""Every leaf comes back bit for bit, from every format, or is refused by its name."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import megajax as mj
from megajax.formats import FORMATS
from megajax.trees import leaf_paths

DTYPES = [np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)]
DTYPES += [
    np.dtype(name) for name in ("?", "f2", "f4", "f8", "c8", "c16", "longdouble", ">f4", ">i8")
]
DTYPES += [
    np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
]
DTYPES += [
    np.dtype(getattr(ml_dtypes, name))
    for name in ("int4", "uint4", "int2", "float8_e4m3fnuz", "float8_e8m0fnu", "float4_e2m1fn")
]
MAY_BE_REFUSED = {*DTYPES[-6:], np.dtype("longdouble"), np.dtype("c16")}
WEIRD = "ab/.:*%é\\ 0"


@st.composite
def arrays(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 5]), max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = int(np.prod(shape))
    if dtype.kind == "b" or dtype in MAY_BE_REFUSED:  # not all bits are values
        array = rng.integers(0, 2, size).astype(dtype).reshape(shape)
    else:
        array = np.frombuffer(rng.bytes(size * dtype.itemsize), dtype).reshape(shape)
    layouts = [np.asarray, np.asfortranarray, lambda it: it.copy()[::-1][::-1] if it.ndim else it]
    return draw(st.sampled_from(layouts))(array)


numbers = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.complex_numbers(),
    st.sampled_from([np.float32(0.1), np.int8(-3), np.bool_(True), jnp.float32(2), 2**70]),
)
names = st.one_of(st.sampled_from("wabc"), st.text(WEIRD, max_size=4))
leaves = st.one_of(arrays(), numbers)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.dictionaries(names, inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=5,
)


def bits(leaf):
    array = np.asarray(leaf)
    array = array.astype(array.dtype.newbyteorder("="))
    return array.dtype, array.shape, array.tobytes()


def refusable(leaf):
    """Whether some format may refuse a leaf: for its dtype, or as no number of 64 bits."""
    dtype = np.asarray(leaf).dtype
    return dtype.hasobject or dtype in MAY_BE_REFUSED


@pytest.mark.parametrize("kind", FORMATS)
@settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(tree=trees)
def test_every_leaf_survives_or_is_refused_by_its_name(kind, tree):
    paths = leaf_paths(tree)
    with tempfile.TemporaryDirectory() as folder:
        refused = ""
        try:
            file = mj.save_network(Path(folder) / "net", tree, format=kind)
        except mj.InterchangeError as error:
            refused = str(error)
        if refused:
            assert any(path in refused for path in paths)
            odd = any(
                not {*path} <= {*"wabc0123/"} or "//" in f"/{path}/" for path in paths if path
            )
            leaves = jax.tree.leaves(tree)
            assert odd or any(map(refusable, leaves)) or not any(map(np.size, leaves))
            assert not [at for at in Path(folder).rglob("*") if at.is_file()]
            return
        like = jax.tree.map(np.asarray, tree)
        loaded = mj.load_network(file, like)
    assert jax.tree.structure(loaded) == jax.tree.structure(like)
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree), strict=True):
        assert bits(one) == bits(other)
