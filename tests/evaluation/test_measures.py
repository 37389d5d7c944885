"""The straight line between two networks, against networks mixed by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from megajax.evaluation.measures import measure, predict, straight_path

X = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
LABELS = np.arange(50) % 3
ENDS = [nn.Dense(3).init(jax.random.key(k), X) for k in range(2)]


def test_points_are_the_mixed_networks_and_only_they_are_prepared():
    shares = (0.0, 0.25, 1.0)
    plain = straight_path(nn.Dense(3).apply, *ENDS, X, LABELS, shares=shares)
    mixed = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, *ENDS)
    for point, network in zip(plain, [ENDS[0], mixed, ENDS[1]], strict=True):
        expected = measure(predict(nn.Dense(3).apply, network, X), LABELS)
        np.testing.assert_allclose(point, expected, rtol=1e-5)

    def zeros(variables):
        return jax.tree.map(jnp.zeros_like, variables)

    prepared = straight_path(nn.Dense(3).apply, *ENDS, X, LABELS, shares=shares, prepare=zeros)
    assert prepared[0] == plain[0]
    assert prepared[2] == plain[2]
    np.testing.assert_allclose(prepared[1].nll, np.log(3), rtol=1e-6)
