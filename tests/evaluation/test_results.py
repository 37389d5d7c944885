"""Comparisons and aggregates, against what NumPy and SciPy make of the same bits."""

import json

import numpy as np
import pytest
from planted_runs import planted_run
from scipy import stats

from megajax import io as workdir
from megajax.errors import DataError, WorkdirError
from megajax.evaluation.predictions import by_id, load_predictions, same_examples, save_predictions
from megajax.evaluation.results import aggregate, comparison


@pytest.fixture(scope="module")
def runs():
    return [planted_run(seed) for seed in range(5)]


def test_differences_of_a_run_are_tested_image_by_image(runs):
    results, predictions = runs[0]
    found = comparison(results, predictions)
    assert found.best == "parent_1"
    assert tuple(row.key for row in found.rows) == predictions.names
    right = dict(zip(predictions.names, predictions.classes == predictions.labels, strict=True))
    p_values = []
    for row in found.rows[2:]:
        gained = (right[row.key] & ~right["parent_1"]).sum()
        lost = (right["parent_1"] & ~right[row.key]).sum()
        assert row.difference.estimate == pytest.approx((gained - lost) / 400)
        assert row.difference.low < row.difference.estimate < row.difference.high
        p_values.append(stats.binomtest(gained, gained + lost).pvalue)
        assert row.difference.p_value == p_values[-1]
        assert row.corrupted_difference.estimate == pytest.approx(
            0.85 * row.difference.estimate, rel=1e-5
        )
    order = np.argsort(p_values)
    expected = np.maximum.accumulate(np.arange(4, 0, -1) * np.array(p_values)[order])
    adjusted = np.array([row.adjusted for row in found.rows[2:]])[order]
    np.testing.assert_allclose(adjusted, np.minimum(expected, 1))
    for row in found.rows[:2]:
        assert (row.difference, row.adjusted, row.corrupted_difference) == (None, None, None)


def test_the_best_parent_is_chosen_on_validation_whatever_the_test_says(runs):
    results, predictions = json.loads(json.dumps(runs[0][0])), runs[0][1]
    results["parents"][0]["validation_accuracy"] = 0.99
    assert results["parents"][0]["test_accuracy"] < results["parents"][1]["test_accuracy"]
    assert comparison(results, predictions).best == "parent_0"


def test_what_a_run_did_not_store_is_not_made_up(runs):
    minimal = {"validation_accuracy": 0.5, "test_accuracy": 0.25}
    found = comparison(
        {"parents": [minimal], "merged": minimal, "data": {"validation": 10, "test": 20}}
    )
    merged = found.row("merged")
    assert (merged.difference, merged.adjusted, merged.test_nll) == (None, None, None)
    assert (merged.evaluations, merged.corrupted, merged.calibration_error) == (None, None, None)
    expected = stats.binomtest(5, 20).proportion_ci(method="wilson")
    np.testing.assert_allclose(merged.test[1:], expected)
    assert found.row("ensemble") is None


def test_seeds_are_paired(runs):
    combined = aggregate([results for results, _ in reversed(runs)])
    assert combined["seeds"] == [0, 1, 2, 3, 4]
    best = [results["parents"][1]["test_accuracy"] for results, _ in runs]
    for key in ("ensemble", "merged"):
        ours = [
            (results["merged"] if key == "merged" else results["baselines"][key])["test_accuracy"]
            for results, _ in runs
        ]
        theirs = stats.ttest_rel(ours, best)
        summary = combined["networks"][key]
        assert summary["test_accuracy"]["values"] == ours
        assert summary["test_accuracy"]["mean"] == pytest.approx(np.mean(ours))
        found = summary["difference"]
        np.testing.assert_allclose(
            [found["low"], found["high"], found["p_value"]],
            [*theirs.confidence_interval(), theirs.pvalue],
        )
        assert summary["corrupted_difference"]["estimate"] == pytest.approx(
            0.85 * found["estimate"]
        )
    per_class = [results["merged"]["per_class_accuracy"] for results, _ in runs]
    np.testing.assert_allclose(
        combined["networks"]["merged"]["per_class_accuracy"], np.mean(per_class, axis=0)
    )
    curves = [results["robustness"]["networks"]["parent_1"]["accuracy"] for results, _ in runs]
    for name in ("shot_noise", "contrast"):
        np.testing.assert_allclose(
            combined["robustness"]["networks"]["best_parent"]["accuracy"][name],
            np.mean([curve[name] for curve in curves], axis=0),
        )
    assert combined["seconds"] == {"training": 5.0, "search": 12.5}
    assert combined["networks"]["merged"]["evaluations"] == 96
    assert "difference" not in combined["networks"]["parent_0"]


def test_the_mean_cost_over_seeds_is_right_where_networks_saw_few_images(runs):
    few = [json.loads(json.dumps(results)) for results, _ in runs[:2]]
    for results, evaluations, images in zip(few, (100, 61), (47.75, 30), strict=True):
        results["merged"] |= {"evaluations": evaluations, "images_scored": images}
    merged = aggregate(few)["networks"]["merged"]
    assert merged["evaluations"] == 80
    assert merged["evaluations"] * merged["images_scored"] == pytest.approx((4775 + 1830) / 2)
    assert aggregate(few)["networks"]["random_search"]["images_scored"] == 200


def test_the_best_parent_may_be_another_one_for_each_seed(runs):
    swapped = json.loads(json.dumps(runs[1][0]))
    swapped["parents"].reverse()
    networks = swapped["robustness"]["networks"]
    networks["parent_0"], networks["parent_1"] = networks["parent_1"], networks["parent_0"]
    one, other = (aggregate([runs[0][0], second]) for second in (runs[1][0], swapped))
    for key in ("best_parent", "merged", "ensemble"):
        assert (
            one["networks"][key].items()
            >= {k: v for k, v in other["networks"][key].items() if k != "agreement"}.items()
        )
    assert one["networks"]["parent_0"] != other["networks"]["parent_0"]


def test_an_aggregate_reads_the_same_after_a_round_through_json(runs, tmp_path):
    combined = aggregate([results for results, _ in runs])
    workdir.write_json(tmp_path / "results.json", combined)
    again = workdir.read_json(tmp_path / "results.json")
    assert comparison(again) == comparison(combined)
    found = comparison(again)
    assert (found.best, found.seeds, found.images, found.held_out) == ("best_parent", 5, 400, True)


def test_one_seed_has_no_interval(runs, tmp_path):
    workdir.write_json(tmp_path / "results.json", aggregate([runs[0][0]]))
    merged = comparison(workdir.read_json(tmp_path / "results.json")).row("merged")
    assert np.isnan(merged.test.low)
    assert np.isnan(merged.difference.p_value)
    assert merged.adjusted is None


def test_a_figure_that_one_seed_lacks_is_left_out(runs):
    broken = json.loads(json.dumps(runs[1][0]))
    broken["merged"]["test_nll"] = None  # infinite
    del broken["robustness"]
    combined = aggregate([runs[0][0], broken])
    assert "test_nll" not in combined["networks"]["merged"]
    assert "test_nll" in combined["networks"]["ensemble"]
    assert "robustness" not in combined
    assert comparison(combined).row("merged").test_nll is None


def test_runs_that_do_not_belong_together_are_refused(runs):
    first = runs[0][0]
    other = json.loads(json.dumps(runs[1][0]))
    with pytest.raises(DataError, match="no runs"):
        aggregate([])
    with pytest.raises(DataError, match="seed 0 is there twice"):
        aggregate([first, first])
    with pytest.raises(DataError, match="seed 1 is about x, seed 0 about planted"):
        aggregate([first, other | {"data": other["data"] | {"name": "x"}}])
    del other["baselines"]["ensemble"]
    with pytest.raises(DataError, match="0 and 1 hold different networks: only one has ensemble"):
        aggregate([first, other])


def test_a_selection_on_the_test_set_is_passed_on(runs):
    leaked = runs[0][0] | {"not_held_out": True}
    assert not comparison(leaked).held_out
    assert not comparison(aggregate([leaked, runs[1][0]])).held_out


def test_predictions_survive_and_damage_is_named(runs, tmp_path):
    predictions = runs[0][1]
    save_predictions(tmp_path, predictions)
    again = load_predictions(tmp_path)
    assert again.names == predictions.names
    for name in ("classes", "labels", "ids", "scores"):
        np.testing.assert_array_equal(getattr(again, name), getattr(predictions, name))
    before = (tmp_path / "predictions.npz").read_bytes()
    save_predictions(tmp_path, predictions)
    assert (tmp_path / "predictions.npz").read_bytes() == before
    assert load_predictions(tmp_path / "nowhere") is None
    save_predictions(tmp_path, predictions._replace(labels=predictions.labels[:5]))
    with pytest.raises(WorkdirError, match=r"predictions.npz is damaged: classes have shape"):
        load_predictions(tmp_path)
    for damaged in (before[:100], b"", b"text"):
        (tmp_path / "predictions.npz").write_bytes(damaged)
        with pytest.raises(WorkdirError, match=r"predictions.npz is damaged"):
            load_predictions(tmp_path)


def test_the_same_images_in_another_order_pair_up_by_number(runs):
    predictions = runs[0][1]
    order = np.random.default_rng(0).permutation(400)
    shuffled = predictions._replace(
        classes=predictions.classes[:, order],
        labels=predictions.labels[order],
        ids=predictions.ids[order],
    )
    assert not same_examples(predictions, shuffled)
    assert same_examples(by_id(predictions), by_id(shuffled))
    np.testing.assert_array_equal(by_id(shuffled).classes, predictions.classes)
