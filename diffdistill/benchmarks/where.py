"""Where the time of a program goes: what the profiler saw its devices do, by part of the network and direction."""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

PARTS = ("convolutions", "matrix products", "norms", "dropout", "attention", "other")
DIRECTIONS = ("forward", "backward", "update", "unnamed")

Seconds = dict[str, dict[str, float]]
"""Of every part, by direction."""

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = .*? (?P<operation>[a-z][\w-]*)\(", re.MULTILINE)
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_COMPUTATION = re.compile(r"^%?(?P<name>[\w.-]+) .*\{$")
_CALLS = re.compile(r"calls=%?([\w.-]+)")
_CONTAINERS = ("while", "call", "conditional")  # whose time is that of what they contain
_COMMAND_BUFFER = re.compile(r"command_buffer\w*")
_MARKS = {  # in the name that JAX gives an operation, the first that fits
    "convolutions": ("conv_general_dilated",),
    "attention": ("dot_product_attention", "fmha", "softmax"),
    "dropout": ("/Dropout",),
    "norms": ("norm", "silu"),
    "matrix products": ("dot_general",),
}
_KERNELS = {  # in the name of a kernel of cuDNN or cuBLAS
    ("attention", "backward"): ("bprop", "dot_do_o"),
    ("attention", "forward"): ("sdpa",),
    ("convolutions", "backward"): ("dgrad", "wgrad"),
    ("convolutions", "forward"): ("fprop",),
    ("matrix products", "unnamed"): ("nvjet", "gemm", "cutlass"),
}

Seen = tuple[str, str]
"""The operation of the program that the profiler names, and the kernel that it saw."""


def of_calls(program: Any, call: Callable[[], Any], calls: int, updates: int) -> Seconds:
    """The device seconds of an update of a compiled program, on average over `calls` and over devices.

    What a fused operation does belongs where its last part does. Time between operations is in none of them.

    Args:
      program: what `jax.jit(...).lower(...).compile()` gives.
      call: calls it, and returns what to wait for.
      updates: that a call makes.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(call())
        seen = seen_in(Path(folder))
    count = calls * updates * len(jax.local_devices())
    return by_part(program.as_text(), {name: seconds / count for name, seconds in seen.items()})


def by_part(text: str, seen: Mapping[Seen, float]) -> Seconds:
    """Sums the seconds of operations, by name, as the text of their program says what they are for.

    Names that the program does not have belong to other programs, and are left out. A fused operation without a name
    of JAX takes that of the last one in it; one with a convolution in it is one. Of what a GPU launches together the
    profiler names the group alone: there the name of a kernel counts, which is that of the operation or says what its
    library calls it. A convolution of XLA:CPU ends, for the profiler, when its threads have begun it: its time is what
    the sum lacks to the time of an update.
    """
    places = _places(text)
    kernels = {re.sub(r"\W", "_", name): place for name, place in places.items()}
    found: collections.defaultdict[tuple[str, str], float] = collections.defaultdict(float)
    for (operation, kernel), seconds in seen.items():
        if _COMMAND_BUFFER.fullmatch(operation):
            found[kernels.get(kernel) or _of_library(kernel)] += seconds
        elif operation in places:
            found[places[operation]] += seconds
    return {part: {direction: found[part, direction] for direction in DIRECTIONS} for part in PARTS}


def _of_library(kernel: str) -> tuple[str, str]:
    """(part, direction) of a kernel that no operation of the program has given its name."""
    marked = (place for place, marks in _KERNELS.items() if any(mark in kernel for mark in marks))
    return next(marked, ("other", "unnamed"))


def _places(text: str) -> dict[str, tuple[str, str]]:
    """(part, direction) of every operation of a compiled program, by its name, but for those that contain others."""
    places = {}
    inside, last, convolving = "", {}, set()
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            inside = match["name"]
        match, named = _INSTRUCTION.match(line), _OP_NAME.search(line)
        if named:
            last[inside] = named[1]
        if match and match["operation"] == "convolution":
            convolving.add(inside)
        if match and match["operation"] not in _CONTAINERS:
            calls = _CALLS.search(line)
            called = calls[1] if calls else ""
            name = named[1] if named else last.get(called, "")
            places[match["name"]] = _place(name, "convolution" if called in convolving else match["operation"])
    return places


def table(seconds: Seconds) -> str:
    """A Markdown table in ms, with the sums of rows and columns; a sentence where the profiler saw nothing."""
    if not any(value for each in seconds.values() for value in each.values()):
        return "The profiler saw nothing that these devices did: is it permitted, and are its libraries there (CUPTI)?"
    rows = [(part, *(each[direction] for direction in DIRECTIONS)) for part, each in seconds.items()]
    rows.append(("all", *(sum(each[direction] for each in seconds.values()) for direction in DIRECTIONS)))
    lines = [
        f"| where the devices spend an update, ms | {' | '.join(DIRECTIONS)} | all |",
        f"|{' --- |' * (len(DIRECTIONS) + 2)}",
    ]
    lines += [f"| {name} | {_cells((*values, sum(values)))} |" for name, *values in rows]
    return "\n".join(lines)


def _cells(values: Iterable[float]) -> str:
    return " | ".join(f"{1000 * value:.2f}" for value in values)


def _place(name: str, operation: str) -> tuple[str, str]:
    """(part, direction) of an operation that JAX has called so."""
    direction = "backward" if "transpose(" in name else "forward" if "jvp(" in name else "update"
    direction = direction if name else "unnamed"
    if operation == "convolution":
        return "convolutions", direction
    part = next((part for part, marks in _MARKS.items() if any(mark in name for mark in marks)), "other")
    return part, direction


def seen_in(folder: Path) -> dict[Seen, float]:
    """Seconds of every operation and kernel that the profiler wrote into a folder, over all devices."""
    found: collections.defaultdict[Seen, float] = collections.defaultdict(float)
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    operation = dict(event.stats).get("hlo_op")
                    if operation is not None and not event.name.startswith("end: "):
                        found[str(operation), event.name] += event.duration_ns / 1e9
    return found
