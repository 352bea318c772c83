"""From images to figures: the feature network on all devices, statistics of a source, and what both give together."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffdistill.data.contract import DataError, Source
from diffdistill.data.pipeline import gather
from diffdistill.data.unlabelled import open_unlabelled
from diffdistill.evaluation import image_statistics, inception, metrics, reference, scores, stream
from diffdistill.evaluation.image_statistics import Chunk, ImageStatistics
from diffdistill.evaluation.inception import FeatureExtractor
from diffdistill.evaluation.partial import Partial
from diffdistill.evaluation.reference import Reference, StatisticsError
from diffdistill.evaluation.stream import Accumulated
from diffdistill.training import mesh as meshes
from diffdistill.training import processes
from diffdistill.training.interrupt import Interrupt

BLOCK, BLOCK_CPU = 64, 16  # images that pass through the network of one device at once; CPUs are faster with few
ROWS = 256  # images of one chunk for each accelerator
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
METRICS = ("fid", "sfid", "is", "kid", "precision", "recall")


@dataclass(frozen=True)
class Network:
    """The Inception network, compiled for all devices of all processes."""

    extractor: FeatureExtractor
    variables: Any

    def extract(self, images: jax.Array) -> Mapping[str, jax.Array]:
        """images (B, H, W, 1 or 3) uint8, sharded by rows -> the arrays of TAPS, (B, d) float32, sharded so."""
        return _extract(self.extractor.protocol)(self.variables, images)

    def text(self) -> str:
        """Protocol and weights in words."""
        return f"inception {self.extractor.protocol}, weights {self.extractor.weights_sha256[:12]}"

    def facts(self) -> dict[str, Any]:
        """What a record of results says about the network."""
        return {"features": "inception", "weights_sha256": self.extractor.weights_sha256}

    def read_reference(self, path: str, stated_protocol: str) -> Reference:
        """Reference statistics from a file, checked to be of this network and protocol. Raises StatisticsError."""
        found = processes.on_main(
            lambda: reference.read(
                path,
                protocol=self.extractor.protocol,
                stated_protocol=stated_protocol,
                weights_sha256=self.extractor.weights_sha256,
            )
        )
        for what, mean, needed in (("mu", found.mean, 2048), ("mu_s", found.spatial_mean, 2023)):
            if mean is not None and len(mean) != needed:
                raise StatisticsError(
                    f"{path}: {what} has {len(mean)} entries, but the features compared here have {needed}. Give "
                    "statistics of the 2048 pooled features (and the 2023 spatial ones, where it has them)."
                )
        return found

    def reference_of(self, source: Source, limit: int, capacity: int, cache: Path, interrupt: Interrupt) -> Reference:
        """Reference statistics of a data source: read from `cache`, or computed and written there.

        Args:
          source: any images.
          limit: how many of them, thinned out evenly; 0: all.
          capacity: how many keep their features.
          cache: folder of the main process; also for what a killed computation had.
          interrupt: looked at after every chunk.

        Raises:
          EvaluationInterrupted: a signal arrived; the same call continues.
          DataError, FeaturesError: an image cannot be read, or has features that are not finite.
        """
        identity = f"{self.text()} {source.fingerprint()} {limit} {capacity}"
        path = Partial(cache, identity).path.with_suffix(".npz")
        if not processes.on_main(path.exists):
            self.write_reference(path, source, limit, capacity, interrupt)
        return self.read_reference(str(path), "")

    def with_features(self, found: Reference, path: str, capacity: int, cache: Path, interrupt: Interrupt) -> Reference:
        """A reference read from `path`, with features of the images that lie beside its statistics, as in ADM's files.

        Other arguments and errors are those of `reference_of`.
        """
        if found.features is not None or not processes.on_main(lambda: reference.holds_images(path)):
            return found
        beside = self.reference_of(open_unlabelled(path), 0, capacity, cache, interrupt)
        return dataclasses.replace(found, features=beside.features)

    def write_reference(self, path: Path, source: Source, limit: int, capacity: int, interrupt: Interrupt) -> None:
        """Computes reference statistics and writes them to `path`; arguments and errors are those of `reference_of`."""
        if len(source) < 2:
            raise DataError(f"{source.name} has {len(source)} image; statistics need 2 or more")
        chosen = np.arange(len(source))
        if limit and limit < len(source):
            chosen = np.linspace(0, len(source) - 1, limit).astype(np.int64)
        identity = f"{self.text()} {source.fingerprint()} {limit} {capacity}"
        partial = Partial(path.parent / ".partial", identity)
        statistics = self.statistics_of(source, chosen, capacity, partial, interrupt).statistics
        if processes.is_main():
            provenance = {
                "protocol": self.extractor.protocol,
                "weights_sha256": self.extractor.weights_sha256,
                "source": source.name,
                "fingerprint": source.fingerprint(),
                "image_shape": list(source.image_shape),
            }
            reference.write(path, reference.of_statistics(statistics, provenance))
            partial.remove()

    def statistics_of(
        self, source: Source, chosen: np.ndarray, capacity: int, partial: Partial, interrupt: Interrupt
    ) -> Accumulated:
        """Passes the images with the numbers `chosen` through the network; see stream.accumulate."""
        mesh = meshes.make_mesh()
        # On accelerators several blocks at once, or the host's share of the work, per chunk, would set the pace.
        size = mesh.size * (ROWS if meshes.is_accelerator(mesh) else BLOCK_CPU)
        rows = slice(*meshes.process_slice(size))

        def chunks(first: int) -> Iterator[Chunk]:
            for start in range(first, len(chosen), size):
                places = np.minimum(np.arange(start, start + size), len(chosen) - 1)
                images = gather(source, chosen[places[rows]])["image"]
                yield Chunk(meshes.shard_batch(mesh, images), start, min(start + size, len(chosen)))

        title = f"statistics of {source.name}"
        nothing = image_statistics.empty(len(chosen), capacity)
        return stream.accumulate(chunks, self.extract, nothing, len(chosen), partial, interrupt, title)


def load(path: str, protocol: str, accept_sha256: str) -> Network:
    """The network from a file, by default the one of the environment variable or the cache. Raises WeightsError."""
    extractor = inception.load(path, protocol, accept_sha256)
    return Network(extractor, meshes.replicate(meshes.make_mesh(), extractor.variables, copy=False))


def _block(mesh: Mesh) -> int:
    return BLOCK if meshes.is_accelerator(mesh) else BLOCK_CPU


@functools.cache
def _extract(protocol: str) -> Any:
    """(variables, images sharded by rows) -> taps, on every device in blocks: images of 299x299 fill memory fast."""
    mesh = meshes.make_mesh()

    def on_device(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        block = min(len(images), _block(mesh))
        padding = [(0, -len(images) % block), *[(0, 0)] * 3]
        blocks = jnp.pad(images, padding).reshape(-1, block, *images.shape[1:])
        taps = jax.lax.map(lambda x: inception.apply(variables, x, protocol, image_statistics.TAPS), blocks)
        return {name: values.reshape(-1, values.shape[-1])[: len(images)] for name, values in taps.items()}

    return jax.jit(meshes.per_device(mesh, on_device))


def metrics_against(against: Reference, num_samples: int) -> tuple[str, ...]:
    """The metrics that reference statistics and a number of samples (2 or more) allow."""
    absent = _absent(against, num_samples)
    return tuple(name for name in METRICS if name not in absent)


def say_left_out(against: Reference, num_samples: int, say: Callable[[str], Any]) -> None:
    """Says which metrics `metrics_against` leaves out, and why."""
    for reason, names in itertools.groupby(_absent(against, num_samples).items(), lambda item: item[1]):
        say(f"left out: {', '.join(name for name, _ in names)} ({reason})")


def _absent(against: Reference, num_samples: int) -> dict[str, str]:
    """Why, by metric that cannot be computed."""
    absent: dict[str, str] = {}
    if against.spatial_mean is None:
        absent["sfid"] = "the reference has no statistics of spatial features"
    if num_samples < scores.SPLITS:
        absent["is"] = f"it needs {scores.SPLITS} samples"
    fewest = num_samples if against.features is None else min(num_samples, len(against.features))
    for name, needed in (("kid", 2), ("precision", scores.NEIGHBOURS + 1), ("recall", scores.NEIGHBOURS + 1)):
        if against.features is None:
            absent[name] = "the reference has no features of single images; --mode=statistics keeps some"
        elif fewest < needed:
            absent[name] = f"it needs {needed} samples and as many images of the reference"
    return absent


def figures(
    statistics: ImageStatistics, against: Reference, wanted: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """({metric: value}, {metric: standard deviation over parts of the samples}) of the metrics `wanted`.

    `wanted` are some of `metrics_against`. KID is given as it is; papers print it times 1000. Precision and recall are
    fractions.
    """
    values: dict[str, float] = {}
    spreads: dict[str, float] = {}
    own, theirs = statistics.features.features, against.features
    if "fid" in wanted:
        pool = statistics.pool
        values["fid"] = metrics.frechet_distance(pool.mean(), pool.covariance(), against.mean, against.covariance)
    if "sfid" in wanted and against.spatial_mean is not None and against.spatial_covariance is not None:
        spatial = statistics.spatial
        values["sfid"] = metrics.frechet_distance(
            spatial.mean(), spatial.covariance(), against.spatial_mean, against.spatial_covariance
        )
    if "is" in wanted:
        values["is"], spreads["is"] = scores.inception_score(statistics.scores)
    if "kid" in wanted and theirs is not None:
        size = min(KID_SUBSET_SIZE, len(own), len(theirs))
        values["kid"], spread = scores.kid(own, theirs, num_subsets=KID_SUBSETS, subset_size=size)
        if size < max(len(own), len(theirs)):  # otherwise all subsets are one
            spreads["kid"] = spread
    if {"precision", "recall"} & set(wanted) and theirs is not None:
        both = dict(zip(("precision", "recall"), scores.precision_recall(theirs, own), strict=True))
        values |= {name: value for name, value in both.items() if name in wanted}
    return values, spreads
