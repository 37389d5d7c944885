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

from megajax import distributed, run, workdir
from megajax.errors import ProcessError

CONFIG = """
from megajax.config import default_config


def get_config():
    config = default_config()
    config.smoke = True
    config.data.validation_fraction = 0.3
    config.model.options = {"width": 4}
    config.parents.shards = "skewed"
    config.fitness.metric = "accuracy"
    config.evolution.population_size = 7
    config.evolution.generations = 5
    config.robustness.enabled = False
    config.baselines.names = ()
    return config
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
    return found


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name != "seconds"} for row in rows]


def own_lines(text):
    """Without what the collectives' library says on the standard output."""
    return [line for line in text.splitlines() if line and not line.startswith("[Gloo]")]
