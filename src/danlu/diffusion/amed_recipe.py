"""How a solver of AMED is trained: every number in one place, and the paper's.

Source: arXiv:2312.00094.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from danlu.diffusion.amed_steps import Base, check_order
from danlu.diffusion.grids import Spacing


@dataclass(frozen=True)
class AMEDRecipe:
    """How a solver is trained.

    Args:
        base: see `AMEDStepper`.
        order: of the bases that have one.
        afs: use the analytical first step: one call less.
        static: train one number for each interval instead of a network that reads features: all samples have the same
            times, and the result runs in any pipeline.
        init: ``residual`` starts from the best middles of a search and heads of zero; ``paper`` from random weights.
        scale_c: c stays within this of 1.
        scale_a: likewise a.
        spacing: of the first times.
        teacher: solver of the reference, ``heun`` or ``ipndm``.
        extra: points that the teacher has inside every interval; a coarse teacher teaches its own errors.
        trajectories: of the teacher, drawn once.
        batch: samples in a training step.
        iterations: rounds over all intervals, each with its own step towards the teacher's state at its end.
        endpoint_iterations: steps after these on the whole run, towards where the teacher ends. Not in the source. It
            keeps the graph of the whole run, ``2 * steps`` calls: for large models turn on their own gradient
            checkpointing, or set 0.
        learn_times: let these steps move the times between the first and the last too.
        learning_rate: of Adam; it falls to 0 over the steps on the whole run.

    Raises:
        ValueError: a number or name outside its range, or choices that exclude each other.
    """

    base: Base = "ipndm"
    order: int | None = None
    afs: bool = True
    static: bool = False
    init: Literal["residual", "paper"] = "residual"
    scale_c: float = 0.3
    scale_a: float = 0.3
    spacing: Spacing = "logsnr"
    teacher: Literal["heun", "ipndm"] = "heun"
    extra: int = 19
    trajectories: int = 2048
    batch: int = 128
    iterations: int = 0
    endpoint_iterations: int = 400
    learn_times: bool = True
    learning_rate: float = 5e-3

    def __post_init__(self) -> None:
        check_order(self.base, self.order)
        for name, least in (
            ("extra", 0),
            ("trajectories", 1),
            ("batch", 1),
            ("iterations", 0),
            ("endpoint_iterations", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name, known in (("init", ("residual", "paper")), ("teacher", ("heun", "ipndm"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.static and self.init == "paper":
            raise ValueError("static needs init='residual': the published form has no numbers for an interval alone")

    @classmethod
    def published(cls, base: Base = "amed", **changes: Any) -> AMEDRecipe:
        """The recipe of the paper: 10,000 trajectories in 79 rounds over the intervals, a random start, fixed times.

        Args:
            base: ``amed`` (c within 0.01, Heun teacher with 1 extra point) or a solver to plug into (a within 0.2, its
                own kind of teacher with 2).
            changes: fields that differ.
        """
        fields: dict[str, Any] = dict(
            base=base,
            init="paper",
            scale_c=0.01,
            scale_a=0.0 if base == "amed" else 0.2,
            spacing="time_uniform" if base == "amed" else "polynomial",
            teacher="ipndm" if base == "ipndm" else "heun",
            extra=1 if base == "amed" else 2,
            trajectories=79 * 128,
            iterations=79,
            endpoint_iterations=0,
            learn_times=False,
        )
        return cls(**{**fields, **changes})
