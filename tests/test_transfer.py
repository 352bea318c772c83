"""Encoder stages and --mode=transfer on a smoke run: what is trained, written, said and refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from diffdistill import chain, report, runner, sample, transfer, transfer_files, workdir
from diffdistill.config import EncoderConfig
from diffdistill.evaluation import images
from diffdistill.generator import SampleError
from diffdistill.training.interrupt import Interrupt


@pytest.fixture(scope="module")
def opened(smoke_run, tmp_path_factory) -> workdir.Workdir:
    """The smoke run with two rounds of the encoder after it."""
    path = tmp_path_factory.mktemp("transfer") / "run"
    shutil.copytree(smoke_run.path, path)
    config = dataclasses.replace(
        workdir.read(path).config,
        encoder=EncoderConfig(num_updates=2, batch_size=16, learning_rate=1e-3, start_steps=4),
    )
    run = runner.prepare(config, str(path))
    runner.train(run, Interrupt(), say=lambda text: None)
    return workdir.read(path)


def test_encoders_are_a_chain_beside_that_of_the_decoders(opened):
    stages = {stage.name: stage for stage in chain.plan(opened.config)}
    assert list(stages)[-2:] == ["encoder_00_steps_0002", "encoder_01_steps_0001"]
    assert stages["encoder_00_steps_0002"].teacher == "guided"
    assert stages["encoder_01_steps_0001"].teacher == "encoder_00_steps_0002"
    assert len(list(runner.finished(opened))) == len(stages)
    assert sample.load_from(opened).name.startswith("round_")  # what is sampled when nothing is said
    with pytest.raises(SampleError, match="leads from images to noise: use it with --mode=transfer"):
        sample.load_from(opened, "encoder_01_steps_0001").sample(1)


def test_encoding_does_not_depend_on_the_batch(opened):
    generator = sample.load_from(opened, "encoder_00_steps_0002")
    pictures = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(5, dtype=np.int32)
    whole = transfer.encode(generator, pictures, labels, num_steps=2)
    one = transfer.encode(generator, pictures[3:4], labels[3:4], num_steps=2)
    np.testing.assert_allclose(one, whole[3:4], atol=1e-4)
    assert whole.dtype == np.float32
    with pytest.raises(SampleError, match=r"made for uint8 \(8, 8, 1\)"):
        transfer.encode(generator, pictures[:, :4], labels, num_steps=2)


def write(opened, out, **changes) -> list[str]:
    said: list[str] = []
    settings = {
        "encoder": "encoder_00_steps_0002",
        "decoder": "round_00_steps_0002",
        "pictures": "",
        "source_class": "3",
        "target_class": "8",
        "w": 1.0,
        "extrapolate": False,
        "num": 6,
        "num_steps": None,
        "out": str(out),
    }
    transfer_files.to_files(opened, say=said.append, **{**settings, **changes})
    return said


def test_pictures_and_figures_of_both_pairs(opened, tmp_path):
    said = "\n".join(write(opened, tmp_path))
    for pair in ("distilled", "DDIM"):
        assert f"{pair}, 2 + 2 steps: noise RMSE" in said
        assert said.count("noise RMSE") == 2
    assert said.count("class accuracy") == said.count("correlation of slant") == 2
    assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")
    with np.load(tmp_path / "transfer.npz") as file:
        assert file["images"].shape == (6, 8, 8, 1)
        assert file["labels"].tolist() == [8] * 6


def test_transfers_of_a_run_are_in_its_report(opened):
    evaluation = dataclasses.replace(opened.config.evaluation, transfers=("3 to 8",), guidance=(0.0, 1.0, 4.5))
    folder = dataclasses.replace(opened, config=dataclasses.replace(opened.config, evaluation=evaluation))
    said: list[str] = []
    transfer_files.evaluate(folder, runner.open_data(folder.config)[0], Interrupt(), said.append)
    record = json.loads((folder.path / "evaluation/transfer/3_to_8.json").read_text())
    assert [(entry["pair"], entry["steps"]) for entry in record["entries"]] == [
        ("distilled", 2),
        ("DDIM", 2),
        ("distilled", 1),
        ("DDIM", 1),
    ]
    assert len(said) == 2
    for entry in record["entries"]:
        assert entry["noise_rmse"] > 0
        assert entry["reconstruction_rmse"] > 0
        assert [each["w"] for each in entry["by_w"]] == [0.0, 1.0]  # the students know no w of 4.5
        for each in entry["by_w"]:
            assert 0 <= each["class_accuracy"] <= 1
            assert all(-1 <= each[name] <= 1 for name in ("slant", "thickness"))
    transfer_files.evaluate(folder, runner.open_data(folder.config)[0], Interrupt(), said.append)
    assert len(said) == 2  # nothing was made again
    _, page = report.write_report(folder, [])
    text = page.read_text()
    assert "Style transfer 3 to 8" in text
    assert "Correlation of slant, w = 1" in text
    assert "is missing" not in text[text.index("Style transfer") : text.index("What each stage cost")]


def test_images_and_models_from_elsewhere(opened, smoke_run, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    images.save_npz(tmp_path / "theirs.npz", pictures)
    shutil.copytree(smoke_run.path, tmp_path / "other")  # which keeps a classifier of its images
    other = str(tmp_path / "other" / "round_01_steps_0001")
    said = "\n".join(write(opened, tmp_path, pictures=str(tmp_path / "theirs.npz"), decoder=other, num=0))
    assert "distilled, 2 + 1 steps" in said
    assert "4 images" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "encoder_07"}, "'encoder_07' of .* is not there or not finished"),
        ({"target_class": "cat"}, "'cat' is no class"),
        ({"source_class": "10"}, "class 10 is no class"),
        ({"w": 7.0}, "distilled for guidance weights"),
        ({"decoder": "encoder_00_steps_0002"}, "leads from images to noise"),
    ],
)
def test_what_does_not_fit_is_refused(opened, tmp_path, changes, message):
    with pytest.raises(SampleError, match=message):
        write(opened, tmp_path, **changes)
