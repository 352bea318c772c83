"""The chain on eight simulated devices and on one: the same losses, the same parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kill_chain import ROOT, parameters

pytestmark = pytest.mark.slow

CHAIN = (
    *("--mode=train", "--config=configs/digits.py:smoke"),
    *("--config.teacher.num_updates=10", "--config.guided.num_updates=0", "--config.progressive.num_updates=10"),
    *("--config.progressive.end_steps=2", "--config.training.log_every=1", "--config.training.save_every=10"),
    # One level without attention and no loop on the device: what compiles fast.
    *("--config.model.multipliers=(1,)", "--config.model.attention_resolutions=()"),
    "--config.training.updates_per_call=1",
)


def train(workdir: Path, devices: int) -> dict[str, list[float]]:
    """Trains teacher and one round of halving on so many devices; returns the losses of each stage."""
    done = subprocess.run(
        [sys.executable, "main.py", *CHAIN, f"--workdir={workdir}"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"digits-smoke: {devices} x cpu |" in done.stdout
    losses: dict[str, list[float]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        losses.setdefault(entry["stage"], []).append(entry["loss"])
    return losses


def test_eight_devices_train_the_chain_that_one_trains(tmp_path):
    one, eight = train(tmp_path / "one", 1), train(tmp_path / "eight", 8)
    assert one.keys() == eight.keys() == {"teacher", "round_00_steps_0002"}
    for stage, losses in one.items():
        assert len(losses) == 10
        np.testing.assert_allclose(eight[stage], losses, rtol=1e-4, err_msg=stage)
    expected, found = parameters(tmp_path / "one"), parameters(tmp_path / "eight")
    for stage, tensors in expected.items():
        for name, value in tensors.items():
            # Ten updates move a parameter by up to 2e-2; Adam turns the rounding of a gradient near zero into steps.
            np.testing.assert_allclose(found[stage][name], value, rtol=1e-3, atol=1e-3, err_msg=stage + name)
