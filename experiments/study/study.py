"""Runs the study cell by cell, and puts its figures into `results.json` beside this file.

    python experiments/study/study.py digits [--seeds 0 1 2] [--workdir runs/study] [--only shared]
    python experiments/study/study.py cifar10 --set data.data_dir=DIR [--parents FOLDER]

What is finished is not run again, and what was interrupted goes on: several processes with other
`--seeds` or `--only` can share the work, and a last one without them collects it; a search that
some seeds still lack is left out. The parents of a setting are trained once, or are the files
FOLDER/SETTING/seedN/*.npz; every other search starts from them. `results.json` holds, for each data
set and setting of the parents, what `megajax.evaluation.results.aggregate` makes of the seeds, with
the network that each search found as `evolved_SEARCH` (`merged` is that of the first one), so that
Holm's correction covers all that is compared. `tables.py` makes the README's tables of it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from config import PARENTS, SEARCHES, SEEDS

from megajax.evaluation.results import aggregate
from megajax.io import read_json, write_json
from megajax.run.cli import main as run

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"


def run_cell(
    cell: str, folder: Path, origin: Path | None, seed: str, fields: Sequence[str]
) -> None:
    """One search, one seed; from the parents of `origin`, if there is one."""
    where = ["--workdir", str(folder)]
    if origin is not None:
        where = ["--workdir", str(origin), "--fork", str(folder)]
    values = [f"--config.{field}" for field in fields]
    config = f"{HERE / 'config.py'}:{cell}"
    code = run(["study", "--config", config, "--seeds", seed, *where, *values])
    if code:
        sys.exit(code)


def finished(folder: Path, search: str) -> set[str]:
    """The seeds of which a search has results."""
    return {path.parent.name for path in (folder / search).glob(f"seed*/{RESULTS.name}")}


def one_seed(folder: Path, seed: str, searches: Sequence[str]) -> dict[str, Any]:
    """The results of the first search, with what the others found among the baselines."""
    results: dict[str, Any] = read_json(folder / searches[0] / seed / RESULTS.name)
    for search in searches[1:]:
        other = read_json(folder / search / seed / RESULTS.name)
        if search == "finetuned":
            names = ("merged_finetuned", "best_parent_finetuned")
            results["baselines"] |= {name: other["baselines"][name] for name in names}
            continue
        name = search.replace("-", "_")
        cost = {"evaluations": other["evaluations"]}
        results["baselines"][f"evolved_{name}"] = cost | other["merged"]
        if "random_search" in other["baselines"]:
            results["baselines"][f"random_search_{name}"] = other["baselines"]["random_search"]
    return results


def main() -> None:
    """Runs what is not there yet; collects it if all of it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", choices=SEARCHES)
    parser.add_argument("--seeds", nargs="+", type=int, help="else all that the tables have")
    parser.add_argument("--workdir", type=Path, default=Path("runs/study"))
    parser.add_argument("--parents", type=Path, default=Path("nowhere"), metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=PARENTS, default=PARENTS)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    options = parser.parse_args()
    searches = SEARCHES[options.data]
    seeds = options.seeds or range(SEEDS[options.data])
    for search in searches:
        for parents in options.only:
            folder = options.workdir / options.data / parents
            origin = None if search == searches[0] else folder / searches[0]
            cell = f"{options.data}/{parents}/{search}"
            for seed in seeds:
                files = sorted((options.parents / parents / f"seed{seed}").glob("*.npz"))
                given = [f"parents.paths={','.join(map(str, files))}"] if files else []
                run_cell(cell, folder / search, origin, str(seed), [*options.set, *given])
        jax.clear_caches()  # a process can hold the compiled programs of about a hundred runs
    collected = {}
    for parents in options.only:
        folder = options.workdir / options.data / parents
        done = finished(folder, searches[0])
        there = [search for search in searches if finished(folder, search) >= done]
        collected[parents] = aggregate([one_seed(folder, seed, there) for seed in sorted(done)])
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    settings = results.get(options.data, {}) | collected
    settings = {parents: settings[parents] for parents in PARENTS if parents in settings}
    write_json(RESULTS, results | {options.data: settings})


if __name__ == "__main__":
    main()
