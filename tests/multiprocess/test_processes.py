"""Two processes tell each other what only one of them has."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def test_what_one_process_has_reaches_the_others():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("exchange.py")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(script.parents[2])}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(port), str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors
    assert "the disk is full" in outputs[0][0]
    assert "another process of this run failed: see its message" in outputs[1][0]
