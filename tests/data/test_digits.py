"""The embedded digits are the UCI ones, scaled to uint8."""

import hashlib

import numpy as np

from diffdistill.data import gather, open_source

CONTENT = "ed5d0ee6d5a61b611d6cad96c6bd69386d32550c51b259a59996b65ad132fa6c"


def test_digits_are_what_they_were():
    source = open_source(source="digits")
    everything = gather(source, range(len(source)))
    images, labels = everything["image"], everything["label"]
    assert images.shape == (1797, 8, 8, 1)
    assert images.dtype == np.uint8
    assert source.image_shape == (8, 8, 1)
    assert source.num_classes == 10
    assert source.class_names == tuple("0123456789")
    assert hashlib.sha256(images.tobytes() + labels.astype("<i4").tobytes()).hexdigest() == CONTENT
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        return  # the frozen hash above says the same
    theirs = load_digits()  # pyright: ignore
    np.testing.assert_array_equal(images[..., 0], np.round(theirs.images * 255 / 16))
    np.testing.assert_array_equal(labels, theirs.target)


def test_examples_by_number():
    source = open_source()
    example = source[3]
    assert example["image"].shape == (8, 8, 1)
    assert example["label"] == 3
    assert len(source) == 1797
    assert source.fingerprint() == open_source().fingerprint()
