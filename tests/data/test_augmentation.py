"""Non-leaking augmentation: what is drawn, what the network is told, and where every pixel comes from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffdistill.data import augmentation
from diffdistill.data.augmentation import Parameters, augment, draw, flip, inverse_maps, labels, warp

SHAPES = [(16, 16), (12, 20)]
shapes = pytest.mark.parametrize(("height", "width"), SHAPES)
warped, augmented = jax.jit(warp), jax.jit(augment)


def parameters(**given) -> Parameters:
    """Parameters of one image, all zero but the given ones."""
    off, zero = np.zeros(1, bool), np.zeros(1, np.float32)
    nothing = Parameters(off, off, zero, zero, zero, zero, np.zeros((1, 2), np.float32))
    return nothing.replace(**{name: np.array([value], np.float32) for name, value in given.items()})


def origins(given: Parameters, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel comes from, (x, y) from the centre: the formulas once more, forwards, in float64 matrices."""

    def linear(matrix) -> np.ndarray:
        return np.block([[np.array(matrix), np.zeros((2, 1))], [np.zeros((1, 2)), np.ones((1, 1))]])

    def turned(angle: float) -> np.ndarray:  # from x towards y: clockwise as seen
        return linear([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    factor = 2.0 ** (0.2 * float(given.anisotropy[0]))
    axis = -float(given.axis[0])  # as the labels of the published networks have it
    translation = np.eye(3)
    translation[:2, 2] = 0.125 * np.array([width, height]) * given.translation[0]
    forwards = (
        translation
        @ turned(axis)
        @ linear(np.diag([factor, 1 / factor]))
        @ turned(-axis)
        @ turned(-float(given.rotation[0]))
        @ linear(np.eye(2) * 2.0 ** (0.2 * float(given.scale[0])))
    )
    y, x = np.mgrid[:height, :width]
    points = np.stack([x - (width - 1) / 2, y - (height - 1) / 2, np.ones((height, width))])
    x, y, _ = np.tensordot(np.linalg.inv(forwards), points, 1)
    return x, y


def waves(x: np.ndarray, y: np.ndarray, height: int, width: int) -> np.ndarray:
    """A smooth scene without symmetry, at positions from the centre; its reflection at the borders is itself."""
    u, v = np.pi * (x / (width - 1) + 0.5), np.pi * (y / (height - 1) + 0.5)
    return 0.4 * np.cos(u) + 0.3 * np.cos(2 * u) * np.cos(v) + 0.2 * np.cos(2 * v) + 0.1 * np.cos(3 * v)


def waves_image(height: int, width: int) -> np.ndarray:
    return waves(*origins(parameters(), height, width), height, width).astype(np.float32)[None, ..., None]


def noise_images(height: int, width: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


def through(images: np.ndarray, given: Parameters) -> np.ndarray:
    return np.asarray(warped(images, inverse_maps(given, *images.shape[1:3])))


# --- what is drawn

DRAWN = 20_000


@pytest.fixture(scope="module")
def drawn() -> Parameters:
    return jax.tree.map(np.asarray, draw(jax.random.key(1), DRAWN, 0.3))


def near(values: np.ndarray, expected: float, spread: float = 0.5):
    """The mean of independent values is within five standard errors of what is expected."""
    assert abs(np.mean(values) - expected) < 5 * spread / np.sqrt(values.size)


def test_each_operation_is_used_with_the_probability(drawn):
    near(drawn.x_flip, 0.5)
    near(drawn.y_flip, 0.15)
    used = [drawn.scale != 0, drawn.rotation != 0, drawn.anisotropy != 0, drawn.translation[:, 0] != 0]
    for one in used:
        near(one, 0.3)
    near(drawn.axis != 0, 0.15)
    np.testing.assert_array_equal(drawn.translation[:, 0] != 0, drawn.translation[:, 1] != 0)
    assert not np.any((drawn.axis != 0) & (drawn.anisotropy == 0))


def test_operations_and_images_are_drawn_independently(drawn):
    used = [drawn.x_flip, drawn.y_flip, drawn.scale, drawn.rotation, drawn.anisotropy, drawn.axis]
    table = np.stack([*used, *drawn.translation.T])
    amounts = np.corrcoef(table) - np.eye(8)
    choices = np.corrcoef(np.delete(table, [5, 7], axis=0) != 0) - np.eye(6)
    neighbours = [np.corrcoef(row[:-1], row[1:])[0, 1] for row in table]
    assert max(np.abs(amounts).max(), np.abs(choices).max(), np.abs(neighbours).max()) < 5 / np.sqrt(DRAWN)


def test_amounts_are_normal_and_angles_uniform(drawn):
    for values in (drawn.scale, drawn.anisotropy, *drawn.translation.T):
        assert stats.kstest(values[values != 0], stats.norm.cdf).pvalue > 1e-3
    for angles in (drawn.rotation, drawn.axis):
        assert stats.kstest(angles[angles != 0], stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3


def test_probability_one_uses_everything():
    given = draw(jax.random.key(2), DRAWN, 1.0)
    assert all(np.all(np.asarray(v) != 0) for v in (given.scale, given.rotation, given.anisotropy, given.translation))


# --- what the network is told


def test_labels_say_what_was_drawn(drawn):
    told = np.asarray(labels(drawn))
    assert told.shape == (DRAWN, augmentation.LABELS)
    assert told.dtype == np.float32
    w, r = drawn.anisotropy, drawn.axis
    rotation = [np.cos(drawn.rotation) - 1, np.sin(drawn.rotation)]
    expected = [drawn.x_flip, drawn.y_flip, drawn.scale, *rotation, w * np.cos(r), w * np.sin(r), *drawn.translation.T]
    np.testing.assert_allclose(told, np.stack(expected, axis=1), atol=1e-6)
    assert not labels(parameters()).any()


def test_augment_draws_flips_warps_and_tells():
    images, key = noise_images(12, 20, 64), jax.random.key(3)
    changed, told = augmented(key, images, 0.7)
    given = draw(key, 64, 0.7)
    np.testing.assert_allclose(told, labels(given), atol=1e-6)
    steps = [(1 - 2 * int(y), 1 - 2 * int(x)) for x, y in zip(given.x_flip, given.y_flip, strict=True)]
    flipped = np.stack([image[::y, ::x] for image, (y, x) in zip(images, steps, strict=True)])
    np.testing.assert_array_equal(flip(images, given), flipped)
    np.testing.assert_allclose(changed, warped(flipped, inverse_maps(given, 12, 20)), atol=1e-4)


def test_compiled_equals_eager():
    images, key = noise_images(16, 16, 4), jax.random.key(4)
    compiled, eager = jax.jit(lambda key, x: augment(key, x, 0.5))(key, images), augment(key, images, 0.5)
    for one, other in zip(compiled, eager, strict=True):
        assert one.dtype == jnp.float32
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_wrong_arguments_are_refused():
    images, key = noise_images(4, 4), jax.random.key(0)
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 3\), uint8: .*float32"):
        augment(key, images.astype(np.uint8), 0.1)
    with pytest.raises(ValueError, match=r"\(4, 4, 3\), float32: .*\(B, H, W, C\)"):
        augment(key, images[0], 0.1)
    with pytest.raises(ValueError, match=r"probability 1\.2: .*0 to 1"):
        augment(key, images, 1.2)


# --- images that are left alone


def test_probability_zero_only_mirrors():
    images = noise_images(12, 20, 64)
    changed, told = map(np.asarray, augmented(jax.random.key(5), images, 0.0))
    mirrored = told[:, 0] == 1
    assert 16 < mirrored.sum() < 48
    np.testing.assert_array_equal(changed, np.where(mirrored[:, None, None, None], images[:, :, ::-1], images))
    assert not told[:, 1:].any()


def test_images_without_geometry_are_kept_bit_for_bit():
    images = noise_images(12, 20, 64)
    changed, told = map(np.asarray, augmented(jax.random.key(6), images, 0.15))
    kept = ~told[:, 2:].any(axis=1)
    assert 16 < kept.sum() < 48
    backwards = np.where(told[:, 0, None, None, None] == 1, images[:, :, ::-1], images)
    backwards = np.where(told[:, 1, None, None, None] == 1, backwards[:, ::-1], backwards)
    same = (changed == backwards).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(same, kept)


# --- the map


def test_the_identity_map_is_exact():
    np.testing.assert_array_equal(inverse_maps(parameters(axis=1.0), 12, 20), np.eye(2, 3)[None])


@pytest.mark.parametrize(
    ("given", "to"),
    [
        ({"scale": 5.0}, (2, 0)),  # enlarged twofold
        ({"rotation": np.pi / 2}, (0, -1)),  # from the right to the top
        ({"rotation": np.pi / 6}, (np.sqrt(3) / 2, -0.5)),
        ({"anisotropy": 5.0}, (2, 0)),
        ({"anisotropy": 5.0, "axis": np.pi / 2}, (0.5, 0)),
        ({"anisotropy": 5.0, "axis": -np.pi / 4}, (1.25, 0.75)),  # drawn towards the lower right
        ({"translation": (1.0, 1.0)}, (1 + 20 / 8, 12 / 8)),
        ({"translation": (1.0, 1.0), "scale": 5.0}, (2 + 20 / 8, 12 / 8)),  # scaled first, then moved
        ({"rotation": np.pi / 2, "anisotropy": 5.0}, (0, -0.5)),  # turned first, then stretched
    ],
)
def test_where_a_pixel_beside_the_centre_goes(given, to):
    inverse = np.asarray(inverse_maps(parameters(**given), 12, 20))[0]
    np.testing.assert_allclose(inverse @ [*to, 1], [1, 0], atol=1e-6)


def test_stretching_and_turning_keep_areas():
    given = parameters(anisotropy=1.3, axis=0.4, rotation=2.0)
    assert np.linalg.det(inverse_maps(given, 12, 20)[0, :, :2]) == pytest.approx(1, abs=1e-6)
    given = parameters(anisotropy=1.3, axis=0.4, rotation=2.0, scale=-1.7)
    assert np.linalg.det(inverse_maps(given, 12, 20)[0, :, :2]) == pytest.approx(2 ** (2 * 0.2 * 1.7), rel=1e-6)


GENERAL = {"scale": 0.8, "rotation": 2.2, "anisotropy": -1.0, "axis": 0.6, "translation": (1.3, -0.7)}


@shapes
def test_the_order_of_operations(height, width):
    given = parameters(**GENERAL)
    y, x = np.mgrid[:height, :width]
    points = np.stack([x - (width - 1) / 2, y - (height - 1) / 2, np.ones_like(x)])
    mapped = np.tensordot(np.asarray(inverse_maps(given, height, width))[0], points, 1)
    np.testing.assert_allclose(mapped, origins(given, height, width), atol=1e-4)


# --- the images


@shapes
@pytest.mark.parametrize(
    "given",
    [
        {"scale": 5.0},
        {"scale": -4.0},
        {"rotation": 0.7},
        {"rotation": np.pi},
        {"anisotropy": 2.0, "axis": 0.6},
        {"translation": (0.9, -0.3)},
        {"translation": (-40.3, 25.1)},  # several reflections away
        GENERAL,
    ],
)
def test_smooth_scenes_are_what_the_formula_says(given, height, width):
    result = through(waves_image(height, width), parameters(**given))[0, ..., 0]
    expected = waves(*origins(parameters(**given), height, width), height, width)
    error = np.abs(result - expected)
    assert error.mean() < 6e-3  # bilinear interpolation of three half-waves on 24 samples; the borders count too
    assert error.max() < 2e-2


def test_enlarged_gaussian():
    y, x = np.mgrid[:16, :16] - 7.5
    bell = np.exp(-(x**2 + y**2) / 18).astype(np.float32)
    result = through(bell[None, ..., None], parameters(scale=5.0))[0, ..., 0]
    np.testing.assert_allclose(result, np.exp(-(x**2 + y**2) / 72), atol=1e-2)


@shapes
@pytest.mark.parametrize(("right", "up"), [(3, 2), (90, 47)])  # also by several reflections
def test_whole_shifts_are_exact_with_reflected_borders(right, up, height, width):
    images = noise_images(height, width)
    result = through(images, parameters(translation=(right / (0.125 * width), -up / (0.125 * height))))
    padded = np.pad(images, ((0, 0), (0, up), (right, 0), (0, 0)), mode="reflect")
    np.testing.assert_allclose(result, padded[:, up:, :width], atol=1e-4)


def test_quarter_turns_are_counter_clockwise():
    image = waves_image(16, 16)
    np.testing.assert_allclose(through(image, parameters(rotation=np.pi / 2)), np.rot90(image, 1, (1, 2)), atol=1e-2)


@shapes
def test_half_turns(height, width):
    image = waves_image(height, width)
    np.testing.assert_allclose(through(image, parameters(rotation=np.pi)), np.rot90(image, 2, (1, 2)), atol=1e-2)


@pytest.mark.parametrize(("height", "width"), [(12, 20), (5, 1), (2, 2)])
def test_constant_images_stay_constant(height, width):
    image = np.full((1, height, width, 3), 0.7, np.float32)
    np.testing.assert_allclose(through(image, parameters(**GENERAL)), image, atol=1e-5)


def test_channels_and_images_do_not_mix():
    images = np.zeros((2, 16, 16, 2), np.float32)
    images[1, ..., 1] = waves_image(16, 16)[0, ..., 0]
    result = through(images, jax.tree.map(lambda value: np.repeat(value, 2, axis=0), parameters(**GENERAL)))
    assert not result[0].any()
    assert not result[1, ..., 0].any()
    np.testing.assert_allclose(
        result[1, ..., 1], through(images[1:, ..., 1:], parameters(**GENERAL))[0, ..., 0], atol=1e-6
    )


def test_extreme_draws_stay_finite():
    images = noise_images(16, 16)
    for scale in (-20.0, 20.0):
        extreme = parameters(scale=scale, anisotropy=6.0, axis=1.0, translation=(6.0, -6.0))
        result = through(images, extreme)
        assert np.isfinite(result).all()
        assert np.abs(result).max() < 3


# --- the filter


def test_sym6_is_orthonormal_and_has_six_vanishing_moments():
    taps, k = np.array(augmentation.SYM6), np.arange(12)
    assert taps.sum() == pytest.approx(np.sqrt(2), abs=1e-7)
    for double_shift in range(6):
        product = taps[2 * double_shift :] @ taps[: 12 - 2 * double_shift]
        assert product == pytest.approx(float(double_shift == 0), abs=1e-7)
    moments = [np.sum((-1.0) ** k * taps[::-1] * ((k - 5.5) / 5.5) ** power) for power in range(7)]
    np.testing.assert_allclose(moments[:6], 0, atol=1e-7)
    assert abs(moments[6]) > 1e-3


@pytest.mark.parametrize("side", [2, 5, 12])
def test_oversampling_keeps_straight_lines_where_they_are(side):
    fine = augmentation._upsampling(side)
    assert fine.shape == (4 * (side - 1), side)
    np.testing.assert_allclose(fine.sum(axis=1), 1, atol=1e-6)
    if side == 12:  # away from the corners of the zigzag that the reflection makes of a line
        inside = np.arange(12, 22)
        place = fine[inside] @ np.arange(side)
        np.testing.assert_allclose(augmentation._fine_index(place - (side - 1) / 2, side), inside, atol=1e-5)
