"""Loading, splitting and dealing out images."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from megajax.errors import DataError
from megajax.zoo import data
from megajax.zoo.data import DataConfig, ParentsConfig, check_dataset, load, shards

TFDS = pathlib.Path(__file__).parents[2] / ".." / "shared" / "data" / "tfds"
needs_cifar10 = pytest.mark.skipif(
    not (TFDS / "cifar10").exists(), reason="no prepared CIFAR-10 here"
)


@pytest.fixture(scope="module")
def digits():
    return load(0, DataConfig())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "megajax"


def splits_of(dataset):
    return dataset.train, dataset.validation, dataset.test


def test_digits_are_all_there_once(digits):
    from sklearn.datasets import load_digits

    source = load_digits()
    ids = np.concatenate([split.ids for split in splits_of(digits)])
    np.testing.assert_array_equal(np.sort(ids), np.arange(1797))
    for split in splits_of(digits):
        assert split.images.dtype == np.float32
        assert split.labels.dtype == np.int32
        np.testing.assert_array_equal(split.images[..., 0], source.images[split.ids] / 16)
        np.testing.assert_array_equal(split.labels, source.target[split.ids])


def test_fractions(digits):
    assert [len(split.labels) for split in splits_of(digits)] == [1213, 135, 449]
    other = load(0, DataConfig(test_fraction=0.5, validation_fraction=0.2))
    assert [len(split.labels) for split in splits_of(other)] == [719, 180, 898]


@pytest.mark.parametrize("key", [3, jax.random.key(3), jax.random.PRNGKey(3)])
def test_equal_seeds_give_equal_splits_and_others_do_not(key, digits):
    first, second = load(key, DataConfig()), load(key, DataConfig())
    jax.tree.map(np.testing.assert_array_equal, splits_of(first), splits_of(second))
    assert not np.array_equal(first.test.ids, digits.test.ids)


def test_limit_keeps_the_first_of_the_same_draw(digits):
    limited = load(0, DataConfig(limit=20))
    for split, whole in zip(splits_of(limited), splits_of(digits), strict=True):
        np.testing.assert_array_equal(split.ids, whole.ids[:20])


def test_standardize_uses_the_training_images_alone(digits):
    dataset = load(0, DataConfig(standardize=True))
    np.testing.assert_allclose(dataset.train.images.mean(), 0, atol=1e-5)
    np.testing.assert_allclose(dataset.train.images.std(), 1, atol=1e-5)
    back = dataset.test.images * dataset.std + dataset.mean
    np.testing.assert_allclose(back, digits.test.images, atol=1e-6)
    np.testing.assert_allclose(dataset.mean, digits.train.images.mean(), rtol=1e-5)


def broken(digits, **changes):
    return digits._replace(validation=digits.validation._replace(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((0, 8, 8, 1), np.float32), "labels": np.zeros(0, np.int32)}, "empty"),
        ({"labels": np.full(135, 10)}, r"labels must lie in [0, 10), one is 10"),
        ({"labels": np.full(135, -1)}, r"labels must lie in [0, 10), one is -1"),
        ({"labels": np.zeros(135)}, "labels must be integers [N], they are float64 [135]"),
        ({"labels": np.zeros((135, 1), int)}, "labels must be integers [N], they are int64"),
        ({"labels": np.zeros(134, int)}, "135 images have 134 labels"),
        ({"images": np.zeros((135, 8, 8), np.float32)}, "images must be floats [N, H, W, C]"),
        ({"images": np.zeros((135, 8, 8, 1), np.uint8)}, "they are uint8 [135, 8, 8, 1]"),
        ({"images": np.zeros((135, 9, 8, 1), np.float32)}, "images are [9, 8, 1], in the train"),
        ({"images": np.full((135, 8, 8, 1), np.nan)}, "not finite"),
    ],
)
def test_check_names_the_split_and_the_fault(digits, changes, message):
    with pytest.raises(DataError) as caught:
        check_dataset(broken(digits, **changes))
    assert str(caught.value).startswith("digits, validation split: ")
    assert message in str(caught.value)


def test_check_finds_an_image_in_two_splits(digits):
    ids = digits.validation.ids.copy()
    ids[7] = digits.test.ids[3]
    with pytest.raises(DataError, match=r"the validation and test splits share 1 images, one is"):
        check_dataset(broken(digits, ids=ids))
    check_dataset(broken(digits, ids=None))


def test_an_empty_split_is_an_error():
    with pytest.raises(DataError, match="validation split: it is empty"):
        load(0, DataConfig(validation_fraction=0.0))


# --- shards ------------------------------------------------------------------------------------


def test_same_shards_are_everything():
    for shard in shards(0, np.zeros(7, int), 1, ParentsConfig(count=3)):
        np.testing.assert_array_equal(shard, np.arange(7))


@pytest.mark.parametrize("kind", ["disjoint", "skewed"])
@pytest.mark.parametrize("count", [2, 3, 8, 12])
def test_each_image_goes_to_exactly_one_parent(kind, count, digits):
    labels = digits.train.labels
    dealt = shards(1, labels, 10, ParentsConfig(count=count, shards=kind))
    assert len(dealt) == count
    np.testing.assert_array_equal(np.sort(np.concatenate(dealt)), np.arange(len(labels)))
    for shard in dealt:
        assert shard.dtype == np.int32
        assert (np.diff(shard) > 0).all()


def test_disjoint_shards_are_equal_and_seeded(digits):
    labels = digits.train.labels
    one, again, other = (
        shards(key, labels, 10, ParentsConfig(count=4, shards="disjoint")) for key in (0, 0, 1)
    )
    assert {len(shard) for shard in one} <= {303, 304}
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("skew", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_skewed_shards_have_the_share_they_say(skew, count, digits):
    labels = digits.train.labels
    dealt = shards(0, labels, 10, ParentsConfig(count=count, shards="skewed", skew=skew))
    counts = np.array([np.bincount(labels[shard], minlength=10) for shard in dealt])
    for c in range(10):
        total = (labels == c).sum()
        assert counts[c % count, c] == round(skew * total)
        others = np.delete(counts[:, c], c % count)
        assert others.sum() == total - round(skew * total)
        assert others.max() - others.min() <= 1


def test_more_parents_than_classes_share_homes(digits):
    labels = digits.train.labels % 2
    dealt = shards(0, labels, 2, ParentsConfig(count=4, shards="skewed", skew=1.0))
    assert [set(labels[shard]) for shard in dealt] == [{0}, {1}, {0}, {1}]


def test_a_parent_without_images_is_an_error():
    with pytest.raises(DataError, match="parent 2 of 3 receives no training image"):
        shards(0, [0, 1], 2, ParentsConfig(count=3, shards="disjoint"))


# --- tensorflow-datasets -----------------------------------------------------------------------


def copy_of_cifar10(folder, edit):
    """CIFAR-10's folder with its description edited, and its test images as the training ones."""
    source, target = TFDS / "cifar10" / "3.0.2", folder / "cifar10" / "3.0.2"
    target.mkdir(parents=True)
    for name in ("features.json", "label.labels.txt"):
        shutil.copyfile(source / name, target / name)
    for part in ("train", "test"):
        file = "cifar10-{}.array_record-00000-of-00001"
        (target / file.format(part)).symlink_to((source / file.format("test")).resolve())
    info = json.loads((source / "dataset_info.json").read_text())
    edit(info)
    (target / "dataset_info.json").write_text(json.dumps(info))
    target.chmod(0o555)
    folder.chmod(0o555)
    return DataConfig(name="cifar10", data_dir=str(folder), limit=300)


def few_images(info):
    """The test images twice: a sixth of the time."""
    train, test = sorted(info["splits"], key=lambda split: split["name"], reverse=True)
    train.update(shardLengths=test["shardLengths"], numBytes=test["numBytes"])


@needs_cifar10
@pytest.mark.slow
def test_cifar10_from_its_files_and_from_the_cache(tmp_path, cache):
    config = copy_of_cifar10(tmp_path / "tfds", few_images)
    dataset = load(0, config)
    assert (dataset.name, dataset.num_classes) == ("cifar10/3.0.2", 10)
    assert dataset.train.images.shape == (300, 32, 32, 3)
    assert 0 <= dataset.train.images.min() < 0.1 < 0.9 < dataset.train.images.max() <= 1
    assert set(dataset.test.labels) == set(range(10))
    assert dataset.test.ids.min() >= 10_000 > dataset.validation.ids.max()
    (file,) = cache.iterdir()  # the TFDS directory is read-only
    assert file.name.startswith("cifar10-")

    stamp = file.stat().st_mtime_ns
    again = load(0, config)
    jax.tree.map(np.testing.assert_array_equal, splits_of(dataset), splits_of(again))
    assert file.stat().st_mtime_ns == stamp

    file.write_bytes(file.read_bytes()[:-1000])
    again = load(0, config)
    jax.tree.map(np.testing.assert_array_equal, splits_of(dataset), splits_of(again))
    assert file.stat().st_mtime_ns != stamp


@needs_cifar10
@pytest.mark.parametrize("name", ["cifar10-train.array_record", "dataset_info"])
@pytest.mark.parametrize("harm", ["missing", "cut", "damaged"])
def test_a_damaged_set_is_one_line(name, harm, tmp_path, cache):
    config = copy_of_cifar10(tmp_path, few_images)
    (file,) = (tmp_path / "cifar10" / "3.0.2").glob(f"{name}*")
    data = file.read_bytes()[:200_000]
    file.unlink()
    if harm == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif harm == "damaged":
        file.write_bytes(bytes(byte ^ 0x5A for byte in data))
    started = time.monotonic()
    with pytest.raises(
        DataError, match=r"cifar10 .*python -m megajax.data prepare cifar10"
    ) as error:
        load(0, config)
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 60


WITHOUT_TFDS = """
import sys
sys.modules["tensorflow_datasets"] = None  # cannot be imported
from megajax.zoo.data import DataConfig, load
dataset = load(0, DataConfig(name="cifar10", data_dir=sys.argv[1], limit=50))
print(dataset.name, len(dataset.test.labels), dataset.num_classes)
"""


def test_the_cache_is_enough_and_says_what_is_missing_where_it_is_not(small_set, tmp_path):
    """On a machine without TFDS."""
    first = load(0, DataConfig(name="cifar10", data_dir=str(tmp_path / "here"), limit=5))
    cache = tmp_path / "here" / "megajax" / "cifar10.npz"
    assert sorted(np.load(cache)) == sorted(
        ["about", *(f"{part}_{what}" for part in SIZES for what in ("images", "labels"))]
    )
    (tmp_path / "there" / "megajax").mkdir(parents=True)
    shutil.copy(cache, tmp_path / "there" / "megajax")

    def run(folder):
        command = [sys.executable, "-c", WITHOUT_TFDS, str(tmp_path / folder)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("there").stdout == f"{first.name} 20 5\n"
    error = run("nowhere").stderr.splitlines()[-1]
    assert "cannot be read without tensorflow_datasets: pip install" in error
    assert f"copy {tmp_path / 'nowhere' / 'megajax' / 'cifar10.npz'} from a machine" in error


SIZES = {"train": 40, "validation": 10, "test": 20}


@pytest.fixture
def small_set(tmp_path, monkeypatch):
    """A TFDS set of the name `mnist`, whose records are stood in for by arrays."""

    class Feature:
        def __init__(self, **attributes):
            self.__dict__.update(attributes)

    rng = np.random.default_rng(0)

    class Builder:
        config = DataConfig(name="set", data_dir=str(tmp_path))
        data_dir = str(tmp_path / "set" / "1.0.0")
        shape = (6, 6, 3)
        reads = 0

        def is_prepared(self):
            return True

        @property
        def info(self):
            return Feature(
                features={
                    "image": Feature(shape=self.shape),
                    "label": Feature(shape=(), num_classes=5),
                },
                supervised_keys=("image", "label"),
                splits={name: Feature(num_examples=size) for name, size in SIZES.items()},
                full_name="set/1.0.0",
            )

        def as_data_source(self, part):
            type(self).reads += 1
            records = [
                {
                    "image": rng.integers(
                        0, 256, [s or rng.integers(6, 12) for s in self.shape], np.uint8
                    ),
                    "label": i % 5,
                }
                for i in range(SIZES[part])
            ]

            class Source(list):
                def __getitems__(self, chosen):
                    return [records[i] for i in chosen]

            return Source(records)

    pathlib.Path(Builder.data_dir).mkdir(parents=True)
    (pathlib.Path(Builder.data_dir) / "dataset_info.json").write_text("{}")
    monkeypatch.setattr(data, "_builder", lambda name, data_dir: Builder())
    monkeypatch.setattr(data, "BLOCK", 7)
    return Builder


def test_official_splits_are_kept_and_cached_beside_the_set(small_set, cache):
    dataset = load(0, small_set.config)
    assert [len(split.labels) for split in splits_of(dataset)] == [40, 10, 20]
    assert not cache.exists()
    assert (pathlib.Path(small_set.config.data_dir) / "megajax" / "set.npz").exists()
    again = load(0, small_set.config)
    assert small_set.reads == 3
    jax.tree.map(np.testing.assert_array_equal, splits_of(dataset), splits_of(again))


def test_a_set_prepared_anew_is_read_anew(small_set):
    load(0, small_set.config)
    (pathlib.Path(small_set.data_dir) / "dataset_info.json").write_text('{"new": 1}')
    load(0, small_set.config)
    assert small_set.reads == 6


def test_a_cache_that_cannot_be_written_is_done_without(small_set, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    load(0, small_set.config)
    load(0, small_set.config)
    assert small_set.reads == 6
    assert not list((pathlib.Path(small_set.config.data_dir) / "megajax").iterdir())


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_several_sizes_are_resized_on_request(small_set, channels):
    small_set.shape = (None, None, channels)
    with pytest.raises(DataError, match=r"images of several sizes: .* data\.image_size"):
        load(0, small_set.config)
    dataset = load(0, small_set.config.replace(image_size=5))
    assert dataset.train.images.shape == (40, 5, 5, channels)


def test_resizing_takes_the_central_square():
    image = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    np.testing.assert_array_equal(data._resized(image, 4), image[:, 2:6])
    np.testing.assert_array_equal(data._resized(image[..., :1], 4), image[:, 2:6, :1])
    assert data._resized(image, None) is image


def test_a_set_without_labels_is_an_error(small_set, monkeypatch):
    small_set.shape = ()
    with pytest.raises(DataError, match="set is not a set of labelled images"):
        load(0, small_set.config)


def test_an_unprepared_set_names_the_command_at_once(tmp_path, caplog):
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        load(0, DataConfig(name="mnist", data_dir=str(tmp_path)))
    assert time.monotonic() - started < 20
    message = str(caught.value)
    assert 'pip install -e ".[prepare]"' in message
    assert f"python -m megajax.data prepare mnist --data_dir {tmp_path}" in message
    assert "\n" not in message
    assert not caplog.records
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["no_such_set", "cifar10/no_such_config", "cifar10:9.9.9"])
def test_an_unknown_set_is_one_line(name, tmp_path):
    with pytest.raises(DataError) as caught:
        load(0, DataConfig(name=name, data_dir=str(tmp_path)))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_cifar10
def test_a_set_in_another_format_names_the_command(tmp_path):
    config = copy_of_cifar10(tmp_path, lambda info: info.update(fileFormat="tfrecord"))
    with pytest.raises(DataError) as caught:
        load(0, config)
    assert "python -m megajax.data prepare cifar10 --data_dir ANOTHER" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_preparing_without_tensorflow_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    assert data.main(["prepare", "mnist"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert 'pip install -e ".[prepare]"' in captured.err


def test_preparing_downloads_and_prints_the_directory(monkeypatch, capsys):
    prepared = []

    class Builder:
        data_dir = "folder"

        def download_and_prepare(self):
            prepared.append(True)

    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(data, "_builder", lambda name, data_dir: Builder())
    assert data.main(["prepare", "mnist", "--data_dir", "folder"]) == 0
    assert prepared == [True]
    assert capsys.readouterr().out == "folder\n"


def test_importing_the_module_imports_neither_source():
    code = (
        "import sys, megajax.zoo.data; "
        "assert not {'tensorflow_datasets', 'sklearn'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


def own():
    images = np.random.default_rng(0).random((40, 4, 4, 1))
    return {"train": (images[:30], np.arange(30) % 3), "test": (images[30:], np.arange(10) % 3)}


def test_a_function_of_the_users_own_is_a_set():
    dataset = load(0, DataConfig(name=own, validation_fraction=0.2))
    assert (dataset.name, dataset.num_classes) == ("own", 3)
    assert [len(split.labels) for split in splits_of(dataset)] == [24, 6, 10]
    images, labels = own()["test"]
    order = dataset.test.ids - 30
    np.testing.assert_allclose(dataset.test.images, images[order], rtol=1e-6)
    np.testing.assert_array_equal(dataset.test.labels, labels[order])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1, 2], r"data.name: own\(\) returned list: a dictionary of pairs"),
        ({"train": (1, 2), "valid": (1, 2)}, "returned train, valid: a dictionary of pairs"),
        ({"train": np.zeros(3)}, "returned parts that are not pairs"),
        ({"test": own()["test"]}, "own has no train split"),
        ({"train": (np.zeros((9, 4)), np.zeros(9, int))}, "images must be floats"),
    ],
)
def test_what_an_own_function_must_return_is_one_line(returned, message):
    def own():
        return returned

    with pytest.raises(DataError, match=message):
        load(0, DataConfig(name=own))
