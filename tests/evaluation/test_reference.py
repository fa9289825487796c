"""References: ours there and back, those that others publish, and which are refused."""

import dataclasses
import json

import numpy as np
import pytest
import toy_network

from arcond_jax.evaluation import image_sets, scoring, summary
from arcond_jax.evaluation import reference as reference_lib

IMAGE, LABEL = toy_network.images(60, seed=1)
DRAWN = image_sets.Array(*toy_network.images(50, seed=2))


@pytest.fixture(scope="module")
def network():
    return toy_network.make()


@pytest.fixture(scope="module")
def real(network):
    return reference_lib.measure(image_sets.Array(IMAGE, LABEL, {"data": "toy"}), network, keep=40)


def score(network, reference):
    return scoring.score(DRAWN, network, reference).measurements


def test_ours_comes_back_with_its_card(network, real, tmp_path):
    path = tmp_path / "ref.npz"
    reference_lib.write(path, real)
    read = reference_lib.read(path, network)
    assert score(network, read) == score(network, real)
    card = json.loads((tmp_path / "ref.card.json").read_text())
    assert card == dict(real.facts)
    assert card["images"] == 60
    assert card["kept for precision, recall and KID"] == 40
    assert read.facts == {
        "reference file": str(path),
        "its sha256": image_sets.sha256(path),
        **card,
    }
    np.testing.assert_array_equal(read.label, LABEL[np.arange(40) * 60 // 40])


def test_those_of_others_are_read(network, real, tmp_path):
    mu, sigma = real.features.mean, real.features.covariance
    spatial = dict(mu_s=real.spatial.mean, sigma_s=real.spatial.covariance)
    whole = score(network, real)
    path = tmp_path / "adm.npz"
    np.savez_compressed(path, mu=mu, sigma=sigma, **spatial, arr_0=IMAGE[::2], arr_1=LABEL[::2])
    adm = reference_lib.read(path, network)
    assert adm.facts["images"] == "not said by the file"
    assert adm.facts["sha256"] == image_sets.sha256(path)
    assert len(adm.rows) == 30
    assert adm.facts["network"] == network.description  # of the rows, which were read just now
    found = score(network, adm)
    assert found.keys() == whole.keys()
    for name in ("frechet_distance", "spatial_frechet_distance", "inception_score"):
        assert found[name] == whole[name]
    np.savez(path, mu=mu, sigma=sigma)  # as MAR's, pytorch-fid's and clean-fid's
    alone = score(network, reference_lib.read(path, network))
    assert alone == {x: whole[x] for x in ("frechet_distance", "inception_score")}
    np.savez(path, arr_0=IMAGE)
    images = reference_lib.read(path, network)
    np.testing.assert_allclose(images.features.covariance, sigma, rtol=1e-12)


def test_a_folder_is_read(network, real, tmp_path):
    from PIL import Image

    for i, image in enumerate(IMAGE):
        Image.fromarray(image).save(tmp_path / f"{i:03d}.png")
    read = reference_lib.read(tmp_path, network)
    np.testing.assert_array_equal(read.features.covariance, real.features.covariance)
    assert read.facts["crop"] == "none"


def test_what_cannot_be_compared_is_one_line(network, real, tmp_path):
    path = tmp_path / "ref.npz"
    other = dataclasses.replace(network, description="other sums")
    mu, sigma = real.features.mean, real.features.covariance

    def saved(**arrays):
        np.savez(path, **arrays)
        return lambda: reference_lib.read(path, network)

    def ours():
        reference_lib.write(path, real)
        return lambda: reference_lib.read(path, other)

    def broken(**arrays):
        reference_lib.write(path, real)
        with np.load(path) as file:
            return saved(**{**file, **arrays})

    bad = sigma.copy()
    bad[0, 0] = np.nan
    images = image_sets.Array(IMAGE)
    cases = [
        (ours, "was made with network random sums of pixels, this evaluation has other sums"),
        (lambda: saved(mu=mu, sigma=sigma[:3]), "sigma float64 \\[3, 12\\]"),
        (lambda: saved(mu=mu, sigma=bad), "mu or sigma is not finite"),
        (lambda: saved(mu=mu), "lacks sigma"),
        (lambda: saved(mu=mu, sigma=np.triu(sigma)), "sigma is no covariance"),
        (lambda: saved(mu=mu, sigma=sigma - np.trace(sigma) * np.eye(12)), "no covariance"),
        (lambda: saved(mu=mu[:5], sigma=sigma[:5, :5], arr_0=IMAGE), "5 features, the network has"),
        (lambda: saved(x=mu), "lacks arr_0"),
        (lambda: broken(card="[1]"), "its card must be one JSON object"),
        (lambda: broken(features=mu), "its features are not rows of finite float32"),
        (lambda: broken(label=LABEL[:3]), "labels are not as many as features"),
        (lambda: broken(count=np.ones(2, int)), "count must be one whole number"),
        (lambda: lambda: scoring.score(images, other, real), "the reference was made with network"),
        (
            lambda: lambda: scoring.score(image_sets.Array(IMAGE[:, :2, :2]), network, real),
            r"samples are \[2, 2, 3\], those of the reference \[4, 4, 3\]",
        ),
        (
            lambda: lambda: summary.summarise(images, network, width=2048),
            "has 12 features, the reference was made with 2048",
        ),
    ]
    for prepare, message in cases:
        act = prepare()
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value)
