"""FID's Inception-v3 around the network: preprocessing, conversion, files; numbers: parity."""

import hashlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from arcond_jax import checkpoint
from arcond_jax.cli import main as cli
from arcond_jax.convert import inception as table_of
from arcond_jax.convert import table
from arcond_jax.data import images
from arcond_jax.evaluation import features, inception
from arcond_jax.nn import inception as network_lib


@pytest.fixture(scope="session")
def params():
    """Random weights, small where they are multiplied."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(inception.abstract_params())
    rng, made = np.random.default_rng(0), []
    for path, shape in leaves:
        drawn = rng.standard_normal(shape.shape, dtype=np.float32)
        if path[-1].key == "kernel":
            made.append(drawn * np.float32(0.3 / np.sqrt(np.prod(shape.shape[:-1]))))
        else:
            made.append(np.float32(1.0) + np.float32(0.1) * drawn)
    return jax.tree_util.tree_unflatten(structure, made)


@pytest.fixture(scope="session")
def weights(params, tmp_path_factory) -> pathlib.Path:
    """The same as an official file."""
    path = tmp_path_factory.mktemp("official") / "weights.safetensors"
    state = table.to_theirs(table_of.rows(inception.abstract_params()), params)
    counters = {
        name.replace("running_var", "num_batches_tracked"): np.zeros((), np.int64)
        for name in state
        if name.endswith("running_var")
    }
    safetensors.numpy.save_file(state | counters, path)
    return path


@pytest.mark.parametrize("preprocessing", inception.PREPROCESSINGS)
def test_floats_are_read_as_the_levels_they_came_from(preprocessing):
    level = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    expected = inception.prepare(np.repeat(level, 3, axis=-1), preprocessing=preprocessing)
    scaled = images.uint8_to_image(level)
    near = np.clip(scaled + np.float32(0.003), -1, 1)  # 0.38 of a level
    for image in (level, scaled, near, jnp.asarray(scaled)):
        read = inception.prepare(image, preprocessing=preprocessing)
        np.testing.assert_array_equal(read, expected)


def test_where_each_resize_looks():
    """A ramp of one level a pixel, where a pixel at x is read as x, to a rounding of float32."""
    ramp = np.broadcast_to(np.arange(23, dtype=np.uint8)[:, None], (1, 23, 23))[..., None]
    at = np.arange(299)
    corners = np.minimum(at * 23 / 299, 22)
    middles = np.clip((at + 0.5) * 23 / 299 - 0.5, 0, 22)
    tf = 128 * inception.prepare(ramp, preprocessing="tf") + 128
    torch = 127.5 * (inception.prepare(ramp, preprocessing="pytorch_fid") + 1)
    for read, expected in ((tf, corners), (torch, middles)):
        shape = (1, 299, 299, 3)
        np.testing.assert_allclose(read, np.broadcast_to(expected[:, None, None], shape), atol=3e-5)


def test_images_of_the_networks_size_are_only_scaled():
    image = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), dtype=np.uint8)
    tf = inception.prepare(image, preprocessing="tf")
    np.testing.assert_array_equal(tf, (image.astype(np.float32) - 128) / 128)


@pytest.mark.slow
def test_converted_weights_say_that_they_are_others(weights, params, tmp_path, capsys):
    out = tmp_path / "inception"
    arguments = ["convert", "--family", "inception", "--source", str(weights), "--out", str(out)]
    assert cli.main(arguments) == 0
    assert "OTHER weights" in capsys.readouterr().out
    made = inception.load(out, preprocessing="pytorch_fid")
    assert isinstance(made, features.Features) and made.num_classes == 1008
    assert "NOT the published ones, preprocessing pytorch_fid, float32" in made.description
    folded = jax.jit(network_lib.folded)(params)
    jax.tree.map(np.testing.assert_array_equal, made.params, folded)
    with pytest.raises(ValueError, match=r"must be uint8 or floats in \[-1, 1\], got int32"):
        made(np.zeros((1, 8, 8, 3), np.int32))
    with pytest.raises(ValueError, match="must have 1 or 3 channels"):
        made(np.zeros((1, 8, 8, 4), np.uint8))
    assert cli.main(arguments) == 2
    assert "exists: delete it" in capsys.readouterr().err


@pytest.mark.slow
def test_published_weights_are_known_by_their_digest(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(table_of, "SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
    out = tmp_path / "inception"
    assert cli.main(["convert", "--family=inception", f"--source={weights}", f"--out={out}"]) == 0
    assert f"the published weights (sha256 {table_of.SHA256})" in capsys.readouterr().out
    assert "NOT" not in inception.load(out).description


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fc.weight", "the weights lack "),
        pytest.param(
            "AuxLogits.fc.bias", "have AuxLogits.fc.bias too many", marks=pytest.mark.slow
        ),
    ],
)
def test_weights_of_another_network_are_refused(name, message, request, tmp_path, capsys):
    path, out = tmp_path / "weights.safetensors", tmp_path / "inception"
    held = {}
    if "Aux" in name:  # torchvision's has that
        held = safetensors.numpy.load_file(request.getfixturevalue("weights"))
    safetensors.numpy.save_file(held | {name: np.zeros(1000, np.float32)}, path)
    assert cli.main(["convert", "--family=inception", f"--source={path}", f"--out={out}"]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and not out.exists()
    assert all(url in line for url in table_of.FILES)
    assert message in line


def test_what_is_no_weights_here(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=r"arcond convert --family inception"):
        inception.load(tmp_path)
    with pytest.raises(ValueError, match=r"'clean' is not one of \('tf', 'pytorch_fid'\)"):
        inception.load(tmp_path, preprocessing="clean")
    with pytest.raises(ValueError, match="float32 or bfloat16, not in 'float16'"):
        inception.load(tmp_path, dtype="float16")


@pytest.mark.slow
def test_rows_together_apart_and_over_a_mesh_read_alike(params):
    folded = jax.jit(network_lib.folded)(params)
    image = np.random.default_rng(1).integers(0, 256, (16, 40, 40, 3), dtype=np.uint8)
    made = inception.Inception(folded, "tf", "float32", "0" * 64, False)
    lots = jax.device_get(made(image))
    prepared = inception.prepare(image, preprocessing="tf")
    whole = inception.outputs(params, prepared)  # not folded before
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    spread = jax.device_put(made, place)(jax.device_put(image, cut))
    assert len(spread.features.sharding.device_set) == 8
    short = made(image[:11])
    for found, rows in ((whole, 16), (spread, 16), (short, 11)):
        for ours, expected in zip(jax.device_get(found), lots, strict=True):
            scale = np.abs(expected).max()
            np.testing.assert_allclose(ours, expected[:rows], atol=1e-5 * scale)
