"""Readers of images and of arrays of images."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import pickle
import struct
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hostile_files import (
    EPS,
    bad_name,
    evil_pickles,
    gzip_bomb,
    link,
    long_name_tar,
    lying_zip,
    negative_tar,
    npy,
    npy_header,
    npz,
    npz_bombs,
    picture,
    png_bomb,
    tarred,
    zip_bomb,
    zipped,
)
from reader import ROOT, Reader, in_folder

from diffdistill import sample_files
from diffdistill.data.contract import DataError
from diffdistill.data.pipeline import gather
from diffdistill.data.prepare import prepare
from diffdistill.data.sources import open_source
from diffdistill.data.unlabelled import open_unlabelled
from diffdistill.generator import SampleError


def pictures(members: Callable[[int], bytes] = lambda n: picture(value=n)) -> dict[str, bytes]:
    return {f"{name}/{n}.png": members(n) for name in ("cat", "dog") for n in range(2)}


def everything(source: Any) -> None:
    gather(source, range(min(len(source), 64)))


def cifar_seed() -> dict[str, bytes]:
    random_pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), np.uint8)
    batch = pickle.dumps({b"data": random_pixels, b"labels": [1, 2]}, 2)
    meta = pickle.dumps({b"label_names": [b"a", b"b", b"c"]}, 2)
    members = {f"cifar-10-batches-py/data_batch_{n}": batch for n in range(1, 6)}
    members |= {"cifar-10-batches-py/test_batch": batch, "cifar-10-batches-py/batches.meta": meta}
    return {"cifar.tar": tarred(members), "cifar.tar.gz": tarred(members, "w:gz")}


def prepared(path: Path) -> None:
    prepare(path, path.with_name("prepared"))


@functools.cache
def records_seed() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "pictures"
        for name, content in pictures().items():
            (folder / "train" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "train" / name).write_bytes(content)
        prepare(folder, Path(place) / "out")
        files = [path for path in sorted((Path(place) / "out").rglob("*")) if path.is_file()]
        return {path.relative_to(Path(place) / "out").as_posix(): path.read_bytes() for path in files}


def records_of(name: str) -> Reader:
    """Reads a prepared folder one of whose files is changed."""

    def read(path: Path) -> None:
        others = {other: content for other, content in records_seed().items() if other != name}
        in_folder(name, lambda folder: everything(open_source(source="array_record", path=folder)), lambda: others)(
            path
        )

    return Reader(lambda: {"file": records_seed()[name]}, read, (DataError,), lambda: bad_metadata(name))


def bad_metadata(name: str) -> dict[str, bytes]:
    if not name.endswith("metadata.json"):
        return {}
    facts = json.loads(records_seed()[name])
    changes: dict[str, Any] = {
        "count": {"count": 10**12, "records_per_shard": 1},
        "no shards": {"records_per_shard": 0},
        "shape": {"image_shape": [10**5, 10**5, 3]},
        "text as shape": {"image_shape": "abc"},
        "type": {"dtype": []},
    }
    return {
        "deep": b"[" * 100_000,
        **{label: json.dumps({**facts, **each}).encode() for label, each in changes.items()},
    }


@functools.cache
def tfds_seed() -> dict[str, bytes]:
    """The files of a data set as TFDS prepares it."""
    sys.path.insert(0, str(ROOT / "tests" / "data"))
    from test_tfds import Pets

    with tempfile.TemporaryDirectory() as place:
        builder = Pets(data_dir=place, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder.download_and_prepare()
        folder = Path(builder.data_dir)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tfds_of(name: str, hostile: dict[str, bytes]) -> Reader:
    """Reads a folder of TFDS one of whose files is changed."""
    others = {other: content for other, content in tfds_seed().items() if other != name}
    read = in_folder(
        f"pets/1.0.0/{name}",
        lambda folder: everything(open_source(source="tfds", path=folder / "pets" / "1.0.0")),
        lambda: {f"pets/1.0.0/{other}": content for other, content in others.items()},
    )
    return Reader(lambda: {"file": tfds_seed()[name]}, read, (DataError,), lambda: hostile)


def bad_features() -> dict[str, bytes]:
    """Features that name a module: TFDS would import it."""
    kind = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    return {
        "module": json.dumps({"type": "__hello__.Image", "content": {}}).encode(),
        "module inside": json.dumps(
            {"type": kind, "content": {"image": {"type": "this.Image", "content": {}}}}
        ).encode(),
        "old module": json.dumps({"pythonClassName": "__hello__.Image", "json": {"json": "{}"}}).encode(),
        "deep": b"[" * 100_000,
    }


def array_seed() -> dict[str, bytes]:
    return {"whole.npy": npy(np.arange(3)), "rows.npy": npy(np.eye(3))}


def bad_arrays() -> dict[str, bytes]:
    empty = [np.zeros((0, 0)), np.zeros((3, 0)), np.array(["a", "b"]), np.zeros(3, [("a", "i4")]), np.array([1 + 2j])]
    return {
        **{f"array {number}": npy(array) for number, array in enumerate(empty)},
        "shape": npy_header("(1099511627776,)", "<f4"),
        "negative": npy_header("(-1,)"),
        "header": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000,
        "signs": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9002) + b"-" * 9000 + b"1\n",
    }


def idx_file(dimensions: tuple[int, ...], content: bytes) -> bytes:
    return struct.pack(f">HBB{len(dimensions)}I", 0, 8, len(dimensions), *dimensions) + content


IDX_LABELS = {"train-labels-idx1-ubyte": idx_file((3,), bytes([0, 1, 2]))}


def member_of(members: Callable[[bytes], dict[str, bytes]]) -> Callable[[Path], None]:
    """Prepares the archive made of a file."""

    def reading(path: Path) -> None:
        archive = path.with_name("archive.tar")
        archive.write_bytes(tarred(dict(members(path.read_bytes()))))
        prepared(archive)

    return reading


def hostile_archives() -> dict[str, bytes]:
    outside = {"../../outside.png": picture(), "a/0.png": picture(), "a/1.png": picture()}
    good = {"a/0.png": picture(), "a/1.png": picture()}
    return {
        "outside.zip": zipped(outside),
        "absolute.zip": zipped({"/tmp/outside.png": picture(), **good}),
        "outside.tar": tarred(outside),
        "link.tar": tarred({**good, "a/2.png": link("a/2.png", "/etc/passwd")}),
        "hard link.tar": tarred({**good, "a/2.png": link("a/2.png", "../../../etc/passwd", tarfile.LNKTYPE)}),
        "device.tar": tarred({**good, "a/2.png": link("a/2.png", "", tarfile.CHRTYPE)}),
        "link to itself.tar": tarred({**good, "a/2.png": link("a/2.png", "2.png")}),
        "bomb.zip": zip_bomb("a/0.png", picture()),
        "bomb.tar.gz": gzip_bomb(tarred(good)[:1024]),
        "picture bomb.zip": zipped({"a/0.png": png_bomb(), "a/1.png": png_bomb()}),
        "lying.zip": lying_zip("a/0.png", picture()),
        "name.zip": bad_name(zipped(good)),
        "negative.tar": negative_tar(),
        "long name.tar.gz": long_name_tar(),
        "many.zip": zipped({f"a/{n}": b"" for n in range(20_000)}),
    }


def known(owned: Path) -> dict[str, Reader]:
    """All of them by name."""
    evil = evil_pickles(owned)
    arrays = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    return {
        "images npz": Reader(
            lambda: {"i.npz": npz(images=arrays), "i.npy": npy(arrays)},
            lambda path: everything(open_unlabelled(path)),
            (DataError,),
            lambda: npz_bombs("images", owned) | {"shape.npy": npy_header("(1099511627776, 32, 32, 3)")},
        ),
        "latents": Reader(
            lambda: {"l.npz": npz(latents=arrays.astype(np.float32), labels=np.arange(3))},
            lambda path: everything(open_source(source="latents", path=path)),
            (DataError,),
            lambda: npz_bombs("latents", owned, "<f4"),
        ),
        "idx": Reader(
            lambda: {"i": idx_file((3, 4, 4), bytes(range(48)))},
            in_folder(
                "train-images-idx3-ubyte",
                lambda folder: everything(open_source(source="idx", path=folder)),
                lambda: IDX_LABELS,
            ),
            (DataError,),
            lambda: {"count": idx_file((0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF), b"")},
        ),
        "idx gz": Reader(
            lambda: {"i.gz": gzip.compress(idx_file((3, 4, 4), bytes(range(48))))},
            in_folder(
                "train-images-idx3-ubyte.gz",
                lambda folder: everything(open_source(source="idx", path=folder)),
                lambda: IDX_LABELS,
            ),
            (DataError,),
            lambda: {
                "bomb.gz": gzip_bomb(idx_file((3, 4, 4), b"")),
                "large bomb.gz": gzip_bomb(idx_file((3 << 20, 32, 32), b"")),
            },
        ),
        "archives": Reader(
            lambda: {
                "p.zip": zipped(pictures()),
                "p.tar": tarred(dict(pictures())),
                "p.tar.gz": tarred(dict(pictures()), "w:gz"),
                "p.tar.bz2": tarred(dict(pictures()), "w:bz2"),
                "p.tar.xz": tarred(dict(pictures()), "w:xz"),
            },
            lambda path: everything(open_source(source="images", path=path)),
            (DataError,),
            hostile_archives,
        ),
        "cifar": Reader(
            cifar_seed,
            prepared,
            (DataError,),
            lambda: {
                f"{name}.tar": tarred({"cifar-10-batches-py/data_batch_1": content}) for name, content in evil.items()
            },
        ),
        "pictures": Reader(
            lambda: {kind: picture(6, kind) for kind in ("PNG", "JPEG", "BMP", "WEBP", "PPM")},
            in_folder(
                "cat/0.png",
                lambda folder: everything(open_source(source="images", path=folder)),
                lambda: {"dog/1.png": picture(), "cat/1.png": picture()},
            ),
            (DataError,),
            lambda: {"eps": EPS, "bomb": png_bomb(), "empty": b"", "header alone": picture()[:33]},
        ),
        **{f"records: {name}": records_of(name) for name in records_seed()},
        "tfds: features": tfds_of("features.json", bad_features()),
        "tfds: facts": tfds_of("dataset_info.json", {"deep": b"[" * 100_000}),
        "labels": Reader(array_seed, lambda path: sample_files._read_labels(str(path)), (SampleError,), bad_arrays),
        "latents of a sample": Reader(
            array_seed, lambda path: sample_files._read_array("latents", str(path)), (SampleError,), bad_arrays
        ),
        "cifar binary": Reader(
            lambda: {"batch": bytes([1]) + bytes(3072)},
            member_of(
                lambda content: {
                    **{f"c/data_batch_{n}.bin": content for n in range(1, 6)},
                    "c/test_batch.bin": content,
                    "c/batches.meta.txt": b"a\nb\n",
                }
            ),
            (DataError,),
        ),
        "cifar names": Reader(
            lambda: {"names": b"a\nb\n"},
            member_of(
                lambda content: {
                    **{f"c/data_batch_{n}.bin": bytes(3073) for n in range(1, 6)},
                    "c/test_batch.bin": bytes(3073),
                    "c/batches.meta.txt": content,
                }
            ),
            (DataError,),
            lambda: {"bytes": b"\xff\n"},
        ),
        "imagenet": Reader(
            lambda: {"val.npz": npz(data=np.zeros((2, 12), np.uint8), labels=np.array([1, 2]))},
            in_folder("val_data.npz", prepared),
            (DataError,),
            lambda: npz_bombs("data", owned),
        ),
    }
