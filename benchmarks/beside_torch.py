"""Training updates of our networks here, in JAX and in PyTorch, in turns: JSON lines and a table.

    pip install -e '.[parity]' && python benchmarks/beside_torch.py --small
    python benchmarks/beside_torch.py --device=cuda --dtype=bfloat16 --compile --out=results/h200/beside_torch.jsonl

Every program has the machine to itself. --small: networks, batches and times for two CPU cores. The number of
parameters must be the same in both, or the comparison is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Config, and the batch and the channels of --small (0: as the config has them).
NETWORKS = {"digits": ("configs/digits.py", 64, 0), "ddpmpp": ("configs/edm.py:cifar10-cond-ddpmpp-F", 8, 64)}


def lines(command: list[str], platform: str) -> list[dict[str, Any]]:
    """The JSON lines of a program."""
    environment = {**os.environ, "JAX_PLATFORMS": platform, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def in_jax(name: str, options: argparse.Namespace) -> dict[str, Any]:
    config, batch, channels = NETWORKS[name]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.jsonl"
        command = [sys.executable, "main.py", "--mode=benchmark", f"--config={config}", f"--out={out}"]
        command += [f"--dtypes={options.dtype}", f"--benchmark_seconds={options.seconds}"]
        command += ["--config.teacher.augmentation=0.0", "--config.training.updates_per_call=1"]
        command.append(f"--traced={options.traced}")
        if options.small or options.batch:
            command.append(f"--config.teacher.batch_size={batch if options.small else options.batch}")
        if options.small and channels:
            command.append(f"--config.model.channels={channels}")
            command.append(f"--config.model.embedding={4 * channels}")
        lines(command, "cpu" if options.device == "cpu" else "cuda,cpu")
        record = json.loads(out.read_text())
    return {**record, "network": name, "framework": f"jax {record['jax']}"}


def in_torch(name: str, batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, str(HERE / "torch_networks.py"), name, f"--batch={batch}", f"--dtype={options.dtype}"]
    command += [f"--seconds={options.seconds}", f"--device={options.device}", f"--traced={options.traced}"]
    if options.small and NETWORKS[name][2]:
        command.append(f"--channels={NETWORKS[name][2]}")
    return lines(command + ["--compile"] * options.compile, "cpu")


def main() -> None:
    """The command lines at the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="digits,ddpmpp")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument("--traced", type=int, default=0, help="further updates that the profiler watches, on CPUs")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    rates: dict[tuple[str, str], list[float]] = {}
    for name in options.networks.split(","):
        for _ in range(options.repeats):
            ours = in_jax(name, options)
            theirs = in_torch(name, ours["batch_size"], options)
            if any(record["parameters"] != ours["parameters"] for record in theirs):
                sys.exit(f"{name} has {ours['parameters']} parameters here and {theirs[0]['parameters']} in PyTorch")
            for record in (ours, *theirs):
                print(json.dumps(record), flush=True)
                if options.out:
                    with open(options.out, "a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
                rates.setdefault((name, record["framework"]), []).append(record["images_per_second"])
    medians = {key: statistics.median(found) for key, found in rates.items()}
    print("\n| network | framework | images/s (median) | an update takes, in updates of JAX |\n|---|---|---|---|")
    for (name, framework), rate in medians.items():
        ours = next(each for (of, by), each in medians.items() if of == name and by.startswith("jax"))
        print(f"| {name} | {framework} | {rate:.4g} | {ours / rate:.2f} |")


if __name__ == "__main__":
    main()
