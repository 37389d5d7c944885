"""The population over simulated devices: whatever their number, the result is that of one."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from rich.console import Console

import megajax as mj
from megajax import io
from megajax.config import FitnessConfig, RecalibrateConfig
from megajax.merging import devices as sharding
from megajax.merging import fitness
from megajax.merging.genome import masks, recalibrated
from megajax.merging.plans import plan_evaluation
from megajax.run import pipeline
from megajax.run import store as workdir
from megajax.run.config import Config, from_dict, to_dict
from megajax.search import genetic as evolution
from megajax.trees import stack_parents


class Net(nn.Module):
    """A convolution, BatchNorm and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)))
        return nn.Dense(4)(x.mean((1, 2)))


RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(37, 6, 6, 2)).astype(np.float32)
LABELS = RNG.integers(0, 4, 37)
NETWORKS = [Net().init(jax.random.key(k), IMAGES) for k in range(2)]
PARENTS = stack_parents(NETWORKS)
GENOME = masks(PARENTS, granularity="leaf")
DATA = fitness.batches(IMAGES, LABELS, 10)
SMOOTH = fitness.negative_cross_entropy


def mesh_of(population, network=1):
    grid = np.array(jax.devices()[: population * network]).reshape(population, network)
    return jax.sharding.Mesh(grid, ("population", "network"))


def evaluate(mesh, *, metric=fitness.accuracy, size=8, chunk=1, genome=GENOME, **options):
    context = options.pop("context", PARENTS)
    evaluator = fitness.evaluator(
        genome.express,
        Net().apply,
        metric,
        context,
        DATA,
        population_chunk=chunk,
        mesh=mesh,
        **options,
    )
    genes = GENOME.init(jax.random.key(3), size)
    return jax.jit(lambda evaluator, genes: evaluator(genes))(evaluator, genes)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("size", [8, 11])
def test_accuracy_is_equal_on_any_number_of_devices(devices, chunk, size):
    alone, _ = evaluate(None, chunk=chunk, size=size)
    values, aux = evaluate(mesh_of(devices), chunk=chunk, size=size)
    np.testing.assert_array_equal(values, alone)
    assert values.shape == (size,)
    assert aux == ()
    assert values.sharding.is_fully_replicated


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [8, 11])
def test_cross_entropy_is_equal_to_the_bit_one_by_one(devices, size):
    alone, _ = evaluate(None, metric=SMOOTH, size=size)
    np.testing.assert_array_equal(evaluate(mesh_of(devices), metric=SMOOTH, size=size)[0], alone)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_cross_entropy_side_by_side_is_equal_but_for_rounding(devices):
    alone, _ = evaluate(None, metric=SMOOTH, chunk=3, size=11)
    values, _ = evaluate(mesh_of(devices), metric=SMOOTH, chunk=3, size=11)
    np.testing.assert_allclose(values, alone, rtol=1e-6)


def test_a_population_smaller_than_the_mesh():
    alone, _ = evaluate(None, size=4)
    np.testing.assert_array_equal(evaluate(mesh_of(8), size=4)[0], alone)


def test_right_and_wrong_of_every_example():
    _, alone = evaluate(None, size=5, per_example=True)
    values, right = evaluate(mesh_of(4), size=5, per_example=True)
    assert right.shape == (5, 37)
    np.testing.assert_array_equal(right, alone)
    np.testing.assert_allclose(values, np.mean(right, axis=1), rtol=1e-6)


def test_recalibrated_networks():
    options = {
        "genome": recalibrated(GENOME, Net().apply),
        "context": (PARENTS, jnp.asarray(IMAGES[:20])),
        "metric": SMOOTH,
    }
    alone, _ = evaluate(None, **options)
    np.testing.assert_allclose(evaluate(mesh_of(4), **options)[0], alone, rtol=1e-6)
    assert not np.allclose(alone, evaluate(None, metric=SMOOTH)[0], rtol=1e-3)


@pytest.mark.parametrize("shape", [(1, 2), (2, 2), (2, 4)])
@pytest.mark.parametrize("chunk", [1, 3])
def test_networks_over_several_devices(shape, chunk):
    mesh = mesh_of(*shape)
    alone, _ = evaluate(None, metric=SMOOTH, chunk=chunk, size=5)
    np.testing.assert_allclose(
        evaluate(mesh, metric=SMOOTH, chunk=chunk, size=5)[0], alone, rtol=1e-5
    )


def test_parents_lie_in_parts_and_small_leaves_whole():
    mesh = mesh_of(2, 4)
    placed = sharding.place(PARENTS, mesh, split=True)["params"]
    kernel, bias = placed["Conv_0"]["kernel"], placed["Dense_0"]["bias"]
    assert kernel.shape == (2, 3, 3, 2, 8)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 3, 3, 2, 2)}
    assert {shard.data.shape for shard in bias.addressable_shards} == {(2, 1)}
    specs = sharding.network_specs({"odd": jnp.ones((3, 5)), "none": jnp.ones(())}, mesh)
    assert specs == {"odd": PartitionSpec(), "none": PartitionSpec()}
    chex.assert_trees_all_equal(placed, PARENTS["params"])


def merged(devices, **options):
    sections = {
        "evolution": mj.EvolutionConfig(population_size=10, generations=4),
        "align": mj.AlignConfig(method="none"),
        "fitness": FitnessConfig(metric="accuracy", devices=devices, **options),
    }
    return mj.merge(jax.random.key(0), Net().apply, NETWORKS, (IMAGES, LABELS), **sections)


def test_a_merge_finds_the_same_network_on_eight_devices_as_on_one():
    one, eight = merged(1), merged(8)
    assert one.plan.mesh is None
    assert eight.plan.plain()["mesh"] == {"population": 8, "network": 1}
    chex.assert_trees_all_equal(one.variables, eight.variables)
    chex.assert_trees_all_equal(one.state, eight.state)
    assert one.history.best.tolist() == eight.history.best.tolist()
    assert one.fitness == eight.fitness


@pytest.mark.slow
def test_a_merge_with_networks_over_two_devices():
    assert merged("all", devices_per_network=2).fitness == merged(1).fitness


@pytest.mark.slow
def test_a_search_goes_on_from_the_state_of_another_number_of_devices():
    whole = merged(1)
    reached = jax.device_get(merged(4).state)  # as a checkpoint holds it
    sections = {
        "evolution": mj.EvolutionConfig(population_size=10, generations=8),
        "align": mj.AlignConfig(method="none"),
    }
    ends = [
        mj.merge(
            jax.random.key(0),
            Net().apply,
            NETWORKS,
            (IMAGES, LABELS),
            fitness=FitnessConfig(metric="accuracy", devices=devices),
            state=state,
            **sections,
        )
        for devices, state in ((1, whole.state), (1, reached), (8, reached))
    ]
    assert int(ends[0].state.generation) == 8
    chex.assert_trees_all_equal(ends[0].state, ends[1].state)
    chex.assert_trees_all_equal(ends[0].state, ends[2].state)


def test_nothing_is_traced_again_between_generations():
    """The network is traced for `init`, for the first chunk and for the shapes of both, no more."""
    chex.clear_trace_counter()
    evaluator = fitness.evaluator(
        GENOME.express,
        chex.assert_max_traces(lambda variables, x: Net().apply(variables, x), n=3),
        fitness.accuracy,
        PARENTS,
        DATA,
        population_chunk=1,
        mesh=mesh_of(8),
    )
    ga = evolution.genetic_algorithm(evaluator, num_offspring=10)
    state = ga.init(jax.random.key(0), GENOME.init(jax.random.key(1), 10))
    programs = []

    def watch(state, infos):
        programs.append(evolution._run_chunk._cache_size())

    evolution.run(jax.random.key(2), ga, state, 6, generations_per_chunk=1, callback=watch)
    assert len(programs) == 6
    assert len(set(programs)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("side_by_side", [True, False])
def test_several_searches_in_one_program(side_by_side):
    chunk = 10 if side_by_side else 1

    def searches(mesh):
        evaluator = fitness.evaluator(
            GENOME.express,
            Net().apply,
            fitness.accuracy,
            PARENTS,
            DATA,
            population_chunk=chunk,
            mesh=mesh,
        )
        ga = evolution.genetic_algorithm(evaluator, num_offspring=10)
        keys = list(jax.random.split(jax.random.key(0)))
        genes = [GENOME.init(key, 10) for key in keys]
        states = evolution.init_many(keys, [ga, ga], genes, side_by_side=side_by_side)
        return evolution.run_many(keys, [ga, ga], states, [2, 3], side_by_side=side_by_side)[0]

    chex.assert_trees_all_equal(searches(mesh_of(4)), searches(None))


def test_the_plan_has_the_mesh_that_the_configuration_asks_for():
    def mesh(**options):
        config = FitnessConfig(**options)
        return plan_evaluation(Net().apply, NETWORKS[0], IMAGES, config, 10).plain()["mesh"]

    assert mesh() is None
    assert mesh(devices="all") == {"population": 8, "network": 1}
    assert mesh(devices=6, devices_per_network=3) == {"population": 2, "network": 3}


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
        plan_evaluation(Net().apply, NETWORKS[0], IMAGES, FitnessConfig(**options), 10)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_baselines_search_on_the_same_devices():
    def searched(devices):
        results = mj.run_baselines(
            jax.random.key(0),
            Net().apply,
            NETWORKS,
            (IMAGES, LABELS),
            config=mj.BaselinesConfig(names=("line", "random_search"), budget=24),
            recalibrate=RecalibrateConfig(),
            fitness=FitnessConfig(metric="accuracy", devices=devices),
            evolution=mj.EvolutionConfig(population_size=10, generations=2),
        )
        return {name: (result.variables, result.detail) for name, result in results.items()}

    chex.assert_trees_all_equal(searched(1), searched(8))


def test_the_configuration_keeps_the_devices():
    config = from_dict({"fitness": {"devices": "all", "devices_per_network": 2}})
    assert from_dict(to_dict(config)) == config
    assert from_dict({"fitness": {"devices": "4"}}).fitness.devices == 4
    assert Config().fitness.devices == "auto"


FOUR = [RNG.normal(size=(5, 4)).astype(np.float32) for _ in range(4)]
POINTS = RNG.normal(size=(30, 5)).astype(np.float32), RNG.integers(0, 4, 30)
SHORT = mj.EvolutionConfig(population_size=6, generations=3)


def linear(weights, inputs):
    return inputs @ weights


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 6])
def test_a_tree_of_searches(chunk):
    def tree(devices):
        config = FitnessConfig(metric="accuracy", devices=devices, population_chunk=chunk)
        key = jax.random.key(0)
        return mj.merge_tree(key, linear, FOUR, POINTS, fitness=config, evolution=SHORT)

    one, four = tree(1), tree(4)
    chex.assert_trees_all_equal(one.variables, four.variables)
    assert one.fitness == four.fitness


@pytest.mark.slow
def test_parents_that_are_scored_beside_the_search():
    def searched(devices):
        config = FitnessConfig(metric="accuracy", devices=devices)
        genome = mj.GenomeConfig(kind="weights", parents_first=False)
        key = jax.random.key(0)
        return mj.merge(key, linear, FOUR, POINTS, genome=genome, fitness=config, evolution=SHORT)

    found = searched(8)
    right = [((POINTS[0] @ weights).argmax(-1) == POINTS[1]).mean() for weights in FOUR]
    np.testing.assert_allclose(found.parent_fitness, right, rtol=1e-6)
    np.testing.assert_array_equal(found.variables, searched(1).variables)


RUN = {
    "data": {"validation_fraction": 0.3},
    "model": {"options": {"width": 4}},
    "training": {"epochs": 2},
    "fitness": {"metric": "accuracy"},
    "evolution": {"population_size": 6, "generations": 5},
    "baselines": {"names": ()},
    "robustness": {"enabled": False},
}


def on_devices(devices):
    return from_dict(RUN | {"fitness": {"metric": "accuracy", "devices": devices}})


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_of_another_number_of_devices(tmp_path, capsys):
    whole = pipeline.run(on_devices(1), tmp_path / "whole")
    metrics = tmp_path / "four" / workdir.METRICS

    def stopping():
        return metrics.exists() and len(io.read_lines(metrics)) == 3

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
    mesh = io.read_json(tmp_path / "8" / workdir.RESULTS)["plan"]["mesh"]
    assert mesh == {"population": 8, "network": 1}
