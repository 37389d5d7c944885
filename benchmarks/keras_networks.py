"""The networks of `population.py` in Keras, for the loop that MeGA's reference runs.

Needs Keras 3 (`pip install keras`), which computes with JAX here.
"""

from typing import Any

import keras
from keras import layers


def build(name: str) -> Any:
    """A compiled model: `mlp`, `resnet20`, `resnet56` or `densenet121`, for 32x32 images."""
    inputs = keras.Input((32, 32, 3))
    if name == "mlp":
        x = layers.Flatten()(inputs)
        for _ in range(3):
            x = layers.Dense(512, activation="relu")(x)
        model = keras.Model(inputs, layers.Dense(10)(x))
    elif name == "densenet121":
        model = keras.applications.DenseNet121(
            weights=None, input_tensor=inputs, classes=10, classifier_activation=None
        )
    else:
        model = keras.Model(inputs, _resnet(inputs, int(name.removeprefix("resnet"))))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss, metrics=["accuracy"])
    return model


def _resnet(inputs: Any, depth: int) -> Any:
    x = _conv(inputs, 16, 1)
    for width in (16, 32, 64):
        for block in range((depth - 2) // 6):
            stride = 2 if width > 16 and block == 0 else 1
            y = _conv(_conv(x, width, stride), width, 1, relu=False)
            if stride == 2:
                x = _conv(x, width, 2, kernel=1, relu=False)
            x = layers.ReLU()(layers.Add()([x, y]))
    return layers.Dense(10)(layers.GlobalAveragePooling2D()(x))


def _conv(x: Any, width: int, stride: int, kernel: int = 3, relu: bool = True) -> Any:
    x = layers.Conv2D(width, kernel, stride, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    return layers.ReLU()(x) if relu else x
