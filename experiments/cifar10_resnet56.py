"""Two well-trained ResNet-56 on CIFAR-10, merged by channel masks: the sound choices.

    python -m megajax.run --config experiments/cifar10_resnet56.py --config.data.data_dir=DIR

DIR is a TFDS directory that holds cifar10: `python -m megajax.data prepare cifar10` makes it, once.
Same split as `cifar10_resnet56_paper.py`. The parents are trained by SGD with momentum, a cosine
schedule, flips and crops; their hidden units are aligned, and BatchNorm statistics are measured
anew for every candidate. Parents are in the first population: on validation images the merged
network is at least as good as the better one; on test images it may not be.

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
    config.training.epochs = 200
    config.training.batch_size = 128
    config.training.optimizer = "sgd"
    config.training.learning_rate = 0.1
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
