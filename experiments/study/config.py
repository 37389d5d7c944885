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

import megajax as mj

PARENTS = ("same", "skewed", "shared")
GRANULARITIES = ("global", "layer", "channel", "element")
MAIN = "channel-aligned"
SEARCHES = tuple(
    f"{name}{aligned}" for aligned in ("", "-aligned") for name in ("paper", *GRANULARITIES)
)


def get_config(cell: str = f"digits/skewed/{MAIN}") -> mj.Config:
    data, parents, search = cell.split("/")
    if parents not in PARENTS or search not in SEARCHES:
        raise ValueError(f"{cell} is no cell; parents: {PARENTS}, searches: {SEARCHES}")
    kind = search.removesuffix("-aligned")
    aligned = search != kind
    config = {"digits": digits, "cifar10": cifar10}[data]().replace(
        parents={
            "shards": "same" if parents == "same" else "skewed",
            "shared_initialization": parents == "shared",
        },
        align={"method": "activations" if aligned else "none"},
        recalibrate={"enabled": aligned or kind != "paper"},
    )
    if kind == "paper":
        paper = mj.mega_paper()
        config = config.replace(
            genome=paper.genome,
            fitness=paper.fitness,
            evolution=paper.evolution.replace(generations=100),  # 20 + 100 x 19 networks
        )
    else:
        config = config.replace(
            genome={"granularity": kind},
            evolution={"population_size": 32, "generations": 59},  # 32 + 59 x 32 networks
        )
    if search != MAIN:
        names = ("random_search",) if kind == "channel" else ()
        config = config.replace(baselines={"names": names}, robustness={"enabled": False})
    return config


def digits() -> mj.Config:
    """The CNNs of `experiments/digits.py`."""
    return mj.Config(
        data=mj.DataConfig(validation_fraction=0.3),
        parents=mj.ParentsConfig(skew=0.95),
        baselines=mj.BaselinesConfig(names="all"),
    )


def cifar10() -> mj.Config:
    """Well-trained ResNet-20, with the training of `experiments/cifar10_resnet56.py`."""
    return mj.sound_cifar10().replace(
        model=mj.ModelConfig(name="resnet", options={"depth": 20}),
        baselines=mj.BaselinesConfig(names="all"),
    )
