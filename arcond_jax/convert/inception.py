"""Weights of FID's Inception-v3, a state dict: one file, published by two projects.

Sources: mseitzer/pytorch-fid, src/pytorch_fid/inception.py, `FID_WEIGHTS_URL`; toshas/
torch-fidelity, torch_fidelity/feature_extractor_inceptionv3.py, `URL_INCEPTION_V3`.
"""

from typing import Any

import flax.traverse_util

from arcond_jax.convert import table

OF_A_UNIT = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "variance": "bn.running_var",
}
COUNTER = ".num_batches_tracked"  # ends the names of what counts training steps; no weight

# Both files are the same to the bit; the end of their names is the beginning of this.
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FILES = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
)


def weights(held: table.StateDict) -> table.StateDict:
    """A state dict without its counters."""
    return {name: x for name, x in held.items() if not name.endswith(COUNTER)}


def rows(abstract: Any) -> list[table.Row]:
    """The whole state dict, but for counters; names are torchvision's here and there.

    Args:
      abstract: Shapes of the parameters.
    """
    made = []
    for ours in flax.traverse_util.flatten_dict(abstract, sep="/"):
        *unit, name = ours.split("/")
        if unit == ["fc"]:
            continue
        theirs = ".".join([*unit, OF_A_UNIT[name]])
        made.append(table.row(ours, theirs, table.CONV if name == "kernel" else table.PLAIN))
    return [*made, *table.linear("fc", "fc")]
