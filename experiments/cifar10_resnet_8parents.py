"""Eight well-trained ResNet-56 on CIFAR-10, merged by one search over masks of eight parents.

    python -m megajax.run --config experiments/cifar10_resnet_8parents.py --config.data.data_dir=DIR

DIR is a TFDS directory that holds cifar10: `python -m megajax.data prepare cifar10` makes it, once.
Training as in `cifar10_resnet56.py`; all eight are aligned to their common mean. The paper merges
them two by two instead, 8 -> 4 -> 2 -> 1, scores on the test images and trains 10 more epochs.

Accuracies and time: not measured (no GPU yet).
`--config.smoke=True` cuts it down to a trial of a few minutes on 2 cores.
"""

from ml_collections import ConfigDict

from megajax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.name = "cifar10"
    config.data.standardize = True
    config.model.name = "resnet"
    config.model.options.depth = 56
    config.parents.count = 8
    config.training.epochs = 200
    config.training.batch_size = 128
    config.training.optimizer = "sgd"
    config.training.learning_rate = 0.1
    config.training.warmup_epochs = 5
    config.training.momentum = 0.9
    config.training.weight_decay = 5e-4
    config.training.augment = ("flip", "crop")
    config.align.method = "weights"
    config.align.reference = "mean"
    config.recalibrate.enabled = True
    config.recalibrate.examples = 1000
    config.genome.granularity = "channel"
    config.evolution.population_size = 64
    config.evolution.generations = 100
    # HIERARCHY: the tree 8 -> 4 -> 2 -> 1 belongs here once there is a section for it; until then
    # this is the merge of all eight in one search that the tree is to be compared with.
    return config
