"""The command line, end to end on real digits, and each mistake's one clear line."""

import io
import json
import subprocess
import sys
from pathlib import Path

import chex
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import megajax as mj
from megajax.formats import FORMATS
from megajax.run import cli as run
from megajax.run import pipeline
from megajax.run import store as workdir
from megajax.run.config import Config, from_dict, to_dict
from megajax.run.stages import searching
from megajax.run.stages import task as common
from megajax.run.stages.task import held_out, selection_of, stream
from megajax.zoo import data, training
from megajax.zoo import networks as models

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "experiments" / "digits.py")
SMALL = {
    "data": {"validation_fraction": 0.3},
    "model": {"options": {"width": 4}},
    "parents": {"shards": "skewed"},
    "recalibrate": {"enabled": True},
    "training": {"epochs": 2},
    "align": {"method": "activations"},
    "evolution": {"population_size": 8, "generations": 4},
    "baselines": {"names": ("uniform_average", "random_search")},
    "robustness": {"corruptions": ("contrast",), "severities": (5,)},
}
STAGES = ["data", *pipeline.STAGES]


def without_seconds(path):
    results = json.loads((path / "results.json").read_text())
    assert [*results.pop("seconds"), "report"] == STAGES
    return results


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    pipeline.run(from_dict(SMALL), folder)
    return folder


def test_the_workdir_keeps_its_contract(finished):
    results = without_seconds(finished)
    for entry in [*results["parents"], *results["baselines"].values(), results["merged"]]:
        for part in ("validation", "test"):
            assert 0 <= entry[f"{part}_accuracy"] <= 1
            assert entry[f"{part}_nll"] > 0
    assert set(results["baselines"]) == {
        "uniform_average",
        "aligned_uniform_average",
        "random_search",
        "ensemble",
    }
    assert results["baselines"]["random_search"]["evaluations"] == 8 + 4 * 8
    assert set(results["path"]["lines"]) == {"as they are", "aligned", "aligned, recalibrated"}
    assert len(results["alignment_objective"]) == 2
    assert set(results["robustness"]["networks"]) == {
        *("parent_0", "parent_1", "merged"),
        *results["baselines"],
    }
    assert results["merged"]["fitness"] >= max(entry["fitness"] for entry in results["parents"])
    assert results["evaluations"] == 8 + 4 * 8
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["generation"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[-1]["best_ever"] == pytest.approx(results["merged"]["fitness"])
    expected = {"best", "mean", "std", "diversity", "seconds", "evaluations", "invalid"}
    assert expected <= set(lines[0])
    stored = json.loads((finished / "config.json").read_text())
    assert from_dict(stored["config"]) == from_dict(SMALL)
    assert stored["device"]["platform"] == "cpu"
    assert {"jax", "flax", "megajax", "python"} <= set(stored["versions"])
    report = (finished / "report.md").read_text()
    assert f"{100 * results['merged']['test_accuracy']:.1f} %" in report
    assert "parents/0" in (finished / "merged" / "README.md").read_text()
    for name in ("accuracy", "fitness", "mask", "path", "per_class", "robustness"):
        assert f"plots/{name}.png" in report
        with Image.open(finished / "plots" / f"{name}.png") as picture:
            assert min(picture.size) > 200


def test_the_saved_network_has_the_reported_accuracy(finished):
    results = without_seconds(finished)
    config = from_dict(SMALL)
    dataset = data.load(stream(config, "data"), config.data)
    model = models.build("cnn", 10, {"width": 4})
    apply_fn = mj.from_linen(model, {}, train=False).apply_fn
    folders = [finished / "merged", finished / "parents" / "0", finished / "parents" / "1"]
    for folder, entry in zip(folders, [results["merged"], *results["parents"]], strict=True):
        variables = mj.load_network(folder)
        metrics = mj.measure(
            mj.predict(apply_fn, variables, dataset.test.images), dataset.test.labels
        )
        assert metrics.accuracy == entry["test_accuracy"]
        assert metrics.nll == pytest.approx(entry["test_nll"], rel=1e-5)


@pytest.mark.slow
def test_the_same_config_gives_the_same_bits_and_another_seed_others(finished, tmp_path):
    pipeline.run(from_dict(SMALL), tmp_path / "again")
    assert without_seconds(tmp_path / "again") == without_seconds(finished)
    pipeline.run(from_dict(SMALL | {"seed": 1}), tmp_path / "other")
    assert without_seconds(tmp_path / "other")["merged"] != without_seconds(finished)["merged"]


def test_a_finished_run_is_not_run_again_but_shown(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    config = from_dict(SMALL)
    assert pipeline.run(config, finished, Console()) == json.loads(
        (finished / "results.json").read_text()
    )
    assert "is finished; its result was" in capsys.readouterr().out
    narrow = Console(width=60, file=io.StringIO())
    pipeline.run(config, finished, narrow)
    text = narrow.file.getvalue()
    assert "average" in text
    assert "…" not in text  # no word is cut
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_an_interrupted_run_ends_as_an_undisturbed_one(finished, tmp_path, monkeypatch):
    """Interrupted in the middle of the search; the trained parents are kept."""
    calls = []

    def interrupting(path, rows, append=False):
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(searching, "write_lines", interrupting)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(from_dict(SMALL), tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", None)  # would fail if called
        pipeline.run(from_dict(SMALL), tmp_path / "run")
    assert without_seconds(tmp_path / "run") == without_seconds(finished)


TREE = SMALL | {
    "parents": {"count": 3, "shared_initialization": True},
    "hierarchy": {"enabled": True},
    "finetune": {"epochs": 1},
    "fitness": {"select_on_test": True},
    "baselines": {"names": ("task_arithmetic", "greedy_soup")},
    "robustness": {"enabled": False},
    "export": ("safetensors",),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tree"
    pipeline.run(from_dict(TREE), folder)
    return folder


@pytest.mark.slow
def test_a_tree_is_reported_node_by_node_and_fine_tuned_beside_the_best_parent(tree):
    results = without_seconds(tree)
    assert [node["parents"] for node in results["nodes"]] == [[0, 1], [3, 2]]
    assert results["evaluations"] == 2 * (8 + 4 * 8)
    assert results["nodes"][1]["fitness"] == results["merged"]["fitness"]
    assert {"merged_finetuned", "best_parent_finetuned"} <= set(results["baselines"])
    assert {"task_arithmetic", "aligned_greedy_soup"} <= set(results["baselines"])
    lines = [json.loads(line) for line in (tree / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], line["generation"]) for line in lines] == [
        (number, generation) for number in (1, 2) for generation in range(5)
    ]
    assert results["not_held_out"]
    assert "**Selected on the test set" in (tree / "report.md").read_text()
    like = mj.load_network(tree / "merged")
    chex.assert_trees_all_equal(
        mj.load_network(tree / "merged" / FORMATS["safetensors"].files[0], like), like
    )


@pytest.mark.slow
def test_a_tree_that_was_killed_does_not_search_finished_nodes_again(tree, tmp_path, monkeypatch):
    saved = []

    def failing(folder, name, key, outcome):
        save_outcome(folder, name, key, outcome)
        saved.append(name)
        if name == "nodes/1-0":
            raise KeyboardInterrupt

    save_outcome = common.save_outcome
    with monkeypatch.context() as patch:
        patch.setattr(common, "save_outcome", failing)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(from_dict(TREE), tmp_path / "run")
        saved.clear()
        pipeline.run(from_dict(TREE), tmp_path / "run")
    assert saved[0] == "nodes/2-0"
    assert without_seconds(tmp_path / "run") == without_seconds(tree)


@pytest.mark.slow
def test_parents_from_files_with_a_head_of_their_own(finished, tmp_path):
    """Parent 1 has another number of classes; the head is kept from parent 0."""
    first, second = (mj.load_network(finished / "parents" / str(k)) for k in range(2))
    second["params"]["head"] = {"kernel": np.ones((16, 3), "f"), "bias": np.zeros(3, "f")}
    paths = [
        str(mj.save_network(tmp_path / name, variables))
        for name, variables in (("a.safetensors", first), ("b.npz", second))
    ]
    config = SMALL | {
        "parents": {"paths": paths, "keep": (("head", 0),)},
        "baselines": {"names": ()},
        "robustness": {"enabled": False},
    }
    results = pipeline.run(from_dict(config), tmp_path / "run")
    before = without_seconds(finished)["parents"][0]
    for figure in ("test_accuracy", "test_nll", "fitness"):
        assert results["parents"][0][figure] == before[figure]
    merged = mj.load_network(tmp_path / "run" / "merged")
    chex.assert_trees_all_equal(merged["params"]["head"], first["params"]["head"])


def as_it_is(dataset):
    return dataset.validation.images, dataset.validation.labels


def shifted(dataset):
    images, labels = dataset.validation[:2]
    return mj.Task(np.roll(images, 1, axis=2), labels, "accuracy", weight=3.0, name="by a pixel")


@pytest.mark.slow
def test_a_search_is_scored_on_the_tasks_that_a_config_lists(tmp_path):
    quiet = {"baselines": {"names": ("random_search",)}, "robustness": {"enabled": False}}
    config = from_dict(SMALL | quiet | {"fitness": {"tasks": (as_it_is, shifted)}})
    results = pipeline.run(config, tmp_path / "run")
    tasks = results["tasks"]
    assert {name: task["metric"] for name, task in tasks.items()} == {
        "as_it_is": "cross_entropy",
        "by a pixel": "accuracy",
    }
    dataset = data.load(stream(config, "data"), config.data)
    network = mj.from_linen(models.build("cnn", 10, config.model.options), {}, train=False)
    for place, name in (("merged", "merged"), ("parents", "parents/0"), ("parents", "parents/1")):
        variables = mj.load_network(tmp_path / "run" / name)
        scores = [
            mj.measure(mj.predict(network.apply_fn, variables, images), dataset.validation.labels)
            for images in (dataset.validation.images, shifted(dataset).inputs)
        ]
        found = [tasks[task][place] for task in ("as_it_is", "by a pixel")]
        if place == "parents":
            found = [of_task[int(name[-1])] for of_task in found]
        assert found == pytest.approx([-scores[0].nll, scores[1].accuracy], rel=1e-4)
    best = [max(task["parents"]) for task in tasks.values()]
    merged = [task["merged"] for task in tasks.values()]
    each = [(score - most) / abs(most) for score, most in zip(merged, best, strict=True)]
    assert results["merged"]["fitness"] == pytest.approx(0.25 * each[0] + 0.75 * each[1], rel=1e-3)
    test = {name: task["test"] for name, task in tasks.items()}
    variables = mj.load_network(tmp_path / "run" / "merged")
    best = max((0, 1), key=lambda k: results["parents"][k]["fitness"])
    for name, function in (("as_it_is", as_it_is), ("by a pixel", shifted)):
        found = test[name]["networks"]
        assert {"parent_0", "parent_1", "random_search", "ensemble", "merged"} == set(found)
        assert (test[name]["examples"], test[name]["best"]) == (449, f"parent_{best}")
        moved = mj.Task(*function(dataset._replace(validation=dataset.test))[:2])
        measured = mj.measure(mj.predict(network.apply_fn, variables, moved.inputs), moved.targets)
        expected = {"as_it_is": -measured.nll, "by a pixel": measured.accuracy}[name]
        assert found["merged"]["score"] == pytest.approx(expected, rel=1e-4)
        gain = found["merged"]["difference"]
        assert gain["estimate"] == pytest.approx(
            expected - found[f"parent_{best}"]["score"], abs=1e-4
        )
        assert gain["low"] <= gain["estimate"] <= gain["high"]
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"| as_it_is: cross entropy | to parent {best} [95 %] | by a pixel: accuracy |" in report
    assert "| network | as_it_is: cross entropy | by a pixel: accuracy |" in report
    assert "on the tasks as_it_is and shifted" in report
    again = pipeline.run(config, tmp_path / "run")
    assert again["tasks"] == tasks


def test_what_is_held_out_is_made_of_the_test_images():
    dataset = data.load(0, data.DataConfig(limit=40))

    def of_training(dataset):
        return dataset.train.images, dataset.train.labels

    fitness = mj.FitnessConfig(tasks=(as_it_is, of_training, shifted))
    plain, moved = held_out(fitness, dataset, selection_of(fitness, dataset))
    assert (plain.name, moved.name, moved.metric) == ("as_it_is", "by a pixel", "accuracy")
    np.testing.assert_array_equal(plain.inputs, dataset.test.images)
    np.testing.assert_array_equal(moved.inputs, np.roll(dataset.test.images, 1, axis=2))
    np.testing.assert_array_equal(moved.targets, dataset.test.labels)
    for choices, count in (
        ({}, 0),  # these are in every report
        ({"metric": "accuracy"}, 0),
        ({"metric": "distill"}, 0),  # of training images
        ({"metric": "macro_f1"}, 1),
        ({"metric": "macro_f1", "select_on_test": True}, 0),
    ):
        fitness = mj.FitnessConfig(**choices)
        found = held_out(fitness, dataset, selection_of(fitness, dataset))
        assert [one.name for one in found] == ["digits"] * count
        for one in found:
            np.testing.assert_array_equal(one.inputs, dataset.test.images)


def test_tasks_that_cannot_be_are_one_line(tmp_path):
    for function, message in (
        (lambda dataset: dataset.validation.images, "the data is a ndarray: a pair"),
        (lambda dataset: [shifted(dataset)] * 2, r"fitness.tasks: <lambda>\(\) returned 2 tasks"),
    ):
        config = from_dict(SMALL | {"fitness": {"tasks": (function,)}})
        with pytest.raises(mj.DataError, match=message):
            pipeline.run(config, tmp_path / "run")
    with pytest.raises(mj.ConfigError, match=r"select_on_test is True: fitness\.tasks are what"):
        from_dict({"fitness": {"tasks": (shifted,), "select_on_test": True}})


@pytest.mark.slow
def test_the_command_runs_with_overrides(tmp_path):
    command = [
        sys.executable,
        "-m",
        "megajax.run",
        "--config",
        DIGITS,
        "--workdir",
        str(tmp_path / "w"),
    ]
    overrides = ["training.epochs=1", "evolution.generations=2", "model.options.width=4"]
    overrides += ["robustness.enabled=False", "baselines.names=uniform_average"]
    overrides += [
        "evolution.mutation_rate=0.05",
        "genome.freeze=head",
        "fitness.population_chunk=2",
    ]
    done = subprocess.run(
        [*command, *(f"--config.{override}" for override in overrides)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Test accuracy on 449 held-out images: merged" in done.stdout
    config = json.loads((tmp_path / "w" / "config.json").read_text())["config"]
    assert config["evolution"]["mutation_rate"] == 0.05
    assert config["genome"]["freeze"] == "head"
    assert config["fitness"]["population_chunk"] == 2
    assert config["parents"]["shards"] == "skewed"


BROKEN = {
    "syntax": ("def get_config(:\n", "syntax.py, line 1: invalid syntax"),
    "imports": ("x = 1\nimport not_there\n", "imports.py, line 2: ModuleNotFoundError: No module"),
    "absent": ("x = 1\n", "the config file has no function get_config()"),
    "number": (
        "def get_config():\n    return 3\n",
        "get_config() returned int: a megajax.Con",
    ),
    "field": (
        "import megajax as mj\n\n\n"
        "def get_config():\n    return mj.Config(evolution={'populaton_size': 3})\n",
        "evolution.populaton_size is not a field of the configuration; did you mean "
        "evolution.population_size?",
    ),
}


def call(capsys, tmp_path, *arguments):
    """The command's exit code and its error output; nothing may be left behind."""
    folder = tmp_path / "workdir"
    code = run.main(["megajax.run", "--workdir", str(folder), *arguments])
    assert not folder.exists()
    return code, capsys.readouterr().err


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_config_file_is_one_line(name, capsys, tmp_path):
    text, message = BROKEN[name]
    (tmp_path / f"{name}.py").write_text(text)
    code, error = call(capsys, tmp_path, "--config", str(tmp_path / f"{name}.py"))
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.py"], "config file nowhere.py does not exist"),
        ([], "--config FILE is missing"),
        (["--config", DIGITS, "--colour"], "'--colour' is not a flag"),
        (["--config", DIGITS, "--seed", "0:2"], "'--seed' is not a flag; did you mean --seeds?"),
        (["--config"], "argument --config: expected one argument"),
        (
            ["--config", DIGITS, "--config.evolutoin.generations=3"],
            "evolutoin is not a field",
        ),
        (["--config", DIGITS, "--config.align=3"], "align is '3': it is a section with fields"),
        (["--config", f"{DIGITS}:word"], "TypeError: get_config() takes 0 positional arguments"),
        (["--config", DIGITS, "extra"], "'extra' is not a flag"),
        (["--config", DIGITS, "--config.evolution.size=3"], "evolution.size is not a field"),
        (
            ["--config", DIGITS, "--config.evolution.population_size=many"],
            "is 'many': a whole",
        ),
        (
            ["--config", DIGITS, "--config.evolution.population_size=1"],
            "population_size is 1: it must be at least 2",
        ),
        (
            [
                "--config",
                DIGITS,
                "--config.evolution.population_size=2",
                "--config.evolution.tournament_size=2",
            ],
            "2 parents and their mean",
        ),
        (["--config", DIGITS, "--config.parents.count=1"], "parents.count is 1"),
        (["--config", DIGITS, "--config.genome.granularity=x"], "genome.granularity is 'x'"),
        (["--config", DIGITS, "--config.genome.freeze=x"], "genome.freeze is 'x': it matches no"),
        (
            ["--config", DIGITS, "--config.data.validation_fraction=0.0"],
            "validation split: it is e",
        ),
        (["--config", DIGITS, "--config.model.name=x"], "model.name is 'x'"),
        (["--config", DIGITS, "--config.model.options.x=1"], "model.options.x is not an option"),
        (["--config", DIGITS, "--config.data.name=x"], "x is not a data set"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(arguments, message, capsys, tmp_path):
    code, error = call(capsys, tmp_path, *arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_workdir_that_cannot_be_written_or_is_anothers_is_one_line(capsys, tmp_path, finished):
    blocked = tmp_path / "file"
    blocked.write_text("")
    code = run.main(["run", "--config", DIGITS, "--workdir", str(blocked / "w")])
    error = capsys.readouterr().err
    assert code == 2
    assert f"workdir {blocked / 'w'} cannot be written: Not a directory" in error
    code = run.main(["run", "--config", DIGITS, "--workdir", str(finished)])
    error = capsys.readouterr().err
    assert code == 2
    assert "training.epochs is 2 there, 20 here" in error
    assert error.count("\n") == 1


def test_damaged_files_are_named(tmp_path):
    run_folder = tmp_path / "run"
    workdir.write_config(run_folder, to_dict(Config()), {})
    (run_folder / "config.json").write_text('{"config": ')
    workdir.save_outcome(run_folder, "parents", "key", workdir.Outcome())
    with pytest.raises(mj.WorkdirError, match=r"config.json is damaged"):
        workdir.check(run_folder, to_dict(Config()))


# --- several seeds, forks: which runs the flags ask for ------------------------------------------


@pytest.fixture
def called(monkeypatch, tmp_path):
    """Records the runs instead of doing them; those of seed 3 fail."""
    calls = []

    def fake(config, folder, console, *, origin, stopping):
        calls.append((config.seed, str(folder.relative_to(tmp_path)), origin))
        if config.seed == 3:
            raise mj.ParentsError("parent 0: training diverged")
        parent = {"validation_accuracy": 0.5, "test_accuracy": 0.5}
        merged = {"validation_accuracy": 0.5, "test_accuracy": 0.5 + 0.1 * config.seed}
        data = {"name": "digits", "validation": 10, "test": 10}
        return {"seed": config.seed, "parents": [parent] * 2, "merged": merged, "data": data}

    monkeypatch.setattr(pipeline, "run", fake)
    return calls


def test_seeds_have_workdirs_of_their_own_and_a_summary(called, tmp_path):
    where = ["--workdir", str(tmp_path / "w")]
    assert run.main(["run", "--config", DIGITS, *where, "--seeds", "0:3"]) == 0
    assert called == [(k, f"w/seed{k}", None) for k in range(3)]
    summary = json.loads((tmp_path / "w" / "results.json").read_text())
    assert summary["seeds"] == [0, 1, 2]
    merged = summary["networks"]["merged"]
    assert merged["test_accuracy"]["mean"] == pytest.approx(0.6)
    assert merged["difference"]["estimate"] == pytest.approx(0.1)
    assert "3 seeds" in (tmp_path / "w" / "report.md").read_text()
    fork = [*where, "--fork", str(tmp_path / "f")]
    assert run.main(["run", "--config", DIGITS, *fork, "--seeds", "5,2"]) == 0
    assert called[3:] == [(k, f"f/seed{k}", tmp_path / "w" / f"seed{k}") for k in (5, 2)]


def test_the_summary_of_several_seeds_does_not_replace_a_single_runs_result(
    called, capsys, finished
):
    assert run.main(["run", "--config", DIGITS, "--workdir", str(finished), "--seeds", "0:2"]) == 2
    assert f"--seeds: {finished} holds a single run" in capsys.readouterr().err
    assert not called


def test_a_seed_that_fails_is_named(called, capsys, tmp_path):
    command = ["run", "--config", DIGITS, "--workdir", str(tmp_path / "w"), "--seeds", "2:9"]
    assert run.main(command) == 2
    assert capsys.readouterr().err == "error: seed 3: parent 0: training diverged\n"
    assert not (tmp_path / "w" / "results.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "3:3"], "--seeds is '3:3': FIRST:END (without END) or A,B,C is needed"),
        (["--seeds", "1,1"], "--seeds is '1,1'"),
        (["--seeds", "a:b"], "--seeds is 'a:b'"),
        (["--seeds=-1:2"], "--seeds is '-1:2'"),
        (["--fork", "w"], "--fork w is the --workdir itself: name a new folder"),
    ],
)
def test_flags_that_cannot_work_are_one_line(flags, message, called, capsys):
    assert run.main(["run", "--config", DIGITS, "--workdir", "w", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not called
