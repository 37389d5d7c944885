"""Two well-trained VGG-16 with BatchNorm on CIFAR-10, merged by channel masks.

    python -m megajax.run --config experiments/cifar10_vgg16.py --config.data.data_dir=DIR

DIR is a TFDS directory that holds cifar10: `python -m megajax.data prepare cifar10` makes it, once.
Training and search as in `cifar10_resnet56.py`, at half its learning rate. The published network
has no BatchNorm: `--config.model.options.norm=none`, with a lower learning rate and
`--config.recalibrate.enabled=False`.

Accuracies and time: not measured (no GPU yet).
`--config.smoke=True` cuts it down to a trial of a few minutes on 2 cores.
"""

import megajax as mj


def get_config() -> mj.Config:
    return mj.sound_cifar10().replace(
        model=mj.ModelConfig(name="vgg", options={"depth": 16, "norm": "batch"}),
        training={"learning_rate": 0.05},
    )
