"""Several processes of one run: they give what one process gives, and only the first one writes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from megajax.run import cli as run
from megajax.run import processes as distributed

CONFIG = """
import megajax as mj


def get_config():
    return mj.Config(
        smoke=True,
        data=mj.DataConfig(validation_fraction=0.3),
        model=mj.ModelConfig(options={"width": 4}),
        parents=mj.ParentsConfig(shards="skewed"),
        fitness=mj.FitnessConfig(metric="accuracy"),
        evolution=mj.EvolutionConfig(population_size=7, generations=5),
        robustness=mj.RobustnessConfig(enabled=False),
        baselines=mj.BaselinesConfig(names=()),
    )
"""
LIMIT = 300  # seconds, for processes that share few cores with others


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return path


def environment(tmp_path, devices):
    (tmp_path / "tmp").mkdir(exist_ok=True)
    kept = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    flags = [*kept, f"--xla_force_host_platform_device_count={devices}"]
    return {**os.environ, "XLA_FLAGS": " ".join(flags), "TMPDIR": str(tmp_path / "tmp")}


def start(tmp_path, *arguments, devices=1):
    return subprocess.Popen(
        [sys.executable, "-m", "megajax.run", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(tmp_path, devices),
    )


def start_two(tmp_path, *arguments, devices=1, also=((), ())):
    port = free_port()
    cluster = ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--processes", 2]
    return [
        start(tmp_path, *arguments, *cluster, "--process", i, *also[i], devices=devices)
        for i in range(2)
    ]


def ended(processes):
    """Exit code and what was said, of each."""
    try:
        said = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def results(folder):
    found = json.loads((folder / "results.json").read_text())
    for name in ("seconds", "plan", "forked_from"):
        found.pop(name, None)
    found["settings"].pop("computed on")
    return found


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name != "seconds"} for row in rows]


def own_lines(text):
    """Without what the collectives' library says on the standard output."""
    return [line for line in text.splitlines() if line and not line.startswith("[Gloo]")]


def test_one_process_agrees_with_itself(monkeypatch):
    """And asks nobody: nothing of JAX's helpers for several processes is called."""
    for name in ("process_allgather", "broadcast_one_to_all", "sync_global_devices"):
        monkeypatch.setattr(distributed.multihost_utils, name, None)
    tree = {"w": np.ones(2)}
    assert distributed.of_first(tree) is tree
    assert distributed.largest(15) == 15
    assert distributed.is_first()
    with pytest.raises(OSError, match="full"), distributed.together():
        raise OSError("full")


CLUSTER = ["--distributed", "--coordinator", "127.0.0.1:1", "--processes", "2", "--process", "0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*CLUSTER, "--config.evolution.time_budget=9.0"],
            "evolution.time_budget is 9.0: with --distributed",
        ),
        (CLUSTER[:3], "--processes is missing: it takes all three or none"),
        (CLUSTER[1:], "--coordinator is given without --distributed"),
        ([*CLUSTER[:-1], "2"], "--distributed: no connection: "),
    ],
)
def test_a_mistake_is_one_line_before_anybody_is_waited_for(
    arguments, message, config, tmp_path, capsys, monkeypatch
):
    def initialize(coordinator, processes, process, **options):
        assert not process < processes  # the real one does not work in a process that has devices
        raise ValueError("process_id and num_processes must be nonnegative.\nGot 2")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    command = ["run", "--config", str(config), "--workdir", str(tmp_path / "w"), *arguments]
    assert run.main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "w").exists()


ALONE = """
import sys
from megajax.run import processes as distributed
from megajax.errors import MegajaxError
try:
    distributed.connect(f"127.0.0.1:{sys.argv[1]}", 2, 1, timeout=3)
except MegajaxError as error:
    print(repr(str(error)))
"""


def test_a_process_that_finds_nobody_says_so_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(free_port())],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        env=environment(tmp_path, 1),
    )
    assert done.stdout.startswith("'--distributed: no connection to process 0 at 127.0.0.1:"), (
        done.stdout + done.stderr
    )
    assert done.stdout.count("\n") == 1
    assert "\\n" not in done.stdout


AGREE = """
import sys
import jax
import ml_dtypes
import numpy as np
from megajax.run import processes as distributed
from megajax.errors import ProcessError

me = int(sys.argv[2])
distributed.connect(f"127.0.0.1:{sys.argv[1]}", 2, me)
assert distributed.several() and distributed.is_first() == (me == 0)
mine = {
    "zeros": np.array([0.0, -0.0][:: 1 - 2 * me], np.float32),
    "nan": np.array([np.nan, me], np.float64),
    "half": np.full((2, 3), me + 0.5, ml_dtypes.bfloat16),
    "scalar": np.int32(me),
    "none": np.zeros((0, 4), np.float32),
    "flags": np.array([me == 0, True]),
    "device": jax.numpy.full(3, me, "uint8"),
}
first = {
    "zeros": np.array([0.0, -0.0], np.float32),
    "nan": np.array([np.nan, 0], np.float64),
    "half": np.full((2, 3), 0.5, ml_dtypes.bfloat16),
    "scalar": np.int32(0),
    "none": np.zeros((0, 4), np.float32),
    "flags": np.array([True, True]),
    "device": np.zeros(3, np.uint8),
}
got = distributed.of_first(mine)
assert got.keys() == first.keys()
for name, array in first.items():
    assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
    assert got[name].tobytes() == array.tobytes(), name
assert distributed.largest(15 * me) == 15
with distributed.together():
    pass
try:
    with distributed.together():
        if me == 1:
            raise OSError("disk full")
except (OSError, ProcessError) as error:
    print(repr(error))
"""


def test_two_processes_agree(tmp_path):
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", AGREE, str(port), str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(tmp_path, 1),
        )
        for i in range(2)
    ]
    first, second = ended(processes)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert own_lines(first[1]) == ["ProcessError('process 1 cannot go on; it says why')"]
    assert own_lines(second[1]) == ["OSError('disk full')"]


def test_a_folder_that_only_the_first_process_needs_stops_all(config, tmp_path):
    (tmp_path / "file").write_text("")
    command = ["--config", config, "--workdir", tmp_path / "file" / "run"]
    first, second = ended(start_two(tmp_path, *command))
    assert (first[0], second[0]) == (2, 2)
    assert "cannot be written: Not a directory" in first[2]
    assert "process 1: error: process 0 cannot go on; it says why" in second[2]


@pytest.mark.slow
def test_two_processes_give_what_one_gives_and_only_the_first_one_writes(config, tmp_path):
    alone = start(tmp_path, "--config", config, "--workdir", tmp_path / "one")
    assert ended([alone])[0][0] == 0
    command = ["--config", config, "--workdir", tmp_path / "two"]
    (code, out, error), second = ended(start_two(tmp_path, *command))
    assert (code, second[0]) == (0, 0), error + second[2]
    assert "Test accuracy on" in out
    assert own_lines(second[1]) == own_lines(second[2]) == []
    assert results(tmp_path / "two") == results(tmp_path / "one")
    assert lines(tmp_path / "two") == lines(tmp_path / "one")
    found = json.loads((tmp_path / "two" / "results.json").read_text())
    assert found["plan"]["mesh"] == {"population": 2, "network": 1}
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "tmp", "tiny.py"}
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("*")}
    (code, out, error), second = ended(start_two(tmp_path, *command))
    assert (code, second[0]) == (0, 0), error + second[2]
    assert "is finished; its result was" in out
    assert own_lines(second[1]) == []
    now = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("*")}
    assert {path.name for path in now if now[path] != there.get(path)} <= {".lock"}


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_the_same_command_goes_on(config, tmp_path):
    config.write_text(CONFIG.replace("smoke=True", "training=mj.TrainingConfig(epochs=2)"))
    options = ["--config", config, "--config.evolution.generations=60"]
    command = [*options, "--workdir", tmp_path / "run"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    processes = start_two(tmp_path, *command, devices=2)
    until = time.monotonic() + LIMIT
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)  # not the one that writes
    first, second = ended(processes)
    assert (first[0], second[0]) == (128 + signal.SIGTERM,) * 2, first[2] + second[2]
    assert "stopped and saved after generation" in first[2]
    assert not (tmp_path / "run" / "results.json").exists()
    (code, out, error), second = ended(start_two(tmp_path, *command))
    assert (code, second[0]) == (0, 0), error + second[2]
    assert "merging goes on after generation" in out
    whole = start(tmp_path, *options, "--workdir", tmp_path / "whole", devices=2)
    assert ended([whole])[0][0] == 0
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


@pytest.mark.slow
def test_seeds_and_forks_of_two_processes(config, tmp_path):
    config.write_text(CONFIG.replace("smoke=True", "smoke=True, export=('orbax',)"))
    command = ["--config", config, "--workdir", tmp_path / "old", "--seeds", "0:2"]
    for code, _, error in ended(start_two(tmp_path, *command)):
        assert code == 0, error
    assert (tmp_path / "old" / "results.json").exists()
    assert (tmp_path / "old" / "seed1" / "merged" / "orbax").exists()
    command += ["--fork", tmp_path / "new", "--config.genome.granularity=leaf"]
    (code, out, error), second = ended(start_two(tmp_path, *command))
    assert (code, second[0]) == (0, 0), error + second[2]
    assert "parents: taken from" in out
    assert (
        results(tmp_path / "new" / "seed1")["genes"] != results(tmp_path / "old" / "seed1")["genes"]
    )
