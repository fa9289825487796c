"""Samplers for jax alone: what a process without this library draws is what the library draws."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import test_captions
import test_converted
import test_converted_codes
import tiny
from test_cli import assert_one_line

from arcond_jax import build, types
from arcond_jax.build import transport as transport_lib
from arcond_jax.cli import main
from arcond_jax.run import drawing, exporting, load, restoring
from arcond_jax.transport import refiners

pytestmark = pytest.mark.long

SEED = 3_000_000_000  # more than an int32 holds
FILES = {"load.py", "manifest.json", "sampler.stablehlo", "weights.safetensors"}
CODES = {
    name: (config, (*test_converted_codes.overrides_of(name),))
    for name, (config, _, _) in test_converted_codes.FAMILIES.items()
}
CONFIGS = CODES | {
    "drafter": (
        "llamagen_b_256:drafter",
        (*CODES["llamagen"][1], "sampling.speculative=True"),
    ),
    "mar": ("mar_base_imagenet256", test_converted.OVERRIDES),
    "t2i": ("llamagen_t2i_xl_256", test_captions.OVERRIDES),
    "dit": (
        "cdm_xl_imagenet256",
        (
            *test_converted_codes.BACKBONE,
            *(f"tokenizer.{size}" for size in test_converted_codes.TOKENIZER),
            *("data.image_size=8", "data.num_classes=3", "training.dtype=float32"),
        ),
    ),
}


def config_of(name, kind):
    if name in CONFIGS:
        return build.load_config(*CONFIGS[name])
    chosen = (x for x in tiny.overrides(name) if not x.startswith("transport."))
    sizes = () if kind == "none" else ("transport.num_atoms=8",)
    return build.load_config(f"digits:{name}", (*chosen, f"transport.kind={kind}", *sizes))


def random_tree(shapes):
    """Positive numbers, True, and counts that are enough."""
    rng = np.random.default_rng(1)

    def draw(leaf):
        if leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.full(leaf.shape, 50).astype(leaf.dtype)
        return jnp.asarray(rng.uniform(0.1, 1.0, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, shapes)


def trained_of(config):
    """A model that was never trained."""
    tokenizer = build.abstract_tokenizer(config)
    if hasattr(tokenizer, "params"):
        tokenizer = tokenizer.replace(params=tiny.random_params(tokenizer.params))
    else:
        tokenizer = random_tree(tokenizer)
    params = tiny.random_params(build.abstract_params(config))
    return restoring.Trained(config, build.mesh(config), tokenizer, params, bank=None, step=0)


def refiner_of(config):
    """A refiner that was never fitted."""
    kind, empty = transport_lib.kind_of(config), jax.eval_shape(lambda: build.empty_bank(config))
    bank = random_tree(empty)
    if kind.unfitted is not None:
        return kind.unfitted(bank, transport_lib.options(config))
    label = jnp.repeat(jnp.arange(bank.count.shape[1]), 2)

    def fitted(bank):
        calibrator = transport_lib.calibrator(config, bank)
        return calibrator.finish(calibrator.init(label))

    return random_tree(jax.eval_shape(fitted, bank))


def prompt_of(config, num_rows):
    if build.family_of(config).prompts == "classes":
        return np.arange(num_rows, dtype=np.int32) * config.data.num_classes // num_rows
    size, width = (num_rows, test_captions.NUM_PREFIX), test_captions.WIDTH
    return types.Caption(
        embedding=np.random.default_rng(0).normal(size=(*size, width)).astype(np.float32),
        valid=np.arange(size[1]) >= np.arange(num_rows)[:, None] % size[1],
        given=np.ones(num_rows, bool),
    )


def drawn_alone(folder, prompts):
    """What a process draws that knows jax and numpy, and the prompts from files."""
    for i, prompt in enumerate(prompts):
        named = {"label": prompt}
        if isinstance(prompt, types.Caption):
            named = {"embedding": prompt.embedding, "valid": prompt.valid}
        np.savez(folder / f"prompt_{i}.npz", **named)
    code = """if True:
        import pathlib, sys
        import numpy as np
        folder, seed, count = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
        sys.path.insert(0, str(folder))
        import load
        draw = load.sampler(folder)
        for i in range(count):
            prompt = dict(np.load(folder / f"prompt_{i}.npz"))
            images = draw(prompt.get("label", prompt), seed=seed, first_row=5 * i)
            np.save(folder / f"images_{i}.npy", images)
        assert not {"arcond_jax", "flax", "safetensors"} & set(sys.modules)
    """
    command = [sys.executable, "-c", code, folder, str(SEED), str(len(prompts))]
    path = os.environ.get("PYTHONPATH", "")
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, cwd=folder)
    return [np.load(folder / f"images_{i}.npy") for i in range(len(prompts))]


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.usefixtures("sizes_unchecked")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("joint", "residual"),
        slow("joint", "none"),
        slow("joint", "stored"),
        slow("joint", "bures"),
        slow("tensorar", "residual"),
        slow("mar", "none"),
        slow("llamagen", "none"),
        slow("drafter", "none"),
        slow("rar", "none"),
        slow("magvit2", "none"),
        slow("dit", "none"),
        slow("t2i", "none"),
        slow("ar", "in_batch"),
    ],
)
def test_a_process_without_the_library_draws_its_images(name, kind, tmp_path):
    config = config_of(name, kind)
    trained, refiner = trained_of(config), refiner_of(config)
    batch_size = 20 if kind == "in_batch" else None
    exporting.write(trained, refiner, tmp_path / "out", batch_size=batch_size)
    assert {x.name for x in (tmp_path / "out").iterdir()} == FILES

    prompts = [prompt_of(config, batch_size or 8), prompt_of(config, batch_size or 3)]
    images = drawn_alone(tmp_path / "out", prompts)
    drawer = drawing.Drawer(trained)
    for i, (prompt, drawn) in enumerate(zip(prompts, images, strict=True)):
        expected, _ = drawer(refiner, prompt, seed=SEED, first_row=5 * i)
        assert len(np.unique(expected)) > 10
        if kind == "in_batch":  # its iterations may be rounded otherwise, by a level here and there
            np.testing.assert_allclose(drawn.astype(int), expected.astype(int), rtol=0, atol=1)
            assert np.mean(drawn != expected) < 0.01
        else:
            np.testing.assert_array_equal(drawn, expected)


SETTINGS = ("transport.kind=none", "sampling.guidance_scale=1.5")


@pytest.fixture
def exported(finished, tmp_path, sizes_unchecked):
    """A run, by the command."""
    arguments = ["export", "--checkpoint", finished, "--stablehlo", "--out", tmp_path / "out"]
    arguments += [f"--config.{x}" for x in SETTINGS]
    assert main.main([str(x) for x in arguments]) == 0
    return tmp_path / "out"


def test_what_an_export_says_and_holds(exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["inputs"] == {"prompt": "int32[b]", "seed": "uint32[]", "first_row": "int32[]"}
    assert manifest["output"] == "uint8[b,8,8,1]" and manifest["num_classes"] == 10
    assert manifest["sampling"]["guidance_scale"] == 1.5 and manifest["checkpoint_step"] == 6
    names = load.weights(exported / "weights.safetensors").keys()
    # What no image depends on stays behind.
    assert "tokenizer/code_mean" in names and "tokenizer/codebook" not in names


@pytest.mark.slow
def test_an_exported_run_draws_by_its_own_command(exported, finished, tmp_path):
    drawn = tmp_path / "drawn.npy"
    arguments = ["--label", "3", "--num_images", "4", "--out", drawn]
    subprocess.run([sys.executable, exported / "load.py", *arguments], check=True)
    config = restoring.config_for(finished, None, list(SETTINGS))
    trained = restoring.restore(finished, config=config)
    label = np.full(4, 3, np.int32)
    expected = drawing.Drawer(trained).images(refiners.Identity(), label, seed=0)
    np.testing.assert_array_equal(np.load(drawn), expected)
    arguments[1] = "10"
    command = [sys.executable, exported / "load.py", *arguments]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].endswith("error: a label is not from 0 to 9")


def test_an_export_that_cannot_be_is_refused(finished, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    export = ["export", "--checkpoint", finished, "--out", tmp_path / "out"]
    stablehlo, in_batch = [*export, "--stablehlo"], "--config.transport.kind=in_batch"
    for arguments, message in (
        ([*stablehlo, "--out", tmp_path / "full"], "full is there already: name a new folder"),
        ([*stablehlo, "--out", tmp_path / "no" / "out"], "does not exist: create it first"),
        ([*stablehlo, "--batch_size", "0"], "--batch_size must be at least 1"),
        ([*export, "--batch_size", "4"], "are of a sampler: add --stablehlo"),
        (stablehlo, "has no calibrated refiner: run `arcond calibrate"),
        ([*stablehlo, in_batch], "whose number the program must know: give --batch_size"),
        ([*stablehlo, in_batch, "--batch_size", "3"], "A batch of 3 rows does not give each"),
    ):
        assert_one_line(arguments, capsys, tmp_path, message)


def test_another_dtype_is_that_of_model_and_tokenizer():
    trained = trained_of(config_of("llamagen", "none"))
    half = exporting.in_dtype(trained, "bfloat16")
    assert half.config.training.dtype == "bfloat16"
    assert half.tokenizer.network.dtype == jnp.bfloat16
    assert half.params is trained.params
    overrides = [f"tokenizer.{name}_multipliers=(1,1)" for name in ("kl", "vq")]
    pair = build.load_config("joint_xl_imagenet256", [*overrides, "training.dtype=float32"])
    zeros = jax.tree.map(lambda x: np.zeros(1), build.abstract_tokenizer(pair))
    trained = restoring.Trained(pair, build.mesh(pair), zeros, {}, bank=None, step=0)
    half = exporting.in_dtype(trained, "bfloat16").tokenizer
    assert half.latents.network.dtype == half.codes.network.dtype == jnp.bfloat16


def test_the_loader_reads_safetensors(tmp_path):
    arrays = {
        "flag": np.array([True, False, True]),
        "half": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
        "none": np.zeros((0, 2), np.float32),
        "scalar": np.array(7, np.int32),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "weights.safetensors", {"about": "nothing"})
    read = load.weights(tmp_path / "weights.safetensors")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype and read[name].shape == array.shape
        np.testing.assert_array_equal(read[name], array)
