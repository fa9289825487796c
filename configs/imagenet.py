"""What the ImageNet experiments share; a part of other configs, no experiment.

`data.directory` holds train/<class>/ and val/<class>/, `tokenizer.path` the converted tokenizer.
"""

import ml_collections

from configs import base

NUM_IMAGES = 1_281_167
STEPS_PER_EPOCH = 625  # of 2,048 images, the last batch of an epoch left out


def get_config(image_size: int = 256) -> ml_collections.ConfigDict:
    """Latents of KL-16, by MAR's recipe."""
    config = base.get_config()
    config.data.update(name="folder", image_size=image_size, num_channels=3, num_classes=1000)
    config.data.update(batch_size=2048, random_flip=True)
    config.tokenizer.update(name="kl", patch_size=1)
    config.loss.update(w_tensor=0.0, label_dropout=0.1, num_copies=4)
    config.training.update(
        num_train_steps=400 * STEPS_PER_EPOCH,
        num_warmup_steps=100 * STEPS_PER_EPOCH,
        learning_rate=8e-4,  # 1e-4 per 256 images
        decay="constant",
        b1=0.9,
        b2=0.95,
        weight_decay=0.02,
        decay_head=False,
        clip_norm=3.0,
        ema_decay=0.9999,
        dtype="bfloat16",
        log_every=100,
        checkpoint_every=5 * STEPS_PER_EPOCH,
    )
    config.sampling.update(num_head_evaluations=100, spacing="even", solver="ancestral")
    # Off until calibrated. With classes: kind=residual, grouping=class and num_sources=4, say.
    config.transport.update(kind="none", grouping="shared", num_atoms=1024, num_sources=1024)
    return config


def of_codes(
    tokenizer: str, *, batch_size: int, image_size: int = 256
) -> ml_collections.ConfigDict:
    """Codes of a tokenizer, one at a position; the recipe is the caller's."""
    config = get_config(image_size)
    config.data.batch_size = batch_size
    config.tokenizer.name = tokenizer
    config.loss.update(w_diffusion=0.0, w_tensor=1.0)
    config.training.update(decay_head=True, checkpoint_every=5 * (NUM_IMAGES // batch_size))
    return config
