"""What the ImageNet experiments share; a part of other configs, no experiment.

`data.directory` holds train/<class>/ and val/<class>/, or where the recipe is of ten crops what
`arcond encode` made of them; `tokenizer.path` the converted tokenizer, of a pair `kl_path` and
`vq_path`.
"""

from arcond_jax import build

NUM_IMAGES = 1_281_167
STEPS_PER_EPOCH = 625  # of 2,048 images, the last batch of an epoch left out


def of_latents(
    model: str, *, tokenizer: str = "kl", image_size: int = 256, transport: str = "none"
) -> build.Config:
    """Latents of KL-16, with codes beside them or without, by MAR's recipe."""
    config = build.config(model=model, tokenizer=tokenizer, transport=transport)
    _images(config, batch_size=2048, image_size=image_size)
    config.training.update(
        num_train_steps=400 * STEPS_PER_EPOCH,
        num_warmup_steps=100 * STEPS_PER_EPOCH,
        learning_rate=8e-4,  # 1e-4 per 256 images
        clip_norm=3.0,
        checkpoint_every=5 * STEPS_PER_EPOCH,
    )
    config.sampling.update(num_head_evaluations=100, spacing="even", solver="ancestral")
    return config


def of_codes(
    model: str, tokenizer: str, *, batch_size: int, image_size: int = 256, ten_crops: bool = False
) -> build.Config:
    """Codes of a tokenizer, of ten crops from a cache or of images; the recipe is the caller's."""
    data = "cache" if ten_crops else "folder"
    config = build.config(model=model, tokenizer=tokenizer, data=data)
    _images(config, batch_size=batch_size, image_size=image_size)
    config.training.checkpoint_every = 5 * (NUM_IMAGES // batch_size)
    return config


def _images(config: build.Config, *, batch_size: int, image_size: int) -> None:
    config.data.update(image_size=image_size, num_channels=3, num_classes=1000)
    config.data.batch_size = batch_size
    if "views" in config.data:
        config.data.views = "ten"
    else:
        config.data.random_flip = True
    config.training.update(dtype="bfloat16", log_every=100)
