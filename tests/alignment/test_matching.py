"""Weight and activation matching."""

import itertools

import alignment_networks as networks
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_symmetries import NETWORKS

from megajax.alignment import (
    Group,
    Site,
    Symmetries,
    activation_matching,
    compose,
    find_symmetries,
    identity_permutations,
    match,
    permute,
    random_permutations,
    weight_matching,
)
from megajax.errors import ParentsError, SymmetryError

HIDDEN = Symmetries((Group("hidden", 5, (Site("w", 1), Site("b", 0), Site("v", 0))),))


def mlp(variables, x):
    return jnp.tanh(x @ variables["w"] + variables["b"]) @ variables["v"]


def mlp_variables(seed):
    shapes = {"w": (3, 5), "b": (5,), "v": (5, 2)}
    return networks.random_variables(
        {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}, seed
    )


def never_falls(objective):
    return all(b >= a for a, b in itertools.pairwise(objective))


def network_and_others(name, count):
    """A network, its symmetries, and its variables drawn `count` times."""
    apply_fn, variables, inputs = NETWORKS[name][0]()
    drawn = [networks.random_variables(variables, seed) for seed in range(count)]
    return apply_fn, find_symmetries(apply_fn, variables, inputs), drawn, inputs


@pytest.mark.parametrize("name", NETWORKS)
def test_a_planted_permutation_is_undone_exactly(name):
    _, symmetries, (variables,), _ = network_and_others(name, 1)
    for seed in range(20):
        planting, matching = jax.random.split(jax.random.key(seed))
        planted = permute(symmetries, random_permutations(planting, symmetries), variables)
        (_, found), info = match(matching, symmetries, [variables, planted])
        chex.assert_trees_all_equal(found, variables)
        assert never_falls(info.objective)


@pytest.mark.parametrize("name", ["resnet, batch norm", "vision transformer", "lstm"])
@pytest.mark.parametrize("reference", [0, 1, "mean"])
def test_the_objective_never_falls_and_the_functions_stay(name, reference):
    apply_fn, symmetries, parents, inputs = network_and_others(name, 3)
    aligned, info = match(jax.random.key(0), symmetries, parents, reference=reference)
    assert never_falls(info.objective)
    as_they_are = [identity_permutations(symmetries)] * 3
    _, (unaligned,) = weight_matching(
        jax.random.key(0), symmetries, parents, reference, start=as_they_are, max_sweeps=0
    )
    assert info.objective[-1] > unaligned
    for before, after, moved in zip(parents, aligned, info.permutations, strict=True):
        chex.assert_trees_all_equal(after, permute(symmetries, moved, before))
        outputs = [apply_fn(variables, inputs) for variables in (before, after)]
        np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-4)
    if reference != "mean":
        chex.assert_trees_all_equal(aligned[reference], parents[reference])


def test_the_reported_objective_is_the_inner_product_of_the_aligned_weights():
    _, symmetries, parents, _ = network_and_others("resnet, batch norm", 3)
    for reference, pairs in ((0, [(0, 1), (0, 2)]), ("mean", [(0, 1), (0, 2), (1, 2)])):
        aligned, info = match(jax.random.key(0), symmetries, parents, reference=reference)
        paths = {site.path for group in symmetries.groups for site in group.sites}
        flat = [
            np.concatenate(
                [
                    np.ravel(leaf).astype(np.float64)
                    for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
                    for name in [jax.tree_util.keystr(path, simple=True, separator="/")]
                    if name in paths and not name.startswith("batch_stats")  # statistics
                ]
            )
            for variables in aligned
        ]
        assert info.objective[-1] == pytest.approx(sum(flat[i] @ flat[j] for i, j in pairs))


def test_one_group_gets_the_best_of_all_permutations():
    a, b = mlp_variables(0), mlp_variables(1)
    _, objective = weight_matching(jax.random.key(0), HIDDEN, [a, b])
    best = max(
        sum(np.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(moved), strict=True))
        for p in itertools.permutations(range(5))
        for moved in [permute(HIDDEN, {"hidden": np.array(p)}, b)]
    )
    assert objective[-1] == pytest.approx(float(best))


@pytest.mark.parametrize("method", ["weights", "activations", "both"])
def test_the_same_key_gives_the_same_alignment(method):
    apply_fn, symmetries, parents, inputs = network_and_others("resnet, batch norm", 2)
    one, two = (
        match(
            jax.random.key(3), symmetries, parents, method=method, apply_fn=apply_fn, inputs=inputs
        )
        for _ in range(2)
    )
    chex.assert_trees_all_equal(one, two)


@pytest.mark.parametrize("name", ["mlp", "grouped convolution", "vision transformer"])
@pytest.mark.parametrize("method", ["activations", "both"])
def test_activations_undo_a_planted_permutation(name, method):
    apply_fn, symmetries, (variables,), inputs = network_and_others(name, 1)
    inputs = np.random.default_rng(0).normal(size=(64, *inputs.shape[1:])).astype(np.float32)
    drawn = random_permutations(jax.random.key(0), symmetries)
    planted = permute(symmetries, drawn, variables)
    (_, found), info = match(
        jax.random.key(1),
        symmetries,
        [variables, planted],
        method=method,
        apply_fn=apply_fn,
        inputs=inputs,
    )
    chex.assert_trees_all_equal(found, variables)
    assert never_falls(info.objective)


def test_correlations_are_those_of_the_activations():
    a, b = mlp_variables(0), mlp_variables(1)
    x = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    (_, moved), (before, after) = activation_matching(HIDDEN, [a, b], mlp, x)
    hidden = [np.tanh(x @ v["w"] + v["b"]) for v in (a, b)]
    correlation = np.corrcoef(*hidden, rowvar=False)[:5, 5:]
    totals = {p: correlation[np.arange(5), p].sum() for p in itertools.permutations(range(5))}
    assert tuple(moved["hidden"]) == max(totals, key=totals.get)
    assert before == pytest.approx(np.trace(correlation), abs=1e-4)
    assert after == pytest.approx(max(totals.values()), abs=1e-4)


def test_ignored_leaves_move_but_do_not_count():
    a = mlp_variables(0)
    b = permute(HIDDEN, {"hidden": np.array([1, 2, 3, 4, 0])}, a)
    misleading = {**a, "b": 100 * b["b"]}
    (_, fooled), _ = match(jax.random.key(0), HIDDEN, [misleading, a | {"b": 100 * a["b"]}])
    (_, moved), info = match(jax.random.key(0), HIDDEN, [misleading, b], ignore={"b"})
    assert not np.array_equal(fooled["w"], a["w"])
    np.testing.assert_array_equal(moved["w"], a["w"])
    np.testing.assert_array_equal(moved["b"], b["b"][info.permutations[1]["hidden"]])


def test_parents_that_are_one_network_meet_at_the_mean():
    _, symmetries, (variables,), _ = network_and_others("cnn", 1)
    parents = [
        permute(symmetries, random_permutations(jax.random.key(k), symmetries), variables)
        for k in range(4)
    ]
    aligned, info = match(jax.random.key(9), symmetries, parents, reference="mean")
    for other in aligned[1:]:
        chex.assert_trees_all_equal(other, aligned[0])
    drawn = [random_permutations(jax.random.key(k), symmetries) for k in range(4)]
    placed = [compose(symmetries, p, q) for p, q in zip(info.permutations, drawn, strict=True)]
    for other in placed[1:]:
        chex.assert_trees_all_equal(other, placed[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "guess"}, ValueError, "choose weights, activations or both"),
        ({"method": "both"}, ValueError, "needs apply_fn and inputs"),
        ({"method": "activations", "reference": "mean"}, ValueError, "only weights"),
        ({"reference": 2}, ParentsError, "the parents are 0 to 1"),
        ({"reference": "median"}, ParentsError, "'median'"),
    ],
)
def test_what_cannot_be_done_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        match(jax.random.key(0), HIDDEN, [mlp_variables(0), mlp_variables(1)], **options)


def test_parents_that_do_not_fit_are_refused():
    a = mlp_variables(0)
    with pytest.raises(ParentsError, match="parent 1 has other leaves"):
        match(jax.random.key(0), HIDDEN, [a, {**a, "extra": a["b"]}])
    with pytest.raises(SymmetryError, match="5 units do not fit the 4 entries of w axis 1"):
        match(jax.random.key(0), HIDDEN, [a, {**a, "w": a["w"][:, :4]}])
