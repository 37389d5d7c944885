"""The trained ResNet-8 pair, in PyTorch's names and layouts, gives its stored logits here too."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.models import build

FOLDER = pathlib.Path(__file__).parents[2] / ".." / "shared" / "data" / "parents"

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the trained pair is not here")


def from_torch(state):
    """Maps names `c b L.<stage>.c1 b1 c2 b2 sc.0 sc.1 fc` to the variables of a ResNet-8."""
    params, statistics = {}, {}

    def conv(ours, theirs):
        params[ours] = {"kernel": np.transpose(state[f"{theirs}.weight"], (2, 3, 1, 0))}

    def norm(ours, theirs):
        params[ours] = {"scale": state[f"{theirs}.weight"], "bias": state[f"{theirs}.bias"]}
        mean, variance = state[f"{theirs}.running_mean"], state[f"{theirs}.running_var"]
        statistics[ours] = {"mean": mean, "var": variance}

    conv("stem_conv", "c")
    norm("stem_norm", "b")
    for stage in range(3):
        ours, theirs = f"stage{stage + 1}_block1", f"L.{stage}"
        for i in (1, 2):
            conv(f"{ours}_conv{i}", f"{theirs}.c{i}")
            norm(f"{ours}_norm{i}", f"{theirs}.b{i}")
        if f"{theirs}.sc.0.weight" in state:
            conv(f"{ours}_shortcut", f"{theirs}.sc.0")
            norm(f"{ours}_shortcut_norm", f"{theirs}.sc.1")
    params["head"] = {"kernel": state["fc.weight"].T, "bias": state["fc.bias"]}
    return {"params": params, "batch_stats": statistics}


@pytest.mark.parametrize("parent", ["a", "b"])
def test_stored_logits_are_reproduced(parent):
    safetensors = pytest.importorskip("safetensors.numpy")
    model = build("resnet", 10, {"depth": 8})
    state = safetensors.load_file(FOLDER / f"resnet8_cifar10_{parent}.safetensors")
    variables = from_torch(state)
    with np.load(FOLDER / "resnet8_cifar10_reference.npz") as reference:
        images = (reference["images"] - reference["mean"]) / reference["std"]
        expected = reference[f"logits_{parent}"]

    fresh = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, fresh)
    np.testing.assert_allclose(model.apply(variables, images), expected, atol=1e-4)
