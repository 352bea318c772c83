"""Metrics on disk, and what a person sees meanwhile."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from diffdistill.training import metrics, progress
from diffdistill.training.errors import MetricsError
from diffdistill.training.metrics import MetricWriter, Window


def read(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_one_object_a_line(tmp_path):
    writer = MetricWriter(tmp_path, "teacher", tensorboard=False)
    writer.write_scalars(5, {"loss": np.float32(0.25), "bins": np.array([1.0, np.nan, np.inf]), "count": 3})
    assert read(tmp_path) == [{"stage": "teacher", "step": 5, "loss": 0.25, "bins": [1.0, None, None], "count": 3}]
    writer.close()


def test_a_resumed_stage_leaves_no_line_twice(tmp_path):
    """Its own lines beyond the resumed update go, torn lines go, those of other stages stay."""
    for stage in ("a", "b"):
        writer = MetricWriter(tmp_path, stage, tensorboard=False)
        for step in (10, 20, 30):
            writer.write_scalars(step, {"loss": 1.0})
        writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "b", "st')
    writer = MetricWriter(tmp_path, "b", step=20, tensorboard=False)
    writer.write_scalars(30, {"loss": 2.0})
    writer.close()
    assert [(line["stage"], line["step"], line["loss"]) for line in read(tmp_path)] == [
        *[("a", step, 1.0) for step in (10, 20, 30)],
        *[("b", step, loss) for step, loss in ((10, 1.0), (20, 1.0), (30, 2.0))],
    ]


def test_tensorboard_events_where_tensorboardx_is_installed(tmp_path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    writer = MetricWriter(tmp_path, "a", step=3)
    writer.write_scalars(4, {"loss": 1.5, "bins": np.array([2.0, 3.0])})
    writer.flush()
    writer.write_scalars(5, {"loss": 1.0})
    writer.close()
    (file,) = (tmp_path / "tensorboard" / "a").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    content, events = file.read_bytes(), []
    while content:  # length, its checksum, event, its checksum
        (size,) = struct.unpack_from("<Q", content)
        events.append(event_pb2.Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    version, start, *logged = events
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (4, event_pb2.SessionLog.START)  # hides what there was from 4 on
    values = [(event.step, {value.tag: value.simple_value for value in event.summary.value}) for event in logged]
    assert values == [(4, {"loss": 1.5, "bins/0": 2.0, "bins/1": 3.0}), (5, {"loss": 1.0})]


def test_events_can_be_looked_at_while_a_stage_trains(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    writer = MetricWriter(tmp_path, "a")
    (file,) = (tmp_path / "tensorboard" / "a").iterdir()
    writer.write_scalars(1, {"loss": 1.0})
    assert file.stat().st_size == 0
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", 0.0)
    writer.write_scalars(2, {"loss": 1.0})
    assert file.stat().st_size > 0
    writer.close()


@pytest.mark.parametrize("when", ["flush", "close"])
def test_events_that_cannot_be_written_are_one_message(tmp_path, when):
    pytest.importorskip("tensorboardX")
    writer = MetricWriter(tmp_path, "a")
    (file,) = (tmp_path / "tensorboard" / "a").iterdir()
    writer._events._writer._py_recordio_writer._writer = Path("/dev/full").open("wb")  # noqa: SIM115
    writer.write_scalars(1, {"loss": 1.0})
    with pytest.raises(MetricsError, match=r"Cannot write .*metrics.jsonl or its TensorBoard events: No space left"):
        getattr(writer, when)()
    writer.close()
    assert file.exists()


def test_a_disk_that_takes_no_more(tmp_path):
    """/dev/full answers every write with "no space left": one message, and closing afterwards is quiet."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = MetricWriter(tmp_path, "a", tensorboard=False)
    with pytest.raises(MetricsError, match=r"Cannot write .*metrics.jsonl.*: No space left on device"):
        writer.write_scalars(1, {"loss": 1.0})
    writer.flush()
    writer.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(MetricsError, match=r"Cannot write .*file/metrics.jsonl.*: "):
        MetricWriter(tmp_path / "file", "a")


def test_windows_average_what_is_there():
    window = Window(4)
    rows = {"loss": np.arange(6.0), "bins": np.array([[i, np.nan if i % 2 else i] for i in range(6)], float)}
    out = list(window.add(2, rows, last=8))  # updates 3..8
    assert [update for update, _ in out] == [4, 8]
    assert out[0][1]["loss"] == 0.5
    assert out[1][1]["loss"] == 3.5
    np.testing.assert_array_equal(out[1][1]["bins"], [3.5, 3.0])
    assert [update for update, _ in Window(100).add(0, {"loss": np.ones(3)}, last=3)] == [3]  # the end of a stage
    with pytest.raises(ValueError, match="log_every=0"):
        Window(0)


def test_plain_lines_away_from_a_terminal():
    stream = io.StringIO()
    shown = progress.make_progress("teacher", 0, 40, stream)
    for update in range(10, 41, 10):
        shown.advance(update, {"loss": 0.125})
    shown.close()
    first, last = stream.getvalue().splitlines()  # nothing in between: ten seconds have not passed
    assert first == "teacher: 10/40  loss 0.125"
    assert last.startswith("teacher: 40/40  loss 0.125  ")
    assert "updates/s" in last
    assert "left" in last


def test_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    shown = progress.make_progress("teacher", 10, 40, stream)
    shown.advance(25, {"loss": 0.5})
    shown.advance(40, {"loss": 0.125})
    shown.close()
    assert "40/40" in stream.getvalue()
    assert "teacher" in stream.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(4.2, "4s"), (65, "1m05s"), (7620, "2h07m")])
def test_durations(seconds, text):
    assert progress.duration(seconds) == text
