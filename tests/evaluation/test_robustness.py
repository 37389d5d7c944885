"""Corruptions against their definitions, and the table against a plain loop."""

import jax
import matplotlib.colors
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from megajax.errors import ConfigError, DataError
from megajax.evaluation.measures import predictor
from megajax.evaluation.robustness import (
    CORRUPTIONS,
    RobustnessConfig,
    calibration_error,
    corrupt,
    measure_robustness,
    on_the_fly,
)
from megajax.run.config import Config, from_dict
from megajax.run.measurement import published
from megajax.zoo import data
from megajax.zoo.data import DataConfig

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def photographs():
    """Sixteen pieces of 32 x 32 pixels from scikit-learn's two photographs."""
    pictures = load_sample_images().images
    pieces = [
        p[y : y + 256 : 8, x : x + 256 : 8]
        for p in pictures
        for x in (0, 99, 198, 297)
        for y in (0, 99)
    ]
    return np.stack(pieces).astype(np.float32) / 255


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_stays_in_range_and_grows_with_severity(name, photographs):
    before = photographs.copy()
    distances = []
    for severity in range(1, 6):
        corrupted = corrupt(KEY, photographs, name, severity)
        assert corrupted.dtype == np.float32
        assert corrupted.shape == photographs.shape
        assert corrupted.min() >= 0
        assert corrupted.max() <= 1
        np.testing.assert_array_equal(corrupted, corrupt(KEY, photographs, name, severity))
        distances.append(np.abs(corrupted - photographs).mean())
    assert (np.diff(distances) > 0).all(), distances
    np.testing.assert_array_equal(photographs, before)
    other = corrupt(jax.random.key(1), photographs, name, 3)
    same = np.array_equal(corrupt(KEY, photographs, name, 3), other)
    assert same != name.endswith("noise")


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name != "contrast"])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_images_of_any_number_of_channels_keep_their_order(name, channels):
    """Three images whose mean tells them apart, on which no corruption acts too strongly."""
    levels = np.linspace(0.2, 0.6, 3 * channels, dtype=np.float32).reshape(3, 1, 1, channels)
    images = np.broadcast_to(levels, (3, 32, 32, channels))
    if name == "jpeg_compression" and channels == 3:
        images = images[..., :1].repeat(3, axis=-1)  # colours may shift a little
    out = corrupt(KEY, images, name, 1)
    np.testing.assert_allclose(out.mean((1, 2)), images.mean((1, 2)), atol=0.06)


def test_noise_has_the_published_moments():
    grey = np.full((4, 64, 64, 3), 0.5, np.float32)
    for severity, scale in enumerate([0.04, 0.06, 0.08, 0.09, 0.10], 1):
        noise = corrupt(KEY, grey, "gaussian_noise", severity) - grey
        assert noise.mean() == pytest.approx(0, abs=4 * scale / np.sqrt(noise.size))
        assert noise.std() == pytest.approx(scale, rel=0.02)
        assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.04
    for severity, photons in enumerate([500, 250, 100, 75, 50], 1):
        shots = corrupt(KEY, grey, "shot_noise", severity)
        assert shots.std() == pytest.approx(np.sqrt(0.5 / photons), rel=0.02)
        np.testing.assert_allclose(shots * photons, np.round(shots * photons), atol=1e-3)
    for severity, share in enumerate([0.01, 0.02, 0.03, 0.05, 0.07], 1):
        hit = corrupt(KEY, grey, "impulse_noise", severity)
        for value in (0, 1):
            assert (hit == value).mean() == pytest.approx(share / 2, abs=0.004)
        assert np.isin(hit, [0, 0.5, 1]).all()


def test_blur_is_the_truncated_normal_kernel(photographs):
    for severity, sigma in enumerate([0.4, 0.6, 0.7, 0.8, 1.0], 1):
        radius = int(4 * sigma + 0.5)
        offsets = np.arange(-radius, radius + 1)
        weights = np.exp(-0.5 * (offsets / sigma) ** 2)
        weights /= weights.sum()
        padded = np.pad(photographs, [(0, 0), (radius,) * 2, (radius,) * 2, (0, 0)], mode="edge")
        expected = sum(
            a * b * padded[:, i : i + 32, j : j + 32]
            for i, a in enumerate(weights)
            for j, b in enumerate(weights)
        )
        blurred = corrupt(KEY, photographs, "gaussian_blur", severity)
        np.testing.assert_allclose(blurred, expected, atol=1e-5)


def test_brightness_raises_the_value_of_hsv(photographs):
    for severity, more in enumerate([0.05, 0.1, 0.15, 0.2, 0.3], 1):
        hsv = matplotlib.colors.rgb_to_hsv(photographs)
        hsv[..., 2] = np.minimum(hsv[..., 2] + more, 1)
        brighter = corrupt(KEY, photographs, "brightness", severity)
        np.testing.assert_allclose(brighter, matplotlib.colors.hsv_to_rgb(hsv), atol=1e-5)
    black = corrupt(KEY, np.zeros((1, 2, 2, 3)), "brightness", 5)
    np.testing.assert_allclose(black, 0.3)


def test_contrast_and_pixelation_by_hand(photographs):
    for severity, kept in enumerate([0.75, 0.5, 0.4, 0.3, 0.15], 1):
        duller = corrupt(KEY, photographs, "contrast", severity)
        np.testing.assert_allclose(duller.mean((1, 2)), photographs.mean((1, 2)), atol=1e-4)
        np.testing.assert_allclose(duller.std((1, 2)), kept * photographs.std((1, 2)), atol=1e-4)
    for severity, small in enumerate([30, 28, 27, 24, 20], 1):
        coarse = corrupt(KEY, photographs, "pixelate", severity)
        channel = Image.fromarray(photographs[0, :, :, 1])
        for size in (small, 32):
            channel = channel.resize((size, size), Image.Resampling.BOX)
        np.testing.assert_allclose(coarse[0, :, :, 1], np.asarray(channel), atol=1e-5)


def test_what_cannot_be_corrupted_is_refused():
    images = np.zeros((1, 8, 8, 1))
    for arguments, message in [
        ((images, "rain", 1), "'rain' is not a corruption: there are gaussian_noise"),
        ((images, "contrast", 6), "severity is 6"),
        ((images - 0.5, "contrast", 1), r"run from -0\.5 to -0\.5"),
        ((images * np.nan, "contrast", 1), "run from nan"),
        ((images[0], "contrast", 1), r"shape \[8, 8, 1\]"),
    ]:
        with pytest.raises(DataError, match=message):
            corrupt(KEY, *arguments)


def test_calibration_error_against_a_loop_over_the_bins():
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.normal(size=(500, 4)), rng.integers(0, 4, 500)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    confidence, expected = probabilities.max(1), 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            right = (logits.argmax(1) == labels)[inside].mean()
            expected += inside.mean() * abs(right - confidence[inside].mean())
    assert calibration_error(logits, labels) == pytest.approx(expected)
    assert calibration_error([[np.nan, 0.0]], [0]) == 1
    assert calibration_error([[99.0, 0.0]], [0]) == 0


def test_labels_drawn_from_the_predictions_are_calibrated():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 3))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    assert calibration_error(logits, labels) < 0.02
    assert calibration_error(5 * logits, labels) > 0.2


def test_the_table_against_a_loop(photographs):
    labels = np.arange(len(photographs)) % 2
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.4])

    def logits_of(inputs):  # whether an image is bright, as one network sees it and another
        bright = (inputs * std + mean).mean((1, 2))
        return {
            "red": np.stack([bright[:, 0], np.full(len(inputs), 0.4)], 1),
            "blue": np.stack([bright[:, 2], np.full(len(inputs), 0.4)], 1),
            "broken": np.full((len(inputs), 2), np.nan),
        }

    config = RobustnessConfig(corruptions=("shot_noise", "brightness"), severities=(1, 4, 5))
    source = on_the_fly(KEY, photographs, labels, examples=10)
    table = measure_robustness(source, logits_of, config, mean=mean, std=std)
    assert (table.severities, table.examples, table.scores.shape) == ((1, 4, 5), 10, (3, 10))
    right = np.zeros((3, 10))
    for name in config.corruptions:
        for i, severity in enumerate(config.severities):
            images = corrupt(KEY, photographs[:10], name, severity)
            for row, channel in enumerate([0, 2]):
                correct = (images[..., channel].mean((1, 2)) < 0.4) == labels[:10]
                network = table.networks[("red", "blue")[row]]
                assert network["accuracy"][name][i] == correct.mean()
                right[row] += correct
    np.testing.assert_allclose(table.scores, right / 6)
    for network, scores in zip(table.networks.values(), table.scores, strict=True):
        assert network["mean_corruption_accuracy"] == pytest.approx(scores.mean())


@pytest.fixture
def corrupted_sets(monkeypatch, tmp_path):
    """What TFDS would give for CIFAR-10-C: 12 images that say which set they are from."""

    class Builder:
        def __init__(self, name):
            self.name, self.data_dir = name, str(tmp_path / name)
            feature = type("Image", (), {"shape": (32, 32, 3)})
            label = type("Label", (), {"num_classes": 10})
            self.info = type("Info", (), {"supervised_keys": ("image", "label")})
            self.info.features = {"image": feature, "label": label}
            self.info.splits = {"test": type("Split", (), {"num_examples": 12})}
            self.info.full_name = f"{name}/1.0.0"
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "dataset_info.json").write_text("{}")

        def is_prepared(self):
            return "zoom_blur" not in self.name

        def as_data_source(self, part):
            level = 51 * int(self.name[-1])
            shift = "snow" in self.name
            image = np.full((32, 32, 3), level, np.uint8)
            records = [{"image": image, "label": (i + shift) % 10} for i in range(12)]
            source = type("Source", (list,), {"__getitems__": lambda self, r: [self[i] for i in r]})
            return source(records)

    monkeypatch.setattr(data, "_builder", lambda name, data_dir: Builder(name))


def test_the_published_set_takes_the_place_of_the_corruptions(corrupted_sets):
    seen = []

    def logits_of(inputs):
        seen.append(float(inputs.mean()))
        return {"zero": np.eye(10)[np.zeros(len(inputs), int)]}

    config = RobustnessConfig(published=True, corruptions=("fog", "frost"), severities=(2, 5))
    table = measure_robustness(
        published(DataConfig(name="cifar10"), examples=11), logits_of, config
    )
    np.testing.assert_allclose(seen, [0.4, 1, 0.4, 1], rtol=1e-6)
    assert table.networks["zero"]["accuracy"] == {"fog": [2 / 11] * 2, "frost": [2 / 11] * 2}
    for names, message in [
        (("fog", "snow"), "snow 1 holds other labels than fog"),
        (("zoom_blur",), "cifar10_corrupted/zoom_blur_1 is not prepared; run once"),
    ]:
        with pytest.raises(DataError, match=message):
            measure_robustness(
                published(), logits_of, RobustnessConfig(published=True, corruptions=names)
            )


def test_choices_that_cannot_work_are_named():
    with pytest.raises(ConfigError, match=r"robustness.corruptions is \('fog',\): choose from gau"):
        RobustnessConfig(corruptions=("fog",))
    with pytest.raises(ConfigError, match=r"robustness.corruptions is .* choose from .* fog"):
        RobustnessConfig(corruptions=("gaussian_blur",), published=True)
    with pytest.raises(
        ConfigError, match=r"robustness.severities is .*: it must lie between 1 and 5"
    ):
        RobustnessConfig(severities=(0, 1))
    with pytest.raises(ConfigError, match=r"robustness.severities is .*: at least one"):
        RobustnessConfig(severities=())
    with pytest.raises(ConfigError, match=r"robustness.published is True: .* which is 'digits'"):
        from_dict({"robustness": {"published": True}})
    assert isinstance(
        from_dict({"robustness": {"published": True}, "data": {"name": "cifar10"}}), Config
    )


def test_a_predictor_is_every_network_and_their_ensemble():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(20, 4)).astype(np.float32)
    networks = {name: rng.normal(size=(4, 3)).astype(np.float32) for name in "ab"}
    logits_of = predictor(lambda w, x: x @ w, networks, {"both": ("a", "b")}, batch_size=7)
    logits = logits_of(inputs)
    assert list(logits) == ["a", "b", "both"]
    for name, kernel in networks.items():
        np.testing.assert_allclose(logits[name], inputs @ kernel, atol=1e-5)
    odds = [np.exp(logits[name]) for name in networks]
    mean = np.mean([odd / odd.sum(1, keepdims=True) for odd in odds], axis=0)
    np.testing.assert_allclose(np.exp(logits["both"]), mean, rtol=1e-4)
