"""The static choices of a refinement, in the order of "Condition Errors Refinement" (ICLR 2026)."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class RefineOptions:
    """How far and how carefully conditions are moved; Python scalars only, so hashable under jit.

    Attributes:
      tau: Size of one proximal step of Jordan, Kinderlehrer and Otto (1998); at least 0 and 0 means
        no refinement.
      num_jko_steps: Proximal steps. With a fixed ideal law they stay on one geodesic, so they enter
        only through `step_size`.
      epsilon: Entropy weight in units of the bank's mean half squared radius; positive.
      debias: Subtract the source's own entropic map. False gives the barycentric map of the paper,
        whose limit is a shrunken law.
      num_sinkhorn_iters: Iterations of the problem source to bank.
      num_self_iters: Iterations of the problem source to source.
      epsilon_min: Floor of the entropy weight in units of half a squared distance; at least 1e-6,
        so that potentials divided by it stay finite in float32.
      max_move: Longest move in units of the bank's root mean square radius; None for no limit.
      min_atoms: A slot and group with fewer reference conditions is left as it is; at least 2.
      inverse_weight: Weight of the inverse-process term R; 0 means off. Large weights diverge.

    Raises:
      ValueError: A value is out of its range.
    """

    tau: float = 1.0
    num_jko_steps: int = 1
    epsilon: float = 0.1
    debias: bool = True
    num_sinkhorn_iters: int = 60
    num_self_iters: int = 40
    epsilon_min: float = 1e-3
    max_move: float | None = 3.0
    min_atoms: int = 2
    inverse_weight: float = 0.0

    def __post_init__(self):
        at_least = {
            "tau": 0.0,
            "num_jko_steps": 1,
            "num_sinkhorn_iters": 1,
            "num_self_iters": 1,
            "epsilon_min": 1e-6,
            "min_atoms": 2,
            "inverse_weight": 0.0,
        }
        for name, low in at_least.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= low):
                raise ValueError(f"{name} is {value}; set it to a finite number >= {low}.")
        for name in ("epsilon", "max_move"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; set it to a finite number > 0.")

    @property
    def step_size(self) -> float:
        """Share of the way to the ideal law, 1 - (1 + tau)^-num_jko_steps, in [0, 1).

        One proximal step leaves the share 1 / (1 + tau) of the distance W2 to the ideal law, and
        further steps follow the same geodesic, so all of them are one step of this size.
        """
        return 1.0 - (1.0 + self.tau) ** -self.num_jko_steps
