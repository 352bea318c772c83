"""A chain that is broken in several ways ends with the bits of one that is left alone. More: break_chain.py."""

import os
import random

import break_chain
import pytest

KINDS = (
    ("kill", "terminate", "interrupt"),
    ("failing call", "nan batch", "full disk", "read-only"),
    ("lost machine",),
    break_chain.DAMAGES,
)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_a_chain_that_is_broken_again_and_again_equals_one_left_alone(tmp_path, monkeypatch):
    """One fault of each kind, which ones is a matter of chance."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache)  # every start would compile anew
    monkeypatch.setattr(break_chain, "UPDATES", 12)
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    library, disk = break_chain.compiled(tmp_path), break_chain.can_mount(tmp_path)
    possible = break_chain.possible(library, disk)
    assert {fault for kind in KINDS for fault in kind} == set(break_chain.FAULTS)
    faults = [chance.choice([fault for fault in kind if fault in possible]) for kind in KINDS]
    chance.shuffle(faults)
    lines = list(break_chain.trials(tmp_path, faults, chance, library, disk))
    shown = "\n".join((f"seed {seed}", *lines))
    assert not any(line.startswith("MISSED") for line in lines), shown
    assert sum("has the bits of the chain that was left alone" in line for line in lines) >= 1, shown
    print(shown)
