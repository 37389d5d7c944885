"""Configurations that have a name: the published protocol, and a sound one to set beside it.

A config file starts from one and changes what it wants: `mega_paper().replace(seed=1)`.
"""

from __future__ import annotations

from megajax.alignment import AlignConfig
from megajax.merging.genome import GenomeConfig
from megajax.merging.problem import FitnessConfig, RecalibrateConfig
from megajax.run.config import Config
from megajax.search.methods import EvolutionConfig
from megajax.zoo.data import DataConfig, ParentsConfig
from megajax.zoo.networks import ModelConfig
from megajax.zoo.training import TrainingConfig

__all__ = ["mega_paper", "sound_cifar10"]


def mega_paper() -> Config:
    """MeGA as published: every choice of its reference code, for two ResNet-56 on CIFAR-10.

    What the reference does, and this configuration with it:

    - Parents: pixels in [0, 1], no augmentation, 45,000 of the 50,000 images, Adam at a constant
      0.01, 50 epochs of batches of 256; convolutions with biases, projection shortcuts.
    - The individual is a network's whole list of tensors, BatchNorm's moving mean and variance
      among them. A population of 20 starts at random points of the line between the two parents,
      who are not in it themselves.
    - Fitness is the accuracy on 5,000 validation images. The population is scored 20 times: as it
      starts, and after each of 19 generations.
    - Each child has two parents, each the winner of a tournament of 3 distinct individuals. (The
      reference holds four tournaments for each child and leaves two of the winners unused.)
    - Child: `(1 - b) first + b second` with one b ~ U(0, 1) for the whole network. Then each
      tensor, with probability 0.02, gets noise N(0, 0.1^2) on every element.
    - The best individual ever seen, the earlier one of equals, is slot 0 of the next population;
      19 children fill the rest.
    - Hidden units are not aligned and statistics are not measured anew.

    Elsewhere in megajax the doubtful ones default to the sound choice, because the line between
    two independently trained networks leads through networks at chance: `align` and `recalibrate`
    make it worth searching, `genome.parents_first` keeps the result from being worse than a parent,
    and `GenomeConfig` says what is wrong with noise on statistics, with one scale for all tensors
    and with negative variances. A network with a negative variance has no fitness here (0 % right);
    the reference counts its answers as class 0.

    Not part of the published description, and taken from this library: initialisation, and momentum
    and epsilon of BatchNorm.

    Returns:
        The configuration; `merge_sections` has what `megajax.merge` takes of it.

    Example:
        >>> mega_paper().evolution.survival, mega_paper().genome.kind
        ('generational', 'weights')

    Source: Yun, "MeGA: Merging Multiple Independently Trained Neural Networks Based on Genetic
    Algorithm", arXiv 2406.04607, and its public code, of which none is used here.
    """
    return Config(
        data=DataConfig(name="cifar10", validation_fraction=0.1, standardize=False),
        model=ModelConfig(
            name="resnet", options={"depth": 56, "conv_bias": True, "projection": True}
        ),
        parents=ParentsConfig(count=2, shards="same", shared_initialization=False),
        training=TrainingConfig(
            epochs=50,
            batch_size=256,
            optimizer="adam",
            learning_rate=0.01,
            schedule="constant",
            weight_decay=0.0,
            augment=(),
        ),
        align=AlignConfig(method="none"),
        recalibrate=RecalibrateConfig(enabled=False),
        genome=GenomeConfig(
            kind="weights",
            parents_first=False,
            relative_noise=False,
            noise_on_statistics=True,
            clip_variances=False,
        ),
        fitness=FitnessConfig(metric="accuracy"),
        evolution=EvolutionConfig(
            population_size=20,
            generations=19,
            elites=1,
            selection="tournament",
            tournament_size=3,
            crossover="arithmetic",
            mutation="gaussian",
            mutation_rate=0.02,
            mutation_scale=0.1,
            survival="generational",
        ),
    )


def sound_cifar10() -> Config:
    """CIFAR-10 as one would do it: well-trained parents, and a search that has something to find.

    On the split of `mega_paper`. The parents are trained by SGD with momentum, a cosine schedule,
    flips and crops (He et al., arXiv 1512.03385, with a longer schedule); their hidden units are
    aligned, BatchNorm statistics are measured anew for every candidate, and a gene is a hidden
    unit. The network is for the experiment to choose.

    Returns:
        The configuration.

    Example:
        >>> sound_cifar10().genome.granularity, sound_cifar10().training.optimizer
        ('channel', 'sgd')
    """
    return Config(
        data=DataConfig(name="cifar10", standardize=True),
        training=TrainingConfig(
            epochs=200,
            batch_size=128,
            optimizer="sgd",
            learning_rate=0.1,
            warmup_epochs=5.0,
            momentum=0.9,
            weight_decay=5e-4,
            augment=("flip", "crop"),
        ),
        align=AlignConfig(method="weights"),
        recalibrate=RecalibrateConfig(enabled=True, examples=1000),
        genome=GenomeConfig(granularity="channel"),
        evolution=EvolutionConfig(population_size=32, generations=100),
    )
