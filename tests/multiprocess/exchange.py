"""What one process of a job does in test_processes.py: PORT NUMBER."""

import sys

import numpy as np

from diffdistill.training import processes
from diffdistill.training.errors import OtherProcessFailed

port, number = int(sys.argv[1]), int(sys.argv[2])
processes.initialize(True, coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=number)

thirds = np.arange(5, dtype=np.float64) / 3  # which float32 would round
sent = processes.from_main(thirds if number == 0 else np.zeros(5))
assert sent.dtype == np.float64
np.testing.assert_array_equal(sent, thirds)
assert processes.from_main(np.float32(number + 7)).shape == ()
assert processes.from_main(np.zeros((0, 3))).shape == (0, 3)

called = []
found = processes.on_main(lambda: called.append(number) or {"from": number, "long": "x" * 5000})
assert found == {"from": 0, "long": "x" * 5000}
assert called == ([0] if number == 0 else [])
assert processes.on_main(lambda: None) is None

shares = []
processes.gather(bytes([number]) * (3 + 2000 * number), lambda *share: shares.append(share))
assert shares == ([(0, b"\0" * 3), (1, b"\1" * 2003)] if number == 0 else [])

processes._PIECE = 1024  # what is longer goes in pieces
assert processes.on_main(lambda: b"ab" * 3333) == b"ab" * 3333


for text in ("first", "lost"):
    if number == 0:
        processes.tell("the end", text)
    else:
        assert processes.told("the end") == text


def fail() -> None:
    raise ValueError("the disk is full")


try:
    processes.on_main(fail)
except ValueError as error:
    print(error)
except OtherProcessFailed as error:
    print(error)
