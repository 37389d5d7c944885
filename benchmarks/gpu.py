"""What a GPU does with a population: one command, at most 8 minutes on one H100.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json [--images cifar10.npz]
    python benchmarks/gpu.py --docs docs/gpu.md     # the page, from the JSON file
    python benchmarks/gpu.py --dry                  # every part, tiny, on a CPU

Needs nothing but JAX, Flax, optax and chex. Each part runs in a process of its own, with its own
XLA flags and its own limit of time, so that a part that dies or hangs costs only itself. The most
telling parts come first; what the limit for all leaves no time for is reported as not measured, and
a later call with `--parts` adds it to the same file, and keeps the rows that it does not reach.

`--images` names an npz file with `train` and `test` (uint8, [N, 32, 32, 3]), `train_y` and
`test_y`; without it images are noise, and the parts that train networks are left out.

The floor of a case is the longer of two times: its operations at the rate of the matrix product,
and each convolution's input and output, moved once, at the rate of the copy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

MARK = "@result "
RESULTS = Path(__file__).parent / "results" / "gpu.json"


class Part(NamedTuple):
    """One part: its name, what it shows, its limit in seconds, and the flags it runs with."""

    name: str
    title: str
    limit: float
    flags: str = ""
    needs_images: bool = False


PARTS = (
    Part("ceilings", "What the card can do", 40),
    Part(
        "population_bfloat16", "ResNet-56, bfloat16: networks side by side, images in a pass", 110
    ),
    Part("population_tf32", "The same in float32 (TF32 on this card)", 110),
    Part("search", "A whole search, and one that was resumed half way", 90),
    Part(
        "search_deterministic",
        "The same without operations that may differ from run to run",
        90,
        "--xla_gpu_exclude_nondeterministic_ops=true",
    ),
    Part("recalibrate", "BatchNorm's statistics measured anew for every network", 60),
    Part("cifar10", "Two ResNet-20 trained on skewed parts of CIFAR-10, and merged", 150, "", True),
    Part(
        "flags_conv_fusion",
        "XLA's fusion into convolutions",
        60,
        "--xla_gpu_experimental_enable_conv_fusion=true",
    ),
    Part(
        "flags_command_buffer",
        "Convolutions and loops in command buffers",
        60,
        "--xla_gpu_enable_command_buffer=+CONVOLUTION,+WHILE",
    ),
    Part("others", "Other networks", 110),
)


def report(**row: Any) -> None:
    """One row of results, for the process above and for the reader."""
    print(MARK + json.dumps(row), flush=True)


# The parts, each in a process of its own ----------------------------------------------------------


def ceilings(dry: bool) -> None:
    """Operations a second of large matrix products, bytes a second of a large copy."""
    import jax
    import jax.numpy as jnp
    from timing import copy_rate, seconds

    side = 256 if dry else 8192
    report(device=jax.devices()[0].device_kind, jax=jax.__version__)
    for name, dtype, precision in (
        ("bfloat16", "bfloat16", "default"),
        ("tf32", "float32", "default"),
        ("float32", "float32", "highest"),
    ):
        matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
        product = jax.jit(lambda a, b, p=precision: jnp.matmul(a, b, precision=p))
        report(matrix_product=name, flops=2 * side**3 / seconds(product, matrix, matrix))
    report(copy=copy_rate())


class Case(NamedTuple):
    """A network, two parents and the images that a population between them is scored on."""

    name: str
    model: Any
    apply_fn: Any
    parents: list[Any]
    data: tuple[Any, Any]
    population: int


def make_case(
    network: str, dtype: str, dry: bool, population: int = 20, examples: int = 5000
) -> Case:
    """Two untrained parents, and noise for images."""
    import jax
    import numpy as np

    import megajax as mj
    from megajax.zoo import networks

    family, options = {
        "mlp": ("mlp", {"hidden": (512, 512, 512)}),
        "resnet56": ("resnet", {"depth": 8 if dry else 56}),
        "densenet121": ("densenet", {"depth": 121, "stem": "cifar"}),
    }[network]
    if dtype == "bfloat16" and not dry:  # jaxlib 0.11's CPU backend makes NaN of such convolutions
        options = options | {"dtype": dtype}
    population, examples = (4, 24) if dry else (population, examples)
    model = networks.build(family, 10, options)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(examples, 32, 32, 3)).astype(np.float32)
    init = jax.jit(model.init)
    parents = [init(jax.random.key(k), images[:1]) for k in range(2)]
    apply_fn = mj.from_linen(model, {}, train=False).apply_fn
    data = images, rng.integers(0, 10, examples)
    return Case(f"{network} {dtype}", model, apply_fn, parents, data, population)


def traffic_and_flops(case: Case) -> tuple[int, float]:
    """Of one image through one network: bytes that convolutions read and write, operations."""
    import jax

    program = jax.make_jaxpr(case.apply_fn)(case.parents[0], case.data[0][:1])
    moved, flops = 0, 0.0
    for equation in program.jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            x, w, y = (*(a.aval for a in equation.invars), equation.outvars[0].aval)
            moved += x.size * x.dtype.itemsize + y.size * y.dtype.itemsize
            flops += 2 * y.size * w.size / w.shape[-1]
    return moved, flops


def in_one_program(
    case: Case, chunk: int, batch: int, **options: Any
) -> tuple[Any, tuple[Any, ...]]:
    """The library's evaluation of the population, and its arguments."""
    import jax

    import megajax as mj

    fitness = mj.FitnessConfig(metric="accuracy", population_chunk=chunk, batch_size=batch)
    genome = mj.GenomeConfig(granularity="leaf")
    problem = mj.problem_for(
        case.apply_fn,
        case.parents,
        case.data,
        fitness=fitness,
        genome=genome,
        population_size=case.population,
        **options,
    )
    genes = problem.genome.init(jax.random.key(2), case.population)
    return jax.jit(mj.evaluate), (problem, genes)


def host_loop(case: Case, batch: int) -> tuple[Any, Callable[[Any], Any]]:
    """What a user writes: a jitted function scores one network, called for each of them."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from timing import score_one

    images, labels = (np.asarray(x).reshape(-1, batch, *x.shape[1:]) for x in case.data)
    genes = jax.random.uniform(jax.random.key(2), (case.population,))

    arguments = (genes[0], *case.parents, jnp.asarray(images), jnp.asarray(labels))
    program = score_one.lower(case.apply_fn, *arguments).compile()
    return program, lambda: [program(share, *arguments[1:]) for share in genes]


def timed(case: Case, cells: list[tuple[str, int, int]], name: str = "", **options: Any) -> None:
    """Compiles and times one cell after another."""
    import jax
    from timing import seconds

    name = name or case.name
    moved, flops = traffic_and_flops(case)
    total = case.population * len(case.data[0])
    report(
        case=name,
        networks=case.population,
        images=len(case.data[0]),
        bytes=moved * total,
        flops=flops * total,
    )
    for way, chunk, batch in cells:
        row = {"case": name, "way": way, "chunk": chunk, "batch": batch}
        begin = time.perf_counter()
        try:
            if way == "host loop":
                program, run = host_loop(case, batch)
            else:
                function, arguments = in_one_program(case, chunk, batch, **options)
                program = function.lower(*arguments).compile()

                def run(program: Any = program, arguments: Any = arguments) -> Any:
                    return program(*arguments)

            compilation = time.perf_counter() - begin
            took = seconds(run, repeats=3)
        except jax.errors.JaxRuntimeError as error:
            report(**row, failed=str(error).splitlines()[0][:120])
            continue
        temporary = getattr(program.memory_analysis(), "temp_size_in_bytes", None)
        report(**row, seconds=took, compilation=compilation, temporary=temporary)


def population(dtype: str, dry: bool) -> None:
    """The grid that `auto` follows."""
    case = make_case("resnet56", dtype, dry)
    large, middle, small = (24, 12, 6) if dry else (5000, 1250, 500)
    grid = [(case.population, small), (4, middle), (1, large), (8, middle)]
    timed(case, [("one program", *cell) for cell in grid] + [("host loop", 1, large)])


def others(dry: bool) -> None:
    """Networks without convolutions, and with many."""
    case = make_case("mlp", "tf32", dry)
    images = len(case.data[0])
    cells = [("one program", chunk, images) for chunk in (1, 4, case.population)]
    timed(case, [*cells, ("host loop", 1, images)])
    if not dry:
        case = make_case("densenet121", "bfloat16", dry, population=4, examples=2500)
        timed(case, [("one program", chunk, 1250) for chunk in (1, 4)])


def flags(dry: bool) -> None:
    """The best cells under the flags of this process."""
    case = make_case("resnet56", "bfloat16", dry)
    middle = 12 if dry else 1250
    name = f"{case.name}, {os.environ.get('XLA_FLAGS', '')}"
    timed(case, [("one program", 4, middle)], name)


def recalibrate(dry: bool) -> None:
    """Statistics on 1,000 images before each network is scored on 5,000."""
    import megajax as mj

    case = make_case("resnet56", "bfloat16", dry)
    middle, examples = (12, 12) if dry else (1250, 1000)
    options = {
        "recalibrate": mj.RecalibrateConfig(enabled=True, examples=examples),
        "calibration": case.data[0][:examples],
    }
    timed(case, [("one program", 4, middle)], f"{case.name}, recalibrated", **options)


def search(dry: bool) -> None:
    """Twenty generations at once, and ten and ten; the bits compared."""
    import jax
    import numpy as np

    import megajax as mj

    case = make_case("resnet56", "bfloat16", dry)
    generations = 4 if dry else 20

    def run(until: int, state: Any = None) -> tuple[Any, float]:
        begin = time.perf_counter()
        evolution = mj.EvolutionConfig(
            population_size=case.population, generations=until, generations_per_chunk=5
        )
        found = mj.merge(
            jax.random.key(0),
            case.apply_fn,
            case.parents,
            case.data,
            align=mj.AlignConfig(method="none"),
            evolution=evolution,
            state=state,
        )
        return found, time.perf_counter() - begin

    whole, first = run(generations)
    again, further = run(generations)
    half, _ = run(generations // 2)
    resumed, _ = run(generations, half.state)

    def equal(one: Any, other: Any) -> bool:
        pairs = zip(jax.tree.leaves(one.state), jax.tree.leaves(other.state), strict=True)
        return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)

    report(
        case=f"{case.name}, {generations} generations",
        first_call=first,
        further_call=further,
        repeated_equal=equal(whole, again),
        resumed_equal=equal(whole, resumed),
    )


def cifar10(dry: bool, images: str | None) -> None:
    """Trains a pair, merges it by genetic and by gradient search; test accuracies."""
    import jax
    import numpy as np

    import megajax as mj
    from megajax.evaluation.measures import measure
    from megajax.zoo import networks, training
    from megajax.zoo.data import Split
    from megajax.zoo.training import TrainingConfig

    if dry or images is None:
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 255, (120, 32, 32, 3), np.uint8)
        labels = rng.integers(0, 10, 120)
        sets = {"train": pixels, "test": pixels, "train_y": labels, "test_y": labels}
    else:
        sets = dict(np.load(images))
    mean, std = np.float32([0.491, 0.482, 0.447]), np.float32([0.247, 0.243, 0.262])

    def split(part: str, rows: slice) -> Split:
        pixels = sets[part][rows].astype(np.float32) / 255
        return Split((pixels - mean) / std, sets[f"{part}_y"][rows].astype(np.int32))

    held = len(sets["train"]) // 10
    validation, train = split("train", slice(held)), split("train", slice(held, None))
    test = split("test", slice(None))
    model = networks.build("resnet", 10, {"depth": 8 if dry else 20})
    apply_fn = mj.from_linen(model, {}, train=False).apply_fn
    rng, even = np.random.default_rng(0), train.labels % 2 == 0
    home = rng.random(len(even)) < 0.8
    shards = [np.flatnonzero(even == home), np.flatnonzero(even != home)]
    epochs = 1 if dry else 12
    config = TrainingConfig(
        epochs=epochs,
        batch_size=32 if dry else 256,
        optimizer="sgd",
        learning_rate=0.1,
        weight_decay=5e-4,
        augment=("flip", "crop"),
    )
    begin = time.perf_counter()
    parents, _ = training.train(jax.random.key(0), model, train, shards, config)
    report(case="training two ResNet-20", epochs=epochs, seconds=time.perf_counter() - begin)

    def tested(variables: Any) -> float:
        return measure(mj.predict(apply_fn, variables, test.images), test.labels).accuracy

    report(case="parents", test=[tested(parent) for parent in parents])
    few = train.images[: 24 if dry else 1000]
    many = train.images[: 48 if dry else 20_000]
    common = {
        "calibration": few,
        "align": mj.AlignConfig(method="both"),
        "recalibrate": mj.RecalibrateConfig(enabled=True, examples=len(few)),
    }
    size, generations = (4, 2) if dry else (20, 75)
    for name, data, method in (
        ("gradient, label-free", mj.Task(many, metric="distill"), "gradient"),
        ("genetic, labels", (validation.images, validation.labels), "genetic"),
    ):
        short = method == "gradient" and not dry
        evolution = mj.EvolutionConfig(
            method=method, population_size=size, generations=10 if short else generations
        )
        begin = time.perf_counter()
        found = mj.merge(jax.random.key(1), apply_fn, parents, data, evolution=evolution, **common)
        report(
            case=name,
            seconds=time.perf_counter() - begin,
            test=tested(found.variables),
            examples_scored=found.examples_scored,
        )


def run_part(name: str, dry: bool, images: str | None) -> None:
    """One part, in a process of its own."""
    kind, _, rest = name.partition("_")
    parts: dict[str, Callable[[], None]] = {
        "ceilings": lambda: ceilings(dry),
        "population": lambda: population(rest, dry),
        "search": lambda: search(dry),
        "recalibrate": lambda: recalibrate(dry),
        "cifar10": lambda: cifar10(dry, images),
        "flags": lambda: flags(dry),
        "others": lambda: others(dry),
    }
    parts[kind]()


# The process above --------------------------------------------------------------------------------


def start(part: Part, options: argparse.Namespace) -> subprocess.Popen[str]:
    """A process that has imported everything and waits for a line on its standard input."""
    environment = dict(os.environ)
    if options.dry:
        environment["JAX_PLATFORMS"] = "cpu"
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {part.flags}".strip()
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, "--part", part.name, *(["--dry"] if options.dry else [])]
    command += ["--images", options.images] if options.images else []
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def follow(process: subprocess.Popen[str], limit: float) -> Iterator[str]:
    """The lines that a process prints, until it ends or its time is up; then it is killed."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    end = time.monotonic() + limit
    while True:
        try:
            line = lines.get(timeout=max(end - time.monotonic(), 0.01))
        except queue.Empty:
            process.kill()
            yield f"stopped after {limit:.0f} s\n"
            return
        if line is None:
            return
        yield line


def measure_all(options: argparse.Namespace) -> list[str]:
    """Runs the parts, writes what they found, and names those that did not end well."""
    began = time.monotonic()
    there = options.json is not None and options.json.exists()
    results: dict[str, Any] = json.loads(options.json.read_text()) if there else {}
    named = {part.name: part for part in PARTS}
    parts = [named[name] for name in options.parts]
    if options.images is None and not options.dry:
        parts = [part for part in parts if not part.needs_images]
    bad: list[str] = []
    upcoming = start(parts[0], options)
    for number, part in enumerate(parts):
        process = upcoming
        if number + 1 < len(parts):
            upcoming = start(parts[number + 1], options)
        left = options.seconds - (time.monotonic() - began)
        if left < 10:
            process.kill()
            bad.append(part.name)
            continue
        print(f"== {part.name} ({time.monotonic() - began:.0f} s)", flush=True)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it may have died already
            process.stdin.write("go\n")
            process.stdin.close()
        rows, last = [], ""
        for line in follow(process, min(options.slack * part.limit, left)):
            last = line.strip() or last
            if line.startswith(MARK):
                rows.append(json.loads(line.removeprefix(MARK)))
            print("  ", line.removeprefix(MARK), end="", flush=True)
        state = "done" if process.wait() == 0 else last
        if state != "done":
            bad.append(part.name)
        before = results.get(part.name, {"rows": []})
        kept = _beside(rows, before["rows"])
        results[part.name] = {"rows": kept + rows, "state": state}
        if "note" in before:  # added by hand: it stands while a row that it may be about does
            if kept:
                results[part.name]["note"] = before["note"]
            else:
                print(f"   measured anew, without its note: {before['note']}", flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{time.monotonic() - began:.0f} s; not done: {', '.join(bad) or 'none'}")
    return bad


def _beside(rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of an earlier call that this one did not measure."""

    def named(row: dict[str, Any]) -> set[tuple[str, Any]]:
        names = {key: row[key] for key in ("case", "way", "chunk", "batch") if key in row}
        return set((names or dict.fromkeys(row)).items())

    return [old for old in before if named(old) not in [named(row) for row in rows]]


# The page -----------------------------------------------------------------------------------------


def page(results: dict[str, Any]) -> str:
    """The results as Markdown; what is missing is said to be not measured."""
    rows = results.get("ceilings", {}).get("rows", [])
    device = next((f"{r['device']}, JAX {r['jax']}" for r in rows if "device" in r), "a GPU")
    lines = [
        "# On a GPU",
        "",
        f"Measured on one {device}, by `python benchmarks/gpu.py`; this page is made from",
        "`benchmarks/results/gpu.json` by `python benchmarks/gpu.py --docs docs/gpu.md`.",
        "",
    ]
    for part in PARTS:
        found = results.get(part.name, {"rows": [], "state": ""})
        lines += [f"## {part.title}", ""]
        table = [row for row in found["rows"] if "bytes" not in row]
        if not table:
            lines += ["Not measured.", ""]
            continue
        lines += _table(table, _floors(results, found["rows"]))
        if "note" in found:
            lines += [found["note"], ""]
        if found["state"] != "done":
            lines += [f"(This part was not finished: {found['state'][:100]}.)", ""]
    return "\n".join(lines).rstrip() + "\n"


def _floors(results: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """The floor of each case in seconds."""
    found = results.get("ceilings", {}).get("rows", [])
    rates = {row["matrix_product"]: row["flops"] for row in found if "matrix_product" in row}
    copy = next((row["copy"] for row in found if "copy" in row), None)
    floors = {}
    for row in rows:
        if "bytes" in row and copy and rates:
            kind = "bfloat16" if "bfloat16" in row["case"] else "tf32"
            floors[row["case"]] = max(row["flops"] / rates[kind], row["bytes"] / copy)
    return floors


def _table(rows: list[dict[str, Any]], floors: dict[str, float]) -> list[str]:
    """Rows with the same keys as one table after another."""
    if any("matrix_product" in row or "copy" in row for row in rows):
        told = [
            f"- matrix product in {row['matrix_product']}: {row['flops'] / 1e12:.0f} TFLOP/s"
            for row in rows
            if "matrix_product" in row
        ]
        told += [f"- copy: {row['copy'] / 1e12:.2f} TB/s" for row in rows if "copy" in row]
        return [*told, ""]
    if all("way" in row for row in rows):
        head = ["case", "way", "networks side by side", "images in a pass", "seconds"]
        head += ["times the floor", "compiled in"]
        body = []
        for row in rows:
            floor = floors.get(row["case"])
            took = f"{row['seconds']:.3g}" if "seconds" in row else row.get("failed", "")
            times = f"{row['seconds'] / floor:.1f}" if floor and "seconds" in row else ""
            compiled = f"{row['compilation']:.0f} s" if "compilation" in row else ""
            cells = (row["case"], row["way"], row["chunk"], row["batch"], took, times, compiled)
            body.append([str(cell) for cell in cells])
        return [*_markdown([head, *body]), ""]
    lines = []
    for row in rows:
        told = [
            f"{key.replace('_', ' ')} {value if not isinstance(value, float) else f'{value:.3g}'}"
            for key, value in row.items()
            if key != "case"
        ]
        lines.append(f"- {row.get('case', '')}: {', '.join(told)}")
    return [*lines, ""]


def _markdown(rows: list[list[str]]) -> list[str]:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "| " + " | ".join("---" for _ in rows[0]) + " |", *body]


def main() -> None:
    """Measures, or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="every part, tiny, on a CPU")
    parser.add_argument("--json", type=Path, help="where results are written, part by part")
    parser.add_argument("--docs", type=Path, help="write this page from the results, and no more")
    parser.add_argument("--images", help="npz file of CIFAR-10")
    parser.add_argument("--seconds", type=float, default=480, help="limit for all parts together")
    parser.add_argument(
        "--parts",
        nargs="+",
        default=[part.name for part in PARTS],
        choices=[part.name for part in PARTS],
    )
    parser.add_argument("--slack", type=float, default=1, help="times each part's limit")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        import flax.linen  # noqa: F401

        import megajax  # noqa: F401

        sys.stdin.readline()  # until then nothing may touch the device
        run_part(options.part, options.dry, options.images)
        return
    if options.docs:
        source = options.json or RESULTS
        results = json.loads(source.read_text()) if source.exists() else {}
        options.docs.write_text(page(results))
        return
    bad = measure_all(options)
    if options.dry and bad:
        sys.exit(1)


if __name__ == "__main__":
    main()
