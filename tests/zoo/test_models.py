"""The zoo: published sizes, options, one step of training for each network."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megajax.errors import ConfigError
from megajax.zoo.networks import MODELS, ModelConfig, build

TINY = {
    "cnn": {"width": 4},
    "densenet": {"blocks": (1, 1), "growth": 4},
    "mlp": {"hidden": (8,)},
    "resnet": {"depth": 8, "width": 4},
    "vgg": {"depth": 11, "width": 4},
    "xception": {"width": 1, "middle": 1},
}


def variables_of(model, shape=(1, 32, 32, 3)):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def headless_size(variables):
    return size(variables) - size(variables["params"]["head"])


@pytest.mark.parametrize(
    ("name", "options", "published"),
    [
        ("densenet", {"depth": 121}, 7_037_504),
        ("densenet", {"depth": 169}, 12_642_880),
        ("xception", {}, 20_861_480),
        ("vgg", {"depth": 16}, 14_714_688),
        ("vgg", {"depth": 19}, 20_024_384),
    ],
)
def test_size_without_head_is_keras_size(name, options, published):
    """With the statistics of BatchNorm, as Keras counts."""
    assert headless_size(variables_of(build(name, 10, options))) == published


@pytest.mark.parametrize(("name", "layer"), [("densenet", "stem_norm"), ("xception", "stem2_norm")])
def test_cifar_stem_keeps_the_pixels(name, layer):
    def side(stem):
        model = build(name, 10, {**TINY[name], "stem": stem})
        _, state = jax.eval_shape(
            lambda key, x: model.init_with_output(key, x, mutable=True, capture_intermediates=True),
            jax.random.key(0),
            jnp.zeros((1, 32, 32, 3)),
        )
        return state["intermediates"][layer]["__call__"][0].shape[1]

    assert side("cifar") == 32
    assert side("imagenet") < 20


@pytest.mark.parametrize(
    ("depth", "published"),
    [(20, 0.27e6), (32, 0.46e6), (44, 0.66e6), (56, 0.85e6), (110, 1.7e6)],
)
def test_resnet_size_is_that_of_he_et_al(depth, published):
    """Parameter-free shortcuts; kernels, two parameters a channel for each norm, and the head."""
    n, channels = (depth - 2) // 6, (16, 32, 64)
    kernels = 9 * 3 * 16 + sum(9 * c * c * 2 * n for c in channels)
    kernels -= 9 * (32 * 32 - 16 * 32 + 64 * 64 - 32 * 64)  # the first of a stage sees half of it
    norms = 2 * 16 + sum(2 * c * 2 * n for c in channels)
    params = variables_of(build("resnet", 10, {"depth": depth, "projection": False}))["params"]
    assert size(params) == kernels + norms + 64 * 10 + 10
    assert size(params) == pytest.approx(published, rel=0.025)


def test_resnet_152_has_the_blocks_of_the_reference():
    params = variables_of(build("resnet", 10, {"depth": 152}))["params"]
    blocks = [name.split("_")[0] for name in params if name.endswith("_conv1")]
    assert [blocks.count(f"stage{s}") for s in (1, 2, 3)] == [18, 37, 37]


def test_resnet_options_add_the_parameters_they_say():
    plain = variables_of(build("resnet", 10, {"depth": 8, "projection": False}))["params"]
    projected = variables_of(build("resnet", 10, {"depth": 8}))["params"]
    biased = variables_of(build("resnet", 10, {"depth": 8, "conv_bias": True}))["params"]
    assert size(projected) - size(plain) == 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert size(biased) - size(projected) == 16 * 3 + 32 * 3 + 64 * 3


def test_resnet_without_projection_pads_channels_on_both_sides():
    model = build("resnet", 3, {"depth": 8, "width": 4, "projection": False, "norm": "none"})
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 4))
    # With every kernel of the blocks at zero, only the shortcuts are left.
    rng = np.random.default_rng(0)
    params = {
        layer: jax.tree.map(
            lambda leaf: (
                np.zeros(leaf.shape, np.float32)
                if "block" in layer  # noqa: B023
                else rng.normal(size=leaf.shape).astype(np.float32)
            ),
            leaves,
        )
        for layer, leaves in variables_of(model, x.shape)["params"].items()
    }
    stem = jax.nn.relu(
        jax.lax.conv_general_dilated(
            x,
            params["stem_conv"]["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    )
    pooled = jnp.pad(stem[:, ::4, ::4].mean(axis=(1, 2)), ((0, 0), (6, 6)))
    expected = pooled @ params["head"]["kernel"] + params["head"]["bias"]
    logits = jax.jit(model.apply)({"params": params}, x)
    chex.assert_trees_all_close(logits, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_one_training_step_and_an_evaluation(name):
    model = build(name, 3, TINY[name])
    x = jax.random.uniform(jax.random.key(0), (4, 16, 16, 3))
    y = jnp.array([0, 1, 2, 0])

    # Compiling takes the time here: so without much optimisation, and weights made by NumPy.
    rng = np.random.default_rng(0)
    before = jax.tree.map(
        lambda leaf: rng.uniform(0.0, 0.2, leaf.shape).astype(np.float32),
        variables_of(model, x.shape),
    )

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def step(variables):
        statistics = {k: v for k, v in variables.items() if k != "params"}

        def loss_fn(params):
            logits, updated = model.apply(
                {"params": params, **statistics}, x, train=True, mutable=list(statistics)
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return loss, {**statistics, **updated}

        (loss, statistics), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 1e-3 * g, variables["params"], grads)
        trained = {"params": params, **statistics}
        return trained, grads, loss, model.apply(trained, x)

    after, grads, loss, logits = step(before)
    chex.assert_shape(logits, (4, 3))
    chex.assert_type(logits, jnp.float32)
    chex.assert_tree_all_finite((after, loss, logits))
    chex.assert_trees_all_equal_structs(before, after)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads["head"]))
    if "batch_stats" in before:
        moved = jax.tree.map(
            lambda a, b: bool((a != b).any()), before["batch_stats"], after["batch_stats"]
        )
        assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("side", [8, 28, 32, 45])
def test_any_side_will_do(name, side):
    model = build(name, 5, TINY[name])
    image = jnp.zeros((2, side, side, 1))
    logits, _ = jax.eval_shape(
        lambda key: model.init_with_output(key, image, mutable=True), jax.random.key(0)
    )
    assert logits.shape == (2, 5)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(name):
    model = build(name, 5, {**TINY[name], "dtype": "bfloat16"})
    image = jnp.zeros((2, 32, 32, 3))
    (logits, state), variables = jax.eval_shape(
        lambda key: (
            model.init_with_output(key, image, capture_intermediates=True, mutable=True),
            model.init(key, image),
        ),
        jax.random.key(0),
    )
    assert logits.dtype == jnp.float32
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)
    inner = {k: v for k, v in state["intermediates"].items() if k not in ("head", "__call__")}
    chex.assert_type(jax.tree.leaves(inner), jnp.bfloat16)


@pytest.mark.parametrize("norm", ["batch", "layer", "group", "none"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_norm_option(name, norm):
    variables = variables_of(build(name, 5, {**TINY[name], "norm": norm}))
    assert ("batch_stats" in variables) == (norm == "batch")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenet", {}, "model.name is 'lenet': choose one of cnn, "),
        ("cnn", {"widht": 3}, "did you mean model.options.width"),
        ("cnn", {"zzz": 3}, "model.options.zzz is not an option of cnn; it has width, norm, dtype"),
        ("cnn", {"name": "x"}, "model.options.name is not an option"),
        ("cnn", {"width": 2.5}, "model.options.width is 2.5: int is needed"),
        ("cnn", {"width": True}, "model.options.width is True: int is needed"),
        ("cnn", {"width": 0}, "model.options.width is 0: it must be at least 1"),
        ("cnn", {"norm": "instance"}, "model.options.norm is 'instance': choose one of batch"),
        ("resnet", {"depth": 21}, "model.options.depth is 21: a ResNet has 6n"),
        ("vgg", {"depth": 17}, "model.options.depth is 17: choose one of 11, 13, 16, 19"),
        ("densenet", {"depth": 1}, "model.options.depth is 1: choose one of 121, 169, 201"),
        ("xception", {"stem": "tiny"}, "model.options.stem is 'tiny': choose one of imagenet"),
    ],
)
def test_mistakes_name_the_field(name, options, message):
    with pytest.raises(ConfigError) as caught:
        variables_of(build(name, 10, options))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def own(num_classes, width=3):
    return MODELS["mlp"](num_classes, hidden=(width,))


@pytest.mark.parametrize("name", [MODELS["mlp"], own])
def test_a_class_or_function_of_the_users_own_is_a_network(name):
    config = ModelConfig(name=name)
    assert build(config.name, 7).num_classes == 7


def test_options_of_an_own_network_are_checked():
    assert build(own, 7, {"width": 5}).hidden == (5,)
    with pytest.raises(ConfigError, match="widht is not an option of own; did you mean"):
        build(own, 7, {"widht": 5})
    with pytest.raises(ConfigError, match=r"model\.name is len: it must take num_classes"):
        build(len, 7)
