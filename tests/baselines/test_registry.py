"""All baselines by name: what they promise to each other, and that the names are the same
everywhere."""

from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import megajax as mj
from megajax.baselines import BASELINES, BaselinesConfig, run_baselines, uniform_average
from megajax.baselines.registry import applicable, table
from megajax.errors import ConfigError, DataError, ParentsError
from megajax.evaluation.measures import measure

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(90, 4)).astype(np.float32)
TRAIN = RNG.normal(size=(40, 4)).astype(np.float32)


def apply_fn(w, x):
    return jnp.tanh(x @ w["u"] + w["b"][None]) @ w["v"]


def network(seed, base=None):
    rng = np.random.default_rng(seed)
    shapes = {"b": (3,), "u": (4, 3), "v": (3, 3)}
    new = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return new if base is None else {name: base[name] + 0.7 * new[name] for name in new}


BASE = network(0)
PARENTS = [network(seed, BASE) for seed in (1, 2)]
LABELS = np.asarray(apply_fn(network(3, BASE), X)).argmax(axis=1)
GENOME = mj.GenomeConfig(binary=True)  # the fastest to compile
SEARCH = mj.EvolutionConfig(population_size=8, generations=5, tournament_size=3)


def every(parents=PARENTS, names="all", **options):
    options = {"calibration": TRAIN, "base": BASE, "evolution": SEARCH, "genome": GENOME, **options}
    config = BaselinesConfig(names=names)
    return run_baselines(KEY, apply_fn, parents, (X, LABELS), config=config, **options)


EVOSAX = ("cma_es", "sep_cma_es", "differential_evolution")  # seconds to compile, each
RUN = tuple(name for name in BASELINES if name not in EVOSAX)


@pytest.fixture(scope="module")
def results():
    return every(names=RUN)


def nll(variables):
    logits = np.asarray(apply_fn(variables, X), np.float64)
    return measure(logits, LABELS).nll


def test_results_are_networks_like_the_parents_in_the_registrys_order(results):
    assert tuple(results) == RUN
    for result in results.values():
        chex.assert_trees_all_equal_shapes_and_dtypes(
            jax.tree.map(jnp.asarray, result.variables), jax.tree.map(jnp.asarray, PARENTS[0])
        )


def test_fitness_is_that_of_the_returned_network(results):
    for name, result in results.items():
        if "fitness" in result.detail:
            assert -nll(result.variables) == pytest.approx(result.detail["fitness"], abs=1e-5), name


def test_whatever_starts_from_the_parents_is_never_below_the_best(results):
    best = results["best_parent"].detail["fitness"]
    assert best == pytest.approx(max(-nll(parent) for parent in PARENTS), abs=1e-5)
    for name in ("greedy_soup", "line", "random_search"):
        assert results[name].detail["fitness"] >= best - 1e-6, name
    assert results["line"].detail["fitness"] >= -nll(uniform_average(PARENTS)) - 1e-6


def test_equal_budgets_are_used_and_printed(results):
    budget = 8 * 6  # what the evolution would score
    assert results["random_search"].evaluations == budget
    assert results["line"].evaluations == budget - 1  # an odd number has a midpoint
    assert results["best_parent"].evaluations == 2
    assert results["greedy_soup"].evaluations == 3
    assert results["ties"].evaluations == 10
    assert results["regmean"].evaluations == results["fisher"].evaluations == 0
    assert all(result.examples == 90 * result.evaluations for result in results.values())


def test_strict_rules_of_promotion_are_no_obstacle(results):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        strict = every(names=RUN)
    for name, result in results.items():
        chex.assert_trees_all_equal(strict[name].variables, result.variables)


def test_random_search_spends_its_budget_as_far_as_whole_generations_go():
    best = every(names="best_parent")["best_parent"].detail["fitness"]
    for budget in (8, 21, 24):
        result = every(names="random_search", budget=budget)["random_search"]
        assert result.evaluations == budget // 8 * 8  # whole generations
        assert result.examples == 90 * result.evaluations
        assert -nll(result.variables) == pytest.approx(result.detail["fitness"], abs=1e-5)
        assert result.detail["fitness"] >= best - 1e-6


@pytest.mark.slow
def test_evosaxs_searches_use_the_same_budget_and_are_never_below_the_best_parent(results):
    best = results["best_parent"].detail["fitness"]
    found = every(names=EVOSAX)
    assert tuple(found) == EVOSAX
    for name, result in found.items():
        assert result.evaluations == results["random_search"].evaluations
        assert result.detail["fitness"] >= best - 1e-6, name
        assert -nll(result.variables) == pytest.approx(result.detail["fitness"], abs=1e-5), name


def test_a_baselines_result_does_not_depend_on_which_others_run(results):
    alone = every(names="dare")
    assert list(alone) == ["dare"]
    chex.assert_trees_all_equal(alone["dare"].variables, results["dare"].variables)


def test_each_parents_own_inputs_count():
    own = [TRAIN, TRAIN * [1, 0, 0, 0]]
    names = ("fisher", "regmean")
    shared = every(names=names)
    results = every(names=names, parent_inputs=[np.float32(inputs) for inputs in own])
    for name in names:
        first = PARENTS[0]["u"][1:]  # of inputs that only the first parent's data have
        u, mean = np.asarray(results[name].variables["u"]), uniform_average(PARENTS)["u"]
        assert np.abs(u[1:] - first).max() < np.abs(mean[1:] - first).max()
        assert not np.allclose(u, shared[name].variables["u"], atol=1e-3)


def test_three_parents_have_a_simplex_and_no_sphere():
    parents = [*PARENTS, network(4, BASE)]
    assert "slerp" not in applicable("default", {"labels"})
    results = every(parents, names=("greedy_soup", "line"), budget=30)
    assert results["line"].evaluations == 28  # {3, 6} lattice, of which the mean is a point
    assert len(results["line"].detail["weights"]) == 3
    assert results["greedy_soup"].evaluations == 5


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5, use_bias=False)(x))
        return nn.Dense(3)(nn.relu(x))


@pytest.mark.slow
def test_statistics_are_averaged_or_measured_anew_but_for_parents():
    model = Net()

    def network(variables, x):
        return model.apply(variables, x)

    base = model.init(KEY, X)

    def trained(seed):  # statistics of its own data, far apart between the parents
        variables = model.init(jax.random.key(seed), X)
        x = (1 + 9 * seed) * TRAIN
        return mj.recalibrate(network, variables, x)

    parents = [trained(0), trained(1)]

    def run(names, **options):
        config = BaselinesConfig(names=names)
        return run_baselines(
            KEY, network, parents, (X, LABELS), config=config, base=base, calibration=TRAIN,
            evolution=SEARCH, **options,
        )  # fmt: skip

    names = ("slerp", "fisher", "regmean", "ties")
    mean = uniform_average(parents)["batch_stats"]
    for name, result in run(names).items():
        chex.assert_trees_all_close(result.variables["batch_stats"], mean, rtol=1e-6), name

    anew = mj.RecalibrateConfig(enabled=True, examples=30)
    results = run(("best_parent", "slerp", "greedy_soup", "line"), recalibrate=anew)
    for name, result in results.items():
        is_parent = [
            all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
            for pair in ((result.variables, parent) for parent in parents)
        ]
        if not any(is_parent):
            expected = mj.recalibrate(network, result.variables, TRAIN[:30])
            chex.assert_trees_all_close(result.variables, expected, rtol=1e-3, atol=1e-5)
        if "fitness" in result.detail:
            logits = np.asarray(network(result.variables, X), np.float64)
            expected = -measure(logits, LABELS).nll
            assert result.detail["fitness"] == pytest.approx(expected, abs=1e-4), name
    best = parents[results["best_parent"].detail["parent"]]
    chex.assert_trees_all_equal(results["best_parent"].variables, best)


def classes_of(w, x):
    return {"first": jnp.tanh(x["a"] @ w["u"] + w["b"]) @ w["v"]}


def test_other_tasks_have_the_baselines_that_need_no_labels():
    def right(outputs, targets):
        return outputs["first"].argmax(-1) == targets["label"]

    results = run_baselines(
        KEY,
        classes_of,
        PARENTS,
        mj.Task({"a": X}, {"label": LABELS}, right),
        genome=mj.GenomeConfig(granularity="leaf"),
        evolution=SEARCH,
        budget=16,
    )
    names = ["best_parent", "uniform_average", "slerp", "greedy_soup", "line", "random_search"]
    assert list(results) == names
    share = (apply_fn(uniform_average(PARENTS), X).argmax(-1) == LABELS).mean()
    assert results["line"].detail["fitness"] >= share - 1e-6


def test_several_tasks_are_scored_as_a_merge_scores_them():
    tasks = [mj.Task(X, LABELS, "accuracy", weight=3), mj.Task(X[:50], LABELS[:50])]
    options = {"genome": GENOME, "evolution": SEARCH}
    config = BaselinesConfig(names="best_parent")
    results = run_baselines(KEY, apply_fn, PARENTS, tasks, config=config, **options)
    merged = mj.merge(KEY, apply_fn, PARENTS, tasks, align=mj.AlignConfig(method="none"), **options)
    found = results["best_parent"]
    np.testing.assert_allclose(found.detail["fitness"], merged.parent_fitness.max(), rtol=1e-5)
    assert found.detail["parent"] == merged.parent_fitness.argmax()
    assert found.examples == 2 * 140


def test_leaves_that_cannot_be_mixed_are_parent_0s_everywhere():
    parents = [{**parent, "steps": np.array(2**40), "key": jax.random.key(1)} for parent in PARENTS]
    results = every(parents, names=("uniform_average", "line", "ties"), base=parents[0])
    for result in results.values():
        assert result.variables["steps"] == 2**40
        assert result.variables["key"] == parents[0]["key"]


def test_a_second_run_on_other_parents_compiles_nothing():
    def again(seed):
        parents = [network(10 * seed + k, BASE) for k in range(2)]
        labels = np.roll(LABELS, seed)
        compiled.clear()
        config = BaselinesConfig(names=RUN)
        run_baselines(
            jax.random.key(seed), apply_fn, parents, (X, labels), config=config,
            calibration=TRAIN, base=BASE, evolution=SEARCH, genome=GENOME,
        )  # fmt: skip
        return list(compiled)

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event) if "backend_comp" in event else None
    )
    again(1)
    assert again(2) == []


def test_parents_on_the_line_keep_their_statistics_whatever_the_masks_freeze():
    model = Net()

    def network(variables, x):
        return model.apply(variables, x)

    parents = [model.init(jax.random.key(seed), X) for seed in range(2)]
    parents[1]["batch_stats"]["BatchNorm_0"]["mean"] += jnp.arange(5.0) - 2
    labels = np.asarray(network(parents[1], X)).argmax(axis=1)  # with its own statistics
    results = run_baselines(
        KEY, network, parents, (X, labels), calibration=TRAIN, budget=3,
        config=BaselinesConfig(names=("best_parent", "line")),
        recalibrate=mj.RecalibrateConfig(enabled=True),
        genome=mj.GenomeConfig(granularity="leaf", freeze="Dense_1"), evolution=SEARCH,
        fitness=mj.FitnessConfig(metric="accuracy"),
    )  # fmt: skip
    assert results["best_parent"].detail["fitness"] == 1
    assert results["line"].detail["weights"] == [0, 1]
    chex.assert_trees_all_equal(results["line"].variables, results["best_parent"].variables)


def test_without_a_budget_nothing_is_searched():
    results = every(names=("best_parent", "line", "random_search"), budget=0)
    assert list(results) == ["best_parent"]
    searches = {name for name, baseline in BASELINES.items() if baseline.searches}
    assert searches == {"line", "random_search", *EVOSAX}


def test_what_cannot_be_is_one_line():
    cases = [
        (ConfigError, "names has 'ties', which needs a base network", {
            "names": "ties", "base": None}),
        (
            ConfigError,
            "names has 'fisher', which needs calibration inputs",
            {"names": ("fisher",), "calibration": None},
        ),
        (
            ConfigError,
            "names has 'slerp', which needs exactly two parents",
            {"names": ("slerp",), "parents": [*PARENTS, BASE]},
        ),
        (ConfigError, "budget is 7: the first population alone needs 8", {
            "names": "random_search", "budget": 7}),
        (ParentsError, "base network .* does not fit: leaf u", {
            "base": {**BASE, "u": np.ones((2, 3), np.float32)}}),
        (ParentsError, "parent_inputs has 1 arrays for 2 parents", {"parent_inputs": [TRAIN]}),
        (DataError, "calibration inputs are missing", {
            "calibration": None, "recalibrate": mj.RecalibrateConfig(enabled=True)}),
    ]  # fmt: skip
    for error, message, options in cases:
        with pytest.raises(error, match=message) as raised:
            every(**options)
        assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match=r"baselines.names is 'soup': choose one of default, all"):
        BaselinesConfig(names="soup")
    with pytest.raises(ConfigError, match=r"baselines.names is \('soup',\): choose one of"):
        BaselinesConfig(names=("soup",))


def test_without_evosax_all_means_all_the_others(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    everything = {"labels", "two parents", "calibration", "base"}
    assert applicable("all", {*everything, "evosax"}) == list(BASELINES)
    assert "cma_es" not in applicable("all", everything)
    with pytest.raises(ConfigError, match="'cma_es', which needs evosax"):
        applicable(["cma_es"], everything)


def test_names_are_the_same_in_the_configuration_the_registry_and_the_documentation():
    names = tuple(BASELINES)
    page = (Path(__file__).parents[2] / "docs" / "baselines.md").read_text()
    sections = {}
    for section in page.split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        sections.update({name: text for name in names if f"`{name}`" in title})
    assert set(sections) == set(names)
    for name, baseline in BASELINES.items():
        arxiv = baseline.reference.partition("arXiv ")[2]
        assert arxiv in sections[name], name
    assert len(table()) == len(names) + 1
    assert {len(row) for row in table()} == {4}
