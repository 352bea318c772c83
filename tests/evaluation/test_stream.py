"""Statistics of a stream of images: the same in any order, in parts, after a kill; nothing of padding; NaN refused."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdistill.data.contract import DataError
from diffdistill.evaluation import image_statistics, metrics, moments, partial, stream
from diffdistill.evaluation.image_statistics import Chunk, ImageStatistics
from diffdistill.evaluation.partial import Partial
from diffdistill.training import mesh as meshes
from diffdistill.training import processes
from diffdistill.training.interrupt import Interrupt

NUM, ROWS = 90, 16


@jax.jit
def extract(images: jax.Array) -> dict[str, jax.Array]:
    """Stands for the network: numbers that depend on the image alone."""
    x = images.reshape(len(images), -1).astype(jnp.float32)
    sides = {"2048": 2048, "sfid": 2023, "logits_unbiased": 1008}
    return {tap: jnp.sin(x[:, :1] * jnp.arange(1, side + 1) / 97 + x[:, 1:2]) for tap, side in sides.items()}


def pictures(first: int, stop: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (NUM, 1, 2, 1), dtype=np.uint8)[first:stop]


def chunks(first: int, stop: int = NUM, rows: int = ROWS):
    for start in range(first, stop, rows):
        images = pictures(start, min(start + rows, stop))
        padded = np.concatenate([images, np.full((rows - len(images), *images.shape[1:]), 7, np.uint8)])
        yield Chunk(meshes.shard_batch(meshes.make_mesh(), padded), start, min(start + rows, stop))


def empty() -> ImageStatistics:
    return image_statistics.empty(NUM, 30)


def accumulate(folder: Path, source=chunks, interrupt: Interrupt | None = None) -> ImageStatistics:
    partial = Partial(folder, "a set of images")
    return stream.accumulate(source, extract, empty(), NUM, partial, interrupt or Interrupt(), "test").statistics


def same(first: ImageStatistics, second: ImageStatistics, **tolerance: float) -> None:
    expected, found = image_statistics.to_arrays(first), image_statistics.to_arrays(second)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, **tolerance, err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> ImageStatistics:
    return accumulate(tmp_path_factory.mktemp("whole"))


def test_statistics_are_those_of_all_images_and_of_no_padding(whole):
    taps = jax.tree.map(np.asarray, extract(pictures(0, NUM)))
    assert whole.pool.count == whole.spatial.count == whole.scores.counts.sum() == NUM
    np.testing.assert_allclose(whole.pool.mean(), taps["2048"].mean(0, dtype=np.float64), atol=1e-12)
    np.testing.assert_allclose(whole.pool.covariance(), np.cov(taps["2048"].T.astype(np.float64)), atol=1e-12)
    np.testing.assert_allclose(whole.spatial.covariance(), np.cov(taps["sfid"].T.astype(np.float64)), atol=1e-12)
    np.testing.assert_array_equal(whole.features.features, taps["2048"][whole.features.numbers])
    assert len(whole.features.numbers) == 30


@pytest.mark.parametrize("rows", [5, 90])
def test_the_size_of_the_chunks_does_not_matter(whole, tmp_path, rows):
    same(whole, accumulate(tmp_path, lambda first: chunks(first, rows=rows)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shards", [3, 8])
def test_shards_merge_in_any_order_to_the_same_statistics(whole, shards):
    bounds = np.linspace(0, NUM, shards + 1).astype(int)
    parts = []
    for first, stop in itertools.pairwise(bounds):
        part = empty()
        for chunk in chunks(first, stop):
            part = image_statistics.add(part, chunk, extract(chunk.images))
        parts.append(part)
    for order in (range(shards), np.random.default_rng(0).permutation(shards)):
        merged = parts[order[0]]
        for index in order[1:]:
            merged = image_statistics.merge(merged, parts[index])
        same(whole, merged, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shards", [1, 3, 8])
def test_distance_of_merged_shards(shards):
    """The bar: less than 1e-9 relative, with features whose covariance is far from a multiple of the identity."""
    random = np.random.default_rng(6)
    scale = np.exp(-np.arange(128) / 30)
    features = (np.abs(random.normal(0.5, 0.3, (3000, 128))) * scale).astype(np.float32)
    mean, covariance = np.full(128, 0.5) * scale, np.diag(scale**2) * 0.1
    exact = moments.moments_of(features)
    expected = metrics.frechet_distance(exact.mean(), exact.covariance(), mean, covariance)
    parts = [
        moments.add_features(moments.empty_moments(128), part)
        for part in np.array_split(features[random.permutation(3000)], shards)
    ]
    merged = parts[-1]
    for part in parts[:-1]:
        merged = moments.merge(merged, part)
    found = metrics.frechet_distance(merged.mean(), merged.covariance(), mean, covariance)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_killed_accumulation_continues_to_the_same_bits(whole, tmp_path, after):
    interrupt = Interrupt()
    made = []

    def killed(first):
        for number, chunk in enumerate(chunks(first), start=1):
            made.append(chunk.first)
            if number == after:
                interrupt.request("SIGTERM")
            yield chunk

    with pytest.raises(stream.EvaluationInterrupted, match=r"SIGTERM.*same command again to continue"):
        accumulate(tmp_path, killed, interrupt)
    (about,) = tmp_path.glob("*/*/complete")
    about.write_text(about.read_text().replace('"seconds": ', '"seconds": 1'))  # as if it had taken long
    assert made == [ROWS * index for index in range(after)]

    def rest(first):
        assert first == after * ROWS
        return chunks(first)

    found = stream.accumulate(rest, extract, empty(), NUM, Partial(tmp_path, "a set of images"), Interrupt(), "test")
    same(whole, found.statistics, rtol=0, atol=0)
    assert found.seconds > 10


def test_a_kill_in_the_middle_of_a_save_leaves_the_save_before(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "SAVE_SECONDS", 0.0)  # after every chunk
    original, calls = partial.write_atomically, []

    def dying(path, write):
        calls.append(path)
        if len(calls) == 4:  # the second save: its process file is written, the mark that it is complete is not
            raise KeyboardInterrupt
        return original(path, write)

    monkeypatch.setattr(partial, "write_atomically", dying)
    with pytest.raises(KeyboardInterrupt):
        accumulate(tmp_path)
    monkeypatch.setattr(partial, "write_atomically", original)
    begun = []
    same(whole, accumulate(tmp_path, lambda first: begun.append(first) or chunks(first)), rtol=0, atol=0)
    assert begun == [ROWS]


def test_statistics_survive_a_file(whole, tmp_path):
    np.savez(tmp_path / "x.npz", **image_statistics.to_arrays(whole))
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        found = image_statistics.from_arrays(file)
    same(whole, found, rtol=0, atol=0)
    assert [type(getattr(found, field.name)) for field in dataclasses.fields(found)] == [
        type(getattr(whole, field.name)) for field in dataclasses.fields(whole)
    ]


def test_features_that_are_not_finite_are_refused_by_the_numbers_of_their_images(tmp_path):
    def broken(images):
        taps = extract(images)
        return {**taps, "sfid": taps["sfid"].at[3, 7].set(jnp.nan)}

    with pytest.raises(stream.FeaturesError, match=r"test, images 0 to 15: the features hold a NaN"):
        stream.accumulate(chunks, broken, empty(), NUM, Partial(tmp_path, "x"), Interrupt(), "test")


def test_where_another_process_fails_this_one_stops_too(tmp_path, monkeypatch):
    """Rather than wait for ever. Its own fault comes with its own message."""
    original = processes.any_process
    monkeypatch.setattr(processes, "any_process", lambda flag: original(True))
    with pytest.raises(stream.OtherProcessFailed, match="another process of this run failed: see its message"):
        accumulate(tmp_path)

    def broken(first):
        yield from itertools.islice(chunks(first), 2)
        raise DataError("image 32 is damaged")

    with pytest.raises(stream.OtherProcessFailed):
        accumulate(tmp_path, broken)
    monkeypatch.setattr(processes, "any_process", original)
    with pytest.raises(DataError, match="image 32 is damaged"):
        accumulate(tmp_path, broken)


def test_the_pace_says_where_the_time_went(tmp_path):
    found = stream.accumulate(chunks, extract, empty(), NUM, Partial(tmp_path, "x"), Interrupt(), "test")
    assert found.pace is not None
    pace = found.pace
    assert pace.making > 0
    assert found.seconds > 0
    assert "images/s: making them" in pace.text()
    assert "feature network" in pace.text()
