"""Windows and drafters around the models of codes; a part of their configs, no experiment.

Each of them, as it is without a variant, is what these start from:

  tensorar_v1    window 4, two plain blocks on each side, noise through the codebook along a sine
  tensorar_iclr  window 4, one attention layer on each side, categorical noise, exponential
  drafter        the model as it is, and guesses of the 3 codes after the next one: one block

Paper:     "TensorAR: Refinement is All You Need in Autoregressive Image Generation" (arXiv v1, May
           2025, section 4.1, and ICLR 2026). v1 has LlamaGen, RAR and Open-MAGVIT2, the later
           version LlamaGen and Open-MAGVIT2; every other pair, and the drafter, is this library's
Recipe:    20 epochs at 256 images without an average, AdamW (0.9, 0.95), weight decay 0.05,
           clipping at 1, dropout 0.1 of tokens, labels dropped 0.1; the mean of all entries' losses
           (here times the window). 1e-4 along a line to 0 for the windows, a tenth of it for the
           model inside: these two numbers are lost in the text of v1, and so are the formulas of
           its schedules. Departures: Open-MAGVIT2 has categorical noise in v1 too, since its codes
           are signs, of which a mix is one or the other; captions take as many steps as classes.
           RAR visits raster order from the second step on, as the official weights do at the end
Drafter:   the same, with the model inside frozen and without dropout
Sampling:  as the model inside; drafts are fed back (Algorithm 1). A drafter draws what the model
           draws, several codes a step with `--config.sampling.speculative=True`
Command:   arcond train --config llamagen_b_256:tensorar_v1 --init weights/llamagen
             --workdir runs/tensorar --config.data.directory=CODES
             --config.tokenizer.path=weights/vq16
Hardware:  not yet run
Score:     not yet run. FID in table 3 of v1, without and with windows, and parameters with them:

             LlamaGen-B 256       5.46  4.75  139M      RAR-B            1.95  1.92  289M
             LlamaGen-L 256       3.80  3.41  393M      RAR-L            1.70  1.66  511M
             LlamaGen-L 384       3.07  2.72  393M      Open-MAGVIT2-B   3.08  2.91  393M
             LlamaGen-XL 384      2.62  2.42  853M      Open-MAGVIT2-L   2.51  2.35  854M
             LlamaGen-XXL 384     2.34  2.03  1.4B

           Two rows contradict themselves: XXL has 1.4B without windows too, where blocks of its
           width are 0.1B, and Open-MAGVIT2-L grows by the 50M of the B model's width, where blocks
           of its own are 79M; RAR-L has 512M here. Table 4 has 4.77 for LlamaGen-B with the sine,
           and 4.75 with the exponential.
           ICLR, LlamaGen: B 116M, L 352M, XL 789M, XXL 1432M parameters, as here: nine matrices of
           the width's square, of which the blocks have eight; the ninth is put behind the encoder
"""

from arcond_jax import build
from arcond_jax.configs import imagenet

V1 = dict(depth=2, mlp_ratio=4, noise="codebook", noise_schedule="sine")
ICLR = dict(depth=1, mlp_ratio=0, projection=True)
ICLR |= dict(noise="categorical", noise_schedule="exponential")
VARIANTS = ("tensorar_v1", "tensorar_iclr", "drafter")
WINDOW, STEPS_PER_EPOCH = 4, imagenet.NUM_IMAGES // 256


def of(config: build.Config, variant: str) -> build.Config:
    """The variant of a model's config; without one, the config itself.

    Raises:
      ValueError: There is no such variant.
    """
    if not variant:
        return config
    if variant not in VARIANTS:
        raise ValueError(
            f"{config.name} has no variant {variant!r}: choose of {', '.join(VARIANTS)}"
        )
    config = build.with_windows(config)
    config.name += f"_{variant}"
    _tuned(config)
    if variant == "drafter":
        config.tensorar.update(window=WINDOW, depth=1, mlp_ratio=4, drafter=True)
        config.model.update({x: 0.0 for x in config.model if x.endswith("dropout")})
        return config
    config.tensorar.update(V1 if variant == "tensorar_v1" else ICLR)
    config.tensorar.update(window=WINDOW, drafts="noised", nested=False, base_rate=0.1)
    config.tensorar.draft_weight = WINDOW - 1.0
    if config.tokenizer.name == "lfq":
        config.tensorar.noise = "categorical"
    config.sampling.drafts = "feed"
    return config


def _tuned(config: build.Config) -> None:
    """The recipe of tuning."""
    config.data.batch_size = 256
    if "token_dropout" in config.model:
        config.model.token_dropout = 0.1
    config.loss.label_dropout = 0.1
    if "shuffle_start" in config.loss:
        config.loss.update(shuffle_start=0, shuffle_stop=1)
    config.training.update(
        num_train_steps=20 * STEPS_PER_EPOCH,
        num_warmup_steps=0,
        learning_rate=1e-4,
        decay="linear",
        decay_to=0.0,
        b1=0.9,
        b2=0.95,
        weight_decay=0.05,
        clip_norm=1.0,
        ema_decay=0.0,
        checkpoint_every=5 * STEPS_PER_EPOCH,
    )
