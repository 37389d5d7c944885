"""The zoo's CIFAR networks in PyTorch, for `population.py --torch`."""

import itertools

import torch
from torch import nn


class Block(nn.Module):
    """Two convolutions with BatchNorm; a shortcut that subsamples and pads channels with zeros."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.stride, self.more = stride, width - before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Channels first."""
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        x = x[:, :, :: self.stride, :: self.stride]
        x = nn.functional.pad(x, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return torch.relu(x + y)


class DenseLayer(nn.Module):
    """A DenseNet's layer: a bottleneck whose few new channels join those that came in."""

    def __init__(self, before: int, growth: int) -> None:
        super().__init__()
        self.new = nn.Sequential(
            *(nn.BatchNorm2d(before), nn.ReLU(), nn.Conv2d(before, 4 * growth, 1, bias=False)),
            *(nn.BatchNorm2d(4 * growth), nn.ReLU()),
            nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Channels first."""
        return torch.cat([x, self.new(x)], 1)


def mlp() -> nn.Module:
    """Three hidden layers."""
    sizes = (3 * 32 * 32, 512, 512, 512)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def resnet(depth: int) -> nn.Module:
    """Three stages of 16, 32 and 64 channels."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    ]
    before = 16
    for stage, width in enumerate((16, 32, 64)):
        for block in range((depth - 2) // 6):
            layers.append(Block(before, width, 2 if stage and not block else 1))
            before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def densenet121() -> nn.Module:
    """Four dense blocks behind a 3x3 stem."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False)]
    layers += [nn.BatchNorm2d(64), nn.ReLU()]
    channels = 64
    for block, count in enumerate((6, 12, 24, 16)):
        if block:
            half = channels // 2
            layers += [
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.Conv2d(channels, half, 1, bias=False),
            ]
            layers.append(nn.AvgPool2d(2))
            channels = half
        for _ in range(count):
            layers.append(DenseLayer(channels, 32))
            channels += 32
    layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, 10))


def build(name: str) -> nn.Module:
    """`mlp`, `resnet20`, `resnet56` or `densenet121`, for 10 classes, channels last."""
    if name.startswith("resnet"):
        model = resnet(int(name.removeprefix("resnet")))
    else:
        model = {"mlp": mlp, "densenet121": densenet121}[name]()
    return model.to(memory_format=torch.channels_last)
