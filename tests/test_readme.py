"""The README's example is run as it stands, with a user's own model."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

README = (Path(__file__).parent.parent / "README.md").read_text()


class MyModel(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(nn.relu(x).mean((1, 2)))


def test_the_ten_line_example_merges_a_users_own_model(capsys):
    code = re.search(r"## Your own model\n\n```python\n(.*?)```", README, re.DOTALL).group(1)
    statements = re.sub(r"\n +", " ", code).strip().splitlines()
    assert len(statements) <= 10
    images = np.random.default_rng(0).normal(size=(30, 6, 6, 1)).astype(np.float32)
    names = {
        "MyModel": MyModel,
        "variables_a": MyModel().init(jax.random.key(0), images),
        "variables_b": MyModel().init(jax.random.key(1), images),
        "x_validation": images,
        "y_validation": np.arange(30) % 3,
        "x_test": images,
    }
    exec(code, names)
    assert names["logits"].shape == (30, 3)
    assert names["result"].fitness >= names["result"].parent_fitness.max()
    assert capsys.readouterr().out.startswith("parents [")


def test_every_file_that_is_named_exists():
    root = Path(__file__).parent.parent
    for name in re.findall(r"(?:experiments|benchmarks|docs)/[\w/]+\.\w+", README):
        assert (root / name).exists(), name
