"""The study: its cells are experiments, its searches cost the same, its tables are its figures."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megajax.run.cli import main

STUDY = Path(__file__).parent.parent / "experiments" / "study"
CONFIG = runpy.run_path(str(STUDY / "config.py"))


@pytest.mark.parametrize("family", ["digits", "cifar10", "cifar10_width32", "cifar10_width64"])
def test_all_searches_of_all_cells_score_equally_many_networks(family):
    data, _, width = family.partition("_width")
    images = {"digits": 404, "cifar10": 5000}[data]
    costs = set()
    for parents in CONFIG["PARENTS"]:
        for search in CONFIG["SEARCHES"][family]:
            cell = CONFIG["get_config"](f"{family}/{parents}/{search}")
            evolution = cell.evolution
            elites = evolution.elites if evolution.survival == "generational" else 0
            size = evolution.population_size
            first = 2 if evolution.parents_only else size
            children = evolution.offspring or size - elites
            networks = first + evolution.generations * children
            if evolution.gradient_steps:  # stops where the next generation would cost more
                assert networks == evolution.evaluation_budget
            if cell.fitness.metric == "distill":  # the others are scored on validation images
                networks = networks * cell.fitness.distill_examples / images
            costs.add(round(networks, 3))
            if search == "finetuned":  # an epoch passes over 45,000 images, forwards and back
                passes = 3 * cell.finetune.epochs * 45_000
                assert 0.93 < passes / (networks * images) < 1
            else:
                assert not cell.finetune.epochs
            assert cell.data.name == data
            assert cell.model.options.get("width") == (int(width) if width else None)
            aligned = search.endswith("-aligned") or search == "finetuned"
            assert (cell.align.method != "none") == aligned
            assert cell.recalibrate.enabled == (search not in ("paper", "m2n2"))
    assert costs == {{"digits": 1920, "cifar10": 115}[data]}


def test_what_is_no_cell_is_one_line(capsys):
    for cell in ("digits/skewed/chanel", "digit/skewed/channel", "digits"):
        assert main(["run", "--config", f"{STUDY / 'config.py'}:{cell}"]) == 2
        assert f"{cell} is no cell" in capsys.readouterr().err


def test_the_tables_are_what_the_results_say():
    command = [sys.executable, str(STUDY / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_searches_in_the_results_cost_the_same():
    networks, searches = {"digits": 1920, "cifar10": 115}, {"digits": 24, "cifar10": 3}
    for family, settings in json.loads((STUDY / "results.json").read_text()).items():
        data, _, width = family.partition("_width")
        for aggregate in settings.values():
            whole = aggregate["data"]["validation"]
            costs = {  # of all but `merged_finetuned`
                name: entry["evaluations"] * entry["images_scored"] / whole
                for name, entry in aggregate["networks"].items()
                if name.startswith(("evolved", "random_search", "cma_es", "sep_", "diff", "merged"))
                and "evaluations" in entry
            }
            assert len(costs) >= (1 if width else searches[data])
            for name, cost in costs.items():  # steps by labels are rounded to whole ones
                steps = name.startswith(("evolved_gradient", "evolved_memetic"))
                assert abs(cost - networks[data]) < (0.02 * networks[data] if steps else 1), name
