"""The results file survives kills, and says what is finished."""

from __future__ import annotations

import json
from typing import Any

import pytest

from diffdistill.evaluation import results


def measured(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "stage": "teacher",
        "num_steps": 4,
        "network_evaluations": 8,
        "sampler": "ddim",
        "w": 1.0,
        "metric": "frechet_to_data",
        "value": 19.25,
        "num_samples": 100,
        "seed": 0,
        "hardware": "2 x cpu",
        "wall_time": 1.5,
        "params_hash": "abc",
    }
    return results.record(**(fields | changes))


def test_records_come_back_as_they_were_written(tmp_path) -> None:
    path = tmp_path / "evaluation" / "results.jsonl"
    assert results.read(path) == []
    written = [measured(), measured(w=None, metric="class_accuracy", value=0.5, note="extra")]
    results.append(path, written[:1])
    results.append(path, written[1:])
    assert results.read(path) == written
    assert set(results.REQUIRED) <= set(written[0])
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("kept", [1, 17, 120])
def test_a_torn_last_line_is_ignored_and_replaced(tmp_path, kept: int) -> None:
    path = tmp_path / "results.jsonl"
    first, second, third = measured(), measured(num_steps=2), measured(num_steps=1)
    results.append(path, [first])
    path.write_bytes(path.read_bytes() + json.dumps(second).encode()[:kept])
    assert results.read(path) == [first]
    results.append(path, [third])
    assert results.read(path) == [first, third]


def test_a_file_of_one_long_torn_line_becomes_empty(tmp_path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"x" * 10_000)
    assert results.read(path) == []
    results.append(path, [measured()])
    assert results.read(path) == [measured() | {"date": results.read(path)[0]["date"]}]


def test_a_broken_line_elsewhere_is_named(tmp_path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(measured()) + "\nnot json\n" + json.dumps(measured()) + "\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2"):
        results.read(path)
    path.write_text("[1, 2]\n")
    with pytest.raises(ValueError, match="line 1: not a JSON object"):
        results.read(path)


def test_finished_measurements_are_recognised(tmp_path) -> None:
    path = tmp_path / "results.jsonl"
    results.append(path, [measured(w=1)])
    done = results.finished(results.read(path))
    assert results.key(measured(w=1.0, value=3.0, wall_time=9.0)) in done
    changes: list[dict[str, Any]] = [
        {"num_steps": 2},
        {"w": None},
        {"seed": 1},
        {"params_hash": "new"},
        {"num_samples": 9},
    ]
    for change in changes:
        assert results.key(measured(**change)) not in done


def test_incomplete_and_infinite_results_are_refused(tmp_path) -> None:
    path = tmp_path / "results.jsonl"
    with pytest.raises(ValueError, match="lacks seed"):
        results.append(path, [{name: value for name, value in measured().items() if name != "seed"}])
    with pytest.raises(ValueError, match="finite number as value; given nan"):
        results.append(path, [measured(value=float("nan"))])
    assert results.read(path) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage": [1]}, "text as stage"),
        ({"w": "x"}, "a finite number or null as w"),
        ({"w": 10**400}, "a finite number or null as w"),
        ({"value": "abc"}, "a finite number as value"),
        ({"value": float("nan")}, "a finite number as value"),
        ({"num_steps": 10**400}, "a whole number from 0 to 2.63 as num_steps"),
        ({"num_samples": None}, "a whole number from 0 to 2.63 as num_samples"),
        ({"date": 5}, "text as date"),
        ({"weights_sha256": 5}, "text as weights_sha256"),
        ({"guidance_range": [1]}, "two finite numbers as guidance_range"),
        ({"weight_settings": {"gamma": "x"}}, "numbers by name as weight_settings"),
    ],
)
def test_a_record_that_no_table_can_be_made_of_is_named_by_its_line(tmp_path, changes, words) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(measured()) + "\n" + json.dumps({**measured(), **changes}) + "\n")
    with pytest.raises(results.ResultsError, match=rf"results\.jsonl, line 2: .*expected {words}"):
        results.read(path)


@pytest.mark.parametrize(("line", "words"), [("{}", "lacks stage"), ("[" * 100_000, "not a JSON object")])
def test_a_line_that_is_no_record_is_named(tmp_path, line: str, words: str) -> None:
    (tmp_path / "results.jsonl").write_text(line + "\n")
    with pytest.raises(results.ResultsError, match=rf"results\.jsonl, line 1: .*{words}"):
        results.read(tmp_path / "results.jsonl")
