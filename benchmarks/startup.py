"""How long the program takes to start: anew, from the compilation cache, resumed, or finished. JSON and a table.

    python benchmarks/startup.py --config=configs/digits.py --out=results/startup.jsonl
    python benchmarks/startup.py --config=configs/digits.py --finished=runs/digits

Seconds from the start of the command until the metrics of its first update are on disk: first with an empty
compilation cache, then in another workdir with what that left, then resumed from a checkpoint. --finished: the command
of a run that is finished, until it returns, twice, since the first may have programs to compile and plots to draw.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def start(cache: Path, workdir: Path, *flags: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "main.py", *flags, f"--workdir={workdir}"],
        cwd=ROOT,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def updates(workdir: Path) -> int:
    """Updates whose metrics are on disk."""
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Waits for a condition; ends this program where the process ends first."""
    while not condition():
        if process.poll() is not None:
            sys.exit(f"the command ended with {process.returncode}:\n{process.communicate()[0]}")
        time.sleep(0.005)


def first_update(cache: Path, workdir: Path, *flags: str, until: Callable[[], bool] = lambda: True) -> float:
    """Seconds until the next update; then the run is stopped as soon as `until` is true as well."""
    begun, before = time.monotonic(), updates(workdir)
    process = start(cache, workdir, "--mode=train", *flags)
    wait(process, lambda: updates(workdir) > before)
    seconds = time.monotonic() - begun
    wait(process, until)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    return seconds


def whole(cache: Path, workdir: Path, *flags: str) -> float:
    """Seconds of the whole command."""
    begun = time.monotonic()
    process = start(cache, workdir, *flags)
    output = process.communicate()[0]
    if process.returncode:
        sys.exit(f"the command ended with {process.returncode}:\n{output}")
    return time.monotonic() - begun


def main() -> None:
    """The command lines at the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--finished", type=Path, metavar="RUN", help="only the start of a run that is finished")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    flags = [f"--config={options.config}"]
    records = []

    def note(what: str, seconds: float) -> None:
        record = {"benchmark": "startup", "what": what, "config": flags[0], "seconds": seconds}
        record |= {"cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
        print(json.dumps(record), flush=True)
        records.append(record)
        if options.out:
            with open(options.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    with tempfile.TemporaryDirectory() as place:
        cache, other, run = (Path(place) / name for name in ("cache", "other", "run"))

        def saved() -> bool:
            return any((run / "teacher").glob("[0-9]*/_CHECKPOINT_METADATA"))

        if options.finished:
            for _ in range(2):
                note("the command of a finished run", whole(cache, options.finished.resolve(), *flags))
        else:
            flags += ["--config.training.log_every=1", "--config.training.save_every=20"]
            note("first update, nothing in the cache", first_update(cache, other, *flags))
            note("first update, programs from the cache", first_update(cache, run, *flags, until=saved))
            note("first update after a resume", first_update(cache, run, *flags))
    print("\n| what | seconds |\n|---|---|")
    for record in records:
        print(f"| {record['what']} | {record['seconds']:.1f} |")


if __name__ == "__main__":
    main()
