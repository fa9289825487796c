"""What tensorflow-datasets prepared is read as it is, without TensorFlow."""

import pathlib
import subprocess
import sys

import numpy as np
import photographs
import pytest

from arcond_jax import build
from arcond_jax.data import folder, images, pipeline, stored, tfds
from arcond_jax.run import caching

# TensorFlow is needed to write the data set; another process has it.
WRITE = """
import pathlib, sys
import tensorflow_datasets as tfds

source, out = sys.argv[1:]
names = sorted(x.name for x in (pathlib.Path(source) / "train").iterdir())

class Photographs(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=names)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        names = {"train": "train", "validation": "val"}
        return {name: self._generate_examples(folder) for name, folder in names.items()}

    def _generate_examples(self, split):
        for path in sorted((pathlib.Path(source) / split).rglob("*.JPEG")):
            yield path.name, {"image": str(path), "label": path.parent.name}

builder = Photographs(data_dir=out, file_format="array_record")
builder.download_and_prepare()
print(builder.data_path)
"""
READ = """
import sys
import numpy as np
from arcond_jax import build

config = build.load_config("cifar10", [
    "data.name=tfds", f"data.directory={sys.argv[1]}", "data.num_classes=3", "data.image_size=16"])
items = [build.source(config, split)[0] for split in ("train", "held_out")]
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    pytest.importorskip("tensorflow_datasets")
    root = tmp_path_factory.mktemp("tfds")
    source = photographs.write_folder(root / "source")
    done = subprocess.run(
        [sys.executable, "-c", WRITE, source, root / "out"], capture_output=True, text=True
    )
    if "No module named 'tensorflow'" in done.stderr:
        pytest.skip("writing a data set needs tensorflow")
    assert done.returncode == 0, done.stderr
    return source, done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_images_are_those_of_the_folder(written):
    source, directory = written
    for split in ("train", "held_out"):
        found = tfds.Tfds(directory, split, image_size=16)
        known = folder.ImageFolder(source, split, image_size=16)
        assert isinstance(found, pipeline.Source) and found.label_names == known.label_names
        items = photographs.items(found)
        assert sorted(items) == sorted(photographs.items(known))
        np.testing.assert_array_equal(found.label, [label for _, label in items])
    part = tfds.Tfds(directory, "held_out", image_size=16, held_out_split="train[:50%]")
    assert len(part) == 6
    with pytest.raises(ValueError, match=r"'nothing' of train, validation cannot be read"):
        tfds.Tfds(directory, "train", image_size=16, train_split="nothing")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_folder_is_encoded_as_it_is(written, tmp_path):
    """The cache has the tokens of its images, in its order; kept with the tokenizer."""
    source, directory = written
    config = build.load_config(
        f"own_images:{source}", ["data.image_size=16", "tokenizer.num_codes=8"]
    )
    manifest, _ = caching.encode(config, [pathlib.Path(directory)], tmp_path / "out")
    assert manifest["complete"] and manifest["failed"] == 0
    given = {"data.name": "cache", "data.directory": str(tmp_path / "out")}
    tokenizer, cache = (
        build.tokenizer(build.changed(config, given)),
        stored.Stored(tmp_path / "out"),
    )
    found = tfds.Tfds(directory, image_size=16)
    assert cache.label_names == found.label_names
    np.testing.assert_array_equal(cache.label, found.label)
    for i in range(len(found)):
        expected = tokenizer.store(images.as_float(found[i]["image"][None]))
        np.testing.assert_array_equal(cache.view(i, 0)["codes"], expected.codes[0])


@pytest.mark.slow
def test_it_is_read_without_tensorflow(written):
    done = subprocess.run([sys.executable, "-c", READ, written[1]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_missing_costs_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'arcond_jax\[tfds\]'$"):
        tfds.Tfds(tmp_path, image_size=16)
