"""Wall time of speculative sampling at batch 1, with a drafter that is trained.

    python benchmarks/speculation.py --directory CIFAR10 --workdir runs/speculation

Trains a model of LlamaGen-B's width and depth on CIFAR-10's 64 positions and 512 codes, and its
drafter, as far as two CPU cores come in half an hour; then draws single images with guesses and
without, in turns. Trainings lie in the workdir and are not repeated. The result stands in
docs/tensorar.md.
"""

import argparse
import pathlib
import time
from typing import Any

import jax
import numpy as np
import tensorar

from arcond_jax import build
from arcond_jax.analysis import windows
from arcond_jax.run import drawing, restoring
from arcond_jax.transport import refiners

LLAMAGEN_B = {"model.width": 768, "model.depth": 12, "model.num_heads": 12}
TRAINING = {"data.batch_size": 16, "training.learning_rate": 6e-4, "training.ema_decay": 0.9}
SAMPLERS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "guided 1.5, top-k 100": {"sampling.guidance_scale": 1.5, "sampling.top_k": 100},
}


def timed(model: restoring.Trained, settings: dict[str, Any], num_images: int) -> str:
    """Seconds an image without guesses and with them, their ratio, and tokens a call."""
    drawers = []
    for speculative in (False, True):
        unrolled = {"model.unroll": LLAMAGEN_B["model.depth"]}  # as converted weights on a CPU
        own = unrolled | {"sampling.speculative": speculative} | settings
        drawers.append(drawing.Drawer(model, build.changed(model.config, own)))
        drawers[-1].sample(refiners.Identity(), np.array([0]), seed=num_images)  # compiles
    seconds, emitted = np.zeros((num_images, 2)), []
    for seed in range(num_images):
        for i, drawer in enumerate(drawers):
            start = time.perf_counter()
            label = np.array([seed % model.config.data.num_classes])
            sampled = drawer.sample(refiners.Identity(), label, seed=seed)
            sampled = jax.block_until_ready(sampled)
            seconds[seed, i] = time.perf_counter() - start
        emitted.append(np.asarray(sampled.emitted))
    plain, guessed = seconds.mean(axis=0)
    calls = windows.tokens_per_call(np.concatenate(emitted))
    return f"{plain:.2f} s, {guessed:.2f} s, {plain / guessed:.2f} times, {calls:.2f} tokens a call"


def main() -> None:
    """Trains what is missing, and prints a line for each sampler."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--directory", required=True, help="with train/<class>/ and val/<class>/")
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--num_steps", type=int, default=150, help="of the model")
    parser.add_argument("--num_tuning_steps", type=int, default=60, help="of the drafter")
    parser.add_argument("--num_images", type=int, default=20)
    args = parser.parse_args()
    args.data, args.settings = "cifar10", list((LLAMAGEN_B | TRAINING).items())
    tensorar.trained("drafter", args, tensorar.arms(()), seed=0)
    model = restoring.restore(tensorar.folder(args, "drafter", 0))
    for name, settings in SAMPLERS.items():
        print(f"{name}: {timed(model, settings, args.num_images)}", flush=True)


if __name__ == "__main__":
    main()
