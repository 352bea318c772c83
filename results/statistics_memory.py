"""Passes images through the statistics of an evaluation and records the memory of the process on the way.

    python results/statistics_memory.py --num=50000 --out=results/statistics_memory.jsonl
    python results/statistics_memory.py --num=2000 --inception_weights=PATH

The images are a file of random 32x32 pictures. Without weights a stand-in of a few operations gives features of the
right sizes, so that 50,000 images take minutes on a CPU and what is measured is everything but the network itself.
"""

import argparse
import json
import resource
import tempfile
import time
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffdistill.data.unlabelled import open_unlabelled
from diffdistill.evaluation import measuring, stream
from diffdistill.evaluation.inception import FeatureExtractor
from diffdistill.evaluation.measuring import Network
from diffdistill.evaluation.stream import Partial
from diffdistill.training import mesh as meshes
from diffdistill.training.interrupt import Interrupt
from diffdistill.weights import fetch


class StandIn(Network):
    """Features of the right sizes out of a few operations."""

    def extract(self, images: jax.Array) -> dict[str, jax.Array]:
        return _stand_in(images)


@jax.jit
def _stand_in(images: jax.Array) -> dict[str, jax.Array]:
    x = images.reshape(len(images), -1)[:, :64].astype(jnp.float32) / 255
    sides = {"2048": 2048, "sfid": 2023, "logits_unbiased": 1008}
    return {tap: jax.nn.relu(x @ jax.random.normal(jax.random.key(side), (64, side))) for tap, side in sides.items()}


def resident() -> float:
    """Memory of this process now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=50_000)
    parser.add_argument("--inception_weights", default="", help="file of the network, any weights")
    parser.add_argument("--every", type=int, default=2_500, help="images between two records of memory")
    parser.add_argument("--out", default="", help="file for the records")
    arguments = parser.parse_args()
    if arguments.inception_weights:
        path = Path(arguments.inception_weights)
        network = measuring.load(str(path), "tf", fetch.sha256(path))
    else:
        network = StandIn(FeatureExtractor({}, "tf", "stand-in"), None)

    records = []

    def watched(images: jax.Array) -> dict[str, jax.Array]:
        taps = extract(images)
        done[0] += len(images)
        if done[0] // arguments.every > len(records) - 1:
            records.append({"images": done[0], "resident_mb": round(resident())})
        return taps

    extract, done = network.extract, [0]
    object.__setattr__(network, "extract", watched)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        images = np.lib.format.open_memmap(path, "w+", np.uint8, (arguments.num, 32, 32, 3))
        random = np.random.default_rng(0)
        for start in range(0, arguments.num, 1000):
            images[start : start + 1000] = random.integers(0, 256, images[start : start + 1000].shape, dtype=np.uint8)
        del images
        start = time.monotonic()
        found = network.statistics_of(
            open_unlabelled(path), np.arange(arguments.num), 10_000, Partial(Path(folder) / "partial", ""), Interrupt()
        )
        seconds = time.monotonic() - start
    facts = {
        "num": found.statistics.pool.count,
        "network": network.text(),
        "seconds": round(seconds, 1),
        "images_per_second": round(arguments.num / seconds, 1),
        "pace": found.pace.text() if found.pace else "",
        "saved_every_s": stream.SAVE_SECONDS,
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "hardware": meshes.describe(meshes.make_mesh()),
        "date": date.today().isoformat(),
    }
    lines = "".join(json.dumps(entry) + "\n" for entry in (*records, facts))
    print(lines, end="")
    if arguments.out:
        Path(arguments.out).write_text(lines)


if __name__ == "__main__":
    main()
