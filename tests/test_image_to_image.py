"""Models from image to image: what they are shown, how they are trained, distilled and sampled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffdistill
from configs import digits
from diffdistill import chain, data_checks, evaluate, runner, sample, sample_files
from diffdistill.config import ConfigError, resolve
from diffdistill.diffusion import conditioning
from diffdistill.evaluation import images, results
from diffdistill.generator import SampleError
from diffdistill.models.denoiser import Condition
from diffdistill.training.interrupt import Interrupt

FACTS = chain.DataFacts((8, 8, 3), 10)


def image(batch=3, size=8, channels=3):
    return jax.random.uniform(jax.random.key(1), (batch, size, size, channels), minval=-1.0)


def test_a_hole_hides_the_image_and_nothing_else():
    x = image()
    seen = conditioning.TASKS["inpainting"].example(jax.random.key(0), x)
    known, mask = seen[..., :3], seen[..., 3:]
    assert set(np.unique(mask)) == {0.0, 1.0}
    np.testing.assert_array_equal(known, x * (1 - mask))


def test_holes_are_rectangles_of_every_size_and_place():
    masks = jax.vmap(lambda key: conditioning.random_hole(key, 16, 12))(jax.random.split(jax.random.key(0), 500))
    rows, columns = masks.max(axis=2), masks.max(axis=1)
    np.testing.assert_array_equal(masks, rows[:, :, None] * columns[:, None, :])
    heights, widths = rows.sum(axis=1), columns.sum(axis=1)
    assert (heights.min(), heights.max()) == (4, 12)
    assert (widths.min(), widths.max()) == (3, 9)
    assert (masks.mean(axis=0) > 0).all()
    assert (jnp.abs(jnp.diff(rows)).sum(axis=1) <= 2).all()  # in one piece


def test_a_small_image_is_its_own_means_and_a_grey_one_the_mean_of_colours():
    x, mask = image(size=8), jnp.zeros((3, 8, 8))
    seen = conditioning.TASKS["super_resolution"].show(x, mask)
    np.testing.assert_allclose(
        seen[:, :4, 4:], np.broadcast_to(x[:, :4, 4:].mean((1, 2), keepdims=True), (3, 4, 4, 3)), rtol=1e-5
    )
    with pytest.raises(ValueError, match="multiples of it, got 6 x 6"):
        conditioning.TASKS["super_resolution"].show(image(size=6), mask)
    np.testing.assert_allclose(conditioning.TASKS["colourisation"].show(x, mask)[..., 0], x.mean(-1), rtol=1e-6)


@pytest.mark.parametrize(("task", "channels"), [("inpainting", 4), ("super_resolution", 3), ("colourisation", 1)])
def test_what_is_shown_is_an_input_of_the_network(task, channels):
    config = digits.get_config("smoke")
    config.model.image_condition = task
    config = resolve(config)
    denoiser = chain.denoiser_of(config, chain.plan(config)[0], FACTS)
    x = image()
    seen = denoiser.task.example(jax.random.key(0), x)
    assert seen.shape == (3, 8, 8, channels)
    params = jax.tree.map(lambda p: p + 0.01, denoiser.init(jax.random.key(0)))  # past the zero-initialised layers
    first = next(leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 4 and leaf.shape[2] == 3 + channels)
    assert first.shape[:2] == (3, 3)
    label = jnp.zeros(3, jnp.int32)
    one = denoiser(params, x, 0.0, Condition(label=label, image=seen))
    other = denoiser(params, x, 0.0, Condition(label=label, image=seen + 1.0))
    assert float(jnp.abs(one - other).max()) > 1e-4
    with pytest.raises(ValueError, match=r"takes Condition.image of shape \(3, 8, 8"):
        denoiser(params, x, 0.0, Condition(label=label))
    plain = dataclasses.replace(denoiser, task=None)
    with pytest.raises(ValueError, match="takes no Condition"):
        plain(params, x, 0.0, Condition(label=label, image=seen))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A smoke run that fills holes, with its guided student and one round."""
    config = digits.get_config("smoke")
    config.model.image_condition, config.progressive.start_steps = "inpainting", 2
    config.model.multipliers, config.model.attention_resolutions = (1,), ()
    config.evaluation.num_samples, config.evaluation.guidance, config.evaluation.num_steps = 20, (1.0,), (1,)
    path = tmp_path_factory.mktemp("inpainting") / "run"
    run = runner.prepare(resolve(config), str(path))
    runner.train(run, Interrupt(), say=lambda text: None)
    return run.workdir, run.source


def test_samples_follow_pictures_and_masks(opened):
    folder, source = opened
    generator = diffdistill.load(folder.path)
    assert generator.name == "round_00_steps_0001"
    pictures, masks = source.images[:4], np.zeros((4, 8, 8))
    masks[:, 2:6, 2:6] = 1
    classes = [0, 1, 2, 3]
    made = generator.sample(4, labels=classes, w=1.0, pictures=pictures, masks=masks)
    again = generator.sample(
        4, labels=classes, w=1.0, pictures=np.where(masks[..., None] > 0, 7, pictures).astype(np.uint8), masks=masks
    )
    np.testing.assert_array_equal(made.images, again.images)  # what the hole hides is not seen
    exact = dataclasses.replace(generator, quantisation="none")
    one = exact.sample(4, labels=classes, w=1.0, pictures=pictures, masks=masks).images
    other = exact.sample(4, labels=classes, w=1.0, pictures=255 - pictures, masks=masks).images
    assert not np.array_equal(one, other)  # and the rest is
    drawn = generator.sample(4, labels=classes, w=1.0, pictures=pictures).images
    np.testing.assert_array_equal(
        drawn[2:3], generator.sample(1, seed=2, labels=[2], w=1.0, pictures=pictures[2:3]).images
    )
    teacher = diffdistill.load(folder.path, "teacher")
    assert (
        teacher.sample(2, labels=[0, 1], w=1.0, num_steps=2, pictures=pictures[:2]).network_evaluations == 4
    )  # two branches


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"makes images from images: give some"),
        ({"pictures": np.zeros((2, 8, 8, 1), np.uint8)}, r"say the classes of the pictures \(--labels\)"),
        ({"pictures": np.zeros((1, 8, 8, 1), np.uint8)}, r"need \(2, 8, 8, 1\)"),
        ({"pictures": np.zeros((2, 8, 8, 1), np.uint8), "masks": np.full((2, 8, 8), 0.5)}, "1 where the image"),
        ({"pictures": np.zeros((2, 8, 8, 1), np.uint8), "masks": np.zeros((2, 4, 4))}, r"need \(2, 8, 8\)"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(opened, arguments, message):
    with pytest.raises(SampleError, match=message):
        diffdistill.load(opened[0].path).sample(2, **arguments)


def test_pictures_are_for_models_that_take_them(smoke_run):
    with pytest.raises(SampleError, match="makes images from noise alone"):
        diffdistill.load(smoke_run.path).sample(1, pictures=np.zeros((1, 8, 8, 1), np.uint8))


def test_evaluation_shows_the_images_of_the_data(opened):
    folder, source = opened
    evaluate.evaluate(folder, source, Interrupt(), say=lambda text: None)
    measured = results.read(folder.path / evaluate.RESULTS)
    assert {entry["stage"] for entry in measured} == {"teacher", "guided", "round_00_steps_0001"}
    generator = evaluate.with_examples(diffdistill.load(folder.path), source)
    assert generator.sample(5, seed=3, w=1.0).labels.tolist() == source.labels[3:8].tolist()


def test_pictures_from_files_and_the_pairs_beside_the_samples(opened, tmp_path):
    folder, source = opened
    images.save_npz(tmp_path / "given.npz", source.images[:3])
    images.save_png(tmp_path / "mask.png", np.pad(np.full((4, 4, 1), 255, np.uint8), ((2, 2), (2, 2), (0, 0))))
    said: list[str] = []
    options = {
        "seed": 0,
        "labels": ["0", "1", "2"],
        "latents": "",
        "w": 1.0,
        "extrapolate": False,
        "num_steps": 1,
        "sampler": None,
    }
    options |= {"out": str(tmp_path / "out"), "num": 0, "quantisation": "", "say": said.append}
    options |= {"pictures": str(tmp_path / "given.npz"), "mask": str(tmp_path / "mask.png")}
    sample_files.to_files(*sample.locate(folder.path), **options)
    assert said[0].startswith("3 images from round_00")
    assert (tmp_path / "out" / "pairs.png").stat().st_size > 100
    masks = np.zeros((3, 8, 8))
    masks[:, 2:6, 2:6] = 1
    expected = diffdistill.load(folder.path).sample(3, labels=[0, 1, 2], w=1.0, pictures=source.images[:3], masks=masks)
    with np.load(tmp_path / "out" / "samples.npz") as written:
        np.testing.assert_array_equal(written["images"], expected.images)
    images.save_png(tmp_path / "small.png", np.zeros((4, 4, 1), np.uint8))
    with pytest.raises(SampleError, match=r"the mask .* is \(4, 4\), but the images are \(8, 8\)"):
        sample_files.to_files(*sample.locate(folder.path), **{**options, "mask": str(tmp_path / "small.png")})


@pytest.mark.parametrize(
    ("task", "shape", "message"),
    [("super_resolution", (6, 6, 3), "shrinks images 4 times"), ("colourisation", (8, 8, 1), "grey already")],
)
def test_images_that_a_task_cannot_be_made_of_are_refused(task, shape, message):
    config = digits.get_config("smoke")
    config.model.image_condition = task
    with pytest.raises(ConfigError, match=message):
        data_checks.check_data(resolve(config), chain.DataFacts(shape, 10))


def test_encoders_of_such_models_are_refused():
    config = digits.get_config("full-smoke")
    config.model.image_condition = "inpainting"
    with pytest.raises(ConfigError, match="exclude each other"):
        resolve(config)
