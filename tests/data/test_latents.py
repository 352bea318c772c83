"""Latents from files: read, prepared, scaled, refused; and a chain on them from end to end."""

import dataclasses
import io
import zipfile

import numpy as np
import pytest

import diffdistill
from configs import digits
from diffdistill import chain, runner, sample, sample_files
from diffdistill.config import ConfigError, resolve
from diffdistill.data.contract import DataError
from diffdistill.data.latents import open_latents, scaled
from diffdistill.data.pipeline import Batches, gather, in_memory
from diffdistill.data.prepare import prepare
from diffdistill.data.sources import open_source
from diffdistill.generator import SampleError
from diffdistill.training.interrupt import Interrupt

SHAPE = (8, 8, 4)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("latents") / "encoded.npz"
    latents = (5.0 * random.standard_normal((32, *SHAPE)) + 1.0).astype(np.float16)
    np.savez(path, latents=latents, labels=np.arange(32) % 3, class_names=np.array(["a", "b", "c"]))
    return path


def test_latents_are_read_as_they_are_stored(file):
    source = open_source(source="latents", path=file)
    assert (source.image_shape, source.class_names, len(source), source.dtype) == (
        SHAPE,
        ("a", "b", "c"),
        32,
        "float32",
    )
    with np.load(file) as stored:
        np.testing.assert_array_equal(gather(source, [3, 5])["image"], stored["latents"][[3, 5]].astype(np.float32))
    assert source.num_bytes == 32 * 8 * 8 * 4 * 4


def test_prepared_latents_are_the_same(file, tmp_path):
    prepared = prepare(file, tmp_path / "records")["train"]
    source = open_latents(file, "train", None, None)
    assert prepared.dtype == np.float32
    everything = np.arange(32)
    for one, other in ((prepared, source), (in_memory(prepared), source)):
        np.testing.assert_array_equal(gather(one, everything)["image"], gather(other, everything)["image"])
        np.testing.assert_array_equal(gather(one, everything)["label"], gather(other, everything)["label"])
    np.testing.assert_array_equal(prepared[7]["image"], source[7]["image"])


@pytest.mark.parametrize("kind", ["npz", "records"])
def test_the_network_sees_them_shifted_and_scaled(file, tmp_path, kind):
    source = open_latents(file, "train", None, None)
    if kind == "records":
        source = prepare(file, tmp_path / "records")["train"]
    seen = scaled(source, (1.0, 2.0, 3.0, 4.0), 0.2)
    expected = (source[9]["image"] - np.float32([1, 2, 3, 4])) * np.float32(0.2)
    np.testing.assert_array_equal(seen[9]["image"], expected)
    np.testing.assert_array_equal(gather(seen, [9])["image"][0], expected)
    np.testing.assert_array_equal(
        Batches(seen, 32, 0)(0)["image"].sum(), Batches(in_memory(seen), 32, 0)(0)["image"].sum()
    )
    with pytest.raises(DataError, match="2 entries; give none, one or one for each of the 4"):
        scaled(source, (1.0, 2.0), 0.2)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 8, 8, 4), np.float32)}, "no .npz file with an array named 'latents'"),
        ({"latents": np.zeros((2, 8, 8), np.float32)}, r"must be \(N, H, W, C\)"),
        ({"latents": np.zeros((2, 8, 8, 4), np.int32)}, "float16 or float32, found .* int32"),
        ({"latents": np.stack([np.zeros(SHAPE), np.full(SHAPE, np.nan)]).astype(np.float32)}, "latent 1 is not finite"),
        ({"latents": np.zeros((2, *SHAPE), np.float32), "labels": np.array([0.5, 1.0])}, "whole numbers"),
        ({"latents": np.zeros((2, *SHAPE), np.float32), "labels": np.array([0])}, "one label per image"),
        ({"latents": np.array([{}], object)}, "damaged .*Object arrays cannot be loaded"),
        (
            {"latents": np.zeros((2, *SHAPE), np.float32), "class_names": np.array("a")},
            "must be a list of at most 100000 names",
        ),
        ({"latents": np.zeros((2, *SHAPE), np.float32), "labels": np.array([0, 10**9])}, "as many classes"),
    ],
)
def test_what_is_no_latent_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_latents(tmp_path / "file.npz", "train", None, None)


def test_latents_are_not_resized(file, tmp_path):
    with pytest.raises(DataError, match="cannot be resized"):
        open_source(source="latents", path=file, image_size=4)
    prepare(file, tmp_path / "records")
    with pytest.raises(DataError, match="cannot be resized"):
        open_source(source="array_record", path=tmp_path / "records", image_size=4)


def settings(file):
    config = digits.get_config("smoke")
    config.data.source, config.data.path = "latents", str(file)
    config.data.latent_shift, config.data.latent_scale = (1.0,), 0.2
    config.sampling.clip, config.sampling.quantisation = False, "none"
    config.evaluation.num_samples = 0
    config.progressive.num_updates = (
        0  # one program less to compile; halving reads its batches as the guided stage does
    )
    return config


@pytest.mark.parametrize(
    ("group", "field", "value", "message"),
    [
        ("sampling", "clip", True, "--config.sampling.clip=False"),
        ("sampling", "quantisation", "edm", "quantisation=none"),
        ("data", "flip", True, "flip=False.*--mode=evaluate --images"),
    ],
)
def test_what_suits_images_alone_is_refused(file, group, field, value, message):
    config = settings(file)
    config[group][field] = value
    with pytest.raises(ConfigError, match=message):
        runner.open_data(resolve(config))


def test_images_have_no_latent_scale():
    config = digits.get_config("smoke")
    config.data.latent_scale = 0.5
    with pytest.raises(ConfigError, match="for latents, but the data are images"):
        runner.open_data(resolve(config))


def test_a_latent_teacher_is_distilled_by_the_same_stages(file, tmp_path):
    config = resolve(settings(file))
    run = runner.prepare(config, str(tmp_path / "run"))
    runner.train(run, Interrupt(), say=lambda text: None)
    assert [stage.name for stage in chain.plan(config)][-1] == "guided"
    generator = diffdistill.load(tmp_path / "run")
    made = generator.sample(4, w=1.0, num_steps=1)
    assert made.images.dtype == np.float32
    assert made.images.shape == (4, *SHAPE)
    seen = dataclasses.replace(generator, latent_scaling=None).sample(4, w=1.0, num_steps=1)
    np.testing.assert_allclose(made.images, seen.images / 0.2 + 1.0, rtol=1e-6)
    said: list[str] = []
    options = {"seed": 0, "labels": [], "latents": "", "w": 1.0, "extrapolate": False, "num_steps": 1, "sampler": None}
    folder, stage = sample.locate(tmp_path / "run")
    sample_files.to_files(folder, stage, out=str(tmp_path / "out"), num=4, quantisation="", say=said.append, **options)
    assert said[0].startswith("4 latents from")
    assert not (tmp_path / "out" / "samples.png").exists()
    with np.load(tmp_path / "out" / "samples.npz") as written:
        np.testing.assert_array_equal(written["images"], made.images)
    with pytest.raises(SampleError, match="is for images, but stage guided makes latents"):
        sample_files.to_files(
            folder, stage, out=str(tmp_path / "out"), num=4, quantisation="edm", say=said.append, **options
        )
    # As another config says, which knows nothing of latents: they are neither clipped nor made into bytes.
    other = sample.load_from(folder.measured_as(resolve(digits.get_config("smoke"))))
    np.testing.assert_array_equal(other.sample(4, w=1.0, num_steps=1).images, made.images)
    again = runner.prepare(config, str(tmp_path / "run"))
    runner.train(again, Interrupt(), say=said.append)
    assert "finished before" in said[-1]


def test_hostile_files_are_refused_at_once(tmp_path):
    def refused(message: str, shape: tuple[int, ...] = (2, 4, 4, 3), **raw: bytes) -> None:
        file = tmp_path / "x.npz"
        np.savez(file, latents=np.zeros(shape, np.float32))
        with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
            for name, content in raw.items():
                archive.writestr(f"{name}.npy", content)
        with pytest.raises(DataError, match=message):
            open_latents(file, "train", None, None)

    def header(descr, shape) -> bytes:
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
        return stream.getvalue()

    for descr in ([], "<U0"):
        refused("class_names must be a list of at most 100000 names", class_names=header(descr, (10**12,)))
    refused("images without pixels", shape=(2, 0, 4, 3))
    refused("asks for more memory than there is", labels=header("<i8", (10**14,)))
