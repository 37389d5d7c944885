"""MeGA as published: two ResNet-56 on CIFAR-10, merged by the algorithm of the paper to the letter.

    python -m megajax.run --config experiments/cifar10_resnet56_paper.py --config.data.data_dir=DIR

DIR is a TFDS directory that holds cifar10: `python -m megajax.data prepare cifar10` makes it, once.
What is set is in `megajax.run.presets.mega_paper`: Adam at a constant 0.01 on raw pixels without
augmentation, and a search over the weights themselves on the line between the two networks, neither
aligned nor recalibrated. `cifar10_resnet56.py` has the sound choices. `--config.seed=1` is another
pair of parents, `--config.model.options.depth=110` (or 152) the paper's next network.

Expect the line between the parents to be at chance almost everywhere, and the search to end near
the better parent. Accuracies and time: not measured (no GPU yet).
`--config.smoke=True` cuts it down to a trial of a few minutes on 2 cores.
"""

import megajax as mj


def get_config() -> mj.Config:
    return mj.mega_paper()
