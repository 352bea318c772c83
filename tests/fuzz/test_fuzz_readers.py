"""A few changed files, and every hostile one, for each reader. Many more: fuzz_readers.py."""

import random
from collections import Counter

import fuzz_readers
import pytest
import readers
from reader import ROOT


@pytest.mark.slow
def test_no_reader_does_anything_but_read_or_refuse(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    seed = random.randrange(10**6)
    counts = fuzz_readers.fuzz([], inputs=6, seed=seed)
    total = sum(counts.values(), Counter())
    assert total["finding"] == 0, f"seed {seed}: {capsys.readouterr().out}"
    assert total["refused"] > total["accepted"]
    complete = [name for name, reader in readers.known(tmp_path / "owned").items() if reader.complete]
    assert all(counts[name]["accepted"] for name in complete), counts
