"""Records of benchmarks for a person: a line for each, and a table of all."""

from __future__ import annotations

from collections.abc import Sequence

from diffdistill import plan
from diffdistill.evaluation import results


def line(record: results.Record) -> str:
    """A record in a sentence."""
    parts = [f"{record['images_per_second']:.4g} images/s"]
    if record["flops_per_second"]:
        parts.append(f"{plan.readable(record['flops_per_second'])}FLOP/s: {shares(record)}")
    if record.get("cost_of_teacher"):
        parts.append(f"an update takes {record['cost_of_teacher']:.2f} times as long as one of the teacher")
    if "waiting" in record:
        parts.append(f"{100 * record['waiting']:.1f} % of the time is spent waiting for batches")
    compiled = record.get("compile_seconds")
    return (
        f"{record['config']}, {subject(record)}, {record['dtype']}, batch {record['batch_size']}: {', '.join(parts)} "
        f"({record['hardware']}{f'; compiled in {compiled:.0f} s' if compiled else ''})"
    )


def shares(record: results.Record) -> str:
    """How much of what the devices can do is used."""
    of_sheet = record["share_of_published"]
    return (
        f"{100 * record['share_of_matmul']:.0f} % of the {plan.readable(record['matmul_flops_per_second'])}FLOP/s of a "
        f"matrix product here{'' if of_sheet is None else f', {100 * of_sheet:.0f} % of its data sheet'}"
    )


def subject(record: results.Record) -> str:
    """What a record is about."""
    name = record["benchmark"]
    if name == "sampling":
        return f"{record['sampler']} in {record['num_steps']} steps"
    if name == "growth":
        height, width, _ = record["image_shape"]
        return f"teacher at {height}x{width} on {record['devices']} devices"
    return record.get("what", name)


def markdown(records: Sequence[results.Record]) -> str:
    """A Markdown table: images/s, how long an update or a batch takes beside its two floors, compilation, memory."""
    head = (
        *("what", "type", "batch", "images/s", "FLOP/s", "of a product", "takes", "floor by FLOPs", "floor by bytes"),
        *("gap", "compiled in", "memory"),
    )
    rows = [
        (
            subject(record),
            record["dtype"],
            str(record["batch_size"]),
            f"{record['images_per_second']:.4g}",
            plan.readable(record["flops_per_second"]) if record["flops_per_second"] else "",
            f"{100 * record['share_of_matmul']:.0f} %" if record["share_of_matmul"] else "",
            _milliseconds(record["seconds"]),
            _milliseconds(record["floor_by_flops"]),
            _milliseconds(record["floor_by_bytes"]),
            f"{record['gap']:.1f}" if record["gap"] else "",
            f"{record['compile_seconds']:.1f} s" if record.get("compile_seconds") else "",
            _memory(record),
        )
        for record in records
    ]
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.3g} ms"


def _memory(record: results.Record) -> str:
    """What the compiler has planned for one device."""
    found = record.get("program_memory")
    return plan.readable_bytes(found) if found else ""
