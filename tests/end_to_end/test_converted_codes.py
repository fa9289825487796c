"""Models of codes from file to images: converted with their tokenizer, sampled, and refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_cli import assert_one_line
from test_converted import call, convert

from arcond_jax import build, types
from arcond_jax.convert import files
from arcond_jax.evaluation import samples
from arcond_jax.models import causal, windows
from arcond_jax.run import converting, initial, restoring

pytestmark = pytest.mark.long

# The real configs, their sizes cut down; 8x8 pixels make 4x4 tokens.
BACKBONE = ("model.depth=1", "model.width=16", "model.num_heads=2", "model.remat=none")
TOKENIZER = ("multipliers=(1,1)", "width=32", "num_blocks=1")
FAMILIES = {
    "llamagen": (
        "llamagen_b_256",
        "vq",
        (*BACKBONE, "tokenizer.num_codes=64", "tokenizer.latent_channels=16"),
    ),
    "rar": (
        "rar_b",
        "maskgit_vq",
        (
            *(*BACKBONE, "model.mlp_hidden=16"),
            *("tokenizer.num_codes=64", "tokenizer.code_width=32"),
        ),
    ),
    "magvit2": (
        "magvit2_b",
        "lfq",
        (*BACKBONE, "model.intra_depth=1", "tokenizer.num_bits=6", "model.factor_sizes=(4,16)"),
    ),
}
PRESETS = {
    "llamagen": {"guidance_scale": 2.0, "guidance_schedule": "constant", "code_temperature": 1.0},
    "rar": {
        "guidance_scale": 16.0,
        "guidance_schedule": "power_cosine",
        "guidance_power": 2.75,
        "code_temperature": 1.0,
    },
    "magvit2": {
        "guidance_scale": 1.9,
        "guidance_schedule": "constant",
        "code_temperature": 1.0,
        "later_guidance_scale": 2.0,
        "later_code_temperature": 1.0,
    },
}


def overrides_of(family):
    _, _, more = FAMILIES[family]
    sizes = (f"tokenizer.{size}" for size in TOKENIZER)
    return ("data.image_size=8", "data.num_classes=3", "training.dtype=float32", *sizes, *more)


def config_flags(family):
    flags = (f"--config.{override}" for override in overrides_of(family))
    return ["--config", FAMILIES[family][0], *flags]


def write_official(folder, family, config):
    """A file as the official repository would have it, for a model of the config."""
    shapes = converting.formats()[family].abstract(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
    converting.export(family, params, config, folder / f"{family}.safetensors")


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    for family, (name, tokenizer, _) in FAMILIES.items():
        config = build.load_config(name, overrides_of(family))
        for one in (family, tokenizer):
            write_official(folder, one, config)
    return folder


@pytest.fixture(scope="module")
def converted(official, tmp_path_factory):
    """Never to be written to."""
    folder = tmp_path_factory.mktemp("converted")
    for family, (_, tokenizer, _) in FAMILIES.items():
        flags = config_flags(family)
        raw = ["--weights", "raw"]
        source = official / f"{tokenizer}.safetensors"
        call(convert(tokenizer, source, folder / tokenizer, *flags, *raw))
        arguments = convert(family, official / f"{family}.safetensors", folder / family, *flags)
        call([*arguments, "--tokenizer", folder / tokenizer])
    return folder


@pytest.mark.parametrize(
    "family",
    ["llamagen", *(pytest.param(x, marks=pytest.mark.slow) for x in ("rar", "magvit2"))],
)
def test_weights_are_sampled_with_their_preset(family, converted, tmp_path):
    out = tmp_path / "out.npz"
    call(["sample", "--checkpoint", converted / family, "--out", out, "--num_images", 3])
    drawn = samples.read_samples(out)
    assert drawn.image_uint8.shape == (3, 8, 8, 3)
    assert drawn.metadata["sampling"] == {**PRESETS[family], "labels": "balanced"}


@pytest.mark.parametrize("family", FAMILIES)
def test_export_gives_the_official_file_back(family, converted, official, tmp_path):
    target = tmp_path / "back.safetensors"
    call(["export", "--checkpoint", converted / family, "--out", target])
    theirs = safetensors.numpy.load_file(official / f"{family}.safetensors")
    back = files.load_state(target)
    assert back.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize(
    "family",
    ["llamagen", *(pytest.param(x, marks=pytest.mark.slow) for x in ("rar", "magvit2"))],
)
def test_windows_start_as_the_converted_model(family, converted, caplog):
    """Logits of entry 0, whatever drafts show, are those of the official weights to the bit."""
    name, _, _ = FAMILIES[family]
    plain = build.load_config(name, overrides_of(family))
    config = build.load_config(f"{name}:tensorar_v1", overrides_of(family))
    mesh = build.mesh(config)
    fresh = build.train_state(config, mesh).params
    with caplog.at_level("INFO"):
        params, _ = initial.start(initial.Initial(converted / family), config, fresh, mesh, None)
    assert "new: window_decoder, window_encoder" in caplog.text
    held = restoring.restore(converted / family).params
    label, at = jnp.arange(3), jnp.arange(16)
    codes = jax.random.randint(jax.random.key(0), (3, 16), 0, 64)

    def logits(config, params):
        generator = build.generator(config)
        factors, _ = generator.own(types.Tokens(codes=codes))
        window = generator.network.window
        fed = windows.of(factors, window)[:, :-1]
        token = types.Token(codes=fed, seen=jnp.ones(fed.shape[:-1], bool))
        apply = functools.partial(generator.apply, params)
        cond = apply(token, label, at, method=causal.teacher_forced)
        rows = apply(cond, windows.ahead(at, window), method="rows")
        return apply(rows[:, :, 0], factors, method="all_factor_logits")

    ours, theirs = (
        jax.jit(functools.partial(logits, x))(y) for x, y in ((config, params), (plain, held))
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_tokenizers_that_are_not_the_model_s(official, converted, tmp_path, capsys):
    rar = convert("rar", official / "rar.safetensors", tmp_path / "out", *config_flags("rar"))
    message = "vq holds vq, the model rar_b needs a tokenizer maskgit_vq"
    assert_one_line([*rar, "--tokenizer", converted / "vq"], capsys, tmp_path, message)
    # A codebook of another size under a model of the right one.
    model = convert("llamagen", official / "llamagen.safetensors", tmp_path / "out")
    model += [*config_flags("llamagen"), "--config.tokenizer.code_width=4", "--tokenizer"]
    message = "vq holds a tokenizer with tokenizer.code_width 8, the model llamagen_b_256 needs 4"
    assert_one_line([*model, converted / "vq"], capsys, tmp_path, message)
    wrong = [f"--config.{x}" for x in ("tokenizer.num_codes=32",)]
    arguments = convert("llamagen", official / "llamagen.safetensors", tmp_path / "out")
    arguments += [*config_flags("llamagen"), *wrong]
    message = "tok_embeddings.weight is (64, 16) in the weights and (32, 16) in the model"
    assert_one_line(arguments, capsys, tmp_path, message)


def test_codes_of_another_tokenizer_at_sampling(converted, tmp_path, capsys):
    arguments = ["sample", "--checkpoint", converted / "llamagen", "--out", tmp_path / "out.npz"]
    arguments += [f"--config.tokenizer.path={converted / 'maskgit_vq'}"]
    assert_one_line(arguments, capsys, tmp_path, "of another")


def test_the_image_size_of_llamagen_s_weights(official, tmp_path, capsys):
    """Shapes are the same for all image sizes: the name and the old table of positions tell."""
    state = safetensors.numpy.load_file(official / "llamagen.safetensors")
    source = tmp_path / "c2i_B_384.safetensors"
    safetensors.numpy.save_file(state, source)
    flags = config_flags("llamagen")[2:]
    message = "the weights are for images of 384 pixels, config llamagen_b_256 for 8: take"
    arguments = convert("llamagen", source, tmp_path / "out", "--config", "llamagen_b_256", *flags)
    assert_one_line(arguments, capsys, tmp_path, message)
    source = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({**state, "freqs_cis": np.zeros((1 + 24**2, 4, 2))}, source)
    arguments = convert("llamagen", source, tmp_path / "out", "--config", "llamagen_b_256", *flags)
    assert_one_line(arguments, capsys, tmp_path, message)


@pytest.mark.slow  # writes files of 444 MB
def test_the_config_is_found_by_shapes_and_name(tmp_path, capsys):
    config = build.load_config("llamagen_b_384")
    write_official(tmp_path, "llamagen", config)
    source = tmp_path / "llamagen.safetensors"
    message = "the weights fit llamagen_b_256, llamagen_b_384: give their --config"
    assert_one_line(convert("llamagen", source, tmp_path / "out"), capsys, tmp_path, message)
    source = source.rename(tmp_path / "c2i_B_384.safetensors")
    call(convert("llamagen", source, tmp_path / "out"))
    assert capsys.readouterr().out.startswith("llamagen_b_384, ema weights")
