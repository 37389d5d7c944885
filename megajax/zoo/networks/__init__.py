"""The networks that come with megajax; the merge itself takes any network.

`build` makes one from what a configuration file can hold: a name and plain options.

Example:
    >>> build("resnet", num_classes=10, options={"depth": 8}).depth
    8
    >>> sorted(MODELS)
    ['cnn', 'densenet', 'mlp', 'resnet', 'vgg', 'xception']
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from flax import linen as nn

from megajax.errors import ConfigError, did_you_mean
from megajax.sections import Section, one_of
from megajax.zoo.networks.cnn import CNN
from megajax.zoo.networks.densenet import DenseNet
from megajax.zoo.networks.mlp import MLP
from megajax.zoo.networks.resnet import ResNet
from megajax.zoo.networks.vgg import VGG
from megajax.zoo.networks.xception import Xception

__all__ = ["CNN", "MLP", "MODELS", "VGG", "DenseNet", "ModelConfig", "ResNet", "Xception", "build"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn": CNN,
    "densenet": DenseNet,
    "mlp": MLP,
    "resnet": ResNet,
    "vgg": VGG,
    "xception": Xception,
}
"""Name -> `(num_classes, **options) -> module`. Add your own to use it from a configuration."""


class ModelConfig(Section):
    """Which network, and its options.

    Attributes:
        name: a name in `megajax.zoo.networks.MODELS`; or a class or function of your own,
            `(num_classes, **options) -> module`, whose call is `(images, train=False) -> logits`.
        options: keyword arguments of that network, for example `{"width": 32}`.
    """

    section = "model"
    name: Annotated[str, one_of(MODELS)] | Callable[..., Any] = "cnn"
    options: Mapping[str, Any] = {}


def build(
    name: str | Callable[..., nn.Module], num_classes: int, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """Makes a network of the zoo, or one of the user's own.

    Args:
        name: a key of `MODELS`, or what could be listed there.
        num_classes: number of logits.
        options: keyword arguments of that network.

    Returns:
        A Linen module; `module.apply(variables, images [N, H, W, C])` gives float32 logits
        [N, num_classes].

    Raises:
        ConfigError: no such network, no such option, or a value of the wrong type.

    Example:
        >>> build("cnn", 10, {"widht": 32})
        Traceback (most recent call last):
        ...
        megajax.errors.ConfigError: model.options.widht is not an option of cnn; did you mean
        model.options.width?
    """
    if isinstance(name, str) and name not in MODELS:
        raise ConfigError(f"model.name is {name!r}: choose one of {', '.join(sorted(MODELS))}")
    make = MODELS[name] if isinstance(name, str) else name
    called = name if isinstance(name, str) else getattr(name, "__name__", repr(name))
    parameters = dict(inspect.signature(make).parameters)
    if "num_classes" not in parameters:
        raise ConfigError(f"model.name is {called}: it must take num_classes")
    for reserved in ("num_classes", "parent", "name"):
        parameters.pop(reserved, None)
    for option, value in (options or {}).items():
        field = f"model.options.{option}"
        if option not in parameters:
            there = f"it has {', '.join(parameters)}"
            hint = did_you_mean(option, parameters, there, "model.options.")
            raise ConfigError(f"{field} is not an option of {called}; {hint}")
        kind = type(parameters[option].default)
        if kind in (bool, int, str) and type(value) is not kind:
            raise ConfigError(f"{field} is {value!r}: {kind.__name__} is needed")
        if kind is int and value < 1:
            raise ConfigError(f"{field} is {value!r}: it must be at least 1")
    return make(num_classes=num_classes, **(options or {}))
