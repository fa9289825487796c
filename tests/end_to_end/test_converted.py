"""Official weights from file to images: converted, sampled, inpainted, exported, and refused."""

import json

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from test_cli import assert_one_line

from arcond_jax import build, checkpoint
from arcond_jax.build import tokens
from arcond_jax.cli import main
from arcond_jax.convert import files, table
from arcond_jax.evaluation import samples
from arcond_jax.run import converting, drawing, restoring
from arcond_jax.training import state as state_lib

pytestmark = pytest.mark.long

# The real config, its sizes cut down; 8x8 pixels make 4x4 tokens.
OVERRIDES = (
    "data.image_size=8",
    "data.num_classes=3",
    "tokenizer.width=32",
    "tokenizer.multipliers=(1,1)",
    "tokenizer.num_blocks=1",
    "tokenizer.latent_channels=4",
    "model.encoder_depth=1",
    "model.encoder_width=16",
    "model.encoder_num_heads=2",
    "model.decoder_depth=2",
    "model.decoder_width=16",
    "model.decoder_num_heads=2",
    "model.buffer_size=2",
    "diffusion_head.depth=1",
    "diffusion_head.width=16",
    "training.dtype=float32",
    "sampling.num_ar_steps=2",
    "sampling.num_buckets=1",
    "sampling.num_head_evaluations=2",
)
FLAGS = [f"--config.{override}" for override in OVERRIDES]
CONFIG = ["--config", "mar_base_imagenet256", *FLAGS]


def convert(family, source, out, *more):
    return ["convert", "--family", family, "--source", source, "--out", out, *more]


def call(arguments):
    assert main.main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Files as the official repository would have them, for models of these sizes."""
    folder = tmp_path_factory.mktemp("official")
    config = build.load_config("mar_base_imagenet256", OVERRIDES)
    rng = np.random.default_rng(0)
    for family in ("mar", "kl16"):
        shapes = converting.formats()[family].abstract(config)
        params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
        converting.export(family, params, config, folder / f"{family}.safetensors")
    return folder


@pytest.fixture(scope="module")
def converted(official, tmp_path_factory):
    """Never to be written to."""
    folder = tmp_path_factory.mktemp("converted")
    call(convert("kl16", official / "kl16.safetensors", folder / "kl16", *CONFIG))
    mar = convert("mar", official / "mar.safetensors", folder / "mar", *CONFIG)
    call([*mar, "--tokenizer", folder / "kl16"])
    return folder


def test_weights_are_sampled_with_their_preset(converted, tmp_path, capsys):
    out = tmp_path / "out.npz"
    call(["sample", "--checkpoint", converted / "mar", "--out", out, "--num_images", 3])
    drawn = samples.read_samples(out)
    assert drawn.image_uint8.shape == (3, 8, 8, 3)
    settings = drawn.metadata["sampling"]
    assert settings["guidance_scale"] == 2.9  # of the official README, for MAR-B
    assert settings["guidance_schedule"] == "linear"
    assert settings["num_ar_steps"] == 2


def test_what_is_known_of_converted_weights(converted):
    known = checkpoint.load_metadata(str(converted / "mar" / "weights"))
    assert (known["family"], known["weights"]) == ("mar", "ema")
    assert known["source"] == "mar.safetensors" and len(known["source_sha256"]) == 64
    assert known["config"]["tokenizer"]["path"] == str(converted / "kl16")


def test_export_gives_the_official_file_back(converted, official, tmp_path):
    target = tmp_path / "mar.safetensors"
    call(["export", "--checkpoint", converted / "mar", "--out", target])
    assert_same(files.load_state(target), safetensors.numpy.load_file(official / target.name))


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(state[name], array)


def test_export_for_the_official_code(converted, official, tmp_path):
    """`--resume` of MAR's main_mar.py loads both entries, by the names of the model."""
    torch = pytest.importorskip("torch")
    target = tmp_path / "checkpoint-last.pth"
    call(["export", "--checkpoint", converted / "mar", "--out", target])
    expected = safetensors.numpy.load_file(official / "mar.safetensors")
    loaded = torch.load(target)  # as there: its default is to read weights only
    for entry in ("model", "model_ema"):
        assert_same({name: x.numpy() for name, x in loaded[entry].items()}, expected)
    for weights in ("ema", "raw"):
        out = tmp_path / weights
        call([*convert("mar", target, out, *CONFIG), "--weights", weights])
        call(["export", "--checkpoint", out, "--out", tmp_path / "back.safetensors"])
        assert_same(safetensors.numpy.load_file(tmp_path / "back.safetensors"), expected)


def test_export_is_refused_before_the_work(converted, tmp_path, capsys):
    for out, message in (
        (tmp_path / "mar.npz", "the ending must be one of .safetensors"),
        (tmp_path / "no" / "mar.safetensors", "does not exist: make the folder first"),
    ):
        arguments = ["export", "--checkpoint", tmp_path / "not there", "--out", out]
        assert_one_line(arguments, capsys, tmp_path, message)


# Forms in which people have the same weights.


def test_shards_of_bfloat16_with_names_of_wrappers(official, tmp_path):
    state = safetensors.numpy.load_file(official / "kl16.safetensors")
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in state.items()}
    folder, parts = tmp_path / "kl16", {"1.safetensors": {}, "2.safetensors": {}}
    folder.mkdir()
    for i, (name, array) in enumerate(half.items()):
        parts[f"{1 + i % 2}.safetensors"][f"module._orig_mod.{name}"] = array
    for file, part in parts.items():
        safetensors.numpy.save_file(part, folder / file)
    places = {name: file for file, part in parts.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    for source in (index, folder):
        out = tmp_path / f"of_{source.name}"
        call(convert("kl16", source, out, *CONFIG))
        known = checkpoint.load_metadata(f"{out}/weights")
        assert known["source"] == source.name
        assert known["source_sha256"] == files.digest([folder / file for file in sorted(parts)])
        config = build.load_config("mar_base_imagenet256", OVERRIDES)
        params = tokens.load_weights(str(out), build.abstract_tokenizer(config).params)
        rows = converting.formats()["kl16"].rows(config)
        widened = {name: x.astype(np.float32) for name, x in half.items()}
        assert_same(table.to_theirs(rows, params), widened)


def test_weights_that_are_not_finite(official, tmp_path, capsys):
    state = safetensors.numpy.load_file(official / "mar.safetensors")
    state["z_proj.bias"] = np.full_like(state["z_proj.bias"], np.nan)
    source = tmp_path / "mar.safetensors"
    safetensors.numpy.save_file(state, source)
    arguments = convert("mar", source, tmp_path / "out", *CONFIG)
    message = "mar.safetensors: 16 of 16 numbers are not finite in z_proj.bias"
    assert_one_line(arguments, capsys, tmp_path, message)


def test_weights_that_do_not_fit(official, tmp_path, capsys):
    source, out = official / "mar.safetensors", tmp_path / "out"
    for arguments, *message in (
        (convert("mar", source, out), "fit none of mar_base_imagenet256, mar_large", "--config"),
        (convert("kl16", source, out, *CONFIG), "lack decoder.conv_in", "of another model"),
        (
            convert("mar", source, out, *CONFIG, "--config.model.decoder_width=32"),
            "decoder_embed.weight is (16, 16) in the weights and (32, 16) in the model",
        ),
        (convert("mar", tmp_path / "no.pth", out), "no.pth does not exist"),
        (
            convert("mar", source, out, "--tokenizer", tmp_path),
            "holds no converted tokenizer: convert it first",
        ),
        (convert("mar", source, out, *FLAGS), "needs --config"),
    ):
        assert_one_line(arguments, capsys, tmp_path, *message)


def test_damaged_weights(official, tmp_path, capsys):
    source = tmp_path / "mar.safetensors"
    source.write_bytes((official / "mar.safetensors").read_bytes()[:-100])
    arguments = convert("mar", source, tmp_path / "out", *CONFIG)
    assert_one_line(arguments, capsys, tmp_path, "mar.safetensors is damaged")


def test_weights_are_not_overwritten(official, converted, capsys):
    arguments = convert("kl16", official / "kl16.safetensors", converted / "kl16", *CONFIG)
    assert_one_line(arguments, capsys, converted, "holds weights already")


def test_weights_without_a_tokenizer(official, tmp_path, capsys):
    call(convert("mar", official / "mar.safetensors", tmp_path / "mar", *CONFIG))
    capsys.readouterr()
    arguments = ["sample", "--checkpoint", tmp_path / "mar", "--out", tmp_path / "out.npz"]
    assert_one_line(arguments, capsys, tmp_path, "tokenizer.path is not set")


def test_decoding_steps_out_of_range(converted, capsys):
    arguments = ["sample", "--checkpoint", converted / "mar", "--out", converted / "out.npz"]
    arguments += ["--config.sampling.num_ar_steps=17"]
    message = "num_ar_steps 17 is out of range: there are 16 tokens to draw, so use 1 to 16"
    assert_one_line(arguments, capsys, converted, message)


# Inpainting.


def write_png(path, pixels):
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return path


@pytest.fixture
def picture(tmp_path):
    return write_png(tmp_path / "image.png", np.random.default_rng(0).integers(0, 255, (8, 8, 3)))


def inpaint(converted, picture, mask, out):
    arguments = ["sample", "--checkpoint", converted / "mar", "--out", out, "--num_images", 2]
    return [*arguments, "--inpaint", picture, "--mask", mask]


def test_inpainting_keeps_what_is_black(converted, picture, tmp_path, monkeypatch):
    draws, draw = [], drawing.Drawer.__call__

    def watched(self, *args, known, **options):
        image, sampled = draw(self, *args, known=known, **options)
        draws.append((known, sampled))
        return image, sampled

    monkeypatch.setattr(drawing.Drawer, "__call__", watched)
    mask = np.full((8, 8), 255)
    mask[:, :3] = 0  # of the second column of tokens only a part, so it is drawn
    call(inpaint(converted, picture, write_png(tmp_path / "mask.png", mask), tmp_path / "out.npz"))
    assert samples.read_samples(tmp_path / "out.npz").image_uint8.shape == (2, 8, 8, 3)

    [(known, sampled)] = draws
    kept = np.asarray(known.given).reshape(4, 4)
    np.testing.assert_array_equal(kept, np.arange(4)[None] < np.ones((4, 1)))
    latents = np.asarray(sampled.tokens.latents)
    for row in latents:
        np.testing.assert_array_equal(row[kept.reshape(-1)], known.latents[0][kept.reshape(-1)])
    assert (latents[0] != latents[1])[~kept.reshape(-1)].all()


def test_inpainting_with_wrong_files(converted, picture, tmp_path, capsys):
    out = tmp_path / "out.npz"
    white = write_png(tmp_path / "white.png", np.full((8, 8), 255))
    black = write_png(tmp_path / "black.png", np.zeros((8, 8)))
    small = write_png(tmp_path / "small.png", np.zeros((4, 8)))
    text = tmp_path / "text.png"
    text.write_text("no image")
    for arguments, *message in (
        (inpaint(converted, small, white, out), "the image is 4x8x3", "images of 8x8x3"),
        (inpaint(converted, picture, small, out), "the mask is 4x8, ", "scale or crop it"),
        (inpaint(converted, picture, black, out), "the mask keeps every token"),
        (inpaint(converted, text, white, out), "text.png cannot be read as an image"),
        (inpaint(converted, picture, white, out)[:-2], "--inpaint and --mask go together"),
    ):
        assert_one_line(arguments, capsys, tmp_path, *message)


def test_only_masked_models_keep_tokens(finished, tmp_path, capsys):
    image = write_png(tmp_path / "image.png", np.zeros((8, 8)))
    mask = np.full((8, 8), 255)
    mask[:, :2] = 0
    mask = write_png(tmp_path / "mask.png", mask)
    arguments = ["sample", "--checkpoint", finished, "--out", tmp_path / "out.npz"]
    arguments += ["--inpaint", image, "--mask", mask, "--config.transport.kind=none"]
    message = "model joint draws every token: only mar can keep some"
    assert_one_line(arguments, capsys, tmp_path, message)


def test_a_fresh_state_starts_from_converted_weights(converted):
    config = restoring.config_for(converted / "mar", None, ["training.num_warmup_steps=0"])
    mesh = build.mesh(config)
    params = restoring.params_of(converted / "mar", config, mesh)
    state = state_lib.with_params(nn.unbox(build.abstract_state(config)), params)
    for tree in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, tree, params)
