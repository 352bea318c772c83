"""Every test runs on the CPU, with one compilation cache for the whole session and its subprocesses.

Programs are compiled quickly, not well: they are tiny, and compiling them takes longer than running them.
JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests what users run, in about one and a half times the time.
"""

import dataclasses
import fcntl
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="diffdistill-jax-cache-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

warnings.filterwarnings("ignore", category=DeprecationWarning, module="orbax|flax|tensorflow_datasets")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: with two processes neither then waits for the other's last file."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
    """XLA's usual optimisations, for networks so large that running them takes longer than compiling them."""
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")  # of programs that tests start
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", before)


@dataclasses.dataclass(frozen=True)
class SmokeRun:
    """A finished run of configs/digits.py:smoke.

    Attributes:
      path: its workdir; copy it before changing anything.
      run: what runner.prepare returned.
      traces: how often the halving step's target was traced.
    """

    path: Path
    run: Any
    traces: int


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> Iterator[SmokeRun]:
    """The whole smoke chain, trained once for all tests that look at a finished run: who writes in it, copies it."""
    from configs import digits
    from diffdistill import runner
    from diffdistill.config import resolve

    config = resolve(digits.get_config("smoke"))
    base = tmp_path_factory.getbasetemp()
    trained = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke"
    trained.mkdir(exist_ok=True)
    with (trained / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of pytest-xdist train it once
        traces = trained / "traces"
        if not traces.exists():
            traces.write_text(str(_train(config, trained / "run")))
    path = tmp_path_factory.mktemp("smoke") / "run"
    shutil.copytree(trained / "run", path)
    run = runner.prepare(config, str(path))
    shutil.copy(trained / "run" / "config.json", path)  # in which that was a second start
    files = {file for file in path.rglob("*") if file.is_file()}
    yield SmokeRun(path, run, int(traces.read_text()))
    assert {file for file in path.rglob("*") if file.is_file()} == files, "a test wrote into the run that all share"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Goes to a machine, by number; the bucket is empty at first."""
    from machines import BUCKET

    def go(number: int) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine_{number}"))

    go(1)
    yield go
    if BUCKET.exists("/bucket"):
        BUCKET.rm("/bucket", recursive=True)


def _train(config: Any, path: Path) -> int:
    """Trains a run; returns how often the target of its halving rounds was traced."""
    from diffdistill import chain, runner
    from diffdistill.samplers import ddim
    from diffdistill.training.interrupt import Interrupt

    traces: list[Any] = []
    original = ddim.two_step_target

    def counted(*arguments: Any, **keywords: Any) -> Any:
        traces.append(arguments)
        return original(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddim, "two_step_target", counted)
        chain._method.cache_clear()  # an earlier test may have bound this chain without the counter
        runner.train(runner.prepare(config, str(path)), Interrupt(), say=lambda text: None)
        chain._method.cache_clear()
    return len(traces)
