"""The embedded digits: 1,797 real 8x8 grey images in ten classes, so that the library runs without any download.

UCI Optical Recognition of Handwritten Digits (test set), E. Alpaydin and C. Kaynak, CC BY 4.0; the licence note lies
beside the file, in LICENSE-digits.txt.
"""

from importlib import resources

import numpy as np

from diffdistill.data.contract import Source, array_source


def digits() -> Source:
    """Returns the 1,797 digits: images (8, 8, 1) uint8 = round(v * 255 / 16) for the stored v in 0..16."""
    with resources.files("diffdistill.data").joinpath("digits.npz").open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        values, labels = stored["values"], stored["labels"]
    images = np.round(values * (255 / 16)).astype(np.uint8)[..., None]
    return array_source("digits", images, labels, tuple(str(digit) for digit in range(10)))
