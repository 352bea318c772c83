"""Every test runs on the CPU, with one compilation cache for the whole session and its subprocesses.

Programs are compiled quickly, not well: they are tiny, and compiling them takes longer than running them.
JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests what users run, in about one and a half times the time.
"""

import dataclasses
import os
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


@dataclasses.dataclass(frozen=True)
class SmokeRun:
    """A finished run of configs/digits.py:smoke.

    Attributes:
      path: its workdir; copy it before changing anything.
      run: what runner.prepare returned.
      traces: number of steps (traced or not) at every call of the halving step's target.
      said: the lines printed meanwhile.
    """

    path: Path
    run: Any
    traces: list[Any]
    said: list[str]


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> Iterator[SmokeRun]:
    """The whole smoke chain, trained once for all tests that look at a finished run: who writes in it, copies it."""
    from configs import digits
    from diffdistill import chain, runner
    from diffdistill.config import resolve
    from diffdistill.samplers import ddim
    from diffdistill.training.interrupt import Interrupt

    path = tmp_path_factory.mktemp("smoke") / "run"
    traces: list[Any] = []
    said: list[str] = []
    original = ddim.two_step_target

    def counted(*arguments: Any, **keywords: Any) -> Any:
        traces.append(arguments)
        return original(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddim, "two_step_target", counted)
        chain._method.cache_clear()  # an earlier test may have bound this chain without the counter
        run = runner.prepare(resolve(digits.get_config("smoke")), str(path))
        runner.train(run, Interrupt(), say=said.append)
        chain._method.cache_clear()
    files = {file for file in path.rglob("*") if file.is_file()}
    yield SmokeRun(path, run, traces, said)
    assert {file for file in path.rglob("*") if file.is_file()} == files, "a test wrote into the run that all share"
