"""Fitness against NumPy: padding never counts, and no mapping changes a result."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.errors import DataError
from megajax.evaluation.measures import ensemble, measure, predict
from megajax.merging import fitness
from megajax.merging.genome import masks
from megajax.trees import stack_parents


class Net(nn.Module):
    convolve: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x)).mean((1, 2)) if self.convolve else x.reshape(len(x), -1)
        return nn.Dense(4)(x)


RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(37, 6, 6, 2)).astype(np.float32)
LABELS = RNG.integers(0, 4, 37)
PARENTS = stack_parents([Net().init(jax.random.key(k), IMAGES) for k in range(2)])
GENOME = masks(PARENTS, granularity="leaf")
GENES = GENOME.init(jax.random.key(3), 9)
METRICS = list(fitness.METRICS.values())


def evaluate(metric=fitness.accuracy, batch_size=10, chunk=1, **options):
    data = fitness.batches(IMAGES, LABELS, batch_size)
    evaluator = fitness.evaluator(
        GENOME.express, Net().apply, metric, PARENTS, data, population_chunk=chunk, **options
    )
    return jax.jit(lambda evaluator, genes: evaluator(genes))(evaluator, GENES)


def logits_of_population():
    return [
        np.asarray(Net().apply(GENOME.express(genes, PARENTS), IMAGES), np.float64)
        for genes in GENES
    ]


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_fitness_is_numpys():
    right = np.array([(logits.argmax(-1) == LABELS).mean() for logits in logits_of_population()])
    values, aux = evaluate(fitness.accuracy)
    np.testing.assert_allclose(values, right, rtol=1e-6)
    assert aux == ()
    expected = [
        log_softmax(logits)[np.arange(37), LABELS].mean() for logits in logits_of_population()
    ]
    np.testing.assert_allclose(evaluate(fitness.negative_cross_entropy)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("batch_size", [1, 10, 36, 37, 1000])
def test_padding_never_counts(metric, batch_size):
    np.testing.assert_allclose(evaluate(metric, batch_size)[0], evaluate(metric, 37)[0], rtol=1e-5)


@pytest.mark.parametrize("chunk", [2, 4, 9, 64])
def test_the_mapping_does_not_change_the_result(chunk):
    np.testing.assert_array_equal(evaluate(chunk=chunk)[0], evaluate(chunk=1)[0])
    smooth = fitness.negative_cross_entropy
    np.testing.assert_allclose(evaluate(smooth, chunk=chunk)[0], evaluate(smooth)[0], rtol=1e-5)


def test_correctness_of_every_example_comes_back_in_order():
    values, right = evaluate(fitness.negative_cross_entropy, per_example=True)
    expected = np.array([logits.argmax(-1) == LABELS for logits in logits_of_population()])
    np.testing.assert_array_equal(right, expected)
    assert right.shape == (9, 37)
    np.testing.assert_allclose(values, evaluate(fitness.negative_cross_entropy)[0], rtol=1e-6)


def test_a_users_metric_is_averaged():
    values, _ = evaluate(lambda logits, labels: jnp.where(labels == 2, 8.0, 0.0))
    np.testing.assert_allclose(values, 8 * (LABELS == 2).mean(), rtol=1e-6)


def test_data_and_parents_are_arguments_of_the_program_not_constants():
    data = fitness.batches(np.zeros((64, 32, 32, 3), np.float32), np.zeros(64, int), 64)
    parents = {"w": jnp.zeros((2, 3072, 10))}
    genome = masks(parents, granularity="global")
    evaluator = fitness.evaluator(
        genome.express,
        lambda w, x: x.reshape(len(x), -1) @ w["w"],
        fitness.accuracy,
        parents,
        data,
        population_chunk=1,
    )
    program = jax.jit(lambda evaluator, genes: evaluator(genes)).lower(
        evaluator, jnp.ones((3, 1, 2))
    )
    assert len(program.as_text()) < 50_000


def test_batches_are_even_and_complete():
    data = fitness.batches(IMAGES, LABELS, 10)
    chex.assert_shape(data.images, (4, 10, 6, 6, 2))
    valid = np.asarray(data.valid)
    np.testing.assert_array_equal(np.asarray(data.images)[valid], IMAGES)
    np.testing.assert_array_equal(np.asarray(data.labels)[valid], LABELS)
    with pytest.raises(DataError, match="validation set is empty"):
        fitness.batches(IMAGES[:0], LABELS[:0], 10)
    with pytest.raises(DataError, match="37 images but labels of shape \\(36,\\)"):
        fitness.batches(IMAGES, LABELS[:36], 10)


def test_logits_that_are_not_finite_are_never_right():
    logits = jnp.array([[jnp.nan, 0.0], [jnp.inf, 0.0], [1.0, 0.0]])
    assert fitness.accuracy(logits, jnp.zeros(3, int)).tolist() == [0, 0, 1]
    assert measure(np.asarray(logits)[1:], np.zeros(2, int)).accuracy == 0.5


def test_predict_measure_and_ensemble_are_numpys():
    one = jax.tree.map(lambda leaf: leaf[0], PARENTS)
    logits = predict(Net().apply, one, IMAGES, batch_size=10)
    np.testing.assert_allclose(logits, Net().apply(one, IMAGES), rtol=1e-5, atol=1e-6)
    metrics = measure(logits, LABELS)
    assert metrics.accuracy == (logits.argmax(-1) == LABELS).mean()
    expected = -log_softmax(logits.astype(np.float64))[np.arange(37), LABELS].mean()
    np.testing.assert_allclose(metrics.nll, expected)
    both = np.stack(logits_of_population()[:2])
    np.testing.assert_allclose(
        np.exp(ensemble(both)), np.exp(log_softmax(both)).mean(0), rtol=1e-12
    )
