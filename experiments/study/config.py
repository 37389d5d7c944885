"""One cell of the study: which data the parents saw, and how they are merged.

    python -m megajax.run --config experiments/study/config.py:digits/skewed/channel --seeds 0:5
    python experiments/study/study.py digits      # all cells, five seeds each, and results.json

A cell is called DATA/PARENTS/SEARCH. DATA is `digits` (small CNNs) or `cifar10` (ResNet-8, whose
parents are better trained on a GPU). PARENTS is `same` (both trained on all training images),
`skewed` (each at home in half of the classes) or `shared` (skewed, and from the same initial
weights). SEARCH is `paper` (MeGA's algorithm to the letter, but for the evaluations) or the
granularity of masks, behind `gradient-` where gradients search instead of evolution, or `distill-`
where they do so without labels, towards the parents' mean prediction. It ends in `-aligned` where
the parents' hidden units are aligned. Every candidate's BatchNorm statistics are measured anew, but
for `paper`.

Every search passes as many images through networks as 1,920 networks take on the validation images
of the digits, and 115 on those of CIFAR-10. The first search of the data set has the other
baselines and the test of robustness.
"""

import megajax as mj

PARENTS = ("same", "skewed", "shared")
GRANULARITIES = ("global", "layer", "channel", "element")
_MASKS = [f"{name}{how}" for how in ("", "-aligned") for name in ("paper", *GRANULARITIES)]
SEARCHES = {
    "digits": ("channel-aligned", *(name for name in _MASKS if name != "channel-aligned")),
    "cifar10": ("distill-element-aligned", "channel-aligned", "paper"),
}


def get_config(cell: str = "digits/skewed/channel-aligned") -> mj.Config:
    data, parents, search = cell.split("/")
    if parents not in PARENTS or search not in SEARCHES[data]:
        raise ValueError(f"{cell} is no cell; parents: {PARENTS}, searches: {SEARCHES[data]}")
    kind = search.removesuffix("-aligned")
    aligned = search != kind
    way, _, masks = kind.rpartition("-")
    config = {"digits": digits, "cifar10": cifar10}[data]().replace(
        parents={
            "shards": "same" if parents == "same" else "skewed",
            "shared_initialization": parents == "shared",
        },
        align={"method": "activations" if aligned else "none"},
        recalibrate={"enabled": aligned or kind != "paper"},
    )
    paper = mj.mega_paper()
    size, generations = {"digits": (32, 59), "cifar10": (23, 4)}[data]
    if kind == "paper":  # one elite: 20 + 100 x 19 networks, or 20 + 5 x 19
        fewer = {"digits": 100, "cifar10": 5}[data]
        config = config.replace(
            genome=paper.genome,
            fitness=paper.fitness,
            evolution=paper.evolution.replace(generations=fewer),
        )
    else:
        evolution = {"population_size": size, "generations": generations}
        config = config.replace(genome={"granularity": masks}, evolution=evolution)
    if way:
        config = config.replace(evolution={"method": "gradient"})
    if way == "distill":
        config = config.replace(
            fitness={"metric": "distill", "distill_examples": 23_000},
            evolution={"population_size": 5, "generations": 4},
        )
    if search != SEARCHES[data][0]:
        names = ("random_search",) if kind == "channel" and data == "digits" else ()
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
    """ResNet-8, trained for 30 epochs: half an hour a pair on 2 cores, half a minute on a GPU."""
    return mj.sound_cifar10().replace(
        model=mj.ModelConfig(name="resnet", options={"depth": 8}),
        training={"epochs": 30, "warmup_epochs": 1.0},
        recalibrate={"examples": 512},
        baselines=mj.BaselinesConfig(names=("uniform_average", "regmean", "pleas")),
        robustness=mj.RobustnessConfig(severities=(3,), examples=500),
    )
