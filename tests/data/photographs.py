"""Small photographs in every kind of source that `arcond prepare` knows."""

import io
import json
import pathlib
import tarfile

import numpy as np
from PIL import Image, ImageFilter

from arcond_jax.data import listing

CLASSES = ("n01440764", "n01443537", "n01484850")
PER_CLASS = {"train": 4, "val": 2}


def jpeg(seed: int) -> bytes:
    """A blurred pattern, of its own size, as a JPEG file."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(24, 48, 2)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    content = io.BytesIO()
    blurred = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2))
    blurred.save(content, "JPEG", quality=90)
    return content.getvalue()


def items(source) -> list[tuple[bytes, int]]:
    """Pixels and label of every item."""
    found = [source[i] for i in range(len(source))]
    return [(item["image"].tobytes(), int(item["label"])) for item in found]


def files() -> dict[str, dict[str, bytes]]:
    """Contents by split and by `class/name`, in the order of an image folder.

    Validation images have the names of ILSVRC2012, which say their classes.
    """
    synsets = listing.validation_synsets()
    made: dict[str, dict[str, bytes]] = {"train": {}, "val": {}}
    for number, name in enumerate(CLASSES):
        of_class = [i + 1 for i, synset in enumerate(synsets) if synset == name]
        for i in range(PER_CLASS["train"]):
            made["train"][f"{name}/{name}_{i}.JPEG"] = jpeg(10 * number + i)
        for i in range(PER_CLASS["val"]):
            file = f"{name}/ILSVRC2012_val_{of_class[i]:08d}.JPEG"
            made["val"][file] = jpeg(100 + 10 * number + i)
    return made


def write_folder(root: pathlib.Path, *splits: str) -> pathlib.Path:
    """Class folders under each split."""
    for split in splits or ("train", "val"):
        for name, content in files()[split].items():
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


def write_flat(root: pathlib.Path) -> pathlib.Path:
    """Validation images in one folder."""
    root.mkdir(parents=True)
    for name, content in files()["val"].items():
        (root / name.split("/")[1]).write_bytes(content)
    return root


def write_kaggle(root: pathlib.Path) -> pathlib.Path:
    """As the competition's archive unpacks."""
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    write_folder(data, "train")
    write_flat(data / "val")
    (data / "test").mkdir()
    (data / "test" / "ILSVRC2012_test_00000001.JPEG").write_bytes(jpeg(0))
    (root / "ILSVRC" / "ImageSets").mkdir()
    return root


def tar_of(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def write_tars(root: pathlib.Path) -> pathlib.Path:
    """ILSVRC's, as they are downloaded: a tar file of tar files, and a flat one."""
    root.mkdir(parents=True)
    made = files()
    classes = {
        f"{name}.tar": tar_of(
            {x.split("/")[1]: data for x, data in made["train"].items() if x.startswith(name)}
        )
        for name in CLASSES
    }
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(classes))
    flat = {name.split("/")[1]: data for name, data in made["val"].items()}
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of(flat))
    return root


def write_webdataset(root: pathlib.Path) -> pathlib.Path:
    """Two shards of training images and one of validation images; ids alone."""
    root.mkdir(parents=True)
    for split, shards in (("train", 2), ("val", 1)):
        items = list(files()[split].items())
        size = len(items) // shards
        for shard in range(shards):
            members = {}
            for name, data in items[shard * size : (shard + 1) * size]:
                key = name.split("/")[1].removesuffix(".JPEG")
                members[f"{key}.jpg"] = data
                members[f"{key}.cls"] = str(CLASSES.index(name.split("/")[0])).encode()
                members[f"{key}.txt"] = b"a photograph"
            word = {"train": "train", "val": "validation"}[split]
            (root / f"imagenet1k-{word}-{shard:04d}.tar").write_bytes(tar_of(members))
    return root


def write_parquet(root: pathlib.Path) -> pathlib.Path:
    """As Hugging Face's datasets are stored, in row groups of five."""
    import pyarrow as pa
    import pyarrow.parquet

    (root / "data").mkdir(parents=True)
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for split, word in (("train", "train"), ("val", "validation")):
        items = list(files()[split].items())
        table = pa.table(
            {
                "image": [{"bytes": x, "path": name.split("/")[1]} for name, x in items],
                "label": [CLASSES.index(name.split("/")[0]) for name, _ in items],
            }
        ).replace_schema_metadata(metadata)
        path = root / "data" / f"{word}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=5)
    return root
