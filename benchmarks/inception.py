"""FID and Inception Score beside pytorch-fid's and torch-fidelity's, and features per second.

Two sets of images, every other one of a folder (at any depth), are scored by the three programs
with one file of weights. Needs `pip install 'arcond_jax[convert]' pytorch-fid torch-fidelity` and
loads nothing. Without --weights they are random, of the size that keeps activations alive, and
saved in pytorch-fid's layout: then the scores mean nothing, and must agree all the same.

  python benchmarks/inception.py ~/images --num_images 500
  python benchmarks/inception.py ~/images --weights pt_inception-2015-12-05-6726825d.pth

Times are of the network and the resize alone, in turns, the least of several passes; other programs
on the machine change seconds on the clock, so seconds of all cores are beside them.
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import flax.traverse_util
import jax
import numpy as np
import pytorch_fid.fid_score  # pyright: ignore[reportMissingImports]
import pytorch_fid.inception  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import torch_fidelity  # pyright: ignore[reportMissingImports]

from arcond_jax.convert import inception as table_of
from arcond_jax.convert import table
from arcond_jax.data import images
from arcond_jax.evaluation import frechet, inception, moments, scores
from arcond_jax.run import extractor

BATCH_SIZE = 48  # near the 50 of pytorch-fid, and whole lots of ours


def random_weights(path: pathlib.Path, seed: int) -> None:
    """A state dict of normal numbers, kernels by fan-in, as pytorch-fid would load it."""
    rng = np.random.default_rng(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
        x = rng.standard_normal(shape)
        if name == "kernel":
            return x * (0.22 * np.sqrt(2 / np.prod(shape[:-1])))
        # Biases of batch normalisations and of the logits, scales, means, variances.
        laws = {"bias": 0.1 * x, "scale": 1 + 0.1 * x, "mean": 0.02 * x}
        return laws.get(name, 0.05 * np.exp(0.2 * x))

    abstract = inception.abstract_params()
    flat: dict[Any, Any] = flax.traverse_util.flatten_dict(abstract)
    params = {key: drawn(key[-1], x.shape).astype(np.float32) for key, x in flat.items()}
    params["fc", "kernel"] *= 300  # features differ little, and classes are to
    state = table.to_theirs(table_of.rows(abstract), flax.traverse_util.unflatten_dict(params))
    torch.save({name: torch.from_numpy(x) for name, x in state.items()}, path)


def make_folders(source: pathlib.Path, num_images: int, out: pathlib.Path) -> list[pathlib.Path]:
    """Two flat folders of PNG images, spread over the source."""
    found = sorted(p for p in source.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if len(found) < 2 * num_images:
        raise SystemExit(f"{source} has {len(found)} images, two sets need {2 * num_images}")
    folders = [out / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    for number in range(2 * num_images):
        path = found[number * len(found) // (2 * num_images)]
        image = images.open_image(path, num_channels=3)
        image.save(folders[number % 2] / f"{number:06d}.png")
    return folders


def read(folder: pathlib.Path, made: inception.Inception) -> tuple[np.ndarray, np.ndarray]:
    """Our features and logits of a folder."""
    paths = sorted(folder.iterdir())
    image = np.stack([np.asarray(images.open_image(path, num_channels=3)) for path in paths])
    lots = [image[i : i + BATCH_SIZE] for i in range(0, len(image), BATCH_SIZE)]
    outputs = [jax.device_get(made(lot)) for lot in lots]
    features, logits = (np.concatenate([x[i] for x in outputs]) for i in range(2))
    return features, logits


def ours(folders: list[pathlib.Path], made: inception.Inception) -> dict[str, float]:
    """FID between the folders, and Inception Score of the first."""
    (features, logits), (others, _) = (read(folder, made) for folder in folders)
    distance = frechet.frechet_distance(moments.statistics(features), moments.statistics(others))
    return {"FID": distance, "Inception Score": scores.inception_score(logits)}


def of_torch_fidelity(folders: list[pathlib.Path], weights: pathlib.Path) -> dict[str, float]:
    """The same; one split, as ours."""
    found = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        feature_extractor_weights_path=str(weights),
        batch_size=BATCH_SIZE,
        cuda=False,
        fid=True,
        isc=True,
        isc_splits=1,
        cache=False,
        save_cpu_ram=True,  # no processes beside this one
        verbose=False,
    )
    return {
        "FID": found["frechet_inception_distance"],
        "Inception Score": found["inception_score_mean"],
    }


def least(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """Seconds on the clock and of all cores, of functions that take turns."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            clock, cores = time.perf_counter(), time.process_time()
            function()
            if turn:  # the first one compiles
                now = (time.perf_counter() - clock, time.process_time() - cores)
                taken[name].append(now)
    return {name: (min(t for t, _ in x), min(t for _, t in x)) for name, x in taken.items()}


def main() -> None:
    """Prints scores and rates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=pathlib.Path, help="a folder")
    parser.add_argument("--num_images", type=int, default=500, help="in each of the two sets")
    parser.add_argument("--weights", type=pathlib.Path, help="in pytorch-fid's layout")
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("scores", "speed"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        weights = args.weights or work / "random.pth"
        if args.weights is None:
            random_weights(weights, args.seed)
        print(extractor.convert(weights, work / "converted"))
        made = {
            x: inception.load(work / "converted", preprocessing=x) for x in inception.PREPROCESSINGS
        }
        loaded = torch.load(weights)
        with mock.patch.object(
            pytorch_fid.inception, "load_state_dict_from_url", return_value=loaded
        ):
            if args.only != "speed":
                folders = make_folders(args.images, args.num_images, work)
                print(f"{args.num_images} images a side, of {args.images}")
                show("tf", ours(folders, made["tf"]), of_torch_fidelity(folders, weights))
                paths = [str(folder) for folder in folders]
                fid = pytorch_fid.fid_score.calculate_fid_given_paths(
                    paths, BATCH_SIZE, "cpu", 2048, num_workers=0
                )
                show("pytorch_fid", ours(folders, made["pytorch_fid"]), {"FID": float(fid)})
            if args.only != "scores":
                network = pytorch_fid.inception.InceptionV3([3]).eval()
                measure(network, made["pytorch_fid"], args.repeats)


def show(preprocessing: str, ours: dict[str, float], theirs: dict[str, float]) -> None:
    """Numbers side by side."""
    program = {"tf": "torch-fidelity", "pytorch_fid": "pytorch-fid"}[preprocessing]
    for name, value in theirs.items():
        apart = abs(ours[name] / value - 1)
        print(f"{name:16} ours {ours[name]:.7g}  {program} {value:.7g}  apart by {apart:.1e}")


def measure(network: Any, made: inception.Inception, repeats: int) -> None:
    """Images per second through pytorch-fid's network and ours."""
    image = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, 32, 32, 3), dtype=np.uint8)
    scaled = torch.from_numpy(image.transpose(0, 3, 1, 2) / np.float32(255))

    def theirs() -> None:
        with torch.no_grad():
            network(scaled)

    taken = least(
        {"pytorch-fid": theirs, "ours": lambda: jax.block_until_ready(made(image))}, repeats
    )
    for name, (clock, cores) in taken.items():
        print(
            f"{name:16} {BATCH_SIZE / clock:.2f} images a second, "
            f"{BATCH_SIZE / cores:.2f} a second of one core"
        )
    clock, cores = (a / b for a, b in zip(taken["pytorch-fid"], taken["ours"], strict=True))
    print(f"ours is {clock:.2f} times as fast by the clock, {cores:.2f} by seconds of cores")


if __name__ == "__main__":
    main()
