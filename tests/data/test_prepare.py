"""Preparing ends with the same bytes however often it was killed, and never mixes two sets."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tarfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffdistill.data import Batches, DataError, gather, in_memory, open_source, records
from diffdistill.data.prepare import prepare

SHARD = 4 * 52  # four examples of 4 * 4 * 3 + 4 bytes, so that a small set has several shards


@pytest.fixture
def folder(tmp_path):
    """Ten pictures for training in two classes, two for testing."""
    random = np.random.default_rng(0)
    for number in range(12):
        split = "train" if number < 10 else "test"
        file = tmp_path / "pets" / split / ("cat" if number % 2 else "dog") / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)).save(file)
    return tmp_path / "pets"


def contents(destination: Path) -> dict[str, bytes]:
    return {str(file.relative_to(destination)): file.read_bytes() for file in destination.rglob("*") if file.is_file()}


def test_prepared_pictures_are_the_pictures(folder, tmp_path):
    lines = []
    prepared = prepare(folder, tmp_path / "out", shard_bytes=SHARD, log=lines.append)
    assert list(prepared) == ["test", "train"]
    assert lines[-1] == "preparing pets:train: 10 of 10 images"
    original = open_source(source="images", path=folder)
    for source in (prepared["train"], open_source(source="array_record", path=tmp_path / "out")):
        assert source.class_names == original.class_names
        assert source.image_shape == original.image_shape
        assert len(list((tmp_path / "out/train").glob("*.array_record"))) == 3
        for limit in (0, 10**6):  # record by record, and all in memory
            ours = Batches(source, 7, seed=1, flip=True, memory_limit=limit)(3)
            theirs = Batches(original, 7, seed=1, flip=True)(3)
            np.testing.assert_array_equal(ours["image"], theirs["image"])
            np.testing.assert_array_equal(ours["label"], theirs["label"])
        np.testing.assert_array_equal(source[9]["image"], original[9]["image"])
        assert source[9]["label"] == original[9]["label"]
    small = open_source(source="array_record", path=tmp_path / "out", image_size=2, channels=1)
    assert in_memory(small).images.shape == (10, 2, 2, 1)


def test_a_compressed_tar_gives_the_same_shards(folder, tmp_path):
    file = tmp_path / "pets.tar.xz"
    with tarfile.open(file, "w:xz") as archive:
        archive.add(folder, "pets")
    prepare(folder, tmp_path / "from_folder", shard_bytes=SHARD)
    prepare(file, tmp_path / "from_tar", shard_bytes=SHARD)
    ours, theirs = contents(tmp_path / "from_tar"), contents(tmp_path / "from_folder")
    assert ours.keys() == theirs.keys(), "the unpacked tar must be gone"
    assert all(ours[name] == theirs[name] for name in ours if name.endswith("array_record"))


def test_preparing_again_changes_nothing_and_restores_a_lost_shard(folder, tmp_path):
    prepare(folder, tmp_path / "out", shard_bytes=SHARD)
    before = contents(tmp_path / "out")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    prepare(folder, tmp_path / "out", shard_bytes=SHARD)
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    lost = next((tmp_path / "out/train").glob("*00001-of*"))
    lost.unlink()
    with pytest.raises(DataError, match=f"{lost.name} is missing"):
        open_source(source="array_record", path=tmp_path / "out")
    prepare(folder, tmp_path / "out", shard_bytes=SHARD)
    assert contents(tmp_path / "out") == before


def test_an_error_on_the_way_keeps_finished_shards_and_is_continued(folder, tmp_path, monkeypatch):
    prepare(folder, tmp_path / "whole", shard_bytes=SHARD)
    last = folder / "train/dog/08.png"
    good = last.read_bytes()
    last.write_bytes(good[:-20] + bytes(20))
    with pytest.raises(DataError, match=r"dog/08.png is damaged"):
        prepare(folder, tmp_path / "out", shard_bytes=SHARD)
    assert len(list((tmp_path / "out/train").glob("*.array_record"))) == 2
    with pytest.raises(DataError, match="not finished; run the same --mode=prepare"):
        open_source(source="array_record", path=tmp_path / "out")
    last.write_bytes(good)
    prepare(folder, tmp_path / "out", shard_bytes=SHARD)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_at_any_moment_it_ends_with_the_same_bytes(folder, tmp_path):
    """SIGKILL after ever longer times, until a run survives."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare(folder, whole, shard_bytes=52)
    slow = (
        "import time; from diffdistill.data import records; publish = records.publish\n"
        "def slowly(part, file): time.sleep(0.02); publish(part, file); time.sleep(0.02)\n"
        "import diffdistill.data.prepare as p; p.publish = records.publish = slowly; print('begin', flush=True)\n"
        f"p.prepare({str(folder)!r}, {str(out)!r}, shard_bytes=52)"
    )
    root = str(Path(__file__).parents[2])
    kills = 0
    for patience in (0.05, 0.12, 0.2, 60.0):
        with subprocess.Popen(
            [sys.executable, "-c", slow], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begin\n"
            try:
                assert process.wait(patience) == 0
                break
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
    assert kills >= 2
    assert contents(out) == contents(whole)


def test_other_data_and_other_settings_are_refused(folder, tmp_path):
    prepare(folder, tmp_path / "out", shard_bytes=SHARD)
    with pytest.raises(DataError, match=r"other settings \(image_shape was \(4, 4, 3\), now \(2, 2, 3\)\); delete it"):
        prepare(folder, tmp_path / "out", image_size=2, shard_bytes=SHARD)
    shutil.copy(folder / "train/dog/00.png", folder / "train/cat/new.png")
    with pytest.raises(DataError, match="count was 10, now 11"):
        prepare(folder, tmp_path / "out", shard_bytes=SHARD)
    with pytest.raises(DataError, match="lies inside"):
        prepare(folder, folder / "prepared")
    (tmp_path / "mine/test").mkdir(parents=True)
    (tmp_path / "mine/test/thesis.tex").write_text("important")
    with pytest.raises(DataError, match="files that are not ours"):
        prepare(folder, tmp_path / "mine")


def test_a_second_process_is_kept_out(folder, tmp_path):
    (tmp_path / "out").mkdir()
    handle = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process"):
        prepare(folder, tmp_path / "out")
    os.close(handle)


def test_destinations_that_cannot_be_written(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write to .*file/out"):
        prepare(folder, tmp_path / "file/out")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffdistill.data.records.publish", full)
    with pytest.raises(DataError, match=r"No space left on device.*run the same command again"):
        prepare(folder, tmp_path / "out")


def test_unusable_prepared_folders(folder, tmp_path):
    out = tmp_path / "out"
    prepare(folder, out, shard_bytes=SHARD)

    def refused(message: str, **settings) -> None:
        with pytest.raises(DataError, match=message):
            open_source(source="array_record", path=out, **settings)

    refused("no prepared split 'val'; it has test, train", split="val")
    file = out / "train/metadata.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "count": 12}))
    refused("holds 10 images, .*metadata.json says 12")
    file.write_text(json.dumps({**stored, "version": 2}))
    refused("version 2; this version of diffdistill reads .* version 1")
    file.write_text("{")
    refused("not readable metadata")
    file.write_text(json.dumps(stored))
    shard = next((out / "train").glob("*00001-of*"))
    shard.write_bytes(shard.read_bytes()[:100])
    refused("damaged shard")


def test_rows_survive_any_order(folder, tmp_path):
    prepared = prepare(folder, tmp_path / "out", shard_bytes=SHARD)["train"]
    order = [9, 0, 4, 4, 1]
    rows = gather(prepared, order)
    for row, number in enumerate(order):
        np.testing.assert_array_equal(rows["image"][row], prepared[number]["image"])
        assert rows["label"][row] == prepared[number]["label"]


@pytest.mark.parametrize(
    "changes",
    [
        {"records_per_shard": 0},
        {"count": 10**12, "records_per_shard": 1},
        {"count": 100_000, "records_per_shard": 1},
        {"count": "10"},
        {"count": True},
        {"count": -1},
        {"image_shape": [4, 12]},
        {"image_shape": "abc"},
        {"image_shape": [100_000, 100_000, 3]},
        {"image_shape": [4, 4, -3]},
        {"dtype": []},
        {"class_names": []},
        {"class_names": [1]},
        {"name": 5},
        {"more": 5},
    ],
)
def test_metadata_out_of_range(folder, tmp_path, changes):
    file = tmp_path / "metadata.json"
    good = {"format": "diffdistill-images", "version": 1, "name": "x", "split": "train", "count": 10}
    good |= {"image_shape": [4, 4, 3], "class_names": ["a"], "records_per_shard": 4, "fingerprint": "f"}
    file.write_text(json.dumps(good))
    assert records.read_metadata(file).num_shards == 3
    file.write_text(json.dumps({**good, **changes}))
    with pytest.raises(DataError, match="is not readable metadata"):
        records.read_metadata(file)
    for content in (b"[" * 100_000, b"\xff{}", b"[]"):
        file.write_bytes(content)
        with pytest.raises(DataError, match="is not readable metadata"):
            records.read_metadata(file)


def test_records_that_prepare_never_writes(folder, tmp_path):
    out = tmp_path / "out"
    prepare(folder, out)
    (shard,) = (out / "test").glob("*.array_record")
    writer_of = import_module("array_record.python.array_record_module").ArrayRecordWriter

    def refused(message: str, *content: bytes, options: str = "group_size:1,uncompressed") -> None:
        writer = writer_of(str(shard), options)
        for record in content:
            writer.write(record)
        writer.close()
        with pytest.raises(DataError, match=message):
            gather(open_source(source="array_record", path=out, split="test"), [0, 1])
        with pytest.raises(DataError, match=message):
            open_source(source="array_record", path=out, split="test")[1]

    good = bytes(4 + 48)
    refused("record 1 has 1 bytes, expected 52", good, b"x")
    refused(r"record 1 has label 1000000000, expected 0\.\.1", good, (10**9).to_bytes(4, "little") + bytes(48))
    refused(r"record 1 has label -1, expected", good, b"\xff" * 52)
    refused("is compressed .*zstd", good, good, options="group_size:1,zstd:3")


def test_the_home_of_nobody(folder, tmp_path):
    for source, destination in (("~nosuch/x", tmp_path / "out"), (folder, "~nosuch/x")):
        with pytest.raises(DataError, match=r"~nosuch/x begins with the home"):
            prepare(source, destination)
