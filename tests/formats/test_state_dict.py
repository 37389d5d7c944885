"""PyTorch's state dicts, matched by structure, give PyTorch's logits; what is unclear is said.

The oracle is PyTorch itself where it is installed, and the logits it stored elsewhere.
"""

import functools
import importlib.util
import itertools
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import megajax as mj
from megajax.formats.arrays import Spec, Stored, specs_of
from megajax.formats.naming import find_mapping
from megajax.formats.uses import find_modules
from megajax.trees import leaf_paths
from megajax.zoo.networks import build

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
PAIR = pathlib.Path(__file__).parents[2] / ".." / "shared" / "data" / "parents"
TORCH = importlib.util.find_spec("torch") is not None


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(8, (3, 3), padding=1)(x)
        x = nn.relu(nn.GroupNorm(2, epsilon=1e-5)(x))
        x = nn.Conv(8, (3, 3), strides=2, padding=1, feature_group_count=8)(x)
        x = nn.Conv(6, (1, 1), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.relu(nn.LayerNorm(epsilon=1e-5)(nn.Dense(16)(x)))
        return nn.Dense(10)(x)


class Tokens(nn.Module):
    """Heads have an axis of their own; none of the names is PyTorch's."""

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(20, 8)(x)
        x = x + self.param("place", nn.initializers.ones, (1, 6, 8))
        y = nn.LayerNorm(epsilon=1e-5)(x)
        q, k, v = (nn.DenseGeneral((2, 4), name=f"in_{n}")(y) for n in "qkv")
        y = nn.dot_product_attention(q, k, v)
        y = nn.DenseGeneral(8, axis=(-2, -1), name="back")(y)
        x = x + self.param("gain", nn.initializers.ones, (8,)) * y
        return nn.Dense(10)(nn.LayerNorm(epsilon=1e-5)(x).mean(1))


MODELS = {
    "resnet8": build("resnet", 10, {"depth": 8, "width": 4}),
    "layers": Layers(),
    "tokens": Tokens(),
}
HEADS = {
    f"{name}.weight": f"params/in_{name[0]}/kernel" for name in ("query", "key", "value")
}  # of one shape and without numbers: nothing else could tell


def stored(name):
    with np.load(FIXTURES / "torch_logits.npz") as reference:
        return (
            FIXTURES / f"torch_{name}.safetensors",
            reference[f"{name}_inputs"],
            reference[f"{name}_logits"],
        )


def fixture():
    """The script that makes the networks in PyTorch."""
    path = FIXTURES / "make_torch_fixture.py"
    spec = importlib.util.spec_from_file_location("make_torch_fixture", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(name, folder):
    """Made anew by PyTorch, from another seed."""
    from safetensors.torch import save_file

    state, inputs, logits = fixture().make(name, seed=1)
    save_file(state, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors", inputs, logits


@pytest.mark.parametrize("name", MODELS)
def test_pytorchs_logits_are_reproduced_and_its_file_given_back_bit_for_bit(name, tmp_path):
    model, rename = MODELS[name], HEADS if name == "tokens" else None
    path, inputs, logits = made(name, tmp_path) if TORCH else stored(name)
    names = []
    (variables,) = mj.load_parents(
        [path], model, inputs=inputs, rename=rename, callback=names.append
    )
    inference = {} if name == "tokens" else {"train": False}
    found = jax.jit(lambda w, x: model.apply(w, x, **inference))(variables, inputs)
    np.testing.assert_allclose(found, logits, atol=1e-4)
    assert np.ptp(logits) > 0.5
    back = mj.save_network(tmp_path / "back.safetensors", variables, names=names[0])
    before, after = mj.load_network(path), mj.load_network(back)
    assert list(before) == list(after)
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype
        np.testing.assert_array_equal(before[tensor], after[tensor], strict=True)


@pytest.mark.skipif(not PAIR.exists(), reason="the trained pair is not here")
def test_the_trained_pair_needs_no_mapping_of_its_own():
    with np.load(PAIR / "resnet8_cifar10_reference.npz") as archive:
        reference = dict(archive)
    images = (reference["images"] - reference["mean"]) / reference["std"]
    model = build("resnet", 10, {"depth": 8})
    apply = jax.jit(model.apply)
    paths = [PAIR / f"resnet8_cifar10_{parent}.safetensors" for parent in "ab"]
    for parent, variables in zip("ab", mj.load_parents(paths, model, inputs=images), strict=True):
        found = apply(variables, images)
        np.testing.assert_allclose(found, reference[f"logits_{parent}"], atol=1e-4)
        assert (found.argmax(-1) == reference["labels"]).mean() > 0.6


def test_a_program_that_is_plain_jax_or_nnx_is_matched_as_well():
    def apply_fn(w, x):  # a list of leaves, in an order that says nothing
        v, b, u, scale, variance, mean, shift = w
        x = (x @ u - mean) * (scale * jax.lax.rsqrt(variance + 1e-5)) + shift
        return jax.nn.relu(x) @ v.T + b

    sizes = [(3, 8), (3,), (4, 8), (8,), (8,), (8,), (8,)]
    network = mj.Network(apply_fn, [jax.ShapeDtypeStruct(size, "float32") for size in sizes])
    tensors = ("weight", "bias", "running_mean", "running_var")
    shapes = {f"bn.{tensor}": (8,) for tensor in tensors}
    shapes |= {"lin.weight": (8, 4), "out.weight": (3, 8), "out.bias": (3,)}
    mapping = find(shapes, network, np.ones((1, 4), np.float32))
    assert mapping == {
        "lin.weight": "2",
        "bn.weight": "3",
        "bn.bias": "6",
        "bn.running_mean": "5",
        "bn.running_var": "4",
        "out.weight": "0",
        "out.bias": "1",
    }

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.two = nnx.Linear(16, 10, rngs=rngs)
            self.one = nnx.Linear(4, 16, rngs=rngs)

        def __call__(self, x):
            return self.two(nnx.relu(self.one(x)))

    model = Net(nnx.Rngs(0))
    shapes = {"0.weight": (16, 4), "0.bias": (16,), "2.weight": (10, 16), "2.bias": (10,)}
    mapping = find(shapes, mj.from_nnx(model), np.ones((1, 4), np.float32))
    assert mapping["0.weight"] == "one/kernel"
    assert mapping["2.bias"] == "two/bias"


def find(shapes, network, inputs, **options):
    """The mapping for a file of such tensors: name -> path."""
    specs = {name: Spec(shape, np.dtype("float32")) for name, shape in shapes.items()}
    stored = Stored(pathlib.Path("net"), specs, dict)
    layers = functools.partial(find_modules, *network, inputs)
    mapping = find_mapping(stored, specs_of(network.variables), layers, **options)
    return {entry.name: entry.path for entry in mapping.entries}


def dense_stack(*sizes):
    """A plain MLP without biases, its leaves called 0, 1, ..."""
    shapes = list(itertools.pairwise(sizes))

    def apply_fn(w, x):
        for kernel in w:
            x = jnp.tanh(x @ kernel)
        return x

    variables = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    return mj.Network(apply_fn, variables), jax.ShapeDtypeStruct((1, sizes[0]), "float32")


def test_the_transposed_linear_and_the_flattened_image_are_those_of_numpy():
    path, inputs, _ = stored("layers")
    torch = mj.load_network(path)
    ours = mj.load_network(path, Layers(), inputs=inputs)
    weight = torch["classifier.0.weight"]  # [16, 6 * 4 * 4], channels first
    expected = weight.reshape(16, 6, 4, 4).transpose(2, 3, 1, 0).reshape(96, 16)
    np.testing.assert_array_equal(ours["params"]["Dense_0"]["kernel"], expected)
    mean = torch["flat.running_mean"].reshape(6, 4, 4).transpose(1, 2, 0).ravel()
    np.testing.assert_array_equal(ours["batch_stats"]["BatchNorm_1"]["mean"], mean)
    depthwise = torch["features.3.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(ours["params"]["Conv_1"]["kernel"], depthwise)


def test_numbers_in_names_give_the_order_not_the_alphabet():
    network, inputs = dense_stack(*[8] * 13)
    mapping = find({f"body.{i}.weight": (8, 8) for i in range(12)}, network, inputs)
    assert mapping == {f"body.{i}.weight": str(i) for i in range(12)}


def test_what_could_be_two_things_is_an_error_that_lists_them_until_one_is_named():
    network, inputs = dense_stack(8, 8, 8, 4)
    shapes = {"encode.weight": (8, 8), "decode.weight": (8, 8), "head.weight": (4, 8)}
    with pytest.raises(mj.InterchangeError, match="leaf 0 could be decode or encode; say which"):
        find(shapes, network, inputs)
    mapping = find(shapes, network, inputs, rename={"encode.weight": "0"})
    assert mapping == {"encode.weight": "0", "decode.weight": "1", "head.weight": "2"}
    mapping = find(shapes, network, inputs, rename={r"(de)code\.weight": "0"})
    assert mapping["encode.weight"] == "1"


def test_a_name_given_in_one_block_settles_the_blocks_like_it():
    network, inputs = dense_stack(*[8] * 9)
    shapes = {f"h.{i}.{name}.weight": (8, 8) for i in range(4) for name in ("out", "in")}
    with pytest.raises(mj.InterchangeError, match=r"could be h\.0\.in or h\.0\.out"):
        find(shapes, network, inputs)
    mapping = find(shapes, network, inputs, rename={"h.2.in.weight": "4"})
    assert [mapping[f"h.{i}.in.weight"] for i in range(4)] == ["0", "2", "4", "6"]


def test_a_user_may_contradict_the_numbers():
    network, inputs = dense_stack(8, 8, 8, 8)
    shapes = {f"fc{i}.weight": (8, 8) for i in (1, 2, 3)}
    mapping = find(shapes, network, inputs, rename={"fc3.weight": "0"})
    assert mapping == {"fc3.weight": "0", "fc1.weight": "1", "fc2.weight": "2"}


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"fc9.weight": "0"}, "matches nothing in net; did you mean fc"),
        ({"fc1.weight": "5"}, "there is no such leaf"),
        ({"fc1.weight": "0", "fc2.weight": "0"}, "gives leaf 0 to both fc1.weight and fc2.weight"),
        ({"fc(": "0"}, "is not a regular expression"),
        ({"fc1.weight": "2"}, "leaf 2 is float32.8,4. ..4,8. in PyTorch. but fc1.weight is .8,8."),
    ],
)
def test_a_rename_that_cannot_be_meant_is_refused(rename, message):
    network, inputs = dense_stack(8, 8, 8, 4)
    shapes = {"fc1.weight": (8, 8), "fc2.weight": (8, 8), "fc3.weight": (4, 8)}
    with pytest.raises(mj.InterchangeError, match=message):
        find(shapes, network, inputs, rename=rename)


def test_another_size_or_number_of_layers_is_named_with_both_shapes():
    path, inputs, _ = stored("resnet8")

    def error(**options):
        model = build("resnet", options.pop("classes", 10), {"depth": 8, "width": 4} | options)
        with pytest.raises(mj.InterchangeError) as caught:
            mj.load_network(path, model, inputs=inputs)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert (
        "leaf params/head/kernel is float32[16,7] ([7,16] in PyTorch) but fc.weight is [10,16]"
        in (error(classes=7))
    )
    assert "nothing there becomes leaf params/stage1_block2_conv1/kernel" in error(depth=14)
    assert "no leaf for layer2.0.downsample.0.weight [8,4,1,1]" in error(projection=False)
    assert error(width=8).startswith(str(path))


def test_ignored_tensors_and_other_precisions():
    network, inputs = dense_stack(8, 8)
    shapes = {"fc.weight": (8, 8), "auxiliary.weight": (3, 8)}
    with pytest.raises(
        mj.InterchangeError, match=r"no leaf for auxiliary.weight \[3,8\] \(ignore="
    ):
        find(shapes, network, inputs)
    assert find(shapes, network, inputs, ignore="^aux") == {"fc.weight": "0"}
    with pytest.raises(mj.InterchangeError, match="is a PyTorch state dict: to match it"):
        find_mapping(
            Stored(pathlib.Path("net"), {"fc.weight": Spec((8, 8), np.dtype("f4"))}, dict),
            specs_of(network.variables),
        )


def test_half_precision_is_converted_only_when_asked(tmp_path):
    network, _ = dense_stack(8, 8)
    half = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float16)
    path = mj.save_network(tmp_path / "a.safetensors", {"fc.weight": half})
    inputs = np.ones((1, 8), np.float32)
    with pytest.raises(
        mj.InterchangeError,
        match=r"leaf 0 \(fc.weight\) is float32\[8,8\] but float16\[8,8\] in the file; cast=True",
    ):
        mj.load_network(path, network, inputs=inputs)
    (loaded,) = mj.load_network(path, network, inputs=inputs, cast=True)
    np.testing.assert_array_equal(loaded, half.T.astype(np.float32), strict=True)


def test_wrong_logits_name_the_first_offender(tmp_path):
    network, _ = dense_stack(3, 4)
    weight, inputs = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    path = mj.save_network(tmp_path / "net.safetensors", {"fc.weight": weight})
    logits = np.tanh(inputs @ weight.T)
    mj.load_network(path, network, inputs=inputs, logits=logits)
    logits[2, 3] += 0.5
    with pytest.raises(
        mj.InterchangeError, match=r"net.safetensors: logit \[2, 3\] is .* of 1 diff"
    ):
        mj.load_network(path, network, inputs=inputs, logits=logits)
    logits[2, 3] = np.nan
    with pytest.raises(mj.InterchangeError, match=r"logit \[2, 3\] is .* and nan in the reference"):
        mj.load_network(path, network, inputs=inputs, logits=logits)
    with pytest.raises(mj.InterchangeError, match=r"shape \(4, 4\), those of the reference \(3, 4"):
        mj.load_network(path, network, inputs=inputs, logits=logits[:3])


def test_the_mapping_is_a_table_of_every_tensor():
    path, inputs, _ = stored("resnet8")
    names = mj.map_names(path, MODELS["resnet8"], inputs=inputs)
    table = names.describe()
    rows = [re.split(r"  +", line) for line in table.splitlines()]
    assert [
        "conv1.weight",
        "[4,3,3,3]",
        "params/stem_conv/kernel",
        "[3,3,3,4]",
        "OIHW to HWIO",
    ] in rows
    assert sum(row[-1] == "ignored" for row in rows) == 9  # num_batches_tracked
    assert len(rows) == 1 + len(names.entries) + 9


def test_the_short_summary_counts_the_rules_and_names_the_exceptions():
    path, inputs, _ = stored("layers")
    names = mj.map_names(path, MODELS["layers"], inputs=inputs)
    lines = names.describe(short=True).splitlines()
    rules = {rule: int(n) for n, rule in re.findall(r"(\d+) ([^;()]+)", lines[0])}
    assert f"{path}: 21 arrays become leaves" in lines[0]
    assert rules.pop("arrays become leaves ") == 21
    assert sum(rules.values()) == len(names.entries) == 21
    counted = {
        rule: names.describe().count(f"  {rule}\n") for rule in ("OIHW to HWIO", "CHW to HWC")
    }
    assert {rule: rules[rule] for rule in counted} == counted
    odd = "  classifier.0.weight becomes params/Dense_0/kernel, transposed, inputs CHW to HWC"
    assert lines[1] == odd
    assert lines[-1] == "  ignored: 2 num_batches_tracked"
    assert len(lines) == 4


def test_own_names_come_before_structure():
    """Modules called as ours are ours, even where the order of the program is another."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8, name="fc2")(x)
            return nn.Dense(8, name="fc1")(x) * self.param("gain", nn.initializers.ones, (8,))

    variables = Net().init(jax.random.key(0), jnp.ones((1, 8)))
    shapes = {"fc1.weight": (8, 8), "fc1.bias": (8,), "fc2.weight": (8, 8), "fc2.bias": (8,)}
    mapping = find(
        shapes | {"gain": (8,)}, mj.from_linen(Net(), variables), np.ones((1, 8), np.float32)
    )
    assert mapping["fc1.weight"] == "params/fc1/kernel"
    assert set(mapping.values()) == set(leaf_paths(variables))


def test_every_network_of_the_zoo_is_found_whole_in_pytorchs_layout():
    """Sent to PyTorch's layout by the rules and matched back by structure alone."""
    options = {
        "cnn": {"width": 4, "norm": "group"},
        "densenet": {"blocks": (2, 2), "growth": 4},
        "mlp": {"hidden": (8, 8)},
        "vgg": {"depth": 11, "width": 2},
        "xception": {"width": 1, "middle": 1},
    }
    for name, chosen in options.items():
        model = build(name, 10, chosen)
        inputs = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
        variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
        network = mj.from_linen(model, variables, train=False)
        layers = find_modules(*network, inputs)
        shapes, expected, paths = {}, {}, leaf_paths(variables)
        for number, layer in enumerate(layers):
            for slot in layer:
                tensor = f"net.{number}.{slot.tensor}"
                shapes[tensor] = slot.layout.source
                expected[tensor] = paths[slot.leaf]
        assert set(expected.values()) == set(paths)
        assert find(dict(sorted(shapes.items())), network, inputs) == expected


def test_pytorch_takes_the_export_and_gives_our_logits(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    path, inputs, _ = made("resnet8", tmp_path)
    model = MODELS["resnet8"]
    names = mj.map_names(path, model, inputs=inputs)
    variables = mj.load_network(path, model, inputs=inputs)
    halved = jax.tree.map(lambda leaf: leaf * np.float32(0.5), variables)
    back = mj.save_network(tmp_path / "back.safetensors", halved, names=names)
    theirs = fixture().ResNet8().eval()
    theirs.load_state_dict(load_file(back))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(inputs.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(jax.jit(model.apply)(halved, inputs), expected, atol=1e-4)
