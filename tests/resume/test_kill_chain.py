"""A chain that is stopped at random moments ends with the bits of one that is not. More kills: kill_chain.py."""

import random
import signal

import kill_chain

UPDATES = 24


def test_a_chain_that_is_killed_and_stopped_equals_one_left_alone(tmp_path):
    seed = random.randrange(10**6)
    signals = [signal.SIGTERM, signal.SIGKILL]
    total = kill_chain.whole(tmp_path / "whole", UPDATES)
    assert total == 4 * UPDATES  # teacher, guided, two rounds
    lines = kill_chain.cut(tmp_path / "cut", signals, UPDATES, total, random.Random(seed))
    print(f"seed {seed}", *lines, sep="\n")  # shown where the test fails
    assert kill_chain.differing(tmp_path / "whole", tmp_path / "cut") == []
