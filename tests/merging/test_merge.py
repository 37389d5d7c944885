"""The main job: never worse than the best parent, reproducible, clear about bad input."""

from dataclasses import dataclass
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import megajax as mj
from megajax.merging.genome import GRANULARITIES, make_genome
from megajax.merging.masks import Masks
from megajax.merging.problem import expressed
from megajax.search.operators import CROSSOVERS, SELECTIONS, SURVIVALS, Population
from megajax.trees import Static

KEY = jax.random.key(0)


def apply_fn(variables, x):
    """An MLP in plain JAX."""
    *hidden, (w, b) = variables
    for u, v in hidden:
        x = jnp.tanh(x @ u + v)
    return x @ w + b


def parent(seed):
    rng = np.random.default_rng(seed)
    sizes = [(6, 16), (16, 16), (16, 3)]
    return [
        ((rng.normal(size=size) / size[0] ** 0.5).astype(np.float32), np.zeros(size[1], np.float32))
        for size in sizes
    ]


INPUTS = np.random.default_rng(9).normal(size=(120, 6)).astype(np.float32)
LABELS = np.asarray(apply_fn(parent(77), INPUTS)).argmax(-1)
PARENTS = [parent(0), parent(1)]
NO_ALIGNMENT = mj.AlignConfig(method="none")
SMALL = mj.EvolutionConfig(population_size=10, generations=6, tournament_size=3)


def merge(key=KEY, parents=PARENTS, data=(INPUTS, LABELS), evolution=SMALL, **options):
    options = {"align": NO_ALIGNMENT, **options}
    return mj.merge(key, apply_fn, parents, data, evolution=evolution, **options)


def nll(variables):
    return mj.measure(mj.predict(apply_fn, variables, INPUTS), LABELS).nll


def assert_it_is_what_it_says(result, parents=PARENTS):
    """No worse than the best parent (but for rounding), and every fitness its network's own."""
    assert result.fitness >= result.parent_fitness.max() - 1e-5
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.tree.map(jnp.asarray, result.variables), jax.tree.map(jnp.asarray, parents[0])
    )
    for variables, fitness in [
        *zip(parents, result.parent_fitness, strict=True),
        (result.variables, result.fitness),
    ]:
        np.testing.assert_allclose(fitness, -nll(variables), rtol=1e-5)


@pytest.fixture(scope="module")
def seen():
    """What the callback of `whole` saw."""
    return []


@pytest.fixture(scope="module")
def whole(seen):
    """A merge that many tests look at."""
    return merge(callback=lambda state, infos: seen.append((jax.device_get(state), infos)))


@pytest.mark.parametrize("binary", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "granularity",
    [g if g == "element" else pytest.param(g, marks=pytest.mark.slow) for g in GRANULARITIES],
)
def test_the_result_is_never_below_the_best_parent_and_its_fitness_is_its_own(granularity, binary):
    genome = mj.GenomeConfig(granularity=granularity, binary=binary)
    assert_it_is_what_it_says(merge(genome=genome))


def test_aligned_parents_are_scored_as_they_were_given():
    result = merge(align=mj.AlignConfig())
    assert_it_is_what_it_says(result)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), result.parents, PARENTS)
    assert any(jax.tree.leaves(moved))
    for given, aligned in zip(PARENTS, result.parents, strict=True):
        np.testing.assert_allclose(apply_fn(aligned, INPUTS), apply_fn(given, INPUTS), atol=1e-5)


def test_a_result_tells_all_that_it_is_made_of(whole):
    assert_it_is_what_it_says(whole)
    assert whole.history.generation.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert whole.history.best_ever[0] >= whole.parent_fitness.max() - 1e-5
    assert whole.history.best_ever[-1] == np.float32(whole.fitness)
    assert whole.evaluations == 10 + 6 * 10
    assert whole.examples_scored == 120 * whole.evaluations
    assert whole.scores == {"task_0": whole.fitness}
    np.testing.assert_array_equal(whole.parent_scores["task_0"], whole.parent_fitness)
    assert whole.metrics == {"task_0": "cross_entropy"}
    assert whole.genome == make_genome(apply_fn, PARENTS[0], INPUTS[:8], 2)
    chex.assert_trees_all_equal(expressed(whole.problem, whole.genes), whole.variables)
    chex.assert_trees_all_equal(whole.parents, PARENTS)
    assert whole.front is None


def test_the_same_key_gives_the_same_bits_and_another_key_another_network(whole):
    again, other = merge(), merge(key=jax.random.key(1))
    chex.assert_trees_all_equal(whole.variables, again.variables)
    chex.assert_trees_all_equal(whole.history, again.history)
    assert not np.array_equal(whole.genes, other.genes)
    old_style = merge(key=jax.random.PRNGKey(0))
    chex.assert_trees_all_equal(whole.variables, old_style.variables)


def test_the_callback_sees_every_generation_and_may_stop_before_the_first(whole, seen):
    infos = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(info for _, info in seen))
    chex.assert_trees_all_equal(infos, whole.history)
    chex.assert_trees_all_equal(seen[-1][0], jax.device_get(whole.state))
    stopped = merge(callback=lambda state, infos: True)
    assert stopped.evaluations == 10
    assert_it_is_what_it_says(stopped)
    later = merge(callback=lambda state, infos: infos.generation[-1] == 3)
    assert later.history.generation.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("at", [0, 2, 6])
def test_continued_from_a_state_it_ends_bit_identical_and_scores_nothing_again(whole, seen, at):
    scored = []

    def counting(logits, labels):
        jax.debug.callback(lambda: scored.append(1))
        return mj.merging.metrics.cross_entropy(logits, labels)

    metric = mj.Metric(counting, name="cross_entropy")
    rest = merge(state=seen[at][0], data=mj.Task(INPUTS, LABELS, metric))
    jax.effects_barrier()
    assert len(scored) == 2 + 10 * (6 - at)  # the parents, once, and the children still to come
    chex.assert_trees_all_equal(rest.variables, whole.variables)
    chex.assert_trees_all_equal(rest.state, whole.state)
    np.testing.assert_array_equal(rest.parent_fitness, whole.parent_fitness)
    assert rest.history.generation.tolist() == list(range(at + 1, 7))
    assert rest.evaluations == whole.evaluations


def test_the_state_of_another_search_is_refused(whole, seen):
    state = seen[2][0]
    smaller = state._replace(population=jax.tree.map(lambda leaf: leaf[:8], state.population))
    message = r"^the state is of another search: population/genes is float32\[8, .* there, .*\[10, "
    with pytest.raises(mj.ConfigError, match=message):
        merge(state=smaller)
    message = r"of another search: memory/\w+ is absent there, float32\[35\] here"
    with pytest.raises(mj.ConfigError, match=message):
        merge(state=state, evolution=SMALL.replace(method="cma_es"))


def test_a_whole_number_is_a_key_and_a_name_a_method(whole):
    again = merge(0, align="none")
    np.testing.assert_array_equal(again.genes, whole.genes)
    with pytest.raises(mj.ConfigError, match=r"align.method is 'wieghts': choose"):
        merge(align="wieghts")


def test_a_result_is_printed_as_a_summary(whole):
    assert repr(whole) == (
        f"MergeResult(fitness={whole.fitness:.4g}, parent_fitness="
        f"[{whole.parent_fitness[0]:.4g}, {whole.parent_fitness[1]:.4g}], "
        "metrics={'task_0': 'cross_entropy'}, num_genes=35, generations=6, "
        f"evaluations={whole.evaluations})"
    )


def test_progress_is_said_on_the_standard_error_when_asked(whole, capsys):
    merge(evolution=SMALL.replace(generations=2))
    assert capsys.readouterr() == ("", "")
    found = merge(evolution=SMALL.replace(generations=2), progress=True)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"generation 2 of 2, fitness {found.fitness:.4g}\n"


def test_limits_end_a_search():
    assert merge(evolution=SMALL.replace(evaluation_budget=35)).evaluations == 30
    assert merge(evolution=SMALL.replace(time_budget=0.0)).evaluations == 10
    flat = mj.Task(INPUTS, LABELS, constant)
    patient = merge(data=flat, evolution=SMALL.replace(generations=50, patience=3))
    assert int(patient.state.generation) == 3


def constant(outputs, targets):
    del targets
    return jnp.zeros(len(outputs))


def test_generations_in_one_call_change_no_bit(whole):
    chunked = merge(evolution=SMALL.replace(generations_per_chunk=4))
    chex.assert_trees_all_equal(chunked.variables, whole.variables)
    chex.assert_trees_all_equal(chunked.history, whole.history)


def test_many_parents_and_a_users_own_labels_and_metric():
    parents = [parent(seed) for seed in range(5)]
    labels = [(0, 0), (1, 1), (-1, -1)]
    result = merge(
        parents=parents,
        labels=labels,
        fitness=mj.FitnessConfig(metric=lambda logits, y: -jnp.square(logits).mean(-1)),
    )
    assert result.genome.num_genes == 2
    assert result.genes.shape == (2, 5)
    chex.assert_trees_all_equal(result.variables[2], parents[0][2])
    assert result.fitness >= result.parent_fitness.max() - 1e-5


def test_under_64_bits():
    """Numbers of 64 bits are mixed as such, and come back as such."""
    wide = jax.tree.map(np.float64, PARENTS)
    with jax.enable_x64(True):
        result = merge(parents=wide, data=(INPUTS.astype(np.float64), LABELS))
        leaves = [*jax.tree.leaves(result.variables)]
        assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float64)}
        shares = np.asarray(result.genes, np.float64)[result.genome.labels.tree[0][0]]
        mixed = sum(shares[..., k] * wide[k][0][0] for k in range(2))
        np.testing.assert_allclose(leaves[0], mixed, rtol=1e-12)
        assert_it_is_what_it_says(result, wide)


def strict_fn(variables, x):
    """The same network, with nothing left for JAX to promote."""
    *hidden, (w, b) = variables
    for u, v in hidden:
        x = jnp.tanh(x @ u + v[None])
    return x @ w + b[None]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"align": mj.AlignConfig(method="weights"), "calibration": INPUTS[:32]},
        {"evolution": SMALL.replace(method="gradient")},
        {"evolution": SMALL.replace(gradient_steps=1)},
        {"evolution": SMALL.replace(method="niches")},
        {"evolution": SMALL.replace(method="pbil"), "genome": mj.GenomeConfig(binary=True)},
        {"evolution": SMALL.replace(generations=1), "genome": mj.GenomeConfig(kind="weights")},
        {"evolution": SMALL.replace(method="cma_es")},
        {"genome": mj.GenomeConfig(kind="task_vectors"), "base": parent(5)},
        {"fitness": mj.FitnessConfig(metric="macro_f1")},
        {"fitness": mj.FitnessConfig(racing_examples=20)},
    ],
)
def test_strict_rules_of_promotion_are_no_obstacle(sections):
    sections = {"align": NO_ALIGNMENT, "evolution": SMALL.replace(generations=2)} | sections
    plain = mj.merge(KEY, strict_fn, PARENTS, (INPUTS, LABELS), **sections)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        strict = mj.merge(KEY, strict_fn, PARENTS, (INPUTS, LABELS), **sections)
    chex.assert_trees_all_equal(plain.variables, strict.variables)


# Operators and genomes of one's own -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("field", ["selection", "crossover", "mutation", "survival"])
def test_every_operator_by_name(field):
    choices = {
        "selection": SELECTIONS,
        "crossover": [*CROSSOVERS, tuple(CROSSOVERS)],
        "mutation": ["gaussian", "reset", ("gaussian", "reset")],
        "survival": SURVIVALS,
    }
    for choice in choices[field]:
        result = merge(evolution=SMALL.replace(**{field: choice}))
        assert result.fitness >= result.parent_fitness.max() - 1e-5
        coefficients = np.asarray(result.state.population.genes)
        assert (coefficients >= 0).all()
        np.testing.assert_allclose(coefficients.sum(-1), 1, atol=1e-5)


def own_select(key, fitness, num):
    del key
    return jnp.argsort(-fitness)[jnp.arange(num) % 3].astype(jnp.int32)


def own_mutate(key, genes):
    return genes + 0.1 * jax.random.normal(key, genes.shape)


def own_survive(key, population, offspring):
    del key
    keep = len(population.fitness) - 1
    best = jnp.argmax(population.fitness)
    return Population(
        *jax.tree.map(
            lambda old, new: jnp.concatenate([old[best][None], new[:keep]]),
            tuple(population),
            tuple(offspring),
        )
    )


def test_own_operators_of_the_documented_signatures():
    result = merge(
        evolution=SMALL.replace(
            selection=own_select, crossover="uniform", mutation=own_mutate, survival=own_survive
        )
    )
    assert_it_is_what_it_says(result)
    genes = np.asarray(result.state.population.genes)
    np.testing.assert_allclose(genes.sum(-1), 1, atol=1e-5)  # repaired


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            {"selection": lambda key, fitness, num: jnp.zeros(3, jnp.int32)},
            r"evolution.selection gives int32\[3\]: int32\[20\] is needed",
        ),
        (
            {"crossover": lambda key, first, second: first[..., 0]},
            r"evolution.crossover gives float32\[10, 35\]: float32\[10, 35, 2\] is needed",
        ),
        (
            {"mutation": lambda key, genes: genes.astype(jnp.bfloat16)},
            r"evolution.mutation gives bfloat16\[10, 35, 2\]: float32\[10, 35, 2\] is needed",
        ),
        (
            {"survival": lambda key, population: population},
            r"evolution.survival failed: .* positional arguments? but 3 were given",
        ),
    ],
)
def test_own_operators_that_return_something_else_are_refused_by_name(choice, message):
    with pytest.raises(mj.ConfigError, match=f"^{message}") as error:
        merge(evolution=SMALL.replace(**choice))
    assert "\n" not in str(error.value)


@dataclass(frozen=True)
class Dial:
    """A genome of one's own: one number turns from parent 0 to parent 1."""

    labels: Static
    num_parents: int = 2
    num_genes: int = 1
    gene_ndim: int = 0
    picks: bool = False

    def init(self, key, size, parents):
        ends = jnp.array([[0.0], [1.0]])
        return jnp.concatenate([ends, jax.random.uniform(key, (size - 2, 1))])

    def stack(self, parents, *base):
        assert not base
        return jax.tree.map(lambda *leaves: np.stack(leaves), *parents)

    def rows(self, parents):
        return jax.tree.leaves(parents)

    def express(self, genes, parents):
        return jax.tree.map(lambda leaf: leaf[0] + genes[0] * (leaf[1] - leaf[0]), parents)

    def repair(self, genes):
        return jnp.clip(genes, 0, 1)

    def sample(self, key, shape, dtype):
        return jax.random.uniform(key, shape, dtype)

    def noise(self, key, genes, *, rate, scale):
        del rate
        return genes + scale * jax.random.normal(key, genes.shape)


def test_a_genome_of_ones_own():
    dial = Dial(Static(jax.tree.map(lambda leaf: np.zeros([1] * leaf.ndim, int), PARENTS[0])))
    result = merge(genome=dial, evolution=SMALL.replace(mutation=("gaussian", "reset")))
    assert result.genome is dial
    assert result.genes.shape == (1,)
    assert_it_is_what_it_says(result)
    turned = jax.tree.map(lambda a, b: a + result.genes[0] * (b - a), *PARENTS)
    chex.assert_trees_all_close(result.variables, turned, atol=1e-6)


class Short(Dial):
    def express(self, genes, parents):
        del genes
        return jax.tree.map(lambda leaf: leaf[0, :-1], parents)


class Lacking(Dial):
    def express(self, genes, parents):
        return super().express(genes, parents)[:2]


class Wide(Dial):
    def express(self, genes, parents):
        found = super().express(genes, parents)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), found)


class Failing(Dial):
    def express(self, genes, parents):
        return parents["no such leaf"]


class Few(Dial):
    def init(self, key, size, parents):
        return super().init(key, size - 1, parents)


class Flat(Dial):
    def repair(self, genes):
        return genes[..., 0]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Short, r"genome.express gives leaf 0/0 as float32\[5,16\]: float32\[6,16\] is needed"),
        (Lacking, r"genome.express gives leaf 2/0 as no such leaf: float32\[16,3\] is needed"),
        (Wide, r"genome.express gives leaf 0/0 as bfloat16\[6,16\]: float32\[6,16\] is needed"),
        (Failing, "genome.express failed: list indices must be integers"),
        (Few, r"genome.init gives float32\[9,1\] for 10 individuals: \[10, ...\] is needed"),
        (Flat, r"genome.repair gives float32\[10\]: float32\[10,1\] is needed"),
    ],
)
def test_an_own_genome_that_returns_something_else_is_refused_by_name(kind, message):
    labels = Static(jax.tree.map(lambda leaf: np.zeros([1] * leaf.ndim, int), PARENTS[0]))
    with pytest.raises(mj.ConfigError, match=f"^{message}") as error:
        merge(genome=kind(labels))
    assert "\n" not in str(error.value)


def test_masks_may_be_given_as_the_genome(whole):
    genome = make_genome(apply_fn, PARENTS[0], INPUTS[:8], 2)
    assert isinstance(genome, Masks)
    chex.assert_trees_all_equal(merge(genome=genome).variables, whole.variables)


# What cannot work -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"parents": PARENTS[:1]}, mj.ParentsError, "1 parent given"),
        (
            {"parents": [PARENTS[0], PARENTS[1][:2]]},
            mj.ParentsError,
            r"leaf 2/0: float32\[16,3\] in parent 0 but no such leaf in parent 1",
        ),
        ({"data": (INPUTS[:0], LABELS[:0])}, mj.DataError, "the inputs are 0: at least 1 are"),
        ({"data": (INPUTS, LABELS + 1)}, mj.DataError, "labels run from 1 to 3.* 3 classes"),
        ({"data": (INPUTS, LABELS - 1)}, mj.DataError, "labels run from -1 to 1"),
        ({"data": (INPUTS, LABELS * 1.0)}, mj.DataError, "no metric follows from outputs float32"),
        ({"data": [INPUTS, LABELS]}, mj.DataError, "the data is a list: a pair"),
        (
            {"evolution": mj.EvolutionConfig(population_size=4, elites=0), "parents": PARENTS * 2},
            mj.ConfigError,
            "evolution.population_size is 4: .* 4 parents and their mean, so at least 5",
        ),
        (
            {"recalibrate": mj.RecalibrateConfig(enabled=True)},
            mj.DataError,
            "calibration inputs are missing: recalibrate needs them",
        ),
        (
            {"recalibrate": mj.RecalibrateConfig(enabled=True), "calibration": INPUTS[:1]},
            mj.DataError,
            "the calibration inputs are 1: at least 2 are needed",
        ),
        (
            {"recalibrate": mj.RecalibrateConfig(enabled=True), "calibration": INPUTS[:, :5]},
            mj.DataError,
            r"the network does not take inputs float32\[8, 5\]",
        ),
        ({"keep": {"3": 0}}, mj.ParentsError, "keep '3' matches no leaf, such as 0/0"),
    ],
)
def test_what_cannot_work_is_named(options, error, message):
    with pytest.raises(error, match=message) as caught:
        merge(**options)
    assert isinstance(caught.value, mj.MegajaxError)
    assert "\n" not in str(caught.value)


def test_a_budget_below_the_first_population_is_refused():
    message = "evolution.evaluation_budget is 9: the first population alone needs 10"
    with pytest.raises(mj.ConfigError, match=message):
        SMALL.replace(evaluation_budget=9)


def test_parents_without_finite_outputs_stop_before_the_search():
    with pytest.raises(mj.SearchError, match="generation 0: none of the 10 networks"):
        mj.merge(
            KEY,
            lambda variables, x: x @ variables * jnp.nan,
            [jnp.eye(3), -jnp.eye(3)],
            (jnp.eye(3), jnp.arange(3)),
            evolution=SMALL,
            align=NO_ALIGNMENT,
        )


def test_a_partial_is_a_network_too(whole):
    def scaled(scale, variables, x):
        return scale * apply_fn(variables, x)

    result = mj.merge(
        KEY,
        partial(scaled, 1.0),
        PARENTS,
        (INPUTS, LABELS),
        align=NO_ALIGNMENT,
        evolution=SMALL.replace(generations=1),
    )
    np.testing.assert_allclose(result.parent_fitness, whole.parent_fitness, rtol=1e-6)


def test_genes_given_first_are_in_the_first_population():
    target = np.random.default_rng(3).uniform(size=(1, 35, 1)).astype(np.float32)
    target = np.concatenate([target, 1 - target], axis=-1)
    before = merge(evolution=SMALL.replace(generations=0))
    planted = expressed(before.problem, target[0])
    data = (INPUTS, np.asarray(apply_fn(planted, INPUTS)))
    fitness = mj.FitnessConfig(metric="mean_squared_error")
    found = merge(data=data, fitness=fitness, first=target)
    assert found.history.best_ever[0] == pytest.approx(0, abs=1e-10)
    np.testing.assert_allclose(found.genes, target[0], atol=1e-6)
    plain = merge(data=data, fitness=fitness)
    assert plain.history.best_ever[0] < -1e-4
    assert found.fitness >= plain.fitness
    assert found.history.worst[0] <= plain.parent_fitness.min()  # the parents stay
    again = merge(data=data, fitness=fitness, first=found.genes[None])
    assert again.fitness == found.fitness


@pytest.mark.parametrize("kind", ["weights", "task_vectors"])
def test_genes_of_other_kinds_given_first(kind):
    options = {"genome": mj.GenomeConfig(kind=kind), "base": PARENTS[0]}
    found = merge(**options)
    first = jax.tree.map(lambda leaf: leaf[None], found.genes)
    again = merge(key=jax.random.key(1), first=first, **options)
    np.testing.assert_allclose(again.history.best_ever[0], found.fitness, rtol=1e-6)


def test_first_genes_that_do_not_fit_are_one_line():
    good = np.full((1, 35, 2), 0.5, np.float32)
    for first, message in [
        (good[0], r"first: leaf .* has shape \(35, 2\): \[F, 35, 2\] is needed"),
        ({"w": good}, r"first: leaf .* is needed"),
        (good.repeat(8, 0), "first holds 8 individuals: a population of 10 has room for 1 to 7"),
        (good[:0], "first holds 0 individuals"),
        (good * np.nan, "not finite"),
    ]:
        with pytest.raises(mj.ConfigError, match=message):
            merge(first=first)
    with pytest.raises(mj.ConfigError, match=r"evolution\.parents_only"):
        merge(first=good, evolution=SMALL.replace(method="niches", parents_only=True))


# BatchNorm and half precision -----------------------------------------------------------------


def normalised(w, x):
    """A hidden layer with BatchNorm, in the weights' own precision."""
    z = (x.astype(w["in"].dtype) @ w["in"] - w["mean"]) / jnp.sqrt(w["variance_of_z"] + 1e-3)
    return jnp.maximum(z * w["scale"], 0) @ w["out"]


def normalised_parent(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    w = {"in": rng.normal(size=(6, 16)), "out": rng.normal(size=(16, 3)) / 4}
    z = INPUTS @ w["in"]
    w |= {"mean": z.mean(0), "variance_of_z": z.var(0), "scale": rng.uniform(0.5, 1.5, 16)}
    return {name: leaf.astype(dtype) for name, leaf in w.items()}


def merge_normalised(parents, **options):
    return mj.merge(KEY, normalised, parents, (INPUTS, LABELS), evolution=SMALL, **options)


def test_mixed_statistics_are_one_warning_that_says_what_to_do(caplog):
    parents = [normalised_parent(0), normalised_parent(1)]
    for _ in range(2):
        merge_normalised(parents)
    (record,) = caplog.records
    message = record.getMessage()
    assert "BatchNorm statistics (such as variance_of_z) and recalibrate is off" in message
    assert "recalibrate=RecalibrateConfig(enabled=True)" in message
    assert "\n" not in message
    caplog.clear()
    on = mj.RecalibrateConfig(enabled=True)
    merge_normalised(parents, recalibrate=on, calibration=INPUTS)
    merge()  # there are no statistics
    assert not caplog.records


@pytest.mark.parametrize("recalibrated", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_is_aligned_merged_and_recalibrated(dtype, recalibrated):
    one, two = (normalised_parent(seed, dtype) for seed in (0, 1))
    options = {}
    if recalibrated:
        on = mj.RecalibrateConfig(enabled=True)
        options = {"recalibrate": on, "calibration": INPUTS}
    order = np.random.default_rng(5).permutation(16)
    shuffled = {name: leaf[..., order] for name, leaf in one.items() if name != "out"}
    result = merge_normalised([one, {**shuffled, "out": one["out"][order]}], **options)
    chex.assert_trees_all_equal(result.parents[1], one)
    result = merge_normalised([one, two], **options)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.variables)} == {np.dtype(dtype)}
    assert result.fitness >= result.parent_fitness.max() - 1e-5
    for w, fitness in ((one, result.parent_fitness[0]), (result.variables, result.fitness)):
        wide = {name: np.float64(leaf) for name, leaf in w.items()}
        found = -mj.measure(np.asarray(normalised(wide, np.float64(INPUTS))), LABELS).nll
        assert fitness == pytest.approx(found, rel=0.03)
