"""A chain that is broken once in each way ends with the bits of one that is left alone. More: break_chain.py."""

import os
import random

import break_chain
import pytest

SEED = 3


@pytest.mark.slow
def test_a_chain_that_is_broken_in_every_way_equals_one_left_alone(tmp_path, monkeypatch):
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache)  # every start would compile anew
    chance = random.Random(SEED)
    library, disk = break_chain.compiled(tmp_path), break_chain.can_mount(tmp_path)
    faults = break_chain.possible(library, disk)
    chance.shuffle(faults)
    assert len(faults) >= 7
    lines = list(break_chain.trials(tmp_path, faults, chance, library, disk))
    shown = "\n".join(lines)
    assert not any(line.startswith("MISSED") for line in lines), shown
    assert sum("has the bits of the chain that was left alone" in line for line in lines) >= 1, shown
    print(shown)
