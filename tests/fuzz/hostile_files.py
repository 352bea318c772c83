"""What files are made of, and hostile ones made by hand: bombs, lengths without data, links, pickled calls."""

from __future__ import annotations

import functools
import io
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BOMB = 3 << 29  # bytes that a bomb unpacks to


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tarred(members: dict[str, bytes | tarfile.TarInfo], mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return stream.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def npy(array: np.ndarray, **settings: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **settings)
    return stream.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def npy_header(shape: str, descr: str = "|u1") -> bytes:
    """An array of a shape that is nowhere near its data."""
    head = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head


def _deflated(start: bytes, size: int) -> tuple[bytes, int]:
    """(deflate stream of `start` and `size` zeros, their CRC-32); one block of zeros, compressed once, is repeated."""
    squeeze, block = zlib.compressobj(9, zlib.DEFLATED, -15), bytes(1 << 20)
    head = squeeze.compress(start) + squeeze.flush(zlib.Z_FULL_FLUSH)
    zeros = squeeze.compress(block) + squeeze.flush(zlib.Z_FULL_FLUSH)  # refers to nothing before it
    check = zlib.crc32(start)
    for _ in range(size >> 20):
        check = zlib.crc32(block, check)
    return head + zeros * (size >> 20) + squeeze.flush(), check


@functools.lru_cache
def gzip_bomb(start: bytes = b"", size: int = BOMB) -> bytes:
    stream, check = _deflated(start, size)
    return b"\x1f\x8b\x08\0\0\0\0\0\2\xff" + stream + struct.pack("<II", check, len(start) + size)


@functools.lru_cache
def zip_bomb(name: str, start: bytes = b"", size: int = BOMB) -> bytes:
    stream, check = _deflated(start, size)
    # Version, flags, method, time, date, then the sizes and the length of the name.
    facts = struct.pack("<5H3IH", 20, 0, 8, 0, 0x21, check, len(stream), len(start) + size, len(name))
    entry = b"PK\3\4" + facts + bytes(2) + name.encode() + stream
    directory = b"PK\1\2" + struct.pack("<H", 20) + facts + bytes(16) + name.encode()
    return entry + directory + b"PK\5\6" + struct.pack("<4H2IH", 0, 0, 1, 1, len(directory), len(entry), 0)


def picture(side: int = 6, kind: str = "PNG", value: int = 0) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@functools.lru_cache
def png_bomb(side: int = 40_000) -> bytes:
    """A black square of 1.6 gigapixels in a few megabytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    row = squeeze.compress(bytes(side + 1)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    check = (side * (side + 1) % 65521) << 16 | 1  # Adler-32 of zeros
    rows = b"\x78\xda" + row * side + squeeze.flush() + struct.pack(">I", check)
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


class Evil:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def evil_pickles(owned: Path) -> dict[str, bytes]:
    """Pickles that would leave a trace at `owned` if any of their calls were made, and some that would never end."""
    touch = f"touch {owned}"
    calls = {
        "system": Evil(os.system, touch),
        "eval": Evil(eval, f"open({str(owned)!r}, 'w')"),
        "exec": Evil(exec, f"open({str(owned)!r}, 'w')"),
        "open": Evil(open, str(owned), "w"),
        "import": Evil(__import__, "antigravity"),
        "nested": {"state_dict": [Evil(os.system, touch)]},
    }
    found = {
        f"{name}.{protocol}": pickle.dumps(call, protocol) for name, call in calls.items() for protocol in (0, 2, 4)
    }
    found["deep"] = b"\x80\x02" + b"(" * 200_000 + b"l" * 200_000 + b"."
    found["doubling"] = b"\x80\x02]" + b"(h\x00h\x00l" * 3 + b"2" * 100 + b"."
    found["large bytes"] = b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"."
    found["large memo"] = b"\x80\x04Nr" + struct.pack("<I", 0x7FFFFFF0) + b"."
    found["large frame"] = b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N."
    return found


def nested_tuples(depth: int = 28) -> bytes:
    """The inside of a pickle: a tuple of itself twice, `depth` times; its hash and its text take 2^depth steps."""
    return b")" + b"2\x86" * depth


def hash_bombs() -> dict[str, bytes]:
    """Pickles that hash nested tuples, by each way a pickle has of filling a dict or a set."""
    deep = nested_tuples()
    return {
        "hash of a key": b"\x80\x02}" + deep + b"K\x01s.",
        "hash of keys": b"\x80\x02}(" + deep + b"K\x01u.",
        "hash in a dict": b"\x80\x02(" + deep + b"K\x01d.",
        "hash in a set": b"\x80\x04(" + deep + b"\x91.",
        "text of a type": b"\x80\x02cnumpy\ndtype\n" + nested_tuples(28) + b"\x85R.",
        "itself in a list": b"\x80\x02}U\x01a]q\x00h\x00as.",
    }


def npz_bombs(member: str, owned: Path, descr: str = "|u1") -> dict[str, bytes]:
    """Files of one array that is not what its header says."""
    name = f"{member}.npy"
    return {
        "shape.npz": zipped({name: npy_header("(1099511627776, 32, 32, 3)", descr)}),
        "huge shape.npz": zipped({name: npy_header("(9223372036854775807, 9223372036854775807)", descr)}),
        "negative.npz": zipped({name: npy_header("(-5, 4, 4, 3)", descr)}),
        "bomb.npz": zip_bomb(name, npy_header("(1048576, 32, 32, 3)", descr)),
        "objects.npz": zipped({name: npy(np.array([Evil(os.system, f"touch {owned}")], object))}),
        "header.npz": zipped({name: b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535}),
        "header 2.npz": zipped({name: b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b"1+" * 5000}),
        "name.npz": bad_name(zipped({name: npy(np.zeros(3))})),
    }


def bad_name(archive: bytes) -> bytes:
    """A zip file the name of whose first entry is no UTF-8."""
    data = bytearray(archive)
    at = data.rfind(b"PK\1\2")
    data[at + 9] |= 8
    data[at + 46] = 0xFF
    return bytes(data)


def lying_zip(name: str, start: bytes) -> bytes:
    """A bomb whose directory claims to have stored nearly as much as it unpacks to."""
    data = bytearray(zip_bomb(name, start))
    at = data.rfind(b"PK\1\2")
    data[at + 20 : at + 24] = struct.pack("<I", BOMB >> 2)
    return bytes(data)


def tar_header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A block of a tar file with a size as it is given."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124:148] = size + b"00000000000\0"
    block[156:157], block[257:265], block[148:156] = kind, b"ustar\x0000", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def negative_tar() -> bytes:
    """Its second entry leads back to itself."""
    empty = tar_header(b"a/0.png", b"00000000000\0")
    return empty + tar_header(b"a/1.png", b"\xff" * 10 + struct.pack(">h", -512)) + bytes(2048)


def long_name_tar(components: int = 100_000) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("b/" + "/".join("a" * components) + "/x.png")
        info.size = len(picture())
        archive.addfile(info, io.BytesIO(picture()))
    return stream.getvalue()


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 6 6
%%EndComments
(%stderr) (w) file (EXECUTED) writestring
showpage
%%EOF
"""


def deflated_storage(tensors: int = 16, size: int = 48 << 20) -> bytes:
    """A torch file of so many tensors of one storage of zeros, which is compressed."""

    def text(word: str) -> bytes:
        return b"X" + struct.pack("<I", len(word)) + word.encode()

    count = struct.pack("<i", size // 4)
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"J" + count + b"tQq\x020"
    tensor = b"h\x01(h\x02K\x00J" + count + b"\x85K\x01\x85tR"
    content = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x010" + storage
    content += b"}(" + b"".join(text(f"t{number}") + tensor for number in range(tensors)) + b"u."
    return zipped({"x/data.pkl": content, "x/version": b"3", "x/data/0": bytes(size)})
