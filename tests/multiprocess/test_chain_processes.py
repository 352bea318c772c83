"""Two processes of two devices train through main.py and stop; a single process goes on from their checkpoint."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from kill_chain import ROOT, parameters

pytestmark = pytest.mark.slow

UPDATES = 60
CHAIN = (
    *("--mode=train", "--config=configs/digits.py:smoke", f"--config.teacher.num_updates={UPDATES}"),
    *("--config.guided.num_updates=0", "--config.progressive.num_updates=0"),
    *("--config.training.log_every=1", "--config.training.save_every=10"),
    # One level without attention and no loop on the device: what compiles fast.
    *("--config.model.multipliers=(1,)", "--config.model.attention_resolutions=()"),
    "--config.training.updates_per_call=1",
)


def start(workdir: Path | str, devices: int, *more: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "main.py", *CHAIN, f"--workdir={workdir}", *more],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ours(output: str) -> str:
    """What is left of a process's output without the lines of Gloo, the transport of JAX.

    Its threads print at once and piece by piece, so that the pieces of two lines may stand in any order.
    """
    pieces = r"\[Gloo\] Rank |is connected to|peer ranks\.|Expected number of connected peer ranks is :|\b\d+\b"
    return re.sub(pieces, "", output).strip()


def losses(workdir: Path) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))  # written once, not once a process
    return [line["loss"] for line in lines]


def together() -> tuple[str, ...]:
    """The flags of two processes, but for the number of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return ("--distributed", f"--coordinator=127.0.0.1:{probe.getsockname()[1]}", "--num_processes=2")


@pytest.mark.parametrize(
    ("difference", "what"),
    [
        ("--config.seed={}", "the config"),
        ("--mode={}", "--mode or the address of --workdir"),
        ("--workdir={}", "--mode or the address of --workdir"),
        ("--seed={}", "--seed"),
    ],
)
def test_processes_that_were_started_differently_say_so(tmp_path, difference, what):
    values = {"--mode={}": ("train", "evaluate"), "--workdir={}": (tmp_path / "two", f"file://{tmp_path}/two")}
    flags = together()
    workers = [
        start(tmp_path / "two", 1, *flags, f"--process_id={index}", difference.format(value))
        for index, value in enumerate(values.get(difference, (0, 1)))
    ]
    for worker, (_, errors) in [(worker, worker.communicate(timeout=120)) for worker in workers]:
        assert worker.returncode == 1, errors
        assert ours(errors) == (
            f"Error: The processes of this run disagree on {what} (not as in process : ): start all of them with "
            "the same command and files."
        )
    assert not (tmp_path / "two").exists()


def test_hosts_that_share_no_disk_keep_a_run_at_an_address(tmp_path):
    """Two stages are trained and measured by processes with caches of their own, and whose sets differ in order."""
    flags = (
        *(*together(), "--mode=run", "--config.teacher.num_updates=10", "--config.guided.num_updates=10"),
        *(
            "--config.teacher.label_dropout=0.1",
            "--config.evaluation.guidance=(1.0,)",
            "--config.evaluation.num_steps=(1,)",
        ),
        "--config.evaluation.num_samples=20",
    )
    address = f"file://{tmp_path}/store/run"
    workers = [
        start(
            address,
            1,
            *flags,
            f"--process_id={index}",
            XDG_CACHE_HOME=str(tmp_path / f"{index}"),
            PYTHONHASHSEED=str(index),
        )
        for index in range(2)
    ]
    outputs = [worker.communicate(timeout=300) for worker in workers]
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors
    assert "guided student" in outputs[0][0]
    assert ours(outputs[1][0]) == ""
    assert not (tmp_path / "1" / "diffdistill" / "runs").exists()
    run = tmp_path / "store" / "run"
    records = [json.loads(line) for line in (run / "evaluation/results.jsonl").read_text().splitlines()]
    assert {record["stage"] for record in records} == {"teacher", "guided"}
    assert parameters(run).keys() == {"teacher", "guided"}


def committed(stage: Path, workers: list[subprocess.Popen[str]]) -> None:
    """Waits for the first checkpoint, as long as all processes live."""
    deadline = time.monotonic() + 200
    while (
        not any(stage.glob("[0-9]*/_CHECKPOINT_METADATA"))
        and time.monotonic() < deadline
        and all(worker.poll() is None for worker in workers)
    ):
        time.sleep(0.01)


def test_where_one_process_is_killed_the_other_says_so_within_a_minute(tmp_path):
    flags = (*together(), "--config.teacher.num_updates=100000")
    workers = [start(tmp_path / "two", 1, *flags, f"--process_id={index}") for index in range(2)]
    committed(tmp_path / "two" / "teacher", workers)
    workers[1].kill()
    begun = time.monotonic()
    _, errors = workers[0].communicate(timeout=200)
    assert time.monotonic() - begun < 60
    assert workers[0].returncode in (1, -signal.SIGABRT), errors
    if workers[0].returncode == 1:
        assert "Error: A computation that 2 processes share has failed" in errors, errors
        assert "another of them has probably ended" in errors, errors
        assert "intact; start the same command" in errors, errors
    else:  # JAX was faster
        assert "another task died" in errors, errors


def test_one_process_continues_what_two_began(tmp_path):
    flags = together()
    workers = [start(tmp_path / "two", 2, *flags, f"--process_id={index}") for index in range(2)]
    committed(tmp_path / "two" / "teacher", workers)
    workers[1].send_signal(signal.SIGTERM)
    outputs = [worker.communicate(timeout=200) for worker in workers]
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 143, errors
        assert "Start the same command again to continue." in errors
    assert "4 x cpu in 2 processes" in outputs[0][0]
    assert ours(outputs[0][0])
    assert ours(outputs[1][0]) == ""  # one process speaks
    stopped = max(int(path.name) for path in (tmp_path / "two" / "teacher").iterdir() if path.name.isdigit())
    assert 10 <= stopped < UPDATES

    alone = start(tmp_path / "two", 1)
    output, errors = alone.communicate(timeout=200)
    assert alone.returncode == 0, errors
    assert f"teacher: resumed at update {stopped} of {UPDATES}" in output
    whole = start(tmp_path / "one", 1)
    _, errors = whole.communicate(timeout=200)
    assert whole.returncode == 0, errors

    np.testing.assert_allclose(losses(tmp_path / "two")[:20], losses(tmp_path / "one")[:20], rtol=1e-4)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-2)
    found = parameters(tmp_path / "two")["teacher"]
    for name, value in parameters(tmp_path / "one")["teacher"].items():
        np.testing.assert_allclose(found[name], value, rtol=1e-2, atol=1e-2, err_msg=name)
