"""Discovery, permutation and verification of hidden-unit symmetries."""

import alignment_networks as networks
import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.alignment import (
    Group,
    Pinned,
    Site,
    Symmetries,
    compose,
    find_symmetries,
    identity_permutations,
    permute,
    random_permutations,
    validate,
    verify,
)
from megajax.errors import SymmetryError
from megajax.zoo.networks.cnn import CNN
from megajax.zoo.networks.densenet import DenseNet
from megajax.zoo.networks.mlp import MLP
from megajax.zoo.networks.resnet import ResNet
from megajax.zoo.networks.vgg import VGG
from megajax.zoo.networks.xception import Xception

IMAGES, SEQUENCES = (2, 8, 8, 3), (2, 5, 3)


def zoo(module, shape=IMAGES):
    return lambda: networks.linen(module, shape)


# Name -> (network, sizes of its groups of hidden units). The sizes are those of the specifications
# that git-re-basin writes by hand: a group for each layer whose output only later layers read, and
# one for each residual stream. Where a GroupNorm or attention heads tell units apart, they are
# (heads, units of a head).
NETWORKS = {
    "mlp": (zoo(MLP(3, (7, 5)), (2, 4)), [7, 5]),
    "mlp with batch norm": (zoo(MLP(3, (7, 5), norm="batch"), (2, 4)), [7, 5]),
    "cnn": (zoo(CNN(3, width=4)), [4, 8, 16]),
    "vgg": (
        zoo(VGG(3, 16, width=2, norm="batch"), (2, 32, 32, 3)),
        [2] * 2 + [4] * 2 + [8] * 3 + [16] * 6,
    ),
    "resnet, batch norm": (zoo(ResNet(3, 8, width=4)), [4, 4, 8, 8, 16, 16]),
    "resnet, layer norm": (zoo(ResNet(3, 8, width=4, norm="layer")), [4, 4, 8, 8, 16, 16]),
    "resnet, group norm": (
        zoo(ResNet(3, 8, width=8, norm="group")),
        [8, 8, (2, 8), (2, 8), (4, 8), (4, 8)],
    ),
    "resnet-20": (zoo(ResNet(3, 20, width=2)), [2] * 4 + [4] * 4 + [8] * 4),
    "densenet": (
        zoo(DenseNet(3, blocks=(2, 2), growth=2, stem="cifar")),
        # In each block: what comes in, then two bottlenecks and what their layers add.
        [4, 8, 2, 8, 2] * 2,
    ),
    "xception": (
        zoo(Xception(3, width=2, middle=1, stem="cifar")),
        # The stem; each entry block's inner layer and sum; the middle's inner layers; the exit.
        [2, 4, 8, 8, 16, 16, 45, 45, 45, 45, 45, 64, 96, 128],
    ),
    "squeeze and excite": (zoo(networks.SqueezeExcite()), [8, 4, 8, 4, 12]),
    "grouped convolution": (zoo(networks.Grouped()), [(3, 4), (3, 4)]),
    "vision transformer": (
        zoo(networks.Transformer(), (2, 8, 8, 3)),
        [12, 20, 20, (3, 4), (3, 4), (3, 4), (3, 4)],
    ),
    "packed attention": (zoo(networks.PackedAttention(), SEQUENCES), [8, (2, 4)]),
    "lstm": (zoo(networks.Recurrent(nn.LSTMCell), SEQUENCES), [5, 6]),
    "lstm with packed gates": (zoo(networks.Recurrent(nn.OptimizedLSTMCell), SEQUENCES), [5, 6]),
    "gru": (zoo(networks.Recurrent(nn.GRUCell), SEQUENCES), [5, 6]),
    "scanned layers": (zoo(networks.Stacked(), (2, 5)), [6, (3, 9)]),
    "nnx resnet": (networks.nnx_resnet, [4, 4, 8, 8, 16, 16]),
}


def sizes(symmetries):
    """The groups' sizes; a group that only holds others is counted with them."""
    held = {group.within for group in symmetries.groups}
    return sorted(
        (group.copies, group.size) for group in symmetries.groups if group.name not in held
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_every_group_is_found_and_leaves_the_function_alone(name):
    network, expected = NETWORKS[name]
    apply_fn, variables, inputs = network()
    symmetries = find_symmetries(apply_fn, variables, inputs)
    assert symmetries.unknown == ()
    expected = [size if isinstance(size, tuple) else (1, size) for size in expected]
    assert sizes(symmetries) == sorted(expected)
    verify(jax.random.key(0), symmetries, apply_fn, variables, inputs)


def mlp(variables, x):
    return jax.nn.relu(x @ variables["w"] + variables["b"]) @ variables["v"]


def mlp_variables(hidden=8):
    shapes = {"w": (3, hidden), "b": (hidden,), "v": (hidden, 2)}
    return networks.random_variables(
        {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    )


MLP_SITES = (Site("w", 1), Site("b", 0), Site("v", 0))
INPUTS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


@pytest.mark.parametrize("forgotten", range(3))
def test_a_hand_written_group_that_forgets_a_leaf_is_caught(forgotten):
    sites = MLP_SITES[:forgotten] + MLP_SITES[forgotten + 1 :]
    broken = Symmetries((Group("hidden", 8, sites),))
    with pytest.raises(SymmetryError, match="group 'hidden' changes the outputs"):
        verify(jax.random.key(0), broken, mlp, mlp_variables(), INPUTS)


def test_the_group_at_fault_is_named_among_others():
    apply_fn, variables, inputs = networks.linen(CNN(3, width=4), IMAGES)
    groups = list(find_symmetries(apply_fn, variables, inputs).groups)
    groups[1] = groups[1]._replace(
        sites=tuple(site for site in groups[1].sites if not site.path.endswith("/var"))
    )
    with pytest.raises(
        SymmetryError, match=f"{groups[1].name}' changes .* {groups[1].sites[0].path}"
    ):
        verify(jax.random.key(0), Symmetries(tuple(groups)), apply_fn, variables, inputs)


def test_fresh_batch_statistics_hide_no_error():
    apply_fn, variables, inputs = networks.linen(MLP(3, (7,), norm="batch"), (2, 4))
    fresh = jax.tree.map(np.zeros_like, variables["batch_stats"])
    group = find_symmetries(apply_fn, variables, inputs).groups[0]
    kept = tuple(site for site in group.sites if not site.path.endswith("/mean"))
    with pytest.raises(SymmetryError, match="changes the outputs"):
        verify(
            jax.random.key(0),
            Symmetries((group._replace(sites=kept),)),
            apply_fn,
            {**variables, "batch_stats": jax.tree.map(lambda x: x + 1, fresh)},
            inputs,
        )


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([Group("a", 8, (Site("u", 1),))], "no leaf 'u'"),
        ([Group("a", 8, (Site("w", 2),))], "no axis 2"),
        ([Group("a", 9, (Site("w", 1),))], "9 units do not fit the 8 entries"),
        ([Group("a", 7, (Site("w", 1),))], "do not fill its 8 entries"),
        ([Group("a", 4, (Site("w", 1, repeats=((2, 1),)),))], "do not fit"),
        ([Group("a", 8, ())], "no sites"),
        ([Group("a", 8, (Site("w", 1),)), Group("a", 8, (Site("v", 0),))], "used twice"),
        ([Group("a", 4, (Site("w", 1),), copies=2)], "says nothing of them"),
        ([Group("a", 4, (Site("w", 1),), copies=2, within="b")], "no group 'b' of 2 units"),
    ],
)
def test_symmetries_that_do_not_fit_the_variables_are_refused(groups, message):
    with pytest.raises(SymmetryError, match=message) as caught:
        validate(Symmetries(tuple(groups)), mlp_variables())
    assert "\n" not in str(caught.value)


def test_what_an_unknown_primitive_touches_is_pinned_and_reported():
    def network(variables, x):
        hidden = jax.nn.relu(x @ variables["w"] + variables["b"])
        hidden = jnp.fft.fft(hidden).real.astype(hidden.dtype)
        return jax.nn.relu(hidden @ variables["u"]) @ variables["v"]

    variables = {**mlp_variables(), "u": np.ones((8, 5), np.float32)}
    variables["v"] = np.ones((5, 2), np.float32)
    symmetries = find_symmetries(network, variables, INPUTS)
    assert symmetries.unknown == ("fft",)
    assert [(group.name, group.size) for group in symmetries.groups] == [("u", 5)]
    assert Pinned("w", 1, "fft") in symmetries.pinned
    assert "primitive without a rule: fft" in symmetries.describe()


def order_matters(hidden):
    return hidden * jnp.arange(hidden.shape[-1], dtype=hidden.dtype)


@pytest.mark.parametrize(
    "between",
    [
        order_matters,
        lambda h: jnp.cumsum(h, axis=-1),
        lambda h: h[:, ::-1],
        lambda h: jnp.sort(h, axis=-1),
        lambda h: jnp.roll(h, 1, axis=-1),
        lambda h: h * np.linspace(1, 2, h.shape[-1], dtype=np.float32),
        lambda h: h + jnp.argmax(h, axis=-1, keepdims=True).astype(h.dtype),
        lambda h: h.at[:, 0].add(1),
        lambda h: jnp.where(h[:, 3:4] > 0, h, 0),
    ],
)
def test_units_that_the_program_tells_apart_stay(between):
    def network(variables, x):
        return between(jax.nn.relu(x @ variables["w"] + variables["b"])) @ variables["v"]

    symmetries = find_symmetries(network, mlp_variables(), INPUTS)
    assert all(group.size < 8 for group in symmetries.groups)
    verify(jax.random.key(0), symmetries, network, mlp_variables(), INPUTS)


@pytest.mark.parametrize(
    "around",
    [
        jax.jit,
        jax.checkpoint,
        lambda f: lambda h: jax.lax.cond(h.sum() > 0, f, lambda x: 2 * f(x), h),
        lambda f: lambda h: jax.lax.fori_loop(0, 3, lambda _, x: f(x), h),
        lambda f: lambda h: jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: 0.1 * f(x), h),
        lambda f: lambda h: jax.lax.map(f, h),
        lambda f: lambda h: jax.vmap(f)(h),
        lambda f: lambda h: jnp.pad(f(h), ((0, 0), (1, 2)))[:, 1:-2],
        lambda f: lambda h: jnp.stack([f(h), h]).sum(0),
        lambda f: lambda h: jax.nn.softmax(f(h)),
        lambda f: lambda h: jnp.split(jnp.concatenate([f(h), h], -1), 2, -1)[1],
        lambda f: lambda h: f(h.reshape(2, 2, -1)).reshape(h.shape),
        lambda f: lambda h: f(h)[jnp.array([3, 1, 2, 0])],
    ],
)
def test_units_that_the_program_treats_alike_are_found(around):
    relu = jax.nn.relu

    def network(variables, x):
        return around(relu)(x @ variables["w"] + variables["b"]) @ variables["v"]

    symmetries = find_symmetries(network, mlp_variables(), INPUTS)
    assert symmetries.unknown == ()
    assert [(g.size, set(g.sites)) for g in symmetries.groups] == [(8, set(MLP_SITES))]
    verify(jax.random.key(0), symmetries, network, mlp_variables(), INPUTS)


def test_unused_and_integer_leaves_stay():
    variables = {**mlp_variables(), "unused": np.ones(8, np.float32), "steps": np.ones(8, np.int32)}

    def network(variables, x):
        hidden = jax.nn.relu(x @ variables["w"]) + variables["b"]
        return (hidden * variables["steps"]) @ variables["v"]

    symmetries = find_symmetries(network, variables, INPUTS)
    assert symmetries.groups == ()
    assert {Pinned("unused", 0, "unused"), Pinned("w", 1, "not a float")} <= set(symmetries.pinned)


def nested():
    """A network with whole groups, groups in segments, and groups within groups."""
    apply_fn, variables, inputs = networks.linen(networks.Grouped(), IMAGES)
    return find_symmetries(apply_fn, variables, inputs), variables


def test_permutations_form_a_group():
    symmetries, variables = nested()
    p, q = (random_permutations(jax.random.key(seed), symmetries) for seed in (0, 1))
    chex.assert_trees_all_equal(
        permute(symmetries, p, permute(symmetries, q, variables)),
        permute(symmetries, compose(symmetries, p, q), variables),
    )
    back = {name: each.argsort(axis=-1) for name, each in p.items()}
    within = {group.name: group.within for group in symmetries.groups}
    inverse = {
        name: each[back[within[name]]] if within[name] else each for name, each in back.items()
    }
    chex.assert_trees_all_equal(compose(symmetries, inverse, p), identity_permutations(symmetries))
    chex.assert_trees_all_equal(
        permute(symmetries, inverse, permute(symmetries, p, variables)), variables
    )


def test_permute_is_the_same_under_jit_and_in_numpy():
    symmetries, variables = nested()
    p = random_permutations(jax.random.key(0), symmetries)
    traced = jax.jit(lambda p, v: permute(symmetries, p, v))(p, variables)
    plain = permute(symmetries, p, variables)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(plain))
    chex.assert_trees_all_equal(traced, plain)


def test_permute_refuses_names_that_do_not_exist():
    symmetries = Symmetries((Group("hidden", 8, MLP_SITES),))
    with pytest.raises(SymmetryError, match="no such group"):
        permute(symmetries, {"other": np.arange(8)}, mlp_variables())
    with pytest.raises(SymmetryError, match="no leaf 'w'"):
        permute(symmetries, {"hidden": np.arange(8)}, {"v": np.ones((8, 2))})


def test_a_deep_network_is_read_within_seconds():
    inputs = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    network = ResNet(10, 152)
    shapes = jax.eval_shape(network.init, jax.random.key(0), inputs)
    # Three residual streams and one inner group in each of the 18 + 37 + 37 blocks.
    assert len(find_symmetries(network.apply, shapes, inputs).groups) == 3 + 92


def test_outputs_that_are_all_zero_do_not_change():
    def dead(variables, x):
        return 0 * mlp(variables, x)

    symmetries = find_symmetries(dead, mlp_variables(), INPUTS)
    verify(jax.random.key(0), symmetries, dead, mlp_variables(), INPUTS)
