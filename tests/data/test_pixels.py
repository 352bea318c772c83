"""One rule turns every kind of picture into uint8 (H, W, C)."""

import io
import time

import numpy as np
import pytest
from PIL import Image

from diffdistill.data import DataError, array_source, in_memory, pixels
from diffdistill.data.parallel import for_each
from diffdistill.data.pixels import decode, fit, fitted, look


def stored(image: Image.Image, kind: str = "PNG", **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def decoded(image: Image.Image, image_size=None, channels=None, kind="PNG") -> np.ndarray:
    return decode(stored(image, kind), "picture", image_size, channels)


COLOUR = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)


def test_colour_and_grey_come_back_as_stored():
    np.testing.assert_array_equal(decoded(Image.fromarray(COLOUR)), COLOUR)
    grey = COLOUR[..., :1]
    np.testing.assert_array_equal(decoded(Image.fromarray(grey[..., 0])), grey)
    assert decoded(Image.fromarray(COLOUR[..., 0] > 99)).max() == 255  # one bit per pixel


def test_channels_convert():
    grey = decoded(Image.fromarray(COLOUR), channels=1)
    luma = COLOUR @ np.array([0.299, 0.587, 0.114])
    assert grey.shape == (6, 6, 1)
    assert np.abs(grey[..., 0] - luma).max() <= 1
    three = decoded(Image.fromarray(COLOUR[..., 0]), channels=3)
    np.testing.assert_array_equal(three, np.repeat(COLOUR[..., :1], 3, axis=-1))


def test_palettes_become_colour():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(decoded(palette), [[[255, 0, 0], [0, 0, 255]]])
    assert look(stored(palette), "picture") == (1, 2, 3)


def test_transparent_pixels_lie_on_white():
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    image = decoded(Image.fromarray(pixels))
    np.testing.assert_array_equal(image[0, :2], [[10, 20, 30], [255, 255, 255]])
    assert abs(int(image[0, 2, 0]) - 127) <= 1
    grey = decoded(Image.fromarray(pixels).convert("LA"))
    assert grey.shape == (1, 3, 1)
    assert grey[0, 1, 0] == 255
    palette = Image.new("P", (1, 1))
    palette.putpalette([9, 9, 9])
    file = stored(palette, transparency=0)
    np.testing.assert_array_equal(decode(file, "picture", None, None), [[[255, 255, 255]]])


def test_print_colours_become_rgb():
    assert decoded(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), kind="JPEG").tolist() == [[[255] * 3] * 4] * 4


def test_deep_pixels_are_refused():
    deep = Image.fromarray(np.full((4, 4), 40000, np.uint16))
    with pytest.raises(DataError, match=r"picture has pixels of type 'I;16'.*8 bits"):
        decoded(deep)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncated_pictures_are_named(kind):
    content = stored(Image.fromarray(np.kron(COLOUR, np.ones((8, 8, 1), np.uint8))), kind).getvalue()
    half = io.BytesIO(content[:-30])
    with pytest.raises(DataError, match=r"cats/7.png is damaged or truncated"):
        decode(half, "cats/7.png", None, None)
    with pytest.raises(DataError, match=r"cats/7.png is no image"):
        decode(io.BytesIO(b"hello"), "cats/7.png", None, None)


def test_resizing_cuts_the_central_square_and_averages():
    wide = np.zeros((8, 16, 1), np.uint8)
    wide[:, 4:12] = 200  # the central square
    np.testing.assert_array_equal(fit(wide, 4, None), np.full((4, 4, 1), 200))
    checks = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
    small = fit(checks, 8, None)  # nearest-neighbour would give black or white, an area filter grey
    assert np.abs(small[1:-1, 1:-1].astype(int) - 127).max() <= 3
    assert fit(COLOUR, 3, 1).shape == (3, 3, 1)


def test_fitted_sources():
    source = array_source("two", np.stack([COLOUR, 255 - COLOUR]), np.array([0, 1]), ("a", "b"))
    assert fitted(source, None, None) is source
    assert fitted(source, 6, 3) is source
    small = fitted(source, 3, 1)
    assert small.image_shape == (3, 3, 1)
    assert small.images is None
    assert small.fingerprint() != source.fingerprint()
    np.testing.assert_array_equal(in_memory(small).images[1], fit(255 - COLOUR, 3, 1))
    odd = array_source("odd", np.zeros((1, 4, 4, 2), np.uint8), np.array([0]), ("a",))
    with pytest.raises(DataError, match="2 channels"):
        fitted(odd, 2, None)


def test_only_the_formats_of_the_suffixes_are_opened():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n%%EndComments\nshowpage\n%%EOF\n"
    for content in (postscript, stored(Image.new("RGB", (6, 6)), "EPS").getvalue()):
        with pytest.raises(DataError, match=r"0.png is no image \(PNG, JPEG"):
            look(io.BytesIO(content), "0.png")
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM"):
        assert look(stored(Image.new("RGB", (6, 5)), kind), "picture") == (5, 6, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_of_too_many_pixels_are_refused():
    huge = io.BytesIO(b"P6 13000 13000 255\n")
    for use in (lambda: look(huge, "0.png"), lambda: decode(huge, "0.png", 8, 3)):
        huge.seek(0)
        with pytest.raises(DataError, match=r"0.png has 13000x13000 pixels; at most"):
            use()


def test_large_pictures_are_decoded_one_after_the_other(monkeypatch):
    monkeypatch.setattr(pixels, "_AT_ONCE", 300)
    seen = []
    fitted_as_ever = pixels._fitted

    def watched(image, image_size):
        seen.append(pixels._bytes)
        time.sleep(0.01)
        return fitted_as_ever(image, image_size)

    monkeypatch.setattr(pixels, "_fitted", watched)
    for_each(lambda _: np.testing.assert_array_equal(decoded(Image.fromarray(COLOUR)), COLOUR), 8)
    assert seen == [8 * 36] * 8
    assert pixels._bytes == 0
