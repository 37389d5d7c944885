"""How networks fare on corrupted images, and how well they know what they do not know.

A corruption acts on images in [0, 1], at severities 1 to 5. It runs on the host (NumPy, SciPy,
Pillow), so that a corrupted image has the same bits whatever the device. The constants are those of
CIFAR-10-C; lengths are in pixels, so on images smaller than 32 pixels a side blur and pixelation
are harder, on larger ones milder. The published set, which has 15 corruptions and is rounded to
8 bits, can be taken instead; figures on the one are not figures on the other.

Source: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations, ICLR 2019.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.special import softmax

from megajax.errors import DataError
from megajax.keys import named_key
from megajax.sections import Section, at_least, between
from megajax.types import Key

__all__ = [
    "CORRUPTIONS",
    "PUBLISHED_CORRUPTIONS",
    "Corruption",
    "Robustness",
    "RobustnessConfig",
    "Source",
    "agreement",
    "calibration_error",
    "corrupt",
    "corruption",
    "measure_robustness",
    "on_the_fly",
]

Images: TypeAlias = npt.NDArray[np.float32]

Source: TypeAlias = Callable[[str, int], tuple[Images, npt.NDArray[Any]]]
"""`source(name, severity) -> (images [N, H, W, C] in [0, 1], labels [N])`."""


class Robustness(NamedTuple):
    """Accuracies on corrupted images.

    Attributes:
        networks: for each network `mean_corruption_accuracy`, and `accuracy`: name of the
            corruption -> accuracy at each severity.
        severities: S of them.
        examples: images N under each corruption and severity.
        scores: float32 `[M, N]`, for each network and image the share of corruptions and severities
            under which it was right: what paired tests need.
    """

    networks: dict[str, dict[str, Any]]
    severities: tuple[int, ...]
    examples: int
    scores: npt.NDArray[np.float32]


# Corruptions -------------------------------------------------------------------------------------


class Corruption(NamedTuple):
    """What can happen to an image.

    Attributes:
        apply: `apply(rng, images [N, H, W, C], constant) -> images`, which are then cut to [0, 1].
        constants: one for each severity.
    """

    apply: Callable[[np.random.Generator, Images, float], npt.NDArray[Any]]
    constants: tuple[float, ...]


CORRUPTIONS: dict[str, Corruption] = {}
"""The corruptions by name."""


def corruption(*constants: float) -> Callable[[Any], Any]:
    """Lists a function as a corruption of its name. See `Corruption` for what it takes.

    Example:
        >>> @corruption(0.1, 0.2, 0.3, 0.4, 0.5)
        ... def darkness(rng, x, less):
        ...     return x - less
        >>> CORRUPTIONS.pop("darkness").constants[0]
        0.1
    """

    def listed(apply: Any) -> Any:
        CORRUPTIONS[apply.__name__] = Corruption(apply, constants)
        return apply

    return listed


@corruption(0.04, 0.06, 0.08, 0.09, 0.10)
def gaussian_noise(rng: np.random.Generator, x: Images, scale: float) -> Any:
    """Adds normal noise to every number, as a sensor does in low light."""
    return x + scale * rng.standard_normal(x.shape, np.float32)


@corruption(500, 250, 100, 75, 50)
def shot_noise(rng: np.random.Generator, x: Images, photons: float) -> Any:
    """Poisson noise of counting few photons."""
    return rng.poisson(x * photons) / photons


@corruption(0.01, 0.02, 0.03, 0.05, 0.07)
def impulse_noise(rng: np.random.Generator, x: Images, share: float) -> Any:
    """Salt and pepper: some numbers become 0 or 1."""
    draw = rng.random(x.shape, np.float32)
    return np.where(draw < share / 2, 0, np.where(draw < share, 1, x))


@corruption(0.4, 0.6, 0.7, 0.8, 1.0)
def gaussian_blur(rng: np.random.Generator, x: Images, sigma: float) -> Any:
    """Blurs by a normal kernel of up to one pixel; the border is repeated outwards."""
    return gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest")


@corruption(0.05, 0.1, 0.15, 0.2, 0.3)
def brightness(rng: np.random.Generator, x: Images, more: float) -> Any:
    """Raises the value in the HSV cone: hue and saturation stay, the largest channel grows."""
    value = x.max(axis=-1, keepdims=True)
    brighter = np.minimum(value + more, 1)
    # Black has no hue: it becomes grey.
    return np.where(value > 0, x * (brighter / np.maximum(value, 1e-12)), brighter)


@corruption(0.75, 0.5, 0.4, 0.3, 0.15)
def contrast(rng: np.random.Generator, x: Images, kept: float) -> Any:
    """Draws every number towards the mean of its image and channel."""
    mean = x.mean(axis=(1, 2), keepdims=True)
    return mean + kept * (x - mean)


@corruption(0.95, 0.9, 0.85, 0.75, 0.65)
def pixelate(rng: np.random.Generator, x: Images, share: float) -> Any:
    """Shrinks the image and enlarges it again, both by boxes."""
    rows, columns = (_shrunk_and_enlarged(size, share) for size in x.shape[1:3])
    return np.einsum("ih,nhwc,jw->nijc", rows, x, columns, optimize=True)


@corruption(80, 65, 58, 50, 40)
def jpeg_compression(rng: np.random.Generator, x: Images, quality: float) -> Any:
    """Through JPEG and back; three channels as colour, others each as a grey image."""
    pictures = np.round(x * 255).astype(np.uint8)
    grey = x.shape[-1] != 3
    if grey:
        pictures = np.moveaxis(pictures, -1, 1).reshape(-1, *x.shape[1:3])
    decoded = np.stack([_through_jpeg(picture, int(quality)) for picture in pictures]) / 255
    return np.moveaxis(decoded.reshape(len(x), -1, *x.shape[1:3]), 1, -1) if grey else decoded


# fmt: off
PUBLISHED_CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "frosted_glass_blur",
    "motion_blur", "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic",
    "pixelate", "jpeg_compression",
)
# fmt: on
"""Those of CIFAR-10-C."""


class RobustnessConfig(Section):
    """Whether all networks are also tested on corrupted test images, and on which.

    Attributes:
        enabled: measure it, once, after the search.
        published: take the published CIFAR-10-C (`cifar10_corrupted` of TFDS, in `data.data_dir`)
            instead of corrupting the test images here.
        corruptions: names of corruptions; empty means all of them.
        severities: from 1 to 5.
        examples: at most this many test images, the first ones; None takes all.
    """

    section = "robustness"
    enabled: bool = True
    published: bool = False
    corruptions: tuple[str, ...] = ()
    severities: tuple[Annotated[int, between(1, 5)], ...] = (1, 2, 3, 4, 5)
    examples: Annotated[int, at_least(1)] | None = 1000

    def _check(self) -> None:
        names = PUBLISHED_CORRUPTIONS if self.published else tuple(CORRUPTIONS)
        known = set(self.corruptions) <= set(names)
        self.require(known, "corruptions", f"choose from {', '.join(names)}")
        self.require(bool(self.severities), "severities", "at least one is needed")


def corrupt(key: Key, images: npt.ArrayLike, name: str, severity: int) -> Images:
    """Corrupts images by a named corruption.

    Args:
        key: PRNG key; each corruption and severity draws from a key of its own made from it.
        images: `[N, H, W, C]` in [0, 1]; rounding may have carried them a little outside.
        name: a key of `CORRUPTIONS`.
        severity: 1 to 5.

    Returns:
        The corrupted images, float32, in [0, 1].

    Raises:
        DataError: there is no such corruption or severity, or images leave [0, 1].

    Example:
        >>> corrupt(jax.random.key(0), np.zeros((1, 8, 8, 1)), "brightness", 2).max()
        np.float32(0.1)
    """
    if name not in CORRUPTIONS:
        raise DataError(f"{name!r} is not a corruption: there are {', '.join(CORRUPTIONS)}")
    apply, constants = CORRUPTIONS[name]
    if not 1 <= severity <= len(constants):
        raise DataError(f"severity is {severity}: they run from 1 to {len(constants)}")
    x = np.asarray(images, np.float32)
    if x.ndim != 4 or not x.size:
        raise DataError(f"images have shape {list(x.shape)}: [N, H, W, C] is needed")
    low, high = x.min(), x.max()
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise DataError(
            f"images run from {low:.3g} to {high:.3g}: corruptions need [0, 1]; were they "
            "standardised by another mean and std?"
        )
    own = jax.random.key_data(jax.random.fold_in(named_key(key, name), severity))
    rng = np.random.default_rng(np.asarray(own).ravel())
    corrupted: Images = apply(rng, np.clip(x, 0, 1), constants[severity - 1])
    return np.clip(corrupted, 0, 1).astype(np.float32)


def _shrunk_and_enlarged(size: int, share: float) -> npt.NDArray[np.float32]:
    """Pillow's two resizings along one axis, as the matrix that they are."""
    small = max(1, int(size * share))
    identity = Image.fromarray(np.eye(size, dtype=np.float32))
    down = identity.resize((size, small), Image.Resampling.BOX)
    return np.asarray(down.resize((size, size), Image.Resampling.BOX))


def _through_jpeg(picture: npt.NDArray[np.uint8], quality: int) -> npt.NDArray[np.uint8]:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as decoded:
        return np.asarray(decoded)


# Measures ----------------------------------------------------------------------------------------


def calibration_error(logits: npt.ArrayLike, labels: npt.ArrayLike, bins: int = 15) -> float:
    """Expected calibration error: how far confidence is from accuracy, on average.

    Args:
        logits: `[N, C]`; log-probabilities serve as well. An example whose logits are not finite
            counts as sure and wrong.
        labels: `[N]`.
        bins: bins of equal width over the confidence, which is the largest probability.

    Returns:
        The mean over the examples of their bin's |accuracy - mean confidence|, in [0, 1].

    Example:
        >>> round(calibration_error([[0.0, 2.0], [0.0, 2.0]], [1, 0]), 3)  # 88 % sure, half right
        0.381

    Source: Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, ICML 2017.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    finite = np.isfinite(logits).all(axis=-1)
    probabilities = softmax(np.where(finite[:, None], logits, 0.0), axis=-1)
    confidence = np.where(finite, probabilities.max(axis=-1), 1.0)
    right = (logits.argmax(axis=-1) == labels) & finite
    # A confidence on an edge belongs to the bin below, as in the paper.
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(bin_of, right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def agreement(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """The share of examples for which two networks predict the same class.

    Args:
        first: predicted classes `[N]`.
        second: `[N]`, alike.

    Returns:
        A share in [0, 1].

    Example:
        >>> agreement([0, 1, 2, 2], [0, 1, 1, 2])
        0.75
    """
    return float(np.mean(np.asarray(first) == np.asarray(second)))


# The table ---------------------------------------------------------------------------------------


def measure_robustness(
    source: Source,
    logits_of: Callable[[Images], Mapping[str, npt.NDArray[Any]]],
    config: RobustnessConfig | None = None,
    *,
    mean: npt.ArrayLike = 0.0,
    std: npt.ArrayLike = 1.0,
) -> Robustness:
    """Tests any number of networks on all corruptions and severities.

    Args:
        source: where corrupted images come from: `on_the_fly` or `published`.
        logits_of: `logits_of(images [N, H, W, C])` gives each network's logits `[N, C]` by name;
            see `megajax.evaluation.measures.predictor`.
        config: which corruptions and severities; None takes the defaults.
        mean: `[C]` or a number that the networks' inputs have subtracted.
        std: `[C]` or a number that they are divided by after that.

    Returns:
        The accuracies.

    Raises:
        DataError: images that cannot be corrupted, or that do not stay in one order.

    Example:
        >>> images, labels = np.zeros((4, 8, 8, 1)), np.array([0, 0, 0, 1])
        >>> table = measure_robustness(
        ...     on_the_fly(jax.random.key(0), images, labels),
        ...     lambda images: {"always 0": np.tile([1.0, 0.0], (len(images), 1))},
        ... )
        >>> table.networks["always 0"]["mean_corruption_accuracy"], table.scores.tolist()
        (0.75, [[1.0, 1.0, 1.0, 0.0]])
    """
    config = config or RobustnessConfig()
    names = config.corruptions or (
        PUBLISHED_CORRUPTIONS if config.published else tuple(CORRUPTIONS)
    )
    accuracy: dict[str, dict[str, list[float]]] = {}
    right: dict[str, list[npt.NDArray[np.bool_]]] = {}
    first = None
    for name, severity in itertools.product(names, config.severities):
        images, labels = source(name, severity)
        first = labels if first is None else first
        if not np.array_equal(labels, first):
            raise DataError(f"{name} {severity} holds other labels than {names[0]}, in order")
        inputs = np.asarray((images - np.asarray(mean)) / np.asarray(std), np.float32)
        for network, logits in logits_of(inputs).items():
            correct = (logits.argmax(axis=-1) == labels) & np.isfinite(logits).all(axis=-1)
            right.setdefault(network, []).append(correct)
            of_network = accuracy.setdefault(network, {})
            of_network.setdefault(name, []).append(float(correct.mean()))
    return Robustness(
        networks={
            network: {
                "mean_corruption_accuracy": float(np.mean(right[network])),
                "accuracy": by_name,
            }
            for network, by_name in accuracy.items()
        },
        severities=config.severities,
        examples=0 if first is None else len(first),
        scores=np.stack([np.mean(rows, axis=0) for rows in right.values()]).astype(np.float32),
    )


def on_the_fly(
    key: Key, images: npt.ArrayLike, labels: npt.ArrayLike, examples: int | None = None
) -> Source:
    """Corrupts given images.

    Args:
        key: PRNG key.
        images: `[N, H, W, C]` in [0, 1].
        labels: `[N]`.
        examples: takes so many of the first images; None takes all.

    Returns:
        The source; it draws the same for the same name and severity.

    Example:
        >>> source = on_the_fly(jax.random.key(0), np.zeros((2, 8, 8, 1)), [7, 3], examples=1)
        >>> source("brightness", 1)[0].max(), source("brightness", 1)[1].tolist()
        (np.float32(0.05), [7])
    """
    pictures, classes = np.asarray(images, np.float32)[:examples], np.asarray(labels)[:examples]
    return lambda name, severity: (corrupt(key, pictures, name, severity), classes)
