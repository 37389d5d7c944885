"""Parents whose leaves are not all plain weights: what is mixed, taken over or refused."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import megajax as mj
from megajax.trees import check_parents, is_mixable, on_host

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 4)).astype(np.float32)
LABELS = RNG.integers(0, 3, 20)
BIG = np.array([2**40 + 1, -(2**50)], np.int64)


def parent(seed):
    """Every kind of leaf that there is; those that cannot be mixed are alike in all parents."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape)

    return {
        "bfloat16": jnp.asarray(normal(3), jnp.bfloat16),
        "big": BIG,
        "bool": np.array([True, False]),
        "complex": (normal(3) + 1j * normal(3)).astype(np.complex64),
        "float": float(normal()),
        "float16": normal(3).astype(np.float16),
        "fp8": np.array([0.5, 1.5], ml_dtypes.float8_e4m3fn),
        "int": 7,
        "jax": jnp.asarray(normal(4, 3), jnp.float32),
        "key": jax.random.key(3),
        "none": None,
        "numpy": normal(3).astype(np.float32),
        "old_key": jax.random.PRNGKey(3),
        "steps": np.uint8(200),
    }


PARENTS = [parent(0), parent(1)]
MIXED = ("bfloat16", "complex", "float", "float16", "jax", "numpy")


def network(w, x):
    """Uses every leaf."""
    total = w["bfloat16"].astype(jnp.float32) + w["float16"] + w["numpy"] + w["complex"].real
    total += w["float"] + w["int"] + w["steps"] + jax.random.normal(w["key"], (3,))
    total += w["fp8"].astype(jnp.float32).sum() + w["bool"].sum() + w["big"].astype(jnp.float32)[0]
    return x @ w["jax"] + total - total.mean() + 0 * w["old_key"][0]


def merge(parents=PARENTS, apply_fn=network, **options):
    return mj.merge(
        jax.random.key(0),
        apply_fn,
        parents,
        (X, LABELS),
        align=options.pop("align", mj.AlignConfig(method="none")),
        genome=options.pop("genome", mj.GenomeConfig(granularity="leaf")),
        evolution=mj.EvolutionConfig(population_size=6, generations=2),
        **options,
    )


@pytest.fixture(scope="module")
def merged():
    return merge()


def test_only_floating_and_complex_leaves_wider_than_a_byte_are_mixed(merged):
    assert [name for name, leaf in PARENTS[0].items() if leaf is not None and is_mixable(leaf)] == [
        *MIXED
    ]
    assert merged.genome.num_genes == len(MIXED)
    genes = np.asarray(merged.genes)
    for gene, name in zip(genes, MIXED, strict=True):
        leaves = [np.asarray(one[name]).astype(np.complex128) for one in PARENTS]
        expected = gene[0] * leaves[0] + gene[1] * leaves[1]
        found = np.asarray(merged.variables[name])
        close = {"rtol": 1e-2, "atol": 1e-2} if "16" in name else {"rtol": 1e-5, "atol": 1e-6}
        np.testing.assert_allclose(found.astype(np.complex128), expected, **close)


def test_the_others_come_back_unchanged(merged):
    found = merged.variables
    assert jax.tree.structure(found) == jax.tree.structure(PARENTS[0])
    assert found["none"] is None
    np.testing.assert_array_equal(found["big"], BIG, strict=True)  # beyond 32 bits
    for name in ("bool", "fp8", "int", "steps", "old_key"):
        expected = np.asarray(PARENTS[0][name])
        np.testing.assert_array_equal(found[name], expected, strict=True)
    assert found["key"] == PARENTS[0]["key"]
    for name in MIXED:
        assert np.asarray(found[name]).shape == np.shape(PARENTS[0][name])
    for name in ("bfloat16", "float16", "complex", "jax", "numpy"):
        assert found[name].dtype == PARENTS[0][name].dtype


def test_parents_are_scored_as_they_were_given(merged):
    for one, fitness in zip(PARENTS, merged.parent_fitness, strict=True):
        logits = np.asarray(network(jax.tree.map(jnp.asarray, one), X), np.float64)
        expected = mj.measure(logits, LABELS)
        np.testing.assert_allclose(fitness, -expected.nll, rtol=1e-4)
    assert merged.fitness >= merged.parent_fitness.max() - 1e-5  # but for rounding


@pytest.mark.parametrize(
    ("name", "other", "kind"),
    [
        ("int", 8, "int64"),
        ("big", BIG + 1, "int64"),
        ("bool", np.array([True, True]), "bool"),
        ("fp8", np.array([0.5, 2], ml_dtypes.float8_e4m3fn), "float8_e4m3fn"),
        ("key", jax.random.key(4), "key<fry>"),
        ("steps", np.uint8(201), "uint8"),
    ],
)
def test_unmixed_leaves_that_differ_need_to_be_kept(name, other, kind):
    parents = [PARENTS[0], {**PARENTS[1], name: other}]
    message = (
        f"^leaf {name}: {kind} cannot be mixed, and the parents differ in it; "
        f"keep={{'{name}': 0}} takes parent 0's for every network$"
    )
    with pytest.raises(mj.ParentsError, match=message):
        mj.problem_for(network, parents, (X, LABELS), genome=mj.GenomeConfig(granularity="leaf"))
    problem = mj.problem_for(
        network,
        parents,
        (X, LABELS),
        genome=mj.GenomeConfig(granularity="leaf"),
        keep={f"^{name}$": 1},
    )
    assert problem.genome.num_genes == len(MIXED)


def test_all_leaves_that_differ_are_listed_and_frozen_weights_need_nothing():
    parents = [PARENTS[0], {**PARENTS[1], "int": 8, "steps": np.uint8(1)}]
    with pytest.raises(mj.ParentsError, match=r"^leaf int, steps: int64 cannot be mixed, and"):
        merge(parents)
    frozen = mj.GenomeConfig(granularity="leaf", freeze="float")
    genome = mj.problem_for(network, PARENTS, (X, LABELS), genome=frozen).genome
    assert genome.num_genes == 3  # of 6 without bfloat16, float and float16


def test_leaves_that_no_program_reads_may_differ():
    """Counters of training steps, say; one task's program reading them is enough to refuse."""

    def blind(w, x):
        return network({**w, "steps": np.uint8(200)}, x)

    parents = [PARENTS[0], {**PARENTS[1], "int": 8, "steps": np.uint8(201)}]
    with pytest.raises(mj.ParentsError, match=r"^leaf int: int64 cannot be mixed, and the parents"):
        merge(parents, blind)
    parents[1]["int"] = 7
    result = merge(parents, blind)
    assert result.variables["steps"] == 200  # parent 0's
    one = blind(jax.tree.map(jnp.asarray, parents[1]), X)
    np.testing.assert_allclose(result.parent_fitness[1], -mj.measure(one, LABELS).nll, rtol=1e-4)
    tasks = [mj.Task(X, LABELS), mj.Task(X, LABELS, apply_fn=network)]
    with pytest.raises(mj.ParentsError, match=r"^leaf steps: uint8 cannot be mixed"):
        mj.problem_for(blind, parents, tasks, genome=mj.GenomeConfig(granularity="leaf"))


def test_a_kept_leaf_is_its_owners_in_the_result():
    other = {**PARENTS[1], "big": BIG + 7, "key": jax.random.key(9)}
    result = merge([PARENTS[0], other], keep={"big": 1, "^key": 0})
    np.testing.assert_array_equal(result.variables["big"], BIG + 7, strict=True)
    assert result.variables["key"] == PARENTS[0]["key"]


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        ("text", "str"),
        (b"bytes", "bytes"),
        (np.array(["text"]), "ndarray of <U4"),
        (np.array([None, 3]), "ndarray of object"),
        (np.array(["2020-01-01"], "datetime64[D]"), r"ndarray of datetime64\[D\]"),
        (len, "builtin_function_or_method"),
        (lambda x: x, "function"),
        (object(), "object"),
    ],
)
def test_leaves_that_are_no_numbers_are_named(leaf, kind):
    message = f"^leaf what of parent 0 is a {kind}: arrays or numbers are needed$"
    with pytest.raises(mj.ParentsError, match=message):
        check_parents([{**one, "what": leaf} for one in PARENTS])


def test_other_things_than_parents_are_refused():
    class State:
        """As a model of a library that JAX knows nothing of."""

    for parents, message in (
        (PARENTS[0], "parents is a dict: a list of variable pytrees is needed"),
        (iter(PARENTS), "parents is a list_iterator: a list of variable pytrees is needed"),
        ([State(), State()], r"leaf \(the whole tree\) of parent 0 is a State: arrays or numbers"),
        ([{}, {}], "parent 0 has no leaves: its variables are empty"),
        ([], "0 parent given: a merge needs at least two"),
    ):
        with pytest.raises(mj.ParentsError, match=message):
            merge(parents)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", MIXED)
def test_numbers_that_are_not_finite_are_counted(name, value):
    leaf = PARENTS[1][name]
    if name == "float":
        bad = value
    else:
        bad = np.array(leaf)
        bad.flat[0] = value
    size = np.size(leaf)
    message = f"^leaf {name} of parent 1: 1 of {size} values are not finite$"
    with pytest.raises(mj.ParentsError, match=message):
        check_parents([PARENTS[0], {**PARENTS[1], name: bad}])


def test_numbers_that_only_64_bits_hold_are_not_finite_on_the_device():
    wide = {"w": np.array([1.0, 1e300])}
    with pytest.raises(mj.ParentsError, match="leaf w of parent 1: 1 of 2 values are not finite"):
        check_parents([{"w": np.ones(2)}, wide])


def test_parents_on_the_host():
    host = on_host(PARENTS[0])
    for name, leaf in host.items():
        assert leaf is None or isinstance(leaf, np.ndarray) or name == "key"
    assert host["key"] is PARENTS[0]["key"]
    assert host["bfloat16"].dtype == jnp.bfloat16


def test_double_precision_parents_come_back_as_the_device_holds_them():
    parents = [{"w": RNG.normal(size=(4, 3))} for _ in range(2)]
    result = merge(parents, lambda w, x: x @ w["w"])
    assert np.asarray(result.variables["w"]).dtype == np.float32
    assert result.fitness >= result.parent_fitness.max() - 1e-5
