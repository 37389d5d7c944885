"""`benchmarks/gpu.py` on a CPU: every part runs, one that is stopped costs only itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def gpu(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_part_runs_and_one_that_is_stopped_keeps_what_was_measured(tmp_path):
    figures, page = tmp_path / "gpu.json", tmp_path / "gpu.md"
    done = gpu("--dry", "--json", figures)
    assert done.returncode == 0, done.stdout[-2000:]
    measured = json.loads(figures.read_text())
    assert {part["state"] for part in measured.values()} == {"done"}

    noted = {name: part | {"note": f"of {name}"} for name, part in measured.items()}
    figures.write_text(json.dumps(noted))
    stopped = gpu("--dry", "--json", figures, "--parts", "others", "ceilings", "--slack", "0.0001")
    assert stopped.returncode == 1
    assert "not done: others, ceilings" in stopped.stdout
    later = json.loads(figures.read_text())
    assert "stopped" in later["others"]["state"]
    assert [part["rows"] for part in later.values()] == [p["rows"] for p in measured.values()]

    assert later["others"]["note"] == "of others"  # its rows are those that the note is about

    again = gpu("--dry", "--json", figures, "--parts", "ceilings")
    assert "without its note: of ceilings" in again.stdout
    assert "note" not in json.loads(figures.read_text())["ceilings"]

    assert gpu("--json", figures, "--docs", page).returncode == 0
    assert "not finished: stopped" in page.read_text()
    assert "Not measured." not in page.read_text()


def test_what_is_not_measured_is_said_so(tmp_path):
    page = tmp_path / "gpu.md"
    assert gpu("--json", tmp_path / "none.json", "--docs", page).returncode == 0
    titles = page.read_text().count("\n## ")
    assert titles == page.read_text().count("Not measured.") == 10


def test_an_unknown_part_is_refused():
    refused = gpu("--parts", "ceiling")
    assert refused.returncode == 2
    assert "invalid choice: 'ceiling'" in refused.stderr
