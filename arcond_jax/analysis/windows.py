"""Drafts in numbers: how often they are changed, against chance, and how many are accepted.

Entry j of the window drawn at position i is a guess of the code at i + j; entry 0 is final.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Entry:
    """The drafts of one entry of the window, compared with the final codes of their positions.

    Attributes:
      entry: Its number, from 1.
      num_drafts: How many there are.
      flips: Share that differs from the final code.
      flips_error: Standard error over images.
      chance: The same share with drafts of the same positions of another image, `others`.
      kappa: Agreement beyond chance, 1 - flips / chance (Cohen's kappa): 1 for drafts that are
        never changed, 0 for drafts that know nothing of their image; None where chance has none.
      entropy, final_entropy: In bits, of the drafts as one set and of the final codes of their
        positions; None where there are fewer than codes in the codebook.
    """

    entry: int
    num_drafts: int
    flips: float
    flips_error: float
    chance: float
    kappa: float | None
    entropy: float | None
    final_entropy: float | None


def by_position(drafts: Int[np.ndarray, "n l w"]) -> Int[np.ndarray, "n l w"]:
    """What each entry said of each position, instead of each window's own.

    Entry j of position p was drawn at position p - j; where that is before the first, the final
    code stands.
    """
    _, length, window = drafts.shape
    position, entry = np.arange(length)[:, None], np.arange(window)
    entry = np.where(entry <= position, entry, 0)
    return drafts[:, position - entry, entry]


def others(label: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """For each row another one of its class, or of any class where it is alone in its own.

    Rows take turns: each is the other of one row, classes of one row apart.
    """
    other = np.roll(np.arange(len(label)), -1)
    for one in np.unique(label):
        rows = np.flatnonzero(label == one)
        if len(rows) > 1:
            other[rows] = np.roll(rows, -1)
    return other


def entries(
    drafts: Int[np.ndarray, "n l w"], label: Int[np.ndarray, " n"], *, num_codes: int
) -> list[Entry]:
    """Numbers of each entry beyond 0, from the windows drawn for at least two images."""
    guessed, other = by_position(drafts), others(label)
    found = []
    for entry in range(1, drafts.shape[-1]):
        draft, final = guessed[:, entry:, entry], guessed[:, entry:, 0]
        flips = (draft != final).mean(axis=1)
        chance = float((draft[other] != final).mean())
        found.append(
            Entry(
                entry=entry,
                num_drafts=draft.size,
                flips=float(flips.mean()),
                flips_error=float(flips.std(ddof=1) / np.sqrt(len(flips))),
                chance=chance,
                kappa=1.0 - float(flips.mean()) / chance if chance else None,
                entropy=entropy(draft, num_codes),
                final_entropy=entropy(final, num_codes),
            )
        )
    return found


def entropy(codes: Int[np.ndarray, "*n"], num_codes: int) -> float | None:
    """Of the empirical law of codes, in bits: below that of the law they come from.

    None for fewer than `num_codes`, of which it would say more about their number.
    """
    if codes.size < num_codes:
        return None
    counts = np.unique(codes, return_counts=True)[1]
    return float(np.log2(codes.size) - np.sum(counts * np.log2(counts)) / codes.size)


def tokens_per_call(emitted: Int[np.ndarray, "n w"]) -> float:
    """Codes that a call of the network gave on average; `emitted` counts calls that gave 1 to w."""
    return float(np.sum(emitted * np.arange(1, emitted.shape[1] + 1)) / np.sum(emitted))


def acceptance(emitted: Int[np.ndarray, "n w"]) -> Float[np.ndarray, " drafts"]:
    """Share of each draft of a call that was accepted, of those whose drafts before it all were.

    nan where none ever was. Calls at the end of the grid, which has no room for all drafts, count
    as if the rest had been refused.
    """
    at_least = np.cumsum(emitted.sum(axis=0)[::-1])[::-1].astype(np.float64)
    reached = np.where(at_least > 0, at_least, np.nan)
    return at_least[1:] / reached[:-1]
