"""The commands as a shell starts them: signals at any moment, threads, folders, missing devices."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import megajax as mj
from megajax import data
from megajax.run import cli, diagnose, pipeline

ROOT = Path(__file__).parents[2]
NEIGHBOUR = "import megajax as mj\n\n\nSIZES = {'small': 4, 'large': 64}\n"
EXPERIMENT = """
import megajax as mj
from sizes import SIZES


def get_config(size="small"):
    return mj.Config(model=mj.ModelConfig(options={"width": SIZES[size]}))
"""


@pytest.fixture(autouse=True)
def ctrl_c():
    """As a terminal has it: a shell lets what runs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "sizes.py").write_text(NEIGHBOUR)
    (tmp_path / "folder" / "exp.py").write_text(EXPERIMENT)
    return tmp_path / "folder" / "exp.py"


@pytest.fixture
def asked(monkeypatch):
    """What the command line asks the pipeline for."""
    calls = []

    def fake(config, folder, console, *, origin, stopping):
        calls.append((config, folder, origin))
        raise mj.WorkdirError("enough")

    monkeypatch.setattr(pipeline, "run", fake)
    return calls


def test_a_config_file_imports_its_neighbours_and_its_argument_is_in_the_workdirs_name(
    experiment, asked, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "--config", "folder/exp.py:large"]) == 2
    (config, folder, _) = asked[0]
    assert config.model.options == {"width": 64}
    assert folder == Path("runs/exp-large-seed0")
    cli.main(["run", "--config", str(experiment), "--config.seed", "3", "--config.smoke"])
    (config, folder, _) = asked[1]
    assert (config.seed, config.smoke, folder) == (3, True, Path("runs/exp-seed3"))
    cli.main(["run", "--config", f"{experiment}:large", "--seeds", "1,2"])
    assert asked[2][1] == Path("runs/exp-large/seed1")


def test_a_tilde_is_the_home_folder_everywhere(experiment, asked, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = ["--config", "~/folder/exp.py", "--workdir", "~/old", "--fork", "~/new"]
    assert cli.main(["run", *arguments, "--config.data.data_dir=~/data"]) == 2
    (config, folder, origin) = asked[0]
    assert (folder, origin) == (tmp_path / "new", tmp_path / "old")
    assert config.data.data_dir == str(tmp_path / "data")


def test_a_mistake_in_a_config_file_has_its_line(experiment, capsys):
    assert cli.main(["run", "--config", f"{experiment}:huge"]) == 2
    assert capsys.readouterr().err == f"error: {experiment}, line 7: KeyError: 'huge'\n"


def test_the_command_works_in_a_thread(experiment, asked, capsys):
    """Where Python allows no signal handlers."""
    codes = []
    arguments = ["run", "--config", str(experiment)]
    thread = threading.Thread(target=lambda: codes.append(cli.main(arguments)))
    thread.start()
    thread.join()
    assert codes == [2]
    assert capsys.readouterr().err == "error: enough\n"


def test_help_has_every_field_in_plain_words(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(["run", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("--workdir DIR", "--seeds", "--config.evolution.population_size=32", "--fork NEW"):
        assert flag in text
    about = text[text.index("Flags:") :]
    assert max(map(len, about.splitlines())) <= 70  # but for names and defaults: 60
    assert "Annotated" not in text
    assert "typing" not in text


def test_other_commands_explain_themselves(capsys):
    assert cli.main(["diagnose", "--help"], about=diagnose.__doc__) == 0
    assert capsys.readouterr().out.startswith("Says whether the parents of a run fit together")
    with pytest.raises(SystemExit):
        data.main(["--help"])
    said = capsys.readouterr().out
    assert "Downloads a TFDS image set" in said
    assert "Args:" not in said


def test_a_closed_pipe_is_no_error():
    """As in `megajax --help | head -1`, with one who has closed it before anything is said."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "megajax", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == ""


def run(*arguments, **environment):
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_back_end_that_is_not_there_is_one_line(experiment, tmp_path):
    for name in ("cuda", "nonsense"):
        done = run("-m", "megajax.run", "--config", experiment, JAX_PLATFORMS=name)
        assert done.returncode == 2
        assert re.fullmatch(rf"error: JAX finds no device .* is '{name}'.*\n", done.stderr)


def test_the_package_is_a_command_with_words():
    done = run("-m", "megajax", "--version")
    assert done.stdout == f"{mj.__version__}\n"
    assert "megajax compare" in run("-m", "megajax").stdout
    assert (
        run("-m", "megajax", "fly").stderr == "error: 'fly' is not a command; see megajax --help\n"
    )
    done = run("-m", "megajax", "run")
    assert done.returncode == 2
    assert done.stderr == "error: --config FILE is missing; see --help\n"


@pytest.mark.parametrize("library", ["numpy", "jaxlib", "sklearn"])
def test_ctrl_c_while_it_loads_is_one_line(library, experiment, tmp_path):
    """The last one is loaded at work, where the run is asked to stop: before its first stage."""
    command = [
        sys.executable,
        "-m",
        "megajax.run",
        "--config",
        experiment,
        "--workdir",
        tmp_path / "w",
    ]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while f"/{library}/" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    lines = process.communicate(timeout=300)[1].splitlines(keepends=True)
    error = "".join(line for line in lines if not re.match(r"[EW]\d{4} ", line))  # XLA's own
    assert process.returncode == 128 + signal.SIGINT
    if library == "sklearn":
        assert "stopping as soon as the state is saved" in error.splitlines()[0]
        assert len(error.splitlines()) == 2
    else:
        assert error == "interrupted\n"


def test_other_programs_keep_their_own_ctrl_c():
    code = (
        "import signal, megajax; "
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )
    assert run("-c", code).returncode == 0
