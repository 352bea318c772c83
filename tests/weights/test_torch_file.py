"""The reader of torch files: what torch wrote (in bytes that torch.save made), and what is refused unread."""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import torch_zip

from diffdistill.weights import WeightsError, torch_file

FILES = pathlib.Path(__file__).parent
DEEP = b")" + b"2\x86" * 60  # (t, t) of (t, t) of ...: its hash visits 2^60 tuples


@pytest.mark.parametrize("name", ["torch_zip.pth", "torch_legacy.pth"])
def test_files_of_torch_itself(name):
    """make_torch_files.py wrote them: a view, a transposed tensor, half and bfloat16, a scalar, a shared storage."""
    found = torch_file.read_state_dict(FILES / name)
    count = np.arange(24, dtype=np.float32)
    expected = {
        "whole": count.reshape(2, 3, 4),
        "transposed": count.reshape(4, 6).T,
        "view": count[5:17:3],
        "half": (count / 7).astype(np.float16),
        "brain": np.array([1.0, 1.0078125, -3.0]),
        "long": np.array([2**40, -1]),
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 3), np.float32),
        "mask": np.array([True, False]),
    }
    assert set(found) == {*expected, "nested", "step"}
    for key, value in expected.items():
        np.testing.assert_array_equal(np.asarray(found[key], value.dtype), value, err_msg=key)
    assert found["brain"].dtype.name == "bfloat16"
    np.testing.assert_array_equal(found["nested"]["parameter"], count[:3])
    assert found["step"] == 7


def evil(path: pathlib.Path, marker: pathlib.Path, form: str) -> pathlib.Path:
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"weight": Evil()}))
    else:
        path.write_bytes(pickle.dumps(Evil()))
    return path


@pytest.mark.parametrize("form", ["zip", "stream"])
def test_a_file_that_names_code_is_refused_and_nothing_runs(tmp_path, form):
    path = evil(tmp_path / "evil.pth", tmp_path / "executed", form)
    with pytest.raises(WeightsError, match=r"evil\.pth is refused: it names (posix|nt)\.system"):
        torch_file.read_state_dict(path)
    assert not (tmp_path / "executed").exists()


def test_a_function_of_torch_that_is_not_about_tensors_is_refused(tmp_path):
    stream = io.BytesIO()
    stream.write(b"\x80\x02ctorch.hub\nload\nU\x01x\x85R.")
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
    with pytest.raises(WeightsError, match=r"names torch\.hub\.load, which has no place among numbers"):
        torch_file.read_state_dict(path)


@pytest.mark.parametrize("size", [0, 30, 200, -1])
def test_truncated_files_are_refused(tmp_path, size):
    path = torch_zip.write(tmp_path / "x.pth", {"weight": np.ones((30, 30), np.float32)})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(WeightsError, match=r"x\.pth is (damaged|refused)"):
        torch_file.read_state_dict(path)


def test_tensors_that_reach_beyond_their_storage_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_zip._Storage, "__init__", lambda self, key, size: setattr(self, "pid", pid(key, 3)))

    def pid(key, size):
        return ("storage", torch_zip._Name("torch", "FloatStorage"), key, "cpu", size)

    path = torch_zip.write(tmp_path / "x.pth", {"weight": np.ones((2, 3), np.float32)})
    with pytest.raises(WeightsError, match="storage 0 has 24 bytes, not 12"):
        torch_file.read_state_dict(path)
    with zipfile.ZipFile(path) as archive:
        described = archive.read("archive/data.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", described)
        archive.writestr("archive/data/0", b"\0" * 12)
    with pytest.raises(WeightsError, match="larger than its storage"):
        torch_file.read_state_dict(path)


def test_what_is_small_when_packed_is_not_unpacked(tmp_path):
    """A zip file of a few kilobytes whose one storage is 64 MB: refused by its directory."""
    path = torch_zip.write(tmp_path / "x.pth", {"weight": np.ones((2, 3), np.float32)})
    with zipfile.ZipFile(path) as archive:
        described = archive.read("archive/data.pkl")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", described)
        archive.writestr("archive/data/0", b"\0" * (1 << 26))
    assert path.stat().st_size < 1 << 17
    tracemalloc.start()
    with pytest.raises(WeightsError, match="its entries are compressed"):
        torch_file.read_state_dict(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()


def test_one_block_of_numbers_does_not_become_thousands_of_arrays():
    storage = torch_file._Storage(np.dtype("<f4"), 4, np.zeros(4, np.float32))
    tensors = [torch_file.Tensor(storage, 0, (4,), (1,)) for _ in range(100)]
    with pytest.raises(WeightsError, match="more than 8 tensors show all of the same block"):
        torch_file._arrays(tensors, {})


def test_entries_that_lie_over_each_other_are_refused(tmp_path):
    """Each of a thousand entries may span all that follow: their sum says it before any is read."""
    path = torch_zip.write(tmp_path / "x.pth", {"weight": np.ones((30, 30), np.float32)})
    content = bytearray(path.read_bytes())
    entry = content.rfind(b"PK\1\2")
    content[entry + 20 : entry + 28] = (1 << 20).to_bytes(4, "little") * 2
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="its entries are compressed or lie over each other"):
        torch_file.read_state_dict(path)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (b"\x80\x02ccollections\nOrderedDict\n]](" + DEEP + b"K\x01ea\x85R.", "has a key of type tuple"),
        (b"\x80\x02ccollections\nOrderedDict\n}(K\x00NK\x01Nu\x85R.", "cannot unpack"),
    ],
    ids=["key", "copy of a dict"],
)
def test_descriptions_that_would_never_end_are_refused(tmp_path, described, message):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", described)
    with pytest.raises(WeightsError, match=message):
        torch_file.read_state_dict(tmp_path / "x.pth")


def test_a_list_of_pairs_is_a_dict(tmp_path):
    """Python 2 wrote an OrderedDict so."""
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02ccollections\nOrderedDict\n]](U\x01aK\x01ea\x85R.")
    assert torch_file.read_state_dict(tmp_path / "x.pth") == {"a": 1}


def test_the_keys_of_a_stream_are_not_hashed_unseen(tmp_path):
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {})]
    (tmp_path / "x.pth").write_bytes(b"".join(parts) + b"\x80\x02]" + DEEP + b"a.")
    with pytest.raises(WeightsError, match="names a block of numbers that no tensor shows"):
        torch_file.read_state_dict(tmp_path / "x.pth")


def test_other_content_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"cannot be read: No such file"):
        torch_file.read_state_dict(tmp_path / "absent.pth")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(WeightsError, match=r"holds no data\.pkl"):
        torch_file.read_state_dict(tmp_path / "x.zip")
