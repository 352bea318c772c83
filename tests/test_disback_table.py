"""results/disback_table.py: its runs are what they are called, and the path counts in every comparison."""

import dataclasses

from configs import disback
from diffdistill.config import resolve
from results import disback_table


def records(distances, before=0):
    return [
        {"metric": metric, "update": 100 * number, "updates_before": before, "value": value}
        for number, distance in enumerate(distances, 1)
        for metric, value in (("frechet_to_data", distance), ("class_accuracy", 1.0 - distance))
    ]


def test_every_variant_differs_from_the_digits_in_what_it_says_alone():
    whole = resolve(disback.get_config("digits"))
    for variant, changes in disback_table.VARIANTS.items():
        found = disback_table.config_of(variant, 2, {"num_updates": 900})
        own = dataclasses.replace(whole.disback, num_updates=900, **changes)
        assert found == dataclasses.replace(whole, name=found.name, seed=2, disback=own)
    assert len({disback_table.name_of(variant, 0) for variant in disback_table.VARIANTS}) == len(disback_table.VARIANTS)


def test_a_speed_up_counts_the_path_and_each_seed_against_its_own_baseline():
    runs = {
        disback_table.BASELINE: {0: records([0.9, 0.5, 0.6]), 1: records([0.9, 0.8, 0.4])},
        "path of 5": {0: records([0.5, 0.45, 0.7], before=50), 1: records([0.6, 0.5, 0.5], before=50)},
    }
    baseline, path = disback_table.table(runs).splitlines()[2:]
    # Best distances .5 at 200 and .4 at 300; the path reaches .5 at 100 + 50 and never .4.
    assert "| 0.450 +- 0.071 | 250 +- 71 | 0.550 +- 0.071 | 200, 300 | 1.00 +- 0.00 |" in baseline
    assert "| 0.475 +- 0.035 | 250 +- 0 |" in path
    assert path.endswith("| 150, never | 1.33 |")


def test_without_a_baseline_nothing_is_compared():
    (line,) = disback_table.table({"path of 2": {0: records([0.3])}}).splitlines()[2:]
    assert line.endswith("| no baseline | - |")
