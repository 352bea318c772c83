"""The twelve cells of table 1 of Salimans & Ho 2022, outputs times loss weights, on the digits: one command, one table.

    python results/output_weight_table.py --folder=runs/cells --seeds=0

Each cell is a teacher of configs/digits.py with that output and weight, sampled with DDIM and ancestrally. A cell whose
loss stops being finite, or whose samples are farther from the data than noise is, counts as diverged. Killed, the same
command continues.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np

from configs import digits, progressive
from diffdistill import evaluate, runner
from diffdistill.config import Config, resolve
from diffdistill.data.pipeline import in_memory
from diffdistill.evaluation import metrics, moments, results
from diffdistill.judges import domain
from diffdistill.training.errors import NonFiniteLoss
from diffdistill.training.interrupt import catch_signals

SAMPLERS, STEPS = ("ancestral", "ddim"), 256


def cell(output: str, weight: str, seed: int, updates: int) -> Config:
    """The teacher of one cell."""
    settings = digits.get_config()
    settings.name = f"digits-{output}-{weight}"
    settings.seed = seed
    settings.model.prediction, settings.teacher.weight = output, weight
    settings.teacher.num_updates = updates
    settings.guided.num_updates = settings.progressive.num_updates = 0
    settings.evaluation.samplers, settings.evaluation.num_steps = SAMPLERS, (STEPS,)
    settings.evaluation.guidance = (0.0,)
    return resolve(settings)


def measure(config: Config, folder: Path, interrupt) -> dict[str, float | None]:
    """Frechet distance to the data by sampler; None where the training diverged."""
    run = runner.prepare(config, str(folder))
    try:
        runner.train(run, interrupt)
    except NonFiniteLoss as error:
        print(error)
        return dict.fromkeys(SAMPLERS)
    source = in_memory(run.source)
    evaluate.evaluate(run.workdir, source, interrupt)
    found = {
        record["sampler"]: record["value"]
        for record in results.read(folder / evaluate.RESULTS)
        if record["metric"] == "frechet_to_data" and record["num_steps"] == STEPS
    }
    limit = distance_of_noise(run, source)
    return {sampler: value if value < limit else None for sampler, value in found.items()}


def distance_of_noise(run: runner.Run, source) -> float:
    """The Frechet distance of uniform noise to the data: what no model that learnt anything reaches."""
    judge = domain.make(run.workdir, source, print)
    noise = np.random.default_rng(0).integers(0, 256, (1000, *source.image_shape), dtype=np.uint8)
    own, data = moments.moments_of(judge.network.features(noise)), judge.data
    return metrics.frechet_distance(own.mean(), own.covariance(), data.mean(), data.covariance())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/cells"))
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--updates", type=int, default=1500)
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    print_rows = ["| output | weight | " + " | ".join(SAMPLERS) + " |", "|---" * (2 + len(SAMPLERS)) + "|"]
    with catch_signals() as interrupt:
        for output in progressive.OUTPUTS:
            for weight in progressive.WEIGHTS:
                found = [
                    measure(
                        cell(output, weight, seed, arguments.updates),
                        arguments.folder / f"{output}-{weight}-{seed}",
                        interrupt,
                    )
                    for seed in seeds
                ]
                shown = " | ".join(text([values.get(sampler) for values in found]) for sampler in SAMPLERS)
                print_rows.append(f"| {output} | {weight} | {shown} |")
                print(print_rows[-1], flush=True)
    print("\n" + "\n".join(print_rows))


def text(values: list[float | None]) -> str:
    """Mean over seeds and, of several, their standard deviation."""
    kept = [value for value in values if value is not None]
    if len(kept) < len(values):
        return "diverges"
    spread = f" +- {statistics.stdev(kept):.2g}" if len(kept) > 1 else ""
    return f"{statistics.mean(kept):.3g}{spread}"


if __name__ == "__main__":
    main()
