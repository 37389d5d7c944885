"""Two well-trained DenseNet-121 on CIFAR-10, merged by channel masks.

    python -m megajax.run --config experiments/cifar10_densenet121.py --config.data.data_dir=DIR

DIR is a TFDS directory that holds cifar10: `python -m megajax.data prepare cifar10` makes it, once.
Training and search as in `cifar10_resnet56.py`. The stem is the one for small images; the paper's
networks have that of ImageNet (`--config.model.options.stem=imagenet`), which leaves 8x8 pixels to
the first block.

Accuracies and time: not measured (no GPU yet).
`--config.smoke=True` cuts it down to a trial of a few minutes on 2 cores.
"""

import megajax as mj


def get_config() -> mj.Config:
    model = mj.ModelConfig(name="densenet", options={"depth": 121, "stem": "cifar"})
    return mj.sound_cifar10().replace(model=model)
