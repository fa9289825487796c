"""What the ImageNet experiments on KL-16 latents share; a part of other configs, no experiment.

`data.directory` holds train/<class>/ and val/<class>/, `tokenizer.path` the converted KL-16.
"""

import ml_collections

from configs import base

STEPS_PER_EPOCH = 625  # 1,281,167 images, 2,048 at a time, the last batch of an epoch left out


def get_config(image_size: int = 256) -> ml_collections.ConfigDict:
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
    # Off until calibrated: `--config.transport.kind=bures` or `stored`.
    config.transport.update(kind="none", grouping="shared", num_atoms=1024, num_sources=1024)
    return config
