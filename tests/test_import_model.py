"""--mode=import: a published file becomes a run that is sampled and distilled like one trained here."""

import json
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent / "weights"))
import persistent_pickle
import test_edm_import
import torch_zip

import diffdistill
from diffdistill import workdir
from diffdistill.import_model import import_model
from diffdistill.weights import WeightsError

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def published(tmp_path, monkeypatch) -> pathlib.Path:
    """A pickle in the form of NVlabs/edm with EDM's preconditioning, unconditional, 8x8x3."""
    persistent_pickle.stand_ins(monkeypatch)
    facts = json.loads(str(test_edm_import.GOLDEN["ddpmpp-64px/facts"]))
    path = tmp_path / "edm-ffhq.pkl"
    path.write_bytes(pickle.dumps(test_edm_import.content_of(facts, test_edm_import.tensors_of(facts))))
    monkeypatch.undo()
    return path


def main(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "main.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_an_imported_teacher_is_sampled_as_the_reference_and_distilled(published, tmp_path):
    folder = tmp_path / "run"
    done = main("--mode=import", "--source=edm", str(published), f"--workdir={folder}")
    assert done.returncode == 0, done.stderr
    assert "output edm, 8x8x3, no classes" in done.stdout

    generator = diffdistill.load(folder)
    assert (generator.name, generator.sampler, generator.clip) == ("teacher", "heun", False)
    x, sigma = test_edm_import.GOLDEN["ddpmpp-64px/x"], np.array([0.1, 2.0])
    z = x / np.sqrt(1 + sigma**2)[:, None, None, None]
    from diffdistill.models.denoiser import Condition

    found = generator.denoiser(generator.params, z, -2 * np.log(sigma), Condition())
    np.testing.assert_allclose(found, test_edm_import.GOLDEN["ddpmpp-64px/denoised"], atol=1e-4)
    samples = generator.sample(3, num_steps=2)
    assert samples.network_evaluations == 3
    assert samples.images.shape == (3, 8, 8, 3)

    more = (f"--config=configs/workdir.py:{folder}", f"--workdir={folder}", "--config.data.source=digits")
    stages = (
        "--config.progressive.num_updates=2",
        "--config.progressive.start_steps=4",
        "--config.progressive.end_steps=2",
    )
    small = ("--config.progressive.batch_size=4", "--config.data.channels=3")
    trained = main("--mode=train", *more, *stages, *small)
    assert trained.returncode == 0, trained.stderr
    assert "teacher: finished before (1 updates)" in trained.stdout
    student = diffdistill.load(folder)
    assert (student.name, student.num_steps) == ("round_00_steps_0002", 2)
    # From here on the distillation is part of the run, and the data too.
    for change, message in (
        ("--config.progressive.batch_size=8", "progressive.batch_size: 4 -> 8"),
        ("--config.teacher.batch_size=8", "teacher.batch_size"),
    ):
        refused = main("--mode=train", *more, *stages, *small, change)
        assert refused.returncode == 1
        assert message in refused.stderr


def test_the_command_reproduces_the_reference_sampler(tmp_path, monkeypatch):
    """18 steps of the reference's own sampler with the reference's network: the bar is 1e-3 in units of [-1, 1]."""
    persistent_pickle.stand_ins(monkeypatch)
    facts = json.loads(str(test_edm_import.GOLDEN["ddpmpp-cond/facts"]))
    path = tmp_path / "edm-cond.pkl"
    path.write_bytes(pickle.dumps(test_edm_import.content_of(facts, test_edm_import.tensors_of(facts))))
    monkeypatch.undo()
    folder = tmp_path / "run"
    import_model("edm", str(path), str(folder), {}, say=lambda text: None)
    np.save(tmp_path / "latents.npy", test_edm_import.GOLDEN["ddpmpp-cond/x"])
    expected = test_edm_import.GOLDEN["ddpmpp-cond/sampled"]
    for name, labels in (("numbers", np.array([2, 0])), ("one_hot", np.eye(3)[[2, 0]])):
        np.save(tmp_path / f"{name}.npy", labels)
        done = main(
            *("--mode=sample", f"--workdir={folder}", "--steps=18", "--sampler=heun", "--quantisation=none"),
            *(f"--latents={tmp_path / 'latents.npy'}", f"--labels={tmp_path / name}.npy", f"--out={tmp_path / name}"),
        )
        assert done.returncode == 0, done.stderr
        assert "35 network evaluations each" in done.stdout
        with np.load(tmp_path / name / "samples.npz") as file:
            np.testing.assert_allclose(file["images"], expected, atol=1e-3)
            assert file["labels"].tolist() == [2, 0]
    np.save(tmp_path / "numbers.npy", np.array([[1, 1, 0], [0, 0, 1]]))
    refused = main("--mode=sample", f"--workdir={folder}", f"--labels={tmp_path / 'numbers.npy'}", "--num=2")
    assert refused.returncode == 2
    assert "one-hot rows" in refused.stderr


def test_only_images_of_the_models_shape_are_accepted(published, tmp_path):
    folder = tmp_path / "run"
    import_model("edm", str(published), str(folder), {}, say=lambda text: None)
    refused = main(
        *(
            "--mode=train",
            f"--config=configs/workdir.py:{folder}",
            f"--workdir={folder}",
            "--config.data.source=digits",
        ),
        *("--config.progressive.num_updates=2", "--config.progressive.start_steps=4"),
    )
    assert refused.returncode == 2
    assert "images (8, 8, 1)" in refused.stderr
    with pytest.raises(workdir.WorkdirError, match="holds a run already"):
        import_model("edm", str(published), str(folder), {})


def test_an_imported_model_is_measured_and_sampled_as_published_or_as_asked(published, tmp_path):
    folder = tmp_path / "run"
    import_model("edm", str(published), str(folder), {}, say=lambda text: None)
    opened = workdir.read(folder)
    assert not opened.has_data
    assert (opened.config.evaluation.num_steps, opened.config.evaluation.features) == ((18,), "inception")
    config = f"--config=configs/workdir.py:{folder}"
    small = ("--config.data.source=digits", "--config.data.channels=3", "--config.evaluation.num_samples=20")
    domain = ("--config.evaluation.features=domain", "--config.evaluation.num_steps=2")
    measured = main("--mode=evaluate", config, f"--workdir={folder}", *small, *domain)
    assert measured.returncode == 0, measured.stderr
    assert (folder / "evaluation" / "results.jsonl").read_text().count('"sampler": "heun"') > 0
    sampled = main(
        "--mode=sample", config, f"--workdir={folder}", "--num=2", "--steps=2", "--config.sampling.sampler=euler"
    )
    assert "2 network evaluations each" in sampled.stdout
    # Times may be chosen, and other images taken, until something is learnt here.
    for changes in (("--config.process.schedule=cosine",), ("--config.data.flip=True",)):
        trained = main("--mode=train", config, f"--workdir={folder}", *small, *changes)
        assert trained.returncode == 0, trained.stderr


def test_mistakes_are_one_message(published, tmp_path):
    folder = f"--workdir={tmp_path / 'run'}"
    other = torch_zip.write(tmp_path / "other.pt", {"weight": np.ones((2, 2))})
    for arguments, code, message in (
        (["--source=edm"], 2, "the path of one file"),
        ([str(published)], 2, "needs --source=edm"),
        (["--source=edm", str(published), "more"], 2, "the path of one file"),
        (["--source=edm2", str(published)], 1, "source 'edm2' is not known"),
        (["--source=edm", "absent.pkl"], 1, "absent.pkl cannot be read"),
        (["--source=guided-diffusion", str(other)], 1, "other.pt is refused"),
        (["--source=edm", str(other)], 1, "other.pt"),
    ):
        done = main("--mode=import", *arguments, folder)
        assert done.returncode == code, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_config_of_a_run_is_that_run(published, tmp_path):
    from configs import workdir as configs_workdir
    from diffdistill.config import resolve

    import_model("edm", str(published), str(tmp_path / "run"), {}, say=lambda text: None)
    found = resolve(configs_workdir.get_config(str(tmp_path / "run")))
    assert found == workdir.read(tmp_path / "run").config
    assert found.model.architecture == "ddpmpp"
    with pytest.raises(ValueError, match="needs the folder"):
        configs_workdir.get_config()


def test_a_file_that_does_not_fit_leaves_no_run(tmp_path):
    path = torch_zip.write(tmp_path / "x.pt", {"time_embed.0.weight": np.ones((4, 4))})
    with pytest.raises(WeightsError, match=r"x\.pt is refused"):
        import_model("guided-diffusion", str(path), str(tmp_path / "run"), {})
    assert not (tmp_path / "run").exists()
