"""main.py, but a run at an address is copied twice a second."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from diffdistill import cli, store

store.PERIOD = 0.5
cli.main()
