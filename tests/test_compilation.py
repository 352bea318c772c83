"""Compiled programs are kept on disk, where the user or the custom of the system says."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from diffdistill import compilation, places

PROGRAM = """
import jax, jax.numpy as jnp
from diffdistill import compilation
compilation.use_cache()
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4))).block_until_ready()
print(compilation.counted())
"""


def run(**environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment = {**kept, "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


def test_a_second_start_compiles_nothing(tmp_path):
    first, second = run(XDG_CACHE_HOME=str(tmp_path)), run(XDG_CACHE_HOME=str(tmp_path))
    assert first.startswith(f"Compiled programs: 0 from {tmp_path}/diffdistill/programs-")
    assert not first.endswith(", 0 added to it.")
    assert not second.startswith("Compiled programs: 0 from")
    assert second.endswith(", 0 added to it.")


@pytest.mark.parametrize("folder", ["elsewhere", ""])
def test_the_user_may_say_where_and_whether(tmp_path, folder):
    said = run(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(tmp_path / folder) if folder else "")
    assert not (tmp_path / "diffdistill").exists()
    if folder:
        assert str(tmp_path / folder) in said
    else:
        assert said == ""


def test_what_a_kill_may_have_torn_is_compiled_again(tmp_path):
    run(XDG_CACHE_HOME=str(tmp_path))
    (folder,) = (tmp_path / "diffdistill").iterdir()
    assert not any(folder.glob(".running-*"))  # a process that ended as it should
    newest = max(folder.glob("*-cache"), key=lambda path: path.stat().st_mtime)
    whole = newest.stat().st_size
    note = folder / ".running-0123"  # of a process that holds its lock no more
    note.touch()
    os.utime(note, (1000, 1000))
    os.truncate(newest, 100)
    assert run(XDG_CACHE_HOME=str(tmp_path)).endswith(", 1 added to it.")
    assert newest.stat().st_size == whole
    assert not note.exists()
    assert run(XDG_CACHE_HOME=str(tmp_path)).endswith(", 0 added to it.")


def test_the_oldest_programs_go_where_there_are_too_many(tmp_path):
    for age in range(5):
        (tmp_path / f"{age}-cache").write_bytes(b"x" * 100)
        os.utime(tmp_path / f"{age}-cache", (1000 - age, 1000 - age))
    compilation._tidy(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.glob("*-cache")) == ["0-cache", "1-cache"]


def test_without_a_home_there_is_a_folder_nevertheless(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(places.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert places.cache().parent.parent == Path(tempfile.gettempdir())
