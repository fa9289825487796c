"""CIFAR-10 in codes of 4x4 patches: a small LlamaGen on real photographs, small enough for a CPU.

64 positions of one of 512 codes, which k-means finds among the patches; a code shows as its mean
patch, so images are made of tiles. `data.directory` holds train/<class>/ and val/<class>/.

Command:   arcond train --config cifar10 --workdir runs/cifar10
             --config.data.directory=CIFAR10
Hardware:  2 CPU cores, 20 minutes
Score:     cross-entropy of a code 3.50, from log 512 = 6.24. Of 1,000 samples: Frechet distance by
             a small classifier 1.08 (real training images: 0.03), not Inception FID; class
             accuracy 0.31, where that classifier gets 0.47 on held-out images.
"""

from arcond_jax import build


def get_config() -> build.Config:
    config = build.config(model="llamagen", tokenizer="patches")
    config.name = "cifar10"
    config.data.update(image_size=32, num_channels=3, num_classes=10)
    config.data.update(batch_size=64, random_flip=True)
    config.tokenizer.update(patch_size=4, num_codes=512)
    config.model.update(depth=4, width=192, num_heads=6, dropout=0.1, token_dropout=0.1)
    config.training.update(
        num_train_steps=1200,
        num_warmup_steps=100,
        learning_rate=2e-3,
        decay="cosine",
        weight_decay=0.05,
        ema_decay=0.995,
        samples_every=500,
    )
    config.sampling.update(guidance_scale=1.5, top_k=100)
    return config
