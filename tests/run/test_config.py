"""The configuration: one default, one check, one clear line for each field."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from megajax.alignment import AlignConfig
from megajax.errors import ConfigError
from megajax.merging.problem import FitnessConfig
from megajax.run.config import Config, from_dict, override, smoke, to_dict
from megajax.search.methods import EvolutionConfig
from megajax.sections import fields
from megajax.zoo.training import OPTIMIZERS, TrainingConfig


def test_defaults_survive_the_round_trip_through_json():
    assert from_dict(json.loads(json.dumps(to_dict(Config())))) == Config()
    assert hash(Config()) == hash(Config().replace(seed=1).replace(seed=0))


def test_lists_and_numbers_as_text_are_taken_where_they_are_meant():
    config = from_dict(
        {
            "evolution": {"crossover": ["uniform"], "time_budget": 5},
            "fitness": {"population_chunk": "8"},
        }
    )
    assert config.evolution.crossover == ("uniform",)
    assert config.fitness.population_chunk == 8
    assert EvolutionConfig(population_size=np.int64(8)).population_size == 8
    assert type(EvolutionConfig(time_budget=np.float32(0.5)).time_budget) is float
    assert AlignConfig(reference=jnp.int32(1)).reference == 1


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("align.reference", "mean", "mean"),
        ("align.reference", "1", 1),
        ("align.method", "none", "none"),
        ("genome.freeze", "None", None),
        ("genome.freeze", "head", "head"),
        ("genome.freeze", "12", "12"),
        ("evolution.crossover", "uniform", "uniform"),
        ("evolution.mutation", "gaussian,reset", ("gaussian", "reset")),
        ("evolution.mutation", "None", None),
        ("evolution.mutation_rate", "1e-3", 1e-3),
        ("evolution.time_budget", "5", 5.0),
        ("fitness.devices", "all", "all"),
        ("fitness.devices", "4", 4),
        ("baselines.names", "ties, dare", ("ties", "dare")),
        ("baselines.names", "all", "all"),
        ("baselines.names", "()", ()),
        ("training.augment", "flip", ("flip",)),
        ("training.augment", "", ()),
        ("robustness.severities", "1,3", (1, 3)),
        ("robustness.severities", "5", (5,)),
        ("parents.keep", "[['head', 1]]", (("head", 1),)),
        ("recalibrate.enabled", "true", True),
        ("recalibrate.enabled", "False", False),
        ("data.name", "123", "123"),
        ("data.data_dir", "/a,b", "/a,b"),
    ],
)
def test_a_text_is_what_its_field_takes(field, text, value):
    section, name = field.split(".")
    found = getattr(getattr(override(Config(), {field: text}), section), name)
    assert found == value
    assert type(found) is type(value)


def test_options_of_the_network_are_added_one_by_one():
    config = Config(model={"options": {"width": 8}})
    changes = {"model.options.depth": "20", "model.options.norm": "none", "model.name": "resnet"}
    options = {"width": 8, "depth": 20, "norm": "none"}
    assert override(config, changes).model.options == options
    with pytest.raises(
        ConfigError, match=r"evolution.population_size is 'many': a whole number is"
    ):
        override(config, {"evolution.population_size": "many"})
    with pytest.raises(
        ConfigError, match=r"model.option.width is not a field|did you mean model.opti"
    ):
        override(config, {"model.option.width": "4"})


def test_a_home_folder_may_be_written_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = from_dict({"data": {"data_dir": "~/d"}, "parents": {"paths": ["~/a", "b"]}})
    assert (config.data.data_dir, config.parents.paths) == ("/home/me/d", ("/home/me/a", "b"))


def test_what_is_added_to_a_registry_can_be_chosen(monkeypatch):
    with pytest.raises(ConfigError, match=r"training.optimizer is 'mine': choose one of sgd, adam"):
        TrainingConfig(optimizer="mine")
    monkeypatch.setitem(OPTIMIZERS, "mine", None)
    assert TrainingConfig(optimizer="mine").optimizer == "mine"


def test_every_field_says_what_it_means():
    assert [field.name for field in fields(Config) if len(field.meaning) < 10] == []
    assert len({field.name for field in fields(Config)}) > 80


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"evolutoin": {}}, "evolutoin is not a field .* did you mean evolution?"),
        ({"evolution": {"population": 3}}, "evolution.population is not a field"),
        ({"evolution": 3}, "evolution is 3: it is a section"),
        (
            {"evolution": {"population_size": "64x"}},
            "evolution.population_size is '64x': a whole number is",
        ),
        (
            {"evolution": {"population_size": 2.5}},
            "evolution.population_size is 2.5: a whole number is",
        ),
        ({"evolution": {"population_size": True}}, "population_size is True: a whole number is"),
        (
            {"evolution": {"population_size": 3, "elites": 3}},
            "population_size is 3: 3 elites leave no child",
        ),
        ({"evolution": {"tournament_size": 99}}, "evolution.tournament_size is 99: .* 32"),
        (
            {"evolution": {"crossover": "swap"}},
            "evolution.crossover is 'swap': choose one of arith",
        ),
        (
            {"evolution": {"crossover": ("uniform", "swap")}},
            "evolution.crossover is .* choose one of arith",
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
        (
            {"parents": {"keep": [["head", "0"]]}},
            "keep is .* \\(\\(a text, a whole number\\), ...\\) is needed",
        ),
        ({"parents": {"keep": [["(", 0]]}}, "parents.keep is .* is not a regular expression"),
        ({"parents": {"rename": [["a", "b"]]}}, "parents.rename is .* parents.paths is empty"),
        ({"parents": {"skew": -0.1}}, "parents.skew is -0.1"),
        ({"training": {"augment": ("blur",)}}, "training.augment is \\('blur',\\)"),
        ({"data": {"name": ""}}, "data.name is ''"),
        ({"hierarchy": {"odd": "keep"}}, "hierarchy.odd is 'keep': 'carry' or 'drop' is needed"),
        ({"finetune": {"epochs": -1}}, "finetune.epochs is -1"),
        ({"seed": -1}, "^seed is -1: it must be at least 0"),
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


def test_a_function_is_known_by_what_it_does(tmp_path):
    """An edited metric of the same name is another one; where it stands does not matter."""

    def identity(source, shift=1, file="a"):
        path = tmp_path / f"{file}{len(source)}.py"
        path.write_text(source)
        names = {"__name__": "mine"}
        exec(compile(source, str(path), "exec"), names)
        return to_dict(FitnessConfig(metric=names["make"](shift)))["metric"]

    source = "def make(s):\n    def metric(logits, labels):\n        return s\n    return metric\n"
    assert identity(source) == identity(source, file="b") == identity("\n\n" + source)
    assert identity(source).startswith("mine.make.<locals>.metric#")
    edited = source.replace("return s", "return -s")
    different = [identity(source), identity(source, shift=2), identity(edited)]
    assert len(set(different)) == 3
    partials = [functools.partial(max, key=key) for key in (1, 1, 2)]
    first, same, other = (to_dict(FitnessConfig(metric=one))["metric"] for one in partials)
    assert first == same != other


def test_sections_are_frozen():
    with pytest.raises(AttributeError, match=r"frozen: use replace\(elites=...\)"):
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
