"""The diagnosis of parents whose relation is planted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import megajax as mj

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 6)).astype(np.float32)


def mlp(w, x):
    return jnp.tanh(x @ w["u"] + w["b"]) @ w["v"]


def network(seed, width=24):
    rng = np.random.default_rng(seed)
    shapes = {"b": (width,), "u": (6, width), "v": (width, 4)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def permuted(w):
    order = np.random.default_rng(9).permutation(len(w["b"]))
    return {"b": w["b"][order], "u": w["u"][:, order], "v": w["v"][order]}


NETWORK = network(1)
DATA = X, np.asarray(mlp(NETWORK, X)).argmax(-1)


def test_the_same_network_twice_has_nothing_to_gain():
    found = mj.diagnose(KEY, mlp, [NETWORK, NETWORK], DATA)
    assert found.agreement == 1
    assert found.parents == (1, 1)
    assert found.ensemble == 1
    assert found.cosine == pytest.approx(1)
    assert set(found.barriers.values()) == {0}
    assert found.advice == "agree on everything: nothing to gain"


def test_the_barrier_of_a_permuted_copy_is_gone_once_aligned():
    other = permuted(NETWORK)
    other["v"] = other["v"] + 0.3 * RNG.normal(size=other["v"].shape).astype(np.float32)
    found = mj.diagnose(KEY, mlp, [NETWORK, other], DATA)
    assert found.barriers["as they are"] > 0.1
    assert found.barriers["aligned"] < 0.02
    assert not found.same_base
    assert found.similarity["u"] == pytest.approx(1)
    assert 0.8 < found.similarity["v"] < 1
    assert found.advice == "barrier gone after alignment: masks between aligned parents"
    assert "midpoint aligned" in repr(found)
    assert repr(found).endswith(found.advice)


@pytest.mark.parametrize("given", [True, False])
def test_fine_tunes_of_one_base(given):
    tuned = [
        {name: leaf + 0.1 * network(seed)[name] for name, leaf in NETWORK.items()}
        for seed in (5, 6, 7)
    ]
    found = mj.diagnose(KEY, mlp, tuned, DATA, base=NETWORK if given else None)
    assert found.same_base
    assert len(found.parents) == len(found.calibration_error) == 3
    assert found.advice == "no barrier: task vectors or masks between the parents as they are"
    stranger = mj.diagnose(KEY, mlp, tuned, DATA, base=network(8))
    assert not stranger.same_base


def test_without_symmetry_nothing_takes_a_barrier_away():
    def rigid(w, x):  # no hidden units; the outputs are read in one order
        return jnp.stack([jnp.cos(x @ w["u"]), jnp.zeros(len(x))], axis=-1)

    u = RNG.normal(size=6).astype(np.float32)
    parents = [{"u": 2 * u}, {"u": -2 * u}]  # one function, and its midpoint is constant
    data = X, np.asarray(rigid(parents[0], X)).argmax(-1)
    data[1][:20] = 1 - data[1][:20]
    parents[1]["u"][0] *= 0.8
    found = mj.diagnose(KEY, rigid, parents, data)
    assert "aligned" not in found.midpoints
    assert found.barriers["as they are"] > 0.2
    assert found.advice == "no symmetry and a large barrier: distil or choose the better one"


def test_statistics_are_measured_anew_where_there_are_any():
    def normed(w, x):
        hidden = (x @ w["u"] - w["mean"]) * jax.lax.rsqrt(w["var"] + 1e-5)
        return jnp.tanh(hidden) @ w["v"]

    order = RNG.permutation(24)
    hidden = X @ NETWORK["u"]
    right = {"mean": hidden.mean(0), "u": NETWORK["u"], "v": NETWORK["v"], "var": hidden.var(0)}
    off = right | {"mean": right["mean"] + 3, "var": 9 * right["var"]}
    other = {name: off[name][order] for name in ("mean", "v", "var")} | {"u": off["u"][:, order]}
    other["v"] = other["v"] + 0.5 * RNG.normal(size=(24, 4)).astype(np.float32)
    off, labels = [off, other], np.asarray(normed(right, X)).argmax(-1)
    found = mj.diagnose(KEY, normed, off, (X, labels), calibration=X)
    assert list(found.midpoints) == ["as they are", "aligned", "recalibrated"]
    assert found.midpoints["recalibrated"] > 0.9 > max(found.parents)
    assert found.midpoints["aligned"] < 0.9
    assert "recalibrat" in found.advice


def test_scores_of_other_tasks_have_no_classes():
    targets = np.asarray(mlp(NETWORK, X))
    found = mj.diagnose(KEY, mlp, [NETWORK, network(2)], (X, targets))
    assert found.metric == "mean_squared_error"
    assert found.parents[0] == pytest.approx(0, abs=1e-9)
    assert found.parents[1] < -0.1
    assert found.agreement is found.calibration_error is None
    task = mj.Task(X, targets, metric="r2")
    assert mj.diagnose(KEY, mlp, [NETWORK, network(2)], task).parents[0] == pytest.approx(1)


def test_what_cannot_be_is_one_line():
    with pytest.raises(mj.ConfigError, match="data holds 2 tasks: a diagnosis takes one"):
        mj.diagnose(KEY, mlp, [NETWORK] * 2, [mj.Task(*DATA)] * 2)
    with pytest.raises(mj.ParentsError):
        mj.diagnose(KEY, mlp, [NETWORK] * 2, DATA, base={"u": NETWORK["u"]})
    with pytest.raises(mj.DataError):
        mj.diagnose(KEY, mlp, [NETWORK] * 2, DATA, calibration=X[:0])
    found = mj.diagnose(KEY, mlp, [NETWORK] * 2, DATA)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.agreement = 0.5
