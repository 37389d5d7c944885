"""Every public entry with every kind of bad input: one line of megajax's own, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import megajax as mj
from megajax.baselines.fisher import fisher_information
from megajax.baselines.regmean import regmean

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 5)).astype(np.float32)
Y = np.arange(24) % 3
PLAIN = mj.AlignConfig(method="none")
SMALL = mj.EvolutionConfig(population_size=4, generations=1)
SHAPES = {"first": (5, 7), "mean": (7,), "var": (7,), "scale": (7,), "head": (7, 3)}


def network(w, x):
    x = (x @ w["first"] - w["mean"]) * jax.lax.rsqrt(w["var"] + 1e-5) * w["scale"]
    return jax.nn.relu(x) @ w["head"]


def biased(w, x):
    return jax.nn.relu(x @ w["first"] + w["mean"]) @ w["head"]


def parent(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(0.1, 1, size).astype(np.float32) for name, size in SHAPES.items()}


PARENTS = [parent(0), parent(1)]


def labelled(x):
    return x, Y[: len(x)] if np.ndim(x) else Y


def merge(parents=PARENTS, x=X, **options):
    options = {"align": PLAIN, "evolution": SMALL} | options
    return mj.merge(KEY, network, parents, labelled(x), **options)


def recalibrated(parents=PARENTS, x=X):
    again = mj.RecalibrateConfig(enabled=True)
    return merge(parents, calibration=x, recalibrate=again).variables


def searched(method, **options):
    evolution = mj.EvolutionConfig(
        population_size=4, generations=1, method=method, gradient_examples=4, **options
    )
    return lambda parents=PARENTS, x=X: merge(parents, x, evolution=evolution)


def tree(parents=PARENTS, x=X):
    return mj.merge_tree(
        KEY, network, [*parents, parent(2)], labelled(x), align=PLAIN, evolution=SMALL
    )


def baselines(names):
    config = mj.BaselinesConfig(names=names, budget=5)

    def run(parents=PARENTS, x=X):
        return mj.run_baselines(
            KEY, network, parents, labelled(x), calibration=x, align=PLAIN, config=config
        )

    return run


# entry(parents, x): what a user calls with networks, and with inputs.
ENTRIES = {
    "merge": merge,
    "merge, recalibrated": recalibrated,
    "merge, gradient": searched("gradient"),
    "merge, distilled": lambda parents=PARENTS, x=X: mj.merge(
        KEY, network, parents, mj.Task(x, metric="distill"), align=PLAIN, evolution=SMALL
    ),
    "merge, aligned": lambda parents=PARENTS, x=X: merge(
        parents, calibration=x, align=mj.AlignConfig(method="activations")
    ),
    "merge_tree": tree,
    "run_baselines": baselines(("uniform_average", "fisher", "regmean", "line")),
    "align": lambda parents=PARENTS, x=X: mj.align(KEY, network, parents, x),
    "problem_for": lambda parents=PARENTS, x=X: mj.problem_for(
        network, parents, labelled(x), population_size=4
    ),
    "diagnose": lambda parents=PARENTS, x=X: mj.diagnose(KEY, network, parents, labelled(x)),
    "recalibrate": lambda parents=PARENTS, x=X: mj.recalibrate(network, parents[0], x),
    "repair": lambda parents=PARENTS, x=X: mj.repair(biased, PARENTS[0], parents, x),
    "score": lambda parents=PARENTS, x=X: mj.score(network, parents[0], labelled(x)),
    "predict": lambda parents=PARENTS, x=X: mj.predict(network, parents[0], x),
    "fisher_information": lambda parents=PARENTS, x=X: fisher_information(network, parents[0], x),
    "regmean": lambda parents=PARENTS, x=X: regmean(network, parents, x),
}
NAN = X.copy()
NAN[3, 2] = np.nan
INPUTS = {
    "not finite": NAN,
    "empty": X[:0],
    "wrong width": X[:, :3],
    "wrong rank": X[:, :, None, None],
    "a number": 3.0,
    "words": ["a", "b"],
}
NETWORKS = {
    "not finite": [PARENTS[0], PARENTS[1] | {"head": PARENTS[1]["head"] * np.nan}],
    "other shape": [PARENTS[0], PARENTS[1] | {"head": np.ones((6, 3), np.float32)}],
    "a missing leaf": [PARENTS[0], {"first": PARENTS[1]["first"]}],
    "one of them": PARENTS[0],
    "words": ["a", "b"],
}
OF_ONE = ("recalibrate", "score", "predict", "fisher_information")  # they take a single network


def one_line(error):
    assert isinstance(error, mj.MegajaxError), f"{type(error).__name__}: {error}"
    assert str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_bad_inputs_are_one_line(entry, kind):
    if entry == "predict" and kind in ("not finite", "empty"):
        pytest.skip("what a network makes of them is an answer")
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is the question
        ENTRIES[entry](x=INPUTS[kind])
    one_line(caught.value)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry not in OF_ONE])
def test_bad_parents_are_one_line(entry, kind):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is the question
        ENTRIES[entry](parents=NETWORKS[kind])
    one_line(caught.value)


@pytest.mark.parametrize("entry", ENTRIES)
def test_arrays_come_from_any_device(entry):
    first, second = jax.devices()[:2]
    parents = [jax.device_put(PARENTS[0], first), jax.device_put(PARENTS[1], second)]
    found = ENTRIES[entry](parents=parents, x=jax.device_put(jnp.asarray(X), second))
    assert found is not None


def test_what_comes_from_other_devices_is_the_same_network():
    devices = jax.devices()
    parents = [jax.device_put(one, device) for one, device in zip(PARENTS, devices, strict=False)]
    there = merge(parents, jax.device_put(X, devices[1]))
    here = merge()
    np.testing.assert_array_equal(there.genes, here.genes)
    np.testing.assert_array_equal(there.variables["head"], here.variables["head"])
