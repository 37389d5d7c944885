"""What a run measures, against the same figures by hand; and the whole way to a report."""

import jax
import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import f1_score

import megajax as mj
from megajax import report
from megajax.evaluation.measures import measure, predictor
from megajax.evaluation.predictions import correct, load_predictions, save_predictions
from megajax.evaluation.results import comparison
from megajax.evaluation.robustness import RobustnessConfig, corrupt
from megajax.merging.tasks import check_task
from megajax.report.text import held_out_table
from megajax.run import store as workdir
from megajax.run.measurement import measure_networks, measure_task
from megajax.zoo import data
from megajax.zoo.data import DataConfig

KEY = jax.random.key(0)
CONFIG = RobustnessConfig(corruptions=("contrast", "impulse_noise"), severities=(1, 5), examples=60)


@pytest.fixture(scope="module")
def dataset():
    return data.load(0, DataConfig(standardize=True, limit=100))


@pytest.fixture(scope="module")
def networks(dataset):
    """Linear networks: nearest class means, of all pixels, of half of them, and their average."""
    images, labels = dataset.train.images.reshape(-1, 64), dataset.train.labels
    means = np.stack([images[labels == c].mean(0) for c in range(10)], 1)
    halves = [np.where((np.arange(64) < 32) == side, 1, 0)[:, None] for side in (True, False)]
    parents = {f"parent_{k}": (half * means).astype(np.float32) for k, half in enumerate(halves)}
    return {**parents, "merged": means.astype(np.float32)}


@pytest.fixture(scope="module")
def logits_of(networks):
    def apply_fn(kernel, images):
        return images.reshape(len(images), -1) @ kernel

    return predictor(apply_fn, networks, {"ensemble": ["parent_0", "parent_1"]}, batch_size=64)


@pytest.fixture(scope="module")
def measured(dataset, logits_of):
    return measure_networks(KEY, logits_of, dataset, CONFIG)


def test_figures_are_those_of_the_logits(measured, dataset, networks):
    labels = dataset.test.labels
    assert list(measured.entries) == ["parent_0", "parent_1", "merged", "ensemble"]
    for name, kernel in networks.items():
        entry = measured.entries[name]
        for part in ("validation", "test"):
            split = getattr(dataset, part)
            expected = measure(split.images.reshape(-1, 64) @ kernel, split.labels)
            assert entry[f"{part}_accuracy"] == expected.accuracy
            assert entry[f"{part}_nll"] == pytest.approx(expected.nll, rel=1e-5)
        right = correct(measured.predictions, name)
        assert right.mean() == entry["test_accuracy"]
        for c, accuracy in enumerate(entry["per_class_accuracy"]):
            assert accuracy == pytest.approx(right[labels == c].mean())
    assert measured.entries["parent_1"]["agreement"][1] == 1
    assert (
        measured.entries["parent_1"]["agreement"][0] == measured.entries["parent_0"]["agreement"][1]
    )
    np.testing.assert_array_equal(measured.predictions.ids, dataset.test.ids)


def test_corrupted_images_are_standardised_like_the_others(measured, dataset, networks):
    pixels = dataset.test.images[:60] * dataset.std + dataset.mean
    for name in CONFIG.corruptions:
        for i, severity in enumerate(CONFIG.severities):
            images = (corrupt(KEY, pixels, name, severity) - dataset.mean) / dataset.std
            logits = images.reshape(60, 64) @ networks["merged"]
            accuracy = measured.robustness["networks"]["merged"]["accuracy"][name][i]
            assert accuracy == pytest.approx((logits.argmax(1) == dataset.test.labels[:60]).mean())
    assert measured.predictions.scores.shape == (4, 60)
    assert (measured.robustness["severities"], measured.robustness["examples"]) == ((1, 5), 60)


def test_robustness_can_be_left_out(dataset, logits_of):
    measured = measure_networks(KEY, logits_of, dataset, RobustnessConfig(enabled=False))
    assert measured.robustness is None
    assert measured.predictions.scores is None


def linear(kernel, images):
    return images.reshape(len(images), -1) @ kernel


def test_a_task_has_everybodys_score_and_difference(dataset, networks, tmp_path):
    networks = {**networks, "broken": np.full((64, 10), np.nan, np.float32)}
    task = mj.Task(dataset.test.images, dataset.test.labels, "macro_f1", name="digits")
    task = check_task(task, linear, networks["merged"])
    found = measure_task(KEY, task, networks, "parent_1")
    logits = {name: linear(kernel, task.inputs) for name, kernel in networks.items()}
    logits["ensemble"] = softmax([logits["parent_0"], logits["parent_1"]], axis=-1).mean(0)
    assert found["networks"].keys() == logits.keys()
    for name, entry in found["networks"].items():
        f1 = f1_score(task.targets, logits[name].argmax(1), average="macro")
        assert name == "broken" or entry["score"] == pytest.approx(f1, rel=1e-5)
    assert "difference" not in found["networks"]["parent_1"]
    gain = found["networks"]["merged"]["difference"]
    scores = [found["networks"][name]["score"] for name in ("merged", "parent_1")]
    assert gain["estimate"] == pytest.approx(scores[0] - scores[1], abs=1e-6)
    assert gain["low"] < gain["estimate"] < gain["high"]
    entry = {"metric": "macro_f1", "merged": 0.5, "parents": [0.1, 0.2], "test": found}
    workdir.write_json(tmp_path / "x.json", {"tasks": {"digits": entry}})
    header, *rows = held_out_table(workdir.read_json(tmp_path / "x.json"))
    assert header == ("network", "digits: macro f1", "to parent 1 [95 %]")
    shown = {name: cells for name, *cells in rows}
    limits = f"[{gain['low']:.4f}, {gain['high']:.4f}]"
    assert shown["merged"] == [f"{scores[0]:.4f}", f"{gain['estimate']:+.4f} {limits}"]
    assert shown["parent 1"] == [f"{scores[1]:.4f}", ""]


def test_a_network_that_is_not_finite_is_shown_as_such(networks, dataset):
    networks = {**networks, "merged": np.full((64, 10), np.nan, np.float32)}
    task = mj.Task(dataset.test.images, dataset.test.labels, name="digits")
    task = check_task(task, linear, networks["parent_0"])
    found = measure_task(KEY, task, networks, "parent_0")["networks"]
    assert np.isnan([found["merged"]["score"], found["merged"]["difference"]["low"]]).all()
    assert np.isfinite(found["ensemble"]["difference"]["low"])


def test_what_is_measured_is_what_a_report_needs(measured, tmp_path):
    """The figures as a run stores them; the merged network here is better than either half."""
    entries = dict(measured.entries)
    results = {
        "parents": [entries.pop("parent_0"), entries.pop("parent_1")],
        "merged": entries.pop("merged"),
        "baselines": entries,
        "seed": 0,
        "robustness": measured.robustness,
        "data": {"name": "digits", "validation": 100, "test": 100},
    }
    workdir.write_json(tmp_path / "results.json", results)
    save_predictions(tmp_path, measured.predictions)
    results, predictions = workdir.read_json(tmp_path / "results.json"), load_predictions(tmp_path)
    report.write_report(tmp_path, results, predictions=predictions)
    merged = comparison(results, predictions).row("merged")
    assert merged.difference.estimate > 0
    assert merged.corrupted_difference is not None
    page = (tmp_path / "report.md").read_text()
    assert f"{100 * results['merged']['test_accuracy']:.1f} %" in page
    assert "Mean accuracy over 2 corruptions at 2 severities: merged " in page
