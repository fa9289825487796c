"""Texts to captions. The encoder is tested where it is installed: pip install -e '.[captions]'."""

import importlib.util
import logging

import numpy as np
import pytest

from arcond_jax.cli import main
from arcond_jax.convert import captions, table

INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def test_padding_moves_to_the_front():
    embedding = np.arange(1.0, 9.0, dtype=np.float32).reshape(2, 4, 1)
    valid = np.array([[True, True, False, False], [True] * 4])
    moved, told = captions.padded_in_front(embedding, valid)
    np.testing.assert_array_equal(moved[..., 0], [[0, 0, 1, 2], [5, 6, 7, 8]])
    np.testing.assert_array_equal(told, [[False, False, True, True], [True] * 4])


@pytest.mark.skipif(INSTALLED, reason="transformers is installed")
def test_without_transformers(tmp_path, capsys):
    out = tmp_path / "captions.npz"
    assert main.main(["captions", "--text", "a dog", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "arcond captions: captions are encoded by transformers and torch, which"
    )
    assert error.count("\n") == 1 and not out.exists()


@pytest.fixture
def model(tmp_path):
    """A T5 of random weights, with a tokenizer of six words."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "</s>", "<unk>", "a", "dog", "two"]
    whole = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    whole.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "t5")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=6, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    encoder = transformers.T5EncoderModel(config).eval()
    encoder.save_pretrained(tmp_path / "t5")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return tmp_path / "t5", encoder


def test_captions_are_the_encoder_s_last_states(model, tmp_path):
    torch, (folder, encoder) = pytest.importorskip("torch"), model
    texts = ["A dog ", "two", "a " * 200]
    out = tmp_path / "captions.npz"
    flags = [flag for text in texts for flag in ("--text", text)]
    assert main.main(["captions", *flags, "--model", str(folder), "--out", str(out)]) == 0
    with np.load(out) as file:
        embedding, valid, kept = file["embedding"], file["valid"], file["text"]
    assert embedding.shape == (3, 120, 8) and embedding.dtype == np.float32
    np.testing.assert_array_equal(valid.sum(1), [3, 2, 120])  # with the end of the sentence
    np.testing.assert_array_equal(kept, texts)
    for row, ids in enumerate(([3, 4, 1], [5, 1], [3] * 119 + [1])):
        with torch.no_grad():
            expected = encoder(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(embedding[row, -len(ids) :], expected, atol=1e-5)
        assert not embedding[row, : -len(ids)].any() and not valid[row, : -len(ids)].any()


@pytest.mark.skipif(not INSTALLED, reason="needs transformers")
def test_no_encoder_there(tmp_path):
    with pytest.raises(table.ConvertError, match="cannot be read as a T5 model") as raised:
        captions.encode(["a dog"], model=str(tmp_path))
    assert "\n" not in str(raised.value)
