"""The examples: each is short, runs as it stands, and merges a network that is worth it."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "experiments" / "examples"
NEEDS = {"equinox_network": "equinox", "haiku_network": "haiku"}
COMMANDS = {"own_model": ["-m", "megajax.run", "--config.smoke=True", "--config"]}


def printed(name, folder):
    """What a script prints; those of a library that is not there are skipped."""
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    command = [sys.executable, *COMMANDS.get(name, []), str(FOLDER / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def figures(text):
    """The numbers in each line, by what the line begins with."""
    lines = (re.match(r"(base|parent \d|mean|merged):? (.*)", line) for line in text.splitlines())
    found = (line.groups() for line in lines if line)
    return {name: [float(x) for x in re.findall(r"-?\d+\.\d+", rest)] for name, rest in found}


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_is_short_and_names_its_command(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 60
    assert re.search(rf"\n    python .*experiments/examples/{file.name}\n", text)


@pytest.mark.parametrize(
    "name", ["equinox_network", pytest.param("haiku_network", marks=pytest.mark.slow)]
)
def test_a_merge_of_another_librarys_networks_beats_both_parents(name, tmp_path):
    found = figures(printed(name, tmp_path))
    assert found["merged"][0] > max(found["parent 0"][0], found["parent 1"][0]) + 5


@pytest.mark.slow
def test_a_gpt_has_a_lower_loss_than_both_parents(tmp_path):
    found = figures(printed("gpt", tmp_path))
    assert found["merged"] < min(found["parent 0"], found["parent 1"])


@pytest.mark.slow
def test_pixels_are_labelled_better_than_by_both_parents(tmp_path):
    found = figures(printed("segmentation", tmp_path))
    assert found["merged"] > max(found["parent 0"], found["parent 1"])


@pytest.mark.slow
def test_a_regression_has_a_lower_error_than_both_parents(tmp_path):
    found = figures(printed("regression", tmp_path))
    assert found["merged"][0] < min(found["parent 0"][0], found["parent 1"][0])
    assert found["merged"][1] > max(found["parent 0"][1], found["parent 1"][1])


@pytest.mark.slow
def test_task_vectors_keep_both_tasks(tmp_path):
    found = figures(printed("two_tasks", tmp_path))
    assert min(found["merged"]) > max(min(found[f"parent {k}"]) for k in (0, 1))
    assert sum(found["merged"]) > max(sum(found[name]) for name in ("base", "mean", "parent 1"))


@pytest.mark.slow
def test_a_front_runs_from_one_task_to_the_other(tmp_path):
    text = printed("front", tmp_path)
    rows = [[float(x) for x in re.findall(r"(\S+)%", line)] for line in text.splitlines()[1:]]
    even, odd = zip(*rows, strict=True)
    assert even[0] < even[-1]
    assert odd[0] > odd[-1]
    assert max(map(min, rows)) > max(min(rows[0]), min(rows[-1])) + 10


@pytest.mark.slow
def test_the_command_line_takes_an_own_network_and_own_data(tmp_path):
    text = " ".join(printed("own_model", tmp_path).split())
    assert "Test accuracy on 497 held-out images" in text
    assert (tmp_path / "runs" / "own_model-seed0" / "merged").is_dir()
