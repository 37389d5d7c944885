"""Eight well-trained ResNet-56 on CIFAR-10, merged two by two: 8 -> 4 -> 2 -> 1.

    python -m megajax.run --config experiments/cifar10_resnet_8parents.py --config.data.data_dir=DIR

DIR is a TFDS directory that holds cifar10: `python -m megajax.data prepare cifar10` makes it, once.
Training as in `cifar10_resnet56.py`, then 10 epochs of fine-tuning as in the paper; the best parent
is trained just as long, to compare with. The paper scores the search on the test images
(`--config.fitness.select_on_test=True` shows what that is worth; the report then says so).
`--config.hierarchy.enabled=False` merges all eight in one search over masks of eight parents, at
the same number of evaluations.

Accuracies and time: not measured (no GPU yet).
`--config.smoke=True` cuts it down to a trial of a few minutes on 2 cores.
"""

import megajax as mj


def get_config() -> mj.Config:
    return mj.sound_cifar10().replace(
        model=mj.ModelConfig(name="resnet", options={"depth": 56}),
        parents=mj.ParentsConfig(count=8),
        evolution={"population_size": 64, "evaluation_budget": 64 * 101},
        hierarchy=mj.HierarchyConfig(enabled=True),
        finetune=mj.FinetuneConfig(epochs=10),
    )
