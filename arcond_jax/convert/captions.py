"""Captions to the arrays that a model of captions is told them by, with FLAN-T5 in PyTorch.

This module is the only door to transformers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from arcond_jax.convert import table
from arcond_jax.models import prompted

MODEL = "google/flan-t5-xl"  # on Hugging Face; what LlamaGen was trained with


def encode(
    texts: Sequence[str], *, model: str = MODEL
) -> tuple[Float32[np.ndarray, "n prefix caption_width"], Bool[np.ndarray, "n prefix"]]:
    """Last hidden states of each text, and where they are not padding, which comes first.

    Args:
      model: Folder of a T5 model with its tokenizer, or its name on Hugging Face.

    Raises:
      table.ConvertError: transformers or torch is not installed, or there is no such model.

    Source: LlamaGen, language/t5.py, `T5Embedder`, and autoregressive/sample/sample_t2i.py. Texts
    are made lower case and stripped, as there with `use_text_preprocessing` False; the default
    there also removes addresses, file names and the like. Departure: float32, not bfloat16.
    """
    torch, transformers = _libraries()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        encoder = transformers.T5EncoderModel.from_pretrained(model).float().eval()
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise table.ConvertError(f"{model} cannot be read as a T5 model ({reason})") from None
    embeddings, valids = [], []
    for text in texts:
        tokens = tokenizer(
            text.lower().strip(),
            padding="max_length",
            max_length=prompted.NUM_CAPTION_VECTORS,
            truncation=True,
            return_tensors="pt",
        )
        mask = tokens["attention_mask"]
        with torch.no_grad():
            hidden = encoder(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
        embeddings.append(hidden[0].numpy())
        valids.append(mask[0].numpy() == 1)
    return padded_in_front(np.stack(embeddings), np.stack(valids))


def padded_in_front(
    embedding: Float32[np.ndarray, "n prefix caption_width"], valid: Bool[np.ndarray, "n prefix"]
) -> tuple[Float32[np.ndarray, "n prefix caption_width"], Bool[np.ndarray, "n prefix"]]:
    """Padding from behind the captions to before them, where it is zero."""
    rolled = [
        np.roll(np.where(told[:, None], rows, 0.0), -told.sum(), axis=0)
        for rows, told in zip(embedding, valid, strict=True)
    ]
    return np.stack(rolled), valid[:, ::-1]


def _libraries() -> tuple[Any, Any]:
    try:
        import torch  # pyright: ignore[reportMissingImports]  # extras: nothing else needs them
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise table.ConvertError(
            "captions are encoded by transformers and torch, which are not both installed: pip "
            "install 'arcond_jax[captions]'"
        ) from None
    return torch, transformers
