"""The command that puts runs side by side."""

import json

import numpy as np
import pytest
from planted_runs import ACCURACY, planted_run
from scipy import stats

from megajax import io as workdir
from megajax.evaluation.predictions import save_predictions
from megajax.evaluation.results import aggregate
from megajax.report import compare


def store(folder, results, predictions=None, **config):
    folder.mkdir(parents=True)
    workdir.write_json(folder / "results.json", results)
    workdir.write_json(folder / "config.json", {"config": {"seed": results["seed"], **config}})
    if predictions is not None:
        save_predictions(folder, predictions)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two runs that share their test images, and two with three seeds each."""
    root = tmp_path_factory.mktemp("runs")
    better = ACCURACY | {"merged": 0.88}
    results, predictions = planted_run(0)
    store(root / "plain", results, predictions, evolution={"population_size": 32})
    results, predictions = planted_run(0, accuracy=better)
    order = np.random.default_rng(0).permutation(400)
    predictions = predictions._replace(
        classes=predictions.classes[:, order],
        labels=predictions.labels[order],
        ids=predictions.ids[order],
    )
    store(root / "wide", results, predictions, evolution={"population_size": 64})
    for seed in range(3):
        store(root / "seeds" / f"seed{seed}", *planted_run(seed))
        store(root / "better" / f"seed{seed}", *planted_run(seed + 1, accuracy=better))
    runs = [planted_run(seed)[0] for seed in range(3)]
    workdir.write_json(root / "seeds" / "results.json", aggregate(runs))
    return root


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


def call(capsys, *arguments):
    code = compare.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_runs_with_the_same_test_images_are_tested_image_by_image(root, capsys):
    code, out, err = call(capsys, root / "plain", root / "wide")
    assert (code, err) == (0, "")
    plain, wide = (compare.load_run(root / name) for name in ("plain", "wide"))
    ((found, pairs),) = compare.against_first([plain, wide])
    assert pairs == "400 images"
    gain = wide.results[0]["merged"]["test_accuracy"] - plain.results[0]["merged"]["test_accuracy"]
    assert found.estimate == pytest.approx(gain)
    assert found.p_value < 0.01
    assert f"{100 * gain:+.1f} [" in out
    assert "evolution.population_size" in out
    assert compare.settings([plain, wide]) == {"evolution.population_size": [32, 64]}


def test_folders_of_seeds_are_paired_by_seed(root, capsys):
    code, out, err = call(capsys, root / "seeds", root / "better")
    assert (code, err) == (0, "")
    assert "2 seeds" in out  # 0, 1, 2 and 1, 2, 3
    one, two = (compare.load_run(root / name) for name in ("seeds", "better"))
    ((found, _),) = compare.against_first([one, two])
    first = [one.results[k]["merged"]["test_accuracy"] for k in (1, 2)]
    second = [two.results[k]["merged"]["test_accuracy"] for k in (0, 1)]
    assert found.p_value == pytest.approx(stats.ttest_rel(second, first).pvalue)
    assert compare.summary(one)["seeds"] == [0, 1, 2]
    assert compare.settings([one, two]) == {}


def test_what_does_not_pair_up_is_shown_and_not_tested(root, capsys, tmp_path):
    other_data = planted_run(0)[0]
    other_data["data"]["name"] = "other"
    store(tmp_path / "data", other_data)
    store(tmp_path / "untested", planted_run(0)[0])
    store(tmp_path / "images", *planted_run(7))
    for name, why in [
        ("data", "one is about planted, the other about other"),
        ("untested", f"{tmp_path / 'untested'} stored no predictions"),
        ("images", "the test images are not the same"),
    ]:
        code, out, _ = call(capsys, root / "plain", tmp_path / name)
        assert code == 0
        assert f"are not tested against each other: {why}" in out
    code, out, _ = call(capsys, root / "plain", root / "seeds")
    assert "fewer than two seeds are in both" in out


def test_a_selection_on_the_test_set_is_said(root, capsys, tmp_path):
    leaked = planted_run(0)[0] | {"not_held_out": True}
    store(tmp_path / "leaked", leaked)
    _, out, _ = call(capsys, root / "plain", tmp_path / "leaked")
    assert f"{tmp_path / 'leaked'}: Selected on the test set" in out


def test_no_run_is_left_out_on_a_narrow_terminal(root, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    names = ("plain", "wide", "seeds", "better")
    _, out, _ = call(capsys, *(root / name for name in names))
    accuracies = [
        compare.summary(compare.load_run(root / name))["merged"]["estimate"] for name in names
    ]
    assert out.count("\nmerged ") > 1
    for accuracy in accuracies:
        assert f" {100 * accuracy:.1f} %" in out


def test_nothing_is_written_unless_asked(root, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(root.rglob("*"))
    call(capsys, root / "plain", root / "wide")
    assert sorted(root.rglob("*")) == before
    assert not list(tmp_path.iterdir())
    code, _, _ = call(capsys, root / "plain", root / "wide", "--out", tmp_path / "out")
    assert code == 0
    stored = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [run["seeds"] for run in stored["runs"]] == [[0], [0]]
    assert stored["against_first"][0]["over"] == "400 images"
    assert stored["settings"] == {"evolution.population_size": [32, 64]}
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert page.startswith("# Test accuracy of runs side by side\n")


def test_each_mistake_is_one_line_and_exit_code_2(root, capsys, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "results.json").write_text('{"merged": ')
    incomplete = tmp_path / "incomplete"
    incomplete.mkdir()
    workdir.write_json(incomplete / "results.json", {"merged": {}, "data": {}})
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    twice = tmp_path / "twice"
    for name in ("a", "b"):
        store(twice / name, *planted_run(0))
    blocked = tmp_path / "file"
    blocked.write_text("")
    plain = root / "plain"
    for arguments, message in [
        ([plain], "at least two runs"),
        ([plain, tmp_path / "nowhere"], "nowhere is not a folder"),
        ([plain, unfinished], "unfinished holds no finished run: there is no results.json of one"),
        ([plain, broken], "broken/results.json is damaged"),
        (
            [plain, incomplete],
            "incomplete/results.json is not a result of a run: 'parents' is missing",
        ),
        ([plain, twice], "seed 0 is there twice"),
        ([plain, plain, "--out", blocked / "out"], "cannot be written"),
    ]:
        code, out, err = call(capsys, *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
