"""What the tokenizer of a config makes of images, encoded once into a cache to train from."""

import collections
import contextlib
import dataclasses
import hashlib
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np

from arcond_jax import build, checkpoint, types
from arcond_jax.build import tokens
from arcond_jax.data import finding, listing, pipeline, records, stored, tfds
from arcond_jax.data import images as images_lib
from arcond_jax.data import views as views_lib
from arcond_jax.parallel import compiled, memory
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.run import measuring, sharded
from arcond_jax.run import progress as progress_lib
from arcond_jax.tokenizers import law as law_lib

DTYPES = ("float16", "float32")  # of moments and latents
SHARD_IMAGES = 8192  # 256 MB of moments of two views in float16
BATCH_SIZE = 32  # images at a time on each device, where memory allows them: 8 GB at 256 pixels


@dataclasses.dataclass(frozen=True)
class Options:
    """What is kept of the images.

    Attributes:
      views: Those of the config by default.
      dtype: Of moments and latents, of `DTYPES`.
      batch_size: Images at a time on each device, on which the last bits depend; by default what
        `out` was begun with, else `BATCH_SIZE`.
      stop_on_error: Whether an image that cannot be decoded ends it; it is left out otherwise.
      shard_images: Images of a shard.
    """

    views: views_lib.Views | None = None
    dtype: str = "float16"
    batch_size: int | None = None
    stop_on_error: bool = False
    shard_images: int = SHARD_IMAGES


@dataclasses.dataclass(frozen=True)
class _Images:
    """Where images come from: name, a digest of which they are, and a way to open them."""

    name: str
    sha256: str
    of_size: Callable[[int], pipeline.Source]


class _AllViews:
    """All views of an image as one array, as `pipeline.Viewed`.

    Attributes:
      failed: Name and reason of the images that cannot be decoded, by index, among those that were
        read; zeros stand for their views.
    """

    num_views = 1

    def __init__(self, found: _Images, views: views_lib.Views, size: int, stop_on_error: bool):
        self._sources = [found.of_size(side) for side in views.sides(size)]
        self._views, self._size, first = views, size, self._sources[0]
        self.label_names = first.label_names
        shape = (len(views.names), size, size, first.image_shape[2])
        self.arrays: pipeline.Arrays = {"image": (shape, first.image_dtype)}
        self.failed: dict[int, tuple[str, str]] = {}
        self._stop_on_error = stop_on_error

    def __len__(self) -> int:
        return len(self._sources[0])

    def view(self, index: int, view: int) -> dict[str, np.ndarray]:
        try:
            items = [source[index] for source in self._sources]
        except images_lib.UnreadableError as error:
            if self._stop_on_error:
                raise ValueError(
                    f"{error}: repair it, or leave such images out by --on_error skip"
                ) from None
            self.failed[index] = error.name, error.why
            shape, pixels = self.arrays["image"]
            return {"image": np.zeros(shape, pixels), "label": np.asarray(-1, np.int32)}
        squares = [item["image"] for item in items]
        return {"image": self._views.cut(squares, self._size), "label": items[0]["label"]}


class _Readable:
    """A source of which an image that cannot be decoded gives way to the next one that can."""

    def __init__(self, source: pipeline.Source):
        self._source = source
        self.num_classes, self.label_names = source.num_classes, source.label_names
        self.image_shape, self.image_dtype = source.image_shape, source.image_dtype

    @property
    def label(self) -> np.ndarray:
        return self._source.label

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        for other in (*range(index, len(self)), *range(index)):
            with contextlib.suppress(images_lib.UnreadableError):
                return self._source[other]
        return self._source[index]  # says what is wrong with it


def encode(
    config: build.Config,
    sources: Sequence[pathlib.Path],
    out: pathlib.Path,
    options: Options = Options(),
    *,
    num_threads: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Writes the shards of this process, and the manifest once all shards are there.

    Args:
      config: Its tokenizer, at its image size, in `training.dtype`.
      sources: As of `arcond prepare`, or one folder that it or tfds prepared; none for the data of
        the config.
      out: Folder to write, or to go on with.
      num_threads: That read; as many as there are cores by default.
      process_index, process_count: Which of how many processes this is; all of them see `out`.

    Returns:
      The manifest, whose `complete` is False while shards of other processes are missing; and once
      it is True, what the latents are like (`law.statistics`): all of them where a pair of trained
      tokenizers made them, else those of some images.

    Raises:
      ImportError: The source needs an extra.
      OSError: `out` cannot be written to.
      ValueError: The source cannot be read, `out` holds something else, or the config has no such
        tokenizer or contradicts the views.
    """
    sharded.check_out(sources, out)
    views = options.views or _views_of(config)
    _check_views(config, views)
    found = _images(config, sources)
    source = _AllViews(found, views, config.data.image_size, options.stop_on_error)
    _check_classes(config, source)
    tokenizer = _tokenizer(config, found, out, options)
    encoder = _encoder(config, tokenizer, source, out, options)
    kind = tokens.kind_of(config)
    shards = sharded.cut("train", range(0, len(source), options.shard_images), len(source))
    plan = {
        "kind": stored.KIND,
        "arrays": encoder.described(),
        "tokenizer": tokens.described(config, tokenizer),
        "batch_size": encoder.batch_size,
        "image_size": config.data.image_size,
        "crop": "adm",
        "views": dataclasses.asdict(views) | {"names": views.names},
        "class_names": source.label_names,
        "source": {"name": found.name, "count": len(source), "sha256": found.sha256},
    }
    plan = sharded.begin(out, plan, shards)
    if kind.fitted and process_index == 0 and not (out / tokens.FITTED).is_dir():
        checkpoint.save_tree(str(out / tokens.FITTED), tokenizer, {})
    missing, progress = sharded.unfinished(out, shards, process_index, process_count)
    readers = pipeline.pool(num_threads)
    with progress:
        for shard in missing:
            sums = measuring.Sums(config) if kind.parts else None
            _write(out, shard, encoder, readers, progress, sums)
    known = sharded.all_known(out, shards)
    if known is None:
        return plan, {}
    if kind.parts:
        return _finish_pair(config, out, plan, shards, known)
    manifest = sharded.finish(out, plan, shards, known)
    return manifest, measuring.of_cache(config, stored.Stored(out))


def _encoder(
    config: build.Config,
    tokenizer: types.Tokenizer,
    source: "_AllViews",
    out: pathlib.Path,
    options: Options,
) -> "_Encoder":
    """One whose batch is as asked for, or as `out` was begun with: the bytes depend on it."""
    begun = records.read_manifest(out).get("batch_size") if records.is_prepared(out) else None
    wanted = options.batch_size or begun or BATCH_SIZE
    wanted = min(wanted, len(source), options.shard_images)
    encoder = _Encoder(config, tokenizer, source, options.dtype, wanted)
    if encoder.batch_size < wanted:
        held = f"memory holds {encoder.batch_size} images at a time on each device"
        if begun is not None:
            raise ValueError(
                f"{out} was begun with batch_size {begun}, {held}: go on where there is more, or "
                "write to another folder"
            )
        logging.warning(
            "%s, not %d: give --batch_size %d to other machines, for the same bytes",
            held,
            wanted,
            encoder.batch_size,
        )
    return encoder


def _finish_pair(
    config: build.Config,
    out: pathlib.Path,
    plan: dict[str, Any],
    shards: list[sharded.Shard],
    known: list[dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, float]]:
    """The Gaussians behind the codes and the manifest, written; what `encode` returns."""
    # In the order of shards, so that they are the same however many processes there were.
    total = measuring.Sums(config).total
    for shard in shards:
        total += law_lib.Sums(**sharded.arrays_of(out, shard))
    digest = stored.write_law(out, law_lib.code_law(total))
    manifest = sharded.finish(out, plan, shards, known, code_law_sha256=digest)
    return manifest, law_lib.statistics(total)


def estimate(
    config: build.Config,
    sources: Sequence[pathlib.Path],
    *,
    num_images: int = measuring.MEASURED,
    num_threads: int | None = None,
) -> dict[str, float]:
    """What latents are like (`law.statistics`), of images spread over the split; nothing is kept.

    Arguments and errors are those of `encode`, and the views are the config's.

    Raises:
      ValueError: The tokenizer gives no latents.
    """
    if "latents" not in tokens.kind_of(config).gives:
        raise build.ConfigError(
            f"tokenizer {config.tokenizer.name} gives codes alone, and latents are measured: take "
            "a config of latents"
        )
    found = _images(config, sources)
    source = _AllViews(found, _views_of(config), config.data.image_size, stop_on_error=False)
    _check_classes(config, source)
    tokenizer = _tokenizer(config, found, None, Options())
    sums, chosen = measuring.Sums(config), measuring.spread(len(source), num_images)
    encoder = _Encoder(config, tokenizer, source, "float32", min(BATCH_SIZE, len(chosen)))
    for index, row in _encoded(chosen, encoder, pipeline.pool(num_threads)):
        if index in source.failed:
            logging.warning("%s %s", *source.failed[index])
        else:
            sums.add(row)
    if len(source.failed) == len(chosen):
        raise ValueError(f"{found.name}: no image of {len(chosen)} can be read")
    return law_lib.statistics(sums.done())


def _views_of(config: build.Config) -> views_lib.Views:
    kind = config.data.get("views") or ("flip" if config.data.random_flip else "one")
    return views_lib.Views(kind, (views_lib.CROP_RANGE,) if kind == "ten" else ())


def _check_views(config: build.Config, views: views_lib.Views) -> None:
    """Raises ConfigError for views that the config would not be trained on."""
    named = config.data.get("views")
    if named is not None and named != views.kind:
        raise build.ConfigError(
            f"--views {views.kind} contradicts data.views {named} of the config: change one of them"
        )
    if named is None and (views.kind != "one") != config.data.random_flip:
        raise build.ConfigError(
            f"--views {views.kind} contradicts data.random_flip {config.data.random_flip} of the "
            "config: change one of them"
        )


def _check_classes(config: build.Config, source: pipeline.Viewed) -> None:
    if len(source.label_names) != config.data.num_classes:
        raise build.ConfigError(
            f"the source has {len(source.label_names)} classes, data.num_classes is "
            f"{config.data.num_classes}: set it to that, or take another source"
        )


def _images(config: build.Config, sources: Sequence[pathlib.Path]) -> _Images:
    """The training images of the sources, or without any of the config."""
    if not sources:
        source = build.source(config, "train")
        return _Images(
            pathlib.Path(config.data.get("directory") or config.data.name).name,
            _digest(source, ()),
            lambda size: build.source(config, "train", image_size=size),
        )
    name, first = ", ".join(x.name for x in sources), sources[0]
    if len(sources) == 1 and records.is_prepared(first):
        manifest = records.complete_manifest(first, kind="images")
        return _Images(
            name,
            manifest["source"]["sha256"],
            lambda size: records.Records(first, image_size=size),
        )
    if len(sources) == 1 and tfds.is_prepared(first):
        given = {"data.name": "tfds", "data.directory": str(first)}
        return _images(build.changed(config, given), ())
    splits = finding.find(sources)
    if "train" not in splits:
        raise ValueError(f"{name} has no train split: give the training images")
    split = splits["train"]
    return _Images(
        name,
        _digest(split, split.names),
        lambda size: listing.Listed(split, image_size=size),
    )


def _digest(split: pipeline.Source | listing.Listing, names: Sequence[str]) -> str:
    """SHA-256 over labels and, where they are known, names of the images."""
    digest = hashlib.sha256(np.asarray(split.label, "<i4").tobytes())
    digest.update("\n".join(names).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _tokenizer(
    config: build.Config, found: _Images, out: pathlib.Path | None, options: Options
) -> types.Tokenizer:
    """The tokenizer: from weights, or fitted to the images, once."""
    if not tokens.kind_of(config).fitted:
        return tokens.from_weights(config)
    if out is not None and (out / tokens.FITTED).is_dir():
        return tokens.fitted_in(out, config)
    source = found.of_size(config.data.image_size)
    if not options.stop_on_error:
        source = _Readable(source)
    return build.tokenizer(config, source)  # pyright: ignore[reportArgumentType]  # as of tfds


class _Encoder:
    """All views of a batch of images to arrays of the tokenizer, on the devices of this process.

    Attributes:
      batch_size: Images on each device.
      num_images: Images of a batch.
      arrays: Shapes and types of what comes of it.
    """

    def __init__(
        self,
        config: build.Config,
        tokenizer: types.Tokenizer,
        source: _AllViews,
        dtype: str,
        batch_size: int,
    ) -> None:
        self._mesh = mesh_lib.make_mesh(devices=jax.local_devices())
        self._tokenizer = jax.device_put(tokenizer, mesh_lib.replicated(self._mesh))
        self.source = source
        num_codes = build.num_codes(config) if "codes" in tokens.kind_of(config).gives else 0
        types_of = {"codes": "uint16" if num_codes <= 2**16 else "uint32"}

        def run(tokenizer: types.Tokenizer, image: jax.Array) -> dict[str, jax.Array]:
            of_view = jax.lax.map(
                lambda image: tokenizer.store(images_lib.as_float(image)), image.swapaxes(0, 1)
            )
            kept = {x.name: getattr(of_view, x.name) for x in dataclasses.fields(of_view)}
            return {
                name: x.swapaxes(0, 1).astype(types_of.get(name, dtype))
                for name, x in kept.items()
                if x is not None
            }

        place = mesh_lib.batch_sharding(self._mesh)
        self._run = compiled.Compiled(run, self._mesh, out_shardings=place)

        def lower(size: int) -> jax.stages.Lowered:
            shape, pixels = source.arrays["image"]
            image = jax.ShapeDtypeStruct((size, *shape), pixels, sharding=place)
            return self._run.lower(self._tokenizer, image)

        self.batch_size = memory.halved(lower, batch_size, mesh=self._mesh)
        self.num_images = self.batch_size * mesh_lib.num_batch_shards(self._mesh)
        self.arrays = lower(self.num_images).out_info

    def described(self) -> dict[str, Any]:
        """Shape of one view and type, of each array."""
        return {
            name: {"shape": list(x.shape[2:]), "dtype": x.dtype.name}
            for name, x in self.arrays.items()
        }

    def __call__(self, image: np.ndarray) -> dict[str, jax.Array]:
        """Starts the device on a batch."""
        placed = jax.device_put(image, mesh_lib.batch_sharding(self._mesh))
        return self._run(self._tokenizer, placed)


def _write(
    out: pathlib.Path,
    shard: sharded.Shard,
    encoder: _Encoder,
    readers: futures.Executor | None,
    progress: progress_lib.Progress,
    sums: measuring.Sums | None,
) -> None:
    """Writes a shard of the images that can be read, and then what is known of it.

    Its sums are kept where they are wanted.
    """
    label: list[int] = []
    failed: list[tuple[str, str]] = []

    def packed() -> Iterator[bytes]:
        for index, row in _encoded(np.arange(shard.start, shard.stop), encoder, readers):
            progress.add()
            if index in encoder.source.failed:
                failed.append(encoder.source.failed[index])
                logging.warning("%s %s", *failed[-1])
                continue
            label.append(int(row.pop("label")))
            if sums is not None:
                sums.add(row)
            yield stored.pack(label[-1], row)

    records.write_shard(out / shard.file, packed())
    sharded.keep(out, shard, label, failed, None if sums is None else vars(sums.done()))
    progress.say(shard.file)


def _encoded(
    chosen: np.ndarray, encoder: _Encoder, readers: futures.Executor | None
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The rows of images and their indices; a batch is read while the device is at the one before.

    Batches begin with a shard, so that its bytes do not depend on what was encoded before it.
    """
    running, size = collections.deque(), encoder.num_images
    for start in range(0, len(chosen), size):
        indices = chosen[start : start + size]
        loaded = pipeline.load(encoder.source, np.resize(indices, size), readers)
        running.append((indices, encoder(loaded["image"]), loaded["label"]))
        if len(running) > 1:
            yield from _rows(*running.popleft())
    yield from _rows(*running.popleft())


def _rows(
    indices: np.ndarray, arrays: dict[str, jax.Array], label: np.ndarray
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    found = {name: np.asarray(x) for name, x in arrays.items()}
    for row, index in enumerate(indices):
        item = {name: x[row] for name, x in found.items()}
        for name, x in item.items():
            if not np.isfinite(x).all():
                raise ValueError(
                    f"image {index} has {name} that {x.dtype} does not hold: look at the "
                    "tokenizer, or take --dtype float32"
                )
        yield int(index), item | {"label": label[row]}
