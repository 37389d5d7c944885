"""Two ResNet-8 on class-skewed parts of CIFAR-10, merged by channel masks; on a CPU.

    python -m megajax.run --config experiments/cifar10_small.py --config.data.data_dir=DIR

DIR is a TFDS directory that holds cifar10: `python -m megajax.data prepare cifar10` makes it, once.
Parent 0 sees mostly the even classes, parent 1 mostly the odd ones, 10,000 images each, for three
epochs. Under 15 minutes on 2 cores, of which the training takes a third and random search, at the
cost of the evolution, another.
"""

import megajax as mj


def get_config() -> mj.Config:
    return mj.Config(
        data=mj.DataConfig(
            name="cifar10", standardize=True, limit=20_000, validation_fraction=0.05
        ),
        model=mj.ModelConfig(name="resnet", options={"depth": 8}),
        parents=mj.ParentsConfig(shards="skewed", skew=0.8),
        training=mj.TrainingConfig(epochs=3, batch_size=128, learning_rate=1e-2),
        align=mj.AlignConfig(method="activations"),
        recalibrate=mj.RecalibrateConfig(enabled=True),
        evolution=mj.EvolutionConfig(population_size=16, generations=8),
        baselines=mj.BaselinesConfig(names=("uniform_average", "random_search")),
        robustness=mj.RobustnessConfig(severities=(1, 3, 5), examples=250),
    )
