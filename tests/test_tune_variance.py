"""--mode=tune-variance: every try is recorded, none is made twice, the best is named."""

import csv
import dataclasses
import shutil

import pytest

from diffdistill import evaluate, runner, tune_variance, workdir
from diffdistill.config import ConfigError
from diffdistill.data.pipeline import in_memory
from diffdistill.evaluation import results
from diffdistill.training.interrupt import Interrupt


@pytest.fixture(scope="module")
def folder(smoke_run, tmp_path_factory) -> workdir.Workdir:
    path = tmp_path_factory.mktemp("tuned") / "run"
    shutil.copytree(smoke_run.path, path)
    opened = workdir.read(path)
    evaluation = dataclasses.replace(opened.config.evaluation, num_samples=20, num_steps=(2, 3), guidance=(0.0,))
    return dataclasses.replace(opened, config=dataclasses.replace(opened.config, evaluation=evaluation))


def search(folder, *fractions):
    said: list[str] = []
    source = in_memory(runner.open_data(folder.config)[0])
    path = tune_variance.search(folder, source, fractions, Interrupt(), say=said.append)
    return path, said


def test_every_try_is_recorded_once_and_the_best_is_named(folder):
    before = results.read(folder.path / evaluate.RESULTS)
    path, said = search(folder, 0.0, 1.0)
    tried = [
        entry
        for entry in results.read(folder.path / tune_variance.TRIED)
        if (entry["sampler"], entry["metric"]) == ("ancestral", "frechet_to_data")
    ]
    found = {(entry["num_steps"], entry["sampler_settings"]["variance_fraction"]): entry["value"] for entry in tried}
    assert {steps for steps, _ in found} >= {2, 3}
    assert found[3, 0.0] != found[3, 1.0]
    with path.open() as file:
        rows = list(csv.DictReader(file))
    written = {(int(row["num_steps"]), float(row["variance_fraction"])): float(row["frechet_to_data"]) for row in rows}
    assert written == found
    line = next(line for line in said[-1].splitlines() if line.split()[:2] == ["0", "3"])
    best = min((0.0, 1.0), key=lambda fraction: found[3, fraction])
    assert line.split()[2 + int(best)].endswith("*")
    assert line.count("*") == 1
    search(folder, 0.0, 0.5)
    again = [entry for entry in results.read(folder.path / tune_variance.TRIED) if entry["sampler"] == "ancestral"]
    assert len(again) > len(tried)
    identities = [results.key(entry) for entry in again]
    assert len(identities) == len(set(identities))
    assert results.read(folder.path / evaluate.RESULTS) == before  # the report shows none of it


@pytest.mark.parametrize(
    ("fractions", "message"), [((), "give numbers from 0 to 1"), ((0.0, 1.5), "1.5; give numbers")]
)
def test_fractions_are_shares(folder, fractions, message):
    with pytest.raises(ConfigError, match=message):
        search(folder, *fractions)
