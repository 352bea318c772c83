"""Reference statistics of every tool are read back exactly, by the protocol they were made by, or refused by name."""

import json
import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from diffdistill.evaluation import moments, reference
from diffdistill.evaluation.image_statistics import ImageStatistics
from diffdistill.evaluation.moments import Reservoir
from diffdistill.evaluation.reference import StatisticsError

D, D_SPATIAL = 5, 7
RANDOM = np.random.default_rng(0)
FEATURES = RANDOM.normal(size=(40, D)) + 3
SPATIAL = RANDOM.normal(size=(40, D_SPATIAL))
MU, SIGMA = FEATURES.mean(0), np.cov(FEATURES, rowvar=False)
ADM = {"mu": MU, "sigma": SIGMA, "mu_s": SPATIAL.mean(0), "sigma_s": np.cov(SPATIAL, rowvar=False)}
OURS = {"protocol": "clean", "weights_sha256": "ab" * 32, "source": "digits:train", "image_shape": [8, 8, 1]}


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


def ours(path, **changes):
    """A file of ours whose provenance or arrays are changed."""
    arrays = {"mu": MU, "sigma": SIGMA, "features": FEATURES.astype(np.float32)}
    provenance = {**OURS, "kind": "diffdistill", "count": 40}
    for name, value in changes.items():
        (provenance if name in provenance else arrays)[name] = value
    return saved(path, **arrays, provenance=np.array(json.dumps(provenance)))


def statistics() -> ImageStatistics:
    kept = np.arange(0, 40, 4)
    features = Reservoir(10, kept, FEATURES[kept].astype(np.float32))
    nothing = None  # scores are of samples, not of a reference
    return ImageStatistics(moments.moments_of(FEATURES), moments.moments_of(SPATIAL), nothing, features)  # pyright: ignore


def refused(path, message, protocol="tf", **keywords):
    with pytest.raises(StatisticsError, match=message) as caught:
        reference.read(path, protocol=protocol, **keywords)
    assert path.name in str(caught.value)


def test_what_is_written_is_read_back(tmp_path):
    made = reference.of_statistics(statistics(), OURS)
    path = reference.write(tmp_path / "new" / "digits.npz", made)
    found = reference.read(path, protocol="clean", weights_sha256=OURS["weights_sha256"])
    for name in ("mean", "covariance", "spatial_mean", "spatial_covariance", "features"):
        np.testing.assert_array_equal(getattr(found, name), getattr(made, name))
    assert found.features is not None
    assert found.features.dtype == np.float32
    assert found.provenance == made.provenance
    assert found.digest() == made.digest()
    assert [file.name for file in path.parent.iterdir()] == ["digits.npz"]


def test_our_statistics_are_the_moments_of_the_features():
    made = reference.of_statistics(statistics(), OURS)
    np.testing.assert_allclose(made.mean, MU, rtol=1e-12)
    np.testing.assert_allclose(made.covariance, SIGMA, rtol=1e-10)
    np.testing.assert_allclose(made.spatial_covariance, ADM["sigma_s"], rtol=1e-10, atol=1e-12)
    assert made.count == 40
    assert made.provenance["kind"] == "diffdistill"
    assert {"jax", "numpy"} <= made.provenance["written_by"]["versions"].keys()
    assert made.text() == "digits:train (40 images)"
    assert made.facts() == {"reference": "digits:train", "reference_count": 40}


def test_other_tools_find_mu_and_sigma_in_our_files(tmp_path):
    path = reference.write(tmp_path / "x.npz", reference.of_statistics(statistics(), OURS))
    with np.load(path) as file:  # as EDM, pytorch-fid and clean-fid do it
        np.testing.assert_allclose(file["mu"], MU, rtol=1e-12)
        np.testing.assert_allclose(file["sigma"], SIGMA, rtol=1e-10)


def test_the_digest_changes_with_every_array():
    made = reference.of_statistics(statistics(), OURS)
    parts = {name: getattr(made, name) for name in ("mean", "covariance", "spatial_mean", "features")}
    others = [replace(made, **{name: value + 1}).digest() for name, value in parts.items()]
    assert len({made.digest(), *others}) == 5


def test_adm_files_are_tf_and_bring_spatial_statistics(tmp_path):
    arrays = {name: value.astype(np.float32) if name.startswith("mu") else value for name, value in ADM.items()}
    found = reference.read(saved(tmp_path / "VIRTUAL_imagenet64_labeled.npz", **arrays), protocol="tf")
    assert found.provenance["kind"] == "adm"
    assert found.spatial_mean is not None
    assert found.spatial_mean.dtype == found.mean.dtype == np.float64
    np.testing.assert_array_equal(found.spatial_covariance, ADM["sigma_s"])
    assert found.features is None
    assert found.count is None  # mu is of the whole data set, arr_0 holds 10,000 of it: neither is the count
    assert found.text() == "VIRTUAL_imagenet64_labeled.npz (an unknown number of images)"
    refused(tmp_path / "VIRTUAL_imagenet64_labeled.npz", "protocol tf, but clean was asked for", protocol="clean")


def test_images_beside_statistics_are_not_read(tmp_path):
    path = saved(tmp_path / "VIRTUAL.npz", arr_0=np.full((50, 8, 8, 3), 7, np.uint8), **ADM)
    content = path.read_bytes()
    path.write_bytes(content.replace(bytes([7]) * 1000, bytes([8]) * 1000, 1))
    with np.load(path) as file, pytest.raises(zipfile.BadZipFile):
        file["arr_0"]  # its checksum is wrong now: whoever reads it knows
    np.testing.assert_array_equal(reference.read(path, protocol="tf").mean, MU)
    assert reference.is_statistics(path)


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        ("cifar10_clean_train_32.npz", "clean"),
        ("cifar10_legacy_tensorflow_train_32.npz", "tf"),
        ("cifar10_legacy_pytorch_test_32.npz", "pytorch-fid"),
        ("ffhq_clean_trainval70k_1024.npz", "clean"),
        ("my_faces_clean_custom_na.npz", "clean"),
        ("FFHQ_clean_trainval_256.npz", "clean"),
    ],
)
def test_clean_fid_files_say_their_mode_by_name(tmp_path, name, protocol):
    np.savez_compressed(tmp_path / name, mu=MU, sigma=SIGMA)
    found = reference.read(tmp_path / name, protocol=protocol)
    assert (found.provenance["kind"], found.provenance["protocol"]) == ("clean-fid", protocol)
    other = "tf" if protocol != "tf" else "clean"
    refused(tmp_path / name, f"{protocol}, but {other} was asked", protocol=other)
    refused(tmp_path / name, f"{protocol}, its name says.*states {other}", other, stated_protocol=other)


def test_clip_statistics_of_clean_fid_are_refused(tmp_path):
    path = saved(tmp_path / "ffhq_clean_clip_vit_b_32_trainval70k_1024.npz", mu=MU, sigma=SIGMA)
    refused(path, "CLIP", "clean")


@pytest.mark.parametrize("name", ["cifar10-32x32.npz", "imagenet_clean.npz", "clean_train_32.npz"])
def test_the_protocol_of_an_unmarked_file_must_be_stated(tmp_path, name):
    path = saved(tmp_path / name, mu=MU, sigma=SIGMA)
    refused(path, r"config.evaluation.reference_protocol: tf for files of EDM.*pytorch-fid for those of pytorch-fid")
    found = reference.read(path, protocol="tf", stated_protocol="tf")
    np.testing.assert_array_equal(found.covariance, SIGMA)
    assert found.provenance == {"kind": "unmarked", "protocol": "tf", "source": name}
    refused(path, "protocol pytorch-fid, but tf was asked for", stated_protocol="pytorch-fid")
    with pytest.raises(ValueError, match=r"unknown protocol 'cleen'.*Did you mean 'clean'"):
        reference.read(path, protocol="tf", stated_protocol="cleen")


def test_edm2_pickles(tmp_path):
    path = tmp_path / "img64.pkl"
    dino = {"mu": MU[:3], "sigma": SIGMA[:3, :3]}
    for protocol in (4, 5):
        stored = {"num_images": 1281167, "fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": dino}
        path.write_bytes(pickle.dumps(stored, protocol))
        found = reference.read(path, protocol="tf")
        np.testing.assert_array_equal(found.mean, MU)
        np.testing.assert_array_equal(found.covariance, SIGMA)
        assert (found.count, found.provenance["kind"]) == (1281167, "edm2")
        assert reference.is_statistics(path)
    path.write_bytes(pickle.dumps({"num_images": 9, "fd_dinov2": dino}))
    refused(path, r"holds \['fd_dinov2', 'num_images'\].*'fid'")


class Trap:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    path = tmp_path / "trap.pkl"
    path.write_bytes(pickle.dumps({"fid": {"mu": Trap(), "sigma": SIGMA}}))
    refused(path, r"builtins.print.*EDM2")
    path = saved(tmp_path / "trap.npz", mu=np.array([Trap()], object), sigma=SIGMA)
    refused(path, "Object arrays cannot be loaded")
    assert "executed" not in capsys.readouterr().out


def test_our_files_are_held_to_their_protocol_and_network(tmp_path):
    path = ours(tmp_path / "x.npz")
    assert reference.read(path, protocol="clean", stated_protocol="clean", weights_sha256="ab" * 32).count == 40
    assert reference.read(path, protocol="clean", weights_sha256="").count == 40  # unknown: not checked
    refused(path, "protocol clean, but tf was asked for")
    refused(path, "clean, it says itself.*states tf", stated_protocol="tf")
    refused(path, "feature network abababababab.*not with cdcdcdcdcdcd", "clean", weights_sha256="cd" * 32)
    unknown = ours(tmp_path / "y.npz", weights_sha256="")
    assert reference.read(unknown, protocol="clean", weights_sha256="cd" * 32).count == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": MU[None]}, r"mu has shape \(1, 5\)"),
        ({"sigma": SIGMA[:4]}, r"sigma \(4, 5\); expected \(d,\) and \(d, d\)"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu has shape \(0,\)"),
        ({"mu": MU.astype(int)}, "int64.*floating point"),
        ({"mu": MU * np.nan}, "NaN"),
        ({"sigma": SIGMA + np.diag([np.inf] * D)}, "infinity"),
        ({"sigma": SIGMA + 1e-3 * np.eye(D, k=1)}, "not symmetric"),
        ({"sigma": -SIGMA}, "variance is negative"),
        ({"count": 1}, "images as 1; a covariance needs at least 2"),
        ({"count": "many"}, "images as 'many'"),
        ({"mu_s": ADM["mu_s"]}, r"sigma_s \(0,\)"),
        ({"sigma_s": ADM["sigma_s"]}, r"mu_s has shape \(0,\)"),
        ({"mu_s": MU, "sigma_s": ADM["sigma_s"]}, r"mu_s has shape \(5,\) and sigma_s \(7, 7\)"),
        ({"features": FEATURES[:, :4]}, r"features are float64 \(40, 4\).*\(M, 5\)"),
        ({"features": FEATURES.astype(np.float32) + np.float32("inf")}, "features hold a NaN"),
    ],
)
def test_malformed_statistics(tmp_path, changes, message):
    refused(ours(tmp_path / "x.npz", **changes), message, "clean")


def test_damaged_provenance(tmp_path):
    for text in ("{", "[3]", "[" * 100_000):
        path = saved(tmp_path / "x.npz", mu=MU, sigma=SIGMA, provenance=np.array(text))
        refused(path, "provenance is damaged")


def test_damaged_files(tmp_path):
    whole = ours(tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "cut.npz"
    for length in (3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "damaged", "clean")
        assert not reference.is_statistics(path)
    flipped = bytearray(whole)
    flipped[whole.index(MU.tobytes()) + 2] ^= 1
    path.write_bytes(flipped)
    refused(path, "damaged.*CRC", "clean")
    path.write_bytes(pickle.dumps({"fid": {"mu": MU, "sigma": SIGMA}})[:200])
    refused(path, "damaged or truncated")


def changed_entry(path, place, content):
    """The same file with other bytes in its first entry of the directory."""
    whole = bytearray(path.read_bytes())
    start = whole.index(b"PK\1\2") + place
    whole[start : start + len(content)] = content
    path.write_bytes(whole)


def test_small_files_do_not_become_gigabytes(tmp_path):
    path = saved(tmp_path / "x.npz", mu=MU, sigma=SIGMA)
    for place in (24, 20):  # its size unpacked, and then also packed
        changed_entry(path, place, (1 << 30).to_bytes(4, "little"))
        refused(path, r"mu\.npy would unpack \d+ bytes to 1073741824")


def test_names_that_are_no_text_are_damage(tmp_path):
    path = saved(tmp_path / "x.npz", mu=MU, sigma=SIGMA)
    changed_entry(path, 8, b"\0\x08")  # the names are UTF-8
    changed_entry(path, 46, b"\xff")
    assert not reference.is_statistics(path)
    assert not reference.holds_images(path)
    refused(path, "damaged")


def test_values_of_other_types_are_refused_by_their_type(tmp_path):
    refused(ours(tmp_path / "x.npz", weights_sha256=5), "feature network 5", "clean", weights_sha256="ab" * 32)
    refused(ours(tmp_path / "x.npz", count=[3]), "images as a list; a covariance needs", "clean")
    deep = ()
    for _ in range(60):
        deep = (deep, deep)
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"fid": {"mu": MU, "sigma": SIGMA}, "num_images": deep}))
    refused(path, "images as a tuple; a covariance needs")


def test_what_is_no_statistics_is_named(tmp_path):
    refused(tmp_path / "nowhere.npz", "cannot be read: No such file")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "cannot be read: Is a directory")
    np.save(tmp_path / "mu.npy", MU)
    refused(tmp_path / "mu.npy", "is a single array")
    (tmp_path / "text.npz").write_text("hello")
    refused(tmp_path / "text.npz", "no .npz file")
    refused(saved(tmp_path / "kid.npz", feats=FEATURES), "holds no mu and sigma, but feats.*--mode=statistics")
    refused(saved(tmp_path / "only_mu.npz", mu=MU), "holds no mu and sigma, but mu")
    batch = saved(tmp_path / "samples_2x4x4x3.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    refused(batch, rf"holds images.*--mode=evaluate --images={batch}.*--reference={batch}")
    for path in (batch, tmp_path / "nowhere.npz", tmp_path / "folder", tmp_path / "mu.npy", tmp_path / "text.npz"):
        assert not reference.is_statistics(path)
