"""What a GPU does with a population: one command, at most 8 minutes on one H100.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json [--images cifar10.npz]
    python benchmarks/gpu.py --dry          # every part, tiny, on a CPU

Needs nothing but JAX, Flax, optax and chex. Each part runs in a process of its own, with its own
XLA flags and its own limit of time, so that a part that dies or hangs costs only itself. The most
telling parts come first; what the total limit leaves no time for is reported as not measured.

    ceilings       matrix products in bfloat16, TF32 and float32; a copy
    population_*   ResNet-56, 20 networks x 5,000 images: networks side by side x images in a pass
    others         an MLP and DenseNet-121, the same way
    folded         BatchNorm folded into the convolutions
    flags_*        the same passes under XLA flags that might help
    recalibrate    BatchNorm's statistics measured anew for every network

The floor of a case is the longer of two times: its operations at the rate of the matrix product,
and each convolution's input and output, moved once, at the rate of the copy.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MARK = "@result "


class Part(NamedTuple):
    """One part: its name, its limit in seconds, and the flags it runs with."""

    name: str
    limit: float
    flags: str = ""


PARTS = (
    Part("ceilings", 40),
    Part("population_bfloat16", 110),
    Part("population_tf32", 110),
    Part("folded", 60),
    Part("others", 60),
    Part("flags_conv_fusion", 45, "--xla_gpu_experimental_enable_conv_fusion=true"),
    Part("flags_command_buffer", 45, "--xla_gpu_enable_command_buffer=+CONVOLUTION,+WHILE"),
    Part("recalibrate", 45),
)


def report(**row: Any) -> None:
    """One row of results, for the process above and for the reader."""
    print(MARK + json.dumps(row), flush=True)


# The parts: each imports JAX only once it may touch the device ------------------------------------


def ceilings(dry: bool) -> None:
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
    """A population of networks between two untrained parents, and images."""

    apply_fn: Any
    parents: Any
    genome: Any
    genes: Any
    images: Any
    labels: Any


def make_case(network: str, dtype: str, population: int, examples: int, **options: Any) -> Case:
    import jax
    import numpy as np

    import megajax as mj
    from megajax.zoo import networks as models

    family, depth = {
        "mlp": ("mlp", {"hidden": (512, 512, 512)}),
        "resnet8": ("resnet", {"depth": 8}),
        "resnet56": ("resnet", {"depth": 56}),
        "densenet121": ("densenet", {"depth": 121, "stem": "cifar"}),
    }[network]
    options = depth | options | ({"dtype": dtype} if dtype == "bfloat16" else {})
    model = models.build(family, 10, options)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(examples, 32, 32, 3)).astype(np.float32)
    labels = rng.integers(0, 10, examples)
    init = jax.jit(model.init)
    parents = mj.stack_parents([init(jax.random.key(k), images[:1]) for k in range(2)])
    genome = mj.masks(parents, granularity="leaf")
    genes = genome.init(jax.random.key(2), population)
    apply_fn = mj.from_linen(model, {}, train=False).apply_fn
    return Case(apply_fn, parents, genome, genes, images, labels)


def traffic_and_flops(case: Case) -> tuple[int, float]:
    """Of one image through one network: bytes that convolutions read and write, operations."""
    import jax

    one = jax.tree.map(lambda leaf: leaf[0], case.parents)
    program = jax.make_jaxpr(case.apply_fn)(one, case.images[:1])
    moved, flops = 0, 0.0
    for equation in program.jaxpr.eqns:
        name = equation.primitive.name
        if name not in ("conv_general_dilated", "dot_general"):
            continue
        x, w, y = (*(a.aval for a in equation.invars), equation.outvars[0].aval)
        moved += x.size * x.dtype.itemsize + y.size * y.dtype.itemsize
        flops += 2 * y.size * w.size / w.shape[-1]
    return moved, flops


def program_of(case: Case, chunk: int, batch: int, apply_fn: Any = None) -> tuple[Any, tuple]:
    """The library's evaluation of the population as a jitted function, and its arguments."""
    import jax

    from megajax.merging.fitness import accuracy, batches, evaluator

    evaluate = evaluator(
        case.genome.express,
        apply_fn or case.apply_fn,
        accuracy,
        case.parents,
        batches(case.images, case.labels, batch),
        population_chunk=chunk,
    )
    return jax.jit(lambda evaluate, genes: evaluate(genes)), (evaluate, case.genes)


def host_loop(case: Case, batch: int) -> tuple[Any, tuple]:
    """What a user writes: a jitted function scores one network, called for each of them."""
    import jax

    from megajax.merging.fitness import accuracy, batches, example_scores

    def score(genes: Any, parents: Any, data: Any) -> Any:
        variables = case.genome.express(genes, parents)
        return example_scores(case.apply_fn, accuracy, variables, data).sum()

    data = batches(case.images, case.labels, batch)
    return jax.jit(score), (case.genes[0], case.parents, data)


def timed(case: Case, name: str, cells: list[tuple[str, int, int, Any]]) -> None:
    """Compiles all cells side by side, then times them one after another."""
    import jax
    from timing import seconds

    moved, flops = traffic_and_flops(case)
    total = len(case.genes) * len(case.images)
    report(
        case=name,
        networks=len(case.genes),
        images=len(case.images),
        bytes=moved * total,
        flops=flops * total,
    )

    def compile_(program: Any, arguments: tuple) -> tuple[Any, float]:
        start = time.perf_counter()
        return program.lower(*arguments).compile(), time.perf_counter() - start

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = [
            (
                host_loop(case, batch)
                if kind == "host loop"
                else program_of(case, chunk, batch, apply_fn)
            )
            for kind, chunk, batch, apply_fn in cells
        ]
        compiled = [pool.submit(compile_, *one) for one in made]
        concurrent.futures.wait(compiled)
    for (kind, chunk, batch, _), (_, arguments), future in zip(cells, made, compiled, strict=True):
        row = {"case": name, "way": kind, "chunk": chunk, "batch": batch}
        try:
            program, compilation = future.result()
            if kind == "host loop":

                def run() -> Any:
                    return [program(genes, *arguments[1:]) for genes in case.genes]

                took = seconds(run, repeats=3)
            else:
                took = seconds(program, *arguments, repeats=3)
        except jax.errors.JaxRuntimeError as error:
            report(**row, failed=str(error).splitlines()[0][:120])
            continue
        temporary = getattr(program.memory_analysis(), "temp_size_in_bytes", None)
        report(**row, seconds=took, compilation=compilation, temporary=temporary)


def population(dtype: str, dry: bool) -> None:
    networks, images = (4, 24) if dry else (20, 5000)
    case = make_case("resnet8" if dry else "resnet56", dtype, networks, images)
    large, middle, small = (24, 12, 6) if dry else (5000, 1250, 512)
    name = f"resnet56 {dtype}"
    one = ("one program", 1)
    timed(
        case,
        name,
        [
            (*one, large, None),
            (*one, middle, None),
            (*one, small, None),
            ("host loop", 1, large, None),
            ("host loop", 1, middle, None),
        ],
    )
    for chunk, batch in ((4, middle), (networks, small), (4, small)):
        timed(case, name, [("one program", chunk, batch, None)])


def folded(dry: bool) -> None:
    """As the network would be without BatchNorm, and with biases: what folding makes of it."""
    networks, images = (4, 24) if dry else (20, 5000)
    for dtype in ("bfloat16", "tf32"):
        case = make_case(
            "resnet8" if dry else "resnet56", dtype, networks, images, norm="none", conv_bias=True
        )
        cells = [("one program", 1, batch, None) for batch in ((24, 12) if dry else (5000, 1250))]
        timed(case, f"resnet56 folded {dtype}", cells)


def others(dry: bool) -> None:
    networks, images = (4, 24) if dry else (20, 5000)
    case = make_case("mlp", "tf32", networks, images)
    timed(
        case,
        "mlp tf32",
        [("one program", chunk, images, None) for chunk in (1, 4, networks)]
        + [("host loop", 1, images, None)],
    )
    if not dry:
        case = make_case("densenet121", "bfloat16", 4, 2500)
        timed(case, "densenet121 bfloat16", [("one program", 1, b, None) for b in (1250, 500)])


def flags(dry: bool) -> None:
    networks, images = (4, 24) if dry else (20, 5000)
    large = 12 if dry else 1250
    case = make_case("resnet8" if dry else "resnet56", "bfloat16", networks, images)
    timed(
        case,
        "resnet56 bfloat16, " + os.environ.get("XLA_FLAGS", ""),
        [("one program", 1, large, None), ("one program", 1, images, None)],
    )
    case = make_case(
        "resnet8" if dry else "resnet56", "bfloat16", networks, images, norm="none", conv_bias=True
    )
    timed(
        case,
        "resnet56 folded bfloat16, " + os.environ.get("XLA_FLAGS", ""),
        [("one program", 1, large, None)],
    )


def recalibrate(dry: bool) -> None:
    import jax.numpy as jnp

    from megajax.merging.genome import recalibrated

    networks, images = (4, 24) if dry else (20, 5000)
    case = make_case("resnet8" if dry else "resnet56", "bfloat16", networks, images)
    genome = recalibrated(case.genome, case.apply_fn)
    context = (case.parents, jnp.asarray(case.images[: 12 if dry else 1000]))

    class Measured(NamedTuple):
        express: Any

    moved = case._replace(genome=Measured(genome.express), parents=context)
    import jax
    from timing import seconds

    from megajax.merging.fitness import accuracy, batches, evaluator

    for batch in (12,) if dry else (5000, 1250):
        evaluate = evaluator(
            moved.genome.express,
            case.apply_fn,
            accuracy,
            context,
            batches(case.images, case.labels, batch),
            population_chunk=1,
        )
        program = jax.jit(lambda evaluate, genes: evaluate(genes))
        start = time.perf_counter()
        compiled = program.lower(evaluate, case.genes).compile()
        compilation = time.perf_counter() - start
        took = seconds(compiled, evaluate, case.genes, repeats=3)
        report(
            case="resnet56 bfloat16, recalibrated on 1,000 images",
            chunk=1,
            batch=batch,
            seconds=took,
            compilation=compilation,
        )


def run_part(name: str, dry: bool) -> None:
    """In a process of its own: waits until the device is its own, then does one part."""
    kind, _, rest = name.partition("_")
    {
        "ceilings": lambda: ceilings(dry),
        "population": lambda: population(rest, dry),
        "folded": lambda: folded(dry),
        "others": lambda: others(dry),
        "flags": lambda: flags(dry),
        "recalibrate": lambda: recalibrate(dry),
    }[kind]()


# The process above --------------------------------------------------------------------------------


def start(part: Part, dry: bool) -> subprocess.Popen[str]:
    """A process that has imported everything and waits for a line on its standard input."""
    environment = dict(os.environ)
    if dry:
        environment["JAX_PLATFORMS"] = "cpu"
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {part.flags}".strip()
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, "--part", part.name, *(["--dry"] if dry else [])]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="every part, tiny, on a CPU")
    parser.add_argument("--json", type=Path, help="where the results are written, part by part")
    parser.add_argument("--seconds", type=float, default=480, help="limit for all parts together")
    parser.add_argument("--parts", nargs="+", default=[part.name for part in PARTS])
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        import flax.linen  # noqa: F401
        import jax  # noqa: F401
        import optax  # noqa: F401

        import megajax  # noqa: F401

        sys.stdin.readline()
        run_part(options.part, options.dry)
        return
    began = time.monotonic()
    results: dict[str, Any] = {}
    parts = [part for part in PARTS if part.name in options.parts]
    upcoming = start(parts[0], options.dry)
    for number, part in enumerate(parts):
        process = upcoming
        if number + 1 < len(parts):
            upcoming = start(parts[number + 1], options.dry)
        left = options.seconds - (time.monotonic() - began)
        rows: list[Any] = []
        if left < 10:
            process.kill()
            results[part.name] = {"rows": [], "state": "not measured: no time was left"}
            continue
        print(f"== {part.name} ({time.monotonic() - began:.0f} s)", flush=True)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it may have died already
            process.stdin.write("go\n")
            process.stdin.close()
        last = ""
        for line in follow(process, min(part.limit, left)):
            last = line.strip() or last
            if line.startswith(MARK):
                rows.append(json.loads(line.removeprefix(MARK)))
            print("  ", line.removeprefix(MARK), end="", flush=True)
        code = process.wait()
        results[part.name] = {"rows": rows, "state": "done" if code == 0 else last}
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    bad = [name for name, result in results.items() if result["state"] != "done"]
    print(f"{time.monotonic() - began:.0f} s; not done: {', '.join(bad) or 'none'}")
    if options.dry and bad:
        sys.exit(1)


if __name__ == "__main__":
    main()
