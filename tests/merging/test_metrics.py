"""Metrics against scikit-learn and SciPy, with extra axes, ignored labels and weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import entropy
from sklearn import metrics as sklearn

from megajax.errors import ConfigError, DataError
from megajax.evaluation.batches import cut
from megajax.evaluation.measures import measure
from megajax.merging.metrics import IGNORED, METRICS, Metric, accuracy, as_metric, default_metric
from megajax.merging.tasks import Task, batches

RNG = np.random.default_rng(0)
N, C = 37, 4
LOGITS = RNG.normal(scale=2, size=(N, C)).astype(np.float32)
LABELS = RNG.integers(0, C, N)
WEIGHTS = RNG.uniform(0.1, 3, N).astype(np.float32)
VALUES = RNG.normal(size=(N, 3)).astype(np.float32)
WANTED = (VALUES + RNG.normal(size=(N, 3))).astype(np.float32)
YES = RNG.integers(0, 2, (N, 3))


def value(name, outputs, targets, batch_size=10):
    """What a problem makes of a metric: batch by batch, the last one padded."""
    metric = as_metric(name)
    data = batches(Task(outputs, targets), batch_size)

    def pass_(batch):
        return metric.statistics(batch.inputs, batch.targets)

    statistics = jax.lax.map(pass_, jax.tree.map(jnp.asarray, data))
    return float(metric.of(statistics, jnp.asarray(data.valid)))


def likelihoods(logits, labels):
    return np.take_along_axis(
        log_softmax(np.asarray(logits, np.float64), axis=-1), labels[..., None], axis=-1
    )[..., 0]


def binary_loss(logits, wanted):
    z = np.asarray(logits, np.float64)
    return -(wanted * np.logaddexp(0, -z) + (1 - wanted) * np.logaddexp(0, z))


ORACLES = {
    "accuracy": (
        LOGITS,
        LABELS,
        lambda y, t, w: sklearn.accuracy_score(t, y.argmax(-1), sample_weight=w),
    ),
    "cross_entropy": (
        LOGITS,
        LABELS,
        lambda y, t, w: (
            -sklearn.log_loss(
                t, np.exp(log_softmax(np.float64(y), -1)), sample_weight=w, labels=range(C)
            )
        ),
    ),
    "macro_f1": (
        LOGITS,
        LABELS,
        lambda y, t, w: sklearn.f1_score(t, y.argmax(-1), average="macro", sample_weight=w),
    ),
    "perplexity": (
        LOGITS,
        LABELS,
        lambda y, t, w: -np.exp(-np.average(likelihoods(y, t), weights=w)),
    ),
    "binary_accuracy": (
        VALUES,
        YES,
        lambda y, t, w: np.average(((y > 0) == t).mean(axis=1), weights=w),
    ),
    "binary_cross_entropy": (
        VALUES,
        YES,
        lambda y, t, w: np.average(binary_loss(y, t).mean(axis=1), weights=w),
    ),
    "mean_squared_error": (
        VALUES,
        WANTED,
        lambda y, t, w: -sklearn.mean_squared_error(t, y, sample_weight=w),
    ),
    "mean_absolute_error": (
        VALUES,
        WANTED,
        lambda y, t, w: -sklearn.mean_absolute_error(t, y, sample_weight=w),
    ),
    "r2": (
        VALUES,
        WANTED,
        lambda y, t, w: sklearn.r2_score(
            t.ravel(), y.ravel(), sample_weight=None if w is None else np.repeat(w, 3)
        ),
    ),
    "distill": (
        LOGITS,
        RNG.dirichlet(np.ones(C), N).astype(np.float32),
        lambda y, t, w: (
            -np.average(
                entropy(np.float64(t), np.exp(log_softmax(np.float64(y), -1)), axis=1), weights=w
            )
        ),
    ),
    "calibrated_cross_entropy": (
        LOGITS,
        LABELS,
        lambda y, t, w: (
            -minimize_scalar(
                lambda T: -np.average(likelihoods(y / T, t), weights=w),
                bounds=(0.25, 8),
                method="bounded",
            ).fun
        ),
    ),
}


def test_every_metric_has_an_oracle():
    assert set(ORACLES) == set(METRICS)
    assert all(metric.name == name for name, metric in METRICS.items())


@pytest.mark.parametrize("batch_size", [10, 37])
@pytest.mark.parametrize("name", ORACLES)
def test_a_metric_is_its_oracles(name, batch_size):
    outputs, targets, oracle = ORACLES[name]
    # The best of 41 temperatures misses the best of all by little.
    close = {"atol": 2e-4} if name == "calibrated_cross_entropy" else {"rtol": 1e-5}
    found = value(name, outputs, targets, batch_size)
    np.testing.assert_allclose(found, oracle(outputs, targets, None), **close)


@pytest.mark.parametrize("name", ORACLES)
def test_examples_count_by_their_weights_and_without_weight_not_at_all(name):
    outputs, targets, oracle = ORACLES[name]
    weights = np.where(np.arange(N) % 5 == 0, 0, WEIGHTS)
    there = weights > 0
    close = {"atol": 2e-4} if name == "calibrated_cross_entropy" else {"rtol": 1e-5}
    outputs = np.where(there.reshape(-1, *[1] * (outputs.ndim - 1)), outputs, 50.0)
    found = value(name, outputs.astype(np.float32), (targets, weights))
    expected = oracle(outputs[there], targets[there], weights[there])
    np.testing.assert_allclose(found, expected, **close)


def test_temperatures_are_those_of_overconfident_and_shy_networks():
    for factor in (0.3, 1.0, 3.0):  # the best temperature is then as many times larger
        found = value("calibrated_cross_entropy", factor * LOGITS, LABELS)
        oracle = ORACLES["calibrated_cross_entropy"][2]
        expected = oracle(factor * LOGITS, LABELS, None)
        assert expected - 5e-4 < found <= expected + 1e-5


# Positions ------------------------------------------------------------------------------------

SHAPE = (N, 5, 2)  # of labels: N examples of 10 positions
DEEP = RNG.normal(scale=2, size=(*SHAPE, C)).astype(np.float32)
DEEP_LABELS = RNG.integers(0, C, SHAPE)
IGNORING = np.where(RNG.random(SHAPE) < 0.3, IGNORED, DEEP_LABELS)
IGNORING[3] = IGNORED  # an example of which nothing counts


def by_example(scores, weights):
    """The mean over the examples of the weighted mean over their positions."""
    rows = [
        np.average(s.ravel(), weights=w.ravel())
        for s, w in zip(scores, weights, strict=True)
        if w.any()
    ]
    return np.mean(rows)


@pytest.mark.parametrize("given", ["all", "ignored", "weights", "both"])
@pytest.mark.parametrize("name", ["accuracy", "cross_entropy", "macro_f1", "perplexity"])
def test_positions_count_by_label_and_weight(name, given):
    weights = RNG.uniform(0.1, 3, SHAPE).astype(np.float32)
    weights[5], weights[6, 0] = 0, 0
    labels = IGNORING if given in ("ignored", "both") else DEEP_LABELS
    targets = (labels, weights) if given in ("weights", "both") else labels
    counted = (labels != IGNORED) * (weights if isinstance(targets, tuple) else 1.0)
    true = np.where(labels == IGNORED, 0, labels)
    guess = DEEP.argmax(-1)
    flat = {"sample_weight": counted.ravel()}
    expected = {
        "accuracy": lambda: by_example(guess == true, counted),
        "cross_entropy": lambda: by_example(likelihoods(DEEP, true), counted),
        "macro_f1": lambda: sklearn.f1_score(true.ravel(), guess.ravel(), average="macro", **flat),
        "perplexity": lambda: -np.exp(-np.average(likelihoods(DEEP, true), weights=counted)),
    }[name]()
    np.testing.assert_allclose(value(name, DEEP, targets), expected, rtol=1e-5)


def test_probabilities_of_positions():
    wanted = RNG.dirichlet(np.ones(C), SHAPE).astype(np.float32)
    gaps = entropy(np.float64(wanted), np.exp(log_softmax(np.float64(DEEP), -1)), axis=-1)
    np.testing.assert_allclose(value("distill", DEEP, wanted), -gaps.mean(), rtol=1e-5)
    weights = RNG.uniform(size=SHAPE).astype(np.float32)
    expected = -by_example(gaps, weights)
    np.testing.assert_allclose(value("distill", DEEP, (wanted, weights)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["mean_squared_error", "mean_absolute_error", "binary_accuracy"])
def test_outputs_of_several_axes_have_weights_of_their_own(name):
    outputs = RNG.normal(size=SHAPE).astype(np.float32)
    wanted = RNG.integers(0, 2, SHAPE).astype(np.float32)
    weights = RNG.uniform(size=SHAPE).astype(np.float32)
    scores = {
        "mean_squared_error": -((np.float64(outputs) - wanted) ** 2),
        "mean_absolute_error": -abs(np.float64(outputs) - wanted),
        "binary_accuracy": (outputs > 0) == (wanted > 0.5),
    }[name]
    np.testing.assert_allclose(value(name, outputs, wanted), scores.mean(), rtol=1e-5)
    expected = by_example(scores, weights)
    np.testing.assert_allclose(value(name, outputs, (wanted, weights)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["mean_squared_error", "binary_cross_entropy", "r2"])
@pytest.mark.parametrize("shape", [(N,), (N, 1)])
def test_one_output_may_have_an_axis_of_its_own(name, shape):
    outputs, wanted = LOGITS[:, 0].reshape(shape), (LABELS > 1).astype(np.float32)
    expected = value(name, LOGITS[:, 0], wanted)
    np.testing.assert_allclose(value(name, outputs, wanted), expected, rtol=1e-6)
    np.testing.assert_allclose(value(name, outputs, wanted.reshape(shape)), expected, rtol=1e-6)
    # A weight for the only position of an example is the weight of the example.
    weighted = value(name, LOGITS[:, 0], (wanted, WEIGHTS))
    found = value(name, outputs, (wanted.reshape(shape), WEIGHTS.reshape(shape)))
    np.testing.assert_allclose(found, weighted, rtol=1e-6)


# Numbers at the edge --------------------------------------------------------------------------


def test_infinite_and_missing_logits():
    inf, nan = np.inf, np.nan
    logits = np.array(
        [[nan, 0.0], [inf, 0.0], [1.0, 0.0], [0.0, -inf], [-inf, 0.0], [-inf, -inf]], np.float32
    )
    labels = np.zeros(6, int)
    assert accuracy(logits, labels).tolist() == [0, 0, 1, 1, 0, 1]
    assert measure(logits[1:], labels[1:]).accuracy == pytest.approx(3 / 5)
    cross_entropy = METRICS["cross_entropy"].statistics(logits, labels)[0]
    assert np.isnan(cross_entropy[:2]).all()
    np.testing.assert_allclose(cross_entropy[2:4], [-np.log1p(np.exp(-1)), 0], rtol=1e-6)
    assert cross_entropy[4] == -inf
    assert np.isnan(cross_entropy[5])
    assert value("macro_f1", logits[:3], labels[:3]) == pytest.approx(0.5)  # 1 of 3 told
    with np.errstate(invalid="ignore"):
        assert value("perplexity", logits[2:5], labels[2:5]) == -inf
    answers = METRICS["binary_accuracy"].statistics(np.float32([inf, -inf, nan, 2]), np.ones(4))[0]
    assert answers.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint32, np.int64])
def test_labels_of_any_integer_type(dtype):
    logits = np.tile(np.linspace(0, 1, 200, dtype=np.float32), (3, 1))
    labels = np.array([3, 99, 120]) + (36 if dtype == np.uint8 else 0)  # 156 is -100 in 8 bits
    expected = likelihoods(logits, labels).mean()
    np.testing.assert_allclose(
        value("cross_entropy", logits, labels.astype(dtype)), expected, rtol=1e-6
    )


def test_an_ignored_position_may_have_any_logits():
    logits = np.array([[[np.nan, 0.0], [0.0, 1.0]], [[-np.inf, np.inf], [0.0, 1.0]]], np.float32)
    labels = np.array([[IGNORED, 1], [IGNORED, 1]])
    expected = -np.log1p(np.exp(-1))
    assert value("accuracy", logits, labels) == 1
    np.testing.assert_allclose(value("cross_entropy", logits, labels), expected, rtol=1e-6)
    np.testing.assert_allclose(value("perplexity", logits, labels), -np.exp(-expected), rtol=1e-6)


def test_certain_probabilities_and_what_a_network_excludes():
    inf = np.inf
    logits = np.array([[0.0, -inf], [0.0, 0.0], [-inf, 0.0]], np.float32)
    wanted = np.array([[1.0, 0.0]] * 3, np.float32)
    scores, _ = METRICS["distill"].statistics(logits, wanted)
    np.testing.assert_allclose(scores, [0, -np.log(2), -inf], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_is_scored_in_float32(dtype):
    logits = np.asarray(jnp.asarray(LOGITS, dtype))
    wide = logits.astype(np.float32)
    for name in ("cross_entropy", "accuracy", "macro_f1", "calibrated_cross_entropy"):
        np.testing.assert_allclose(
            value(name, logits, LABELS), value(name, wide, LABELS), rtol=1e-6
        )
    large = np.full((300, 1), 300.0, np.float16)  # its square is beyond half precision
    assert value("mean_squared_error", large, np.zeros((300, 1), np.float16)) == -90_000


@pytest.mark.parametrize("shift", [0.0, 30.0, 1e4, 1e7])
def test_r2_far_from_zero_still_ranks(shift):
    wanted = (WANTED + shift).astype(np.float32)
    near, far = wanted + np.float32(0.5), wanted + np.float32(16)
    scores = [value("r2", one, wanted) for one in (wanted, near, far)]
    assert scores[0] == 1
    assert scores[1] >= scores[2]
    assert scores[2] < 1
    if shift <= 30:
        expected = sklearn.r2_score(wanted.ravel(), near.ravel())
        np.testing.assert_allclose(scores[1], expected, rtol=1e-3)


def test_r2_of_constant_targets_is_one_for_the_constant_alone():
    wanted = np.full(9, 2.0, np.float32)
    assert value("r2", wanted, wanted) == 1
    assert value("r2", wanted + 1, wanted) < -10


# A metric of one's own ------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 10, 36, 37, 1000])
@pytest.mark.parametrize("name", ["accuracy", "r2", "macro_f1", "own", "rmse"])
def test_padding_never_counts(name, batch_size):
    own = {
        "own": lambda y, t: jnp.where(y[:, 0] == 0, 1e6, y[:, 0] + 7),  # padding is all zeros
        "rmse": Metric(
            lambda y, t: {"square": (y[:, 0] - t + 1) ** 2, "many": jnp.ones((len(y), 2, 3))},
            lambda sums, n: -jnp.sqrt(sums["square"] / n) + sums["many"].sum() / n,
        ),
    }
    targets = WANTED[:, 0] if name in own else ORACLES[name][1]
    outputs = VALUES if name in own else ORACLES[name][0]
    found = value(own.get(name, name), outputs, targets, batch_size)
    if name == "own":
        expected = outputs[:, 0].mean() + 7
    elif name == "rmse":
        expected = 6 - np.sqrt(((np.float64(outputs[:, 0]) - targets + 1) ** 2).mean())
    else:
        expected = ORACLES[name][2](outputs, targets, None)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_metric_is_a_name_a_function_or_itself():
    assert as_metric("accuracy") is METRICS["accuracy"]
    metric = Metric(accuracy, name="mine")
    assert as_metric(metric) is metric

    def peak(outputs, targets):
        return outputs.max(-1)

    assert as_metric(peak) == Metric(peak, name="peak") == as_metric(peak)
    for wrong, message in (
        ("f1", "metric is 'f1': choose one of cross_entropy, accuracy"),
        (3, "metric is 3: a name, a function or a Metric is needed"),
    ):
        with pytest.raises(ConfigError, match=message):
            as_metric(wrong)


F, WHOLE = np.float32, np.int64


@pytest.mark.parametrize(
    ("outputs", "targets", "expected"),
    [
        (((5, 3), F), ((5,), WHOLE), "cross_entropy"),
        (((5, 7, 3), F), ((5, 7), WHOLE), "cross_entropy"),
        (((5, 7, 3), jnp.bfloat16), ((5, 7), np.uint8), "cross_entropy"),
        (((5,), F), ((5,), bool), "binary_cross_entropy"),
        (((5, 1), F), ((5,), WHOLE), "binary_cross_entropy"),
        (((5, 1), F), ((5, 1), bool), "binary_cross_entropy"),
        (((5, 3), F), ((5, 3), WHOLE), "binary_cross_entropy"),
        (((5, 3), F), ((5, 3), F), "mean_squared_error"),
        (((5, 1), F), ((5,), np.float64), "mean_squared_error"),
        (((5, 4, 4, 3), F), ((5, 4, 4, 3), np.float16), "mean_squared_error"),
        (((5, 3), F), ((5,), F), None),
        (((5, 3), F), ((5, 2), WHOLE), None),
        (((5, 3), F), ((5,), bool), None),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_default_follows_from_shapes_and_types(outputs, targets, expected, weighted):
    outputs, targets = (jax.ShapeDtypeStruct(*one) for one in (outputs, targets))
    if weighted:
        targets = (targets, jax.ShapeDtypeStruct((5,), F))
    if expected is not None:
        assert default_metric(outputs, targets) == expected
        return
    with pytest.raises(DataError, match=r"no metric follows from outputs float32\[5, 3\] and"):
        default_metric(outputs, targets)


# Batches --------------------------------------------------------------------------------------


def test_batches_are_even_and_complete():
    inputs = {"a": RNG.normal(size=(37, 6, 2)).astype(F), "b": np.arange(37)}
    data = batches(Task(inputs, (LABELS, WEIGHTS)), 10)
    assert data.inputs["a"].shape == (4, 10, 6, 2)
    there = data.valid
    assert there.sum() == 37
    np.testing.assert_array_equal(data.inputs["a"][there], inputs["a"])
    np.testing.assert_array_equal(data.inputs["b"][there], inputs["b"])
    np.testing.assert_array_equal(data.targets[0][there], LABELS)
    np.testing.assert_array_equal(data.targets[1][there], WEIGHTS)
    assert batches(Task(inputs), 36).valid.sum(axis=1).tolist() == [19, 18]
    assert batches(Task(inputs), 1000).valid.shape == (1, 37)


def test_examples_of_which_nothing_counts_are_not_valid():
    labels = np.where(np.arange(8)[:, None] % 3 == 0, IGNORED, np.ones((8, 2), int))
    labels[1, 0] = IGNORED
    expected = [k % 3 != 0 for k in range(8)]
    inputs = np.zeros((8, 1))
    assert batches(Task(inputs, labels), 8).valid[0].tolist() == expected
    assert batches(Task(inputs, (labels, np.ones((8, 2)))), 8).valid[0].tolist() == expected
    assert cut(inputs, None, 8).valid.all()
