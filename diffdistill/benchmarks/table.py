"""Records of benchmarks for a person: a line for each, and a table of all."""

from __future__ import annotations

from collections.abc import Sequence

from diffdistill import plan
from diffdistill.benchmarks import training
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
    compiled = _compiled(record)
    return (
        f"{record['config']}, {subject(record)}, {record['dtype']}, batch {record['batch_size']}: {', '.join(parts)} "
        f"({record['hardware']}{f'; compiled in {compiled}' if compiled else ''})"
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
    if name in training.SIZES:
        height, width, _ = record["image_shape"]
        return f"teacher at {height}x{width} on {record['devices']} devices"
    return record.get("what", name)


def markdown(records: Sequence[results.Record]) -> str:
    """A Markdown table: rates, times beside those of arithmetic and memory alone, compilation, memory; then the rates.

    Times of arithmetic and memory are those of the FLOPs and of the compiler's bytes at the rates below the table.
    """
    head = (
        *("what", "type", "devices", "batch", "images/s", "FLOP/s", "of a product", "of the data sheet", "takes"),
        *("FLOPs alone", "bytes alone", "gap", "compiled in", "memory planned", "memory peak"),
    )
    rows = [
        (
            subject(record),
            record["dtype"],
            str(record["devices"]),
            str(record["batch_size"]),
            f"{record['images_per_second']:.4g}",
            plan.readable(record["flops_per_second"]) if record["flops_per_second"] else "",
            _percent(record["share_of_matmul"]),
            _percent(record["share_of_published"]),
            _milliseconds(record["seconds"]),
            _milliseconds(record["seconds_of_flops"]),
            _milliseconds(record["seconds_of_bytes"]),
            f"{record['gap']:.1f}" if record["gap"] else "",
            _compiled(record),
            _bytes(record.get("program_memory")),
            _bytes(record["peak_memory"]),
        )
        for record in records
    ]
    lines = [head, tuple("---" for _ in head), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n\n".join([table, *_rates(records)])


def _rates(records: Sequence[results.Record]) -> list[str]:
    """From and to which rate of one device the records were measured beside, a sentence for each type.

    Feature networks compute in float32 without the shortcuts of GPUs, and stand beside products without them.
    """

    def kind_of(record: results.Record) -> str:
        return f"{record['dtype']}{', exact' if record['benchmark'] == 'features' else ''}"

    found = []
    for dtype in dict.fromkeys(map(kind_of, records)):
        rates = [record["rates"] for record in records if kind_of(record) == dtype]
        products, copies = ([each for rate in rates for each in rate[kind]] for kind in ("matmul", "memory"))
        found.append(
            f"One device, {dtype}: matrix products {_range(products)}FLOP/s, copies {_range(copies)}B/s (measured "
            "before and after each record; bytes alone are the compiler's, at the rate of a copy)."
        )
    return found


def _range(values: Sequence[float]) -> str:
    return f"{plan.readable(min(values))} to {plan.readable(max(values))}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.3g} ms"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _bytes(number: int | None) -> str:
    return "" if number is None else plan.readable_bytes(number)


def _compiled(record: results.Record) -> str:
    """The seconds of compilation, and whether the cache had the program."""
    seconds = record.get("compile_seconds")
    return "" if seconds is None else f"{seconds:.1f} s{' (cached)' if record.get('compile_cached') else ''}"
