"""results/p2_table.py: what a cell runs and how cells become a table."""

import json

import pytest

from results import p2_table


def write(folder, dataset, cell, values):
    place = p2_table.workdir(folder, dataset, cell) / "evaluation"
    place.mkdir(parents=True)
    others = {"network_evaluations": 25, "w": 0.0, "num_samples": 100, "seed": 0, "hardware": "1 x cpu"}
    others |= {"wall_time": 1.0, "date": "2026-11-27", "params_hash": "0"}
    lines = [
        {**others, "stage": "teacher", "metric": metric, "sampler": sampler, "num_steps": steps, "value": value}
        for (metric, sampler, steps), value in values.items()
    ]
    (place / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_table_has_mean_and_spread_of_the_seeds_that_are_there(tmp_path):
    for seed, value in enumerate((1.0, 2.0, 4.5)):
        values = {
            ("frechet_to_data", "respaced", 25): value,
            ("frechet_to_data", "ddim", 250): 7.0,  # the reference of the evaluation
            ("class_accuracy", "respaced", 25): 0.5,
        }
        write(tmp_path, "digits", ("linear", "0.5", seed), values)
    write(tmp_path, "digits", ("cosine", "1", 2), {("frechet_to_data", "respaced_ddim", 10): 3.0})
    lines = p2_table.table(tmp_path, "digits", [0, 1, 2]).splitlines()
    assert lines[0] == "| schedule | gamma | ancestral, 25 steps | DDIM, 10 steps |"
    assert "| linear | 0.5 | 2.5 +- 1.8 (3) | - |" in lines
    assert "| cosine | 1 | - | 3 |" in lines
    assert len(lines) == 8


def test_a_cell_is_a_run_of_its_row_and_its_failure_names_it(tmp_path, monkeypatch):
    cell = ("cosine", "0.5", 2)
    made = p2_table.command(tmp_path, "fashion", cell, ["--config.data.path=x"])
    assert [part for part in made if part.endswith("p2.py:fashion-cosine-0.5")]
    assert made[-2:] == ["--config.seed=2", "--config.data.path=x"]
    monkeypatch.setattr(p2_table, "command", lambda *_: ["sh", "-c", "echo it broke; exit 3"])
    with pytest.raises(RuntimeError, match=r"fashion-cosine-0.5-2 ended with code 3: it broke"):
        p2_table.run(tmp_path, "fashion", cell, [])
