"""Fisher information against gradients worked out by hand in NumPy, and the weighted mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.baselines import fisher_average, fisher_information
from megajax.errors import DataError, ParentsError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(11, 4)).astype(np.float32)  # no multiple of any chunk below


def linear(variables, x):
    return x @ variables["w"] + variables["b"]


LINEAR = {
    "b": RNG.normal(size=3).astype(np.float32),
    "steps": np.int32(7),
    "w": RNG.normal(size=(4, 3)).astype(np.float32),
}


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_linear_softmax_has_a_closed_form(chunk):
    fisher = fisher_information(linear, LINEAR, X, chunk=chunk)
    p = softmax(np.float64(X) @ LINEAR["w"] + LINEAR["b"])
    # d log p_c / d z_j = [c = j] - p_j, whose variance under c ~ p is p_j (1 - p_j)
    per_example = p * (1 - p)
    np.testing.assert_allclose(fisher["b"], per_example.mean(axis=0), rtol=1e-4)
    expected = np.einsum("ni,nj->ij", np.float64(X) ** 2, per_example) / len(X)
    np.testing.assert_allclose(fisher["w"], expected, rtol=1e-4)
    assert float(fisher["steps"]) == 0
    assert {leaf.dtype for leaf in jax.tree.leaves(fisher)} == {np.dtype(np.float32)}


def test_positions_of_an_example_add_up():
    """Every position's label is a draw of its own, and so their information adds up."""

    def positions(variables, x):
        return jnp.stack([linear(variables, x), 2 * linear(variables, x)], axis=1)

    fisher = fisher_information(positions, LINEAR, X)
    z = np.float64(X) @ LINEAR["w"] + LINEAR["b"]
    first, second = softmax(z), softmax(2 * z)
    expected = (first * (1 - first) + 4 * second * (1 - second)).mean(axis=0)
    np.testing.assert_allclose(fisher["b"], expected, rtol=1e-4)


def test_inputs_may_be_a_tree():
    def of_tree(variables, x):
        return linear(variables, x["a"] + x["b"][0])

    fisher = fisher_information(of_tree, LINEAR, {"a": 0.5 * X, "b": [0.5 * X]}, chunk=3)
    expected = fisher_information(linear, LINEAR, X)
    np.testing.assert_allclose(fisher["w"], expected["w"], rtol=1e-5)


def test_a_hidden_layer_by_backpropagation_by_hand():
    u, v = RNG.normal(size=(4, 5)), RNG.normal(size=(5, 3))
    x = np.float64(X)
    expected_u, expected_v = np.zeros_like(u), np.zeros_like(v)
    for row in x:
        h = np.tanh(row @ u)
        p = softmax(h @ v)
        for c in range(3):
            at_logits = np.eye(3)[c] - p
            at_hidden = (v @ at_logits) * (1 - h**2)
            expected_v += p[c] * np.outer(h, at_logits) ** 2 / len(x)
            expected_u += p[c] * np.outer(row, at_hidden) ** 2 / len(x)
    variables = {"u": np.float32(u), "v": np.float32(v)}
    fisher = fisher_information(lambda w, x: jnp.tanh(x @ w["u"]) @ w["v"], variables, X)
    np.testing.assert_allclose(fisher["u"], expected_u, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(fisher["v"], expected_v, rtol=1e-3, atol=1e-6)


def test_the_average_is_the_formula():
    parents = [{"w": RNG.normal(size=(3, 2)).astype(np.float32)} for _ in range(3)]
    fishers = [{"w": RNG.uniform(size=(3, 2)).astype(np.float32)} for _ in range(3)]
    merged = fisher_average(parents, fishers)["w"]
    thetas, fs = (
        np.stack([np.float64(tree["w"]) for tree in trees]) for trees in (parents, fishers)
    )
    expected = (fs * thetas).sum(axis=0) / fs.sum(axis=0)
    np.testing.assert_allclose(merged, expected, rtol=1e-5)


def test_the_average_where_there_is_little_or_no_information():
    parents = [{"step": np.int32(k), "w": np.float32([k, k, k, k])} for k in (1, 5)]
    tiny = np.finfo(np.float32).tiny
    fishers = [
        {"step": np.float32(0), "w": np.float32([0, 1, 0, 3 * tiny])},
        {"step": np.float32(0), "w": np.float32([0, 0, 1e-30, tiny])},
    ]
    merged = fisher_average(parents, fishers)
    np.testing.assert_allclose(merged["w"], [3, 1, 5, 2], rtol=1e-6)  # none, first, second, 3 : 1
    assert merged["step"] == 1


def test_two_posteriors_of_a_mean_give_that_of_all_the_data():
    # Softmax regression on one constant input: each parent is the optimum on its own counts, and
    # near it the product of the Gaussians has its mode at the optimum on all counts.
    counts = np.array([[520.0, 480.0], [5100.0, 4900.0]])
    parents = [
        {"w": np.float32([[np.log(n[0] / n[1]) / 2, -np.log(n[0] / n[1]) / 2]])} for n in counts
    ]
    ones = np.ones((1, 1), np.float32)
    fishers = [fisher_information(lambda w, x: x @ w["w"], parent, ones) for parent in parents]
    precisions = [
        jax.tree.map(lambda f, n=n: n * f, fisher)  # so much is the information of all examples
        for n, fisher in zip(counts.sum(axis=1), fishers, strict=True)
    ]
    merged = fisher_average(parents, precisions)["w"]
    total = counts.sum(axis=0)
    np.testing.assert_allclose(merged[0, 0], np.log(total[0] / total[1]) / 2, rtol=1e-3)


def test_under_64_bits():
    with jax.enable_x64(True):
        found = fisher_information(linear, LINEAR, np.float64(X))
    assert found["w"].dtype == np.float32
    expected = fisher_information(linear, LINEAR, X)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-4)


def test_what_cannot_be_is_one_line():
    with pytest.raises(DataError, match="the inputs of the Fisher information are 0: at least 1"):
        fisher_information(linear, LINEAR, X[:0])
    bad = np.where(np.arange(11)[:, None] == 2, np.nan, X)
    with pytest.raises(DataError, match="Fisher information: 4 of 44 values are not finite"):
        fisher_information(linear, LINEAR, bad)
    with pytest.raises(ParentsError, match="1 Fishers are given for 2 parents"):
        fisher_average([LINEAR, LINEAR], [LINEAR])
