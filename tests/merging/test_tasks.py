"""Tasks: what data may be, what is chosen when nothing is said, and what a mistake is called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import megajax as mj
from megajax.errors import ConfigError, DataError, MegajaxError
from megajax.merging.metrics import METRICS, Metric
from megajax.merging.tasks import as_tasks, check_inputs, check_task

RNG = np.random.default_rng(0)
N = 9
X = RNG.normal(size=(N, 4)).astype(np.float32)
LABELS = RNG.integers(0, 3, N)
W = RNG.normal(size=(4, 3)).astype(np.float32)


def linear(w, x):
    return x @ w


def checked(inputs=X, targets=LABELS, metric=None, network=linear, **options):
    return check_task(mj.Task(inputs, targets, metric, **options), network, W)


def test_a_pair_a_task_or_several_are_data():
    task = mj.Task(X, LABELS, weight=2.0)
    assert as_tasks(task) == [task]
    assert as_tasks([task, task]) == [task, task]
    assert as_tasks((task, task)) == [task, task]
    pair = as_tasks((X, LABELS))
    assert pair[0].inputs is X
    assert pair[0].targets is LABELS


@pytest.mark.parametrize("data", [[X, LABELS], (X,), (X, LABELS, X), X, {"x": X}, None, [], "data"])
def test_other_data_is_refused_in_one_line(data):
    kind = type(data).__name__
    message = rf"^the data is a {kind}: a pair \(inputs, targets\), a Task or a list of Tasks"
    with pytest.raises(DataError, match=message) as error:
        as_tasks(data)
    assert "\n" not in str(error.value)


def test_a_checked_task_has_every_choice_made():
    task = checked(jnp.asarray(X), jnp.asarray(LABELS), weight=2)
    assert task.metric is METRICS["cross_entropy"]
    assert (task.name, task.weight, task.apply_fn) == ("task_0", 2.0, linear)
    assert type(task.inputs) is type(task.targets) is np.ndarray
    assert check_task(task, linear, W) == task  # once is enough
    assert check_task(mj.Task(X, LABELS), linear, W, number=3).name == "task_3"
    assert checked(name="digits").name == "digits"


@pytest.mark.parametrize(
    ("network", "targets", "metric"),
    [
        (linear, LABELS, "cross_entropy"),
        (linear, (LABELS, np.ones(N)), "cross_entropy"),
        (linear, LABELS.astype(np.uint8), "cross_entropy"),
        (linear, np.zeros((N, 3), bool), "binary_cross_entropy"),
        (linear, np.zeros((N, 3), np.float32), "mean_squared_error"),
        (lambda w, x: (x @ w)[:, 0], np.zeros(N, np.float64), "mean_squared_error"),
        (lambda w, x: (x @ w)[:, :1], LABELS > 0, "binary_cross_entropy"),
        (lambda w, x: jnp.stack([x @ w] * 5, 1), np.zeros((N, 5), int), "cross_entropy"),
    ],
)
def test_the_metric_follows_from_the_targets(network, targets, metric):
    assert checked(targets=targets, network=network).metric is METRICS[metric]


def test_inputs_and_targets_may_be_trees():
    inputs = {"image": X, "size": (np.ones(N), np.arange(N))}
    targets = {"label": LABELS, "box": np.zeros((N, 4))}

    def network(w, x):
        return {"logits": x["image"] @ w, "box": jnp.zeros((len(x["size"][0]), 4))}

    def metric(outputs, targets):
        right = outputs["logits"].argmax(-1) == targets["label"]
        return right - ((outputs["box"] - targets["box"]) ** 2).sum(-1)

    task = check_task(mj.Task(inputs, targets, metric), network, W)
    assert jax.tree.structure(task.inputs) == jax.tree.structure(inputs)
    assert task.metric == Metric(metric, name="metric")
    with pytest.raises(DataError, match=r"^no metric follows from outputs \{'box': 'float32\[2, 4"):
        check_task(mj.Task(inputs, targets), network, W)


class Loader:
    """Gives batches, as loaders of other libraries do."""

    def __len__(self):
        return 1

    def __iter__(self):
        yield X, LABELS


NAN = np.where(np.arange(N * 4).reshape(N, 4) == 5, np.nan, X)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (NAN, "the inputs: 1 of 36 values are not finite"),
        ({"a": X, "b": NAN}, "the inputs, leaf b,: 1 of 36 values are not finite"),
        (X[:0], "the inputs are 0: at least 1 are needed"),
        (np.float32(3), "inputs is a single number: an example axis is needed"),
        ({}, "the inputs are missing: there is no array among them"),
        (None, "the inputs are missing: there is no array among them"),
        ({"a": X, "b": X[:3]}, "the inputs are not one for each example: a: 9, b: 3"),
        (iter([X]), "inputs is a list_iterator: an array is needed"),
        ("train", "inputs is a str: an array is needed"),
        (Loader(), "inputs is a Loader: an array is needed"),
        ([1.0, 2.0], "inputs, leaf 0, is a float: an array is needed"),
        (X[:, :3], r"the network does not take inputs float32\[2, 3\]: .*"),
        ({"x": X}, r"the network does not take inputs \{'x': 'float32\[2, 4\]'\}: .*"),
        (np.array(["a"] * N), r"the network does not take inputs <U1\[2\]: .*"),
    ],
)
def test_inputs_that_cannot_be_are_named(inputs, message):
    with pytest.raises(DataError, match=f"^{message}$") as error:
        checked(inputs)
    assert "\n" not in str(error.value)
    named = message.replace("inputs", "inputs of blue", 1)
    if "the network" not in message:
        with pytest.raises(DataError, match=f"^{named}$"):
            checked(inputs, name="blue")


@pytest.mark.parametrize(
    ("targets", "metric", "message"),
    [
        (LABELS[:8], None, r"9 examples but targets of shape \(8,\) \(task_0\)"),
        (np.int32(3), None, r"9 examples but targets of shape \(\) \(task_0\)"),
        ({"y": LABELS, "z": 3}, None, r"9 examples but targets z of shape \(\) \(task_0\)"),
        (np.full((N, 3), np.nan), None, "the targets of task_0: 27 of 27 values are not finite"),
        (
            (LABELS, np.full(N, np.inf)),
            None,
            "the targets 1 of task_0: 9 of 9 values are not finite",
        ),
        (LABELS + 1, None, r"labels run from 1 to 3, but the network has 3 classes \(0 to 2\)"),
        (LABELS - 1, "accuracy", r"labels run from -1 to 1, but the network has 3 .*"),
        (LABELS * 1.0, "accuracy", "labels are float64: whole numbers are needed"),
        (np.full(N, -100), "macro_f1", r"labels: all of them are ignored \(-100\)"),
        (
            np.zeros((N, 3), int),
            "cross_entropy",
            r"labels have shape \[9, 3\], logits \['b', 3\]: one label for each row .*",
        ),
        ({"y": LABELS}, "perplexity", "logits and labels must be one array each"),
        (None, "cross_entropy", "logits and labels must be one array each"),
        (None, None, r"no metric follows from outputs float32\[2, 3\] and targets None: name one"),
        (
            np.full((N, 3), 2),
            None,
            "targets of task_0 run from 2 to 2: binary_cross_entropy takes those from 0 to 1",
        ),
        (-np.ones((N, 3)), "distill", "targets of task_0 run from -1.0 to -1.0: distill takes .*"),
        ((LABELS, -np.ones(N)), None, "weights of task_0: none may be negative, nor all of them 0"),
        ((LABELS, np.zeros(N)), None, "weights of task_0: none may be negative, nor all of them 0"),
    ],
)
def test_targets_that_cannot_be_are_named(targets, metric, message):
    with pytest.raises(DataError, match=f"^{message}$") as error:
        checked(targets=targets, metric=metric)
    assert "\n" not in str(error.value)


def returning(shape):
    def metric(outputs, targets):
        del targets
        sizes = {"b": outputs.shape[0], "C": outputs.shape[1]}
        return jnp.zeros([sizes.get(n, n) for n in shape])

    return metric


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (returning(["b", 1]), r"metric metric of task_0 gives \(2, 1\) for 2 examples: scores \[b"),
        (returning([]), r"metric metric of task_0 gives \(\) for 2 examples: scores \[b\] are"),
        (returning([3]), r"metric metric of task_0 gives \(3,\) for 2 examples: scores \[b\] are"),
        (returning([2]), r"metric metric of task_0 gives \(2,\) for 3 examples: scores \[b\] are"),
        (returning(["C"]), r"metric metric of task_0 gives \(3,\) for 2 examples: scores"),
        (lambda y, t: {}, "metric <lambda> of task_0 gives nothing for 2 examples: scores"),
        (
            lambda y, t: (y[:, 0], y[:, 1]),
            r"metric <lambda> of task_0 gives \(2,\), \(2,\) for 2 examples: scores \[b\]",
        ),
        (
            Metric(lambda y, t: y.sum(), lambda sums, n: sums / n, "mine"),
            r"metric mine of task_0 gives statistics \(\) for 2 examples: one entry for each is",
        ),
        (
            Metric(lambda y, t: y, lambda sums, n: sums / n, "mine"),
            r"metric mine of task_0 gives float32\[3\]: a single number is needed",
        ),
        (
            lambda y, t: y["logits"],
            r"metric <lambda> of task_0 does not take outputs float32\[2, 3\] and targets int",
        ),
        (
            "mean_squared_error",
            r"metric mean_squared_error of task_0 does not take outputs float32\[2, 3\] and "
            r"targets int32\[2\]: targets of shape \[2, 3\] are needed$",
        ),
        ("soup", "metric is 'soup': choose one of cross_entropy, accuracy"),
    ],
)
def test_a_metric_that_gives_no_score_for_each_example_is_named(metric, message):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        checked(metric=metric)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(N, 6), (N, 3, 2), (N, 1), (N, 3, 1), (3, N)])
def test_targets_that_would_only_broadcast_are_refused(shape):
    def network(w, x):
        return jnp.zeros((len(x), 2, 3))

    for metric in ("mean_squared_error", "binary_accuracy", "distill", "r2"):
        with pytest.raises(MegajaxError):
            checked(targets=np.zeros(shape, np.float32), metric=metric, network=network)


@pytest.mark.parametrize("weights", [(N, 2), (2, N), (N, 3, 1)])
def test_weights_are_one_for_an_example_or_for_a_position(weights):
    targets = (np.zeros((N, 3), np.float32), np.ones(weights, np.float32))
    with pytest.raises(MegajaxError):
        checked(targets=targets, metric="mean_squared_error")
    for shape in ((N,), (N, 1), (N, 3)):
        checked(targets=(targets[0], np.ones(shape)), metric="mean_squared_error")


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_a_weight_is_a_number(weight):
    with pytest.raises(ConfigError, match=f"the weight of task_0 is {weight}"):
        checked(weight=weight)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda w, x: (x @ w).sum(), r"the output of the network has shape \(\) for 2 examples"),
        (lambda w, x: (x @ w).T, r"the output of the network has shape \(3, 2\) for 2 examples"),
        (
            lambda w, x: {"a": x @ w, "b": w},
            r"output b of the network has shape \(4, 3\) for 2 examples: its first axis must be",
        ),
    ],
)
def test_outputs_have_an_example_axis(network, message):
    with pytest.raises(DataError, match=message):
        checked(network=network)


def test_enough_examples():
    assert check_inputs(X, "calibration inputs") == N
    with pytest.raises(DataError, match="calibration inputs are 9: at least 10 are"):
        check_inputs(X, "calibration inputs", least=10)


# Several tasks --------------------------------------------------------------------------------

PARENTS = [RNG.normal(size=(4, 3)).astype(np.float32) for _ in range(2)]
FIRST = mj.Task(X, LABELS, "accuracy", name="classes", weight=1)
SECOND = mj.Task(np.abs(X[:7]), X[:7, :2], None, lambda w, x: x @ w[:, :2], name="values", weight=3)


def merged(combine, tasks=(FIRST, SECOND)):
    return mj.merge(
        jax.random.key(0),
        linear,
        PARENTS,
        list(tasks),
        align=mj.AlignConfig(method="none"),
        fitness=mj.FitnessConfig(combine=combine),
        evolution=mj.EvolutionConfig(population_size=6, generations=2),
    )


def scores_by_hand(w):
    right = np.mean((X @ w).argmax(-1) == LABELS)
    error = -np.mean((np.abs(X[:7]) @ w[:, :2] - X[:7, :2]) ** 2)
    return np.array([right, error])


@pytest.fixture(scope="module")
def relative():
    return merged("relative")


def test_scores_are_those_of_each_task_with_its_own_head_and_metric(relative):
    assert relative.metrics == {"classes": "accuracy", "values": "mean_squared_error"}
    for k, parent in enumerate(PARENTS):
        found = [relative.parent_scores[name][k] for name in ("classes", "values")]
        np.testing.assert_allclose(found, scores_by_hand(parent), rtol=1e-5)
    found = [relative.scores[name] for name in ("classes", "values")]
    np.testing.assert_allclose(found, scores_by_hand(np.asarray(relative.variables)), rtol=1e-5)
    each = relative.state.population.aux.tasks
    assert each.shape == (6, 2)


def test_any_networks_score_on_any_tasks_is_the_merges(relative):
    tasks = [FIRST, SECOND]
    for k, parent in enumerate(PARENTS):
        found = mj.score(linear, parent, tasks)
        assert list(found) == ["classes", "values"]
        expected = [relative.parent_scores[name][k] for name in found]
        np.testing.assert_allclose(list(found.values()), expected, rtol=1e-5)
    for metric in ("macro_f1", "perplexity", "accuracy"):  # a sum over the examples, or a mean
        task = mj.Task(X, np.where(np.arange(N) == 2, -100, LABELS), metric)
        problem = mj.problem_for(linear, PARENTS, task, population_size=4)
        genes = problem.genome.init(jax.random.key(0), 4)
        fitness = mj.evaluate(problem, genes)[0]
        found = [mj.score(linear, parent, task)["task_0"] for parent in PARENTS]
        np.testing.assert_allclose(found, fitness[:2], rtol=1e-5)
    with pytest.raises(DataError, match="labels run from 1 to 3"):
        mj.score(linear, PARENTS[0], (X, LABELS + 1))


def test_relative_scores_are_in_units_of_the_best_parents(relative):
    best = np.max([scores_by_hand(parent) for parent in PARENTS], axis=0)

    def fitness(w):
        return ((scores_by_hand(w) - best) / abs(best)) @ [0.25, 0.75]

    np.testing.assert_allclose(
        relative.parent_fitness, [fitness(parent) for parent in PARENTS], rtol=1e-4
    )
    np.testing.assert_allclose(
        relative.fitness, fitness(np.asarray(relative.variables)), rtol=1e-4, atol=1e-6
    )
    assert relative.parent_fitness.max() <= 0  # nobody is better than the best on each
    assert relative.fitness >= relative.parent_fitness.max()


@pytest.mark.parametrize(("combine", "odd"), [("relative", "carry"), ("raw", "drop")])
def test_a_tree_tells_the_scores_on_each_task(combine, odd):
    parents = [*PARENTS, RNG.normal(size=(4, 3)).astype(np.float32)]
    result = mj.merge_tree(
        jax.random.key(0),
        linear,
        parents,
        [FIRST, SECOND],
        hierarchy=mj.HierarchyConfig(odd=odd),
        align=mj.AlignConfig(method="none"),
        fitness=mj.FitnessConfig(combine=combine),
        evolution=mj.EvolutionConfig(population_size=6, generations=2),
    )
    assert result.metrics == {"classes": "accuracy", "values": "mean_squared_error"}
    root = scores_by_hand(np.asarray(result.variables))
    np.testing.assert_allclose(list(result.scores.values()), root, rtol=1e-5)
    table = np.array([scores_by_hand(parent) for parent in parents])
    if odd == "drop":
        table[2] = np.nan
    np.testing.assert_allclose(np.stack([*result.parent_scores.values()]).T, table, rtol=1e-5)
    best = np.nanmax(table, axis=0) if combine == "relative" else 0.0
    scale = abs(best) if combine == "relative" else 1.0
    fitness = ((np.vstack([root, table]) - best) / scale) @ [0.25, 0.75]
    found = [result.fitness, *result.parent_fitness]
    np.testing.assert_allclose(found, fitness, rtol=1e-4, atol=1e-6)


def test_raw_scores_are_weighted_as_they_are():
    result = merged("raw")
    for found, w in [
        *zip(result.parent_fitness, PARENTS, strict=True),
        (result.fitness, np.asarray(result.variables)),
    ]:
        np.testing.assert_allclose(found, scores_by_hand(w) @ [0.25, 0.75], rtol=1e-5)


def test_a_parent_without_a_number_on_a_task_is_not_what_others_are_measured_by():
    def fragile(w, x):
        return jnp.where(w[0, 0] == PARENTS[1][0, 0], jnp.nan, x @ w[:, :2])

    task = SECOND._replace(apply_fn=fragile)
    result = merged("relative", [FIRST, task])
    best = [
        max(scores_by_hand(parent)[0] for parent in PARENTS),
        scores_by_hand(PARENTS[0])[1],
    ]
    expected = ((scores_by_hand(PARENTS[0]) - best) / np.abs(best)) @ [0.25, 0.75]
    np.testing.assert_allclose(result.parent_fitness[0], expected, rtol=1e-4, atol=1e-6)
    assert not np.isfinite(result.parent_fitness[1])
    assert np.isfinite(result.fitness)


def test_tasks_that_cannot_be_told_apart_or_count_nothing_are_refused():
    with pytest.raises(ConfigError, match="two tasks are called 'classes'"):
        merged("raw", [FIRST, FIRST])
    with pytest.raises(ConfigError, match="the weights of all tasks are 0"):
        merged("raw", [FIRST._replace(weight=0), SECOND._replace(weight=0)])
