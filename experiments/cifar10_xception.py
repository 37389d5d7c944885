"""Two well-trained Xception networks on CIFAR-10, merged by channel masks.

    python -m megajax.run --config experiments/cifar10_xception.py --config.data.data_dir=DIR

DIR is a TFDS directory that holds cifar10: `python -m megajax.data prepare cifar10` makes it, once.
Training and search as in `cifar10_resnet56.py`, at half its learning rate. The stem is the one for
small images; the paper's networks have that of ImageNet (`--config.model.options.stem=imagenet`).

Accuracies and time: not measured (no GPU yet).
`--config.smoke=True` cuts it down to a trial of a few minutes on 2 cores.
"""

import megajax as mj


def get_config() -> mj.Config:
    return mj.sound_cifar10().replace(
        model=mj.ModelConfig(name="xception", options={"stem": "cifar"}),
        training={"learning_rate": 0.05},
    )
