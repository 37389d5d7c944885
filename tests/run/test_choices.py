"""What cannot work is refused before anything is trained, and leaves nothing behind."""

import json

import jax.numpy as jnp
import pytest

import megajax as mj
from megajax.run import pipeline
from megajax.run import store as workdir
from megajax.run.config import from_dict
from megajax.zoo import training

SMALL = {
    "data": {"validation_fraction": 0.3, "limit": 60},
    "model": {"name": "mlp", "options": {"hidden": (4,)}},
    "training": {"epochs": 1},
    "align": {"method": "none"},
    "evolution": {"population_size": 6, "generations": 1},
    "baselines": {"names": ()},
    "robustness": {"enabled": False},
}


def config(**changes):
    return from_dict(
        {name: SMALL.get(name, {}) | changes.get(name, {}) for name in SMALL | changes}
    )


def no_score(logits, labels):
    return jnp.mean(logits)


def fails(logits, labels):
    return logits @ labels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evolution": {"evaluation_budget": 5}}, "evaluation_budget is 5: the first popul"),
        (
            {"evolution": {"evaluation_budget": 11}, "parents": {"count": 3},
             "hierarchy": {"enabled": True}},
            "evolution.evaluation_budget is 11: the first populations of 2 nodes alone need 12",
        ),
        ({"fitness": {"racing_examples": 61}}, "racing_examples is 61: there are only 60 v"),
        ({"fitness": {"devices": 99}}, "fitness.devices is 99: there are only 8"),
        ({"fitness": {"metric": no_score}}, r"metric no_score of .* gives \(\) for 2 examples"),
        ({"fitness": {"metric": fails}}, "metric fails of .* does not take outputs"),
        (
            {"baselines": {"names": "random_search", "budget": 5}},
            "baselines.budget is 5: the first population alone of random_search needs 6",
        ),
        ({"baselines": {"names": "ties"}}, "baselines.names has 'ties', which needs a base netw"),
        ({"recalibrate": {"enabled": True}}, "recalibrate.enabled is True: the network has no Bat"),
        ({"align": {"reference": 2, "method": "weights"}}, "align.reference is 2: the parents are"),
        ({"training": {"warmup_epochs": 1.0}}, "training.warmup_epochs is 1.0: it must be below"),
        ({"genome": {"freeze": "nothing"}}, "genome.freeze is 'nothing': it matches no"),
        ({"evolution": {"population_size": 2, "tournament_size": 2}}, "2 parents and their mean"),
    ],
)  # fmt: skip
def test_a_choice_that_cannot_work_is_refused_before_training(
    changes, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "train", None)  # would fail if called
    monkeypatch.setattr(training, "init", None)
    with pytest.raises(mj.ConfigError, match=message) as error:
        pipeline.run(config(**changes), tmp_path / "w")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "w").exists()


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(mj.WorkdirError, match="is neither empty nor the workdir of a run: choose"):
        pipeline.run(config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_that_failed_before_its_first_outcome_does_not_refuse_the_corrected_one(tmp_path):
    with pytest.raises(mj.InterchangeError, match="does not exist"):
        pipeline.run(config(parents={"paths": ["nowhere", "neither"]}), tmp_path)
    with pytest.raises(mj.Interrupted, match="after epoch 1"):
        pipeline.run(
            config(training={"epochs": 2}), tmp_path, stopping=iter([False, True]).__next__
        )
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["config"]["training"]["epochs"] == 2
    with pytest.raises(mj.WorkdirError, match=r"training.epochs is 2 there, 1 here"):
        pipeline.run(config(), tmp_path)


def test_the_workdir_says_what_its_bits_depend_on(tmp_path, caplog):
    with pytest.raises(mj.Interrupted):
        pipeline.run(
            config(training={"epochs": 2}), tmp_path, stopping=iter([False, True]).__next__
        )
    there = workdir.read_config(tmp_path)
    assert {"megajax", "jax", "jaxlib", "flax", "numpy"} <= set(there["versions"])
    assert (there["device"]["number"], there["x64"], there["prng"]) == (8, False, "threefry2x32")
    there |= {"cores": 99, "x64": True, "versions": there["versions"] | {"numpy": "1.0"}}
    workdir.write_config(tmp_path, there["config"], there)
    with pytest.raises(mj.Interrupted):
        pipeline.run(config(training={"epochs": 2}), tmp_path, stopping=lambda: True)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 3
    for name in ("versions.numpy 1.0", "cores 99", "x64 True"):
        assert any(f"was started with {name}, and goes on with " in line for line in told)
