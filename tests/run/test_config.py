"""The configuration: one default, one check, one clear line for each field."""

import dataclasses

import jax.numpy as jnp
import pytest

from megajax.config import (
    Config,
    EvolutionConfig,
    FitnessConfig,
    default_config,
    from_dict,
    smoke,
    to_dict,
)
from megajax.errors import ConfigError


def test_defaults_survive_the_round_trip_through_the_editable_form():
    assert from_dict(default_config().to_dict()) == Config()
    assert from_dict(to_dict(Config())) == Config()


def test_lists_and_numbers_as_text_are_taken_where_they_are_meant():
    config = from_dict(
        {
            "evolution": {"crossover": ["uniform"], "time_budget": 5},
            "fitness": {"population_chunk": "8"},
        }
    )
    assert config.evolution.crossover == ("uniform",)
    assert config.fitness.population_chunk == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"evolutoin": {}}, "evolutoin is no field .* did you mean evolution?"),
        ({"evolution": {"population": 3}}, "evolution.population is no field"),
        ({"evolution": 3}, "evolution is 3: it is a section"),
        (
            {"evolution": {"population_size": "64x"}},
            "evolution.population_size is '64x' of type str",
        ),
        ({"evolution": {"population_size": 2.5}}, "evolution.population_size is 2.5 of type float"),
        ({"evolution": {"population_size": True}}, "population_size is True of type bool"),
        ({"evolution": {"population_size": 3, "elites": 3}}, "at least 4 \\(elites \\+ 1\\)"),
        ({"evolution": {"tournament_size": 99}}, "evolution.tournament_size is 99: .* 32"),
        (
            {"evolution": {"crossover": "swap"}},
            "evolution.crossover is 'swap': choose one of arith",
        ),
        (
            {"evolution": {"crossover": ("uniform", "swap")}},
            "evolution.crossover is .* choose from",
        ),
        ({"evolution": {"crossover": ()}}, "evolution.crossover is \\(\\): at least one"),
        (
            {"evolution": {"mutation_rate": 1.5}},
            "evolution.mutation_rate is 1.5: .* between 0 and 1",
        ),
        ({"evolution": {"generations": -1}}, "evolution.generations is -1: it must be at least 0"),
        ({"fitness": {"metric": "f1"}}, "fitness.metric is 'f1'"),
        ({"fitness": {"population_chunk": 0}}, "fitness.population_chunk is 0"),
        ({"fitness": {"population_chunk": "all"}}, "fitness.population_chunk is 'all'"),
        ({"genome": {"granularity": "neuron"}}, "genome.granularity is 'neuron'"),
        ({"parents": {"count": 1}}, "parents.count is 1: at least two parents"),
        ({"parents": {"paths": ["a"]}}, "parents.paths is \\('a',\\): at least two paths"),
        (
            {"parents": {"paths": ["a", "b"], "count": 3}},
            "parents.count is 3: parents.paths names 2",
        ),
        ({"parents": {"keep": [["head", 2]]}}, "parents.keep is .* the parents are 0 to 1"),
        ({"parents": {"keep": [["head", "0"]]}}, "of type tuple: tuple.tuple.str, int., .... is"),
        ({"parents": {"keep": [["(", 0]]}}, "parents.keep is .* is no regular expression"),
        ({"parents": {"rename": [["a", "b"]]}}, "parents.rename is .* parents.paths is empty"),
        ({"parents": {"skew": -0.1}}, "parents.skew is -0.1"),
        ({"training": {"augment": ("blur",)}}, "training.augment is \\('blur',\\)"),
        ({"data": {"name": ""}}, "data.name is ''"),
        ({"hierarchy": {"odd": "keep"}}, "hierarchy.odd is 'keep': choose one of carry, drop"),
        ({"hierarchy": {"nodes_at_once": "all"}}, "hierarchy.nodes_at_once is 'all'"),
        ({"hierarchy": {"nodes_at_once": 0}}, "hierarchy.nodes_at_once is 0"),
        ({"finetune": {"epochs": -1}}, "finetune.epochs is -1"),
        ({"seed": -1}, "config.seed is -1"),
    ],
)
def test_a_value_that_cannot_work_is_one_line_with_the_fields_name(values, message):
    with pytest.raises(ConfigError, match=message) as error:
        from_dict(values)
    assert "\n" not in str(error.value)


def test_parents_from_files_are_counted():
    values = {"paths": ["a", "b", "c"], "keep": [["head", 2]], "rename": [["fc", "head"]]}
    config = from_dict({"parents": values})
    assert config.parents.count == 3
    assert dict(config.parents.keep) == {"head": 2}
    assert from_dict(to_dict(config)) == config


def test_functions_take_the_place_of_names():
    assert FitnessConfig(metric=lambda logits, labels: jnp.ones(len(labels))).metric is not None
    assert EvolutionConfig(selection=max).selection is max
    assert to_dict(EvolutionConfig(selection=max))["selection"] == "builtins.max"


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EvolutionConfig().elites = 3


LARGE = {
    "smoke": True,
    "parents": {"count": 12},
    "training": {"epochs": 200, "warmup_epochs": 20},
    "evolution": {"population_size": 100, "elites": 40, "tournament_size": 50},
}


def numbers(values):
    for value in values.values():
        if isinstance(value, dict):
            yield from numbers(value)
        elif isinstance(value, (int, float)):
            yield value


def test_smoke_makes_nothing_larger_and_its_result_is_valid_and_stays():
    small = from_dict(LARGE)
    full = from_dict(LARGE | {"smoke": False})
    assert smoke(full) == small == smoke(small) == from_dict(to_dict(small))
    assert small.parents.count == 12
    assert small.evolution.population_size == 14  # all parents, their mean and one more
    before, after = to_dict(full), to_dict(small)
    for section in ("training", "recalibrate", "evolution"):
        pairs = zip(numbers(before[section]), numbers(after[section]), strict=True)
        assert all(new <= old for old, new in pairs)
    assert small.data.limit == 512
    assert small.training.warmup_epochs < small.training.epochs


def test_smoke_leaves_what_is_small_already():
    tiny = {
        "data": {"limit": 20},
        "model": {"name": "resnet", "options": {"width": 2, "depth": "8"}},
        "training": {"epochs": 1, "batch_size": 4},
        "recalibrate": {"examples": 8},
        "evolution": {"population_size": 4, "generations": 1},
    }
    small, same = from_dict(tiny | {"smoke": True}), from_dict(tiny)
    for section in tiny:
        assert getattr(small, section) == getattr(same, section)
