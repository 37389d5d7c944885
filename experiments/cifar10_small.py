"""Two ResNet-8 on class-skewed halves of CIFAR-10, merged by channel masks; on a CPU.

    python -m megajax.run --config experiments/cifar10_small.py --config.data.data_dir=DIR

DIR is a TFDS directory that holds cifar10: `python -m megajax.data prepare cifar10` makes it, once.
Parent 0 sees mostly the even classes, parent 1 mostly the odd ones.
"""

from ml_collections import ConfigDict

from megajax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.name = "cifar10"
    config.data.standardize = True
    config.model.name = "resnet"
    config.model.options.depth = 8
    config.parents.shards = "skewed"
    config.parents.skew = 0.8
    config.training.epochs = 2
    config.training.batch_size = 128
    config.training.optimizer = "adam"
    config.training.learning_rate = 1e-2
    config.evolution.population_size = 16
    config.evolution.generations = 20
    return config
