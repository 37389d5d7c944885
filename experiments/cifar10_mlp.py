"""Two well-trained multilayer perceptrons on CIFAR-10, merged by channel masks.

    python -m megajax.run --config experiments/cifar10_mlp.py --config.data.data_dir=DIR

DIR is a TFDS directory that holds cifar10: `python -m megajax.data prepare cifar10` makes it, once.
Training and search as in `cifar10_resnet56.py`, at a tenth of its learning rate. There are no
BatchNorm statistics to measure anew: alignment alone has to make the masks worth searching.

Accuracies and time: not measured (no GPU yet).
`--config.smoke=True` cuts it down to a trial of a few minutes on 2 cores.
"""

import megajax as mj


def get_config() -> mj.Config:
    return mj.sound_cifar10().replace(
        model=mj.ModelConfig(name="mlp", options={"hidden": (512, 512, 512)}),
        training={"epochs": 100, "learning_rate": 0.01},
        recalibrate=mj.RecalibrateConfig(),  # there are no statistics
    )
