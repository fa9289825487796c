"""The life of a run on disk: train, resume, restore, calibrate, draw.

A working directory holds `checkpoints/` (everything needed to continue, and the bank once training
is done), `metrics.jsonl`, pictures, and `refiner/` once it is calibrated. One of converted weights
holds `weights/` instead of checkpoints, and can be sampled and calibrated like any other.
"""

from arcond_jax.run.drawing import (
    Captions,
    Drawer,
    check_labels,
    known_tokens,
    read_captions,
    with_captions,
)
from arcond_jax.run.evaluating import provenance, reference
from arcond_jax.run.refinement import (
    calibrate,
    conditions,
    filled_bank,
    load_refiner,
    save_refiner,
)
from arcond_jax.run.restoring import Trained, config_for, is_converted, params_of, restore
from arcond_jax.run.training import train

__all__ = [
    "Captions",
    "Drawer",
    "Trained",
    "calibrate",
    "check_labels",
    "conditions",
    "config_for",
    "filled_bank",
    "is_converted",
    "known_tokens",
    "load_refiner",
    "params_of",
    "provenance",
    "read_captions",
    "reference",
    "restore",
    "save_refiner",
    "train",
    "with_captions",
]
