"""Problems: evaluation against NumPy; what is passed and never closed over; the layout."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import megajax as mj
from megajax.errors import DeviceError
from megajax.merging import problem as problems
from megajax.merging.devices import Layout, choose_layout
from megajax.merging.masks import masks
from megajax.merging.problem import evaluate, express, map_chunks, scores_of
from megajax.program import memory
from megajax.program.memory import check_fits, live_bytes


class Net(nn.Module):
    convolve: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x)).mean((1, 2)) if self.convolve else x.reshape(len(x), -1)
        return nn.Dense(4)(x)


NET = Net()
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(37, 6, 6, 2)).astype(np.float32)
LABELS = RNG.integers(0, 4, 37)
PARENTS = [NET.init(jax.random.key(k), IMAGES) for k in range(2)]


def apply_fn(variables, x):
    return NET.apply(variables, x)


def problem_of(metric="accuracy", batch_size=10, chunk=1, freeze=None, **options):
    return mj.problem_for(
        apply_fn,
        PARENTS,
        options.pop("data", (IMAGES, LABELS)),
        genome=mj.GenomeConfig(granularity="leaf", freeze=freeze),
        fitness=mj.FitnessConfig(metric=metric, batch_size=batch_size, population_chunk=chunk),
        **options,
    )


PLAIN = problem_of()
GENES = jax.jit(PLAIN.genome.init, static_argnums=1)(jax.random.key(3), 9)
compiled = jax.jit(evaluate)


def fitness(problem, genes=GENES):
    return np.asarray(compiled(problem, genes)[0])


@pytest.fixture(scope="module")
def logits():
    stacked = PLAIN.genome.stack(PARENTS)
    networks = [PLAIN.genome.express(genes, stacked) for genes in GENES]
    return np.array([np.asarray(NET.apply(net, IMAGES), np.float64) for net in networks])


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_fitness_is_numpys(logits):
    right = (logits.argmax(-1) == LABELS).mean(axis=1)
    values, aux = compiled(PLAIN, GENES)
    np.testing.assert_allclose(values, right, rtol=1e-6)
    assert values.dtype == jnp.float32
    assert aux == ((), ())
    expected = log_softmax(logits)[:, np.arange(37), LABELS].mean(axis=1)
    np.testing.assert_allclose(fitness(problem_of("cross_entropy")), expected, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 36, 1000])
def test_the_batches_do_not_change_the_result(batch_size):
    expected = fitness(problem_of("cross_entropy"))
    found = fitness(problem_of("cross_entropy", batch_size))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("chunk", [2, 4, 64])
def test_the_mapping_does_not_change_the_result(chunk):
    # XLA divides a vector by one number as it multiplies by the reciprocal.
    np.testing.assert_allclose(fitness(problem_of(chunk=chunk)), fitness(PLAIN), rtol=1e-6)
    smooth = "cross_entropy"
    found = fitness(problem_of(smooth, chunk=chunk))
    np.testing.assert_allclose(found, fitness(problem_of(smooth)), rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7])
def test_chunks_are_a_map_over_any_structure(chunk):
    xs = {"a": jnp.arange(10.0).reshape(5, 2), "b": jnp.arange(5)}
    found = map_chunks(lambda one: {"sum": one["a"].sum() + one["b"], "b": one["b"]}, xs, chunk)
    np.testing.assert_array_equal(found["sum"], [1, 6, 11, 16, 21])
    np.testing.assert_array_equal(found["b"], np.arange(5))


def test_correctness_of_every_example_comes_back_in_order(logits):
    problem = replace(problem_of("cross_entropy"), per_example=True)
    values, aux = compiled(problem, GENES)
    assert aux.right.shape == (9, 40)  # four batches of ten
    there = np.asarray(problem.batches[0].valid).reshape(-1)
    np.testing.assert_array_equal(aux.right[:, there], logits.argmax(-1) == LABELS)
    assert not aux.right[:, ~there].any()
    np.testing.assert_array_equal(values, fitness(problem_of("cross_entropy")))


def test_a_users_metric_is_averaged():
    def twos(logits, labels):
        return jnp.where(labels == 2, 8.0, 0.0)

    np.testing.assert_allclose(fitness(problem_of(twos)), 8 * (LABELS == 2).mean(), rtol=1e-6)


def test_the_score_of_one_network_is_that_in_a_population():
    problem = problem_of("cross_entropy")
    for k, parent in enumerate(PARENTS):
        value, aux = scores_of(problem, parent)
        np.testing.assert_allclose(value, fitness(problem)[k], rtol=1e-6)
        assert aux == ((), ())


def test_problems_of_equal_shapes_and_choices_share_their_programs():
    first, again = problem_of(), problem_of()
    assert jax.tree.structure(first) == jax.tree.structure(again)
    assert hash(jax.tree.structure(first)) == hash(jax.tree.structure(again))
    assert jax.tree.structure(first) != jax.tree.structure(problem_of("cross_entropy"))
    assert jax.tree.structure(first) != jax.tree.structure(problem_of(chunk=2))
    fitness(first)
    programs = compiled._cache_size()
    other = problem_of(data=(IMAGES[::-1], LABELS))
    other = replace(other, parents=jax.tree.map(lambda leaf: -leaf, other.parents))
    assert not np.array_equal(fitness(other), fitness(first))
    assert compiled._cache_size() == programs


def test_data_and_parents_are_arguments_of_the_program_not_constants():
    inputs, labels = np.zeros((64, 32, 32, 3), np.float32), np.zeros(64, int)
    problem = mj.problem_for(
        lambda w, x: x.reshape(len(x), -1) @ w["w"],
        [{"w": np.zeros((3072, 10), np.float32)}] * 2,
        (inputs, labels),
        genome=mj.GenomeConfig(granularity="element"),
    )
    assert problem.genome.num_genes == 30720
    program = jax.jit(evaluate).lower(problem, jnp.ones((3, 30720, 2)))
    assert len(program.as_text()) < 50_000


def test_everything_of_a_problem_lies_on_the_device():
    problem = problem_of(data=[mj.Task(IMAGES, LABELS), mj.Task(IMAGES, LABELS)])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(problem))
    genes = jax.device_put(GENES)
    compiled(PLAIN, genes)
    with jax.transfer_guard("disallow"):
        compiled(PLAIN, genes)


# Trees of inputs, targets and outputs ---------------------------------------------------------


def two_inputs(w, x):
    return {"logits": jnp.tanh(x["image"] @ w["a"]) @ w["b"], "size": x["more"][0] * w["c"]}


def of_two(outputs, targets):
    right = outputs["logits"].argmax(-1) == targets["label"]
    return right - (outputs["size"] - targets["size"]) ** 2


@pytest.mark.parametrize("freeze", [None, "a"])
def test_inputs_targets_and_outputs_may_be_trees(freeze):
    shapes = {"a": (4, 5), "b": (5, 3), "c": ()}
    parents = [
        {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(2)
    ]
    inputs = {
        "image": RNG.normal(size=(23, 4)).astype(np.float32),
        "more": (RNG.normal(size=23).astype(np.float32), np.arange(23)),
    }
    targets = {"label": RNG.integers(0, 3, 23), "size": RNG.normal(size=23).astype(np.float32)}
    problem = mj.problem_for(
        two_inputs,
        parents,
        mj.Task(inputs, targets, of_two),
        genome=mj.GenomeConfig(granularity="leaf", freeze=freeze),
        fitness=mj.FitnessConfig(batch_size=8),
    )
    assert problem.prefix is (freeze is not None)
    G = problem.genome.num_genes
    genes = problem.genome.sample(jax.random.key(0), (4, G, 2), jnp.float32)
    for value, shares in zip(fitness(problem, genes), np.asarray(genes), strict=True):
        rows = iter(shares)
        w = {
            name: parents[0][name]
            if name == freeze
            else sum(s * p[name] for s, p in zip(next(rows), parents, strict=True))
            for name in "abc"
        }
        expected = np.mean(np.asarray(of_two(two_inputs(w, inputs), targets)))
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


# Common layers --------------------------------------------------------------------------------


def test_frozen_first_layers_are_computed_once_with_the_same_result(monkeypatch):
    passes = []

    def counted(variables, x):
        def note(y):
            passes.append(len(y))
            return y

        hidden = jnp.tanh(x @ variables["first"])
        seen = jax.pure_callback(note, hidden, hidden, vmap_method="sequential")
        return seen @ variables["second"]

    shapes = {"first": (5, 7), "second": (7, 3)}
    parents = [
        {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(2)
    ]
    inputs, labels = RNG.normal(size=(20, 5)).astype(np.float32), RNG.integers(0, 3, 20)

    def of(**genome):
        return mj.problem_for(
            counted,
            parents,
            (inputs, labels),
            genome=mj.GenomeConfig(granularity="element", **genome),
            fitness=mj.FitnessConfig(batch_size=10),
        )

    assert not of().prefix
    shared = of(freeze="first")
    assert shared.prefix
    genes = shared.genome.sample(jax.random.key(0), (6, 21, 2), jnp.float32)

    def scored(problem):
        passes.clear()
        found = np.asarray(jax.jit(lambda *given: evaluate(*given)[0])(problem, genes))
        return found, len(passes)

    found, once = scored(shared)
    expected, each = scored(replace(shared, prefix=False))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (once, each) == (2, 12)  # batches, and those of all individuals
    monkeypatch.setattr(problems, "_MOST_FEATURES", 4 * 7 * 20 - 1)  # what they give is too much
    found, each = scored(shared)
    np.testing.assert_array_equal(found, expected)
    assert each == 12


# Recalibration --------------------------------------------------------------------------------


class Normal(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        return nn.Dense(3)(nn.relu(x))


FLAT = RNG.normal(size=(24, 4)).astype(np.float32)
NORMAL = Normal()
NORMAL_PARENTS = [NORMAL.init(jax.random.key(k), FLAT) for k in range(2)]
for _k, _parent in enumerate(NORMAL_PARENTS):
    _parent["batch_stats"]["BatchNorm_0"]["mean"] += _k + 1
    _parent["params"]["Dense_0"]["bias"] += jnp.arange(5.0)


def normal(variables, x):
    return NORMAL.apply(variables, x)


@pytest.mark.parametrize("kind", ["masks", "weights"])
def test_recalibrated_candidates_have_their_own_statistics_and_parents_keep_theirs(kind):
    problem = mj.problem_for(
        normal,
        NORMAL_PARENTS,
        (FLAT, np.arange(24) % 3),
        calibration=FLAT,
        genome=mj.GenomeConfig(kind=kind),
        recalibrate=mj.RecalibrateConfig(enabled=True, examples=16),
    )
    assert problem.calibration.shape == (16, 4)
    genes = problem.genome.init(jax.random.key(0), 4, problem.parents)
    networks = jax.jit(jax.vmap(express, (None, 0)))(problem, genes)
    plain = jax.vmap(problem.genome.express, (0, None))(genes, problem.parents)
    for i in range(4):
        found, before = (
            jax.tree.map(lambda leaf, i=i: leaf[i], tree) for tree in (networks, plain)
        )
        statistics = found["batch_stats"]["BatchNorm_0"]
        if i < 2:
            expected = jax.tree.map(np.asarray, NORMAL_PARENTS[i])
            assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
            continue
        hidden = FLAT[:16] @ before["params"]["Dense_0"]["kernel"]
        hidden = np.float64(hidden + before["params"]["Dense_0"]["bias"])
        np.testing.assert_allclose(statistics["mean"], hidden.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(statistics["var"], hidden.var(0), rtol=1e-4, atol=1e-5)


def test_a_parent_whose_frozen_leaves_are_another_ones_is_not_a_parent():
    problem = mj.problem_for(
        normal,
        NORMAL_PARENTS,
        (FLAT, np.arange(24) % 3),
        calibration=FLAT,
        genome=mj.GenomeConfig(freeze="Dense_1"),
        recalibrate=mj.RecalibrateConfig(enabled=True),
    )
    assert problem.faithful == (True, False)
    first, second = (
        express(problem, problem.genome.init(jax.random.key(0), 3)[k])["batch_stats"]
        for k in range(2)
    )
    kept = [parent["batch_stats"]["BatchNorm_0"]["mean"] for parent in NORMAL_PARENTS]
    np.testing.assert_array_equal(first["BatchNorm_0"]["mean"], kept[0])
    assert not np.allclose(second["BatchNorm_0"]["mean"], kept[1], atol=1e-2)


def fused(w, x):
    """BatchNorm in a form that shows no mean: it is subtracted from the bias."""
    inverse = jax.lax.rsqrt(w["var"] + 1e-5)
    return (x @ w["kernel"] * inverse + (w["bias"] - w["mean"] * inverse)) @ w["head"]


@pytest.mark.parametrize("method", ["genetic", "gradient"])
def test_statistics_that_the_user_names_are_measured_in_every_candidate(method):
    shapes = {"kernel": (4, 5), "bias": (5,), "mean": (5,), "var": (5,), "head": (5, 3)}
    parents = [
        {name: RNG.uniform(0.5, 9, shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(2)
    ]  # whose statistics are not those of their activations, so that every mixture is better
    arguments = (jax.random.key(0), fused, parents, (FLAT, np.arange(24) % 3))
    on = mj.RecalibrateConfig(enabled=True, examples=16, statistics=(("mean", "var"),))
    given = {
        "calibration": FLAT,
        "align": "none",
        "evolution": mj.EvolutionConfig(method=method, population_size=6, generations=2),
    }
    networks = [mj.merge(*arguments, recalibrate=on, **given).variables]
    chosen = mj.BaselinesConfig(names=("uniform_average", "line"))
    results = mj.run_baselines(*arguments, recalibrate=on, config=chosen, budget=3, **given)
    networks += [result.variables for result in results.values()]
    for network in networks:
        hidden = np.float64(FLAT[:16] @ network["kernel"])
        np.testing.assert_allclose(network["mean"], hidden.mean(0), rtol=1e-4)
        np.testing.assert_allclose(network["var"], hidden.var(0), rtol=1e-3)
    with pytest.raises(mj.ConfigError, match="var: no mean goes with it; name the pair"):
        mj.merge(*arguments, recalibrate=on.replace(statistics=()), **given)
    odd = on.replace(statistics=(("mean", "none"),))
    with pytest.raises(mj.ConfigError, match="statistics names 'none': it is no leaf of the"):
        mj.merge(*arguments, recalibrate=odd, **given)
    with pytest.raises(mj.ConfigError, match=r"recalibrate\.statistics is .*enabled is off"):
        mj.RecalibrateConfig(statistics=(("mean", "var"),))


# The layout -----------------------------------------------------------------------------------

LARGE = jax.ShapeDtypeStruct((1000, 32, 32, 3), jnp.float32)


class Wide(nn.Module):
    width: int = 16

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.width, (3, 3))(x)).mean((1, 2)) if self.width else x[:, 0, 0]
        return nn.Dense(4)(x)


def layout(net, inputs=LARGE, size=20, **options):
    variables = jax.eval_shape(net.init, jax.random.key(0), inputs)
    config = mj.FitnessConfig(**options)
    return choose_layout(jax.jit(net.apply), variables, inputs, config, size)


def test_auto_goes_one_by_one_on_a_cpu_and_side_by_side_elsewhere(monkeypatch):
    assert layout(Wide()).population_chunk == layout(Wide(width=0)).population_chunk == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert layout(Wide()) == Layout(5, 1250, None)  # 5,000 examples of 1,000 each
    few = jax.ShapeDtypeStruct((100, 32, 32, 3), jnp.float32)
    assert layout(Wide(), few) == Layout(20, 1250, None)
    many = jax.ShapeDtypeStruct((10_000, 32, 32, 3), jnp.float32)
    assert layout(Wide(), many) == Layout(4, 1250, None)


@pytest.mark.parametrize(("width", "fits"), [(1, 512), (8, 122), (16, 61), (1024, 32)])
def test_a_pass_through_convolutions_has_what_fits_in_the_caches(width, fits):
    # Four arrays of the convolution's size are alive at once, 4 kB for each channel.
    assert layout(Wide(width)).batch_size == pytest.approx(fits, rel=0.05)


def test_what_the_configuration_says_counts():
    assert layout(Wide(), population_chunk=5, batch_size=7) == Layout(5, 7, None)
    assert PLAIN.layout == Layout(1, 10, None)


def test_what_is_alive_at_once():
    def apply_fn(w, x):
        for _ in range(5):  # two of them are alive at a time, inside a call as outside
            x = jnp.tanh(x)
        return jax.jit(lambda x: jnp.exp(jnp.tanh(x)) @ w)(x)

    weights, inputs = jnp.zeros((8, 4)), jnp.zeros((16, 8))
    # At the call: its argument and its result, and in it tanh(x) and exp(tanh(x)).
    expected = 4 * 16 * 8 + 4 * 16 * 4 + 4 * 2 * 16 * 8
    assert live_bytes(apply_fn, weights, inputs) == expected


class Device:
    def __init__(self, **stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats or None


def test_too_little_memory_is_a_line_and_where_it_is_not_told_nothing_is_compiled(monkeypatch):
    def unwanted():
        raise AssertionError("compiled")

    def on(**stats):
        monkeypatch.setattr(memory.jax, "local_devices", lambda: [Device(**stats)])

    on()
    check_fits(unwanted)
    program = jax.jit(lambda x: jnp.sin(x @ x)).lower(jnp.ones((500, 500))).compile()
    on(bytes_limit=10**8, bytes_in_use=10**6)
    check_fits(lambda: program)
    on(bytes_limit=10**8, bytes_in_use=10**8 - 1000)
    with pytest.raises(DeviceError, match=r"^a generation takes 0\.0 GB and 0\.0 GB are free: lo"):
        check_fits(lambda: program)

    def full():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand more")

    with pytest.raises(DeviceError, match=r"does not fit in the memory: RESOURCE_EXHAUSTED: Out"):
        check_fits(full)


def test_masks_by_leaf_are_what_is_searched():
    one = PARENTS[0]
    assert PLAIN.genome == masks(one, 2, granularity="leaf")
