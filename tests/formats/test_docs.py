"""The examples of docs/parents.md run as they stand."""

import pathlib
import re

import flax.linen as nn
import jax
import numpy as np

import megajax as mj

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "parents.md").read_text()


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(4, name="body")(x)))


def test_the_pages_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 5)).astype(np.float32)
    for name, classes in (("a", 3), ("b", 3), ("c", 7)):
        sizes = {"lin.weight": (4, 5), "lin.bias": (4,), "fc.weight": (classes, 4)}
        sizes["fc.bias"] = (classes,)
        state = {tensor: rng.normal(size=size).astype(np.float32) for tensor, size in sizes.items()}
        mj.save_network(f"{name}.safetensors", state)
    state = mj.load_network("a.safetensors")
    hidden = np.maximum(x @ state["lin.weight"].T + state["lin.bias"], 0)
    names = {
        "model": Model(),
        "x": x,
        "logits": hidden @ state["fc.weight"].T + state["fc.bias"],
        "key": jax.random.key(0),
        "apply_fn": Model().apply,
        "validation": (x, np.arange(12) % 3),
    }
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        code = code.replace("validation, keep", "validation, evolution=small, keep")
        exec(code, names | {"small": mj.EvolutionConfig(population_size=4, generations=0)}, names)
    assert "fc.weight" in capsys.readouterr().out
    back = mj.load_network("out/model.safetensors")
    assert {tensor: array.shape for tensor, array in back.items()} == {
        tensor: array.shape for tensor, array in state.items()
    }
    np.testing.assert_array_equal(
        names["result"].variables["params"]["head"]["kernel"],
        state["fc.weight"].T[:, :],
    )
