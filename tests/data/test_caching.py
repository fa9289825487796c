"""A cache holds what the tokenizer gives for the views of the images, whatever happened to it."""

import functools
import json
import os
import random
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import photographs
import pytest
import tiny

from arcond_jax import build, checkpoint, types
from arcond_jax.build import data as data_lib
from arcond_jax.cli import main as cli
from arcond_jax.data import folder, images, pipeline, records, stored
from arcond_jax.data import views as views_lib
from arcond_jax.parallel import memory
from arcond_jax.run import caching
from arcond_jax.tokenizers import kl, law

SMALL = ("multipliers=(1,1)", "width=32", "num_blocks=1")
# Real configs, their sizes cut down; 16x16 pixels make 8x8 tokens.
CONFIGS = {
    "kl": ("mar_base_imagenet256", (*SMALL, "latent_channels=3")),
    "vq": ("llamagen_b_256", (*SMALL, "latent_channels=32", "num_codes=16", "code_width=4")),
    "maskgit_vq": ("rar_b", (*SMALL, "num_codes=16", "code_width=32")),
    "lfq": ("magvit2_b", (*SMALL, "num_bits=17")),
}
FLIP, TEN = views_lib.Views("flip"), views_lib.Views("ten", (1.05, 1.5))


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """A program for one of the eight devices compiles in half the time."""
    every = jax.local_devices()
    with pytest.MonkeyPatch.context() as patched:
        for name in ("devices", "local_devices"):
            patched.setattr(jax, name, lambda: every[:1])
        yield every


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    return photographs.write_folder(tmp_path_factory.mktemp("unpacked"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folders of small random weights, by tokenizer."""
    root = tmp_path_factory.mktemp("weights")

    @functools.cache
    def write(name):
        abstract = build.abstract_tokenizer(config_of(name, None))
        params = tiny.random_params(abstract.params, scale=0.1)
        checkpoint.save_tree(f"{root / name}/weights", {"params": params}, {})
        return root / name

    return write


def settings(name, path, *more):
    tokenizer = (f"tokenizer.{x}" for x in CONFIGS[name][1])
    own = {"kl": ("sampling.num_ar_steps=8",), "lfq": ("model.factor_sizes=(2,65536)",)}
    return (
        *(*tokenizer, *own.get(name, ()), f"tokenizer.path={path}", "training.dtype=float32"),
        *("data.name=folder", "data.image_size=16", "data.num_classes=3", "data.batch_size=4"),
        *more,
    )


def config_of(name, path, *more):
    return build.load_config(CONFIGS[name][0], settings(name, path, *more))


def pair_of(kl, vq, *more):
    """The joint model's config on two folders of weights."""
    sizes = [f"tokenizer.{name}_{x}" for name in ("kl", "vq") for x in CONFIGS[name][1]]
    paths = (f"tokenizer.kl_path={kl}", f"tokenizer.vq_path={vq}")
    others = [x for x in settings("vq", None) if not x.startswith("tokenizer.")]
    return build.load_config("joint_xl_imagenet256", (*sizes, *paths, *others, *more))


def reading(config, cache, *more):
    """The config that trains on a cache."""
    given = {"data.name": "cache", "data.directory": str(cache)}
    return build.with_overrides(build.changed(config, given), more)


def contents(out):
    """Bytes of every file but those of a fitted tokenizer, in which Orbax keeps the time."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and "tokenizer" not in path.parts
    }


@pytest.fixture(scope="module")
def codes(unpacked, weights, tmp_path_factory):
    """A cache of codes of the mirrored pair, in four shards; never to be written to."""
    out = tmp_path_factory.mktemp("codes") / "out"
    config = config_of("vq", weights("vq"))
    caching.encode(config, [unpacked], out, caching.Options(FLIP, shard_images=3))
    return out


def batches(config, count=4):
    """Batches of training, with the epochs' ends among them."""
    iterator = pipeline.train_iterator(
        build.examples(config, "train"), global_batch_size=5, seed=2, num_threads=0
    )
    return [types.batch_of(x, x["label"]) for x in (next(iterator) for _ in range(count))]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("kl", "float32", marks=pytest.mark.slow),
        pytest.param("kl", "float16", marks=pytest.mark.long),
        pytest.param("vq", "uint16", marks=pytest.mark.long),
        pytest.param("maskgit_vq", "uint16", marks=pytest.mark.slow),
        ("lfq", "uint32"),
    ],
)
def test_a_batch_of_the_cache_has_the_tokens_of_its_images(
    name, dtype, unpacked, weights, tmp_path
):
    """The same images in the same order, the same of them mirrored, the same draws."""
    config = config_of(name, weights(name), f"data.directory={unpacked}")
    options = caching.Options(dtype=dtype if name == "kl" else "float16", shard_images=5)
    manifest, found = caching.encode(config, [unpacked], tmp_path / "out", options)
    assert manifest["complete"]
    kept = "moments" if name == "kl" else "codes"
    assert {x: y["dtype"] for x, y in manifest["arrays"].items()} == {kept: dtype}
    tokenizer, rng = build.tokenizer(config), jax.random.key(5)
    tokens_of = jax.jit(build.tokens_of)
    pairs = zip(batches(config), batches(reading(config, tmp_path / "out")), strict=True)
    for of_images, of_cache in pairs:
        np.testing.assert_array_equal(of_images.prompt, of_cache.prompt)
        expected, ours = (tokens_of(tokenizer, x, rng) for x in (of_images, of_cache))
        if name == "kl":
            # Float32: one program of encoder and draw rounds otherwise than two. Float16: half of
            # its spacing, 2^-11 of a number, of the mean and, by the draw, of the deviation.
            scale = np.abs(expected.latents).max()
            tolerance = {"float32": 1e-5, "float16": 2e-3}[dtype] * scale
            np.testing.assert_allclose(ours.latents, expected.latents, atol=tolerance, rtol=0)
            assert found["latent scale"] > 0.0
        else:
            np.testing.assert_array_equal(ours.codes, expected.codes)
            assert not found


TINY_MAR = (
    *("training.learning_rate=1e-2", "training.num_warmup_steps=1", "training.decay=constant"),
    *(f"model.{x}" for x in ("encoder_depth=1", "encoder_width=16", "encoder_num_heads=2")),
    *(f"model.{x}" for x in ("decoder_depth=2", "decoder_width=16", "decoder_num_heads=2")),
    *("diffusion_head.depth=1", "diffusion_head.width=16", "loss.num_copies=1"),
)


@pytest.mark.slow
def test_losses_from_moments_are_those_with_the_encoder_in_the_step(unpacked, weights, tmp_path):
    """Over updates: views, draws of latents, masks and noise are the same."""
    config = config_of("kl", weights("kl"), f"data.directory={unpacked}", *TINY_MAR)
    mesh, tokenizer, losses = build.mesh(config), build.tokenizer(config), []
    for dtype in ("", *caching.DTYPES):
        out, tried = tmp_path / dtype, config
        if dtype:
            caching.encode(config, [unpacked], out, caching.Options(dtype=dtype))
            tried = reading(config, out)
        step_fn, state = build.train_step(tried, mesh, tokenizer), build.train_state(tried, mesh)
        losses.append([])
        for batch in batches(tried, count=6):
            state, metrics = step_fn(state, tokenizer, batch)
            losses[-1].append(float(metrics["loss"]))
    of_images, of_float16, of_float32 = losses
    np.testing.assert_allclose(of_float32, of_images, rtol=1e-6)
    np.testing.assert_allclose(of_float16, of_images, rtol=1e-3)


def test_the_pair_of_patches_is_kept_with_its_tokenizer(unpacked, tmp_path):
    small = ("tokenizer.num_codes=8", "data.image_size=16", "data.batch_size=4")
    config = build.load_config(f"own_images:{unpacked}", small)
    out = tmp_path / "out"
    _, found = caching.encode(config, [], out, caching.Options(dtype="float32"))
    assert found["latent scale"] == pytest.approx(1.0, rel=0.05)  # they are standardised
    assert 0.0 < found["var(x | y) / var(x)"] < 1.0
    cached = reading(config, out)
    tokenizer = build.tokenizer(cached)
    build.check_cache(cached, tokenizer)
    for of_images, of_cache in zip(batches(config), batches(cached), strict=True):
        expected, ours = (build.tokens_of(tokenizer, x) for x in (of_images, of_cache))
        np.testing.assert_array_equal(ours.codes, expected.codes)
        np.testing.assert_allclose(ours.latents, expected.latents, atol=1e-6)


@pytest.fixture(scope="module")
def pair(unpacked, weights, tmp_path_factory):
    """A cache of moments and codes in four shards, never to be written to, and its config."""
    out = tmp_path_factory.mktemp("pair") / "out"
    config = pair_of(weights("kl"), weights("vq"), f"data.directory={unpacked}")
    _, found = caching.encode(config, [], out, caching.Options(dtype="float32", shard_images=3))
    return out, config, found


@pytest.mark.long
def test_a_pair_is_kept_with_the_law_of_its_codes(pair, unpacked):
    out, config, found = pair
    assert set(stored.Stored(out).arrays) == {"moments", "codes"}
    cached = reading(config, out, "tokenizer.kl_latent_scale=0.5")
    of_images, of_cache = build.tokenizer(config), build.tokenizer(cached)
    build.check_cache(cached, of_cache)
    assert of_images.code_law is None
    rng, tokens_of = jax.random.key(5), jax.jit(build.tokens_of)
    ours, theirs = batches(cached, 1)[0], batches(config, 1)[0]
    ours, theirs = tokens_of(of_cache, ours, rng), tokens_of(of_images, theirs, rng)
    np.testing.assert_array_equal(ours.codes, theirs.codes)
    scaled = theirs.latents * 0.5 / kl.LATENT_SCALE
    np.testing.assert_allclose(ours.latents, scaled, atol=1e-5 * np.abs(scaled).max())

    # From all views of all images, at once.
    rows = [stored.Stored(out).view(i, view) for i in range(12) for view in range(2)]
    mean, log_variance = np.split(np.concatenate([x["moments"] for x in rows]), 2, axis=-1)
    sums = law.sums(
        mean.reshape(-1, 3),
        np.concatenate([x["codes"] for x in rows]),
        variance=np.exp(log_variance).reshape(-1, 3),
        num_codes=16,
    )
    expected, made = law.code_law(sums), of_cache.code_law
    np.testing.assert_allclose(made.mean, 0.5 * expected.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(made.cholesky, 0.5 * expected.cholesky, rtol=1e-5, atol=1e-6)
    assert found == pytest.approx(law.statistics(sums))
    assert caching.estimate(config, [unpacked]) == pytest.approx(found, rel=1e-4)


@pytest.mark.long
def test_a_pair_stopped_and_divided_among_processes_is_the_same(pair, tmp_path):
    """Its law too, to the last bit; what is known of a shard counts as a part of it."""
    expected, config, _ = pair
    arguments = (config, [], tmp_path / "out", caching.Options(dtype="float32", shard_images=3))
    for i in (1, 0):
        manifest, found = caching.encode(*arguments, process_index=i, process_count=2)
        assert bool(found) == manifest["complete"] == (i == 0)
    assert contents(tmp_path / "out") == contents(expected)
    sums, shards = (sorted(tmp_path.glob(f"out/{x}")) for x in ("progress/*.npz", "train-*d"))
    assert len(sums) == len(shards) == 4
    os.truncate(sums[1], 99)
    for gone in (sums[0], shards[2], tmp_path / "out" / stored.LAW):
        gone.unlink()
    caching.encode(*arguments)
    assert contents(tmp_path / "out") == contents(expected)


@pytest.mark.slow
def test_the_law_of_a_pair_passes_over_damaged_images(pair, weights, tmp_path):
    whole, _, found = pair
    source = photographs.write_folder(tmp_path / "source")
    bad = source / "train" / photographs.CLASSES[0] / "z.jpg"  # the fifth of thirteen
    bad.write_bytes(photographs.jpeg(7)[:300])
    config = pair_of(weights("kl"), weights("vq"), f"data.directory={source}")
    options = caching.Options(dtype="float32", shard_images=3)
    manifest, ours = caching.encode(config, [], tmp_path / "one", options)
    assert manifest["failed"] == 1 and ours == pytest.approx(found, rel=1e-6)
    laws = [stored.read_law(x, records.read_manifest(x)) for x in (whole, tmp_path / "one")]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), *laws)
    for i in (1, 0):
        processes = dict(process_index=i, process_count=2)
        caching.encode(config, [], tmp_path / "two", options, **processes)
    next(tmp_path.glob("two/progress/*1-of-*.npz")).unlink()
    caching.encode(config, [], tmp_path / "two", options)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert caching.estimate(config, []) == pytest.approx(found, rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "leaf"),
    [("kl", "to_moments"), pytest.param("vq", "to_code", marks=pytest.mark.slow)],
)
def test_a_pair_with_another_tokenizer_is_refused(name, leaf, pair, weights, tmp_path):
    params = tiny.random_params(build.abstract_tokenizer(config_of(name, None)).params, 0.1)
    params[leaf]["bias"] = params[leaf]["bias"].at[0].add(1e-3)
    checkpoint.save_tree(f"{tmp_path / name}/weights", {"params": params}, {})
    paths = {"kl": weights("kl"), "vq": weights("vq")} | {name: tmp_path / name}
    with pytest.raises(build.ConfigError, match=r"was encoded by a tokenizer with parameters"):
        build.tokenizer(reading(pair_of(**paths), pair[0]))


@pytest.mark.long
def test_what_fits_no_pair_is_refused(pair, weights, tmp_path, capsys):
    out, config, _ = pair
    few = ("warm_start=0.4", "solver=ddim", "spacing=trailing", "num_head_evaluations=1")
    few = build.with_overrides(config, [f"sampling.{x}" for x in few])
    with pytest.raises(build.ConfigError, match=r"warm_start 0\.4 starts from the Gaussian beh"):
        build.check_law(few, build.tokenizer(few))
    with pytest.raises(build.ConfigError, match=r"tokenizer\.vq_path is not set: give the folder"):
        build.tokenizer(pair_of(weights("kl"), None))
    with pytest.raises(checkpoint.CheckpointError, match=r"kl/weights .*another model"):
        build.tokenizer(pair_of(weights("kl"), weights("kl")))
    copied = tmp_path / "out"
    shutil.copytree(out, copied)
    content = bytearray((copied / stored.LAW).read_bytes())
    content[-200] ^= 1
    (copied / stored.LAW).write_bytes(content)
    for state in ("damaged", "missing"):
        with pytest.raises(ValueError, match=rf"code_law.npz is {state}: run the same `arcond enc"):
            build.tokenizer(reading(config, copied))
        (copied / stored.LAW).unlink(missing_ok=True)
    command = ["estimate", "--config", "llamagen_b_256", "--config.data.name=folder"]
    assert "tokenizer vq gives codes alone, and latents are" in refused(capsys, *command)


def test_ten_crops_are_those_of_the_official_code(unpacked, weights, tmp_path):
    config = config_of("vq", weights("vq"))
    out = tmp_path / "out"
    caching.encode(config, [unpacked], out, caching.Options(TEN))
    cache = stored.Stored(out)
    assert cache.num_views == 20 and len(cache.manifest["views"]["names"]) == 20
    tokenizer = build.tokenizer(config)
    store = jax.jit(lambda image: tokenizer.store(images.as_float(image)))
    for number, side in enumerate((16, 24)):  # of ranges 1.05 and 1.5
        square = folder.ImageFolder(unpacked, image_size=side)[7]["image"]
        crops = []
        for image in (square, square[:, ::-1]):
            far, middle = side - 16, round((side - 16) / 2.0)
            places = ((middle, middle), (0, 0), (0, far), (far, 0), (far, far))
            crops += [image[y : y + 16, x : x + 16] for y, x in places]
        found = [cache.view(7, 10 * number + view)["codes"] for view in range(10)]
        np.testing.assert_array_equal(found, store(np.stack(crops)).codes)


def test_the_middle_of_a_square_is_where_torchvision_has_it():
    # Half a pixel goes to the even number: 281 of 256 pixels begin at 12, 403 of 384 at 10.
    for side, size, start in ((281, 256, 12), (403, 384, 10)):
        square = np.broadcast_to(np.arange(side)[:, None, None], (side, side, 1))
        views = views_lib.Views("ten", (1.1,)).cut([square], size)
        assert views.shape == (10, size, size, 1) and views[0, 0, 0, 0] == start


@pytest.mark.parametrize("process_count", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_stopped_and_divided_among_processes_it_is_the_same(
    process_count, unpacked, weights, codes, tmp_path
):
    config, out = config_of("vq", weights("vq")), tmp_path / "out"
    options = caching.Options(FLIP, shard_images=3)
    arguments = (config, [unpacked], out, options)
    complete = [
        caching.encode(*arguments, process_index=i, process_count=process_count)[0]["complete"]
        for i in reversed(range(process_count))
    ]
    assert complete == [False] * (process_count - 1) + [True] and contents(out) == contents(codes)
    # As a process leaves it that is killed while it writes.
    shards = sorted(out.glob("train-*"))
    shards[1].unlink()
    os.truncate(shards[2], 100)
    (out / f".{shards[1].name}.1234").write_bytes(b"half")
    assert caching.encode(*arguments)[0]["complete"] and contents(out) == contents(codes)


def test_damaged_images_are_listed_and_left_out(weights, codes, tmp_path):
    source, out = photographs.write_folder(tmp_path / "source"), tmp_path / "out"
    folder = source / "train" / photographs.CLASSES[1]
    (folder / "bad.jpg").write_bytes(photographs.jpeg(7)[:300])
    config, options = config_of("vq", weights("vq")), caching.Options(FLIP, shard_images=3)
    manifest, _ = caching.encode(config, [source], out, options)
    assert manifest["failed"] == 1
    for index in range(2):
        processes = dict(process_index=index, process_count=2)
        caching.encode(config, [source], tmp_path / "two", options, **processes)
    assert contents(tmp_path / "two") == contents(out)
    (name, why), _ = (x.split("\t") for x in f"{(out / 'failed.txt').read_text()}\t".split("\n"))
    assert name.endswith("bad.jpg") and why.startswith("cannot be read as an image")
    ours, whole = stored.Stored(out), stored.Stored(codes)
    np.testing.assert_array_equal(ours.label, whole.label)
    for i in range(len(whole)):
        np.testing.assert_array_equal(ours.view(i, 1)["codes"], whole.view(i, 1)["codes"])


def test_patches_are_fitted_without_the_damaged_images(tmp_path):
    source = photographs.write_folder(tmp_path / "source")
    small = ("tokenizer.num_codes=8", "data.image_size=16", "data.batch_size=4")
    config = build.load_config(f"own_images:{source}", small)
    for path in (source / "train" / photographs.CLASSES[0]).iterdir():
        path.write_bytes(b"\xff\xd8")
    with pytest.raises(ValueError, match=rf"of the class '{photographs.CLASSES[0]}' can be read"):
        caching.encode(config, [source], tmp_path / "out")
    assert len((tmp_path / "out" / "failed.txt").read_text().splitlines()) == 4


def test_another_machine_goes_on_with_the_same_batches_or_not_at_all(
    unpacked, weights, codes, tmp_path, monkeypatch, caplog
):
    def encode(out, memory_bytes):
        monkeypatch.setattr(memory, "of_device", lambda mesh: memory_bytes)
        options = caching.Options(FLIP, shard_images=3)
        return caching.encode(config_of("vq", weights("vq")), [unpacked], out, options)[0]

    out, whole = tmp_path / "out", contents(codes)
    assert json.loads(whole["manifest.json"])["batch_size"] == 3
    assert encode(out, memory_bytes=1)["batch_size"] == 1
    assert "memory holds 1 images at a time on each device, not 3: give --b" in caplog.text
    small = contents(out)
    sorted(out.glob("train-*"))[1].unlink()
    encode(out, memory_bytes=2**30)
    assert contents(out) == small
    with pytest.raises(ValueError, match=r"begun with batch_size 3, memory holds 1 images .*: go"):
        encode(codes, memory_bytes=1)
    assert contents(codes) == whole


@pytest.mark.slow
def test_many_devices_encode_what_one_does(
    unpacked, weights, codes, tmp_path, one_device, monkeypatch
):
    monkeypatch.setattr(jax, "local_devices", lambda: one_device)
    options = caching.Options(FLIP, shard_images=3)
    caching.encode(config_of("vq", weights("vq")), [unpacked], tmp_path / "out", options)
    assert contents(tmp_path / "out") == contents(codes)


ENCODE = """
import pathlib, sys
from arcond_jax import build
from arcond_jax.run import caching

out, index, count = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])
caching.encode(
    build.load_config("digits:joint"), [], out, caching.Options(shard_images=12),
    process_index=index, process_count=count)
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    options = caching.Options(shard_images=12)
    caching.encode(build.load_config("digits:joint"), [], tmp_path / "whole", options)
    rng, out, kills = random.Random(0), tmp_path / "out", 0
    for attempt in range(30):
        count = 1 + attempt % 2  # one process, then two at once
        started = len(list(out.glob("train-*.array_record")))
        processes = [
            subprocess.Popen([sys.executable, "-c", ENCODE, *map(str, (out, i, count))])
            for i in range(count)
        ]
        until = time.monotonic() + 60
        while len(list(out.glob("train-*.array_record"))) < started + 20 and any(
            x.poll() is None for x in processes
        ):
            assert time.monotonic() < until
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.05))
        for process in processes:
            process.kill()
        kills += sum(process.wait() != 0 for process in processes)
        if records.read_manifest(out, kind=stored.KIND)["complete"]:
            break
    assert kills >= 3 and contents(out) == contents(tmp_path / "whole")


def test_items_are_read_from_the_cache_in_the_order_of_images(codes, unpacked):
    cache = stored.Stored(codes)
    known = folder.ImageFolder(unpacked, image_size=16)
    labels = [int(cache.view(i, 1)["label"]) for i in range(len(cache))]
    assert labels == known.label.tolist() == cache.label.tolist()
    assert cache.label_names == known.label_names
    with pytest.raises(IndexError):
        cache.view(len(cache), 0)


def test_record_layout_is_as_documented():
    arrays = {"codes": np.asarray([[258, 3], [4, 5]], np.uint16)}
    record = stored.pack(7, arrays)
    assert record == b"\x07\x00\x00\x00" + b"\x02\x01\x03\x00\x04\x00\x05\x00"


def refused(capsys, *arguments):
    """The one line of a refusal."""
    assert cli.main(list(map(str, arguments))) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_what_cannot_be_encoded_costs_one_line(unpacked, weights, codes, tmp_path, capsys):
    out, flat = tmp_path / "out", tmp_path / "flat"
    flat.mkdir()
    (flat / "a.jpg").write_bytes(photographs.jpeg(0))
    bad = photographs.write_folder(tmp_path / "bad", "train")
    (bad / "train" / photographs.CLASSES[0] / "bad.jpg").write_bytes(b"\xff\xd8")

    def encode(source, *flags, to=out):
        given = settings("vq", weights("vq"))
        config = ["--config", CONFIGS["vq"][0], *(f"--config.{x}" for x in given)]
        return refused(capsys, "encode", *config, "--source", source, "--out", to, *flags)

    for source, message in (
        (tmp_path / "nothing", "nothing does not exist"),
        (flat, "holds images without labels"),
        (codes, "holds tokens, not images"),
    ):
        assert message in encode(source)
    for flags, message in (
        (("--views", "nine"), "views 'nine' are not one of one, flip, ten"),
        (("--views", "one"), "--views one contradicts data.random_flip True of the config"),
        (("--views", "flip", "--crop_ranges", "1.1"), "crop ranges go with views ten, not with"),
        (("--crop_ranges", "3"), "crop range 3 must be at least 1 and at most 2"),
        (("--config.data.num_classes=4",), "the source has 3 classes, data.num_classes is 4"),
        (("--config.tokenizer.path=None",), "tokenizer.path is not set"),
        (("--process_index", 2), "--process_index 2 must be 0 to 0"),
    ):
        assert message in encode(unpacked, *flags)
    assert not out.exists()
    message = encode(bad, "--on_error", "stop")
    assert "bad.jpg cannot be read as an image" in message and "or leave such images" in message
    message = refused(capsys, "prepare", "--source", codes, "--out", out)
    assert f"{codes} is a cache: train on it by data.name=cache and data.directory=" in message
    assert "was begun with another views" in encode(unpacked, "--views", "ten", to=codes)
    assert "is inside of the source" in encode(unpacked, to=unpacked / "out")
    assert "holds something else" in encode(unpacked, to=flat)


def test_another_cache_is_refused(codes, unpacked, weights, tmp_path):
    config = config_of("vq", weights("vq"))
    cached = reading(config, codes)
    tokenizer = build.tokenizer(cached)
    build.check_cache(cached, tokenizer)
    changed = jax.tree.map(lambda x: x, tokenizer.params)
    table = changed["codebook"]["table"]
    changed["codebook"]["table"] = table.at[3, 1].add(1e-3)
    with pytest.raises(build.ConfigError, match=r"was encoded by a tokenizer with parameters \w+,"):
        build.check_cache(cached, tokenizer.replace(params=changed))
    for override, message in (
        ("data.image_size=32", r"with data.image_size 16, the config says 32: use the same"),
        ("data.num_classes=4", r"with data.num_classes 3, the config says 4"),
        ("data.views=ten", r"with data.views flip, the config says ten"),
        ("data.directory=/nowhere", r"/nowhere does not exist: name a folder that `arcond encode`"),
        (f"data.directory={unpacked}", r"has no manifest.json: .*make one by `arcond encode"),
        ("data.directory=None", r"data.directory is not set: give the folder that `arcond encode`"),
    ):
        with pytest.raises(ValueError, match=message):
            build.examples(reading(config, codes, override), "train")
    rar = config_of("maskgit_vq", None)
    with pytest.raises(build.ConfigError, match=r"tokenizer.name vq, the config says maskgit_vq"):
        build.examples(reading(rar, codes), "train")
    with pytest.raises(build.ConfigError, match=r"holds no images \(it was encoded from unpacked"):
        data_lib.source(cached, "held_out")


def test_a_cache_that_is_unfinished_or_damaged_is_refused(codes, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name, content in contents(codes).items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    shard = sorted(out.glob("train-*"))[1]
    content = bytearray(shard.read_bytes())
    at = content.index(stored.Stored(out).view(4, 1)["codes"].tobytes())
    content[at] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{shard.name} is damaged at record \d .*arcond encode"):
        [stored.Stored(out).view(i, 0) for i in range(3, 6)]
    os.truncate(shard, 1000)
    with pytest.raises(ValueError, match=rf"{shard.name} has 1000 bytes, the manifest says"):
        stored.Stored(out)
    manifest = json.loads((out / "manifest.json").read_text())
    for change, message in (
        ({"complete": False}, "is not finished: run the same `arcond encode` again"),
        ({"kind": "images"}, "holds images, not tokens"),
    ):
        (out / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match=message):
            stored.Stored(out)
