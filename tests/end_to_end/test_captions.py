"""Models of captions from file to images: converted, sampled with captions, and refused."""

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from test_cli import assert_one_line
from test_converted import call, convert
from test_converted_codes import BACKBONE, TOKENIZER, write_official

from arcond_jax import build
from arcond_jax.evaluation import samples
from arcond_jax.run import captions as captions_lib
from arcond_jax.run import drawing, restoring
from arcond_jax.transport import refiners

pytestmark = pytest.mark.long

# The real config, its sizes cut down; 8x8 pixels make 4x4 tokens.
NUM_PREFIX, WIDTH = 6, 8
VQ = (
    "tokenizer.num_codes=64",
    "tokenizer.latent_channels=16",
    *(f"tokenizer.{size}" for size in TOKENIZER),
)
OVERRIDES = (
    "data.image_size=8",
    "training.dtype=float32",
    f"model.num_caption_vectors={NUM_PREFIX}",
    f"model.caption_width={WIDTH}",
    *VQ,
    *BACKBONE,
)
CONFIG = ["--config", "llamagen_t2i_xl_256", *(f"--config.{x}" for x in OVERRIDES)]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    config = build.load_config("llamagen_t2i_xl_256", OVERRIDES)
    for family in ("vq", "llamagen_t2i"):
        write_official(folder, family, config)
    return folder


@pytest.fixture(scope="module")
def converted(official, tmp_path_factory):
    """Never to be written to."""
    folder = tmp_path_factory.mktemp("converted")
    vq = convert("vq", official / "vq.safetensors", folder / "vq", *CONFIG, "--weights", "raw")
    call(vq)
    source = official / "llamagen_t2i.safetensors"
    model = convert("llamagen_t2i", source, folder / "t2i", *CONFIG)
    call([*model, "--tokenizer", folder / "vq"])
    return folder / "t2i"


def write_captions(path, **changed):
    """Three captions, with one, two and all vectors of their own; None leaves an array out."""
    rng = np.random.default_rng(0)
    arrays = {
        "embedding": rng.normal(size=(3, NUM_PREFIX, WIDTH)).astype(np.float32),
        "valid": np.arange(NUM_PREFIX) >= NUM_PREFIX - np.array([[1], [2], [NUM_PREFIX]]),
    }
    arrays |= changed
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
    return path


def sample(converted, out, *more):
    return ["sample", "--checkpoint", converted, "--out", out, *more]


def test_captions_take_turns(converted, tmp_path):
    path, out = write_captions(tmp_path / "captions.npz"), tmp_path / "out.npz"
    call(sample(converted, out, "--captions", path, "--seed", 3))
    drawn = samples.read_samples(out)
    assert drawn.image_uint8.shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(drawn.label, [0, 1, 2])
    settings = drawn.metadata["sampling"]
    assert (settings["guidance_scale"], settings["top_k"]) == (7.5, 1000)
    assert settings["captions"] == "captions.npz"


@pytest.mark.slow
def test_a_label_is_the_number_of_a_caption(converted, tmp_path):
    path, out = write_captions(tmp_path / "captions.npz"), tmp_path / "out.npz"
    call(sample(converted, out, "--captions", path, "--label", 1, "--num_images", 4))
    drawn = samples.read_samples(out)
    np.testing.assert_array_equal(drawn.label, [1] * 4)
    # The other captions may be anything.
    captions = captions_lib.read(path, restoring.config_for(converted, None, []))
    alone = captions_lib.Captions(captions.embedding[1:2], captions.valid[1:2])
    prompt = captions_lib.prompt_of(np.zeros(4, np.int32), alone)
    drawer = drawing.Drawer(restoring.restore(converted))
    image_uint8 = drawer.images(refiners.Identity(), prompt, seed=0)
    np.testing.assert_array_equal(drawn.image_uint8, image_uint8)
    call(sample(converted, out, "--captions", path, "--num_images", 4))
    np.testing.assert_array_equal(samples.read_samples(out).label, [0, 1, 2, 0])


def test_captions_that_cannot_be_drawn(converted, tmp_path, capsys):
    out, n = tmp_path / "out.npz", NUM_PREFIX
    good = write_captions(tmp_path / "good.npz")
    text = tmp_path / "text.npz"
    text.write_text("a dog")
    full = np.ones((3, n), bool)
    bad = full.copy()
    bad[1, 2] = False
    behind = np.arange(n) < np.array([[1], [2], [n]])
    wrong = {
        "lacks embedding": dict(embedding=None),
        "lacks valid": dict(valid=None),
        "embedding is [3, 5, 8], the model needs [n, 6, 8]": dict(embedding=np.zeros((3, 5, 8))),
        "embedding is [0, 6, 8], the model": dict(embedding=np.zeros((0, 6, 8))),
        "embedding is [6, 8], the model": dict(embedding=np.zeros((6, 8))),
        "valid is bool [2, 6], the captions need bool [3, 6]": dict(valid=full[:2]),
        "valid is int64 [3, 6], the captions need": dict(valid=full.astype(int)),
        "something else than finite floats": dict(embedding=np.full((3, n, WIDTH), np.nan)),
        "else than finite floats": dict(embedding=np.zeros((3, n, WIDTH), int)),
        "valid must be False at the padding in front": dict(valid=bad),
        "valid must be False at the padding": dict(valid=behind),
    }
    files = {
        message: write_captions(tmp_path / f"{i}.npz", **changed)
        for i, (message, changed) in enumerate(wrong.items())
    }
    for path, message in (
        *((path, message) for message, path in files.items()),
        (text, "text.npz is not a whole file of captions"),
        (tmp_path / "no.npz", "no.npz: no such file of captions"),
    ):
        assert_one_line(sample(converted, out, "--captions", path), capsys, tmp_path, message)
    for more, message in (
        (["--label", 3], "label 3 is not a class: use 0 to 2"),
        (["--label", -1], "label -1 is not a class: use 0 to 2"),
        (["--class_name", "goldfish"], "--class_name names classes, not captions: use --label"),
        (["--num_images", 0], "--num_images and --batch_size must be at least 1"),
    ):
        arguments = sample(converted, out, "--captions", good, *more)
        assert_one_line(arguments, capsys, tmp_path, message)
    message = "the model llamagen_t2i_xl_256 draws captions: give --captions"
    assert_one_line(sample(converted, out), capsys, tmp_path, message)


def test_captions_for_a_model_of_classes(tmp_path, capsys):
    overrides = [x for x in OVERRIDES if "caption" not in x]
    config = build.load_config("llamagen_b_256", overrides)
    write_official(tmp_path, "llamagen", config)
    flags = ["--config", "llamagen_b_256", *(f"--config.{x}" for x in overrides)]
    call(convert("llamagen", tmp_path / "llamagen.safetensors", tmp_path / "b", *flags))
    capsys.readouterr()
    path = write_captions(tmp_path / "captions.npz")
    arguments = sample(tmp_path / "b", tmp_path / "out.npz", "--captions", path)
    assert_one_line(arguments, capsys, tmp_path, "draws classes, so leave out --captions")


def test_export_gives_the_official_file_back(converted, official, tmp_path):
    target = tmp_path / "back.safetensors"
    call(["export", "--checkpoint", converted, "--out", target])
    theirs = safetensors.numpy.load_file(official / "llamagen_t2i.safetensors")
    back = safetensors.numpy.load_file(target)
    assert back.keys() == theirs.keys() and "cls_embedding.uncond_embedding" in back
    for name, array in theirs.items():
        np.testing.assert_array_equal(back[name], array)


def test_models_of_captions_train_on_a_caption_for_each_class(converted, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in "abc":
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for i in range(2):
            pixels = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
            pixels.save(tmp_path / "data" / "train" / name / f"{i}.png")
    captions = write_captions(tmp_path / "captions.npz")
    settings = {
        "data.directory": tmp_path / "data",
        "data.num_classes": 3,
        "data.batch_size": 4,
        "tokenizer.path": converted.parent / "vq",
        "training.num_train_steps": 2,
        "training.num_warmup_steps": 0,
        "training.log_every": 1,
        "training.samples_every": 2,
    }
    arguments = ["train", "--workdir", tmp_path / "run", *CONFIG]
    arguments += [f"--config.{name}={value}" for name, value in settings.items()]
    message = "data.captions is not set: give the file that `arcond captions` made"
    assert_one_line(arguments, capsys, tmp_path, message)
    few = write_captions(
        tmp_path / "few.npz",
        embedding=np.zeros((1, NUM_PREFIX, WIDTH)),
        valid=np.ones((1, NUM_PREFIX), bool),
    )
    message = "few.npz has 1 captions, data.num_classes is 3: give one for each class"
    few = [*arguments, f"--config.data.captions={few}"]
    assert_one_line(few, capsys, tmp_path, message)
    call([*arguments, f"--config.data.captions={captions}"])
    assert (tmp_path / "run" / "samples" / "step_00000002.png").exists()
    call(sample(tmp_path / "run", tmp_path / "out.npz", "--captions", captions))
    assert samples.read_samples(tmp_path / "out.npz").image_uint8.shape == (3, 8, 8, 3)


def test_weights_of_the_other_kind(official, tmp_path, capsys):
    source = official / "llamagen_t2i.safetensors"
    flags = [x for x in CONFIG[2:] if "caption" not in x]
    flags = ["--config", "llamagen_b_256", *flags]
    arguments = convert("llamagen", source, tmp_path / "out", *flags)
    assert_one_line(arguments, capsys, tmp_path, "lack cls_embedding.embedding_table.weight")
    # Of a table of positions the first 120 are the caption's.
    state = safetensors.numpy.load_file(source)
    source = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({**state, "freqs_cis": np.zeros((120 + 32**2, 4, 2))}, source)
    message = "the weights are for images of 512 pixels, config llamagen_t2i_xl_256 for 8: take"
    arguments = convert("llamagen_t2i", source, tmp_path / "out", *CONFIG)
    assert_one_line(arguments, capsys, tmp_path, message)
