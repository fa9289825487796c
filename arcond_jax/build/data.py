"""Images to train on and to compare with."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from arcond_jax.build import keys
from arcond_jax.config import Config, ConfigError
from arcond_jax.data import digits, folder, images, pipeline, records, tfds

COMMON = {
    "image_size": keys.integer(8),  # pixels on a side
    "num_channels": keys.integer(1),
    "num_classes": keys.integer(10),
    "random_flip": keys.flag(False),
    "batch_size": keys.integer(64),  # over all devices
    "num_threads": keys.integer(
        None, low=0, optional=True
    ),  # that read; a core of the process each
}
PHOTOGRAPHS = {"resize": keys.choice("adm", images.RESIZES)}


@dataclasses.dataclass(frozen=True)
class Data:
    """One kind of data set.

    Attributes:
      section: Settings besides its name.
      source: A split of it.
    """

    section: keys.Section
    source: Callable[[Config, str], pipeline.Source]


def _directory(config: Config) -> pathlib.Path:
    directory = config.data.directory
    if directory is None:
        raise ConfigError("data.directory is not set: give the folder that holds the images")
    return pathlib.Path(directory).expanduser().absolute()


def _square(config: Config) -> dict[str, Any]:
    return dict(image_size=config.data.image_size, resize=config.data.resize)


def _folder(config: Config, split: str) -> pipeline.Source:
    return folder.ImageFolder(_directory(config), split, **_square(config))


def _records(config: Config, split: str) -> pipeline.Source:
    return records.Records(_directory(config), split, **_square(config))


def _tfds(config: Config, split: str) -> pipeline.Source:
    return tfds.Tfds(  # pyright: ignore[reportReturnType]  # its labels are read when asked for
        _directory(config),
        split,
        train_split=config.data.train_split,
        held_out_split=config.data.held_out_split,
        **_square(config),
    )


FILES = COMMON | PHOTOGRAPHS | {"directory": keys.text(None, optional=True)}
DATA: Mapping[str, Data] = {
    "digits": Data(COMMON, lambda config, split: digits.Digits(split)),
    "folder": Data(FILES, _folder),
    "records": Data(FILES, _records),
    "tfds": Data(
        FILES
        | {
            "train_split": keys.text("train"),  # names that the data set has for them
            "held_out_split": keys.text(None, optional=True),  # validation, else test
        },
        _tfds,
    ),
}


def source(config: Config, split: str) -> pipeline.Source:
    """Random access to a split ("train" or "held_out") of the config's dataset.

    Raises:
      ConfigError: There is no such dataset, or it is not what the config says.
    """
    data = config.data
    made = DATA[data.name].source(config, split)
    found = dict(num_classes=made.num_classes, image_shape=tuple(made.image_shape))
    wanted = dict(num_classes=data.num_classes, image_shape=image_shape(config))
    for name, value in wanted.items():
        if found[name] != value:
            raise ConfigError(
                f"the {split} split of {data.name} has {name} {found[name]}, the data section of "
                f"the config says {value}"
            )
    return made


def image_shape(config: Config) -> tuple[int, int, int]:
    """Height, width and channels of the images."""
    return config.data.image_size, config.data.image_size, config.data.num_channels
