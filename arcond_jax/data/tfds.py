"""A data set that tensorflow-datasets prepared, as it is; the only door to it. No TensorFlow.

Any folder of a builder with an image and a label in ArrayRecord files will do, such as
~/tensorflow_datasets/imagenet2012/5.1.0.
"""

import functools
import os
import pathlib

import numpy as np

from arcond_jax.data import images

HELD_OUT = ("validation", "test")  # the first that there is, unless named


def is_prepared(folder: pathlib.Path) -> bool:
    """Whether a folder is a version of a data set that tensorflow-datasets prepared."""
    return (folder / "dataset_info.json").is_file()


class Tfds:
    """Random access to a split; items and attributes are those of `ImageFolder`.

    Args:
      directory: Holds dataset_info.json.
      split: "train" or "held_out".
      image_size: Pixels on a side.
      resize: One of `images.RESIZES`.
      train_split, held_out_split: What they are called there; slices such as "train[:95%]" too.

    Raises:
      ImportError: tensorflow_datasets is not installed.
      ValueError: There is no such data set or split, or it has no image or no label.
    """

    image_dtype = np.dtype(np.uint8)

    def __init__(
        self,
        directory: str | os.PathLike,
        split: str = "train",
        *,
        image_size: int,
        resize: str = "adm",
        train_split: str = "train",
        held_out_split: str | None = None,
    ):
        try:
            import tensorflow_datasets  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ImportError(
                "data.name=tfds needs tensorflow-datasets: pip install 'arcond_jax[tfds]'"
            ) from None
        root = pathlib.Path(directory)
        if not is_prepared(root):
            raise ValueError(
                f"{root} has no dataset_info.json: name the folder of a version, such as "
                "tensorflow_datasets/imagenet2012/5.1.0"
            )
        builder = tensorflow_datasets.builder_from_directory(str(root))
        features, splits = dict(builder.info.features or {}), builder.info.splits
        if not {"image", "label"} <= features.keys():
            raise ValueError(f"{root} has {sorted(features)}, no image with a label")
        name = train_split
        if split == "held_out":
            there = [x for x in HELD_OUT if x in splits]
            name = held_out_split or (there[0] if there else HELD_OUT[0])
        try:
            self._records = builder.as_data_source(
                split=name, decoders={"image": tensorflow_datasets.decode.SkipDecoding()}
            )
        except (ValueError, KeyError, NotImplementedError) as error:
            text = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{root}: split {name!r} of {', '.join(splits)} cannot be read in any order "
                f"({text}): name it by data.{split}_split, and prepare with "
                "file_format='array_record'"
            ) from None
        self._name = f"{root}, {name}"
        self.label_names = tuple(features["label"].names)
        self.num_classes = len(self.label_names)
        self.image_shape: tuple[int, int, int] = (image_size, image_size, 3)
        self.resize = resize

    @functools.cached_property
    def label(self) -> np.ndarray:
        """Of every item; reads them all."""
        return np.asarray([self._records[i]["label"] for i in range(len(self))], np.int32)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record = self._records[index]
        name = f"{self._name}: image {index}"
        image = images.open_square(
            name,
            self.image_shape[0],
            num_channels=3,
            resize=self.resize,
            encoded=bytes(record["image"]),
        )
        label = np.asarray(record["label"], np.int32)
        return {"image": image, "label": label}
