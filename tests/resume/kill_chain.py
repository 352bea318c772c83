"""Kills a smoke chain again and again, resumes it each time, and compares it with one that was left alone.

    python tests/resume/kill_chain.py /tmp/kills --kills=10
    python tests/resume/kill_chain.py /tmp/stops --kills=3 --signal=TERM
    python tests/resume/kill_chain.py /tmp/walks --chain=disback

Every other kill waits for the moment in which a checkpoint is being written.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240.0
CHAINS = {
    "digits": ("configs/digits.py:smoke", ("teacher", "guided", "progressive")),
    "disback": ("configs/disback.py:digits-smoke", ("teacher", "disback")),  # and the four updates of its path
}


def start(
    workdir: Path | str,
    updates: int,
    chain: str,
    *,
    program: str = "main.py",
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """One of CHAINS in a process of its own: `updates` updates a stage, a checkpoint every fourth."""
    config, stages = CHAINS[chain]
    command = [sys.executable, program, "--mode=train", f"--config={config}", f"--workdir={workdir}"]
    command += [f"--config.{stage}.num_updates={updates}" for stage in stages]
    command += ["--config.training.save_every=4", "--config.training.keep=2"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONFAULTHANDLER": "1", **(environment or {})},  # SIGABRT shows where it hangs
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def committed(workdir: Path) -> dict[str, list[int]]:
    """The numbers of the complete checkpoints by stage, in ascending order."""
    found: dict[str, list[int]] = {}
    for path in workdir.glob("*/*"):
        if path.name.isdigit() and (path / "_CHECKPOINT_METADATA").exists():
            found.setdefault(path.parent.name, []).append(int(path.name))
    return {stage: sorted(steps) for stage, steps in found.items()}


def saved(workdir: Path) -> int:
    """Updates in complete checkpoints, all stages together."""
    return sum(steps[-1] for steps in committed(workdir).values())


def saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(workdir.glob("*/*.orbax-checkpoint-tmp*"))


def wait(process: subprocess.Popen[str], condition: Callable[[], bool]) -> bool:
    """Waits for a condition; False where the process ended first."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            process.send_signal(signal.SIGABRT)
            raise AssertionError(f"the chain does not get on: {process.communicate()[1]}")
        time.sleep(0.001)
    return True


def end(process: subprocess.Popen[str]) -> str:
    """Waits for the end of a process; what it wrote to its standard error. AssertionError where it hangs."""
    try:
        return process.communicate(timeout=PATIENCE)[1]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        raise AssertionError(f"the chain does not end: {process.communicate()[1]}") from None


def cut(
    workdir: Path,
    signals: Sequence[signal.Signals],
    updates: int,
    total: int,
    chance: random.Random,
    chain: str = "digits",
) -> list[str]:
    """Runs the chain, stopped by one signal after the other at random moments, until its `total` updates are done.

    Returns a line for each signal. Raises AssertionError for an exit code or an output that is not as documented.
    """
    lines = []
    for index, number in enumerate(signals):
        before = saved(workdir)
        # Spread over the chain; at least past what was there before, so that every start gets on.
        target = max(before + 1, round(total * (index + chance.uniform(0.1, 0.9)) / (len(signals) + 1)))
        process = start(workdir, updates, chain)
        alive = wait(process, lambda: saved(workdir) >= target)  # noqa: B023
        if index % 2:
            alive = alive and wait(process, lambda: saving(workdir))
        else:
            time.sleep(chance.uniform(0.0, 0.3))
        during = saving(workdir)
        process.send_signal(number)
        errors = end(process)
        lines.append(
            f"{number.name} at {saved(workdir)} of {total} saved updates (start at {before})"
            f"{', during a save' if during else ''}: exit code {process.returncode}"
        )
        assert "Traceback" not in errors, errors
        if process.returncode == 0:
            continue  # it was over before the signal came
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL, errors
        else:
            assert process.returncode == 143, errors
            assert "Start the same command again to continue" in errors, errors
    process = start(workdir, updates, chain)
    errors = end(process)
    assert process.returncode == 0, errors
    assert saved(workdir) == total
    assert not saving(workdir)
    return lines


def whole(workdir: Path, updates: int, chain: str = "digits") -> int:
    """Runs the chain without any trouble; returns its updates, all stages together."""
    process = start(workdir, updates, chain)
    errors = end(process)
    assert process.returncode == 0, errors
    return saved(workdir)


def parameters(workdir: Path) -> dict[str, dict[str, Any]]:
    """Every tensor of the parameters and of their average, where there is one, by stage."""
    import jax

    from diffdistill import chain
    from diffdistill import workdir as workdirs
    from diffdistill.training.checkpoints import StageCheckpoints

    folder = workdirs.read(workdir)
    found = {}
    for stage in chain.plan(folder.config):
        denoiser = chain.denoiser_of(folder.config, stage, folder.facts)
        like = jax.eval_shape(denoiser.init, jax.random.key(0))
        checkpoints = StageCheckpoints(folder.stage(stage.name), read_only=True)
        trees = {"params": checkpoints.restore_params(like, ema=False), "ema": checkpoints.restore_params(like)}
        leaves = jax.tree_util.tree_leaves_with_path(trees)
        found[stage.name] = {jax.tree_util.keystr(path): jax.device_get(leaf) for path, leaf in leaves}
    return found


def differing(one: Path, other: Path) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    a, b = parameters(one), parameters(other)
    assert a.keys() == b.keys()
    return [
        f"{stage}{name}"
        for stage in a
        for name in a[stage]
        if a[stage].keys() != b[stage].keys() or a[stage][name].tobytes() != b[stage][name].tobytes()
    ]


def main() -> None:
    """The command line at the top of this file."""
    parser = argparse.ArgumentParser(description="Kill and resume a smoke chain.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--chain", choices=list(CHAINS), default="digits")
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--seed", type=int, default=None)
    given = parser.parse_args()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(given.folder / "cache"))
    sys.path.insert(0, str(ROOT))
    seed = random.randrange(10**6) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    total = whole(given.folder / "whole", given.updates, given.chain)
    signals = [signal.Signals[f"SIG{given.signal}"]] * given.kills
    for line in cut(given.folder / "cut", signals, given.updates, total, random.Random(seed), given.chain):
        print(line, flush=True)
    different = differing(given.folder / "whole", given.folder / "cut")
    tensors = sum(len(stage) for stage in parameters(given.folder / "whole").values())
    print(f"{tensors} tensors of all stages compared, {len(different)} differ in a bit")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
