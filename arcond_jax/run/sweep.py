"""Scores over a grid of sampling settings: one restored model, the same seed and labels for all.

Image i has the same noise in every cell, so differences between cells are paired. A table of what
is done lies on the disk after every cell, and the same sweep goes on from it.
"""

import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from arcond_jax import atomic, build
from arcond_jax import config as config_lib
from arcond_jax.evaluation import frechet, jackknife, scoring, summary
from arcond_jax.evaluation import reference as reference_lib
from arcond_jax.parallel import processes
from arcond_jax.run import drawing, evaluating, exclusive, refinement, restoring, sample_file
from arcond_jax.transport import refiners

TABLE = "sweep.json"
KEPT = 2  # one of so many cells stays after a round of successive halving
SCORE = "frechet_distance"

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """A cell with some number of images.

    Attributes:
      settings: `section.key` to value.
      frechet_distance: To the reference.
      left_out: The same without each of some groups of images, the same ones for all cells; None
        if images are too few for that.
      seconds: That it took, compilation included.
    """

    settings: dict[str, Any]
    num_images: int
    frechet_distance: float
    left_out: list[float] | None
    inception_score: float
    seconds: float

    @property
    def error(self) -> float | None:
        """Standard error of the Frechet distance, by the jackknife."""
        return None if self.left_out is None else jackknife.error(self.left_out)


@dataclasses.dataclass(frozen=True)
class Found:
    """A sweep, or what there is of it.

    Attributes:
      over: The values of each setting.
      rows: Of all cells done; of one with several numbers of images, that with the most.
      score: What the distance is called, of the most images.
      made: What belongs to all of them: model, seed, network, reference.
    """

    over: Mapping[str, Sequence[Any]]
    rows: Sequence[Row]
    score: str
    made: Mapping[str, Any]

    @property
    def best(self) -> Row:
        """That with the least distance, of those with the most images."""
        most = max(row.num_images for row in self.rows)
        return min((x for x in self.rows if x.num_images == most), key=lambda x: x.frechet_distance)

    def above_best(self, row: Row) -> tuple[float, float | None] | None:
        """Difference to the best and its standard error, paired; None with fewer images."""
        best = self.best
        if row.num_images != best.num_images:
            return None
        difference = row.frechet_distance - best.frechet_distance
        if row.left_out is None or best.left_out is None:
            return difference, None
        return difference, jackknife.error(np.subtract(row.left_out, best.left_out))


def over(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Values by setting, from `sampling.name=value,value,...`.

    Raises:
      build.ConfigError: A setting twice, or of another section, or a value twice or missing.
    """
    found: dict[str, list[Any]] = {}
    for text in texts:
        name, _, listed = text.partition("=")
        values = [config_lib.parse(f"{name}={value.strip()}")[1] for value in listed.split(",")]
        if not name.startswith("sampling."):
            raise build.ConfigError(f"--over {name}: a sweep is over settings of sampling alone")
        if name in found:
            raise build.ConfigError(f"--over {name} is given twice: list its values in one")
        if "" in values:
            raise build.ConfigError(f"--over {text} lacks a value: write {name}=1.0,1.5")
        if len(set(values)) < len(values):
            raise build.ConfigError(f"--over {text} has a value twice")
        found[name] = values
    return found


def cells(config: build.Config, values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Settings of all combinations, each checked; raises ConfigError if one cannot be used."""
    found = []
    for chosen in itertools.product(*values.values()):
        changed = config_lib.flat(build.changed(config, dict(zip(values, chosen, strict=True))))
        found.append({name: changed[name] for name in values})  # 1 is 1.0 by now
    return found


def rounds(num_cells: int, num_images: int, *, halving: bool, least: int) -> list[tuple[int, int]]:
    """Cells and images of each round; one round of all of them without halving.

    With it the better half of the cells goes on, each with twice the images, until one round has
    all images: never fewer images than `least`, so that the first round may keep more than half.

    Source: Jamieson and Talwalkar (2016), "Non-stochastic Best Arm Identification and
    Hyperparameter Optimization", figure 3, with a budget that is equal over rounds.
    """
    if not halving:
        return [(num_cells, num_images)]
    made = [(1, num_images)]
    while made[0][0] < num_cells and made[0][1] // KEPT >= least:
        made.insert(0, (made[0][0] * KEPT, made[0][1] // KEPT))
    return [(num_cells, made[0][1]), *made[1:]]


class Sweep:
    """Draws and scores cells."""

    def __init__(
        self,
        trained: restoring.Trained,
        workdir: epath.PathLike,
        values: Mapping[str, Sequence[Any]],
        *,
        network: evaluating.Network,
        reference: reference_lib.Reference,
        out: epath.PathLike,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        """Checks that every cell can be drawn, and reads what is there; draws nothing.

        Args:
          workdir: Of `trained`, for its refiner.
          values: As `over` gives them.
          out: Folder for the table; made at the first cell.

        Raises:
          build.ConfigError: A cell cannot be drawn, or the refiner is of another sampler.
          ValueError: In `out` is a sweep of another model or of other settings, or something else.
        """
        config = trained.config
        self._network, self._seed, self._batch_size = network, seed, batch_size
        if reference.features is None:
            raise ValueError("the reference has no statistics of features to compare with")
        if reference.features.lack:
            raise ValueError(f"the reference: {reference.features.lack}; take one of more images")
        self._reference, self._real = dataclasses.replace(reference, rows=None), reference.features
        self._num_classes = config.data.num_classes
        self._values, self._out = values, epath.Path(out)
        drawing.check_seed(seed)
        self._cells = []
        for settings in cells(config, values):
            changed = build.changed(config, settings)
            try:
                refiner = refinement.load_refiner(trained, workdir, changed)
            except build.ConfigError as error:
                raise build.ConfigError(
                    f"{settings}: {error}; or sweep without refinement, by transport.kind=none"
                ) from None
            self._cells.append((settings, drawing.Drawer(trained, changed), refiner))
        self._made = self._made_from(trained)
        self._rows = self._there()

    def _made_from(self, trained: restoring.Trained) -> dict[str, Any]:
        of_model = sample_file.of_model(trained)
        made = {name: x for name, x in of_model.items() if name not in self._values}
        made |= {
            "seed": self._seed,
            "labels": "balanced",
            **({"--batch_size": self._batch_size} if self._mixes_rows() else {}),
            **{f"network {k}": x for k, x in self._facts().items()},
            **{f"reference {k}": x for k, x in self._reference.facts.items()},
        }
        return json.loads(json.dumps(made))

    def _mixes_rows(self) -> bool:
        """Whether images depend on those that they are drawn with."""
        return any(isinstance(refiner, refiners.InBatch) for _, _, refiner in self._cells)

    def _facts(self) -> Mapping[str, Any]:
        return reference_lib.network_facts(self._network.extractor)

    def _there(self) -> list[Row]:
        """What an earlier run left, in the first process."""
        path = self._out / TABLE
        if not processes.is_first() or not path.exists():
            return []
        try:
            table = json.loads(path.read_text())
            made, rows = dict(table["made"]), [_row(**row) for row in table["rows"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is no table of a sweep: name another folder") from None
        for name in sorted(made.keys() | self._made.keys()):
            was, now = made.get(name), self._made.get(name)
            if was != now:
                raise ValueError(
                    f"{path} is of another sweep, whose {name} is {was!s:.60}, here it is "
                    f"{now!s:.60}: name another folder"
                )
        return rows

    def run(
        self, num_images: int, *, halving: bool = False, show: Callable[[Found], None] | None = None
    ) -> Found | None:
        """Scores what is not scored yet; with several processes all have to call it.

        Args:
          num_images: Of a cell; with halving, of the last.
          halving: Leave the worse half of the cells out, round by round.
          show: Called by the first process after every cell.

        Returns:
          All cells; None in all processes but the first.

        Raises:
          ValueError: Fewer images than features, or another run makes this sweep.
          OSError: The table cannot be written.
        """
        least = self._real.mean.size
        if num_images < least:
            raise ValueError(
                f"{num_images} images are fewer than the {least} features of the network, so their "
                "covariance is singular: draw more"
            )
        plan = rounds(len(self._cells), num_images, halving=halving, least=least)
        left = list(range(len(self._cells)))
        with exclusive.only_drawing(self._out):
            for count, images in plan:
                left = left[:count]
                self._round(left, images, show)
                scores = self._scores(images)
                left.sort(key=lambda i: scores[i])
        return self._found() if processes.is_first() else None

    def _round(
        self, chosen: Sequence[int], num_images: int, show: Callable[[Found], None] | None
    ) -> None:
        missing = [i for i in chosen if np.isnan(self._scores(num_images)[i])]
        began = time.monotonic()
        for number, i in enumerate(missing):
            row = self._score(i, num_images)
            self._rows.append(row)
            if processes.is_first():
                self._write()
                if show is not None:
                    show(self._found())
            minutes = (time.monotonic() - began) / (number + 1) * (len(missing) - number - 1) / 60
            logging.info(
                "%d of %d  %s  %d images  %s %.5g  %.1f minutes left",
                number + 1,
                len(missing),
                "  ".join(f"{name.partition('.')[2]} {x}" for name, x in row.settings.items()),
                num_images,
                self._called(num_images),
                row.frechet_distance,
                minutes,
            )

    def _scores(self, num_images: int) -> np.ndarray:
        """Of all cells, the same in all processes; NaN for those to be done."""

        def known() -> np.ndarray:
            found = np.full(len(self._cells), np.nan, np.float32)
            for i, (settings, *_) in enumerate(self._cells):
                for row in self._rows:
                    if row.num_images == num_images and _same(row.settings, settings):
                        found[i] = row.frechet_distance
            return found

        return np.asarray(processes.from_first(known, np.zeros(len(self._cells), np.float32)))

    def _score(self, i: int, num_images: int) -> Row:
        start = time.monotonic()
        settings, drawer, refiner = self._cells[i]
        label = self._label(num_images)
        found = summary.summarise(
            evaluating.drawn(drawer, refiner, label, seed=self._seed, batch_size=self._batch_size),
            self._network.extractor,
            what="samples",
            total=num_images,
            mesh=self._network.mesh,
            num_classes=self._num_classes,
            width=self._reference.width,
            image_shape=self._reference.image_shape,
        )
        assert found.features is not None and found.rows is not None  # of two images and more
        group = jackknife.groups(num_images, self._num_classes)
        return Row(
            settings=settings,
            num_images=num_images,
            frechet_distance=frechet.frechet_distance(found.features, self._real),
            left_out=jackknife.left_out(found.rows, group, self._real),
            inception_score=found.inception_score,
            seconds=time.monotonic() - start,
        )

    def _label(self, num_images: int) -> Int[np.ndarray, " n"]:
        return evaluating.labels(num_images, self._num_classes, "balanced", seed=self._seed)

    def _called(self, num_images: int) -> str:
        names = scoring.names(
            self._network.extractor, num_images, {SCORE: 0.0}, reference=self._reference
        )
        return names[SCORE]

    def _found(self) -> Found:
        rows = list(_with_most(self._rows, [settings for settings, *_ in self._cells]))
        most = max(row.num_images for row in rows)
        return Found(self._values, rows, self._called(most), self._made)

    def _write(self) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        table = {"made": self._made, "rows": [dataclasses.asdict(row) for row in self._rows]}
        atomic.write_text(self._out / TABLE, json.dumps(table, indent=1) + "\n")


def _row(
    settings: dict[str, Any], left_out: list[float] | None, num_images: int, **numbers: float
) -> Row:
    """A row as it is read; raises an error of Python's where it is none."""
    return Row(
        settings=dict(settings.items()),
        num_images=int(num_images),
        left_out=None if left_out is None else [float(x) for x in left_out],
        **{name: float(x) for name, x in numbers.items()},
    )


def _same(a: Settings, b: Settings) -> bool:
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _with_most(rows: Sequence[Row], settings: Sequence[Settings]) -> Iterator[Row]:
    """Of each of the settings the row with the most images, if there is one."""
    for wanted in settings:
        there = [row for row in rows if _same(row.settings, wanted)]
        if there:
            yield max(there, key=lambda row: row.num_images)
