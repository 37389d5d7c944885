"""Partial merges: leaves that are left to one parent, through files, alignment and the search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import megajax as mj
from megajax.merging.genome import make_genome


def network(w, x):
    return jax.nn.relu(x @ w["body"] + w["bias"]) @ w["head"]


X = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)


def parent(seed, classes):
    rng = np.random.default_rng(seed)
    sizes = {"body": (5, 7), "bias": (7,), "head": (7, classes)}
    return {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}


def merge(parents, classes, **options):
    return mj.merge(
        jax.random.key(0),
        network,
        parents,
        (X, np.arange(len(X)) % classes),
        evolution=mj.EvolutionConfig(population_size=6, generations=0),
        **options,
    )


def test_kept_leaves_are_not_mixed():
    first, second = parent(0, 3), parent(1, 4)
    with pytest.raises(mj.ParentsError, match=r"leaf head: float32\[7,3\] .* float32\[7,4\]"):
        merge([first, second], 3)
    result = merge([first, second], 3, keep={"head": 0}, align=mj.AlignConfig(method="none"))
    np.testing.assert_array_equal(result.variables["head"], first["head"], strict=True)
    assert result.genome.num_genes == 7  # those of the body
    assert not np.array_equal(result.parents[1]["body"], result.parents[0]["body"])
    assert result.fitness >= result.parent_fitness.max()
    mixed = genes_mix(result, "body")
    np.testing.assert_allclose(result.variables["body"], mixed, rtol=1e-6)


def genes_mix(result, leaf):
    shares = np.asarray(result.genes)[result.genome.labels.tree[leaf]]
    return sum(shares[..., k] * result.parents[k][leaf] for k in range(2))


def test_freezing_and_keeping_go_together_and_each_must_match():
    parents = [parent(0, 3), parent(1, 4)]
    kept = [{**one, "head": parents[1]["head"]} for one in parents]
    config = mj.GenomeConfig(freeze="bias")
    genome = make_genome(network, kept[0], X, 2, config, freeze=["head"])
    mixed = genome.express(jnp.full((genome.num_genes, 2), 0.5), genome.stack(kept))
    np.testing.assert_array_equal(mixed["head"], parents[1]["head"])
    np.testing.assert_array_equal(mixed["bias"], parents[0]["bias"])
    np.testing.assert_allclose(mixed["body"], (parents[0]["body"] + parents[1]["body"]) / 2)
    with pytest.raises(mj.ConfigError, match=r"genome.freeze is 'bais': it matches no leaf"):
        make_genome(network, kept[0], X, 2, mj.GenomeConfig(freeze="bais"), freeze=["head"])


def test_kept_leaves_move_with_their_own_parents_hidden_units():
    """Parent 1 is parent 0 with its units in another order and another head."""
    first, other = parent(0, 3), parent(1, 4)
    order = np.random.default_rng(2).permutation(7)
    second = {
        "body": first["body"][:, order],
        "bias": first["bias"][order],
        "head": other["head"][order],
    }
    result = merge([first, second], 4, keep={"head": 1})
    np.testing.assert_array_equal(result.parents[1]["body"], first["body"])
    for aligned in (*result.parents, result.variables):
        np.testing.assert_array_equal(aligned["head"], other["head"])
    expected = network(second, X)
    np.testing.assert_allclose(network(result.variables, X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pairing", ["order", "similarity"])
def test_a_tree_of_parents_with_other_heads(pairing):
    parents = [parent(seed, classes) for seed, classes in enumerate((3, 4, 5))]
    result = mj.merge_tree(
        jax.random.key(0),
        network,
        parents,
        (X, np.arange(len(X)) % 3),
        keep={"head": 0},
        hierarchy=mj.HierarchyConfig(pairing=pairing),
        align=mj.AlignConfig(method="none"),
        evolution=mj.EvolutionConfig(population_size=6, generations=0),
    )
    kept = result.nodes[-1].parents[0]  # of the first of two that meet
    while kept >= 3:
        kept = result.nodes[kept - 3].parents[0]
    np.testing.assert_array_equal(result.variables["head"], parents[kept]["head"])
    assert np.isfinite(result.parent_fitness).all()


@pytest.mark.parametrize("kind", ["msgpack", "safetensors", "npz", "orbax"])
def test_files_of_parents_with_other_heads(kind, tmp_path):
    pytest.importorskip("megajax.formats", exc_type=ImportError)
    first, second = parent(0, 3), parent(1, 4)
    third = {name: leaf for name, leaf in parent(2, 5).items() if name != "head"}
    paths = [
        mj.save_network(tmp_path / str(k), net, format=kind)
        for k, net in enumerate((first, second, third))
    ]
    with pytest.raises(mj.InterchangeError, match=r"leaf head is float32\[7,4\] but float32\[7,3"):
        mj.load_parents(paths, like=second)
    loaded = mj.load_parents(paths, like=second, keep={"head": 1})
    for k, net in enumerate((first, second, third)):
        np.testing.assert_array_equal(loaded[k]["body"], net["body"])
        np.testing.assert_array_equal(loaded[k]["head"], second["head"])
    mj.trees.check_parents(loaded)


def test_state_dicts_with_other_heads_or_none(tmp_path):
    pytest.importorskip("megajax.formats", exc_type=ImportError)

    def state(net):
        return {
            "body.weight": net["body"].T,
            "body.bias": net["bias"],
            "head.weight": net["head"].T,
        }

    nets = [parent(0, 3), parent(1, 4), parent(2, 5)]
    states = [state(net) for net in nets]
    del states[2]["head.weight"]
    paths = [
        mj.save_network(tmp_path / f"{k}.safetensors", tensors) for k, tensors in enumerate(states)
    ]
    like = mj.Network(network, nets[1])
    loaded = mj.load_parents(paths, like, inputs=X, keep={"head": 1})
    for k, net in enumerate(nets):
        np.testing.assert_array_equal(loaded[k]["body"], net["body"])
        np.testing.assert_array_equal(loaded[k]["head"], nets[1]["head"])
    logits = [None, network(nets[1], jnp.asarray(X)), None]
    mj.load_parents(paths, like, inputs=X, keep={"head": 1}, logits=logits)
    with pytest.raises(mj.InterchangeError, match=r"1.safetensors: logit \[0, 0\] is"):
        mj.load_parents(paths, like, inputs=X, keep={"head": 1}, logits=[None, logits[1] + 1, None])
