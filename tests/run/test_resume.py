"""Nothing is lost: runs that were killed, damaged or asked to stop end as undisturbed ones do."""

import errno
import io
import itertools
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from rich.console import Console

import megajax as mj
from megajax import io as files
from megajax import report
from megajax.evaluation import predictions
from megajax.run import checkpoint, pipeline
from megajax.run import cli as run
from megajax.run import store as workdir
from megajax.run.config import from_dict
from megajax.run.stages import comparing
from megajax.run.stages import searching as searching_stage
from megajax.zoo import training

ROOT = Path(__file__).parents[2]
TINY = {
    "data": {"validation_fraction": 0.3, "limit": 100},
    "model": {"name": "mlp", "options": {"hidden": (8,)}},
    "parents": {"shards": "skewed"},
    "training": {"epochs": 2},
    "align": {"method": "none"},
    "genome": {"granularity": "layer"},
    "evolution": {"population_size": 6, "generations": 3, "crossover": "uniform"},
    "checkpoint": {"every_seconds": 0},
    "baselines": {"names": ()},
    "robustness": {"enabled": False},
}


def tiny(**changes):
    """The tiny configuration with changed sections."""
    return from_dict({name: TINY.get(name, {}) | changes.get(name, {}) for name in TINY | changes})


def outcome(folder):
    """Everything that must not depend on what happened on the way: all but times."""
    results = json.loads((folder / "results.json").read_text())
    del results["seconds"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [list(line.items()) for line in lines if line.pop("seconds") is not None]
    networks = {name: mj.load_network(folder / name) for name in ("merged", "parents/1")}
    leaves = jax.tree.leaves(networks)
    return results, lines, [leaf.tobytes() for leaf in leaves]


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """A process can hold only so many programs; conftest has them read back from the disk."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished run, and copies of its workdir as it was after each write."""
    folder = tmp_path_factory.mktemp("undisturbed")
    snapshots, numbers = [], itertools.count()
    write = files.write_bytes

    def writing(path, data):
        write(path, data)
        taken = folder / f"snapshot{next(numbers)}"
        snapshots.append(shutil.copytree(folder / "run", taken))

    with pytest.MonkeyPatch.context() as patch:
        for module in (files, checkpoint, predictions):
            patch.setattr(module, "write_bytes", writing)
        pipeline.run(tiny(), folder / "run")
    return folder / "run", snapshots


@pytest.fixture
def no_plots(undisturbed, monkeypatch):
    """Drawing takes time, and nobody looks at the plots here."""

    def write_report(folder, *arguments):
        for name in ("report.md", "report.html"):
            (folder / name).write_text("")

    monkeypatch.setattr(report, "write_report", write_report)


@pytest.fixture
def copy(no_plots, tmp_path):
    """Copies a workdir to one that may be harmed."""
    return lambda folder: shutil.copytree(folder, tmp_path / f"copy{len(os.listdir(tmp_path))}")


def states(folder, stage="search"):
    """The checkpoints of a stage, oldest first."""
    names = [path.name for path in (folder / "checkpoints" / stage).glob("*.safetensors")]
    return sorted(int(name.split(".")[0]) for name in names)


def searching(snapshots):
    """The last copy of a run whose search was under way, with two checkpoints at least."""
    return next(copy for copy in reversed(snapshots) if states(copy)[-1:] == [2])


def flip(path, seed):
    """Flips one bit somewhere."""
    data = bytearray(path.read_bytes())
    rng = random.Random(seed)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


# --- killed -------------------------------------------------------------------------------------


def check_snapshots(undisturbed, copy, every, first):
    folder, snapshots = undisturbed
    for snapshot in snapshots[first::every]:
        killed = copy(snapshot)
        pipeline.run(tiny(), killed)
        assert outcome(killed) == outcome(folder), snapshot


def test_a_run_killed_after_a_write_ends_as_an_undisturbed_one(undisturbed, copy):
    assert len(undisturbed[1]) >= 18  # epochs, generations, networks, records
    check_snapshots(undisturbed, copy, every=5, first=1)


@pytest.mark.slow
def test_a_run_killed_after_any_write_ends_as_an_undisturbed_one(undisturbed, copy):
    check_snapshots(undisturbed, copy, every=1, first=0)


@pytest.mark.slow
def test_the_command_killed_at_random_instants_ends_as_an_undisturbed_one(tmp_path):
    disturb = runpy.run_path(str(ROOT / "benchmarks" / "kill.py"))["disturb"]
    rows = disturb(tmp_path, 10, 0)
    assert [len(row["killed"]) for row in rows] == [2] * 5
    assert [row["differs"] for row in rows] == [[]] * 5
    assert [row["stderr"] for row in rows] == [""] * 5


@pytest.mark.slow
def test_the_command_saves_when_it_is_asked_to_stop(tmp_path):
    kill = runpy.run_path(str(ROOT / "benchmarks" / "kill.py"))
    kill["OVERRIDES"]["checkpoint.every_seconds"] = 1e6  # saves for no other reason
    kill["OVERRIDES"]["evolution.generations"] = 500
    metrics, reached = tmp_path / "run" / "metrics.jsonl", 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = kill["start"](tmp_path / "run")
        kill["wait_for"](metrics, process)
        while process.poll() is None and len(metrics.read_text().splitlines()) <= reached + 1:
            time.sleep(0.01)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1].decode().splitlines()
        assert process.returncode == 128 + number
        reached, before = states(tmp_path / "run")[-1], reached
        assert reached > before
        assert errors == [
            "stopping as soon as the state is saved; once more to stop at once",
            f"stopped and saved after generation {reached}; the same command goes on from it",
        ]


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(undisturbed, no_plots, tmp_path):
    """Asked before and between epochs, generations and stages, until it is through."""
    stops = []
    for patience in itertools.count(1):
        asked = itertools.count(1)
        try:
            pipeline.run(
                tiny(checkpoint={"every_seconds": None}),
                tmp_path,
                stopping=lambda: next(asked) == patience,  # noqa: B023
            )
            break
        except mj.Interrupted as interruption:
            stops.append(str(interruption))
    assert outcome(tmp_path) == outcome(undisturbed[0])
    for expected in ("before the stage parents", "after epoch 1", "before the stage "):
        assert any(expected in stop for stop in stops)
    assert any("after generation" in stop for stop in stops)


def test_whatever_is_done_when_it_stops_is_not_done_again(no_plots, tmp_path, monkeypatch):
    """Baselines one by one, fine-tuning epoch by epoch."""
    config = tiny(
        finetune={"epochs": 2},
        baselines={"names": ("uniform_average", "greedy_soup")},
        checkpoint={"every_seconds": None},
    )
    pipeline.run(config, tmp_path / "straight")
    done, baselines, make_epoch = [], comparing.run_baselines, training.make_epoch

    def run_baselines(*arguments, config, **options):
        done.append(config.names)
        return baselines(*arguments, config=config, **options)

    def counted(*arguments, **options):
        run_epoch = make_epoch(*arguments, **options)

        def one(key, state):
            done.append(("epoch", int(state.epoch)))
            return run_epoch(key, state)

        return one

    monkeypatch.setattr(comparing, "run_baselines", run_baselines)
    monkeypatch.setattr(training, "make_epoch", counted)
    stops = []
    for patience in itertools.cycle([1, 2]):  # stops where it is asked for the second or third time
        asked = itertools.count()
        try:
            pipeline.run(
                config,
                tmp_path / "run",
                stopping=lambda: next(asked) >= patience,  # noqa: B023
            )
        except mj.Interrupted as interruption:
            stops.append(str(interruption))
            continue
        break
    assert outcome(tmp_path / "run") == outcome(tmp_path / "straight")
    epochs = [("epoch", 0), ("epoch", 1)]
    assert done == [*epochs, *epochs, ("uniform_average",), ("greedy_soup",)]
    for expected in (
        "after epoch 1",
        "before the baseline greedy_soup",
        "before the stage measure",
    ):
        assert any(expected in stop for stop in stops), stops


# --- damaged ------------------------------------------------------------------------------------


def damage(path, how):
    data = path.read_bytes()
    if how == "flip":
        flip(path, seed=len(data))
    else:
        path.write_bytes(data[: len(data) // 2 if how == "half" else 0])


def check_damage(original, expected, copy, damages):
    """Every damage is recovered from, or told in one line; never a traceback or other results."""
    for number, (name, how) in enumerate(damages):
        if number % 20 == 19:
            jax.clear_caches()
        harmed = copy(original)
        damage(harmed / name, how)
        error = ""
        try:
            pipeline.run(tiny(), harmed)
        except mj.MegajaxError as caught:
            error = str(caught)
        if error:
            assert "\n" not in error
            assert name in error
        else:
            assert outcome(harmed) == expected, (name, how)


def all_files(folder):
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]


def test_damage_to_what_later_stages_read_is_found(undisturbed, copy, caplog):
    folder, _ = undisturbed
    names = ["results.json", "stages/search.json", "merged/variables.msgpack", "config.json"]
    check_damage(folder, outcome(folder), copy, zip(names, itertools.repeat("flip")))
    told = [record.getMessage() for record in caplog.records if record.name.startswith("megajax")]
    assert len(told) == 3  # and an error for config.json
    assert all("is damaged: " in line and line.endswith(" is done again") for line in told)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flip", "half", "empty"])
def test_damage_to_any_file_of_a_finished_run(how, undisturbed, copy):
    folder, _ = undisturbed
    damages = [(name, how) for name in all_files(folder)]
    check_damage(folder, outcome(folder), copy, damages)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flip", "half"])
def test_damage_to_any_file_of_an_interrupted_run(how, undisturbed, copy):
    folder, snapshots = undisturbed
    original = searching(snapshots)
    damages = [(name, how) for name in all_files(original)]
    check_damage(original, outcome(folder), copy, damages)


@pytest.mark.parametrize("harmed", [1, 2])
def test_a_damaged_checkpoint_costs_one_warning_and_the_one_before_is_used(
    harmed, undisturbed, copy, caplog
):
    folder, snapshots = undisturbed
    killed = copy(searching(snapshots))
    steps = states(killed)
    for step in steps[-harmed:]:
        (file,) = (killed / "checkpoints" / "search").glob(f"{step}.*")
        flip(file, step)
    console = Console(record=True, quiet=False, file=io.StringIO(), width=200)
    pipeline.run(tiny(), killed, console)
    warnings = [record.getMessage() for record in caplog.records if "checkpoint" in record.msg]
    assert len(warnings) == harmed
    assert all("safetensors is not used: it is damaged" in line for line in warnings)
    resumed = f"merging goes on after generation {steps[-harmed - 1]}" if steps[harmed:] else ""
    assert resumed in console.export_text()
    assert outcome(killed) == outcome(folder)


# --- another configuration, another process -----------------------------------------------------


def test_a_fork_goes_on_from_the_old_state(undisturbed, no_plots, tmp_path, monkeypatch):
    """Two more generations from a finished search are those that a longer search does."""
    folder, _ = undisturbed
    longer = tiny(evolution={"generations": 5})
    pipeline.run(longer, tmp_path / "straight")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    monkeypatch.setattr(training, "train", None)  # would fail if called
    console = Console(file=io.StringIO(), width=80)
    pipeline.run(longer, tmp_path / "fork", console, origin=folder)
    assert console.file.getvalue().splitlines()[0] == (
        f"forked from {folder}, but evolution.generations is 5: parents, align taken from there; "
        "the search goes on from its last checkpoint; the rest is done anew"
    )
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    assert after == before
    results, lines, networks = outcome(tmp_path / "fork")
    forked = results.pop("forked_from")
    assert forked["workdir"] == str(folder)
    assert forked["changes"] == {"evolution.generations": [3, 5]}
    assert (results, lines, networks) == outcome(tmp_path / "straight")


@pytest.mark.parametrize(
    "change",
    [
        {"evolution": {"method": "niches"}},
        {"evolution": {"gradient_steps": 1}},
        {"align": {"method": "weights"}},
    ],
)
def test_a_fork_to_another_search_starts_it_anew(
    change, undisturbed, no_plots, tmp_path, monkeypatch, caplog
):
    folder, _ = undisturbed
    monkeypatch.setattr(training, "train", None)
    console = Console(file=io.StringIO(), width=80)
    stop = {"origin": folder, "stopping": lambda: True}
    with pytest.raises(mj.Interrupted, match=r"before the stage (align|search)"):
        pipeline.run(tiny(**change), tmp_path / "fork", console, **stop)
    assert "goes on from" not in console.file.getvalue()
    assert "parents" in console.file.getvalue()
    pipeline.run(tiny(**change), tmp_path / "fork")
    lines = files.read_lines(tmp_path / "fork" / "metrics.jsonl")
    assert [line["generation"] for line in lines] == [0, 1, 2, 3]
    assert not caplog.records


def test_a_fork_keeps_only_what_the_change_leaves_valid(
    undisturbed, no_plots, tmp_path, monkeypatch
):
    folder, _ = undisturbed
    monkeypatch.setattr(training, "train", None)
    with pytest.raises(mj.Interrupted, match="saved after generation 0"):  # of a new search
        pipeline.run(
            tiny(fitness={"metric": "accuracy"}),
            tmp_path / "fork",
            origin=folder,
            stopping=iter([False, True]).__next__,  # asked before the search, and in it
        )
    (line,) = files.read_lines(tmp_path / "fork" / "metrics.jsonl")
    assert 0 <= line["best_ever"] <= 1  # an accuracy, where the old fitness is below zero
    with pytest.raises(mj.ConfigError, match=r"nothing of .* can be kept when seed changes"):
        pipeline.run(from_dict({**TINY, "seed": 1}), tmp_path / "none", origin=folder)
    with pytest.raises(mj.ConfigError, match=r"generations is 2: the search .* did 3 already"):
        pipeline.run(tiny(evolution={"generations": 2}), tmp_path / "short", origin=folder)


def test_a_fork_that_was_killed_while_it_copied_has_to_be_repeated(
    undisturbed, no_plots, tmp_path, monkeypatch
):
    folder, _ = undisturbed
    longer = tiny(evolution={"generations": 4})

    def killed(old, new, **options):
        (new / "stages").mkdir()
        shutil.copy(old / "stages" / "parents.json", new / "stages")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(longer, tmp_path / "fork", origin=folder)
    with pytest.raises(mj.WorkdirError, match=r"fork that was interrupted: repeat that"):
        pipeline.run(longer, tmp_path / "fork")
    with pytest.raises(mj.Interrupted, match="before the stage search"):
        pipeline.run(longer, tmp_path / "fork", origin=folder, stopping=lambda: True)
    assert workdir.read_config(tmp_path / "fork")["forked_from"]["workdir"] == str(folder)
    assert states(tmp_path / "fork") == states(folder)


def test_how_often_to_save_may_differ_from_the_workdir(undisturbed):
    pipeline.run(tiny(checkpoint={"keep": 7}), undisturbed[0])
    with pytest.raises(mj.WorkdirError, match=r"training.epochs is 2 there, 3 here"):
        pipeline.run(tiny(training={"epochs": 3}), undisturbed[0])


def test_another_version_of_jax_is_told(undisturbed, copy, caplog):
    folder = copy(undisturbed[1][1])
    there = workdir.read_config(folder)
    there["versions"]["jax"] = "0.0.1"
    workdir.write_config(folder, there["config"], there)
    with pytest.raises(mj.Interrupted, match="before the stage parents"):
        pipeline.run(tiny(), folder, stopping=lambda: True)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    expected = f"{folder} was started with versions.jax 0.0.1, and goes on with {jax.__version__}: "
    assert warning == expected + "the last bits may differ from an undisturbed run's"


HOLD = """
import sys, time
from megajax.run.store import locked
with locked(__import__("pathlib").Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_and_a_dead_one_does_not_block(undisturbed, copy):
    folder = copy(undisturbed[1][0])
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(
            mj.WorkdirError, match=rf"another process \(number {holder.pid} on .*\) is at work in"
        ):
            pipeline.run(tiny(), folder)
        holder.kill()
    with workdir.locked(folder):
        pass


# --- faults -------------------------------------------------------------------------------------


def command(folder):
    return run.main(["run", "--config", str(folder.parent / "tiny.py"), "--workdir", str(folder)])


@pytest.fixture
def config_file(tmp_path):
    """A config file of the tiny configuration, beside the workdirs of the test."""
    (tmp_path / "tiny.py").write_text(
        f"import megajax as mj\n\n\ndef get_config():\n    return mj.Config(**{TINY!r})\n"
    )


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.", "lower fitness.population_chunk"),
        ("INTERNAL: the device fell off the bus", "goes on from the last checkpoint"),
    ],
)
def test_a_fault_of_the_device_is_one_line(
    message, advice, undisturbed, copy, config_file, monkeypatch, capsys
):
    folder = copy(searching(undisturbed[1]))

    def failing(*arguments, **options):
        raise jax.errors.JaxRuntimeError(f"{message}\nmore lines\nof it")

    with monkeypatch.context() as patch:
        patch.setattr(searching_stage, "merge", failing)
        assert command(folder) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: search: ")
    assert message in error
    assert advice in error
    assert states(folder) == states(searching(undisturbed[1]))


@pytest.mark.parametrize(
    "full",
    [
        "results.json",
        ".safetensors",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("measure.json", "metrics.jsonl", "variables.msgpack")
        ),
    ],
)
def test_a_full_disk_is_one_line_and_costs_nothing(
    full, undisturbed, copy, config_file, monkeypatch, capsys
):
    """What is there stays whole."""
    folder = copy(searching(undisturbed[1]))

    class Full:
        """A file that takes half of what is written to it."""

        def __init__(self, file):
            self._file = file

        def __enter__(self):
            self._file.__enter__()
            return self

        def __exit__(self, *arguments):
            return self._file.__exit__(*arguments)

        def write(self, data):
            self._file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = Path.open

    def open_full(path, mode="r", *arguments, **options):
        file = opened(path, mode, *arguments, **options)
        return Full(file) if full in path.name and mode[0] in "wa" else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        assert command(folder) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert "No space left on device" in error
    assert not (folder / "results.json").exists()
    assert not list(folder.rglob("*.partial"))
    assert command(folder) == 0
    assert outcome(folder) == outcome(undisturbed[0])


def test_a_search_that_cannot_go_on_stops_in_one_line_with_its_state_saved(
    undisturbed, copy, monkeypatch, capsys, config_file
):
    folder = copy(searching(undisturbed[1]))
    reached = states(folder)[-1]
    with monkeypatch.context() as patch:
        patch.setattr("megajax.search.loop.check_alive", stop_search)
        assert command(folder) == 2
    assert capsys.readouterr().err == "error: none is alive\n"
    assert states(folder)[-1] == reached + 1


def stop_search(*arguments):
    raise mj.SearchError("none is alive")
