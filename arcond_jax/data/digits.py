"""The handwritten digits that ship with scikit-learn: 1,797 grey images of 8x8, ten classes.

Small enough to train on with two CPU cores and real enough to measure on; nothing is downloaded.
Source: Alpaydin and Kaynak (1998), UCI "Optical Recognition of Handwritten Digits", test part.
"""

import numpy as np

NUM_HELD_OUT = 360  # 20.03 percent of 1,797: 36 images of most classes
SPLIT_SEED = 0  # never change it: published scores refer to this split


class Digits:
    """Random access to one split; an item is `{"image": float32 [8, 8, 1], "label": int32}`.

    The split is stratified by class and the same on every machine: "train" holds 1,437 images,
    "held_out" the other 360. Pixels, 0 to 16 in the files, are scaled to [-1, 1].
    """

    num_classes = 10
    image_shape: tuple[int, int, int] = (8, 8, 1)
    image_dtype = np.dtype(np.float32)  # 17 levels, which are none of the 256 of uint8
    label_names = tuple("0123456789")

    def __init__(self, split: str = "train"):
        if split not in ("train", "held_out"):
            raise ValueError(f"digits has no split {split!r}: use 'train' or 'held_out'.")
        # Imported here, since it takes a second and other data do not need it.
        import sklearn.datasets
        import sklearn.model_selection

        pixels, label = sklearn.datasets.load_digits(return_X_y=True)
        train, held_out = sklearn.model_selection.train_test_split(
            np.arange(len(label)),
            test_size=NUM_HELD_OUT,
            random_state=SPLIT_SEED,
            stratify=label,
        )
        # Files number the images by writer; sorted, a split keeps that order.
        rows = np.sort(train if split == "train" else held_out)
        self.image = (pixels[rows].reshape(-1, 8, 8, 1) / 8.0 - 1.0).astype(np.float32)
        self.label = label[rows].astype(np.int32)

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self.image[index], "label": self.label[index]}
