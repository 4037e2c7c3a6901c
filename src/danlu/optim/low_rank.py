"""LoRA as an optimiser on full matrices: the model stays as it is, the optimiser rewrites its weights.

Source: Scientific Spaces archive 9590; arXiv:2106.09685.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danlu.optim.backward import GradientConsumer
from danlu.optim.low_rank_average import average_gradients
from danlu.optim.low_rank_change import LowRankChange
from danlu.optim.low_rank_sites import Site, located_sites, select_sites, unwrapped
from danlu.optim.low_rank_state import header_of, load_state, state_of

_OWN = ("params", "param_names", "low_rank")


class LowRankOptimizer(torch.optim.Optimizer):
    """Trains weight matrices by low-rank changes, with the memory of LoRA's moments and without its modules.

    A step projects each gradient G = dL/dW to dL/dA = s B^T G and dL/dB = s G A^T (W as (out, in), s = alpha / rank),
    lets ``base`` update A and B, and brings W to W0 + s B A. In exact arithmetic this is module LoRA without dropout,
    step for step. Weight decay, clipping and moments act on A and B. A step uses gradients up: ``.grad`` of a matrix is
    None after ``clip_grad_norm_`` or ``step``, and a second ``step`` without a backward pass changes nothing.

    ``param_groups`` hold the model's parameters with the options of ``base``, so schedulers and ``GradScaler`` work
    (``GradScaler`` not with ``fold_in_backward``, where it finds no gradients and says so). Groups with
    ``low_rank=False`` are updated by ``base`` as they are.

    Under DDP this is an ordinary optimiser. With ``fold_in_backward`` the projections are averaged over all processes,
    once per step: leave the wrapper off, which would still work but hold and send buckets of zeros as large as the full
    gradients (and is refused with ``gradient_as_bucket_view``).

    Args:
        model_or_params: a model, of which everything that is not trained is frozen (``requires_grad`` False, as PEFT
            does) until ``add_param_group`` adds it; or parameters, (name, parameter) pairs, or groups of them, which
            are all trained.
        base: class of the optimiser for A and B.
        rank: r, at least 1.
        alpha: s = alpha / rank in every scheme.
        scheme: "lora"; "lora_symmetric", both factors random and the change up to rank 2r; "additive", row and column
            blocks, r must divide both sizes; "random", Gaussian projections.
        target_modules: matrices of a model, see ``select_sites``; None takes linear maps, convolutions and experts.
        base_kwargs: options of ``base`` such as lr.
        resync: "exact" keeps a copy of W0 beside each weight and writes round(W0 + change). "incremental" keeps none
            and adds what is new to W: float32 weights collect rounding errors, half-precision ones are rounded
            stochastically, which is right on average and noisy.
        resync_every: with "incremental", a copy of W0 in the host's memory from which W is written every so many steps.
        restart_every: every so many steps the change becomes part of W0 and fresh factors start, their moments at
            zero, so that the total change may have any rank. The scheme "random" does so every step unless told
            otherwise, and then needs SGD without momentum.
        fold_in_backward: project inside the backward pass and free each full gradient at once. Micro-batches then
            accumulate r (out + in) numbers. ``remove_hooks`` ends it.
        seed: of the factors and of stochastic rounding.

    Raises:
        ValueError: a number out of range, a matrix that is frozen or too small, or options that exclude each other.
        TypeError: a quantised, complex or sharded matrix.

    Source: Scientific Spaces archive 9590; arXiv:2106.09685. Restarts: arXiv:2307.05695.
    """

    base: torch.optim.Optimizer

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        base: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        rank: int = 8,
        alpha: float = 16.0,
        scheme: str = "lora",
        target_modules: str | Sequence[str] | None = None,
        base_kwargs: Mapping[str, Any] | None = None,
        resync: str = "exact",
        resync_every: int | None = None,
        restart_every: int | None = None,
        fold_in_backward: bool = False,
        seed: int = 0,
    ):
        self.change = LowRankChange(rank, alpha, scheme, resync, resync_every, restart_every, seed)
        self.fold_in_backward = fold_in_backward
        self.model = unwrapped(model_or_params) if isinstance(model_or_params, nn.Module) else None
        self.steps = 0
        self._frozen: set[Tensor] = set()
        self._consumers: list[GradientConsumer] = []
        self._averaged = False
        self._base_class, self._base_kwargs = base, dict(base_kwargs or {})
        groups: Any = model_or_params
        self._chosen: dict[Tensor, Site] = {}
        if self.model is not None:
            self._chosen = {site.weight: site for site in select_sites(self.model, target_modules)}
            groups = [{"params": list(self._chosen)}]
        elif target_modules is not None:
            raise ValueError("target_modules needs a model to choose from, got parameters; pass the wanted ones alone")
        super().__init__(groups, {})
        self.defaults = dict(self.base.defaults)
        if self.model is not None:
            self._frozen = {p for p in self.model.parameters() if p.requires_grad and p not in self.change}
            for parameter in self._frozen:
                parameter.requires_grad_(False)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The trained matrices, each with its factors, in the order of the groups."""
        return self.change.sites

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: its matrices are trained in low rank, or all of it by ``base`` with ``low_rank=False``."""
        super().add_param_group({"low_rank": True, **param_group})
        group = self.param_groups[-1]
        try:
            for parameter in group["params"]:
                if parameter in self._frozen:
                    self._frozen.remove(parameter)
                    parameter.requires_grad_(True)
            self._add_to_base(group, self._found(group) if group["low_rank"] else None)
        except Exception:  # a refused group must leave nothing behind; the error goes on
            self.param_groups.pop()
            raise
        self._pull()

    def _found(self, group: dict[str, Any]) -> list[Site]:
        weights, first = group["params"], len(self.sites)
        names = group.get("param_names") or [f"param.{first + index}" for index in range(len(weights))]
        pairs = zip(names, weights, strict=True)
        return [self._chosen.get(weight) or located_sites(self.model, [(name, weight)])[0] for name, weight in pairs]

    def _add_to_base(self, group: dict[str, Any], sites: list[Site] | None) -> None:
        inner = {key: value for key, value in group.items() if key not in _OWN}
        if sites is None:
            inner["params"] = group["params"]
        else:
            self.change.check(sites)
            self.change.adopt(sites)
            inner["params"] = [factor for site in sites for factor in (site.A, site.B)]
        if hasattr(self, "base"):
            self.base.add_param_group(inner)
        else:
            self.base = self._base_class([inner], **self._base_kwargs)
        if self.change.restart_every == 1 and not _is_plain_sgd(self.base):
            raise ValueError(
                "restart_every=1, the default of scheme='random', needs base=torch.optim.SGD without momentum, got "
                f"{type(self.base).__name__}: moments of one projection mean nothing in the next; restart less often"
            )
        if self.fold_in_backward and sites:
            self._consumers.append(GradientConsumer([site.weight for site in sites], self._fold))

    def _fold(self, weight: Tensor, gradient: Tensor) -> None:
        if self.change[weight].A.device != weight.device:
            self._follow()
        self.change.project(weight, gradient)
        self._averaged = False

    def _follow(self) -> None:
        """The model was moved after the optimiser was built; moments go where their factors go."""
        self.change.follow()
        self.base.load_state_dict(self.base.state_dict())

    def _gather(self) -> None:
        """Project what the backward pass left, and average over processes where nothing else does."""
        for site in self.sites:
            gradient, site.weight.grad = site.weight.grad, None
            if gradient is None:
                continue
            if self.fold_in_backward:
                raise RuntimeError(
                    f"{site.name} has a gradient after its gradient was folded: something else reduces gradients, such "
                    "as DistributedDataParallel with gradient_as_bucket_view; train the bare model, whose projections "
                    "are averaged here, or set fold_in_backward=False"
                )
            self._fold(site.weight, gradient)
        if self.fold_in_backward and not self._averaged:
            average_gradients(list(self._trained()))
            self._averaged = True

    def _trained(self) -> Iterator[Tensor]:
        for group in self.base.param_groups:
            yield from group["params"]

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scale the gradients of A and B (and of ``low_rank=False`` groups) to a joint norm of ``max_norm`` at most.

        This is what clipping means for LoRA. ``torch.nn.utils.clip_grad_norm_`` on the model's parameters would clip
        the full gradients, whose norm is another one.

        Returns:
            The norm before clipping.
        """
        self._gather()
        return nn.utils.clip_grad_norm_(self._trained(), max_norm, norm_type, error_if_nonfinite)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop full and projected gradients."""
        super().zero_grad(set_to_none)
        self.change.drop_gradients()

    def remove_hooks(self) -> None:
        """End ``fold_in_backward``: from now on full gradients stay in ``.grad`` until the step."""
        for consumer in self._consumers:
            consumer.remove()
        self._consumers, self.fold_in_backward = [], False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of ``base`` on the factors, and its effect on the weights.

        Args:
            closure: evaluates the model anew and returns the loss; ``base`` may call it several times, as L-BFGS does.

        Returns:
            What ``base.step`` returns.

        Raises:
            RuntimeError: after ``detach_delta``, or when parameters were exchanged since the optimiser was built.
        """
        self._ready()
        self._push()
        before = self.change.snapshot()

        def evaluate() -> Any:
            # A second evaluation sees the weights at the factors that the base optimiser tries.
            self.change.write(before, self.steps)
            before.update(self.change.snapshot())
            with torch.enable_grad():
                loss = closure() if closure is not None else None
            self._gather()
            return loss

        if closure is None:
            self._gather()
            result = self.base.step()
        else:
            result = self.base.step(evaluate)
        self.steps += 1
        self.change.write(before, self.steps, whole=_due(self.change.resync_every, self.steps))
        self.change.drop_gradients()
        self._pull()
        if _due(self.change.restart_every, self.steps):
            self.change.restart()
            for site in self.sites:
                self.base.state.pop(site.A, None)
                self.base.state.pop(site.B, None)
        return result

    def _ready(self) -> None:
        if self.change.detached:
            raise RuntimeError("the change is detached from the weights; call attach_delta() before step()")
        for group in self.param_groups:
            for weight in group["params"] if group["low_rank"] else ():
                if weight not in self.change:
                    raise RuntimeError(
                        f"param_groups hold a {type(weight).__name__} that was not there when the optimiser was built: "
                        "something, such as FSDP, exchanged the parameters. Sharded weights cannot be trained in low "
                        "rank here; use DDP"
                    )

    def _push(self) -> None:
        """Options that schedulers changed go to the base optimiser."""
        for outer, inner in zip(self.param_groups, self.base.param_groups, strict=True):
            inner.update((key, value) for key, value in outer.items() if key not in _OWN)

    def _pull(self) -> None:
        for outer, inner in zip(self.param_groups, self.base.param_groups, strict=True):
            outer.update((key, value) for key, value in inner.items() if key not in _OWN)

    def delta(self, name: str) -> Tensor:
        """The change of one weight since the start (or the last restart), in its shape, in float32 or float64.

        Args:
            name: of the parameter or of its module, by any of its places when it is tied.
        """
        return self.change.delta(name)

    def detach_delta(self) -> None:
        """Give the weights their values W0, the same bits where W0 is kept; ``attach_delta`` undoes it.

        Without a copy of W0 (``resync="incremental"``) the change is subtracted, to the rounding of the weights.

        Raises:
            ValueError: half-precision weights of which no W0 is kept.
        """
        self.change.detach()

    def attach_delta(self) -> None:
        """Bring the weights back to W0 plus the change, after ``detach_delta``."""
        if self.change.detached:
            self.change.attach()

    def state_bytes(self) -> dict[str, int]:
        """Bytes that the optimiser holds, by kind: factors, fixed factors, copies of W0, state of ``base``."""
        values = [value for state in self.base.state.values() for value in state.values()]
        return {**self.change.nbytes(), "base": sum(value.nbytes for value in values if isinstance(value, Tensor))}

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers in the form of every optimiser: factors, W0 where it is kept, state of ``base``."""
        self.state.update(state_of(self))
        try:
            return {**super().state_dict(), "low_rank": header_of(self)}
        finally:
            self.state.clear()  # references alone, which a restart would leave behind

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume: factors, moments, W0, counters and options; with ``resync="exact"`` the weights are written too.

        Raises:
            ValueError: a state of another scheme, or for other parameters.
        """
        load_state(self, state_dict)

    def to_peft(self, path: str | Path) -> Path:
        """Write the change as a PEFT LoRA adapter, see ``danlu.optim.low_rank_peft.write_adapter``."""
        from danlu.optim.low_rank_peft import write_adapter

        return write_adapter(self, path)

    @classmethod
    def from_peft(cls, model: nn.Module, path: str | Path, **options: Any) -> LowRankOptimizer:
        """Go on from a PEFT LoRA adapter, see ``danlu.optim.low_rank_peft.read_adapter``."""
        from danlu.optim.low_rank_peft import read_adapter

        return read_adapter(cls, model, path, options)


def _is_plain_sgd(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.SGD) and not any(group["momentum"] for group in optimizer.param_groups)


def _due(every: int | None, steps: int) -> bool:
    return every is not None and steps % every == 0
