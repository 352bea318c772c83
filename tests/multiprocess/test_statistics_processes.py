"""Two processes of two devices compute reference statistics together: the same ones as a single process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kill_chain import ROOT

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
import random_inception

from diffdistill.weights import fetch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]  # the Inception network


def start(out: Path, weights: Path, devices: int, *more: str) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "main.py", "--mode=statistics", "--config=configs/digits.py:smoke", f"--out={out}"),
        *(f"--inception_weights={weights}", f"--config.evaluation.inception_sha256={fetch.sha256(weights)}"),
        *("--config.evaluation.reference_images=37", "--config.evaluation.reservoir=20"),
    ]
    return subprocess.Popen(
        [*command, *more],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_and_one_give_the_same_statistics(tmp_path):
    weights = random_inception.write(tmp_path / "random.pth")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = ("--distributed", f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    two = tmp_path / "two.npz"
    workers = [start(two, weights, 2, *together, f"--process_id={index}") for index in range(2)]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
    alone = start(tmp_path / "one.npz", weights, 1)
    _, errors = alone.communicate(timeout=300)
    assert alone.returncode == 0, errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "random.pth", "two.npz"]
    with np.load(two) as found, np.load(tmp_path / "one.npz") as expected:
        assert set(found) == set(expected)
        for name in ("mu", "sigma", "mu_s", "sigma_s", "features"):
            scale = np.abs(expected[name]).max()
            np.testing.assert_allclose(found[name], expected[name], atol=1e-5 * scale, err_msg=name)
