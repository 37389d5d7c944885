"""Two ResNet-8 on class-skewed parts of CIFAR-10, merged without labels; on a CPU.

    python -m megajax.run --config experiments/cifar10_small.py --config.data.data_dir=DIR

DIR is a TFDS directory that holds cifar10: `python -m megajax.data prepare cifar10` makes it, once.
Parent 0 sees mostly the even classes, parent 1 mostly the odd ones, 22,500 images each, for 30
epochs. The search goes down the gradient of a mask for each weight, from -0.5 to 1.5, towards the
parents' mean prediction on 40,000 training images, and passes as many images through networks as
320 networks take on the validation images. It takes about half an hour on 2 cores, two thirds of it
training.
"""

import megajax as mj


def get_config() -> mj.Config:
    return mj.Config(
        data=mj.DataConfig(name="cifar10", standardize=True),
        model=mj.ModelConfig(name="resnet", options={"depth": 8}),
        parents=mj.ParentsConfig(shards="skewed", skew=0.8),
        training=mj.TrainingConfig(
            epochs=30,
            batch_size=128,
            optimizer="sgd",
            learning_rate=0.1,
            warmup_epochs=1.0,
            weight_decay=5e-4,
            augment=("flip", "crop"),
        ),
        align=mj.AlignConfig(method="activations"),
        recalibrate=mj.RecalibrateConfig(enabled=True, examples=512),
        genome=mj.GenomeConfig(granularity="element", low=-0.5),
        fitness=mj.FitnessConfig(metric="distill", distill_examples=40_000),
        evolution=mj.EvolutionConfig(
            method="gradient",
            population_size=5,
            generations=7,
            learning_rate=0.02,
            gradient_examples=128,
        ),
        baselines=mj.BaselinesConfig(names=("uniform_average", "regmean", "pleas")),
        robustness=mj.RobustnessConfig(severities=(1, 3, 5), examples=250),
    )
