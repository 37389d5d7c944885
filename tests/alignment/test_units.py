"""One gene for each hidden unit: which elements share it."""

import alignment_networks as networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_symmetries import NETWORKS

import megajax as mj
from megajax.alignment import find_symmetries, permute, random_permutations, unit_labels
from megajax.program.roles import find_roles
from megajax.zoo.networks.resnet import ResNet


def full(labels, variables):
    return jax.tree.map(lambda label, leaf: np.broadcast_to(label, leaf.shape), labels, variables)


@pytest.mark.parametrize("name", NETWORKS)
def test_permuted_units_take_their_genes_along(name):
    """Genes are those of units: renaming the units of a network only renames its genes."""
    apply_fn, variables, inputs = NETWORKS[name][0]()
    symmetries = find_symmetries(apply_fn, variables, inputs)
    labels = full(unit_labels(apply_fn, variables, inputs, symmetries), variables)
    drawn = random_permutations(jax.random.key(1), symmetries)
    moved = permute(symmetries, drawn, labels)
    pairs = {
        pair
        for old, new in zip(jax.tree.leaves(labels), jax.tree.leaves(moved), strict=True)
        for pair in zip(old.ravel().tolist(), new.ravel().tolist(), strict=True)
    }
    genes = {old for old, _ in pairs}
    assert genes == {new for _, new in pairs} == set(range(len(genes)))
    assert len(pairs) == len(genes)


def test_every_writer_of_a_residual_stream_shares_the_units_genes():
    apply_fn, variables, inputs = networks.linen(ResNet(3, 8, width=4), (2, 8, 8, 3))
    labels = unit_labels(apply_fn, variables, inputs)
    params, stats = labels["params"], labels["batch_stats"]
    stream = params["stem_conv"]["kernel"].ravel().tolist()
    assert stream == [0, 1, 2, 3]
    for writer in ("stem_norm", "stage1_block1_norm2"):
        for leaf in (*params[writer].values(), *stats[writer].values()):
            assert leaf.ravel().tolist() == stream
    assert params["stage1_block1_conv2"]["kernel"].shape == (1, 1, 1, 4)
    assert params["stage1_block1_conv2"]["kernel"].ravel().tolist() == stream
    assert params["stage2_block1_shortcut"]["kernel"].ravel().tolist() == (
        params["stage2_block1_conv2"]["kernel"].ravel().tolist()
    )
    # The groups' sizes, and a gene for each class.
    count = 1 + max(int(leaf.max()) for leaf in jax.tree.leaves(labels))
    assert count == 4 + 4 + 8 + 8 + 16 + 16 + 3


def channels_first(w, x):
    x = jax.lax.conv(x, w["stem"], (1, 1), "SAME") + w["bias"][:, None, None]
    return jax.nn.relu(x).mean((2, 3)) @ w["head"].T


def test_the_output_axis_is_read_off_the_program_not_off_the_layout():
    shapes = {"stem": (5, 3, 2, 2), "bias": (5,), "head": (4, 5)}
    w = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    x = np.ones((2, 3, 8, 8), np.float32)
    roles = dict(zip(sorted(w), find_roles(channels_first, w, x).leaves, strict=True))
    assert [one.written for one in roles["stem"].contractions] == [(0,)]
    assert [one.written for one in roles["head"].contractions] == [(0,)]
    assert [roles[name].kind for name in sorted(w)] == ["bias", "kernel", "kernel"]
    labels = unit_labels(channels_first, w, x)
    assert labels["stem"].shape == (5, 1, 1, 1)
    assert labels["stem"].ravel().tolist() == labels["bias"].tolist() == [0, 1, 2, 3, 4]
    assert labels["head"].shape == (4, 1)
    assert labels["head"].ravel().tolist() == [5, 6, 7, 8]


def test_each_head_of_attention_has_units_of_its_own():
    apply_fn, variables, inputs = NETWORKS["vision transformer"][0]()
    labels = unit_labels(apply_fn, variables, inputs)
    attention = labels["params"]["attention0"]
    value = attention["value"]
    assert value["kernel"].shape == (1, 3, 4)
    assert len(np.unique(value["kernel"])) == 12
    np.testing.assert_array_equal(value["kernel"][0], value["bias"])
    np.testing.assert_array_equal(attention["query"]["bias"], attention["key"]["bias"])
    assert not np.intersect1d(attention["query"]["bias"], value["bias"]).size
    # All that writes the residual stream shares its units.
    patches = labels["params"]["Conv_0"]["bias"]
    np.testing.assert_array_equal(attention["out"]["bias"], patches)
    np.testing.assert_array_equal(labels["params"]["position"].ravel(), patches)


def test_channel_masks_of_a_merge_follow_the_groups():
    w = [
        {"stem": a, "bias": b, "head": c}
        for k in range(2)
        for a, b, c in [
            (
                jax.random.normal(jax.random.key(k), (5, 3, 2, 2)),
                jnp.zeros(5),
                jax.random.normal(jax.random.key(10 + k), (4, 5)),
            )
        ]
    ]
    x = np.asarray(jax.random.normal(jax.random.key(5), (40, 3, 8, 8)))
    result = mj.merge(
        jax.random.key(0),
        channels_first,
        w,
        (x, np.arange(40) % 4),
        genome=mj.GenomeConfig(binary=True),
        evolution=mj.EvolutionConfig(population_size=8, generations=2),
    )
    assert result.genes.shape == (9, 2)
    pick = np.asarray(result.genes).argmax(-1)
    for unit in range(5):
        source = result.parents[pick[unit]]
        np.testing.assert_array_equal(result.variables["stem"][unit], source["stem"][unit])
    for row in range(4):
        source = result.parents[pick[5 + row]]
        np.testing.assert_array_equal(result.variables["head"][row], source["head"][row])
