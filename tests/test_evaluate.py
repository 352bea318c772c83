"""Evaluation of a run with the Inception network (random weights): what is measured, kept, resumed and refused."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent / "evaluation"))
import random_inception

from diffdistill import evaluate, evaluate_images, runner, workdir
from diffdistill.config import EvaluationConfig
from diffdistill.data.contract import DataError
from diffdistill.data.pipeline import in_memory
from diffdistill.evaluation import image_statistics, metrics, moments, reference, results, stream
from diffdistill.evaluation.reference import StatisticsError
from diffdistill.training.interrupt import Interrupt
from diffdistill.weights import WeightsError, fetch

pytestmark = pytest.mark.usefixtures("optimised")  # the Inception network

NAMES = ["fid", "sfid", "is", "kid", "precision", "recall"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> pathlib.Path:
    return random_inception.write(tmp_path_factory.mktemp("weights") / "random.pth")


@pytest.fixture(scope="module")
def settings(weights) -> EvaluationConfig:
    return EvaluationConfig(
        features="inception",
        num_samples=20,
        stages=("round_01_steps_0001",),
        guidance=(0.0, 1.0),
        inception_sha256=fetch.sha256(weights),
        reference_images=16,
        reservoir=12,
    )


@pytest.fixture(scope="module")
def folder(smoke_run, settings, tmp_path_factory) -> workdir.Workdir:
    path = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(smoke_run.path, path)
    opened = workdir.read(path)
    sampling = dataclasses.replace(opened.config.sampling, batch_size=8)
    return dataclasses.replace(
        opened, config=dataclasses.replace(opened.config, evaluation=settings, sampling=sampling)
    )


@pytest.fixture(scope="module")
def measured(folder, weights) -> tuple[list[results.Record], list[str]]:
    """The records of an evaluation, and what was said."""
    said: list[str] = []
    source = in_memory(runner.open_data(folder.config)[0])
    evaluate.evaluate(folder, source, Interrupt(), inception_weights=str(weights), say=said.append)
    return results.read(folder.path / evaluate.RESULTS), said


def test_records_hold_what_is_needed_to_repeat_them(measured, settings):
    records, said = measured
    assert [(record["w"], record["metric"]) for record in records] == [(w, name) for w in (0.0, 1.0) for name in NAMES]
    for record in records:
        assert record["stage"] == "round_01_steps_0001"
        assert (record["num_steps"], record["network_evaluations"]) == (1, 1)
        assert record["num_samples"] == 20
        assert record["weights_sha256"] == settings.inception_sha256
        assert record["protocol"].startswith("inception tf, weights ")
        assert record["protocol"].endswith(", 12 kept, clip, edm quantisation")
        assert (record["reference"], record["reference_count"]) == ("digits", 16)
        assert (record["method"], record["dataset"], record["guidance_range"]) == ("progressive", "digits", [0.0, 2.0])
        assert ("spread" in record) == (record["metric"] == "is")  # the subsets of KID are all there is: no spread
        assert record["git_revision"]
        assert {"jax", "diffdistill"} <= record["versions"].keys()
        assert record["command_line"]
    assert any("images/s: making them" in line and "feature network" in line for line in said)


def test_the_figure_is_that_of_the_samples_it_names(measured, folder, weights, settings):
    """All at once, without stream, files and padding."""
    from diffdistill.evaluation import inception
    from diffdistill.sample import load

    samples = load(folder.path, "round_01_steps_0001").sample(20, w=1.0)
    extractor = inception.load(weights, "tf", settings.inception_sha256)
    features = np.concatenate([np.asarray(extractor(samples.images[i : i + 4])["2048"]) for i in range(0, 20, 4)])
    (cached,) = (folder.path / "evaluation" / "cache").glob("*.npz")
    with np.load(cached) as file:
        expected = metrics.frechet_distance(
            features.mean(0, dtype=np.float64), moments.moments_of(features).covariance(), file["mu"], file["sigma"]
        )
    (found,) = [record["value"] for record in measured[0] if (record["metric"], record["w"]) == ("fid", 1.0)]
    assert found == pytest.approx(expected, rel=1e-4)  # float32 of the network, in batches of other sizes


def test_nothing_is_measured_twice_and_no_state_is_left(measured, folder, weights, monkeypatch):
    monkeypatch.setattr(stream, "accumulate", None)  # would fail
    source = in_memory(runner.open_data(folder.config)[0])
    evaluate.evaluate(folder, source, Interrupt(), inception_weights=str(weights))
    assert results.read(folder.path / evaluate.RESULTS) == measured[0]
    assert not list((folder.path / "evaluation").glob("**/.partial"))


def test_a_stopped_evaluation_continues_to_the_same_figures(measured, folder, weights, tmp_path, monkeypatch):
    """Stopped in the second of three chunks of images of the first measurement; the second one follows."""
    copied = dataclasses.replace(folder, path=tmp_path / "run")
    shutil.copytree(folder.path, copied.path)
    (copied.path / evaluate.RESULTS).unlink()
    interrupt, original, counted = Interrupt(), image_statistics.add, []

    def stopping(*arguments):
        counted.append(1)
        if len(counted) == 2:
            interrupt.request("SIGTERM")
        return original(*arguments)

    monkeypatch.setattr(image_statistics, "add", stopping)
    source = in_memory(runner.open_data(folder.config)[0])
    with pytest.raises(stream.EvaluationInterrupted, match="SIGTERM"):
        evaluate.evaluate(copied, source, interrupt, inception_weights=str(weights))
    assert list(copied.path.glob("evaluation/.partial/*/*/complete"))
    evaluate.evaluate(copied, source, Interrupt(), inception_weights=str(weights))
    assert len(counted) == 6  # three chunks a measurement: none was made again
    found = results.read(copied.path / evaluate.RESULTS)
    assert [record["value"] for record in found] == [record["value"] for record in measured[0]]


def test_the_report_shows_fid_and_its_explanation(measured, folder):
    from diffdistill.report import write_report

    text, page = write_report(folder, [])
    content = page.read_text()
    assert "FID (lower is better)" in text
    assert "Figures of the feature network" in text
    assert "FID against inception score over w" in content
    assert "in the features of the Inception network" in content


def test_images_made_elsewhere(weights, settings, tmp_path, smoke_run):
    config = dataclasses.replace(smoke_run.run.workdir.config, evaluation=settings)
    random = np.random.default_rng(0)
    np.savez(tmp_path / "theirs.npz", arr_0=random.integers(0, 256, (19, 12, 12, 3), dtype=np.uint8))
    np.save(tmp_path / "data.npy", random.integers(0, 200, (16, 12, 12, 3), dtype=np.uint8))
    said: list[str] = []

    def run(against: str) -> list[results.Record]:
        evaluate_images.evaluate(
            str(tmp_path / "theirs.npz"), against, config, str(weights), str(tmp_path / "out"), Interrupt(), said.append
        )
        return results.read(tmp_path / "out" / "results.jsonl")

    first = run(str(tmp_path / "data.npy"))
    assert [record["metric"] for record in first] == NAMES
    assert {record["num_samples"] for record in first} == {19}
    assert run(str(tmp_path / "data.npy")) == first  # read, not measured again
    # The same reference as a file of statistics gives the same figures.
    (cached,) = (tmp_path / "out" / "cache").glob("*.npz")
    again = run(str(cached))
    assert again == first
    # ADM's files hold statistics, and images beside them, of which the features are computed.
    with np.load(cached) as file:
        statistics = {name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(tmp_path / "adm.npz", **statistics, arr_0=np.load(tmp_path / "data.npy"))
    assert run(str(tmp_path / "adm.npz")) == first  # the same in every number, so nothing new to measure
    # A file of another protocol is refused with both names.
    made = reference.read(cached, protocol="tf")
    reference.write(tmp_path / "clean.npz", dataclasses.replace(made, provenance={"protocol": "clean"}))
    with pytest.raises(StatisticsError, match="protocol clean, but tf was asked for"):
        run(str(tmp_path / "clean.npz"))
    np.save(tmp_path / "one.npy", np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match=r"one\.npy"):
        evaluate_images.evaluate(
            str(tmp_path / "one.npy"), str(cached), config, str(weights), str(tmp_path / "out"), Interrupt()
        )
    # A file of mean and covariance alone gives fewer figures, and that is said.
    np.savez(tmp_path / "alone.npz", mu=statistics["mu"], sigma=statistics["sigma"])
    said.clear()
    config = dataclasses.replace(config, evaluation=dataclasses.replace(settings, reference_protocol="tf"))
    alone = [record for record in run(str(tmp_path / "alone.npz")) if record["reference"] == "alone.npz"]
    assert [record["metric"] for record in alone] == ["fid", "is"]
    assert [line for line in said if "left out" in line] == [
        "left out: sfid (the reference has no statistics of spatial features)",
        "left out: kid, precision, recall (the reference has no features of single images; --mode=statistics keeps "
        "some)",
    ]


def test_missing_weights_are_said_before_training(smoke_run, settings, tmp_path, monkeypatch):
    from diffdistill import judges

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DIFFDISTILL_INCEPTION_WEIGHTS", raising=False)
    config = dataclasses.replace(smoke_run.run.workdir.config, evaluation=settings)
    with pytest.raises(WeightsError, match="--mode=fetch-weights"):
        judges.check(config, "")
    judges.check(smoke_run.run.workdir.config, "")  # domain features need none
