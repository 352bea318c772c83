"""Breaks a smoke chain in the ways a machine can, restarts it after each, and compares it with one left alone.

    python tests/resume/break_chain.py /tmp/faults --trials=100

A trial is one fault at a random moment or in a random place, and the start after it. Its bars: no committed checkpoint
is lost, but those that make room for newer ones; damage is refused with the name of the file, unless nothing reads it;
whatever ends the program is one message with a way out; and by that way the chain ends with the same bits.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import errno
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import kill_chain
from kill_chain import committed, differing, end, saved, wait, whole

HERE = Path(__file__).resolve().parent
UPDATES, KEEP = 24, 2
DAMAGES = ("truncate", "flip", "remove", "remove folder")
SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
CALLS = ("open", "read", "write", "rename", "sync", "mkdir")
STORE_CALLS = ("open", "open", "write", "read", "mkdir")  # of which fsspec makes use
ERRORS = (errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ETIMEDOUT)
WAYS_OUT = r"same command|Move that directory|Restore|[Cc]hoose|Free some|Try a lower"


@dataclasses.dataclass
class Chain:
    """A chain that is being broken. damaged: names of the files that a trial has damaged, some perhaps not read yet."""

    folder: Path
    chance: random.Random
    library: Path | None
    damaged: set[str] = dataclasses.field(default_factory=set)

    @property
    def workdir(self) -> Path:
        return self.folder / "run"

    @property
    def spare(self) -> Path:
        """Where what is moved away goes."""
        return self.folder / "moved_away"

    def start(self, program: str = "main.py", *, address: bool = False, **environment: str) -> subprocess.Popen[str]:
        workdir = self.workdir.as_uri() if address else self.workdir
        return kill_chain.start(workdir, UPDATES, "digits", program=program, environment=environment)

    def names_damage(self, errors: str) -> bool:
        """Whether a message names a file that a trial has damaged."""
        return any(Path(each).name in errors for each in self.damaged)

    def reach(self, process: subprocess.Popen[str]) -> bool:
        """Waits until a few more checkpoints are there, and a moment; False where the process ended first."""
        target = saved(self.workdir) + self.chance.choice((1, 1, 8, 16))
        alive = wait(process, lambda: saved(self.workdir) >= target)
        time.sleep(self.chance.uniform(0.0, 0.3))
        return alive and process.poll() is None


@dataclasses.dataclass
class Outcome:
    """What came of a fault: the end of the process, whether the fault struck it at all, and the damaged file."""

    detail: str
    code: int
    errors: str
    struck: bool = True
    damaged: str = ""


def ended(process: subprocess.Popen[str], detail: str, *, struck: bool = True) -> Outcome:
    try:
        errors = end(process)
    except AssertionError as hangs:
        raise AssertionError(f"{detail}: {hangs}") from None
    return Outcome(detail, process.returncode, errors, struck)


def stopped(chain: Chain, process: subprocess.Popen[str], detail: str, struck: Callable[[], bool]) -> Outcome:
    """Lets a process go on for a while and stops it, unless it ends by itself."""
    try:
        if chain.reach(process):
            process.terminate()
    except AssertionError as hangs:
        raise AssertionError(f"{detail}: {hangs}") from None
    outcome = ended(process, detail)
    return dataclasses.replace(outcome, struck=struck())


def by_signal(chain: Chain, name: str) -> Outcome:
    process = chain.start()
    alive = chain.reach(process)
    process.send_signal(SIGNALS[name])
    return ended(process, name, struck=alive)


def nan_batch(chain: Chain) -> Outcome:
    number = chain.chance.randrange(20)
    process = chain.start(str(HERE / "nan_batch.py"), NAN_BATCH=str(number))
    return stopped(chain, process, f"batch {number} of the start is NaN", lambda: process.returncode == 3)


def failing(chain: Chain, calls: Sequence[str]) -> tuple[dict[str, str], str, Path]:
    """(environment in which calls below the workdir fail, what fails, file that is there once one has failed)."""
    call, number = chain.chance.choice(calls), chain.chance.choice(ERRORS)
    after, times = int(10 ** chain.chance.uniform(0, 2.5)), chain.chance.choice((1, 10**9))
    mark = chain.folder.parent / "struck"
    mark.unlink(missing_ok=True)
    environment = {
        "LD_PRELOAD": str(chain.library),
        "FAIL_BELOW": str(chain.workdir),
        "FAIL_CALL": call,
        "FAIL_AFTER": str(after),
        "FAIL_TIMES": str(times),
        "FAIL_ERRNO": str(number),
        "FAIL_MARK": str(mark),
    }
    often = "once" if times == 1 else "from then on"
    return environment, f"{call} {after} fails {often}: {errno.errorcode[number]}", mark


def failing_call(chain: Chain) -> Outcome:
    environment, detail, mark = failing(chain, CALLS)
    return stopped(chain, chain.start(**environment), detail, mark.exists)


def lost_machine(chain: Chain) -> Outcome:
    """Another machine goes on, for which the workdir is an address; it is stopped, and what it has is gone."""
    machine = chain.folder / "machine"
    environment = {"XDG_CACHE_HOME": str(machine)}
    detail, name = "", chain.chance.choice(list(SIGNALS))
    if chain.library is not None and chain.chance.random() < 0.6:
        more, detail, _ = failing(chain, STORE_CALLS)
        environment |= more
    process = chain.start(str(HERE / "copied_often.py"), address=True, **environment)
    try:
        alive = chain.reach(process)
        process.send_signal(SIGNALS[name])
        outcome = ended(process, f"{name}{', ' * bool(detail)}{detail}")
        return dataclasses.replace(outcome, struck=alive or outcome.code == 1)
    finally:
        shutil.rmtree(machine, ignore_errors=True)
        # A start by the address passes over a checkpoint that was copied in part. What follows starts in the folder.
        there = committed(chain.workdir)
        for place in chain.workdir.glob("*/*"):
            if place.name.isdigit() and int(place.name) not in there.get(place.parent.name, []):
                shutil.rmtree(place)


def full_disk(chain: Chain) -> Outcome:
    process = chain.start()
    alive = chain.reach(process)
    filler = chain.folder / "filler"
    try:
        if alive:
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(1 << 16))
                except OSError:
                    pass
        return ended(process, "the disk is full", struck=alive)
    finally:
        filler.unlink(missing_ok=True)


def read_only(chain: Chain) -> Outcome:
    """From the start on: Linux refuses to make a disk read-only on which a file is open for writing."""
    subprocess.run(["mount", "-o", "remount,ro", str(chain.folder)], check=True)
    try:
        return ended(chain.start(), "the disk is read-only")
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(chain.folder)], check=True)


def damage(chain: Chain, kind: str) -> Outcome:
    """Damages a file of a run that stands still, and starts it."""
    if not committed(chain.workdir):
        stopped(chain, chain.start(), "", lambda: False)
    if not (chain.folder / "config.json").exists():
        shutil.copy(chain.workdir / "config.json", chain.folder)
    newest = [chain.workdir / stage / str(steps[-1]) for stage, steps in committed(chain.workdir).items()]
    if kind == "remove folder":  # of an item of a checkpoint
        pool = sorted(path for place in newest for path in place.iterdir() if path.is_dir())
    elif newest and chain.chance.random() < 0.7:
        pool = sorted(path for place in newest for path in place.rglob("*") if path.is_file())
    else:
        pool = sorted(path for path in chain.workdir.rglob("*") if path.is_file() and path.name != ".lock")
    file = chain.chance.choice(pool)
    content = bytearray(file.read_bytes()) if file.is_file() else b""
    if kind == "remove folder":
        shutil.rmtree(file)
    elif kind == "remove" or not content:
        file.unlink()
    elif kind == "truncate":
        file.write_bytes(content[: chain.chance.randrange(len(content))])
    else:
        content[chain.chance.randrange(len(content))] ^= 1 << chain.chance.randrange(8)
        file.write_bytes(content)
    name = str(file.relative_to(chain.workdir))
    chain.damaged.add(name)
    outcome = stopped(chain, chain.start(), f"{kind} {name}", lambda: True)
    assert outcome.code != 1 or chain.names_damage(outcome.errors), f"{name} is not named: {outcome.errors}"
    return dataclasses.replace(outcome, damaged=name)


FAULTS: dict[str, Callable[[Chain], Outcome]] = {
    **{name: lambda chain, name=name: by_signal(chain, name) for name in SIGNALS},
    "nan batch": nan_batch,
    "failing call": failing_call,
    "full disk": full_disk,
    "read-only": read_only,
    "lost machine": lost_machine,
    **{kind: lambda chain, kind=kind: damage(chain, kind) for kind in DAMAGES},
}
NEEDS_DISK = ("full disk", "read-only")


def digests(workdir: Path) -> dict[tuple[str, int], dict[str, str]]:
    """Of every committed checkpoint, a digest of each file."""
    found = {}
    for stage, steps in committed(workdir).items():
        for step in steps:
            place = workdir / stage / str(step)
            files = [path for path in place.rglob("*") if path.is_file()]
            found[stage, step] = {
                str(path.relative_to(place)): hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
                for path in files
            }
    return found


def check(chain: Chain, fault: str, outcome: Outcome, before: dict[tuple[str, int], dict[str, str]]) -> None:
    """The bars of a trial; fault: empty where none struck."""
    after = digests(chain.workdir)
    for (stage, step), files in before.items():
        if outcome.damaged.startswith(f"{stage}/{step}/"):
            continue
        newer = sum(step < other for other in committed(chain.workdir).get(stage, []))
        now = after.get((stage, step), {})
        lost = [name for name in files if now.get(name) != files[name]]
        assert newer >= KEEP or not lost, f"{lost} of {stage}/{step} are lost: {outcome}"
    assert "Traceback" not in outcome.errors, outcome.errors
    expected = {"kill": (-9,), "terminate": (143,), "interrupt": (130,), "nan batch": (3, 143)}
    expected |= {"full disk": (1,), "read-only": (1,), "lost machine": (1, -9, 143, 130)}
    # A process that has failed or finished may be told to stop when it no longer listens.
    over = "Error: " in outcome.errors or f"{UPDATES}/{UPDATES}" in outcome.errors
    ending = outcome.code == -signal.SIGTERM and over
    # What an earlier trial has damaged may first be read by a process that has just been told to stop.
    ending |= outcome.code == 1 and " is damaged: " in outcome.errors and chain.names_damage(outcome.errors)
    assert ending or outcome.code in (0, *expected.get(fault, (1, 143))), f"exit code {outcome.code}: {outcome.errors}"
    if outcome.code in (1, 3):
        assert len(re.findall("^Error: ", outcome.errors, re.MULTILINE)) == 1, outcome.errors
        assert str(chain.folder) in outcome.errors or outcome.code == 3, outcome.errors
        assert re.search(WAYS_OUT, outcome.errors), outcome.errors


def take_the_way_out(chain: Chain, errors: str) -> str:
    """Does what a refusal asks for. Returns what that was."""
    named = re.search(r"The checkpoint (\S+) is damaged", errors)
    if named and Path(named[1]).is_relative_to(chain.workdir):
        chain.spare.mkdir(exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=chain.spare))
        shutil.move(named[1], place)
        return f"moved {Path(named[1]).relative_to(chain.workdir)} away"
    if "config.json" in errors and "Restore" in errors and (chain.folder / "config.json").exists():
        shutil.copy(chain.folder / "config.json", chain.workdir / "config.json")
        return "restored config.json"
    if "holds a run of another config" in errors:  # a flipped bit in config.json that leaves it readable
        shutil.copy(chain.folder / "config.json", chain.workdir / "config.json")
        return "restored config.json"
    return ""


def finish(chain: Chain) -> None:
    """Starts the chain until it is done, taking the ways out."""
    for _ in range(12):
        outcome = ended(chain.start(), "the end")
        if outcome.code == 0:
            return
        assert take_the_way_out(chain, outcome.errors), f"no way out: {outcome}"
    raise AssertionError("the chain does not come to an end")


def compare(chain: Chain, reference: Path) -> None:
    """Finishes the chain; every tensor must have the bits of the reference."""
    from diffdistill.training.errors import CheckpointError

    for _ in range(12):
        finish(chain)
        try:
            assert differing(reference, chain.workdir) == []
            return
        except CheckpointError as error:  # damage that no start had to read
            if not take_the_way_out(chain, str(error)):
                raise
    raise AssertionError("the chain does not come to an end")


def trials(folder: Path, faults: list[str], chance: random.Random, library: Path | None, disk: bool) -> Iterator[str]:
    """Runs one trial for each of `faults`, in chains that are finished and compared one after the other.

    Yields a line for each trial and each comparison. Where a bar is missed, the line begins with MISSED, and a new
    chain takes the place of that one.
    """
    reference = folder / "whole"
    total = whole(reference, UPDATES)
    number, left, misses = 0, collections.deque(faults), collections.Counter[str]()
    while left:
        place = folder / f"broken_{number}"
        place.mkdir()
        number += 1
        if disk:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], check=True)
        chain = Chain(place, chance, library)
        try:
            while left and saved(chain.workdir) < total:
                fault = left.popleft()
                before = digests(chain.workdir)
                outcome = FAULTS[fault](chain)
                check(chain, fault if outcome.struck else "", outcome, before)
                if not outcome.struck and misses[fault] < 3:
                    misses[fault] += 1
                    left.append(fault)  # once more, later
                way = take_the_way_out(chain, outcome.errors) if outcome.code == 1 else ""
                yield (
                    f"{fault}: {outcome.detail}: exit code {outcome.code}{', ' + way if way else ''}"
                    f"{'' if outcome.struck else ' (did not strike)'}; saved {saved(chain.workdir)} of "
                    f"{total}" + (f"\n    {outcome.errors.strip().splitlines()[-1]}" if outcome.code in (1, 3) else "")
                )
            compare(chain, reference)
            yield f"chain {number}: every tensor has the bits of the chain that was left alone"
        except AssertionError as missed:
            yield f"MISSED in chain {number}: {missed}"
        finally:
            if disk:
                subprocess.run(["umount", "-l", str(place)], check=False)
            shutil.rmtree(place, ignore_errors=True)


def compiled(folder: Path) -> Path | None:
    """failing_calls.c as a library to preload; None without a C compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or sys.platform != "linux":
        return None
    library = folder / "failing_calls.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, HERE / "failing_calls.c", "-ldl"], check=True)
    return library


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a small file system."""
    place = folder / "mounted"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    subprocess.run(["umount", str(place)], check=True)
    return True


def possible(library: Path | None, disk: bool) -> list[str]:
    """The faults that can be made here."""
    return [
        name for name in FAULTS if (name not in NEEDS_DISK or disk) and (name != "failing call" or library is not None)
    ]


def main() -> None:
    """The command line at the top of this file."""
    parser = argparse.ArgumentParser(description="Break and resume a smoke chain.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--faults", default="", help="some of: " + ", ".join(FAULTS))
    parser.add_argument("--seed", type=int, default=None)
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(given.folder / "cache"))
    sys.path.insert(0, str(kill_chain.ROOT))
    seed = random.randrange(10**6) if given.seed is None else given.seed
    library, disk = compiled(given.folder), can_mount(given.folder)
    names = given.faults.split(",") if given.faults else possible(library, disk)
    print(f"seed {seed}; faults: {', '.join(names)}", flush=True)
    chance = random.Random(seed)
    chosen = [names[index % len(names)] for index in range(given.trials)]
    chance.shuffle(chosen)
    begun, missed = time.monotonic(), 0
    for line in trials(given.folder.resolve(), chosen, chance, library, disk):
        missed += line.startswith("MISSED")
        print(f"[{time.monotonic() - begun:5.0f} s] {line}", flush=True)
    print(f"{given.trials} trials: {dict(collections.Counter(chosen))}; bars missed: {missed}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
