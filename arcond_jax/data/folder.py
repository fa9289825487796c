"""A folder of image files, one subfolder a class, as ImageNet is usually unpacked.

`directory/<split>/<class>/<file>`; classes and files in the order of their names.
"""

import os
import pathlib

import numpy as np
from PIL import Image

from arcond_jax.data import images

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")  # in either case
SPLITS = {"train": ("train",), "held_out": ("val", "validation", "held_out", "test")}


class ImageFolder:
    """Random access to one split; an item is `{"image": float32 [size, size, 3], "label": int32}`.

    Images are made RGB and cropped as ADM does. EXIF is not looked at: torchvision, which the
    published models were trained with, does not turn images either.

    Args:
      directory: Holds the folders of the splits.
      split: "train", or "held_out" for the first of val, validation, held_out and test that exists.
      image_size: Pixels on a side.

    Attributes:
      label_names: Names of the class folders, sorted; a label is an index into them.

    Raises:
      ValueError: No such split, or no images in it; and for an item, a file that cannot be read.
    """

    def __init__(self, directory: str | os.PathLike, split: str = "train", *, image_size: int):
        if split not in SPLITS:
            raise ValueError(f"an image folder has no split {split!r}: use 'train' or 'held_out'.")
        root, names = pathlib.Path(directory), SPLITS[split]
        found = [root / name for name in names if (root / name).is_dir()]
        if not found:
            raise ValueError(
                f"{root} has no folder {' or '.join(names)}: put the {split} images into"
                f" {root / names[0]}/<class>/."
            )
        self.folder = found[0]
        self.label_names = tuple(
            sorted(x.name for x in self.folder.iterdir() if x.is_dir() and x.name[0] != ".")
        )
        files = [_image_files(self.folder / name) for name in self.label_names]
        # Names alone: a million paths would take a gigabyte.
        self.files = [name for names in files for name in names]
        if not self.files:
            raise ValueError(
                f"{self.folder} has no images: put them into {self.folder}/<class>/, as"
                f" {', '.join(EXTENSIONS)}."
            )
        self.label = np.repeat(np.arange(len(files), dtype=np.int32), [len(x) for x in files])
        self.num_classes = len(self.label_names)
        self.image_shape: tuple[int, int, int] = (image_size, image_size, 3)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        label = self.label[index]
        path = self.folder / self.label_names[label] / self.files[index]
        try:
            with Image.open(path) as image:
                cropped = images.center_crop(image.convert("RGB"), self.image_shape[0])
        except Exception as error:  # decoders raise what they like
            raise ValueError(f"{path}: {error}") from error
        return {"image": images.uint8_to_image(np.asarray(cropped)), "label": label}


def _image_files(folder: pathlib.Path) -> list[str]:
    """Names of the images in a folder, sorted; hidden files are none."""
    names = sorted(os.listdir(folder))
    return [name for name in names if name.lower().endswith(EXTENSIONS) and name[0] != "."]
