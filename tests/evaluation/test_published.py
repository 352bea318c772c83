"""Published figures beside measured ones: which record belongs to which row, marks, and the three forms of a table."""

from __future__ import annotations

import csv
import io

import pytest

from configs.p2 import DATASETS
from diffdistill.evaluation import comparison, published, results
from diffdistill.weights import fetch

RECORD = {
    "stage": "round_10_steps_0004",
    "num_steps": 4,
    "network_evaluations": 4,
    "sampler": "ddim",
    "w": 0.0,
    "metric": "fid",
    "value": 3.21,
    "num_samples": 50_000,
    "seed": 0,
    "hardware": "8 x TPU v4",
    "wall_time": 60.0,
    "params_hash": "abc",
    "dataset": "cifar10",
    "conditional": False,
    "method": "progressive",
    "guidance_range": None,
    "prediction": "x",
    "weight": "snr_trunc",
    "config": "progressive-cifar10",
    "protocol": "inception tf",
    "weights_sha256": fetch.INCEPTION.sha256,
    "reference": "cifar10-32x32.npz",
    "reference_count": 50_000,
}


def record(**changes) -> results.Record:
    date = changes.pop("date", None)
    made = results.record(**{**RECORD, **changes})
    return {**made, "date": date} if date else made


def row(table: str, **wanted: str) -> published.Row:
    (found,) = [r for r in published.table(table) if all(getattr(r, name) == value for name, value in wanted.items())]
    return found


FOUR = {"method": "progressive", "steps_or_nfe": "4"}


def test_every_row_of_every_table_can_be_asked_for():
    assert sum(published.tables().values()) == 301
    for name, count in published.tables().items():
        rows = published.table(name)
        assert len(rows) == count
        for each in rows:
            assert each.status in (published.PUBLISHED, published.QUOTED, published.RECALLED, published.UNKNOWN)
            assert bool(each.value) == (each.status != published.UNKNOWN)
            assert published.measured(each, [record(dataset="elsewhere")]) is None
    with pytest.raises(published.TableError, match=r"no table 'progressive/9'; known are progressive/1, progressive/2"):
        published.table("progressive/9")


def test_golden_figures():
    assert row("progressive/2", **FOUR).value == "3.0"
    assert row("progressive/2", method="luhman").value == "9.36"
    assert row("guided/1", method="teacher", steps_or_nfe="1024", w="1", metric="is").value == "139.5"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_steps": 8},
        {"metric": "is"},
        {"dataset": "imagenet64"},
        {"conditional": True},
        {"method": "teacher"},
        {"sampler": "ancestral"},
        {"w": 1.0},
        {"guidance_range": [0.0, 4.0]},
    ],
)
def test_a_record_of_anything_else_does_not_fit(changes):
    assert published.measured(row("progressive/2", **FOUR), [record()]).value == 3.21
    assert published.measured(row("progressive/2", **FOUR), [record(**changes)]) is None


def test_rows_of_other_kinds_find_their_records():
    teacher = {"method": "teacher", "stage": "teacher", "num_steps": 1024}
    table1 = row("progressive/1", detail="output=x;weight=snr_trunc", sampler="ddim", metric="fid")
    # Without stated steps the most that were measured count.
    assert published.measured(table1, [record(**teacher), record(**teacher | {"num_steps": 8})]).value == 3.21
    assert published.measured(table1, [record(**teacher, prediction="v")]) is None
    assert published.measured(table1, [record(**teacher, weight="snr")]) is None
    guided = {"dataset": "imagenet64", "conditional": True, "w": 0.3}
    by_w = {"method": "guided_distilled", "steps_or_nfe": "4", "w": "0.3", "metric": "fid", "sampler": "deterministic"}
    assert published.measured(row("guided/1", **by_w), [record(**guided, guidance_range=[0.0, 4.0])]).value == 3.21
    single = row("guided/1", **by_w | {"method": "single_w"})
    assert published.measured(single, [record(**guided, guidance_range=[0.0, 4.0])]) is None
    assert published.measured(single, [record(**guided, guidance_range=[0.3, 0.3])]).value == 3.21
    edm = row("edm/2", dataset="cifar10", conditional="yes", detail="config=F;arch=vp")
    ours = {"method": "teacher", "conditional": True, "sampler": "heun", "num_steps": 18, "network_evaluations": 35}
    assert published.measured(edm, [record(**ours, config="edm-cifar10-cond-ddpmpp-F")]).value == 3.21
    baseline, weighted = (row("p2/1", dataset="ffhq256", detail=detail) for detail in ("gamma=0", "P2"))
    faces = {"method": "teacher", "dataset": "ffhq256", "sampler": "respaced", "num_steps": 250}
    for made, fits in (
        ({"weight": "snr"}, (True, False)),
        ({"weight": "p2", "weight_settings": {"k": 1.0, "gamma": 0.0}}, (True, False)),
        ({"weight": "p2", "weight_settings": {"k": 1.0, "gamma": 0.5}}, (False, True)),
        ({"weight": "min_snr", "weight_settings": {"g": 5.0}}, (False, False)),
    ):
        assert tuple(bool(published.measured(each, [record(**faces, **made)])) for each in (baseline, weighted)) == fits
    assert published.measured(baseline, [record(**faces | {"sampler": "respaced_ddim"}, weight="snr")]) is None
    assert {entry.dataset for name in ("p2/1", "p2/quoted") for entry in published.table(name)} == set(
        DATASETS.values()
    )
    for other in ("edm-cifar10-cond-ddpmpp-E", "edm-cifar10-cond-ncsnpp-F"):
        assert published.measured(edm, [record(**ours, config=other)]) is None


def test_networks_of_others_are_known_by_their_output_and_sampler():
    theirs = {"method": "teacher", "config": "imported-baseline", "prediction": "vp", "conditional": False}
    heun = row("edm/sampler", detail="vp edm sampler")
    ours = theirs | {"sampler": "heun", "num_steps": 18, "network_evaluations": 35}
    assert published.measured(heun, [record(**ours)]).value == 3.21
    assert published.measured(heun, [record(**ours | {"prediction": "ve"})]) is None
    original = row("edm/sampler", detail="vp original")
    ours = theirs | {"sampler": "ablation", "num_steps": 256, "network_evaluations": 256}
    assert published.measured(original, [record(**ours, protocol="inception tf, solver euler, rho 7")]).value == 3.21
    assert published.measured(original, [record(**ours, protocol="inception tf, solver heun, rho 7")]) is None
    adm = theirs | {"dataset": "imagenet64", "conditional": True, "prediction": "iddpm", "network_evaluations": 511}
    stochastic = row("edm/text", detail="pretrained ADM, EDM stochastic sampler")
    assert published.measured(stochastic, [record(**adm, sampler="churn")]).value == 3.21
    assert published.measured(row("edm/text", detail="pretrained ADM, original sampler"), [record(**adm)]) is None


def test_seeds_are_averaged_and_the_newest_run_counts():
    old = record(value=9.0, params_hash="old", date="2026-01-01T00:00:00+00:00")
    new = [
        record(value=value, seed=seed, date=f"2026-02-0{seed + 1}T00:00:00+00:00") for seed, value in enumerate((3, 4))
    ]
    found = published.measured(row("progressive/2", **FOUR), [*new, old])
    assert (found.value, found.seeds) == (3.5, 2)


def pairs(table: str, *records: results.Record):
    return [(each, published.measured(each, records)) for each in published.table(table)]


def test_terminal_shows_both_and_what_is_missing():
    text = comparison.terminal("progressive/2", pairs("progressive/2", record()))
    assert text.startswith("progressive/2: 21 published figures, 1 of them measured here")
    (line,) = [line for line in text.splitlines() if " 4 " in line and "progressive" in line]
    assert line.split() == ["cifar10", "no", "progressive", "4", "ddim", "3.0", "3.21"]
    assert text.count("not measured") == 20
    assert "measured: progressive-cifar10: inception tf, cifar10-32x32.npz of 50000 images; 8 x TPU v4, 20" in text
    assert "?" not in text


def test_what_is_not_comparable_says_so():
    text = comparison.terminal(
        "progressive/2", pairs("progressive/2", record(num_samples=5000, weights_sha256="other"))
    )
    assert "3.21 (5 000 samples) (other feature network: not comparable)" in text


def test_unconfirmed_and_unknown_figures_are_marked():
    text = comparison.terminal("guided/1", pairs("guided/1"))
    assert "22.74?" in text
    assert "? recalled, not confirmed against the paper: no target" in text
    assert "not known" in text
    assert "15.39*" in comparison.terminal("progressive/quoted", pairs("progressive/quoted"))
    assert "diverges" in comparison.terminal("progressive/1", pairs("progressive/1"))


def test_markdown_has_the_same_cells():
    text = comparison.markdown("progressive/2", pairs("progressive/2", record()))
    assert "| cifar10 | no | progressive | 4 | ddim | 3.0 | 3.21 |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {8}


def test_csv_has_every_figure_with_its_provenance():
    lines = list(csv.DictReader(io.StringIO(comparison.comma_separated(pairs("progressive/2", record())))))
    assert len(lines) == 21
    (line,) = [line for line in lines if line["method"] == "progressive" and line["steps_or_nfe"] == "4"]
    assert float(line["measured"]) == 3.21
    assert line["measured_hardware"] == "8 x TPU v4"
    assert line["measured_num_samples"] == "50000"
    assert line["measured_date"].startswith("20")
    assert sum(bool(line["measured"]) for line in lines) == 1


@pytest.mark.parametrize("name", list(published.tables()))
def test_every_table_is_written(tmp_path, name):
    text = comparison.write(name, [record()], tmp_path)
    stem = name.replace("/", "_")
    written = {path.name for path in tmp_path.iterdir()}
    assert {f"{stem}.md", f"{stem}.csv"} <= written
    assert all(f"Written: {tmp_path / file}" in text for file in written)
    if name == "guided/1":
        assert {f"{stem}_fid_steps.png", f"{stem}_fid_is.png"} <= written
        assert (tmp_path / f"{stem}_fid_is.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_the_plots():
    steps = comparison.steps_curves(pairs("progressive/2", record(), record(num_steps=8, value=2.9)))
    ours = [curve for curve in steps if curve.origin == "measured"]
    assert [(curve.label, curve.points) for curve in ours] == [("progressive, ddim", ((4, 3.21), (8, 2.9)))]
    theirs = next(curve for curve in steps if curve.label == "progressive, ddim" and curve.origin == "published")
    assert theirs.points == ((1, 9.12), (2, 4.51), (4, 3.0), (8, 2.57))
    over_w = comparison.guidance_curves(pairs("guided/1"))
    curve = next(c for c in over_w if c.panel == "guided_distilled, deterministic" and c.label == "1 step")
    assert curve.points == ((25.51, 22.74), (37.09, 14.85), (75.19, 7.54), (157.46, 18.72))
    assert curve.names == ("0", "0.3", "1", "4")
    assert curve.origin == "recalled"
