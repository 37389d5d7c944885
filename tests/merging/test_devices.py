"""The population over simulated devices: whatever their number, the result is that of one."""

from dataclasses import replace

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from searches import started

import megajax as mj
from megajax.merging import devices as sharding
from megajax.merging.devices import choose_layout
from megajax.merging.merge import search_of
from megajax.merging.problem import evaluate
from megajax.search import loop


class Net(nn.Module):
    """A convolution, BatchNorm and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)))
        return nn.Dense(4)(x.mean((1, 2)))


NET = Net()
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(37, 6, 6, 2)).astype(np.float32)
LABELS = RNG.integers(0, 4, 37)
NETWORKS = [NET.init(jax.random.key(k), IMAGES) for k in range(2)]


def apply_fn(variables, x):
    return NET.apply(variables, x)


def mesh_of(population, network=1):
    grid = np.array(jax.devices()[: population * network]).reshape(population, network)
    return jax.sharding.Mesh(grid, ("population", "network"))


def problem_of(population, network=1, *, metric="accuracy", chunk=1, **options):
    """The problem on so many devices; on one without a mesh if `population` is None."""
    devices = 1 if population is None else population * network
    fitness = mj.FitnessConfig(
        metric=metric,
        batch_size=10,
        population_chunk=chunk,
        devices=devices,
        devices_per_network=network,
    )
    problem = mj.problem_for(
        apply_fn,
        NETWORKS,
        (IMAGES, LABELS),
        genome=mj.GenomeConfig(granularity="leaf"),
        fitness=fitness,
        population_size=64,
        **options,
    )
    if population == network == 1:  # a mesh of a single device, which nobody asks for
        problem = replace(problem, layout=replace(problem.layout, mesh=mesh_of(1)))
    return problem


GENOME = problem_of(None).genome
GENES = np.asarray(GENOME.init(jax.random.key(3), 11))
compiled = jax.jit(evaluate)


def scored(population, network=1, *, size=8, **options):
    return compiled(problem_of(population, network, **options), jnp.asarray(GENES[:size]))


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("metric", ["accuracy", "cross_entropy"])
def test_scores_are_equal_to_the_bit_on_any_number_of_devices_one_by_one(devices, metric):
    for size in (8, 11):
        alone, _ = scored(None, size=size, metric=metric)
        values, aux = scored(devices, size=size, metric=metric)
        np.testing.assert_array_equal(values, alone)
        assert values.shape == (size,)
        assert aux == ((), ())
        assert values.sharding.is_fully_replicated


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("metric", ["accuracy", "cross_entropy"])
def test_scores_side_by_side_are_equal_but_for_rounding(devices, metric):
    alone, _ = scored(None, chunk=3, size=11, metric=metric)
    values, _ = scored(devices, chunk=3, size=11, metric=metric)
    np.testing.assert_allclose(values, alone, rtol=1e-6)


def test_a_population_smaller_than_the_mesh():
    alone, _ = scored(None, size=4)
    np.testing.assert_array_equal(scored(8, size=4)[0], alone)


def test_right_and_wrong_of_every_example():
    alone, four = (
        replace(problem_of(devices, metric="cross_entropy"), per_example=True)
        for devices in (None, 4)
    )
    genes = jnp.asarray(GENES[:5])
    expected, aux = compiled(alone, genes)
    values, found = compiled(four, genes)
    assert found.right.shape == (5, 40)  # four batches of ten
    np.testing.assert_array_equal(found.right, aux.right)
    np.testing.assert_array_equal(values, expected)
    there = np.asarray(alone.batches[0].valid).reshape(-1)
    right = np.asarray(found.right)[:, there].mean(axis=1)
    np.testing.assert_allclose(right, scored(None, size=5)[0], rtol=1e-6)


def test_recalibrated_networks():
    options = {
        "calibration": IMAGES[:20],
        "recalibrate": mj.RecalibrateConfig(enabled=True),
        "metric": "cross_entropy",
    }
    alone, _ = scored(None, **options)
    np.testing.assert_allclose(scored(4, **options)[0], alone, rtol=1e-6)
    assert not np.allclose(alone, scored(None, metric="cross_entropy")[0], rtol=1e-3)


@pytest.mark.parametrize("shape", [(1, 2), (2, 4)])
@pytest.mark.parametrize("chunk", [1, 3])
def test_networks_over_several_devices(shape, chunk):
    options = {"metric": "cross_entropy", "chunk": chunk, "size": 5}
    alone, _ = scored(None, **options)
    np.testing.assert_allclose(scored(*shape, **options)[0], alone, rtol=1e-5)


def test_parents_lie_in_parts_and_small_leaves_whole():
    mesh = mesh_of(2, 4)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *NETWORKS)
    placed = sharding.place(stacked, mesh, split=True)["params"]
    kernel, bias = placed["Conv_0"]["kernel"], placed["Dense_0"]["bias"]
    assert kernel.shape == (2, 3, 3, 2, 8)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 3, 3, 2, 2)}
    assert {shard.data.shape for shard in bias.addressable_shards} == {(2, 1)}
    specs = sharding.network_specs({"odd": jnp.ones((3, 5)), "none": jnp.ones(())}, mesh)
    assert specs == {"odd": PartitionSpec(), "none": PartitionSpec()}
    chex.assert_trees_all_equal(placed, stacked["params"])
    parents = problem_of(2, 4).parents["params"]["Conv_0"]["kernel"]
    assert {shard.data.shape for shard in parents.addressable_shards} == {(2, 3, 3, 2, 2)}


# Merges ---------------------------------------------------------------------------------------


def merged(devices, generations=4, state=None, **options):
    return mj.merge(
        jax.random.key(0),
        apply_fn,
        NETWORKS,
        (IMAGES, LABELS),
        evolution=mj.EvolutionConfig(population_size=10, generations=generations),
        align=mj.AlignConfig(method="none"),
        fitness=mj.FitnessConfig(metric="accuracy", devices=devices, **options),
        state=state,
    )


@pytest.fixture(scope="module")
def one():
    return merged(1)


def test_a_merge_finds_the_same_network_on_eight_devices_as_on_one(one):
    eight = merged(8)
    assert one.problem.layout.mesh is None
    assert eight.problem.layout.plain()["mesh"] == {"population": 8, "network": 1}
    chex.assert_trees_all_equal(one.variables, eight.variables)
    chex.assert_trees_all_equal(one.state, eight.state)
    assert one.history.best.tolist() == eight.history.best.tolist()
    assert one.fitness == eight.fitness
    np.testing.assert_array_equal(one.parent_fitness, eight.parent_fitness)


@pytest.mark.slow
def test_a_merge_with_networks_over_two_devices(one):
    assert merged("all", devices_per_network=2).fitness == one.fitness


@pytest.mark.slow
def test_a_search_goes_on_from_the_state_of_another_number_of_devices(one):
    reached = jax.device_get(merged(4).state)  # as a checkpoint holds it
    ends = [
        merged(devices, generations=8, state=state)
        for devices, state in ((1, one.state), (1, reached), (8, reached))
    ]
    assert int(ends[0].state.generation) == 8
    chex.assert_trees_all_equal(ends[0].state, ends[1].state)
    chex.assert_trees_all_equal(ends[0].state, ends[2].state)


def test_nothing_is_traced_again_between_generations():
    """The network is traced for the first population and for a generation, and their shapes."""
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(lambda variables, x: NET.apply(variables, x), n=20)
    problem = replace(problem_of(8), networks=(counted,))
    search = search_of(problem, mj.EvolutionConfig(population_size=10))
    state = started(search, jnp.asarray(GENES[:10]), problem)
    programs = []

    def watch(state, infos):
        programs.append(loop._generations._cache_size())

    limits = loop.Limits(6, per_call=1)
    loop.run(jax.random.key(2), search, state, problem, limits, callback=watch)
    assert len(programs) == 6
    assert len(set(programs)) == 1


# The mesh -------------------------------------------------------------------------------------


def layout(size=10, **options):
    config = mj.FitnessConfig(**options)
    return choose_layout(apply_fn, NETWORKS[0], IMAGES, config, size)


def test_the_layout_has_the_mesh_that_the_configuration_asks_for():
    def mesh(size=10, **options):
        return layout(size, **options).plain()["mesh"]

    assert mesh() is None
    assert mesh(devices=1) is None
    assert mesh(devices="all") == {"population": 8, "network": 1}
    assert mesh(devices=6, devices_per_network=3) == {"population": 2, "network": 3}
    assert mesh(devices_per_network=2) == {"population": 4, "network": 2}  # `auto` is then all


def test_more_devices_than_individuals_are_left_idle():
    assert layout(3, devices=8).plain()["mesh"] == {"population": 3, "network": 1}
    found = layout(3, devices="all", devices_per_network=2).plain()["mesh"]
    assert found == {"population": 3, "network": 2}
    few = mj.merge(
        jax.random.key(0),
        linear,
        FOUR[:2],
        POINTS,
        align=mj.AlignConfig(method="none"),
        fitness=mj.FitnessConfig(devices="all"),
        evolution=mj.EvolutionConfig(population_size=3, generations=1),
    )
    assert few.problem.layout.plain()["mesh"] == {"population": 3, "network": 1}
    devices = {device for leaf in jax.tree.leaves(few.problem) for device in leaf.devices()}
    assert len(devices) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, "fitness.devices is 0: it must be at least 1"),
        ({"devices": "many"}, "fitness.devices is 'many'"),
        ({"devices": 9}, "fitness.devices is 9: there are only 8"),
        (
            {"devices": 1, "devices_per_network": 2},
            "devices_per_network is 2: it must divide the 1 of",
        ),
        ({"devices": 8, "devices_per_network": 3}, "is 3: it must divide the 8 of fitness.devices"),
        (
            {"devices": "all", "devices_per_network": 3},
            "is 3: it must divide the 8 of fitness.devices",
        ),
    ],
)
def test_devices_that_cannot_work_are_one_line(options, message):
    with pytest.raises(mj.ConfigError, match=message) as caught:
        layout(**options)
    assert "\n" not in str(caught.value)


# Beside a merge -------------------------------------------------------------------------------

FOUR = [RNG.normal(size=(5, 4)).astype(np.float32) for _ in range(4)]
POINTS = RNG.normal(size=(30, 5)).astype(np.float32), RNG.integers(0, 4, 30)
SHORT = mj.EvolutionConfig(population_size=6, generations=3)


def linear(weights, inputs):
    return inputs @ weights


@pytest.mark.slow
def test_baselines_search_on_the_same_devices():
    def searched(devices):
        results = mj.run_baselines(
            jax.random.key(0),
            apply_fn,
            NETWORKS,
            (IMAGES, LABELS),
            config=mj.BaselinesConfig(names=("line", "random_search"), budget=24),
            fitness=mj.FitnessConfig(metric="accuracy", devices=devices),
            evolution=mj.EvolutionConfig(population_size=10, generations=2),
        )
        return {name: (result.variables, result.detail) for name, result in results.items()}

    chex.assert_trees_all_equal(searched(1), searched(8))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 6])
def test_a_tree_of_searches(chunk):
    def tree(devices):
        config = mj.FitnessConfig(metric="accuracy", devices=devices, population_chunk=chunk)
        key = jax.random.key(0)
        return mj.merge_tree(key, linear, FOUR, POINTS, fitness=config, evolution=SHORT)

    one, four = tree(1), tree(4)
    chex.assert_trees_all_equal(one.variables, four.variables)
    assert one.fitness == four.fitness


@pytest.mark.slow
def test_parents_that_are_scored_beside_the_search():
    def searched(devices):
        config = mj.FitnessConfig(metric="accuracy", devices=devices)
        genome = mj.GenomeConfig(kind="weights", parents_first=False)
        return mj.merge(
            jax.random.key(0),
            linear,
            FOUR,
            POINTS,
            align=mj.AlignConfig(method="none"),
            genome=genome,
            fitness=config,
            evolution=SHORT,
        )

    found = searched(8)
    right = [((POINTS[0] @ weights).argmax(-1) == POINTS[1]).mean() for weights in FOUR]
    np.testing.assert_allclose(found.parent_fitness, right, rtol=1e-6)
    np.testing.assert_array_equal(found.variables, searched(1).variables)


def test_the_configuration_keeps_the_devices():
    config = mj.FitnessConfig(devices="all", devices_per_network=2)
    assert mj.FitnessConfig(**config.model_dump()) == config
    assert mj.FitnessConfig(devices="4").devices == 4
    assert mj.FitnessConfig().devices == "auto"


# The command line -----------------------------------------------------------------------------

RUN = {
    "data": {"validation_fraction": 0.3},
    "model": {"options": {"width": 4}},
    "training": {"epochs": 2},
    "evolution": {"population_size": 6, "generations": 5},
    "baselines": {"names": ()},
    "robustness": {"enabled": False},
}


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_of_another_number_of_devices(tmp_path, capsys):
    from rich.console import Console

    from megajax.io import read_json
    from megajax.run import pipeline
    from megajax.run import store as workdir

    def on_devices(devices):
        return mj.Config(**RUN, fitness={"metric": "accuracy", "devices": devices})

    whole = pipeline.run(on_devices(1), tmp_path / "whole")
    metrics = tmp_path / "four" / workdir.METRICS

    def stopping():
        return metrics.exists() and len(metrics.read_text().splitlines()) == 3

    with pytest.raises(mj.errors.Interrupted, match="saved after generation 2"):
        pipeline.run(on_devices(4), tmp_path / "four", stopping=stopping)
    with pytest.raises(mj.WorkdirError, match=r"fitness\.devices is 4 there, 8 here"):
        pipeline.run(on_devices(8), tmp_path / "four")
    for devices in (1, 8):
        folder = tmp_path / str(devices)
        results = pipeline.run(on_devices(devices), folder, Console(), origin=tmp_path / "four")
        assert "merging goes on after generation 2" in capsys.readouterr().out
        assert results["merged"] == whole["merged"]
        chex.assert_trees_all_equal(
            mj.load_network(folder / "merged"),
            mj.load_network(tmp_path / "whole" / "merged"),
        )
    mesh = read_json(tmp_path / "8" / workdir.RESULTS)["plan"]["mesh"]
    assert mesh == {"population": 6, "network": 1}  # no more devices than individuals
