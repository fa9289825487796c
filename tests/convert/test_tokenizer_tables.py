"""Tables of the tokenizers at full size: each of our parameters once, each official name once."""

import flax.traverse_util
import numpy as np
import pytest

from arcond_jax.convert import kl16, lfq, maskgit_vq, table, vq16
from arcond_jax.tokenizers import kl, network, vq
from arcond_jax.tokenizers import lfq as lfq_tokenizer
from arcond_jax.tokenizers import maskgit_vq as maskgit_tokenizer

MODELS = {
    "kl16": (kl16, kl.KLAutoencoder()),
    "vq16": (vq16, vq.VQAutoencoder(**vq.SIZES["VQ-16"])),
    "vq8": (vq16, vq.VQAutoencoder(**vq.SIZES["VQ-8"])),
    "maskgit_vq": (maskgit_vq, maskgit_tokenizer.MaskGITAutoencoder()),
    "lfq": (lfq, lfq_tokenizer.LFQAutoencoder()),
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] if x == "vq8" else []) for x in MODELS]
)
def test_table_names_every_parameter_once(name):
    convert, made = MODELS[name]
    rows = convert.rows(made)
    ours = [row.ours for row in rows]
    theirs = [name for row in rows for name in row.theirs]
    assert len(set(theirs)) == len(theirs) and len(set(ours)) == len(ours)
    wanted = flax.traverse_util.flatten_dict(network.abstract_params(made, (16, 16)), sep="/")
    assert set(ours) == set(wanted)
    ignored = getattr(convert, "IGNORED", ())
    assert not any(name.startswith(tuple(ignored)) for name in theirs)


def test_averages_take_the_names_of_the_training_weights():
    rows = [table.row("a", "encoder.conv_in.weight"), table.row("b", "decoder.up.0.bias")]
    state = {
        "encoder.conv_in.weight": np.zeros(2),
        "decoder.up.0.bias": np.zeros(2),
        "model_ema.encoderconv_inweight": np.ones(2),
        "model_ema.decoderup0bias": np.full(2, 2.0),
        "model_ema.decay": np.zeros(()),
    }
    averages = lfq.averaged(rows, state)
    np.testing.assert_array_equal(averages["encoder.conv_in.weight"], 1)
    np.testing.assert_array_equal(averages["decoder.up.0.bias"], 2)
    del state["model_ema.decoderup0bias"]
    with pytest.raises(table.ConvertError, match=r"lack model_ema\.decoderup0bias"):
        lfq.averaged(rows, state)
