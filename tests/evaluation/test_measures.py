"""Predictions, metrics and the straight line, against NumPy and networks mixed by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from megajax.errors import DataError
from megajax.evaluation.measures import measure, predict, predictor, straight_path
from megajax.merging.outputs import ensemble
from megajax.program.batchnorm import recalibrate

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 4)).astype(np.float32)
LABELS = np.arange(50) % 3
MODEL = nn.Dense(3)
ENDS = [MODEL.init(jax.random.key(k), X) for k in range(2)]


def apply_fn(variables, x):
    return MODEL.apply(variables, x)


@pytest.mark.parametrize("batch_size", [1, 7, 50, 1000])
def test_predictions_are_the_networks(batch_size):
    found = predict(apply_fn, ENDS[0], X, batch_size)
    assert type(found) is np.ndarray
    np.testing.assert_allclose(found, apply_fn(ENDS[0], X), rtol=1e-5, atol=1e-6)


def test_predictions_of_trees_and_in_half_precision():
    def network(w, x):
        return {"half": (x["a"] * w).astype(jnp.bfloat16), "whole": x["b"] + 1}

    inputs = {"a": X, "b": np.arange(50)}
    found = predict(network, np.float32(2), inputs, batch_size=8)
    assert found["half"].dtype == np.float32
    np.testing.assert_array_equal(found["half"], np.asarray(jnp.bfloat16(2 * X), np.float32))
    np.testing.assert_array_equal(found["whole"], np.arange(50) + 1)


@pytest.mark.parametrize("inputs", [X[:0], {}, {"a": X[:0]}])
def test_nothing_to_predict_is_named(inputs):
    with pytest.raises(DataError, match="there are no examples to predict"):
        predict(apply_fn, ENDS[0], inputs)


def test_one_program_serves_all_networks_and_batches():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event) if "backend_comp" in event else None
    )
    predict(apply_fn, ENDS[0], X, 9)
    compiled.clear()
    predict(apply_fn, ENDS[1], X[::-1], 9)
    assert compiled == []


def test_metrics_are_numpys():
    logits = predict(apply_fn, ENDS[0], X)
    found = measure(logits, LABELS)
    assert found.accuracy == (logits.argmax(-1) == LABELS).mean()
    expected = -log_softmax(logits.astype(np.float64), axis=-1)[np.arange(50), LABELS].mean()
    np.testing.assert_allclose(found.nll, expected)


def test_positions_count_within_their_examples_and_ignored_ones_not_at_all():
    rng = np.random.default_rng(4)
    logits, labels = rng.normal(size=(6, 5, 2, 3)), rng.integers(0, 3, (6, 5, 2))
    labels[rng.random(labels.shape) < 0.4] = -100
    labels[2] = -100  # an example of which nothing counts
    right, nll = [], []
    for row, wanted in zip(logits, labels, strict=True):
        places = np.argwhere(wanted != -100)
        if len(places):
            each = [(row[*place], wanted[*place]) for place in places]
            right.append(np.mean([one.argmax() == label for one, label in each]))
            nll.append(np.mean([-log_softmax(one)[label] for one, label in each]))
    found = measure(logits, labels)
    np.testing.assert_allclose(found, [np.mean(right), np.mean(nll)], rtol=1e-12)


@pytest.mark.parametrize("shape", [(49,), (50, 1), (50, 3), (50, 50)])
def test_labels_of_another_shape_are_refused(shape):
    with pytest.raises(DataError, match="one label for each row of logits is needed"):
        measure(np.zeros((50, 3)), np.zeros(shape, int))


def test_logits_that_are_not_finite_are_never_right_and_minus_infinity_is_no_class():
    inf, nan = np.inf, np.nan
    logits = np.array([[inf, 0.0], [1.0, 0.0], [nan, 0.0], [0.0, -inf]])
    assert measure(logits, np.zeros(4, int)).accuracy == 0.5
    assert measure(logits[3:], np.zeros(1, int)).nll == 0
    assert measure(logits[3:], np.ones(1, int)).nll == inf
    assert np.isnan(measure(logits[:1], np.zeros(1, int)).nll)


def test_an_ensemble_is_the_mean_of_probabilities():
    both = RNG.normal(scale=50, size=(2, 50, 3))  # far beyond what exp can hold in float32
    found = ensemble(both)
    np.testing.assert_allclose(np.exp(found), softmax(both, axis=-1).mean(0), rtol=1e-12)


def test_all_networks_of_a_comparison_by_name():
    logits_of = predictor(apply_fn, {"a": ENDS[0], "b": ENDS[1]}, {"both": ["a", "b"]}, 16)
    found = logits_of(X)
    assert list(found) == ["a", "b", "both"]
    np.testing.assert_array_equal(found["a"], predict(apply_fn, ENDS[0], X, 16))
    np.testing.assert_allclose(found["both"], ensemble(np.stack([found["a"], found["b"]])))


def test_points_are_the_mixed_networks():
    shares = (0.0, 0.25, 1.0)
    plain = straight_path(apply_fn, *ENDS, X, LABELS, shares=shares)
    mixed = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, *ENDS)
    for point, network in zip(plain, [ENDS[0], mixed, ENDS[1]], strict=True):
        expected = measure(predict(apply_fn, network, X), LABELS)
        np.testing.assert_allclose(point, expected, rtol=1e-5)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(5)(x))))


def test_only_what_lies_between_the_ends_is_recalibrated():
    model = Normed()
    ends = [model.init(jax.random.key(k), X) for k in range(2)]
    arguments = model.apply, *ends, X, LABELS
    plain = straight_path(*arguments, shares=(0.0, 0.5, 1.0))
    found = straight_path(*arguments, shares=(0.0, 0.5, 1.0), calibration=X[:20])
    assert (found[0], found[2]) == (plain[0], plain[2])
    middle = recalibrate(model.apply, jax.tree.map(lambda a, b: (a + b) / 2, *ends), X[:20])
    expected = measure(predict(model.apply, middle, X), LABELS)
    np.testing.assert_allclose(found[1], expected, rtol=1e-5)
    assert found[1].nll != pytest.approx(plain[1].nll, rel=1e-3)
