"""The event file, read back record by record."""

import struct
import sys

import pytest

from megajax.errors import ConfigError, WorkdirError
from megajax.run.tensorboard import write_tensorboard

LINES = [
    {"generation": 0, "best": 0.25, "median": None, "evaluations": 8, "seconds": 0.5},
    {"generation": 1, "best": 0.5, "median": 0.125, "evaluations": 16, "seconds": 1.0},
]


def events(path):
    """The events of a TFRecord file: length, checksum, data, checksum."""
    event = pytest.importorskip("tensorboardX").proto.event_pb2.Event
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_every_number_is_there_under_its_name_and_generation(tmp_path):
    pytest.importorskip("tensorboardX")
    write_tensorboard(tmp_path / "events", LINES)
    (path,) = (tmp_path / "events").iterdir()
    scalars = [
        (value.tag, event.step, value.simple_value)
        for event in events(path)
        for value in event.summary.value
    ]
    assert scalars == [
        ("best", 0, 0.25),
        ("evaluations", 0, 8),
        ("seconds", 0, 0.5),
        ("best", 1, 0.5),
        ("median", 1, 0.125),
        ("evaluations", 1, 16),
        ("seconds", 1, 1.0),
    ]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match=r"file/events cannot be written: Not a directory"):
        write_tensorboard(tmp_path / "file" / "events", LINES)


def test_without_the_package_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r'pip install -e ".\[tensorboard\]"'):
        write_tensorboard(tmp_path, LINES)
