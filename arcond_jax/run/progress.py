"""How far a long piece of work is: images a second and the time left."""

import logging
import sys
import time

import tqdm

EVERY = 10.0  # seconds between two lines where there is no terminal


class Progress:
    """A bar on a terminal, else a line of the log now and then."""

    def __init__(self, total: int, *, done: int, shown: bool = True) -> None:
        """Starts the clock.

        Args:
          total: All images.
          done: Of them, those that an earlier run made.
          shown: False says nothing: another process does.
        """
        self._total, self._before, self._now = total, done, done
        self._began = self._said = time.monotonic()
        self._shown = shown
        terminal = shown and sys.stderr.isatty()
        self._bar = tqdm.tqdm(total=total, initial=done, unit=" images", disable=not terminal)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, count: int = 1) -> None:
        """Notes that images are made."""
        self._now += count
        self._bar.update(count)

    def restart(self) -> None:
        """Starts the clock again: what came before was compilation, as a rule."""
        self._before, self._began = self._now, time.monotonic()

    def say_at_times(self) -> None:
        """A line, if the last one was `EVERY` seconds ago and there is something left."""
        if self._now == self._before:
            return
        if time.monotonic() - self._said >= EVERY and self._now < self._total:
            self.say()

    def say(self, what: str = "") -> None:
        """A line that begins with what was just finished."""
        if not self._shown or not self._bar.disable:
            return
        self._said = time.monotonic()
        rate = (self._now - self._before) / max(self._said - self._began, 1e-3)
        logging.info(
            "%s%d of %d images, %.3g a second, %.1f minutes left",
            what and f"{what}: ",
            self._now,
            self._total,
            rate,
            (self._total - self._now) / max(rate, 1e-9) / 60,
        )
