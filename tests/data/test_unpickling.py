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

DEEP = b")" + b"2\x86" * 60  # (t, t) of (t, t) of ...: 2^60 tuples to its hash and to its text


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


@pytest.mark.parametrize(
    "content",
    [
        b"}" + DEEP + b"K\x01s.",
        b"}(" + DEEP + b"K\x01u.",
        b"(" + DEEP + b"K\x01d.",
        b"\x8f(" + DEEP + b"\x90.",
        b"(" + DEEP + b"\x91.",
        b"}\x8a\x09" + bytes(8) + b"\x01K\x01s.",
    ],
    ids=["setitem", "setitems", "dict", "additems", "frozenset", "large number"],
)
def test_keys_whose_hash_takes_for_ever_are_refused(content):
    with pytest.raises(DataError, match=r"has a key of type (tuple|int) that is neither text nor a number"):
        pickles.load(io.BytesIO(b"\x80\x04" + content), "file")


def test_usual_keys_are_kept():
    content = {"a": {b"x": 1, 3: [1, 2]}, "names": {"b", "c"}, "b": bytearray(b"12")}
    assert Table(io.BytesIO(pickle.dumps(content, 5))).load() == content


@pytest.mark.parametrize(
    "call", [b"cnumpy\ndtype\n" + DEEP + b"\x85R.", b"c_codecs\nencode\nU\x01a" + DEEP + b"\x86R."]
)
def test_what_has_no_end_is_not_put_into_messages(call):
    with pytest.raises(DataError, match="a tuple"):
        pickles.load(io.BytesIO(b"\x80\x02" + call), "file")


@pytest.mark.parametrize("content", [b"a]q\x00h\x00as.", b"a" + b"]" * 3000 + b"a" * 2999 + b"s."])
def test_lists_without_end_are_damage(content):
    with pytest.raises(DataError, match=r"file is damaged or truncated \(RecursionError"):
        pickles.load(io.BytesIO(b"\x80\x02}U\x01" + content), "file")


def test_a_long_text_is_not_made_into_bytes_a_million_times():
    text = b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20) + b"q\x01"
    repeated = b"}U\x01a](" + b"c_codecs\nencode\nh\x01X\x06\0\0\0latin1\x86R" * 1000 + b"es."
    tracemalloc.start()
    with pytest.raises(DataError, match="repeats a part of itself so often"):
        pickles.load(io.BytesIO(b"\x80\x02" + text + b"0" + repeated), "file")
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"](" + b"}" * 101 + b"e.", "more than 100 steps"),
        (b"(ctorch\nFloatStorage\no.", "in a way that files of numbers never do"),
        (b"ctorch\nFloatStorage\n]R.", "with arguments that are no tuple"),
    ],
)
def test_objects_are_counted_and_made_in_one_way(content, message):
    with pytest.raises(unpickling.Refused, match=message):
        Table(io.BytesIO(b"\x80\x02" + content), operations=100).load()


def test_bytes_that_are_not_there_take_no_memory():
    tracemalloc.start()
    with pytest.raises(EOFError):
        Table(io.BytesIO(b"\x80\x05\x96" + (1 << 30).to_bytes(8, "little") + b"1")).load()
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
