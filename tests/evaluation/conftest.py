"""Inception is no tiny network."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _optimised(optimised) -> None:
    """All tests of this folder are compiled as users' programs are."""
