"""Archives made to fill the memory, to run for ever or to break a reader are refused at once, with one DataError."""

import bz2
import gzip
import io
import struct
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffdistill.data import DataError, Source, gather, open_source
from diffdistill.data.containers import open_container
from diffdistill.data.latents import holds_latents
from diffdistill.data.prepare import prepare
from diffdistill.data.unlabelled import open_unlabelled


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    return file.getvalue()


def everything(source: Source) -> None:
    gather(source, range(len(source)))


def refused(path: Path, message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        everything(open_source(source="images", path=path))
    assert path.name in str(caught.value)
    assert time.monotonic() - begin < 5


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A block of a tar file, whatever it says of its size."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:136] = b"0000644\0" + b"0000000\0" * 2 + size
    block[136:148] = b"00000000000\0"
    block[148:157] = b" " * 8 + kind
    block[257:265] = b"ustar\00000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def tar(properties: dict[str, str], name: str = "a/0.png", mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode, format=tarfile.PAX_FORMAT) as archive:  # pyright: ignore
        member = tarfile.TarInfo(name)
        member.pax_headers, member.size = properties, len(png())
        archive.addfile(member, io.BytesIO(png()))
    return stream.getvalue()


EMPTY, HUGE = b"00000000000\0", b"\x80" + (1 << 40).to_bytes(11, "big")
BACK = b"\xff" * 10 + struct.pack(">h", -512)
DIGITS = b"9" * 300_000
TARS = {
    "to itself": (header(b"a/0.png", EMPTY) + header(b"a/1.png", BACK), "says that -512 bytes follow"),
    "back by properties": (tar({"size": "-1024"}), "truncated, damaged|leads back"),
    "long name": (header(b"x", HUGE, b"L"), "says that 1099511627776 bytes follow"),
    "long properties": (header(b"x", HUGE, b"x"), "says that 1099511627776 bytes follow"),
    "properties of all": (header(b"x", b"00000100000\0", b"g") + bytes(1 << 15), "says that 32768 bytes follow"),
    "digits": (header(b"x", b"%011o\0" % len(DIGITS), b"x") + DIGITS, "damaged properties"),
    "holes": (tar({"GNU.sparse.map": "x"}), "truncated, damaged"),
    "many holes": (tar({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}), "holds a file with holes"),
    "deep name": (tar({}, "/".join("a" * 100_000) + "/x.png"), "in 100000 folders"),
    "long folder": (tar({}, "a" * 5000 + "/x.png"), "of 5006 characters"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", TARS)
def test_tar_files(tmp_path, kind, packed):
    content, message = TARS[kind]
    content += bytes(-len(content) % 512 + 2048)
    file = tmp_path / ("x.tar.gz" if packed else "x.tar")
    file.write_bytes(gzip.compress(content) if packed else content)
    refused(file, message)


def test_what_is_unpacked_is_not_unpacked_again(tmp_path):
    file = tmp_path / "x.tar.gz"
    file.write_bytes(gzip.compress(gzip.compress(tar({}))))
    refused(file, "truncated, damaged or of another kind")


def test_a_bomb_is_not_written_to_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("diffdistill.data.containers.check_expansion", limited)
    file = tmp_path / "x.tar.gz"
    file.write_bytes(gzip.compress(tar({}) + bytes(4 << 20)))
    with pytest.raises(DataError, match=r"x\.tar\.gz would unpack"):
        prepare(file, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def limited(title: str, stored: int, size: int) -> None:
    if size > 1 << 20:
        raise DataError(f"{title} would unpack {stored} bytes")


def test_an_ordinary_tar_of_every_kind_is_read(tmp_path):
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        file = tmp_path / f"{kind}.tar"
        with tarfile.open(file, "w", format=kind, pax_headers={"comment": "c0ffee" * 8}) as archive:
            for name in ("a/" + "x" * 90 + ".png", "b" * 80 + "/" + "y" * 90 + ".png"):
                member = tarfile.TarInfo(name)
                member.size = len(png())
                archive.addfile(member, io.BytesIO(png()))
        assert len(open_source(source="images", path=file)) == 2


def zipped(names=("a/0.png", "a/1.png"), method: int = zipfile.ZIP_DEFLATED) -> bytearray:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name in names:
            archive.writestr(name, png())
    return bytearray(stream.getvalue())


def patched(place: int, value: int, after: bytes = b"PK\1\2", flags: int = 0) -> bytes:
    """A zip file with one byte changed behind the signature of its first entry."""
    content = zipped()
    begin = content.find(after)
    content[begin + place] = value
    content[begin + (8 if after == b"PK\1\2" else 6) + 1] |= flags
    return bytes(content)


ZIPS = {
    "version": patched(6, 200),
    "name in the directory": patched(46, 0xFF, flags=8),
    "name of a file": patched(30, 0xFF, b"PK\3\4", 8),
    "password": patched(8, 1),
    "method": bytes(zipped(method=zipfile.ZIP_BZIP2)),
    "deep name": bytes(zipped(["/".join("a" * 30_000) + "/x.png"])),
}


@pytest.mark.parametrize("kind", ZIPS)
def test_zip_files(tmp_path, kind):
    file = tmp_path / "x.zip"
    file.write_bytes(ZIPS[kind])
    refused(file, "truncated, damaged or of another kind|compressed by method 12|in 30000 folders")
    with pytest.raises(DataError, match=r"x\.zip"):
        everything(open_unlabelled(file))
    with pytest.raises(DataError, match=r"x\.zip"):
        prepare(file, tmp_path / "out")
    holds_latents(file)


def lying(name: str, content: bytes, size: int) -> bytes:
    """A zip file whose directory claims that one stored file of `size` bytes lies in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, content)
    whole = stream.getvalue()
    begin, end = whole.rfind(b"PK\1\2"), whole.rfind(b"PK\5\6")
    entry, tail = bytearray(whole[begin:end]), bytearray(whole[end:])
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    entry[20:28], entry[30:32] = b"\xff" * 8, struct.pack("<H", len(extra))
    tail[12:16] = struct.pack("<I", len(entry) + len(extra))
    return bytes(whole[:begin] + entry + extra + tail)


def test_a_directory_that_claims_more_than_there_is_room_for(tmp_path):
    file = tmp_path / "x.zip"
    file.write_bytes(lying("a/0.png", png(), 1 << 40))
    refused(file, r"would unpack \d+ bytes to 1099511627776")
    shape = (2, 10**5, 10**6, 3)
    array = tmp_path / "x.npz"
    for name in ("images", "latents"):
        head = np_header("|u1", shape)
        array.write_bytes(lying(f"{name}.npy", head, len(head) + 6 * 10**11))
        with pytest.raises(DataError, match="would unpack"):
            open_source(source="latents", path=array) if name == "latents" else open_unlabelled(array)


def np_header(descr: str, shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_a_file_that_is_larger_than_it_says_is_not_unpacked_whole(tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.png", bytes(64 << 20))
    content = bytearray(stream.getvalue())
    for signature, place in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        begin = content.find(signature) + place
        content[begin : begin + 4] = struct.pack("<I", 100)
    file = tmp_path / "x.zip"
    file.write_bytes(content)
    tracemalloc.start()
    refused(file, "truncated, damaged")
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_many_folders_within_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("diffdistill.data.containers._FOLDERS_LIMIT", 1000)
    file = tmp_path / "x.zip"
    file.write_bytes(zipped([f"{n}/" + "/".join("a" * 30) + "/x.png" for n in range(3)]))
    with pytest.raises(DataError, match="more folders within folders"):
        open_container(file)


def test_bz2_of_nothing(tmp_path):
    file = tmp_path / "x.tar.bz2"
    file.write_bytes(bz2.compress(b""))
    refused(file, "truncated, damaged or of another kind")
