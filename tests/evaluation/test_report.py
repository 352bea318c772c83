"""Table and page hold every number given, and say what is missing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from diffdistill.evaluation import images, plots, program, report, tables


def entry(
    stage: str, num_steps: int, value: float, metric: str = "frechet_to_data", w: float | None = 0.0, **more: Any
):
    return {
        "stage": stage,
        "num_steps": num_steps,
        "network_evaluations": num_steps * (2 if stage == "teacher" else 1),
        "sampler": "ddim",
        "w": w,
        "metric": metric,
        "value": value,
        "seed": 0,
        **more,
    }


RESULTS = [
    entry("teacher", 1, 231.4),
    entry("teacher", 2, 54.3),
    entry("teacher", 256, 5.71),
    entry("guided", 2, 47.2),
    entry("round_06_steps_0002", 2, 9.13),
    entry("round_07_steps_0001", 1, 9.62),
    entry("teacher", 2, 48.4, "frechet_to_teacher"),
    entry("round_06_steps_0002", 2, 4.12, "frechet_to_teacher"),
    entry("teacher", 2, 0.314, "paired_rmse_to_teacher"),
    entry("round_06_steps_0002", 2, 0.159, "paired_rmse_to_teacher"),
    entry("teacher", 2, 0.912, "class_accuracy", w=2.0),
    entry("round_06_steps_0002", 2, 0.987, "class_accuracy", w=2.0),
]
NUMBERS = ("231", "54.3", "5.71", "47.2", "9.13", "9.62", "48.4", "4.12", "0.314", "0.159", "91.2 %", "98.7 %")
COSTS = [
    {"stage": "teacher", "updates": 1200, "flops": 2.0e14, "wall_seconds": 130.0},
    {"stage": "guided", "updates": 400, "flops": 1.0e14, "wall_seconds": 50.0, "batch_size": 256},
    {"stage": "round_00_steps_0002", "updates": 200, "flops": 0.7e14, "wall_seconds": 41.0},
]


class Page(HTMLParser):
    """Text and attributes of a page; checks that tags are closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[Any, Page]:
    folder = tmp_path_factory.mktemp("report")
    images.save_png(folder / "grids" / "teacher.png", np.zeros((20, 20, 1), np.uint8))
    page = report.write_report(
        folder / "report.html",
        title="digits <one>",
        results=RESULTS,
        losses=[{"stage": "teacher", "step": step, "loss": 1 / step} for step in range(1, 40)]
        + [{"step": 3, "note": 1}],
        grids=[
            {"path": "grids/teacher.png", "stage": "teacher", "num_steps": 2, "w": 0.0},
            {"path": "grids/lost.png", "stage": "guided", "num_steps": 2, "w": 0.0},
        ],
        facts={"jax": "0.10.2", "command": "python main.py & wait"},
        costs=COSTS,
    )
    return folder, Page(page.read_text())


def test_page_holds_every_number(full) -> None:
    _, page = full
    for number in (*NUMBERS, "1 200", "200 T", "100 T", "70.0 T", "2 min 10 s", "50.0 s", "41.0 s", "256", "0.10.2"):
        assert number in page.text, number
    assert "python main.py & wait" in page.text
    assert "digits <one>" in page.text
    assert "0.85" in page.text  # (1.0 + 0.7) / 2.0 of the teacher's FLOPs
    assert "0.70" in page.text  # (50 + 41) / 130 of its time
    assert "FID" in page.text
    assert "not FID" in page.text


def test_page_needs_nothing_from_elsewhere(full) -> None:
    folder, page = full
    assert all(re.match(r"#|data:image/png;base64,", reference) for reference in page.references)
    assert sum(reference.startswith("data:") for reference in page.references) == 2 * 2 + 2 * 1 + 1
    anchors = [reference[1:] for reference in page.references if reference.startswith("#")]
    source = (folder / "report.html").read_text()
    assert all(f'id="{anchor}"' in source for anchor in anchors)
    assert "url(" not in source
    assert "prefers-color-scheme: dark" in source


def test_plots_lie_beside_the_page(full) -> None:
    folder, _ = full
    names = {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
    assert names == {
        "distance.png",
        "grids/teacher.png",
        *(
            f"plots/{theme}{name}.png"
            for theme in ("", "dark/")
            for name in ("frechet_to_data_w0", "frechet_to_teacher_w0", "loss_teacher")
        ),
    }
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_plots_are_drawn_again_where_what_they_show_or_what_draws_them_has_changed(tmp_path, monkeypatch):
    drawn = []
    original = plots.png_bytes
    monkeypatch.setattr(plots, "png_bytes", lambda figure: drawn.append(figure) or original(figure))
    monkeypatch.setattr(program, "revision", lambda: "v1-1-gabc")

    def pictures(results=RESULTS, title="one"):
        drawn.clear()
        page = report.write_report(
            tmp_path / "report.html",
            title=title,
            results=results,
            losses=[{"stage": "teacher", "step": 1, "loss": 1.0}],
        )
        assert title in page.read_text()
        return len(drawn), sorted(re.findall(r"data:image/png;base64,[^\"]+", page.read_text()))

    count, first = pictures()
    assert count == 1 + 2 * 3
    assert pictures(title="two") == (0, first)
    (tmp_path / "plots" / "dark" / "loss_teacher.png").unlink()
    assert pictures() == (1, first)
    more, others = pictures([*RESULTS[:-1], entry("teacher", 4, 20.0)])
    assert more == count
    assert others != first
    assert pictures()[0] == count
    for revision in ("v1-2-gdef", "v1-2-gdef-dirty", "v1-2-gdef-dirty", "v1-2-gdef"):
        monkeypatch.setattr(program, "revision", lambda revision=revision: revision)
        assert pictures() == (count, first)
    assert pictures() == (0, first)

    def stopped(figure):
        raise KeyboardInterrupt

    changed = [*RESULTS[:-1], entry("teacher", 8, 10.0)]
    with monkeypatch.context() as patch:
        patch.setattr(plots, "png_bytes", stopped)
        with pytest.raises(KeyboardInterrupt):
            pictures(changed)
    assert pictures() == (count, first)  # some are of the other figures


def test_missing_pieces_are_named(full, tmp_path) -> None:
    folder, page = full
    assert f"{folder / 'grids/lost.png'} is missing" in page.text
    assert "No sample grids at this guidance weight." in page.text  # w = 2
    assert "No distances measured at this guidance weight." in page.text
    empty = Page(report.write_report(tmp_path / "report.html", title="empty").read_text()).text
    for text in ("No results yet.", "No stage costs recorded.", "No loss curves recorded.", "No facts recorded."):
        assert text in empty
    half = report.write_report(
        tmp_path / "half.html",
        title="half",
        results=[entry("teacher", 4, 0.0, w=None)],
        grids=[{"path": "gone.png", "stage": "teacher", "num_steps": 1, "w": 3.0}],
        losses=[{"stage": "teacher", "step": 1, "loss": float("nan")}],
        costs=[{"stage": "teacher", "updates": 5}],
    )
    assert "without guidance weight" in half.read_text()
    assert "w = 3" in half.read_text()


def test_terminal_table_holds_every_number_in_its_place() -> None:
    text = tables.terminal_table(RESULTS)
    for number in NUMBERS:
        assert number in text, number
    lines = text.splitlines()
    assert lines[0] == "w = 0"
    header = lines[1].split()
    assert header == ["sampling", "steps", "1", "2", "256"]
    data = {line.split("  ")[2].strip(): line.split()[-3:] for line in lines[3:6]}
    assert data["teacher (DDIM)"] == ["231", "54.3", "5.71"]
    assert data["guided student"] == ["-", "47.2", "-"]
    assert data["distilled students"] == ["9.62*", "9.13*", "-"]
    assert "w = 2" in lines
    assert "98.7 %*" in text  # the higher accuracy is the better one
    assert tables.terminal_table([]) == "no results yet\n"


def test_a_halving_student_at_another_step_count_has_its_own_row() -> None:
    assert tables.row_label("round_03_steps_0016", 16) == tables.DISTILLED
    assert tables.row_label("stochastic_03_steps_0002", 2) == tables.STOCHASTIC
    assert tables.row_label("stochastic_03_steps_0002", 1) == tables.STOCHASTIC  # which no round is for
    assert tables.row_label("round_03_steps_0002", 1) == "round_03_steps_0002"
    assert tables.row_label("round_03_steps_0016", 8) == "round_03_steps_0016"
    assert tables.row_label("teacher", 8, "ancestral") == "teacher (ancestral)"


def test_seeds_are_averaged_and_repeated_measurements_replaced() -> None:
    repeated = [entry("guided", 4, value, seed=seed) for value, seed in ((100.0, 0), (2.0, 0), (4.0, 1))]
    ((block,),) = tables.arrange(repeated).values()
    assert block.rows == (tables.Row("guided student", {4: 3.0}),)
    assert block.best(4) == ()  # nothing to compare with


def test_equal_digits_are_both_best_and_samplers_kept_apart() -> None:
    rows = [entry("guided", 4, 2.0), entry("guided", 4, 2.001, sampler="ancestral"), entry("teacher", 4, 3.0)]
    ((block,),) = tables.arrange(rows).values()
    assert [row.label for row in block.best(4)] == ["guided student (DDIM)", "guided student (ancestral)"]


def test_cost_ratio_counts_every_stage_but_the_teacher() -> None:
    assert tables.cost_ratios(COSTS) == pytest.approx({"updates": 0.5, "flops": 0.85, "wall_seconds": 0.7})
    assert tables.cost_ratios(COSTS[:1]) == {}
    assert "flops" not in tables.cost_ratios([*COSTS, {"stage": "extra", "updates": 1, "wall_seconds": 1.0}])
    text = tables.terminal_costs(COSTS)
    assert text.splitlines()[-1].split()[-3:] == ["0.50", "0.85", "0.70"]
    assert tables.terminal_costs([]) == "no stage costs recorded\n"


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (tables.three_digits, 0.0, "0.00"),
        (tables.three_digits, 9.996, "10.0"),
        (tables.three_digits, 54.06, "54.1"),
        (tables.three_digits, 12345.0, "12345"),
        (tables.three_digits, 0.000123, "1.23e-04"),
        (tables.si, 1.23e15, "1.23 P"),
        (tables.si, 12.0, "12.0"),
        (tables.duration, 9.54, "9.5 s"),
        (tables.duration, 125.0, "2 min 05 s"),
        (tables.duration, 11520.0, "3 h 12 min"),
    ],
)
def test_numbers_are_written_for_people(function, value: float, text: str) -> None:
    assert function(value) == text
