"""These tests share the toy of tests/training and the helpers of tests/resume."""

import sys
from pathlib import Path

for room in ("training", "resume"):
    sys.path.insert(0, str(Path(__file__).parents[1] / room))
