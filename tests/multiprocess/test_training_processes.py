"""Two processes of two devices train and save together; one process goes on from there."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import toy_training as toy

TRAINING = Path(__file__).parents[1] / "training"

UPDATES = 24


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_stop_together_and_one_resumes(tmp_path):
    """SIGTERM reaches process 1 alone; both stop after the same update, which a single process continues from."""
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{TRAINING.parents[1]}:{os.environ.get('PYTHONPATH', '')}",
    }
    port = free_port()
    workers = [
        subprocess.Popen(
            [
                *(sys.executable, str(TRAINING / "toy_training.py"), str(tmp_path / "two"), str(UPDATES)),
                *("--process", str(port), "2", str(index), "--signal_at", "1", "11"),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
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
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [line["step"] for line in lines[1]] == list(range(1, UPDATES + 1))  # written once, not once a process
    np.testing.assert_allclose([line["loss"] for line in lines[1]], [line["loss"] for line in lines[0]], rtol=1e-5)
