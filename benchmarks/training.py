"""How long does an epoch of training take, and how long PyTorch's?

    python benchmarks/training.py [--network resnet8] [--images 5120] [--parents 2] [--json FILE]

All parents train on the same images, batches of 256, SGD with momentum. megajax trains them as a
run does: on a CPU each core is a device and has a parent at work. PyTorch, where it is installed,
trains one after the other on all cores, eager and channels last. Seconds for an epoch of all
parents, the first epoch (which compiles) apart, and the ratio, in one run.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from megajax.zoo import networks, training
from megajax.zoo.data import Split

jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
BATCH = 256
EPOCHS = 3


def epoch(run: Callable[[], Any]) -> float:
    """Least time of an epoch after the first."""
    times = []
    for _ in range(1 + EPOCHS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times[1:])


def ours(depth: int, split: Split, parents: int) -> float:
    """Seconds of an epoch of the zoo's training."""
    model = networks.build("resnet", 10, {"depth": depth})
    config = training.TrainingConfig(
        epochs=1 + EPOCHS, batch_size=BATCH, optimizer="sgd", learning_rate=0.1
    )
    shards = [np.arange(len(split.labels))] * parents
    state = training.init(jax.random.key(0), model, split, shards, config)
    run_epoch = training.make_epoch(model, split, shards, config)

    def run() -> Any:
        nonlocal state
        state, metrics = run_epoch(jax.random.key(1), state)
        return metrics

    return epoch(run)


def torchs(depth: int, split: Split, parents: int) -> float:
    """Seconds of an epoch of PyTorch's."""
    import torch
    import torch_networks

    images = torch.from_numpy(split.images).permute(0, 3, 1, 2).contiguous()
    images = images.to(memory_format=torch.channels_last)
    labels = torch.from_numpy(split.labels).long()
    models = [torch_networks.build(f"resnet{depth}").train() for _ in range(parents)]
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in models]

    def run() -> None:
        for model, optimizer in zip(models, optimizers, strict=True):
            for batch in torch.randperm(len(labels)).split(BATCH):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
                loss.backward()
                optimizer.step()

    return epoch(run)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=("resnet8", "resnet20", "resnet56"), default="resnet8")
    parser.add_argument("--images", type=int, default=5120)
    parser.add_argument("--parents", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    images = rng.normal(size=(options.images, 32, 32, 3)).astype(np.float32)
    split = Split(images, rng.integers(0, 10, options.images).astype(np.int32))
    depth = int(options.network.removeprefix("resnet"))
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, JAX {jax.__version__}")
    found = {"megajax": ours(depth, split, options.parents)}
    print(f"megajax  {found['megajax']:7.2f} s an epoch of {options.parents} parents", flush=True)
    try:
        found["torch"] = torchs(depth, split, options.parents)
    except ModuleNotFoundError as error:
        print(f"PyTorch  not measured: {error}")
    else:
        ratio = found["megajax"] / found["torch"]
        print(f"PyTorch  {found['torch']:7.2f} s; megajax takes {ratio:.2f} times as long")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
