"""The unpickler under all readers: what a few bytes must not be able to do."""

from __future__ import annotations

import io
import pickle
import time
import tracemalloc

import pytest

from diffdistill.data import pickles, unpickling
from diffdistill.data.contract import DataError
from diffdistill.weights import WeightsError, persistent, torch_file


class Table(unpickling.Unpickler):
    known = {("torch", "FloatStorage"): torch_file.KNOWN["torch", "FloatStorage"], ("builtins", "len"): len}


def test_an_index_does_not_set_memory_aside():
    """The unpickler in C makes room for 2^27 entries here: 2 GB."""
    tracemalloc.start()
    assert Table(io.BytesIO(b"\x80\x02}r\x00\x00\x00\x08.")).load() == {}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("name", [b"ctorch\nFloatStorage\n", b"cbuiltins\nlen\n"])
def test_what_the_table_holds_is_not_changed(name):
    before = dict(vars(torch_file.KNOWN["torch", "FloatStorage"]))
    with pytest.raises(unpickling.Refused, match="gives a state to something that has none"):
        Table(io.BytesIO(b"\x80\x02" + name + b"}U\x05dtypeU\x01xsb.")).load()
    assert vars(torch_file.KNOWN["torch", "FloatStorage"]) == before


def test_names_outside_the_table_are_refused():
    with pytest.raises(unpickling.Refused, match=r"names os\.system, which has no place among numbers"):
        Table(io.BytesIO(b"\x80\x02cos\nsystem\nU\x04trueR.")).load()


def nested(depth: int) -> bytes:
    """A dict whose entry holds a list of two references to a list of two references ... : 2^depth leaves."""
    inner: list = [1]
    for _ in range(depth):
        inner = [inner, inner]
    return pickle.dumps({"x": inner}, protocol=2)


def test_a_list_that_is_shared_is_looked_at_once(tmp_path):
    content = nested(60)
    assert len(content) < 1000
    start = time.monotonic()
    assert isinstance(pickles.load(io.BytesIO(content), "file")["x"], list)
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError):  # not of torch.save
        torch_file.read_state_dict(path)
    assert len(torch_file._arrays(pickle.loads(content), {})["x"]) == 2
    assert time.monotonic() - start < 5


def test_a_module_that_is_shared_is_refused():
    shared = persistent.Record("Linear", {"_parameters": {}})
    module = persistent.Record("Net", {"_modules": {"a": shared, "b": shared}})
    with pytest.raises(WeightsError, match="its module b stands in another place too"):
        module.tensors()


def test_messages_say_which_file():
    with pytest.raises(DataError, match=r"batch_1 is refused: the pickle names os\.system"):
        pickles.load(io.BytesIO(b"\x80\x02cos\nsystem\nU\x04trueR."), "batch_1")
