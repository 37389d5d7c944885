"""Two well-trained multilayer perceptrons on CIFAR-10, merged by channel masks.

    python -m megajax.run --config experiments/cifar10_mlp.py --config.data.data_dir=DIR

DIR is a TFDS directory that holds cifar10: `python -m megajax.data prepare cifar10` makes it, once.
Training and search as in `cifar10_resnet56.py`, at a tenth of its learning rate. There are no
BatchNorm statistics to measure anew: alignment alone has to make the masks worth searching.

Accuracies and time: not measured (no GPU yet).
`--config.smoke=True` cuts it down to a trial of a few minutes on 2 cores.
"""

from ml_collections import ConfigDict

from megajax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.name = "cifar10"
    config.data.standardize = True
    config.model.name = "mlp"
    config.model.options.hidden = (512, 512, 512)
    config.training.epochs = 100
    config.training.batch_size = 128
    config.training.optimizer = "sgd"
    config.training.learning_rate = 0.01
    config.training.warmup_epochs = 5
    config.training.momentum = 0.9
    config.training.weight_decay = 5e-4
    config.training.augment = ("flip", "crop")
    config.align.method = "weights"
    config.genome.granularity = "channel"
    config.evolution.population_size = 32
    config.evolution.generations = 100
    return config
