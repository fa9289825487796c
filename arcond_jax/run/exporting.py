"""A sampler for jax alone: a program for CPU, TPU and GPU, its weights and a loader.

The folder holds

  sampler.stablehlo    what `jax.export` serialises: (weights, prompt, seed, first_row) -> images
  weights.safetensors  the weights by name: averaged parameters, tokenizer and refiner, as far as
                       the program reads them
  manifest.json        what the program takes and gives, and how it was made
  load.py              `run.load`: reads and runs the three; needs jax, numpy and flatbuffers
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, UInt8

from arcond_jax import atomic, build, types
from arcond_jax.convert import files
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.run import drawing, evaluating, load
from arcond_jax.run.restoring import Trained
from arcond_jax.transport import refiners

PLATFORMS = ("cpu", "tpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Program:
    """A sampler and what it reads.

    Attributes:
      exported: (weights, prompt, seed, first_row) to images, uint8 [b, height, width, channels].
        `weights` is a dict, `prompt` int32 [b] or, for captions, a dict of their `embedding` and
        `valid`; `seed` is uint32 and `first_row` int32, both scalar. Row i of a batch is row
        `first_row` + i of all images that the seed gives.
      weights: By name, on the host.
    """

    exported: export.Exported
    weights: dict[str, np.ndarray]


def program(trained: Trained, refiner: types.Refiner, *, batch_size: int | None = None) -> Program:
    """Makes the program; nothing is compiled.

    Args:
      batch_size: None for a program that takes any.

    Raises:
      build.ConfigError: The refiner mixes rows and no batch size is given.
      ValueError: It cannot mix a batch of this size.
    """
    if isinstance(refiner, refiners.InBatch) and batch_size is None:
        raise build.ConfigError(
            "transport.kind in_batch solves transport for the rows of a batch, whose number the "
            "program must know: give --batch_size"
        )
    drawer = drawing.Drawer(trained)
    tree = {"params": trained.params, "tokenizer": trained.tokenizer, "refiner": refiner}
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): _shape(leaf)
        for path, leaf in leaves
    }

    def draw(
        weights: Mapping[str, Array], prompt: Any, seed: Array, first_row: Array
    ) -> UInt8[Array, "b height width channels"]:
        # What is not read is never looked at, so that its shape may stand for it.
        held = jax.tree.unflatten(structure, [weights.get(name, shapes[name]) for name in shapes])
        if isinstance(prompt, Mapping):
            prompt = types.Caption(**prompt, given=jnp.ones(prompt["valid"].shape[0], bool))
        rng = jax.random.key(seed)
        return drawer.image(**held, rng=rng, prompt=prompt, first_row=first_row)

    num_rows = export.symbolic_shape("b")[0] if batch_size is None else batch_size
    inputs = (
        _prompt(trained.config, num_rows),
        jax.ShapeDtypeStruct((), jnp.uint32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    with _for_all_platforms():
        needed = _read(jax.make_jaxpr(draw)(shapes, *inputs).jaxpr, sorted(shapes))
        read = {name: shape for name, shape in shapes.items() if name in needed}
        exported = export.export(jax.jit(draw), platforms=PLATFORMS)(read, *inputs)
    held = zip(shapes, leaves, strict=True)
    on_host = jax.device_get({name: leaf for name, (_, leaf) in held if name in needed})
    return Program(exported, {name: np.asarray(x, order="C") for name, x in on_host.items()})


def write(
    trained: Trained,
    refiner: types.Refiner,
    out: pathlib.Path,
    *,
    batch_size: int | None = None,
) -> None:
    """Writes the folder; it is there whole or not at all.

    Arguments and errors are those of `program` and of `atomic.folder`.
    """
    made = program(trained, refiner, batch_size=batch_size)
    with atomic.folder(out) as folder:
        (folder / load.PROGRAM).write_bytes(made.exported.serialize())
        files.save_state(folder / load.WEIGHTS, made.weights)
        manifest = _manifest(trained, made.exported, batch_size)
        (folder / load.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
        (folder / "load.py").write_bytes(pathlib.Path(load.__file__).read_bytes())


def check_target(out: pathlib.Path) -> None:
    """Whether `write` can write there, to know it before the work.

    Raises:
      build.ConfigError: There is something already.
      OSError: No folder can be made there.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise build.ConfigError(f"{out} is there already: name a new folder")
    atomic.check(out)


def in_dtype(trained: Trained, dtype: str) -> Trained:
    """The same weights, computed with in another dtype."""
    config = build.changed(trained.config, {"training.dtype": dtype})
    structure = jax.tree.structure(build.abstract_tokenizer(config))
    tokenizer = jax.tree.unflatten(structure, jax.tree.leaves(trained.tokenizer))
    return dataclasses.replace(trained, config=config, tokenizer=tokenizer)


@contextlib.contextmanager
def _for_all_platforms() -> Iterator[None]:
    """A mesh of one device that may be of any platform, which `placement` asks for."""
    axes = mesh_lib.AXES
    types_of_axes = (jax.sharding.AxisType.Auto,) * len(axes)
    mesh = jax.sharding.AbstractMesh((1,) * len(axes), axes, axis_types=types_of_axes)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def _read(jaxpr: Any, names: list[str]) -> set[str]:
    """Which of its first inputs a program reads."""
    used = {id(x) for equation in jaxpr.eqns for x in equation.invars}
    return {name for name, x in zip(names, jaxpr.invars, strict=False) if id(x) in used}


def _prompt(config: build.Config, num_rows: Any) -> Any:
    """Shapes of the prompts as they come from outside."""
    if build.family_of(config).prompts == "classes":
        return jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    size = (num_rows, config.model.num_caption_vectors)
    return {
        "embedding": jax.ShapeDtypeStruct((*size, config.model.caption_width), jnp.float32),
        "valid": jax.ShapeDtypeStruct(size, jnp.bool_),
    }


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _manifest(
    trained: Trained, exported: export.Exported, batch_size: int | None
) -> dict[str, Any]:
    config = trained.config
    of_classes = build.family_of(config).prompts == "classes"
    settings = evaluating.provenance(trained, config, seed=0)
    (_, prompt, seed, first_row), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    described = {"prompt": prompt, "seed": seed, "first_row": first_row}
    return {
        "config": config.name,
        "model": config.model.name,
        "checkpoint_step": trained.step,
        "inputs": jax.tree.map(str, described),
        "output": str(exported.out_avals[0]),
        "batch_size": batch_size,
        "num_classes": config.data.num_classes if of_classes else None,
        "class_names": list(trained.class_names or ()) or None if of_classes else None,
        "platforms": list(exported.platforms),
        "dtype": config.training.dtype,
        "sampling": settings.sampling,
        "refinement": settings.refinement,
        "jax": jax.__version__,
        "calling_convention": exported.calling_convention_version,
    }
