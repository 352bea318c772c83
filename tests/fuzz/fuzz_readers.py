"""Feeds damaged and hostile files to every reader of files from outside, and counts what comes of it.

    python tests/fuzz/fuzz_readers.py --inputs=2000
    python tests/fuzz/fuzz_readers.py --inputs=20000 --readers=edm,idx --seed=1

An input is a small valid file, changed at random: bits, bytes, lengths, spans, and, inside zip and gzip, the content
below the checksum. Before those come the hostile files of readers.py. A reader may accept an input or refuse it with
its own error. Anything else is a finding: another exception, code that was executed, a file opened for writing outside
the scratch folder, a process, a connection, much memory, much time.
"""

from __future__ import annotations

import argparse
import bz2
import collections
import contextlib
import faulthandler
import gzip
import io
import lzma
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import readers
from hostile_files import zipped
from reader import ROOT, Reader

# What one input may take beyond what the process holds before: this much, and more for a large file.
MEMORY, TIMES = 256 << 20, 16
SECONDS = 4.0  # of the processor; a valid file is read first, and may take longer, as programs are compiled
STUCK = 300  # seconds after which the program ends with the stacks of its threads: C code hears no signal
LARGE = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def changed(content: bytes, chance: random.Random, other: bytes) -> bytes:
    """The same bytes with one to four random changes."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        # Headers and ends say more than the middle.
        at = chance.choice(
            (
                chance.randrange(len(data)),
                chance.randrange(min(len(data), 64)),
                max(0, len(data) - 1 - chance.randrange(min(len(data), 64))),
            )
        )
        kind = chance.randrange(8)
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at] = chance.randrange(256)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            size = chance.choice((1, 2, 4, 8))
            number = chance.choice(LARGE) % (1 << (8 * size))
            data[at : at + size] = number.to_bytes(size, chance.choice(("little", "big")))
        elif kind == 4:
            data[at : at + chance.randrange(1, 64)] = b""
        elif kind == 5:
            data[at:at] = data[at : at + chance.randrange(1, 64)]
        elif kind == 6:
            start = chance.randrange(len(other)) if other else 0
            data[at : at + 32] = other[start : start + 32]
        else:
            data[at : at + chance.randrange(1, 32)] = bytes(chance.randrange(1, 32))
    return bytes(data)


PACKED = (
    (b"\x1f\x8b", gzip.decompress, lambda content: gzip.compress(content, 1)),
    (b"BZh", bz2.decompress, bz2.compress),
    (b"\xfd7zXZ", lzma.decompress, lambda content: lzma.compress(content, preset=0)),
)


def mutated(content: bytes, chance: random.Random, other: bytes) -> bytes:
    """Changes a file, or what lies inside it where a checksum would tell a change outside."""
    if chance.random() < 0.6:
        with contextlib.suppress(zipfile.BadZipFile):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                members = {name: archive.read(name) for name in archive.namelist()}
                stored = archive.infolist()[0].compress_type
            name = chance.choice(sorted(members))
            members[name] = changed(members[name], chance, other)
            return zipped(members, stored)
        for start, unpack, pack in PACKED:
            if content.startswith(start):
                return pack(changed(unpack(content), chance, other))
    return changed(content, chance, other)


WATCHED = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "ctypes.dlopen")
MODULES = ("antigravity", "this", "__hello__")  # that hostile files name, and nobody else imports
CHANGING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")


class Watch:
    """Notes what a reader does beside reading, while it is on."""

    def __init__(self, scratch: Path) -> None:
        # Programs that JAX compiles meanwhile may be kept.
        self.places = (str(scratch), os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(scratch))
        self.on, self.seen = False, []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in WATCHED:
            self.seen.append(f"{event} {arguments[:1]}")
        elif event in CHANGING and not os.fsdecode(arguments[0]).startswith(self.places):
            self.seen.append(f"{event} {arguments[0]}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, _, flags = arguments
            name = os.fsdecode(path)
            if (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not name.startswith((*self.places, "/dev/")):
                self.seen.append(f"open for writing {name}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self.seen, self.on = [], True
        try:
            yield
        finally:
            self.on = False
            # importlib.import_module is no event.
            self.seen += [f"import {name}" for name in MODULES if sys.modules.pop(name, None)]


def held(what: str) -> int:
    """Bytes that the process holds (VmRSS), or has held at most since `reset_peak` (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def reset_peak() -> bool:
    """Whether memory can be watched here."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


class TimeUp(BaseException):
    """The time for an input is over. Nothing that catches every Exception catches it."""


@contextlib.contextmanager
def timed(seconds: float) -> Iterator[None]:
    """Raises TimeUp in Python code that takes longer; MemoryError in what takes much more memory than it may."""

    def stop(number: int, frame: Any) -> None:
        raise TimeUp

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held("VmSize") + 16 * MEMORY, hard))
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def attempt(
    reader: Reader, content: bytes, scratch: Path, watch: Watch, owned: Path, seconds: float = SECONDS
) -> tuple[str, str]:
    """(accepted, refused or finding; what was found)."""
    place = Path(tempfile.mkdtemp(dir=scratch))
    path = place / "input.bin"
    path.write_bytes(content)
    watched = reset_peak()
    before, begun = held("VmRSS") if watched else 0, time.process_time()
    outcome, detail = "accepted", ""
    faulthandler.dump_traceback_later(STUCK, exit=True, file=sys.__stderr__)
    try:
        with watch.watching(), timed(10 * seconds):
            reader.read(path)
    except TimeUp:
        outcome, detail = "finding", f"it did not end in {10 * seconds:.0f} s"
    except reader.errors as error:
        outcome = "refused"
        if not str(error).strip():
            outcome, detail = "finding", "an error without a message"
    except (Exception, SystemExit, RecursionError) as error:  # noqa: BLE001, whatever it is, it is a finding
        outcome, detail = "finding", "".join(traceback.format_exception(error)[-3:])
    faulthandler.cancel_dump_traceback_later()
    spent, used = time.process_time() - begun, held("VmHWM") - before if watched else 0
    if owned.exists():
        outcome, detail = "finding", "code was executed"
        owned.unlink()
    elif watch.seen:
        outcome, detail = "finding", f"it did {watch.seen[:3]}"
    elif used > MEMORY + TIMES * len(content):
        outcome, detail = "finding", f"it took {used >> 20} MiB for {len(content)} bytes"
    elif spent > seconds:
        outcome, detail = "finding", f"it took {spent:.0f} s"
    shutil.rmtree(place, ignore_errors=True)
    return outcome, detail


def fuzz(names: list[str], inputs: int, seed: int, keep: Path | None = None) -> dict[str, collections.Counter]:
    """What came of `inputs` changed files and all hostile ones, for each reader. Findings are printed, and kept."""
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    owned = scratch / "owned"
    watch = Watch(scratch)
    known = readers.known(owned)
    counts: dict[str, collections.Counter] = {}
    try:
        for name in names or list(known):
            reader, chance = known[name], random.Random(f"{seed} {name}")
            seeds = list(reader.seeds().values())
            counts[name] = collections.Counter()

            def note(content: bytes, label: str, reader=reader, name=name) -> str:
                seconds = 10 * SECONDS if label.startswith("seed") else SECONDS
                outcome, detail = attempt(reader, content, scratch, watch, owned, seconds)
                counts[name][outcome] += 1
                if outcome == "finding":
                    print(f"FINDING {name}, {label}: {detail}", flush=True)
                    if keep is not None:
                        keep.mkdir(parents=True, exist_ok=True)
                        (keep / f"{name.replace('/', '_')}-{label}".replace(" ", "_")).write_bytes(content[: 1 << 24])
                return outcome

            for number, content in enumerate(seeds):
                if note(content, f"seed {number}") == "refused" and reader.complete:
                    print(f"FINDING {name}: the valid file {number} is refused", flush=True)
                    counts[name]["finding"] += 1
            for label, content in reader.hostile().items():
                note(content, label)
            for number in range(inputs):
                note(mutated(chance.choice(seeds), chance, chance.choice(seeds)), f"input {number}")
            print(f"{name}: {dict(counts[name])}", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return counts


def main() -> None:
    """The command line at the top of this file."""
    parser = argparse.ArgumentParser(description="Feed damaged files to every reader.")
    parser.add_argument("--inputs", type=int, default=2000, help="changed files for each reader")
    parser.add_argument("--readers", default="", help="some of them, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=None, help="folder for the inputs of findings")
    given = parser.parse_args()
    os.chdir(ROOT)
    counts = fuzz([name for name in given.readers.split(",") if name], given.inputs, given.seed, given.keep)
    total = sum(counts.values(), collections.Counter())
    print(f"{sum(total.values())} inputs, {len(counts)} readers: {dict(total)}")
    sys.exit(1 if total["finding"] else 0)


if __name__ == "__main__":
    main()
