"""Prepared images are those of the image folder, whatever they came from and whatever happened."""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import photographs
import pytest
from PIL import Image

from arcond_jax import build
from arcond_jax.cli import main as cli
from arcond_jax.data import folder, pipeline, records
from arcond_jax.run import preparing, restoring

SMALL = preparing.Options(shard_bytes=4000)
SOURCES = {
    "folder": photographs.write_folder,
    "kaggle": photographs.write_kaggle,
    "tars": photographs.write_tars,
    "webdataset": photographs.write_webdataset,
    "parquet": photographs.write_parquet,
}


def contents(out: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    return photographs.write_folder(tmp_path_factory.mktemp("unpacked"))


@pytest.fixture
def prepared(unpacked, tmp_path):
    preparing.prepare([unpacked], tmp_path / "out", SMALL)
    return tmp_path / "out"


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_gives_the_images_of_the_folder(kind, unpacked, tmp_path):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    source = SOURCES[kind](tmp_path / "source")
    manifest = preparing.prepare([source], tmp_path / "out", SMALL)
    assert manifest["complete"] and len(manifest["splits"]["train"]["shards"]) > 1
    ids = tuple("012")
    for split in ("train", "held_out"):
        found = records.Records(tmp_path / "out", split, image_size=16)
        known = folder.ImageFolder(unpacked, split, image_size=16)
        assert isinstance(found, pipeline.Source)
        assert found.label_names == (ids if kind == "webdataset" else photographs.CLASSES)
        # A flat folder of validation images is in the order of its files.
        assert sorted(photographs.items(found)) == sorted(photographs.items(known))
        assert split == "held_out" or photographs.items(found) == photographs.items(known)
        np.testing.assert_array_equal(found.label, [label for _, label in photographs.items(found)])


def test_train_and_validation_may_lie_apart(unpacked, tmp_path):
    flat = photographs.write_flat(tmp_path / "flat")
    tars = photographs.write_tars(tmp_path / "tars")
    out = tmp_path / "out"
    preparing.prepare([tars / "ILSVRC2012_img_train.tar", flat], out, SMALL)
    found = records.Records(out, "held_out", image_size=16)
    assert len(found) == 6 and found.num_classes == 3
    preparing.prepare([flat], tmp_path / "alone", SMALL)
    alone = records.Records(tmp_path / "alone", "held_out", image_size=16)
    assert alone.num_classes == 1000 and alone.label_names[:3] == (
        "n01440764",
        "n01443537",
        "n01484850",
    )


def test_ids_take_the_names_of_a_file(tmp_path):
    source = photographs.write_webdataset(tmp_path / "source")
    (tmp_path / "names.txt").write_text("tench\ngoldfish\nshark\n")
    arguments = ["prepare", "--source", str(source), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--class_names", str(tmp_path / "names.txt")]) == 0
    found = records.Records(tmp_path / "out", "held_out", image_size=16)
    assert found.label_names == ("tench", "goldfish", "shark")


def test_own_photographs_are_split_by_class_and_seed(unpacked, tmp_path):
    out = tmp_path / "out"
    options = preparing.Options(held_out=0.25, seed=3)
    preparing.prepare([unpacked / "train"], out, options)
    train, held_out = (records.Records(out, x, image_size=16) for x in ("train", "held_out"))
    assert np.bincount(held_out.label).tolist() == [1, 1, 1] and len(train) == 9
    known = folder.ImageFolder(unpacked, "train", image_size=16)
    assert sorted(photographs.items(train) + photographs.items(held_out)) == sorted(
        photographs.items(known)
    )
    preparing.prepare([unpacked / "train"], tmp_path / "again", options)
    assert contents(out).keys() == contents(tmp_path / "again").keys()
    assert photographs.items(held_out) == photographs.items(
        records.Records(tmp_path / "again", "held_out", image_size=16)
    )


def test_crops_are_those_of_the_folder(unpacked, tmp_path):
    preparing.prepare([unpacked], tmp_path / "out", preparing.Options(resize=16))
    found = records.Records(tmp_path / "out", image_size=16)
    assert photographs.items(found) == photographs.items(
        folder.ImageFolder(unpacked, image_size=16)
    )
    with pytest.raises(ValueError, match=r"holds crops of 16 pixels, data.image_size is 32: prep"):
        records.Records(tmp_path / "out", image_size=32)


def test_damaged_images_are_listed_and_left_out(tmp_path, capsys):
    source = photographs.write_folder(tmp_path / "source")
    bad = source / "train" / photographs.CLASSES[1] / "bad.jpg"
    bad.write_bytes(photographs.jpeg(7)[:300])
    (bad.parent / "thin.png").write_bytes(b"")
    Image.new("RGB", (900, 2)).save(bad.parent / "thin.png")
    arguments = ["prepare", "--source", str(source), "--out"]
    assert cli.main([*arguments, str(tmp_path / "stopped"), "--on_error", "stop"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "bad.jpg cannot be read" in message
    assert cli.main([*arguments, str(tmp_path / "out")]) == 0
    assert (
        "12 train, 6 held_out images of 3 classes; 2 could not be read" in capsys.readouterr().out
    )
    lines = (tmp_path / "out" / "failed.txt").read_text().splitlines()
    assert [line.split("\t")[0].split("/")[1] for line in lines] == ["bad.jpg", "thin.png"]
    assert len(records.Records(tmp_path / "out", image_size=16)) == 12


def test_many_processes_write_what_one_writes(unpacked, prepared, tmp_path):
    out = tmp_path / "shared"
    complete = [
        preparing.prepare([unpacked], out, SMALL, process_index=i, process_count=3)["complete"]
        for i in (2, 0, 1)
    ]
    assert complete == [False, False, True] and contents(out) == contents(prepared)


def test_a_shard_that_is_missing_or_cut_off_is_written_again(unpacked, prepared):
    whole = contents(prepared)
    shards = sorted(prepared.glob("train-*"))
    shards[0].unlink()
    os.truncate(shards[1], 1000)
    for message in (f"{shards[0].name} is missing", f"{shards[1].name} has 1000 bytes, the man"):
        with pytest.raises(ValueError, match=message):
            records.Records(prepared, image_size=16)
        if shards[0].exists():
            break
        shards[0].write_bytes(whole[shards[0].name])
    shards[0].unlink()
    preparing.prepare([unpacked], prepared, SMALL)
    assert contents(prepared) == whole


def test_a_flipped_byte_is_named(prepared):
    shard = sorted(prepared.glob("train-*"))[1]
    data = bytearray(shard.read_bytes())
    at = data.index(b"\xff\xd8\xff") + 200  # within the first image
    data[at] ^= 1
    shard.write_bytes(data)
    source = records.Records(prepared, image_size=16)
    with pytest.raises(ValueError, match=rf"{shard.name} is damaged at record \d+ .*: remove it"):
        photographs.items(source)
    (prepared / "train.labels.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"train.labels.npy is damaged: run the same"):
        records.Records(prepared, image_size=16)


def test_few_files_are_open(prepared, monkeypatch):
    monkeypatch.setattr(records, "MAX_OPEN", 1)
    source = records.Records(prepared, image_size=16)
    forwards = photographs.items(source)
    assert [photographs.items(source)[i] for i in range(len(source))] == forwards
    assert len(source._shards._open) == 1


def test_record_layout_is_as_documented():
    record = records.pack(258, "ä.jpg", b"\xff\xd8")
    assert record == b"\x02\x01\x00\x00\x06\x00" + "ä.jpg".encode() + b"\xff\xd8"
    assert records.unpack(record) == (258, "ä.jpg", b"\xff\xd8")


def refused(capsys, *arguments):
    """The one line of a refusal."""
    assert cli.main(["prepare", *map(str, arguments)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_what_cannot_be_prepared_costs_one_line(unpacked, prepared, tmp_path, capsys):
    out = tmp_path / "new"
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.jpg").write_bytes(photographs.jpeg(0))
    empty = photographs.write_folder(tmp_path / "empty", "train")
    (empty / "train" / "x").mkdir()
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    unlabelled = tmp_path / "b.tar"
    unlabelled.write_bytes(photographs.tar_of({"a.jpg": photographs.jpeg(0), "a.txt": b"cat"}))
    cut = photographs.write_tars(tmp_path / "cut") / "ILSVRC2012_img_train.tar"
    os.truncate(cut, 12000)
    none = tmp_path / "none"
    none.mkdir()
    for source, message in (
        (tmp_path / "nothing", "nothing does not exist"),
        (flat, "holds images without labels, such as a.jpg"),
        (none, "has no images: give folders of classes"),
        (empty, "has 1 of 4 classes without images, the first is 'x'"),
        (tmp_path / "a.zip", "is not read: unpack it first"),
        (tmp_path / "a.tar", "cannot be read as a tar file"),
        (unlabelled, "b.tar holds images without labels: a has no .cls"),
        (cut, "ILSVRC2012_img_train.tar cannot be read as a tar file"),
        (prepared, "is prepared already"),
    ):
        assert message in refused(capsys, "--source", source, "--out", out)
        assert not out.exists()
    source = ("--source", unpacked, "--out")
    assert "is inside of the source" in refused(capsys, *source, unpacked / "out")
    assert "holds something else" in refused(capsys, *source, flat)
    assert "has held-out images of its own" in refused(capsys, *source, out, "--held_out", "0.1")
    validation = photographs.write_flat(tmp_path / "validation")
    assert "has no train split to hold out from" in refused(
        capsys, "--source", validation, "--out", out, "--held_out", "0.1"
    )
    assert "was begun with another image_size (null, now 16)" in refused(
        capsys, *source, prepared, "--resize", 16
    )


def test_what_is_not_prepared_cannot_be_trained_on(unpacked, prepared, tmp_path):
    with pytest.raises(ValueError, match=r"does not exist"):
        records.Records(tmp_path / "nothing", image_size=16)
    with pytest.raises(ValueError, match=r"has no manifest.json: .*arcond prepare --source"):
        records.Records(unpacked, image_size=16)
    manifest = json.loads((prepared / "manifest.json").read_text())
    for change, message in (
        ({"complete": False}, "is not finished: run the same `arcond prepare` again"),
        ({"format": 2}, "has format 2, this version reads 1"),
        ({"kind": "cache"}, "holds cache, not images"),
        ({"splits": {}}, "has no split train"),
    ):
        (prepared / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match=message):
            records.Records(prepared, image_size=16)


def test_parquet_names_what_it_needs(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refused(capsys, "--source", tmp_path, "--out", tmp_path.parent / "new")
    assert "pip install 'arcond_jax[parquet]'" in message


@pytest.mark.slow
def test_a_model_of_fast_photographs_says_so_on_its_card(unpacked, tmp_path, capsys):
    """From prepare to the card; the model and the card have the images of `data.resize`."""
    out, workdir, drawn = tmp_path / "out", tmp_path / "run", tmp_path / "drawn.npz"
    assert cli.main(["prepare", "--source", str(unpacked), "--out", str(out)]) == 0
    small = "data.batch_size=8 data.image_size=16 tokenizer.num_codes=8 model.depth=1"
    small += " model.width=16 model.num_heads=2 training.num_train_steps=3"
    small += " training.num_warmup_steps=1 training.log_every=1 data.resize=fast"
    flags = [f"--config.{x}" for x in small.split()]
    arguments = ["train", "--config", f"own_images:{out}", "--workdir", str(workdir), *flags]
    assert cli.main(arguments) == 0
    assert f"complete: {workdir}" in capsys.readouterr().out
    config = restoring.restore(workdir).config
    fast = folder.ImageFolder(unpacked, image_size=16, resize="fast")
    adm = folder.ImageFolder(unpacked, image_size=16)
    for index in range(len(fast)):
        found = build.examples(config, "train").view(index, 0)["image"]
        np.testing.assert_array_equal(found, fast[index]["image"])
    assert any(np.any(fast[i]["image"] != adm[i]["image"]) for i in range(len(fast)))
    run = ["--checkpoint", str(workdir)]
    assert cli.main(["sample", *run, "--num_images", "12", "--out", str(drawn)]) == 0
    assert cli.main(["evaluate", *run, "--samples", str(drawn)]) == 0
    assert "fast, not the crop of ADM" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    source = photographs.write_folder(tmp_path / "source")
    content = photographs.jpeg(3)
    for i in range(1000):
        (source / "train" / photographs.CLASSES[i % 3] / f"{i:04d}.jpg").write_bytes(content)
    options = preparing.Options(shard_bytes=40_000, resize=64)
    preparing.prepare([source], tmp_path / "whole", options)
    out = tmp_path / "out"
    script = (
        "import pathlib, sys; from arcond_jax.run import preparing;"
        "preparing.prepare([pathlib.Path(sys.argv[1])], pathlib.Path(sys.argv[2]),"
        "preparing.Options(shard_bytes=40_000, resize=64))"
    )
    rng, kills = random.Random(0), 0
    for _ in range(200):
        process = subprocess.Popen([sys.executable, "-c", script, str(source), str(out)])
        until = time.monotonic() + 60
        while not out.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        started = len(list(out.glob("train-*")))
        while len(list(out.glob("train-*"))) == started and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        if process.wait() == 0:
            break
        kills += 1
    assert kills >= 3 and contents(out) == contents(tmp_path / "whole")
    shutil.rmtree(out)


def test_ended_before_the_plan_was_there_it_begins(unpacked, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".{records.MANIFEST}.x1").touch()
    assert preparing.prepare([unpacked], tmp_path / "out", SMALL)["complete"]
