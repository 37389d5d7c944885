"""A config file for the command line whose network and data are the user's own.

    python -m megajax.run --config experiments/examples/own_model.py

`model.name` is a Flax class (or a function) that takes `num_classes` and its options; `data.name` a
function that returns images and labels. What is not returned is split off from `train`.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import megajax as mj


class TwoScales(nn.Module):
    """Fine and coarse features of an image side by side."""

    num_classes: int
    width: int = 16

    @nn.compact
    def __call__(self, x, train=False):
        fine = nn.relu(nn.Conv(self.width, (3, 3))(x))
        coarse = nn.relu(nn.Conv(self.width, (5, 5), strides=2)(x))
        parts = nn.avg_pool(fine, (4, 4), (4, 4)), nn.avg_pool(coarse, (2, 2), (2, 2))
        flat = [part.reshape(len(x), -1) for part in parts]
        return nn.Dense(self.num_classes)(jnp.concatenate(flat, axis=-1))


def noisy_digits():
    """Training and test images with their labels; a part "validation" would be used as well."""
    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8, 1) / 16 + np.random.default_rng(0).normal(0, 0.2, (len(x), 8, 8, 1))
    x = x.clip(0, 1)
    return {"train": (x[:1300], y[:1300]), "test": (x[1300:], y[1300:])}


def get_config():
    return mj.Config(
        data=mj.DataConfig(name=noisy_digits, validation_fraction=0.3),
        model=mj.ModelConfig(name=TwoScales, options={"width": 8}),
        parents=mj.ParentsConfig(shards="skewed", skew=0.95),
        training=mj.TrainingConfig(epochs=10),
        align=mj.AlignConfig(method="activations"),
        evolution=mj.EvolutionConfig(population_size=16, generations=20),
    )
