"""Networks' outputs together and against each other, by metric: against SciPy and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn import metrics as sk

import megajax as mj
from megajax.evaluation.measures import predict
from megajax.evaluation.statistics import paired_bootstrap
from megajax.merging.metrics import METRICS, as_metric

RNG = np.random.default_rng(0)
N = 60
LABELS = RNG.integers(0, 4, N)
LOGITS = RNG.normal(size=(3, N, 4)).astype(np.float32)
SEVERAL = RNG.integers(0, 2, (N, 4))
VALUES = RNG.normal(size=(N, 4))

# Ensembles ------------------------------------------------------------------------------------


def test_every_metric_says_what_its_ensemble_averages():
    kinds = {name: metric.kind for name, metric in METRICS.items()}
    assert {name for name, kind in kinds.items() if kind == "values"} == {
        "mean_squared_error",
        "mean_absolute_error",
        "r2",
    }
    assert {name for name, kind in kinds.items() if kind == "yes_or_no"} == {
        "binary_cross_entropy",
        "binary_accuracy",
    }
    assert set(kinds.values()) == {"classes", "yes_or_no", "values"}


@pytest.mark.parametrize(
    ("metric", "targets", "expected"),
    [
        ("cross_entropy", LABELS, -sk.log_loss(LABELS, softmax(LOGITS, -1).mean(0))),
        ("accuracy", LABELS, np.mean(softmax(LOGITS, -1).mean(0).argmax(-1) == LABELS)),
        (
            "macro_f1",
            LABELS,
            sk.f1_score(LABELS, softmax(LOGITS, -1).mean(0).argmax(-1), average="macro"),
        ),
        (
            "binary_cross_entropy",
            SEVERAL,
            -sk.log_loss(SEVERAL.ravel(), expit(LOGITS).mean(0).ravel()),
        ),
        ("binary_accuracy", SEVERAL, np.mean((expit(LOGITS).mean(0) > 0.5) == SEVERAL)),
        ("mean_squared_error", VALUES, -sk.mean_squared_error(VALUES, LOGITS.mean(0))),
        ("mean_absolute_error", VALUES, -sk.mean_absolute_error(VALUES, LOGITS.mean(0))),
        ("r2", VALUES[:, :1], sk.r2_score(VALUES[:, 0], LOGITS[:, :, 0].mean(0))),
    ],
)
def test_an_ensembles_score_is_that_of_the_mean_prediction(metric, targets, expected):
    outputs = LOGITS[..., : np.shape(targets)[-1]] if metric == "r2" else LOGITS
    mean = mj.ensemble(outputs, metric)
    assert mean.dtype == np.float64
    assert mj.score(lambda _, x: x, (), mj.Task(mean, targets, metric))["task_0"] == (
        pytest.approx(expected, rel=1e-5)
    )


def test_positions_trees_and_far_logits_are_averaged():
    pixels = RNG.normal(scale=300, size=(2, 5, 6, 6, 3))
    mean = np.exp(mj.ensemble(pixels, "accuracy"))
    np.testing.assert_allclose(mean, softmax(pixels, axis=-1).mean(0), rtol=1e-9)
    far = np.array([[-800.0, 800.0, 0.5], [-700.0, 700.0, 0.5]])
    np.testing.assert_allclose(
        mj.ensemble(far, "binary_accuracy"), [-700 - np.log(2), 700 + np.log(2), 0.5], rtol=1e-12
    )
    own = mj.Metric(lambda y, t: y["mean"] - t, kind="values")
    found = mj.ensemble({"mean": np.arange(6.0).reshape(2, 3), "id": np.ones((2, 3), int)}, own)
    np.testing.assert_array_equal(found["mean"], [1.5, 2.5, 3.5])
    with pytest.raises(mj.ConfigError, match="metric gap does not say what outputs stand for"):
        mj.ensemble(LOGITS, mj.Metric(lambda y, t: y, name="gap"))


# Differences ----------------------------------------------------------------------------------


def resampled(score, first, second, targets, resamples=4000, seed=1):
    """The percentile bootstrap, drawn example by example."""
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        rows = rng.integers(0, len(targets), len(targets))
        draws.append(score(targets[rows], first[rows]) - score(targets[rows], second[rows]))
    return np.quantile(draws, [0.025, 0.975])


@pytest.mark.parametrize(
    ("metric", "targets", "columns", "score"),
    [
        ("macro_f1", LABELS, 4, lambda t, y: sk.f1_score(t, y.argmax(-1), average="macro")),
        ("r2", VALUES[:, 0], 1, lambda t, y: sk.r2_score(t, y[:, 0])),
        ("mean_squared_error", VALUES, 4, lambda t, y: -np.mean((t - y) ** 2)),
        ("binary_accuracy", SEVERAL, 4, lambda t, y: np.mean((y > 0) == t)),
        (
            mj.Metric(lambda y, t: (y - t) ** 2, lambda s, n: -jnp.sqrt(s.mean() / n)),
            VALUES,
            4,
            lambda t, y: -np.sqrt(np.mean((t - y) ** 2)),
        ),
    ],
)
def test_the_interval_of_any_metric_is_the_bootstraps(metric, targets, columns, score):
    first, second = LOGITS[:2, :, :columns]
    found = mj.score_difference(0, first, second, targets, metric)
    assert found.estimate == pytest.approx(score(targets, first) - score(targets, second), rel=1e-4)
    low, high = resampled(score, first, second, targets)
    np.testing.assert_allclose([found.low, found.high], [low, high], atol=0.06 * (high - low))
    other = mj.score_difference(0, second, first, targets, metric)
    assert other.estimate == pytest.approx(-found.estimate)


def test_of_a_mean_it_is_the_paired_bootstrap_of_the_scores():
    right = (LOGITS.argmax(-1) == LABELS)[:2]
    expected = paired_bootstrap(jax.random.key(3), *right)
    found = mj.score_difference(3, *LOGITS[:2], LABELS, "accuracy")
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert found.estimate == pytest.approx(expected.estimate, abs=1e-12)
    own = mj.score_difference(3, *LOGITS[:2], LABELS, lambda y, t: 1.0 * (y.argmax(-1) == t))
    np.testing.assert_allclose(own, expected, atol=0.02)


def test_examples_that_do_not_count_are_not_drawn():
    ignored = np.where(np.arange(N) < 20, -100, LABELS)
    few = mj.score_difference(0, *LOGITS[:2], ignored)
    np.testing.assert_allclose(
        few, mj.score_difference(0, *LOGITS[:2, 20:], LABELS[20:]), rtol=1e-9
    )


def test_the_same_outputs_differ_in_nothing():
    found = mj.score_difference(0, LOGITS[0], LOGITS[0], LABELS, "macro_f1")
    assert found == (0, 0, 0, 1)


def test_a_network_that_is_not_finite_has_no_interval():
    broken = np.full_like(LOGITS[0], np.nan)
    found = mj.score_difference(0, LOGITS[0], broken, LABELS)
    assert np.isnan(found).all()


@pytest.mark.parametrize(
    ("first", "targets", "error", "message"),
    [
        (LOGITS[0, :5], LABELS, mj.DataError, r"outputs of shapes \(5, 4\) and \(60, 4\)"),
        (LOGITS[0], LABELS[:5], mj.DataError, r"targets of \(5,\): two alike are needed"),
        (LOGITS[0], LABELS + 1, mj.DataError, "labels of the task run from 1 to 4"),
        (LOGITS[0], VALUES[:, :3], mj.DataError, "no metric follows from outputs"),
    ],
)
def test_outputs_that_do_not_fit_are_named(first, targets, error, message):
    with pytest.raises(error, match=message):
        mj.score_difference(0, first, LOGITS[1], targets)


def test_a_diagnosis_averages_what_the_metric_is_about():
    x = RNG.normal(size=(40, 3)).astype(np.float32)
    parents = [RNG.normal(size=(3, 2)).astype(np.float32) for _ in range(2)]
    task = mj.Task(x, RNG.integers(0, 2, (40, 2)), "binary_cross_entropy")
    found = mj.diagnose(0, _linear, parents, task)
    mean = expit(np.stack([predict(_linear, one, x) for one in parents])).mean(0)
    assert found.ensemble == pytest.approx(-sk.log_loss(task.targets.ravel(), mean.ravel()))
    assert as_metric("binary_cross_entropy").kind == "yes_or_no"


def _linear(variables, inputs):
    return inputs @ variables
