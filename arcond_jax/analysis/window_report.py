"""The report of a model with windows of codes: its drafts, in pictures and numbers, and their cost.

Images are drawn as a run draws them, and what its windows said besides is shown.
"""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from arcond_jax import atomic, build, types
from arcond_jax.analysis import figures, report, windows
from arcond_jax.parallel import operations, processes
from arcond_jax.run import drawing, restoring
from arcond_jax.sampling import sampled as sampled_lib

NUM_SHOWN = 8  # images in the picture
NUM_RUNS = 3  # of each sampler that is timed; the fastest counts
OFF = {"drafts": "off", "renoise": False, "speculative": False, "relaxed_acceptance": 1.0}

HOW_DRAFTS_ARE = {
    "off": "Their drafts are off, and drawn here for inspection, which changes no image.",
    "draw": "Their drafts are drawn for inspection, which changes no image.",
    "feed": "Their drafts are fed back.",
}
HOW_TO_READ = """
Each window holds the code of its position, which is final, and drafts of the codes after it. Later
windows draw these again. An entry's flips are how often its draft is not the final code.

A high flip rate is no evidence of useful refinement: a draft that knows nothing is changed most
often. Compare it with chance, the flips that drafts of the same positions of another image would
have, of the same class where there is one. Flips near chance are drafts that know nothing of their
image; kappa is the agreement beyond it, 1 for drafts that stay and 0 for chance. Nor is a low rate
evidence of good drafts where they are fed back: a model that trusts them draws what it is shown.

Drafts carry no new information at sampling: they are drawn from the condition of an earlier
position, which the model has seen already. Feeding them back can help by what is drawn with them,
and only a comparison of images with and without them (arcond evaluate, arcond compare) shows it.
"""
HOW_TO_READ_CALLS = """
Drafts are verified here by the model itself, and accepted or drawn again so that images keep the
law of sampling without drafts: what they can give is time, and no quality. The first call of an
image has no drafts to verify, and those at the end of the grid cannot accept all; both count as
if the rest had been refused.
"""


def with_drafts(config: build.Config, num_images: int = 2) -> build.Config:
    """The config that is drawn with: drafts that are off are drawn for inspection.

    That changes no image.

    Raises:
      build.ConfigError: It has no drafts, or too few images are asked for.
    """
    if "tensorar" not in config or config.tensorar.window == 1:
        raise build.ConfigError(
            f"a report shows windows of codes, and {config.name} has none: leave it out, or train "
            "with tensorar.window above 1 (digits:tensorar is one)"
        )
    if config.sampling.get("stride", 1) > 1:
        raise build.ConfigError(
            f"sampling.stride {config.sampling.stride} has no drafts to show: set it to 1"
        )
    if num_images < 2:
        raise build.ConfigError("a report compares images: draw at least 2")
    if config.sampling.get("speculative") or config.sampling.drafts != "off":
        return config
    return build.changed(config, {"sampling.drafts": "draw"})


def paths(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The page and the numbers beside it, asked for before long work whether they can be written.

    Raises:
      build.ConfigError: They would have one name.
      OSError: They cannot be written.
    """
    numbers = path.with_suffix(".json")
    if path == numbers:
        raise build.ConfigError(f"{path} is the name of the report's numbers: end it in .html")
    for one in (path, numbers):
        atomic.check(one)
    return path, numbers


def draw(
    path: pathlib.Path,
    trained: restoring.Trained,
    refiner: types.Refiner,
    prompt: types.Prompt,
    label: Int[np.ndarray, " n"],
    *,
    seed: int,
    batch_size: int | None = None,
) -> UInt8[np.ndarray, "n height width channels"]:
    """Draws images, writes their report as an HTML page and a JSON file, and returns them.

    Args:
      label: Of the prompts: images of one label are compared by chance.

    Raises:
      build.ConfigError: As in `with_drafts` and `paths`.
    """
    page, beside = paths(path)
    config = with_drafts(trained.config, len(label))
    drawer = drawing.Drawer(trained, config)
    images, kept = [], []
    for image_uint8, sampled in drawer.batches(refiner, prompt, seed=seed, batch_size=batch_size):
        images.append(image_uint8)
        kept.append(processes.fetch(_of_windows(sampled)))
    drafts, emitted = jax.tree.map(lambda *x: np.concatenate(x)[: len(label)], *kept)
    batch = drawing.rows(prompt, 0, len(jax.tree.leaves(kept[0])[0]))
    found = {
        "model": config.name,
        "checkpoint_step": trained.step,
        "num_images": len(label),
        "seed": seed,
        "window": config.tensorar.window,
        "sampling": config.sampling.to_dict(),
        "own_drafts": trained.config.sampling.drafts,
        "cost": cost(trained, drawer, config, refiner, batch),
        **numbers(config, drafts, emitted, label),
    }
    picture = None if drafts is None else decoded(drawer, drafts[:NUM_SHOWN])
    if not processes.is_first():
        return np.concatenate(images)
    report.write_report(page, title=f"Windows of {config.name}", sections=sections(found, picture))
    atomic.write_text(beside, json.dumps(found, indent=2) + "\n")
    return np.concatenate(images)


def _of_windows(sampled: sampled_lib.Sampled) -> tuple[Any, Any]:
    return sampled.drafts, getattr(sampled, "emitted", None)


def numbers(
    config: build.Config,
    drafts: Int[np.ndarray, "n l w"] | None,
    emitted: Int[np.ndarray, "n w"] | None,
    label: Int[np.ndarray, " n"],
) -> dict[str, Any]:
    """Of drafts, or of speculative sampling."""
    if emitted is not None:
        accepted = windows.acceptance(emitted)
        return {
            "tokens_per_call": windows.tokens_per_call(emitted),
            "calls": emitted.sum(axis=0).tolist(),
            "acceptance": [None if math.isnan(x) else float(x) for x in accepted],
        }
    assert drafts is not None
    rows = windows.entries(drafts, label, num_codes=build.num_codes(config))
    return {
        "tokens_per_call": 1.0,
        "entries": [dataclasses.asdict(x) for x in rows],
        "others_of_same_label": float(np.mean(label[windows.others(label)] == label)),
    }


def decoded(
    drawer: drawing.Drawer, drafts: Int[np.ndarray, "n l w"]
) -> UInt8[np.ndarray, "n w height width channels"]:
    """Images with the codes of every position as each entry of the window had them.

    They are decoded from codes, of models that draw latents besides too.
    """
    codes = np.moveaxis(windows.by_position(drafts), -1, 1)
    flat = jnp.asarray(codes.reshape(-1, codes.shape[-1]))
    image_uint8 = drawer.decode(types.Tokens(codes=flat))
    return image_uint8.reshape(*codes.shape[:2], *image_uint8.shape[1:])


def cost(
    trained: restoring.Trained,
    drawer: drawing.Drawer,
    config: build.Config,
    refiner: types.Refiner,
    prompt: types.Prompt,
) -> dict[str, Any]:
    """Parameters, operations and time of windows, against the model inside and drafts off.

    Args:
      drawer: Of `config`, the sampler as drawn.
      prompt: A batch, as large as those drawn.
    """
    there = {f"sampling.{name}": x for name, x in OFF.items() if name in config.sampling}
    off = build.changed(config, there)
    base = build.changed(off, {"tensorar.window": 1})
    inside = nn.unbox(build.abstract_params(base))
    drawers = {
        "base": drawing.Drawer(dataclasses.replace(trained, params=inside), base),
        "drafts_off": drawing.Drawer(trained, off),
        "as_drawn": drawer,
    }
    one, positions = drawing.rows(prompt, 0, 1), math.prod(build.grid(config))
    counts = {name: operations.count(x.traced(one).jaxpr) for name, x in drawers.items()}
    del drawers["base"]  # it is counted only: its parameters are shapes
    num_base, num_all = (
        sum(x.size for x in jax.tree.leaves(tree)) for tree in (inside, trained.params)
    )
    return {
        "parameters_base": num_base,
        "parameters_windows": num_all - num_base,
        "operations_per_position": {
            name: None if x is None else x / positions for name, x in counts.items()
        },
        "seconds_per_image": {
            name: seconds / types.num_rows(prompt)
            for name, seconds in _seconds(drawers, refiner, prompt).items()
        },
        "batch_size": types.num_rows(prompt),
    }


def _seconds(
    drawers: Mapping[str, drawing.Drawer], refiner: types.Refiner, prompt: types.Prompt
) -> dict[str, float]:
    """The fastest run of each loop, compiled before; they run in turns."""
    fastest = dict.fromkeys(drawers, math.inf)
    for run in range(NUM_RUNS + 1):
        for name, drawer in drawers.items():
            start = time.perf_counter()
            jax.block_until_ready(drawer.sample(refiner, prompt, seed=0))
            if run:
                fastest[name] = min(fastest[name], time.perf_counter() - start)
    return fastest


def sections(
    found: Mapping[str, Any], picture: UInt8[np.ndarray, "n w height width channels"] | None
) -> list[report.Text | report.Table | report.Picture]:
    """The page."""
    intro = (
        f"{found['num_images']} images of {found['model']} (step {found['checkpoint_step']}, seed "
        f"{found['seed']}), windows of {found['window']} codes. "
    )
    if picture is None:
        intro += "Drafts are verified: speculative sampling."
        shown = [_calls_table(found), report.Text(HOW_TO_READ_CALLS, heading="How to read it")]
    else:
        intro += HOW_DRAFTS_ARE[found["own_drafts"]]
        strip = report.Picture(
            figures.refinement_strip(picture),
            "From draft to final, an image a row: the code of every position as it was guessed so "
            "many positions ahead, and as it was drawn at last. Where there is no such guess, at "
            "the beginning, the final code stands. Decoded from codes.",
        )
        table = _entries_table(found)
        shown = [strip, table, report.Text(HOW_TO_READ, heading="How to read it")]
    return [report.Text(intro), *shown, _cost_table(found)]


def _entries_table(found: Mapping[str, Any]) -> report.Table:
    rows = [
        [
            x["entry"],
            f"{x['flips']:.3f} ± {x['flips_error']:.3f}",
            x["chance"],
            1.0 - x["flips"],
            x["kappa"],
            x["entropy"],
            x["final_entropy"],
        ]
        for x in found["entries"]
    ]
    return report.Table(
        "Drafts of each entry against the final codes of their positions.",
        ["entry", "flips", "chance", "agreement", "kappa", "bits", "bits, final"],
        rows,
        f"± is the standard error over images. For chance {found['others_of_same_label']:.0%} of "
        "the images had another one of their class, the rest one of any. Bits are the entropy of "
        "all drafts of an entry as one set, and of the final codes of the same positions.",
    )


def _calls_table(found: Mapping[str, Any]) -> report.Table:
    rows = [[slot, share] for slot, share in enumerate(found["acceptance"], start=1)]
    return report.Table(
        "Share of drafts that were accepted, of those whose drafts before them were.",
        ["draft", "accepted"],
        rows,
        f"{found['tokens_per_call']:.2f} codes a call of the network, over {sum(found['calls'])} "
        "calls.",
    )


def _cost_table(found: Mapping[str, Any]) -> report.Table:
    measured = found["cost"]
    operations_of, seconds_of = measured["operations_per_position"], measured["seconds_per_image"]
    base, off = operations_of["base"], seconds_of["drafts_off"]
    names = {"base": "without windows", "drafts_off": "drafts off", "as_drawn": "as drawn here"}
    rows = []
    for name, words in names.items():
        count, seconds = operations_of[name], seconds_of.get(name)
        rows.append(
            [
                words,
                None if count is None else f"{count / 1e6:.3g}",
                None if count is None else f"{count / base:.3f}",
                None if seconds is None else f"{1e3 * seconds:.3g} ms",
                None if seconds is None else f"{seconds / off:.3f}",
                found["tokens_per_call"] if name == "as_drawn" else 1.0,
            ]
        )
    share = measured["parameters_windows"] / measured["parameters_base"]
    return report.Table(
        "What windows cost.",
        ["sampler", "MFLOP a position", "ratio", "time an image", "ratio", "tokens a call"],
        rows,
        f"The parts of windows have {measured['parameters_windows']:,} parameters, {share:.1%} of "
        f"the {measured['parameters_base']:,} of the model inside. Operations are those of matrix "
        "products, counted from shapes, refinement left out, and a dash where they depend on what "
        f"is drawn. Times are the fastest of {NUM_RUNS} runs in turns, in batches of "
        f"{measured['batch_size']}, without decoding.",
    )
