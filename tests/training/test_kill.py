"""A run that is killed again and again ends with the same bits as one that is not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import toy_training as toy

from diffdistill.training.interrupt import ACKNOWLEDGEMENT

HERE = Path(__file__).parent

UPDATES, SAVE_EVERY = 90, 9


def start(workdir: Path) -> subprocess.Popen:
    """The toy run in a process of its own, slow enough to be hit (10 ms a batch)."""
    command = [sys.executable, str(HERE / "toy_training.py"), str(workdir), str(UPDATES), "--pause", "0.01"]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(
        [*command, "--save_every", str(SAVE_EVERY)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.skipif(jax.device_count() > 1, reason="the reference run must see the devices of the workers")
def test_kill_9_and_sigterm(tmp_path):
    expected = toy.train(tmp_path / "whole", UPDATES, save_every=SAVE_EVERY)
    stage = tmp_path / "cut" / "toy"
    logs = b""

    def newest() -> int:
        return max((int(path.name) for path in stage.glob("*") if path.name.isdigit()), default=0)

    # At a random moment, not before something was saved.
    process = start(tmp_path / "cut")
    wait_for(lambda: newest() > 0, process)
    time.sleep(random.uniform(0, 0.2))
    process.kill()
    logs += process.communicate(timeout=60)[0]
    reached = newest()
    assert 0 < reached < UPDATES

    # During a save: the temporary directory exists.
    process = start(tmp_path / "cut")
    wait_for(lambda: newest() > reached, process)
    wait_for(lambda: any(stage.glob("*.orbax-checkpoint-tmp*")), process)
    process.kill()
    logs += process.communicate(timeout=60)[0]
    assert reached < newest() < UPDATES
    reached = newest()

    # SIGTERM: saves where it is and leaves with the code for that.
    process = start(tmp_path / "cut")
    wait_for(lambda: newest() > reached, process)
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 3
    assert f"interrupted after {newest()}" in output.decode()
    assert reached < newest() < UPDATES
    logs += output

    # Left alone.
    process = start(tmp_path / "cut")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    logs += output
    assert newest() == UPDATES
    assert not list(stage.glob("*tmp*"))
    assert toy.same_bits(toy.train(tmp_path / "cut", UPDATES), expected)
    text = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert len(text) == UPDATES
    # Nothing but what the script itself says and that the signal was heard: no warnings, no tracebacks.
    said = [line for line in logs.decode().splitlines() if line and not line.startswith(("ready", "interrupted"))]
    assert said == [ACKNOWLEDGEMENT]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
