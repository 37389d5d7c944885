"""What a run says of itself: in `results.json`, on its pages and, line by line, in a pipe."""

import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from megajax import report
from megajax.run import pipeline
from megajax.run.config import from_dict
from megajax.run.stages.task import progress
from megajax.run.words import settings

TINY = {
    "genome": {"binary": True},
    "data": {"validation_fraction": 0.3, "limit": 200},
    "model": {"options": {"width": 4}},
    "training": {"epochs": 1},
    "align": {"method": "activations"},
    "baselines": {"names": ("uniform_average", "greedy_soup", "random_search")},
    "robustness": {"enabled": False},
}


def done(folder, **changes):
    """The results, what was printed, and what the pictures were made of."""
    console = Console(file=io.StringIO(), width=80)
    pipeline.run(from_dict(TINY | changes), folder, console)
    return json.loads((folder / "results.json").read_text()), console.file.getvalue()


@pytest.fixture(scope="module")
def parents_alone(tmp_path_factory):
    """A search of no generations among the parents themselves, which are its first population."""
    folder = tmp_path_factory.mktemp("runs") / "parents"
    drawn = {}

    def spy(folder, results, history, shares, predictions, write=report.write_report):
        drawn.update(shares)
        write(folder, results, history, shares, predictions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", spy)
        found = done(
            folder, evolution={"population_size": 2, "generations": 0, "tournament_size": 2}
        )
    return folder, *found, drawn


@pytest.mark.slow
def test_a_parent_that_comes_back_is_named(parents_alone):
    folder, results, printed, _ = parents_alone
    fitness = [entry["fitness"] for entry in results["parents"]]
    best = int(np.argmax(fitness))
    assert results["merged"]["fitness"] == fitness[best]
    assert results["returned_parent"] == best
    assert "still_rising" not in results
    said = f"The search returned parent {best}: it found no mixture that scored better."
    assert said in printed
    for page in ("report.md", "report.html"):
        assert said in (folder / page).read_text()


@pytest.mark.slow
def test_a_search_that_went_on_rising_and_a_smoke_run_are_marked(tmp_path):
    changes = {"evolution": {"population_size": 6, "generations": 3}, "smoke": True}
    results, printed = done(tmp_path / "run", **changes)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    best = [json.loads(line)["best_ever"] for line in lines]
    rising = best[-1] - best[-2] > 0.01 * (best[-1] - best[0])
    assert results.get("still_rising", False) == rising
    assert results["smoke"]
    assert "Smoke run" in printed
    assert "Smoke run" in (tmp_path / "run" / "report.md").read_text()


def test_what_each_method_saw(parents_alone):
    baselines = parents_alone[1]["baselines"]
    facts = {name: (one.get("searches"), one.get("labels")) for name, one in baselines.items()}
    assert facts == {
        "uniform_average": (False, False),
        "aligned_uniform_average": (False, False),
        "greedy_soup": (False, True),
        "aligned_greedy_soup": (False, True),
        "random_search": (True, True),
        "ensemble": (None, None),
    }
    assert parents_alone[1]["metric"] == "cross_entropy"


def test_layers_are_drawn_once_in_the_order_of_the_network(parents_alone):
    assert list(parents_alone[3]) == ["conv1", "conv2", "conv3", "head"]


def test_the_settings_are_words():
    config = from_dict(
        {
            "model": {"name": "resnet", "options": {"depth": 8}},
            "parents": {"count": 3, "shards": "skewed", "skew": 0.95},
            "training": {"optimizer": "sgd", "augment": ("flip", "crop")},
            "align": {"method": "none"},
            "recalibrate": {"enabled": True},
            "genome": {"binary": True, "granularity": "layer"},
            "fitness": {"metric": "accuracy"},
            "evolution": {"crossover": ("uniform",), "mutation": "reset"},
        }
    )
    words = settings(config, parameters=78042, genes=10)
    assert words["network"] == "resnet (depth 8), 78,042 numbers"
    assert "3, trained" in words["parents"]
    assert "95 %" in words["parents"]
    assert "varied by flip and crop" in words["training"]
    assert words["alignment"] == "none"
    assert words["statistics"].endswith("on 256 training images")
    assert words["genes"] == "10 layer masks; each picks one parent"
    assert words["fitness"] == "accuracy on the validation images"
    assert "uniform crossover, reset mutation, plus survival" in words["search"]
    loaded = from_dict({"parents": {"paths": ("a.npz", "b.npz")}})
    words = settings(loaded, parameters=1, genes=None)
    assert words["parents"] == "2, loaded from a.npz, b.npz"
    assert "training" not in words


def test_files_alike_are_described_once(parents_alone, tmp_path):
    folder = parents_alone[0]
    paths = tuple(str(folder / "parents" / str(k)) for k in range(2))
    evolution = {"population_size": 2, "generations": 0, "tournament_size": 2}
    _, printed = done(tmp_path / "loaded", parents={"paths": paths}, evolution=evolution)
    assert printed.count("arrays become leaves") == 1
    assert ": as in a file above\n" in printed


def test_a_pipe_gets_lines_and_no_bar():
    console = Console(file=io.StringIO(), width=60)
    with progress(console, "merging", 3) as update:
        for generation in range(4):
            update(generation, f"merging, {generation / 10}")
    assert console.file.getvalue() == "merging, 0.3: 3 of 3\n"


def test_the_numbers_of_a_network_are_counted(parents_alone):
    folder, results, *_ = parents_alone
    from megajax import load_network

    count = sum(leaf.size for leaf in jax.tree.leaves(load_network(folder / "merged")))
    assert f"{count:,} numbers" in results["settings"]["network"]
