"""Images to train on and to compare with, or what was stored of them."""

import copy
import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from arcond_jax import caches
from arcond_jax.build import keys
from arcond_jax.config import Config, ConfigError
from arcond_jax.data import copies as copies_lib
from arcond_jax.data import digits, folder, images, pipeline, records, stored, tfds
from arcond_jax.data import views as views_lib

COMMON = {
    "image_size": keys.integer(8),  # pixels on a side
    "num_channels": keys.integer(1),
    "num_classes": keys.integer(10),
    "batch_size": keys.integer(64),  # over all devices
    "num_threads": keys.integer(
        None, low=0, optional=True
    ),  # that read; a core of the process each
}
IMAGES = COMMON | {"random_flip": keys.flag(False)}
PHOTOGRAPHS = {"resize": keys.choice("adm", images.RESIZES)}
DIRECTORY = {"directory": keys.text(None, optional=True)}
SHARDS = DIRECTORY | {  # which may lie in a bucket, and are copied from there
    "copies": keys.text(None, optional=True),  # folder for them; None for one of the user's
    "max_copy_gb": keys.positive(200.0),
}


@dataclasses.dataclass(frozen=True)
class Data:
    """One kind of data set.

    Attributes:
      section: Settings besides its name.
      source: A split of its images; None where it holds none.
    """

    section: keys.Section
    source: Callable[[Config, str], pipeline.Source] | None


def directory(config: Config) -> pathlib.Path:
    """The folder of the data on this machine, a copy if they lie in a bucket.

    Raises:
      ConfigError: None is named, or data of this kind are not read from buckets.
      ImportError, OSError, ValueError: They cannot be copied.
    """
    named = config.data.directory
    if named is None:
        what = "`arcond encode` wrote" if config.data.name == "cache" else "holds the images"
        raise ConfigError(f"data.directory is not set: give the folder that {what}")
    if "://" not in named:
        return pathlib.Path(named).expanduser().absolute()
    if "copies" not in config.data:
        raise ConfigError(
            f"data.directory {named} is a bucket, too slow for files of one image each: `arcond "
            "prepare` them, copy what it writes there, and use data.name=records"
        )
    copies = config.data.copies
    return copies_lib.local(
        named,
        copies=pathlib.Path(copies).expanduser().absolute() if copies else caches.folder("data"),
        max_bytes=int(config.data.max_copy_gb * 1e9),
    )


def _square(config: Config) -> dict[str, Any]:
    return dict(image_size=config.data.image_size, resize=config.data.resize)


def _folder(config: Config, split: str) -> pipeline.Source:
    return folder.ImageFolder(directory(config), split, **_square(config))


def _records(config: Config, split: str) -> pipeline.Source:
    return records.Records(directory(config), split, **_square(config))


def _tfds(config: Config, split: str) -> pipeline.Source:
    return tfds.Tfds(  # pyright: ignore[reportReturnType]  # its labels are read when asked for
        directory(config),
        split,
        train_split=config.data.train_split,
        held_out_split=config.data.held_out_split,
        **_square(config),
    )


FILES = IMAGES | PHOTOGRAPHS
DATA: Mapping[str, Data] = {
    "digits": Data(IMAGES, lambda config, split: digits.Digits(split)),
    "folder": Data(FILES | DIRECTORY, _folder),
    "records": Data(FILES | SHARDS, _records),
    "tfds": Data(
        FILES
        | SHARDS
        | {
            "train_split": keys.text("train"),  # names that the data set has for them
            "held_out_split": keys.text(None, optional=True),  # validation, else test
        },
        _tfds,
    ),
    "cache": Data(COMMON | SHARDS | {"views": keys.choice("flip", views_lib.KINDS)}, None),
}


def source(config: Config, split: str, *, image_size: int | None = None) -> pipeline.Source:
    """Random access to the images of a split ("train" or "held_out") of the config's dataset.

    Args:
      image_size: None for the config's own.

    Raises:
      ConfigError: There is no such dataset, it holds no images, or it is not what the config says.
    """
    if image_size is not None:
        config = copy.deepcopy(config)
        config.data.image_size = image_size
    data, make = config.data, DATA[config.data.name].source
    if make is None:
        raise ConfigError(
            f"data.name={data.name} holds no images{_origin(data.directory)}: give them by "
            "--config.data.name=folder, records or tfds and --config.data.directory=IMAGES"
        )
    made = make(config, split)
    found = dict(num_classes=made.num_classes, image_shape=tuple(made.image_shape))
    wanted = dict(num_classes=data.num_classes, image_shape=image_shape(config))
    for name, value in wanted.items():
        if found[name] != value:
            raise ConfigError(
                f"the {split} split of {data.name} has {name} {found[name]}, the data section of "
                f"the config says {value}"
            )
    return made


def examples(config: Config, split: str) -> pipeline.Viewed:
    """Random access to what a model is trained on: images, or what is stored of them.

    Raises:
      ConfigError: As of `source`, or a cache is not of what the config says.
    """
    if DATA[config.data.name].source is not None:
        return pipeline.Mirrored(source(config, split), 1 + config.data.random_flip)
    cache = directory(config)
    made = stored.Stored(cache, split)
    manifest, data = made.manifest, config.data
    for name, found, wanted in (
        ("tokenizer.name", manifest["tokenizer"]["name"], config.tokenizer.name),
        ("data.num_classes", len(made.label_names), data.num_classes),
        ("data.image_size", manifest["image_size"], data.image_size),
        ("data.views", manifest["views"]["kind"], data.views),
    ):
        if found != wanted:
            raise ConfigError(
                f"{cache} was encoded with {name} {found}, the config says {wanted}: use the "
                "same, or encode anew by `arcond encode`"
            )
    return made


def _origin(directory: str | None) -> str:
    """The source of a cache, in words; empty if it is not there to say."""
    try:
        folder = pathlib.Path(directory or "").expanduser()
        manifest = records.read_manifest(folder, kind=stored.KIND)
        return f" (it was encoded from {manifest['source']['name']})"
    except (ValueError, KeyError):
        return ""


def image_shape(config: Config) -> tuple[int, int, int]:
    """Height, width and channels of the images."""
    return config.data.image_size, config.data.image_size, config.data.num_channels
