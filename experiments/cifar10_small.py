"""Two ResNet-8 on class-skewed parts of CIFAR-10, merged by channel masks; on a CPU.

    python -m megajax.run --config experiments/cifar10_small.py --config.data.data_dir=DIR

DIR is a TFDS directory that holds cifar10: `python -m megajax.data prepare cifar10` makes it, once.
Parent 0 sees mostly the even classes, parent 1 mostly the odd ones, 10,000 images each, for three
epochs. Under 15 minutes on 2 cores, of which the training takes a third and random search, at the
cost of the evolution, another.
"""

from ml_collections import ConfigDict

from megajax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.name = "cifar10"
    config.data.standardize = True
    config.data.limit = 20_000
    config.data.validation_fraction = 0.05
    config.model.name = "resnet"
    config.model.options.depth = 8
    config.parents.shards = "skewed"
    config.parents.skew = 0.8
    config.training.epochs = 3
    config.training.batch_size = 128
    config.training.learning_rate = 1e-2
    config.align.method = "activations"
    config.recalibrate.enabled = True
    config.evolution.population_size = 16
    config.evolution.generations = 8
    config.baselines.names = ("uniform_average", "random_search")
    config.robustness.severities = (1, 3, 5)
    config.robustness.examples = 250
    return config
