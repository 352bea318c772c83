"""Readers of networks and of statistics."""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from hostile_files import Evil, bad_name, deflated_storage, evil_pickles, hash_bombs, npz, npz_bombs, zip_bomb, zipped
from reader import WEIGHTS, Reader

from diffdistill.data import pickles
from diffdistill.data.contract import DataError
from diffdistill.evaluation import inception, lpips, reference
from diffdistill.models.unet import UNet
from diffdistill.weights import WeightsError, torch_file
from diffdistill.weights.sources import import_weights


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
    golden = np.load(WEIGHTS / "golden_guided_diffusion.npz")
    shapes = json.loads(str(golden["shapes"]))
    return {"64x64.pt": torch_bytes({name: np.zeros(shape) for name, shape in shapes.items()})}


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


def torch_zips() -> dict[str, bytes]:
    return {
        **{f"{name}.pt": zipped({"x/data.pkl": content, "x/version": b"3"}) for name, content in hash_bombs().items()},
        "deflated storage": deflated_storage(),
        "byte order": zip_bomb("x/byteorder"),
        "name": bad_name(zipped({"x/data.pkl": b"\x80\x02}."})),
    }


def deep_provenance() -> dict[str, bytes]:
    texts = ("[" * 100_000, "5", '{"protocol": ["tf"]}', '{"protocol": "tf", "weights_sha256": 5}')
    arrays = {"mu": np.zeros(2), "sigma": np.eye(2)}
    return {f"provenance {n}": npz(**arrays, provenance=np.array(text)) for n, text in enumerate(texts)}


def lpips_seed() -> dict[str, bytes]:
    return {"alex": torch_bytes(lpips_tensors())}


def lpips_tensors() -> dict[str, np.ndarray]:
    shapes = json.loads(str(np.load(WEIGHTS.parent / "evaluation" / "golden_lpips.npz")["alex_shapes"]))
    return {name: np.full(shape, 0.01, np.float32) for name, shape in shapes.items()}


def bad_lpips() -> dict[str, bytes]:
    names = lpips_tensors()
    shapes = {"flat": (0,), "empty": (0, 3, 3, 3), "scalar": ()}
    return {label: torch_bytes({name: np.zeros(shape) for name in names}) for label, shape in shapes.items()}


def torch_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    sys.path.insert(0, str(WEIGHTS))
    import torch_zip

    with tempfile.TemporaryDirectory() as folder:
        return torch_zip.write(Path(folder) / "x.pth", tensors).read_bytes()


def lpips_distance(path: Path) -> None:
    pictures = np.zeros((1, 32, 32, 3), np.float32)
    lpips.load(path)(pictures, pictures)


def known(owned: Path) -> dict[str, Reader]:
    """All of them by name."""
    evil = evil_pickles(owned)
    torch_seeds = {name: (WEIGHTS / name).read_bytes() for name in ("torch_zip.pth", "torch_legacy.pth")}
    evil_zips = {
        f"{name}.pt": zipped({"x/data.pkl": content, "x/version": b"3"}, zipfile.ZIP_STORED)
        for name, content in evil.items()
    }
    gaussian = {"mu": np.zeros(3), "sigma": np.eye(3)}
    return {
        "torch": Reader(
            lambda: torch_seeds, torch_file.read_state_dict, (WeightsError,), lambda: evil_zips | evil | torch_zips()
        ),
        "edm": Reader(edm_seed, lambda path: import_weights("edm", path), (WeightsError,), lambda: evil | hash_bombs()),
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
            lambda: evil | hash_bombs(),
        ),
        "statistics": Reader(
            lambda: {"s.npz": npz(**gaussian)},
            statistics,
            (reference.StatisticsError,),
            lambda: npz_bombs("mu", owned, "<f8") | hash_bombs() | deep_provenance(),
        ),
        "kind of a reference": Reader(
            lambda: {"s.npz": npz(**gaussian), "images.npz": npz(arr_0=np.zeros((2, 4, 4, 3), np.uint8))},
            lambda path: (reference.is_statistics(path), reference.holds_images(path)),
            (),
            lambda: npz_bombs("mu", owned),
        ),
        "lpips": Reader(lpips_seed, lpips_distance, (WeightsError, ValueError), lambda: evil_zips | bad_lpips()),
        "inception": Reader(
            lambda: torch_seeds,
            lambda path: inception.variables_from_state_dict(torch_file.read_state_dict(path)),
            (WeightsError,),
            lambda: evil_zips,
            complete=False,  # the whole network has 95 MB
        ),
    }
