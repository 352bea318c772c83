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
