"""Two processes of two devices train and save together; one process goes on from there."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_training as toy

TRAINING = Path(__file__).parents[1] / "training"

UPDATES = 24


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(workdir: Path, count: int, devices: int, *options: str) -> list[subprocess.Popen[str]]:
    """The toy in `count` processes of so many devices each."""
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{TRAINING.parents[1]}:{os.environ.get('PYTHONPATH', '')}",
    }
    port = str(free_port())
    command = [sys.executable, str(TRAINING / "toy_training.py"), str(workdir), str(UPDATES), *options]
    return [
        subprocess.Popen(
            [*command, "--process", port, str(count), str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def lines(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_stop_together_and_one_resumes(tmp_path):
    """SIGTERM reaches process 1 alone; both stop after the same update, which a single process continues from."""
    workers = start(tmp_path / "two", 2, 2, "--signal_at", "1", "11")
    outputs = [worker.communicate(timeout=120) for worker in workers]
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 3, errors
    stopped = {int(output.split()[-1]) for output, _ in outputs}
    assert len(stopped) == 1
    update = stopped.pop()
    assert 0 < update < UPDATES
    assert (tmp_path / "two" / "toy" / str(update)).is_dir()

    one = toy.train(tmp_path / "one", UPDATES)
    resumed = toy.train(tmp_path / "two", UPDATES)
    for name, value in toy.leaves(one).items():
        np.testing.assert_allclose(toy.leaves(resumed)[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    ours, theirs = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["step"] for line in theirs] == list(range(1, UPDATES + 1))  # written once, not once a process
    np.testing.assert_allclose([line["loss"] for line in theirs], [line["loss"] for line in ours], rtol=1e-5)


@pytest.mark.parametrize(("count", "options"), [(2, ["--shard"]), (4, [])])
def test_any_number_of_processes_trains_alike(tmp_path, count, options):
    workers = start(tmp_path / "many", count, 1, *options)
    outputs = [worker.communicate(timeout=120) for worker in workers]
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors
    if options:
        assert "one device holds 124 of 244 bytes" in outputs[0][0]
    one = toy.train(tmp_path / "one", UPDATES)
    many = toy.train(tmp_path / "many", UPDATES)  # finished: reads what they saved
    for name, value in toy.leaves(one).items():
        np.testing.assert_allclose(toy.leaves(many)[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for ours, theirs in zip(lines(tmp_path / "one"), lines(tmp_path / "many"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)


@pytest.mark.parametrize("update", [0, 9])
def test_processes_whose_parameters_part_ways_save_nothing(tmp_path, update):
    """Before the first update, and at the save after the one where they do."""
    workers = start(tmp_path / "two", 2, 1, f"--diverge={update}")
    seen = 10 if update else 0
    for worker, (_, errors) in [(worker, worker.communicate(timeout=120)) for worker in workers]:
        assert worker.returncode != 0
        wanted = f"parameters of stage toy after update {seen} (not as in process 0: 1): they were not saved."
        assert wanted in errors
    assert not any(path.name.isdigit() for path in (tmp_path / "two" / "toy").iterdir())
