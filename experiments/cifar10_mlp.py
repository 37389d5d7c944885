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
from megajax.run.presets import sound_cifar10


def get_config() -> ConfigDict:
    config = default_config(sound_cifar10())
    config.model.name = "mlp"
    config.model.options = {"hidden": (512, 512, 512)}
    config.training.epochs = 100
    config.training.learning_rate = 0.01
    config.recalibrate = default_config().recalibrate  # there are no statistics
    return config
