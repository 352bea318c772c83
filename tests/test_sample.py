"""Samples of a trained stage: an image is a function of its seed, and what a model cannot give is refused."""

import dataclasses
import struct
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import diffdistill
from diffdistill import sample, sample_files
from diffdistill.generator import SampleError
from diffdistill.workdir import WorkdirError

LAST = "round_01_steps_0001"


@pytest.fixture(scope="module")
def student(smoke_run):
    return dataclasses.replace(diffdistill.load(smoke_run.path), batch_size=4)


@pytest.fixture(scope="module")
def teacher(smoke_run):
    return dataclasses.replace(diffdistill.load(smoke_run.path / "teacher"), batch_size=4)


def noise(seed: int) -> np.ndarray:
    """What an image starts from, as the documentation of a seed promises."""
    return np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(seed), 0), (8, 8, 1)))


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal but for the rounding of the last bit, which another batch size may change."""
    return bool(np.abs(one.astype(int) - other.astype(int)).max() <= 1)


def test_importing_the_package_imports_no_jax():
    code = "import sys, diffdistill; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_load_takes_a_run_or_one_of_its_stages(smoke_run, student, teacher):
    assert (student.name, student.num_steps, student.guidance_range) == (LAST, 1, (0.0, 2.0))
    assert (teacher.name, teacher.num_steps, teacher.guidance_range) == ("teacher", 4, None)
    assert diffdistill.load(smoke_run.path, "guided").name == "guided"
    with pytest.raises(SampleError, match=r"'round_09'.*Finished stages: teacher, guided, round_00"):
        diffdistill.load(smoke_run.path / "round_09")
    with pytest.raises(WorkdirError, match="holds no run"):
        diffdistill.load(smoke_run.path.parent)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "heun", "churn"])
def test_an_image_depends_on_its_seed_alone(teacher, sampler):
    settings = {"num_steps": 3, "sampler": sampler}
    batch = teacher.sample(12, **settings)
    np.testing.assert_array_equal(batch.seeds, np.arange(12))
    np.testing.assert_array_equal(batch.labels, np.arange(12) % 10)
    assert batch.images.shape == (12, 8, 8, 1)
    assert batch.images.dtype == np.uint8
    assert not same(batch.images[1], batch.images[11])  # of one class, from other noise

    alone = teacher.sample(1, seed=7, **settings)
    assert alone.seeds.tolist() == [7]
    assert alone.labels.tolist() == [7]
    assert same(alone.images[0], batch.images[7])

    in_ones = dataclasses.replace(teacher, batch_size=1).sample(12, **settings)
    assert same(in_ones.images, batch.images)


def test_latents_equal_to_the_noise_of_the_seeds_give_the_same_images(student):
    expected = student.sample(3, seed=4, w=1.0)
    given = student.sample(3, seed=4, w=1.0, latents=np.stack([noise(seed) for seed in (4, 5, 6)]))
    assert same(given.images, expected.images)
    assert not same(student.sample(3, seed=40, labels=[4, 5, 6], w=1.0).images, expected.images)


def test_classes_go_by_number_or_name_and_are_repeated_in_turn(student):
    named = dataclasses.replace(student, class_names=("zero", "one", "two", *student.class_names[3:]))
    samples = named.sample(5, labels=["two", 7])
    assert samples.labels.tolist() == [2, 7, 2, 7, 2]
    np.testing.assert_array_equal(samples.images, named.sample(5, labels=np.array([2, 7])).images)
    assert named.sample(3, labels=["2", "9"]).labels.tolist() == [2, 9, 2]


def test_guidance_costs_the_teacher_two_branches_and_the_student_none(teacher, student):
    assert teacher.sample(1, num_steps=2).network_evaluations == 2
    assert teacher.sample(1, num_steps=2, w=1.0).network_evaluations == 4
    assert student.sample(4, w=1.0).network_evaluations == 1


@pytest.mark.parametrize(
    ("sampler", "evaluations"), [("euler", 3), ("heun", 5), ("churn", 5), ("ablation", 5), ("ancestral", 3)]
)
def test_evaluations_are_those_of_the_sampler(teacher, sampler, evaluations):
    samples = teacher.sample(1, num_steps=3, sampler=sampler)
    assert samples.network_evaluations == evaluations
    assert teacher.network_evaluations(3, 1.0, sampler) == 2 * evaluations


def test_samplers_get_their_settings_from_the_config(teacher):
    def changed(**settings):
        return dataclasses.replace(teacher, settings={**teacher.settings, **settings})

    assert teacher.settings["rho"] == 7.0
    heun = teacher.sample(4, num_steps=3, sampler="heun")
    assert changed(solver="euler").sample(1, num_steps=3, sampler="ablation").network_evaluations == 3
    np.testing.assert_array_equal(teacher.sample(4, num_steps=3, sampler="ablation").images, heun.images)
    np.testing.assert_array_equal(changed(s_churn=0.0).sample(4, num_steps=3, sampler="churn").images, heun.images)
    for setting in ({"rho": 3.0}, {"sigma_max": 5.0}, {"alpha": 0.5}):
        assert not same(changed(**setting).sample(4, num_steps=3, sampler="heun").images, heun.images)
        ddim = teacher.sample(4, num_steps=3)
        np.testing.assert_array_equal(changed(**setting).sample(4, num_steps=3).images, ddim.images)


def test_heun_starts_from_latents_of_unit_variance(teacher, student):
    """Of guided models too: the two branches of a teacher, the w of a student."""
    given = np.stack([noise(seed) for seed in (4, 5)])
    for model, w in ((teacher, 1.0), (student, 1.0)):
        expected = model.sample(2, seed=4, w=w, num_steps=3, sampler="heun")
        assert same(model.sample(2, seed=4, w=w, num_steps=3, sampler="heun", latents=given).images, expected.images)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num": 0}, "0 images"),
        ({"seed": -1}, "seeds run from 0"),
        ({"seed": 2**31 - 1, "num": 2}, "seeds run from 0"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"w": 2.5}, r"w is 2.5.*from 0.0 to 2.0"),
        ({"w": -0.5}, r"w is -0.5.*from 0.0 to 2.0"),
        ({"w": float("nan")}, "w is nan"),
        ({"labels": [10]}, "classes 0 to 9"),
        ({"labels": [-1]}, "classes 0 to 9"),
        ({"labels": []}, "classes 0 to 9"),
        ({"labels": ["cat"]}, "'cat' is no class"),
        ({"labels": [1.5]}, "1.5 is no class"),
        ({"sampler": "dim"}, "known are ddim, ancestral"),
        ({"latents": np.zeros((2, 8, 8, 1), np.float32)}, r"need \(1, 8, 8, 1\)"),
        ({"latents": np.full((1, 8, 8, 1), np.nan)}, "finite"),
        ({"latents": np.zeros((1, 8, 8, 1), np.int32)}, "floating-point"),
    ],
)
def test_what_a_model_cannot_give_is_refused(student, arguments, words):
    with pytest.raises(SampleError, match=words):
        student.sample(**arguments)


def test_a_weight_outside_the_range_is_sampled_where_it_is_asked_for(student):
    beyond = dataclasses.replace(student, extrapolates=True, quantisation="none")
    assert not np.array_equal(
        beyond.sample(2, w=2.5).images, beyond.sample(2, w=2.0).images
    )  # not the nearest w it knows
    with pytest.raises(SampleError, match="finite guidance weight"):
        beyond.sample(2, w=float("inf"))


def test_a_stochastic_student_is_sampled_as_it_learnt(student):
    stochastic = dataclasses.replace(student, learnt_sampler="stochastic", sampler="stochastic")
    assert stochastic.sample(2, num_steps=2).network_evaluations == 2
    with pytest.raises(SampleError, match="has learnt the steps of 'stochastic'"):
        stochastic.sample(2, sampler="ddim")


def write(path, out, **changes) -> list[str]:
    said: list[str] = []
    settings = {"num": 4, "seed": 0, "labels": [], "latents": "", "w": 0.0, "num_steps": None, "sampler": None}
    settings |= {"quantisation": "", "extrapolate": False}
    sample_files.to_files(*sample.locate(path), out=str(out), say=said.append, **{**settings, **changes})
    return said


def test_files_hold_images_labels_and_seeds(smoke_run, student, tmp_path):
    np.save(tmp_path / "noise.npy", np.stack([noise(seed) for seed in (3, 4, 5, 6)]))
    said = write(
        smoke_run.path / LAST, tmp_path / "new" / "out", seed=3, labels=["1", "0"], latents=str(tmp_path / "noise.npy")
    )
    assert "4 images from round_01_steps_0001, 1 steps, w = 0" in said[0]
    with np.load(tmp_path / "new" / "out" / "samples.npz") as file:
        assert same(file["images"], student.sample(4, seed=3, labels=[1, 0]).images)
        assert file["labels"].tolist() == [1, 0, 1, 0]
        assert file["seeds"].tolist() == [3, 4, 5, 6]
    with Image.open(tmp_path / "new" / "out" / "samples.png") as picture:
        assert min(picture.size) >= 2 * 40  # two rows or columns of tiles, enlarged


def test_files_that_cannot_be_read_or_written_are_named(smoke_run, tmp_path):
    (tmp_path / "text.npy").write_text("no numbers")
    np.savez(tmp_path / "pack.npz", a=np.zeros(3))
    with pytest.raises(SampleError, match=r"none.npy cannot be read: No such file"):
        write(smoke_run.path, tmp_path, latents=str(tmp_path / "none.npy"))
    for name in ("text.npy", "pack.npz"):
        with pytest.raises(SampleError, match=rf"{name} is not an .npy file"):
            write(smoke_run.path, tmp_path, latents=str(tmp_path / name))
    with pytest.raises(WorkdirError, match=r"cannot be written.*--out"):
        write(smoke_run.path, tmp_path / "text.npy" / "out")


def test_a_model_without_a_trained_null_class_cannot_be_guided(smoke_run):
    teacher = dataclasses.replace(diffdistill.load(smoke_run.path, "teacher"), has_null_class=False)
    assert teacher.sample(2, w=0.0, num_steps=1).network_evaluations == 1
    with pytest.raises(SampleError, match="cannot be guided"):
        teacher.sample(2, w=1.0, num_steps=1)


def test_more_labels_than_images_are_refused(smoke_run):
    with pytest.raises(SampleError, match="3 labels were given for 2 images"):
        diffdistill.load(smoke_run.path).sample(2, labels=[1, 2, 3])


def npy(descr, shape, raw: str = "") -> bytes:
    """An .npy file of a header alone."""
    head = (raw or f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}").encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head


@pytest.mark.parametrize(
    "content",
    [
        npy("<f4", (1 << 40,)),
        npy("<f4", (1 << 62, 1 << 62)),
        npy("<f4", (-1,)),
        npy([], (10**12,)),
        npy("<U0", (10**12,)),
        npy("", (), raw="{'descr': '<f4', 'shape': (("),
        npy("", (), raw="(" * 9000),
        b"",
    ],
)
def test_damaged_arrays_are_one_error(tmp_path, content):
    file = tmp_path / "x.npy"
    file.write_bytes(content)
    for read in (lambda: sample_files._read_array("latents", str(file)), lambda: sample_files._read_labels(str(file))):
        with pytest.raises(SampleError, match=r"x\.npy (is not an .npy file of numbers|holds)"):
            read()


@pytest.mark.parametrize(
    "labels",
    [
        np.zeros((0, 0)),
        np.zeros((3, 0)),
        np.array(["a"]),
        np.array([["a", "b"]]),
        np.zeros(3, [("a", "i4")]),
        np.zeros((3, 2), [("a", "i4")]),
        np.array(3),
        np.array([1 + 2j]),
        np.array([0.5]),
        np.array([np.nan]),
        np.array([[1.0, np.nan]]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_labels_that_are_no_classes(tmp_path, labels):
    np.save(tmp_path / "x.npy", labels)
    with pytest.raises(SampleError, match=r"x\.npy holds"):
        sample_files._read_labels(str(tmp_path / "x.npy"))
