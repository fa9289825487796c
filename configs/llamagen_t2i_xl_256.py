"""LlamaGen-XL from text to images of 256x256: 16x16 codes of VQ-16, 778M parameters.

Paper:     Sun et al. (2024), "Autoregressive Model Beats Diffusion"
Recipe:    stage 1 (scripts/autoregressive/train_t2i_stage1.sh and train_t2i.py of
           FoundationVision/LlamaGen): batches of 256, AdamW (0.9, 0.95), constant 1e-4, weight
           decay 0.05, clipping at 1, dropout 0.1 of tokens and branches, captions dropped 0.1,
           on 50M captioned images of LAION-COCO. How often they were seen is not said; here once.
           Departure: one caption for each class folder (`data.captions`), not one for each image
Sampling:  guidance 7.5, temperature 1, the 1,000 likeliest codes
           (autoregressive/sample/sample_t2i.py)
Variants:  tensorar_v1 (ours), tensorar_iclr, drafter (ours): see tensorar.py
Command:   arcond convert --family vq --source vq_ds16_t2i.pt --out weights/vq16_t2i
           arcond convert --family llamagen_t2i --source t2i_XL_stage1_256.pt
             --tokenizer weights/vq16_t2i --out weights/t2i
           arcond captions --text "a dog" --out captions.npz
           arcond sample --checkpoint weights/t2i --captions captions.npz --out dog.npz
           arcond train --config llamagen_t2i_xl_256 --init weights/t2i --workdir runs/t2i
             --config.data.directory=IMAGES --config.data.num_classes=2
             --config.data.captions=captions.npz --config.tokenizer.path=weights/vq16_t2i
Hardware:  not yet run
Score:     not yet run
"""

from arcond_jax import build
from arcond_jax.configs import imagenet, tensorar
from arcond_jax.models import gpt


def get_config(variant: str = "") -> build.Config:
    return tensorar.of(sized("llamagen_t2i_xl_256", "XL"), variant)


def sized(name: str, size: str, *, image_size: int = 256) -> build.Config:
    """The recipe for one of the released models."""
    config = imagenet.of_codes("llamagen_t2i", "vq", batch_size=256, image_size=image_size)
    config.name = name
    config.data.num_classes = 0  # as many as there are captions
    config.model.update(**gpt.SIZES[size], dropout=0.1, token_dropout=0.1, remat="full")
    config.training.update(num_train_steps=50_000_000 // 256, num_warmup_steps=0, weight_decay=0.05)
    config.sampling.update(guidance_scale=7.5, top_k=1000)
    return config
