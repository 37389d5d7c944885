"""The experiment files: each is a configuration that can run, names its command, and can be cut."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from megajax.run.config import from_dict, smoke, to_dict
from megajax.run.presets import mega_paper
from megajax.zoo import networks as models

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "experiments").glob("*.py"))
CIFAR10 = ROOT.parent / "shared" / "data" / "tfds" / "cifar10"
FAMILIES = {"resnet", "vgg", "densenet", "xception", "mlp"}


def loaded(file):
    """The docstring and the configuration of an experiment."""
    module = runpy.run_path(str(file))
    return module["__doc__"], module["get_config"]()


def size(config):
    """Numbers in a network for 32x32 images."""
    model = models.build(config.model.name, 10, config.model.options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_experiment_can_run_names_its_command_and_can_be_cut(file):
    text, config = loaded(file)
    assert f"    python -m megajax.run --config experiments/{file.name}" in text
    assert size(config) > 10_000
    small = smoke(config)
    assert size(small) < 200_000
    assert small.parents == config.parents
    assert (small.align, small.genome) == (config.align, config.genome)
    assert from_dict(json.loads(json.dumps(to_dict(small)))) == small
    scored = small.evolution.population_size * (1 + small.evolution.generations)
    assert scored * small.data.limit <= 30_000
    assert small.parents.count * small.training.epochs * small.data.limit <= 10_000


def test_there_is_one_for_each_family_of_the_paper():
    assert {loaded(file)[1].model.name for file in FILES} >= FAMILIES


def test_the_papers_experiment_is_the_preset():
    _, config = loaded(ROOT / "experiments" / "cifar10_resnet56_paper.py")
    assert config == mega_paper()


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.exists(), reason="CIFAR-10 is not here")
def test_the_papers_protocol_ends_with_the_full_workdir(tmp_path):
    command = [
        *(sys.executable, "-m", "megajax.run", "--workdir", str(tmp_path)),
        *("--config", str(ROOT / "experiments" / "cifar10_resnet56_paper.py")),
        *("--config.smoke=True", f"--config.data.data_dir={CIFAR10.parent}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stored = from_dict(json.loads((tmp_path / "config.json").read_text())["config"])
    assert stored.genome == mega_paper().genome
    assert stored.model.options["depth"] == 8
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["evaluations"] == 8 + 3 * 7
    assert len(results["parents"]) == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "merged").is_dir()
    for name in ("report.md", "plots/fitness.png", "plots/mask.png", "plots/path.png"):
        assert (tmp_path / name).stat().st_size > 0
