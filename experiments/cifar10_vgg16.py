"""Two well-trained VGG-16 with BatchNorm on CIFAR-10, merged by channel masks.

    python -m megajax.run --config experiments/cifar10_vgg16.py --config.data.data_dir=DIR

DIR is a TFDS directory that holds cifar10: `python -m megajax.data prepare cifar10` makes it, once.
Training and search as in `cifar10_resnet56.py`, at half its learning rate. The published network
has no BatchNorm: `--config.model.options.norm=none`, with a lower learning rate and
`--config.recalibrate.enabled=False`.

Accuracies and time: not measured (no GPU yet).
`--config.smoke=True` cuts it down to a trial of a few minutes on 2 cores.
"""

from ml_collections import ConfigDict

from megajax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.name = "cifar10"
    config.data.standardize = True
    config.model.name = "vgg"
    config.model.options.depth = 16
    config.model.options.norm = "batch"
    config.training.epochs = 200
    config.training.batch_size = 128
    config.training.optimizer = "sgd"
    config.training.learning_rate = 0.05
    config.training.warmup_epochs = 5
    config.training.momentum = 0.9
    config.training.weight_decay = 5e-4
    config.training.augment = ("flip", "crop")
    config.align.method = "weights"
    config.recalibrate.enabled = True
    config.recalibrate.examples = 1000
    config.genome.granularity = "channel"
    config.evolution.population_size = 32
    config.evolution.generations = 100
    return config
