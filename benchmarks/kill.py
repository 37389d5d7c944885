"""Does a run that was killed at any instant end as an undisturbed one does?

    python benchmarks/kill.py [--instants 50] [--seed 0] [--json FILE]

Starts the real command and kills it (SIGKILL) at random instants of the training, the search and
the finishing, two for each run; starts it again and compares all it leaves, times apart, with what
an undisturbed run left. Prints a line for each run; exit code 1 if one differs.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OVERRIDES = {
    "data.limit": 200,
    "model.options.width": 4,
    "training.epochs": 4,
    "evolution.population_size": 6,
    "evolution.generations": 12,
    "checkpoint.every_seconds": 0.0,
    "baselines.names": "random_search",
    "robustness.examples": 50,
}
# Each phase begins when the file before it appears, and ends when its own does.
PHASES = {"training": "stages/parents.json", "search": "stages/search.json", "finishing": ""}
STARTS = dict(zip(PHASES, ["config.json", *PHASES.values()], strict=False))


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Starts the command; programs are compiled once and then read from the disk."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "megajax.run", "--config", "experiments/digits.py"]
    command += [f"--config.{name}={value}" for name, value in OVERRIDES.items()]
    return subprocess.Popen(
        [*command, "--workdir", str(folder)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(folder: Path) -> str:
    """Starts the command and waits for its end; what it wrote to the standard error."""
    process = start(folder)
    errors = process.communicate()[1].decode()
    if process.returncode:
        raise SystemExit(f"{folder}: exit code {process.returncode}\n{errors}")
    return errors


def wait_for(file: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the file is there or the process has ended."""
    while not file.exists() and process.poll() is None:
        time.sleep(0.002)


def durations(folder: Path) -> dict[str, float]:
    """Runs undisturbed and takes the time of each phase."""
    process = start(folder)
    wait_for(folder / "config.json", process)
    taken, before = {}, time.monotonic()
    for phase, end in PHASES.items():
        if end:
            wait_for(folder / end, process)
        else:
            process.communicate()
        taken[phase] = time.monotonic() - before
        before = time.monotonic()
    return taken


def kill(folder: Path, phase: str, delay: float) -> str:
    """Kills the command so many seconds into a phase; says where it had got to."""
    process = start(folder)
    wait_for(folder / STARTS[phase], process)
    time.sleep(delay)
    process.kill()
    process.communicate()
    done = [
        name
        for name in ("parents", "search", "measure", "report")
        if (folder / "stages" / f"{name}.json").exists()
    ]
    metrics = folder / "metrics.jsonl"
    lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    return f"after {done[-1] if done else 'nothing'}, {lines} lines of metrics"


def content(folder: Path) -> dict[str, object]:
    """Everything that a run leaves, without the times in it."""
    results = json.loads((folder / "results.json").read_text())
    del results["seconds"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [list(line.items()) for line in lines if line.pop("seconds") is not None]
    networks = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.msgpack")}
    return {"results.json": results, "metrics.jsonl": lines, **networks}


def disturb(folder: Path, instants: int, seed: int) -> list[dict[str, object]]:
    """Kills runs in workdirs under the folder so many times, each of them twice, and ends them.

    Returns:
        For each run when it was killed, what it wrote to the standard error in the end, and the
        names of what differs from the undisturbed run.
    """
    rng = random.Random(seed)
    finish(folder / "warm")  # compiles
    taken = durations(folder / "undisturbed")
    expected = content(folder / "undisturbed")
    turns = itertools.cycle(PHASES)
    rows = []
    for number in range(instants // 2):
        workdir, killed = folder / f"killed{number}", []
        for phase in sorted([next(turns), next(turns)], key=list(PHASES).index):
            delay = rng.uniform(0, taken[phase])
            killed.append(f"{delay:.3f} s into {phase}: {kill(workdir, phase, delay)}")
        errors = finish(workdir)
        found = content(workdir)
        differs = [k for k in {**expected, **found} if expected.get(k) != found.get(k)]
        rows.append({"killed": killed, "stderr": errors, "differs": differs})
    return rows


def main() -> None:
    """Prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instants", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = disturb(Path(folder), options.instants, options.seed)
    for row in rows:
        verdict = f"DIFFERS in {row['differs']}" if row["differs"] else "the same"
        print("; ".join(row["killed"]), "->", verdict)
    wrong = sum(bool(row["differs"]) for row in rows)
    print(f"{len(rows) - wrong} of {len(rows)} runs ended as the undisturbed one")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
