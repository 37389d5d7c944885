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

import megajax as mj


def get_config() -> mj.Config:
    return mj.sound_cifar10().replace(model=mj.ModelConfig(name="resnet", options={"depth": 56}))
