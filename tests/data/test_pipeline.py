"""Batch i is a function of (seed, i) alone, on any number of hosts, whatever the source keeps in memory."""

import grain
import numpy as np
import pytest

from diffdistill.data import Batches, DataError, Source, array_source, in_memory, pipeline


def numbered(length: int) -> Source:
    """Images that say which example they are: the number in the left column, 255 in the right one."""
    images = np.zeros((length, 2, 2, 1), np.uint8)
    images[:, :, 0, 0] = np.arange(length)[:, None]
    images[:, :, 1, 0] = 255
    return array_source("numbered", images, np.arange(length) % 3, ("a", "b", "c"))


def lazily(source: Source) -> Source:
    """The same examples, read one by one."""
    return Source(source.name, source.image_shape, source.class_names, len(source), source.read, digest=source.digest)


def test_a_batch_is_a_function_of_seed_and_number():
    source = numbered(50)
    there, again = Batches(source, 8, seed=1, flip=True), Batches(source, 8, seed=1, flip=True)
    forward = [there(number) for number in range(20)]
    for number in reversed(range(20)):
        batch = again(number)
        np.testing.assert_array_equal(batch["image"], forward[number]["image"])
        np.testing.assert_array_equal(batch["label"], forward[number]["label"])
    assert forward[0]["image"].dtype == np.uint8
    assert forward[0]["label"].dtype == np.int32
    assert not np.array_equal(there.indices(0), Batches(source, 8, seed=2).indices(0))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_hold_the_global_batch(hosts):
    source = numbered(50)
    whole = Batches(source, 8, seed=3, flip=True)(7)
    rows = 8 // hosts
    parts = [Batches(source, 8, 3, True, start=h * rows, stop=(h + 1) * rows)(7) for h in range(hosts)]
    np.testing.assert_array_equal(np.concatenate([part["image"] for part in parts]), whole["image"])
    np.testing.assert_array_equal(np.concatenate([part["label"] for part in parts]), whole["label"])


@pytest.mark.parametrize(("length", "seed"), [(1, 0), (7, 5), (50_000, 2**32 - 1)])
def test_the_order_is_grains(length, seed):
    order = grain.MapDataset.range(length).shuffle(seed=seed).repeat()
    ours = pipeline._shuffled(length, seed)
    for first in (0, length - 1, 3 * length - 4, 10**9):
        positions = range(max(first, 0), first + 9)
        assert [ours(position) for position in positions] == [order[position] for position in positions]


def test_every_epoch_shows_every_image_once_in_a_new_order():
    batches = Batches(numbered(24), 6, seed=0)
    epochs = [np.concatenate([batches.indices(4 * epoch + i) for i in range(4)]) for epoch in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(24))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])
    other_seed = Batches(numbered(24), 24, seed=1).indices(0)
    assert not np.array_equal(epochs[1], other_seed), "epoch 1 of seed 0 must not be epoch 0 of seed 1"


def test_a_batch_larger_than_the_set_repeats_images_evenly():
    indices = Batches(numbered(5), 15, seed=0).indices(2)
    np.testing.assert_array_equal(np.bincount(indices), np.full(5, 3))


def test_flip_mirrors_about_half_and_nothing_else():
    images = np.random.default_rng(0).integers(0, 256, (200, 4, 3, 3), dtype=np.uint8)
    source = array_source("coloured", images.copy(), np.arange(200) % 3, ("a", "b", "c"))
    plain, flipped = Batches(source, 200, seed=5), Batches(source, 200, seed=5, flip=True)
    fractions = []
    for number in range(20):
        as_they_are, mirrored = plain(number)["image"], flipped(number)["image"]
        is_mirrored = (mirrored == as_they_are[:, :, ::-1]).all(axis=(1, 2, 3))
        is_same = (mirrored == as_they_are).all(axis=(1, 2, 3))
        assert (is_mirrored ^ is_same).all()
        fractions.append(is_mirrored.mean())
        np.testing.assert_array_equal(plain(number)["label"], flipped(number)["label"])
    assert abs(np.mean(fractions) - 0.5) < 0.03
    assert len(set(fractions)) > 5
    np.testing.assert_array_equal(source.images, images)  # flipping must not touch the source


def test_sets_too_large_for_memory_give_the_same_batches():
    source = numbered(90)
    fast = Batches(source, 16, seed=2, flip=True)
    slow = Batches(lazily(source), 16, seed=2, flip=True, memory_limit=10)
    assert slow.source.images is None
    for number in (0, 5, 11):
        np.testing.assert_array_equal(fast(number)["image"], slow(number)["image"])
        np.testing.assert_array_equal(fast(number)["label"], slow(number)["label"])


def test_in_memory_decodes_once_and_stays_the_same_source():
    source = lazily(numbered(70))
    loaded = in_memory(source)
    assert loaded.images is not None
    assert loaded.fingerprint() == source.fingerprint()
    np.testing.assert_array_equal(loaded.images, numbered(70).images)
    assert in_memory(loaded) is loaded


def test_an_unreadable_image_stops_before_the_first_batch():
    def read(index):
        if index == 65:
            raise DataError("image 65.png is damaged")
        return np.zeros((2, 2, 1), np.uint8), 0

    source = Source("broken", (2, 2, 1), ("a",), 70, read, digest=lambda: "")
    with pytest.raises(DataError, match=r"65\.png"):
        Batches(source, 4, seed=0)


def test_impossible_requests_are_refused():
    source = numbered(5)
    with pytest.raises(DataError, match="batch size 0"):
        Batches(source, 0, seed=0)
    with pytest.raises(DataError, match="seed -1"):
        Batches(source, 4, seed=-1)
    with pytest.raises(DataError, match=r"rows 2\.\.9"):
        Batches(source, 4, seed=0, start=2, stop=9)
    with pytest.raises(DataError, match="batch number -1"):
        Batches(source, 4, seed=0)(-1)
