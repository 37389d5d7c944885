"""One cell of the study: which data the parents saw, and how they are merged.

    python -m megajax.run --config experiments/study/config.py:digits/skewed/channel --seeds 0:5
    python experiments/study/study.py digits      # all cells, ten seeds each, and results.json

A cell is called DATA/PARENTS/SEARCH. DATA is `digits` (small CNNs), `cifar10` (ResNet-8, whose
parents are better trained on a GPU), or `cifar10_width32` or `cifar10_width64` (the same, twice and
four times as wide, for a GPU). PARENTS is `same` (both trained on all training images),
`skewed` (each at home in half of the classes) or `shared` (skewed, and from the same initial
weights). SEARCH is `paper` (MeGA's algorithm to the letter, but for the evaluations), `m2n2`
(M2N2's) or the granularity of masks, behind a way to search where it is not the genetic algorithm:

- `gradient`: Adam on the masks; `memetic`: two steps of it for every child of the genetic algorithm
- `distill`: gradients without labels, towards the parents' mean prediction, on training images;
  of masks, or of the `weights` themselves, which is what distilling an ensemble usually means
- `niches`: M2N2's competition and attraction, on masks
- `pbil`, `one_plus_one`: binary masks

It ends in `-aligned` where the parents' hidden units are aligned. Every candidate's BatchNorm
statistics are measured anew, but for `paper` and `m2n2`. `finetuned` is the first search of the
data set once more, whose network and the best parent are then trained on the labelled training
images.

Every search passes as many images through networks as 1,920 networks take on the validation images
of the digits, and 115 on those of CIFAR-10, within 2 %; a gradient counts as three passes.
Fine-tuning passes as many, within 7 %. The first search of the data set has the other baselines and
the test of robustness.
"""

import megajax as mj
from megajax.merging.presets import m2n2

PARENTS = ("same", "skewed", "shared")
GRANULARITIES = ("global", "layer", "channel", "element")
_MASKS = [f"{name}{how}" for how in ("", "-aligned") for name in ("paper", *GRANULARITIES)]
NETWORKS = {"digits": 1920, "cifar10": 115}
WAYS = {
    "gradient": {"method": "gradient"},
    "distill": {"method": "gradient"},
    "memetic": {
        "gradient_steps": 2,
        "gradient_examples": 64,
        "evaluation_budget": NETWORKS["digits"],
    },
    "niches": {"method": "niches"},
    "pbil": {"method": "pbil"},
    "one_plus_one": {"method": "one_plus_one"},
}
SEARCHES = {
    "digits": (
        "channel-aligned",
        *(name for name in _MASKS if name != "channel-aligned"),
        "m2n2",
        "gradient-channel-aligned",
        "gradient-element-aligned",
        "distill-channel-aligned",
        "distill-element-aligned",
        "distill-weights-aligned",
        *(f"{way}-channel-aligned" for way in ("memetic", "niches", "pbil", "one_plus_one")),
    ),
    "cifar10": ("distill-element-aligned", "channel-aligned", "paper", "finetuned"),
    "cifar10_width32": ("distill-element-aligned", "channel-aligned"),
    "cifar10_width64": ("distill-element-aligned", "channel-aligned"),
}
SEEDS = {"digits": 10, "cifar10": 5, "cifar10_width32": 1, "cifar10_width64": 1}  # pairs
LABELLED = {"digits": 404, "cifar10": 5_000}  # validation images
UNLABELLED = {"digits": 768, "cifar10": 23_000}  # training images to distil on, their labels unseen
POPULATION = {"digits": 32, "cifar10": 23}


def get_config(cell: str = "digits/skewed/channel-aligned") -> mj.Config:
    family, _, rest = cell.partition("/")
    parents, _, search = rest.partition("/")
    searches = SEARCHES.get(family)
    if searches is None:
        raise ValueError(f"{cell} is no cell; data: {tuple(SEARCHES)}")
    if parents not in PARENTS or search not in searches:
        raise ValueError(f"{cell} is no cell; parents: {PARENTS}, searches: {searches}")
    data, _, width = family.partition("_width")
    if search == "finetuned":  # 4 epochs of 45,000 images, three passes each
        return get_config(f"{family}/{parents}/{searches[0]}").replace(
            finetune={"epochs": 4}, baselines={"names": ()}, robustness={"enabled": False}
        )
    kind = search.removesuffix("-aligned")
    aligned = search != kind
    way, _, masks = kind.rpartition("-")
    config = {"digits": digits, "cifar10": cifar10}[data]().replace(
        parents={
            "shards": "same" if parents == "same" else "skewed",
            "shared_initialization": parents == "shared",
        },
        align={"method": "activations" if aligned else "none"},
        recalibrate={"enabled": search not in ("paper", "m2n2")},
    )
    size = POPULATION[data]
    evolution = {"population_size": size, "generations": NETWORKS[data] // size - 1}
    if kind == "paper":  # one elite: 20 + 100 x 19 networks, or 20 + 5 x 19
        paper = mj.mega_paper()
        config = config.replace(genome=paper.genome, fitness=paper.fitness)
        evolution = paper.evolution.replace(generations=(NETWORKS[data] - 20) // 19)
    elif kind == "m2n2":
        sections = m2n2(NETWORKS[data] - 2)
        config = config.replace(genome=sections["genome"], fitness=sections["fitness"])
        evolution = sections["evolution"]
    elif masks == "weights":
        config = config.replace(genome={"kind": masks})
    else:
        config = config.replace(genome={"granularity": masks})
    if way == "distill":
        examples = UNLABELLED[data]
        config = config.replace(fitness={"metric": "distill", "distill_examples": examples})
        networks = NETWORKS[data] * LABELLED[data] // examples
        evolution = {"population_size": 5, "generations": networks // 5 - 1}
    if way:
        evolution |= WAYS[way]
    if masks == "weights":
        evolution["learning_rate"] = 0.003
    if way in ("pbil", "one_plus_one"):
        config = config.replace(genome={"binary": True})
    config = config.replace(evolution=evolution)
    if width:
        config = config.replace(
            model={"options": {"depth": 8, "width": int(width)}},
            baselines={"names": ("uniform_average",)},
            robustness={"enabled": False},
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
