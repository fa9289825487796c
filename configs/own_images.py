"""Photographs of one's own: a small joint model, from a folder to pictures and a card on a CPU.

`own_images:FOLDER` takes the classes from FOLDER/train/<class>/; FOLDER/val/<class>/ is what
`arcond evaluate` compares with. FOLDER may also be what `arcond prepare` wrote. Images are cropped
to squares of 32 pixels, cut into 8x8 patches of 4x4; `--config.data.image_size=64` makes them
larger, and four times as many. Every patch has a code and a latent: codes alone would show as a
mosaic of mean patches.

Command:   arcond train --config own_images:photos --workdir runs/photos
Hardware:  2 CPU cores; the first sheet of samples after a minute or two
Score:     depends on the images
"""

import pathlib

from arcond_jax import build
from arcond_jax.data import records


def get_config(folder: str = "") -> build.Config:
    if not folder:
        raise ValueError("name the folder that holds train/<class>/: own_images:FOLDER")
    root = pathlib.Path(folder).expanduser()
    prepared = records.is_prepared(root)
    num_classes = len(records.read_manifest(root)["class_names"] if prepared else _classes(root))
    data = "records" if prepared else "folder"
    config = build.config(model="joint", tokenizer="patches", data=data)
    config.name = "own_images"
    config.data.update(directory=folder, image_size=32, num_channels=3, num_classes=num_classes)
    config.data.update(batch_size=16, random_flip=True)
    config.tokenizer.update(patch_size=4, num_codes=256)
    config.model.update(depth=3, width=128, num_heads=4, dropout=0.1, token_dropout=0.1)
    config.diffusion_head.update(depth=2, width=192)
    config.loss.num_copies = 2
    config.training.update(
        num_train_steps=3000,
        num_warmup_steps=100,
        learning_rate=1e-3,
        decay="cosine",
        weight_decay=0.05,
        ema_decay=0.995,
        log_every=50,
        samples_every=200,
        checkpoint_every=200,
    )
    # Standardised pixels end near 3; unbounded, guesses of a short training run away.
    config.sampling.update(guidance_scale=1.5, top_k=100, clip_latents=3.0)
    return config


def _classes(root: pathlib.Path) -> list[pathlib.Path]:
    train = root / "train"
    if not train.is_dir():
        raise ValueError(f"{train} does not exist: put the images into {train}/<class>/")
    classes = [x for x in train.iterdir() if x.is_dir() and not x.name.startswith(".")]
    if not classes:
        raise ValueError(f"{train} has no folders of classes: put the images into {train}/<class>/")
    return classes
