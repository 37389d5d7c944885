"""RegMean, RegMean++ and PLeaS against least squares in NumPy float64, in programs of all kinds."""

import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.baselines import (
    BaselinesConfig,
    pleas,
    regmean,
    regmean_plus,
    run_baselines,
    uniform_average,
)
from megajax.baselines.layerwise import find_kernels
from megajax.errors import ConfigError, DataError, ParentsError
from megajax.formats.adapters import from_linen
from megajax.trees import leaf_paths
from megajax.zoo import networks as models

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def least_squares(inputs, layers):
    """The layer nearest to all, by `lstsq` on everything that enters them; `[n, d], [d, o]`."""
    inputs = [np.float64(x) for x in inputs]
    targets = [x @ np.float64(w) for x, w in zip(inputs, layers, strict=True)]
    return np.linalg.lstsq(np.concatenate(inputs), np.concatenate(targets), rcond=None)[0]


def mlp(w, x):
    return jnp.tanh(x @ w["u"] + w["b"]) @ w["v"]


MLPS = [{"b": normal(6), "u": normal(4, 6), "v": normal(6, 3)} for _ in range(3)]
OWN = [normal(70, 4), normal(50, 4), normal(61, 4)]


def test_exact_solution_is_least_squares_layer_by_layer():
    merged = regmean(mlp, MLPS, OWN, alpha=1.0, batch_size=32)
    expected = least_squares(OWN, [w["u"] for w in MLPS])
    np.testing.assert_allclose(merged["u"], expected, rtol=1e-3, atol=1e-4)
    hidden = [np.tanh(np.float64(x) @ w["u"] + w["b"]) for x, w in zip(OWN, MLPS, strict=True)]
    expected = least_squares(hidden, [w["v"] for w in MLPS])
    np.testing.assert_allclose(merged["v"], expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(merged["b"], np.mean([w["b"] for w in MLPS], axis=0), rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.9])
def test_scaled_solution_is_the_papers_formula(alpha):
    merged = regmean(mlp, MLPS, OWN, alpha=alpha)
    left, right = np.zeros((4, 4)), np.zeros((4, 6))
    for x, w in zip(OWN, MLPS, strict=True):
        gram = np.float64(x).T @ np.float64(x)
        scaled = alpha * gram + (1 - alpha) * np.diag(np.diag(gram))
        left += scaled
        right += scaled @ w["u"]
    np.testing.assert_allclose(merged["u"], np.linalg.inv(left) @ right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_plus_takes_what_the_merged_layers_give(alpha):
    merged = regmean_plus(mlp, MLPS, OWN, alpha=alpha, batch_size=32)
    np.testing.assert_allclose(merged["u"], regmean(mlp, MLPS, OWN, alpha=alpha)["u"], rtol=1e-5)
    bias = np.mean([w["b"] for w in MLPS], axis=0)
    left, right = np.zeros((6, 6)), np.zeros((6, 3))
    for x, w in zip(OWN, MLPS, strict=True):
        hidden = np.tanh(np.float64(x) @ np.float64(merged["u"]) + bias)
        gram = hidden.T @ hidden
        scaled = alpha * gram + (1 - alpha) * np.diag(np.diag(gram))
        left += scaled
        right += scaled @ w["v"]
    np.testing.assert_allclose(merged["v"], np.linalg.solve(left, right), rtol=1e-3, atol=1e-3)


def test_plus_on_the_same_inputs_for_all_is_the_mean():
    merged, mean = regmean_plus(mlp, MLPS, OWN[0]), uniform_average(MLPS)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), merged, mean)


def test_pleas_takes_mean_inputs_to_mean_outputs_biases_and_all():
    def apply_fn(w, x):
        return mlp(w, x) + w["c"]

    parents = [{**w, "c": normal(3)} for w in MLPS]
    merged = pleas(apply_fn, parents, OWN, batch_size=32)
    x = np.concatenate(OWN).astype(np.float64)  # every parent sees all
    mean = uniform_average(parents)
    for name in ("u", "b"):  # what enters the first layer is the same for all
        np.testing.assert_allclose(merged[name], mean[name], rtol=1e-4, atol=1e-5)
    hidden = [np.tanh(x @ w["u"] + w["b"]) for w in parents]
    outputs = np.mean([h @ w["v"] + w["c"] for h, w in zip(hidden, parents, strict=True)], axis=0)
    rows = np.concatenate([np.mean(hidden, axis=0), np.ones((len(x), 1))], axis=1)
    expected = np.linalg.lstsq(rows, outputs, rcond=None)[0]
    np.testing.assert_allclose(merged["v"], expected[:-1], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(merged["c"], expected[-1], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("method", [regmean, regmean_plus, pleas])
def test_copies_of_a_network_with_convolutions_and_norms_are_merged_to_it(method):
    model = models.build("resnet", 5, {"depth": 8, "width": 2})
    x = normal(40, 8, 8, 3)
    network = jax.jit(model.init)(jax.random.key(0), x)
    apply_fn = from_linen(model, {}, train=False).apply_fn
    merged = method(apply_fn, [network, network], x, batch_size=32)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), merged, network)


def test_inputs_that_nobody_sees_get_the_mean():
    blind = [np.float32(x * [1, 1, 0, 0]) for x in OWN[:2]]  # as the border of an image
    merged = regmean(mlp, MLPS[:2], blind, alpha=1.0)
    mean = uniform_average(MLPS[:2])
    np.testing.assert_allclose(merged["u"][2:], mean["u"][2:], rtol=1e-4, atol=1e-5)
    assert not np.allclose(merged["u"][:2], mean["u"][:2], atol=0.05)
    nothing = regmean(mlp, MLPS[:2], np.zeros((5, 4), np.float32))
    np.testing.assert_allclose(nothing["u"], mean["u"], rtol=1e-5)


def test_equal_parents_are_the_result_and_low_precision_is_kept():
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), MLPS[0])
    merged = regmean(mlp, [half, half], jnp.asarray(OWN[0], jnp.bfloat16))
    for name in half:
        assert merged[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(merged[name], half[name])


def windows(x, kernel, strides, padding, dilation):
    """What enters a convolution, `[n * out..., C * window]`, in plain loops; x `[n, H, W, C]`."""
    x = np.pad(np.float64(x), ((0, 0), *padding, (0, 0)))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    out = [(n - r) // s + 1 for n, r, s in zip(x.shape[1:3], reach, strides, strict=True)]
    rows = []
    for image, i, j in itertools.product(range(len(x)), range(out[0]), range(out[1])):
        top, left = i * strides[0], j * strides[1]
        patch = x[
            image,
            top : top + reach[0] : dilation[0],
            left : left + reach[1] : dilation[1],
        ]
        rows.append(patch.transpose(2, 0, 1).ravel())
    return np.array(rows)


@pytest.mark.parametrize(
    ("kernel", "strides", "padding", "dilation", "groups"),
    [
        ((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1),
        ((3, 2), (2, 1), ((0, 1), (1, 0)), (1, 1), 1),
        ((2, 2), (1, 1), ((0, 0), (0, 0)), (2, 1), 2),
        ((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 4),  # depthwise
        ((1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
    ],
)
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_convolutions_are_least_squares_on_their_windows(
    kernel, strides, padding, dilation, groups, layout
):
    channels, outputs = 4, 8
    layers = [normal(*kernel, channels // groups, outputs) for _ in range(2)]
    images = [normal(6, 5, 6, channels), normal(5, 5, 6, channels)]
    first = layout == "NCHW"

    def apply_fn(w, x):
        numbers = ("NCHW", "OIHW", "NCHW") if first else ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, strides, padding, None, dilation, numbers, feature_group_count=groups
        ).mean((2, 3) if first else (1, 2))

    def layer(w):  # to the layout of the kernel
        return w.transpose(3, 2, 0, 1) if first else w

    merged = regmean(
        apply_fn,
        [layer(w) for w in layers],
        [np.moveaxis(x, -1, 1) if first else x for x in images],
        alpha=1.0,
        batch_size=4,
    )
    merged = merged.transpose(2, 3, 1, 0) if first else merged
    of_group = channels // groups
    for g in range(groups):
        rows = [
            windows(x[..., g * of_group : (g + 1) * of_group], kernel, strides, padding, dilation)
            for x in images
        ]
        part = slice(g * outputs // groups, (g + 1) * outputs // groups)
        flat = [w[..., part].transpose(2, 0, 1, 3).reshape(rows[0].shape[1], -1) for w in layers]
        expected = least_squares(rows, flat)
        found = merged[..., part].transpose(2, 0, 1, 3).reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def heads(w, x):  # two contracted, one free axis, and the kernel first
    hidden = jnp.einsum("dhk,bd->bhk", w["q"], x)
    return jnp.einsum("bhk,hko->bo", jnp.tanh(hidden), w["o"]) @ w["t"].T


def test_contractions_of_several_axes_and_any_orientation():
    parents = [{"o": normal(2, 3, 5), "q": normal(4, 2, 3), "t": normal(6, 5)} for _ in range(2)]
    own = OWN[:2]
    kernels = find_kernels(heads, parents[0], own[0])
    assert {k.leaf: k.inputs for k in kernels} == {0: 6, 1: 4, 2: 5}
    merged = regmean(heads, parents, own, alpha=1.0)
    expected = least_squares(own, [w["q"].reshape(4, 6) for w in parents])
    np.testing.assert_allclose(merged["q"].reshape(4, 6), expected, rtol=2e-3, atol=1e-3)
    pairs = list(zip(own, parents, strict=True))
    hidden = [np.tanh(np.float64(x) @ w["q"].reshape(4, 6)) for x, w in pairs]
    expected = least_squares(hidden, [w["o"].reshape(6, 5) for w in parents])
    np.testing.assert_allclose(merged["o"].reshape(6, 5), expected, rtol=2e-3, atol=2e-3)
    last = [h @ w["o"].reshape(6, 5) for h, w in zip(hidden, parents, strict=True)]
    expected = least_squares(last, [w["t"].T for w in parents])
    np.testing.assert_allclose(merged["t"].T, expected, rtol=2e-3, atol=2e-3)


def test_a_shared_layer_is_solved_for_all_its_uses():
    def twice(w, x):
        return jnp.tanh(x @ w) @ w

    layers = [normal(4, 4) for _ in range(2)]
    merged = regmean(twice, layers, OWN[:2], alpha=1.0)
    pairs = list(zip(OWN, layers, strict=False))
    inputs = [np.concatenate([x, np.tanh(np.float64(x) @ w)]) for x, w in pairs]
    np.testing.assert_allclose(merged, least_squares(inputs, layers), rtol=2e-3, atol=1e-3)


def test_leaves_that_are_no_plain_kernel_are_averaged():
    def apply_fn(w, x):
        x = x @ w["added"] + w["added"][0]  # used in another way, too
        x = x @ w["tied"] @ w["tied"].T  # in two orientations
        x = x @ (2 * w["scaled"])  # changed before its use
        x = x @ w["whole"].astype(jnp.float32)  # no floating leaf
        x, _ = jax.lax.scan(lambda x, _: (x @ w["looped"], None), x, None, 2)
        return x @ w["kernel"]

    names = ("added", "kernel", "looped", "scaled", "tied")
    parents = [
        {name: normal(4, 4) for name in names} | {"whole": np.eye(4, dtype=np.int32)}
        for _ in range(2)
    ]
    (kernel,) = find_kernels(apply_fn, parents[0], OWN[0])
    assert leaf_paths(parents[0])[kernel.leaf] == "kernel"
    merged, mean = regmean(apply_fn, parents, OWN[0]), uniform_average(parents)
    for name in names:
        assert np.array_equal(merged[name], mean[name]) == (name != "kernel")
    np.testing.assert_array_equal(merged["whole"], np.eye(4))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {"hidden": (8, 8)}),
        ("cnn", {"width": 4}),
        ("resnet", {"depth": 8}),
        ("densenet", {"blocks": (2, 2), "growth": 4}),
        ("vgg", {"depth": 16}),
        ("xception", {}),
    ],
)
def test_every_kernel_of_the_zoo_is_found(name, options):
    model = models.build(name, 5, options)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    apply_fn = from_linen(model, {}, train=False).apply_fn
    paths = leaf_paths(variables)
    found = {paths[kernel.leaf] for kernel in find_kernels(apply_fn, variables, x)}
    assert found == {path for path in paths if path.endswith("kernel")}


def test_layers_inside_a_real_network_are_least_squares_on_what_enters_them():
    model = models.build("cnn", 3, {"width": 2, "norm": "none"})
    x = normal(9, 8, 8, 1)
    parents = [jax.jit(model.init)(jax.random.key(seed), x) for seed in range(2)]
    apply_fn = from_linen(model, {}, train=False).apply_fn
    capture = partial(model.apply, capture_intermediates=True, mutable=["intermediates"])

    def entering(variables):
        _, state = jax.jit(capture)(variables, x)
        (conv1,) = state["intermediates"]["conv1"]["__call__"]
        return windows(nn.relu(conv1), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1))

    def flat(variables):
        kernel = np.asarray(variables["params"]["conv2"]["kernel"])
        return kernel.transpose(2, 0, 1, 3).reshape(18, -1)

    merged = regmean(apply_fn, parents, x, alpha=1.0, batch_size=4)
    expected = least_squares(list(map(entering, parents)), list(map(flat, parents)))
    np.testing.assert_allclose(flat(merged), expected, rtol=2e-3, atol=1e-3)


def test_what_cannot_be_is_one_line():
    with pytest.raises(ConfigError, match=r"alpha is 1\.5"):
        regmean(mlp, MLPS, OWN, alpha=1.5)
    with pytest.raises(ConfigError, match="contracts no leaf"):
        regmean(lambda w, x: x * w, [normal(4)] * 2, OWN[0])
    with pytest.raises(ParentsError, match="2 lists of inputs are given for 3 parents"):
        regmean(mlp, MLPS, OWN[:2])
    with pytest.raises(DataError, match="calibration inputs are 0"):
        regmean(mlp, MLPS, OWN[0][:0])
    with pytest.raises(DataError, match="calibration inputs: 4 of 280 values are not finite"):
        regmean(mlp, MLPS, np.where(np.arange(70)[:, None] == 3, np.nan, OWN[0]))
    with pytest.raises(ParentsError, match="leaf u"):
        regmean(mlp, [MLPS[0], {**MLPS[0], "u": normal(4, 7)}], OWN[0])


def test_the_merged_layers_are_nearer_to_the_parents_outputs_than_the_mean():
    def distance(network):
        hidden = [jnp.tanh(x @ w["u"] + w["b"]) for x, w in zip(OWN, MLPS, strict=True)]
        return sum(
            float(jnp.sum((x @ network["u"] - x @ w["u"]) ** 2))
            + float(jnp.sum((h @ network["v"] - h @ w["v"]) ** 2))
            for x, h, w in zip(OWN, hidden, MLPS, strict=True)
        )

    solve = partial(regmean, mlp, MLPS, OWN)
    assert distance(solve(alpha=1.0)) < distance(solve(alpha=0.5)) < distance(uniform_average(MLPS))


@pytest.mark.parametrize("method", [regmean, regmean_plus, pleas])
def test_inputs_of_any_form_among_the_baselines(method):
    name = method.__name__

    def apply_fn(w, x):
        return mlp(w, x["a"] + x["b"])

    own = [{"a": 0.5 * x, "b": 0.5 * x} for x in OWN]
    validation = {part: leaf[:20] for part, leaf in own[0].items()}
    run = partial(
        run_baselines,
        jax.random.key(0),
        apply_fn,
        MLPS,
        (validation, np.arange(20) % 3),
        config=BaselinesConfig(names=name, examples=40),
    )
    for options, inputs in (
        ({"calibration": own[0]}, OWN[0][:40]),
        ({"parent_inputs": own}, [x[:40] for x in OWN]),
    ):
        found = run(**options)[name].variables
        expected = method(mlp, MLPS, inputs)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_inputs_and_outputs_of_any_form():
    def apply_fn(w, x):
        return {"y": mlp(w, x["a"] + x["b"])}

    own = [{"a": 0.5 * x, "b": 0.5 * x} for x in OWN]
    merged = regmean(apply_fn, MLPS, own, batch_size=32)
    expected = regmean(mlp, MLPS, OWN, batch_size=32)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), merged, expected)
