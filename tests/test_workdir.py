"""The folder of a run: what it records, and which starts it refuses."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from configs import digits
from diffdistill import runner, workdir
from diffdistill.config import resolve
from diffdistill.training.errors import CheckpointError
from diffdistill.training.interrupt import Interrupt
from diffdistill.workdir import WorkdirError


def smoke(**groups):
    settings = digits.get_config("smoke")
    for group, values in groups.items():
        settings[group].update(values)
    return resolve(settings)


@pytest.fixture
def copied(smoke_run, tmp_path):
    """A copy of the finished run that a test may spoil."""
    return shutil.copytree(smoke_run.path, tmp_path / "run")


def test_a_run_says_what_it_was_started_with(smoke_run):
    record = json.loads((smoke_run.path / "config.json").read_text())
    assert record["config"]["name"] == "digits-smoke"
    assert record["data"]["image_shape"] == [8, 8, 1]
    assert len(record["starts"]) == 1
    assert {"jax", "python", "diffdistill"} <= record["starts"][0]["versions"].keys()
    assert record["starts"][0]["command_line"]
    assert workdir.read(smoke_run.path).config == smoke()
    assert workdir.read(smoke_run.path).facts == smoke_run.run.facts


def test_the_config_of_a_run_can_be_given_again(smoke_run):
    from configs import workdir as of_run

    again = of_run.get_config(str(smoke_run.path))
    assert resolve(again) == workdir.read(smoke_run.path).config
    with pytest.raises(ValueError, match="needs the folder of a run"):
        of_run.get_config()


def test_the_step_of_halving_is_traced_once_for_the_whole_chain(smoke_run):
    rounds = [stage for stage in smoke_run.run.stages if stage.method == "progressive"]
    assert len(rounds) == 2
    assert smoke_run.traces == 1


def test_a_finished_run_is_left_as_it_is(copied):
    before = {file: file.stat().st_mtime_ns for file in copied.glob("*/*/**/*") if file.is_file()}
    said = []
    runner.train(runner.prepare(smoke(), str(copied)), Interrupt(), say=said.append)
    assert said == [
        f"{name}: finished before (6 updates)"
        for name in ("teacher", "guided", "round_00_steps_0002", "round_01_steps_0001")
    ]
    assert {file: file.stat().st_mtime_ns for file in copied.glob("*/*/**/*") if file.is_file()} == before


def test_another_config_is_refused_and_named(copied):
    text = (copied / "config.json").read_text()
    with pytest.raises(WorkdirError, match=r"another config[^.]*\n  config\.teacher\.learning_rate: 0\.002 -> 0\.5\n"):
        runner.prepare(smoke(teacher={"learning_rate": 0.5}), str(copied))
    assert (copied / "config.json").read_text() == text


def test_what_does_not_change_the_training_may_change(copied):
    run = runner.prepare(smoke(evaluation={"num_samples": 7}, training={"log_every": 1}), str(copied))
    assert workdir.read(copied).config.evaluation.num_samples == run.config.evaluation.num_samples == 7


def test_other_images_are_refused(copied):
    opened = workdir.read(copied)
    with pytest.raises(WorkdirError, match="images themselves"):
        workdir.create(copied, opened.config, opened.facts, "another fingerprint")


def test_a_checkpoint_of_another_network_is_refused_and_named(copied, tmp_path):
    other = smoke(
        model={"channels": 16, "multipliers": (1,), "attention_resolutions": ()},
        teacher={"num_updates": 1},
        guided={"num_updates": 0},
        progressive={"num_updates": 0},
    )
    runner.train(runner.prepare(other, str(tmp_path / "other")), Interrupt(), say=lambda text: None)
    shutil.rmtree(copied / "teacher")
    shutil.rmtree(copied / "guided")
    shutil.copytree(tmp_path / "other" / "teacher", copied / "teacher")
    left = sorted(str(path) for path in copied.rglob("*"))
    run = runner.prepare(smoke(), str(copied))
    with pytest.raises(CheckpointError, match=r"teacher/1 belongs to another network.*tensor .* in this configuration"):
        runner.train(run, Interrupt(), say=lambda text: None)
    assert sorted(str(path) for path in copied.rglob("*") if "tensorboard" not in str(path)) == [
        path for path in left if "tensorboard" not in path
    ]


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(WorkdirError, match=r"cannot be written: .*--workdir=FOLDER"):
        runner.prepare(smoke(), str(tmp_path / place))


def test_two_programs_do_not_train_in_one_folder(tmp_path):
    run = runner.prepare(smoke(), str(tmp_path / "run"))
    code = (
        "import sys; from configs import digits; from diffdistill import config, runner; "
        "runner.prepare(config.resolve(digits.get_config('smoke')), sys.argv[1])"
    )
    command = [sys.executable, "-c", code, str(run.workdir.path)]
    with workdir.alone(run.workdir.path):
        runner.prepare(smoke(), str(tmp_path / "run"))  # this process may
        other = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert f"WorkdirError: Another program trains in {run.workdir.path} (process {os.getpid()} on " in other.stderr
    other = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert other.returncode == 0, other.stderr


def test_a_damaged_or_missing_record_is_refused(copied):
    (copied / "config.json").write_text("{")
    for attempt in (lambda: workdir.read(copied), lambda: runner.prepare(smoke(), str(copied))):
        with pytest.raises(WorkdirError, match=r"config\.json cannot be read"):
            attempt()
    (copied / "config.json").write_text("{}")
    with pytest.raises(WorkdirError, match="not written by this version"):
        workdir.read(copied)
    (copied / "config.json").unlink()
    with pytest.raises(WorkdirError, match="holds no run"):
        workdir.read(copied)
    with pytest.raises(WorkdirError, match=r"checkpoints but no config\.json"):
        runner.prepare(smoke(), str(copied))


def test_an_address_is_no_folder(smoke_run):
    with pytest.raises(WorkdirError, match=r"gs://bucket/run is an address.*use the one of diffdistill.store.kept"):
        workdir.create("gs://bucket/run", smoke_run.run.config, smoke_run.run.facts, None)


def test_a_run_whose_only_checkpoint_is_damaged_keeps_its_record(tmp_path, smoke_run):
    """It is refused by its stage; until then it counts as begun."""
    (tmp_path / "teacher" / "3").mkdir(parents=True)  # without Orbax's mark
    with pytest.raises(WorkdirError, match=r"checkpoints but no config\.json"):
        workdir.create(tmp_path, smoke_run.run.config, smoke_run.run.facts, None)
