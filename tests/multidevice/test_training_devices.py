"""Eight simulated devices and one do the same training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import toy_training as toy

from diffdistill.training.interrupt import ACKNOWLEDGEMENT

TRAINING = Path(__file__).parents[1] / "training"

UPDATES = 12


def run(workdir: Path, devices: int, *options: str) -> subprocess.CompletedProcess[str]:
    """The toy in a process with so many simulated devices."""
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{TRAINING.parents[1]}:{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, str(TRAINING / "toy_training.py"), str(workdir), str(UPDATES), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def losses(workdir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_eight_devices_equal_one_and_hand_over(tmp_path):
    """Same losses and parameters to float tolerance; what eight saved, another number resumes."""
    interrupted = run(tmp_path / "eight", 8, "--signal_at", "0", "9")
    assert interrupted.returncode == 3, interrupted.stderr
    assert interrupted.stderr.strip() == ACKNOWLEDGEMENT
    one = toy.train(tmp_path / "one", UPDATES)
    done = int(interrupted.stdout.split()[-1])
    assert 0 < done < UPDATES
    assert len(losses(tmp_path / "eight")) == done
    np.testing.assert_allclose(losses(tmp_path / "eight"), losses(tmp_path / "one")[:done], rtol=1e-5)
    assert toy.compile_once(3).mesh.size == jax.device_count() < 8
    resumed = toy.train(tmp_path / "eight", UPDATES)
    np.testing.assert_allclose(losses(tmp_path / "eight"), losses(tmp_path / "one"), rtol=1e-5)
    for name, value in toy.leaves(one).items():
        np.testing.assert_allclose(toy.leaves(resumed)[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_state_that_is_spread_over_devices_is_updated_alike(tmp_path):
    """Four devices hold a quarter of the moments and the average each; one device goes on from what they saved."""
    interrupted = run(tmp_path / "four", 4, "--shard", "--signal_at", "0", "6")
    assert interrupted.returncode == 3, interrupted.stderr
    continued = run(tmp_path / "four", 4, "--shard")
    assert continued.returncode == 0, continued.stderr
    # Moments and average: three times a kernel (4, 4) and a bias (4,); and a count of steps, which all hold.
    assert "one device holds 64 of 244 bytes" in continued.stdout
    one = toy.train(tmp_path / "one", UPDATES)
    np.testing.assert_allclose(losses(tmp_path / "four"), losses(tmp_path / "one"), rtol=1e-5)
    resumed = toy.train(tmp_path / "four", UPDATES)  # finished: as it was saved, whole
    for name, value in toy.leaves(one).items():
        np.testing.assert_allclose(toy.leaves(resumed)[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
