"""One cell of the study: which data the parents saw, and how they are merged.

    python -m megajax.run --config experiments/study/config.py:digits/skewed/channel --seeds 0:5
    python experiments/study/study.py digits      # all cells, five seeds each, and results.json

A cell is called DATA/PARENTS/SEARCH. DATA is `digits` (small CNNs, for a CPU) or `cifar10`
(ResNet-20, for a GPU). PARENTS is `same` (both trained on all training images), `skewed` (each at
home in half of the classes) or `shared` (skewed, and from the same initial weights). SEARCH is
`paper` (MeGA's algorithm to the letter, but for five times its evaluations) or the granularity of
masks, and ends in `-aligned` where the parents' hidden units are aligned. Every candidate's
BatchNorm statistics are measured anew, but for `paper`.

Every search scores 1,920 networks. The cell `channel-aligned` has all baselines and the test of
robustness.
"""

from ml_collections import ConfigDict

from megajax.config import default_config
from megajax.run.presets import mega_paper, sound_cifar10

PARENTS = ("same", "skewed", "shared")
GRANULARITIES = ("global", "layer", "channel", "element")
MAIN = "channel-aligned"
SEARCHES = tuple(
    f"{name}{aligned}" for aligned in ("", "-aligned") for name in ("paper", *GRANULARITIES)
)


def get_config(cell: str = f"digits/skewed/{MAIN}") -> ConfigDict:
    data, parents, search = cell.split("/")
    if parents not in PARENTS or search not in SEARCHES:
        raise ValueError(f"{cell} is no cell; parents: {PARENTS}, searches: {SEARCHES}")
    config = {"digits": digits, "cifar10": cifar10}[data]()

    config.parents.shards = "same" if parents == "same" else "skewed"
    config.parents.shared_initialization = parents == "shared"

    kind = search.removesuffix("-aligned")
    aligned = search != kind
    config.align.method = "activations" if aligned else "none"
    config.recalibrate.enabled = aligned or kind != "paper"
    if kind == "paper":
        paper = default_config(mega_paper())
        config.genome, config.fitness, config.evolution = (
            paper.genome,
            paper.fitness,
            paper.evolution,
        )
        config.evolution.generations = 100  # 20 + 100 x 19 networks
    else:
        config.genome.granularity = kind
        config.evolution.population_size = 32
        config.evolution.generations = 59  # 32 + 59 x 32 networks
    if search != MAIN:
        config.baselines.names = ("random_search",) if kind == "channel" else ()
        config.robustness.enabled = False
    return config


def digits() -> ConfigDict:
    """The CNNs of `experiments/digits.py`."""
    config = default_config()
    config.data.validation_fraction = 0.3
    config.parents.skew = 0.95
    config.baselines.names = "all"
    return config


def cifar10() -> ConfigDict:
    """Well-trained ResNet-20, with the training of `experiments/cifar10_resnet56.py`."""
    config = default_config(sound_cifar10())
    config.model.name = "resnet"
    config.model.options = {"depth": 20}
    config.baselines.names = "all"
    return config
