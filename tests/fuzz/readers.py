"""Every reader of files from outside: valid files for it, hostile ones, and what it may raise."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hostile_files import (
    Evil,
    evil_pickles,
    gzip_bomb,
    link,
    npy,
    npy_header,
    npz,
    picture,
    png_bomb,
    tarred,
    zip_bomb,
    zipped,
)

from diffdistill import config as configs
from diffdistill import workdir
from diffdistill.config import ConfigError
from diffdistill.data import pickles
from diffdistill.data.contract import DataError
from diffdistill.data.pipeline import gather
from diffdistill.data.prepare import prepare
from diffdistill.data.sources import open_source
from diffdistill.data.unlabelled import open_unlabelled
from diffdistill.evaluation import reference, results
from diffdistill.models.unet import UNet
from diffdistill.weights import WeightsError, torch_file
from diffdistill.weights.sources import import_weights
from diffdistill.workdir import WorkdirError

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "tests" / "weights"


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader of files from outside.

    seeds: () -> valid files by name, each read alone. hostile: () -> files made by hand, by name.
    read: reads a file at a path. errors: what it may raise.
    """

    seeds: Callable[[], dict[str, bytes]]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    hostile: Callable[[], dict[str, bytes]] = dict


def pictures(members: Callable[[int], bytes] = lambda n: picture(value=n)) -> dict[str, bytes]:
    return {f"{name}/{n}.png": members(n) for name in ("cat", "dog") for n in range(2)}


def everything(source: Any) -> None:
    gather(source, range(min(len(source), 64)))


def in_folder(name: str, read: Callable[[Path], Any], others: Callable[[], dict[str, bytes]] = dict) -> Any:
    """Reads the folder in which the file has that name, beside others."""

    def reading(path: Path) -> None:
        folder = path.with_name("folder")
        target = folder / name
        target.parent.mkdir(parents=True)
        shutil.copy(path, target)
        for other, content in others().items():
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            (folder / other).write_bytes(content)
        read(folder)

    return reading


def edm_seed() -> dict[str, bytes]:
    """The networks of the tests, as pickles."""
    sys.path.insert(0, str(WEIGHTS))
    import persistent_pickle
    import pytest
    import test_edm_import as edm

    with pytest.MonkeyPatch.context() as patch:
        persistent_pickle.stand_ins(patch)
        facts = json.loads(str(edm.GOLDEN[f"{edm.VARIANTS[0]}/facts"]))
        return {"edm.pkl": pickle.dumps(edm.content_of(facts, edm.tensors_of(facts)))}


def guided_diffusion_seed() -> dict[str, bytes]:
    sys.path.insert(0, str(WEIGHTS))
    import torch_zip

    golden = np.load(WEIGHTS / "golden_guided_diffusion.npz")
    shapes = json.loads(str(golden["shapes"]))
    with tempfile.TemporaryDirectory() as folder:
        file = torch_zip.write(Path(folder) / "x.pt", {name: np.zeros(shape) for name, shape in shapes.items()})
        return {"64x64.pt": file.read_bytes()}


def msgpack_seed() -> dict[str, bytes]:
    sys.path.insert(0, str(WEIGHTS))
    import test_other_imports

    network = UNet(
        channels=16, embedding=24, output_channels=3, blocks_per_level=1, **test_other_imports.HEADS["one head"]
    )
    tree = test_other_imports.released(network, 16)[1]
    with tempfile.TemporaryDirectory() as folder:
        return {"state": test_other_imports.write_state(Path(folder) / "state", tree).read_bytes()}


def statistics(path: Path) -> None:
    reference.read(path, protocol="tf", stated_protocol="tf")


def nested_pickle(path: Path) -> None:
    with path.open("rb") as file:
        pickles.load(file, str(path))


def cifar_seed() -> dict[str, bytes]:
    random_pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), np.uint8)
    batch = pickle.dumps({b"data": random_pixels, b"labels": [1, 2]}, 2)
    meta = pickle.dumps({b"label_names": [b"a", b"b", b"c"]}, 2)
    members = {f"cifar-10-batches-py/data_batch_{n}": batch for n in range(1, 6)}
    members |= {"cifar-10-batches-py/test_batch": batch, "cifar-10-batches-py/batches.meta": meta}
    return {"cifar.tar": tarred(members), "cifar.tar.gz": tarred(members, "w:gz")}


def prepared(path: Path) -> None:
    prepare(path, path.with_name("prepared"))


def records_seed() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "pictures"
        for name, content in pictures().items():
            (folder / "train" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "train" / name).write_bytes(content)
        prepare(folder, Path(place) / "out")
        files = [path for path in sorted((Path(place) / "out").rglob("*")) if path.is_file()]
        return {path.relative_to(Path(place) / "out").as_posix(): path.read_bytes() for path in files}


RECORDS: dict[str, bytes] = {}


def records_of(name: str) -> Reader:
    """Reads a prepared folder one of whose files is changed."""

    def read(path: Path) -> None:
        others = {other: content for other, content in RECORDS.items() if other != name}
        in_folder(name, lambda folder: everything(open_source(source="array_record", path=folder)), lambda: others)(
            path
        )

    return Reader(lambda: {"file": RECORDS[name]}, read, (DataError,))


def idx_file(dimensions: tuple[int, ...], content: bytes) -> bytes:
    return struct.pack(f">HBB{len(dimensions)}I", 0, 8, len(dimensions), *dimensions) + content


IDX_LABELS = {"train-labels-idx1-ubyte": idx_file((3,), bytes([0, 1, 2]))}


def run_seed() -> dict[str, bytes]:
    from configs import digits
    from diffdistill.chain import DataFacts

    with tempfile.TemporaryDirectory() as folder:
        config = configs.resolve(digits.get_config("smoke"))
        workdir.create(folder, config, DataFacts((8, 8, 1), 10), "f" * 64)
        return {"config.json": (Path(folder) / "config.json").read_bytes()}


OVERRIDES = (
    b"--config.teacher.batch_size=32",
    b"--config.model.multipliers=(1, 2, 2)",
    b"--config.data.split=train",
    b"--config.evaluation.guidance=(0.0, 1.0)",
    b"--config.teacher.learning_rate=1e-3",
    b"--config.name=x",
    b"--noconfig.data.flip",
    b"--config=configs/guided.py:cifar10-smoke",
)


def overrides(path: Path) -> None:
    """Parses a command line as main.py does, and resolves the config."""
    from absl import flags
    from ml_collections import config_flags

    from diffdistill import command_flags

    text = path.read_bytes().decode("utf-8", "surrogateescape").replace("\0", " ")
    command = ["main.py", "--config=configs/digits.py:smoke", *text.split("\n")]
    values, argv = flags.FlagValues(), sys.argv
    kinds = ("bool", "enum", "float", "integer", "list", "string")
    kept = {f"DEFINE_{kind}": getattr(flags, f"DEFINE_{kind}") for kind in kinds}
    define_file, known = config_flags.DEFINE_config_file, command_flags.FLAGS
    sys.modules.pop("config_config", None)
    try:
        sys.argv, command_flags.FLAGS = command, values
        for name, define in kept.items():
            setattr(flags, name, lambda *a, define=define, **k: define(*a, **{"flag_values": values, **k}))
        config_flags.DEFINE_config_file = lambda *a, **k: define_file(*a, **{"flag_values": values, **k})
        with contextlib.redirect_stderr(io.StringIO()):
            command_flags.parse(command)
        configs.resolve(values.config)
    except SystemExit as stop:
        if stop.code != 2:
            raise RuntimeError(f"exit code {stop.code}") from stop
        raise ConfigError("refused") from stop
    finally:
        sys.argv, command_flags.FLAGS = argv, known
        config_flags.DEFINE_config_file = define_file
        for name, define in kept.items():
            setattr(flags, name, define)


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
        "many.zip": zipped({f"a/{n}": b"" for n in range(20_000)}),
    }


def known(owned: Path) -> dict[str, Reader]:
    """All of them by name. owned: the file whose existence would show that code was executed."""
    evil = evil_pickles(owned)
    torch_seeds = {name: (WEIGHTS / name).read_bytes() for name in ("torch_zip.pth", "torch_legacy.pth")}
    evil_zips = {
        f"{name}.pt": zipped({"x/data.pkl": content, "x/version": b"3"}, zipfile.ZIP_STORED)
        for name, content in evil.items()
    }
    arrays = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    gaussian = {"mu": np.zeros(3), "sigma": np.eye(3)}
    npz_bombs = lambda member, descr="|u1": {  # noqa: E731
        "shape.npz": zipped({f"{member}.npy": npy_header("(1099511627776, 32, 32, 3)", descr)}),
        "huge shape.npz": zipped({f"{member}.npy": npy_header("(9223372036854775807, 9223372036854775807)", descr)}),
        "negative.npz": zipped({f"{member}.npy": npy_header("(-5, 4, 4, 3)", descr)}),
        "bomb.npz": zip_bomb(f"{member}.npy", npy_header("(1048576, 32, 32, 3)", descr)),
        "objects.npz": zipped({f"{member}.npy": npy(np.array([Evil(os.system, f"touch {owned}")], object))}),
        "header.npz": zipped({f"{member}.npy": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535}),
        "header 2.npz": zipped({f"{member}.npy": b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b"1+" * 5000}),
    }
    return {
        "torch": Reader(lambda: torch_seeds, torch_file.read_state_dict, (WeightsError,), lambda: evil_zips | evil),
        "edm": Reader(edm_seed, lambda path: import_weights("edm", path), (WeightsError,), lambda: evil),
        "guided-diffusion": Reader(
            guided_diffusion_seed,
            lambda path: import_weights("guided-diffusion", path),
            (WeightsError,),
            lambda: evil_zips | {"bomb.pt": zip_bomb("x/data.pkl")},
        ),
        "msgpack": Reader(
            msgpack_seed,
            lambda path: import_weights("progressive", path),
            (WeightsError,),
            lambda: {
                "deep": b"\x91" * 100_000,
                "large array": b"\xdd\xff\xff\xff\xff",
                "large map": b"\xdf\xff\xff\xff\xff",
                "large bytes": b"\xc6\xff\xff\xff\xff",
                "large extension": b"\xc9\xff\xff\xff\xff\x01",
                "array of a pickle": b"\xc7\x10\x01" + pickle.dumps(Evil(os.system, f"touch {owned}"), 2),
            },
        ),
        "nested pickle": Reader(
            lambda: {"nested.pkl": pickle.dumps({"params": {"a": {"kernel": np.ones((2, 2), np.float32)}}})},
            nested_pickle,
            (DataError,),
            lambda: evil,
        ),
        "statistics": Reader(
            lambda: {"s.npz": npz(**gaussian)}, statistics, (reference.StatisticsError,), lambda: npz_bombs("mu", "<f8")
        ),
        "images npz": Reader(
            lambda: {"i.npz": npz(images=arrays), "i.npy": npy(arrays)},
            lambda path: everything(open_unlabelled(path)),
            (DataError,),
            lambda: npz_bombs("images") | {"shape.npy": npy_header("(1099511627776, 32, 32, 3)")},
        ),
        "latents": Reader(
            lambda: {"l.npz": npz(latents=arrays.astype(np.float32), labels=np.arange(3))},
            lambda path: everything(open_source(source="latents", path=path)),
            (DataError,),
            lambda: npz_bombs("latents", "<f4"),
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
            lambda: {"bomb": png_bomb(), "empty": b"", "header alone": picture()[:33]},
        ),
        **{f"records: {name}": records_of(name) for name in RECORDS},
        "run": Reader(run_seed, in_folder("config.json", workdir.read), (WorkdirError,)),
        "results": Reader(
            lambda: {"r": b'{"stage": "teacher", "num_steps": 4}\n{"stage": "x"}\n'},
            results.read,
            (results.ResultsError,),
        ),
        "overrides": Reader(
            lambda: {str(n): text for n, text in enumerate(OVERRIDES)},
            overrides,
            (ConfigError,),
            lambda: {
                "code": f"--config.model.multipliers=__import__('os').system('touch {owned}')".encode(),
                "power": b"--config.model.multipliers=9**9**9",
                "repeated": b"--config.name='x'*10**10",
                "deep": b"--config.model.multipliers=" + b"(" * 5000,
                "large": b"--config.teacher.num_updates=" + b"9" * 5000,
            },
        ),
    }
