"""One step for several losses: a main task under auxiliary constraints, or tasks that are equals.

Source: Scientific Spaces archives 8870, 8896 and 8907; arXiv:1810.04650 (shared features); arXiv:1706.08840 (GEM).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from danlu.optim import task_gradients as tg
from danlu.optim.task_losses import Losses, check_reach, check_values, read_losses, trainable
from danlu.optim.task_weights import SOLVED, Combination, check_options, find_method, needs_rows, weigh

logger = logging.getLogger("danlu.optim")


class MultiTaskBackward:
    """Replaces ``loss.backward()`` where there are several losses: adds one combined gradient to ``.grad``.

    Methods. ``primary_auxiliary``: follow the main task as far as no auxiliary loss rises. ``min_norm``: help the
    worst-off task most. ``mixed``: several main tasks as equals, under constraints. ``grad_norm``: sum of gradients
    divided by their lengths. ``geo_mean``: gradient of the sum of the logarithms of the losses. ``sum``. Or an
    aggregator of TorchJD, as an instance or by its class name.

    Args:
        params: parameters that the tasks share. Frozen ones are left out.
        method: see above.
        heads: parameters outside the guarantee, such as task heads: they get the gradient of the plain sum of losses.
        normalize: solve for gradients of length 1, so that a short gradient gets no large weight. It leaves the
            direction of ``primary_auxiliary`` as it is.
        metric: an Adam-like optimiser, or a mapping of parameters to diagonals (same shape, > 0; 1 where left out).
            Guarantees then hold for the step that multiplies the gradient by this diagonal.
        via: ``losses``, or ``features``: weights from the gradients of a shared output, and one backward pass through
            what is below it. Cheaper, but the guarantees are lost in the parameters, and every sample must carry every
            task's label.
        gradients: ``kept``: the gradients of all tasks are held and summed at the end; as many backward passes as
            tasks. ``layerwise``: one batched backward pass of all tasks that holds only the layer it is in, then one
            plain pass of the weighted loss. Its gradients do not grow with the number of tasks; it costs a pass more.
        refresh: steps for which weights are used; above 1, the steps in between cost one backward pass.
        drift: rate c >= 0 of ``primary_auxiliary``: a loss above its reference is asked to fall by c times the excess
            per unit of step, which takes back what finite steps let it rise. Keep c times the learning rate below 1.
        reference: loss by task name that drift control holds to; None is the lowest loss seen.
        check_finite: look at losses and inner products, and name the task that is not finite. On an accelerator this
            waits for the device; without it, up to two constraints are solved without a wait.

    Raises:
        ValueError: an option out of range, or options that do not go together.
        TypeError: no parameters, or a method that is none.
        ImportError: a method of TorchJD without TorchJD.

    Source: archives 8870 (``grad_norm``, ``geo_mean``), 8896 (``min_norm``, ``features``), 8907
    (``primary_auxiliary``, ``mixed``). With one auxiliary task it is A-GEM, with several GEM's program. Departures:
    an exact solver; the metric; drift control, whose demand is capped at what a step along the auxiliary gradient, as
    long as the main one, would give.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        method: Any = "primary_auxiliary",
        *,
        heads: Iterable[nn.Parameter] = (),
        normalize: bool = False,
        metric: tg.Metric | None = None,
        via: str = "losses",
        gradients: str = "kept",
        refresh: int = 1,
        drift: float = 0.0,
        reference: Mapping[str, float] | None = None,
        check_finite: bool = True,
    ):
        self.params, self.heads = trainable(params, "params"), trainable(heads, "heads")
        if not self.params:
            raise ValueError("params must hold at least one parameter that requires gradients, got none")
        if {id(p) for p in self.params} & {id(p) for p in self.heads}:
            raise ValueError("heads must have no parameter in common with params; leave the heads out of params")
        self.method = find_method(method)
        check_options(self.method, normalize, metric, via, gradients, refresh, drift)
        self.normalize, self.metric, self.via, self.gradients = normalize, metric, via, gradients
        self.refresh, self.drift, self.check_finite = refresh, drift, check_finite
        self.reference = None if reference is None else dict(reference)
        self._precision = max(torch.finfo(tg.wide(parameter.dtype)).eps for parameter in self.params)
        self._checked: set[tuple[str, ...]] = set()
        self._names: tuple[str, ...] = ()
        self._lowest: Tensor | None = None
        self._weights: Tensor | None = None  # in use for further calls
        self._age = 0  # steps that used them
        self._window: tg.KeptGradients | None = None  # gradients of an open window
        self._held: tg.KeptGradients | None = None  # gradients for constrained_step

    def backward(
        self,
        main: Losses,
        aux: Sequence[Tensor] | Mapping[str, Tensor] = (),
        *,
        features: Tensor | Sequence[Tensor] | None = None,
        last: bool = True,
        keep: bool = False,
        scaler: Any = None,
    ) -> Combination | None:
        """Add the combined gradient of all losses to ``.grad``.

        With several processes the mean over processes is combined, so a model in DistributedDataParallel must be called
        under ``no_sync()``.

        Args:
            main: the main loss; several, as a sequence or a mapping of names to losses, for methods of equal tasks and
                for ``mixed``. With ``primary_auxiliary`` and no ``aux``, the first of several is the main task.
            aux: auxiliary losses, as a sequence or a mapping of names to losses.
            features: the shared output (or outputs) that all losses depend on, for ``via="features"``.
            last: False in all calls but the last of a window of gradient accumulation. Kept gradients are added up by
                task, and combined in the last call; with other settings the weights of the first call serve the whole
                window. Divide the losses by the number of calls, as for plain accumulation.
            keep: hold the gradients of the tasks for ``constrained_step``.
            scaler: gradient scaler of float16 training. Losses are scaled here, weights come from unscaled numbers.

        Returns:
            Weights, losses and inner products; None while kept gradients are only added up.

        Raises:
            TypeError: a loss that is no tensor.
            ValueError: a loss that is no finite scalar with a gradient (names the task), tasks that share no parameter,
                no main task, sparse gradients, an option that does not go with this call.
        """
        names, losses, primaries = read_losses(main, aux, one_main=self.method == "primary_auxiliary")
        outputs = [features] if isinstance(features, Tensor) else list(features or ())
        self._check(names, outputs, last, keep)
        if scaler is not None and self.refresh > 1:
            raise ValueError("scaler needs refresh=1: an overflow would leave its undefined weights to later steps")
        if names not in self._checked:  # once: the walk over the graph takes a millisecond or two
            check_reach(names, losses, self.params, self.heads)
            self._checked.add(names)
        if names != self._names:
            self._names, self._weights, self._lowest, self._age = names, None, None, 0
        values = torch.stack([loss.detach().reshape(()).to(losses[0].device, self._number) for loss in losses])
        values = tg.average(values)
        if self.check_finite:
            check_values(names, values, positive=self.method == "geo_mean")
        scale = None if scaler is None else scaler.scale(torch.ones((), device=losses[0].device))
        if scaler is not None:
            losses = [scaler.scale(loss) for loss in losses]

        self._held = None
        weights = self._ready_weights(values, plain=last and not keep)
        gram = target = None
        if self.via == "features":
            gram, target, weights = self._through_features(losses, values, weights, primaries, scale, outputs)
        elif weights is None and self.gradients == "kept":
            window, self._window = self._window or tg.KeptGradients(self.params, len(losses)), None
            self._differentiate(losses, window)
            window.losses = window.losses + values
            if last:
                return self._combine(window, primaries, scale, keep)
            self._window = window
            return None
        else:
            if weights is None:
                gram = tg.layerwise_gram(losses, self.params, tg.preconditioner(self.metric, self.params))
                weights, target = self._solve(gram, values, primaries, scale)
            total = sum(loss.to(self._number) * weight for loss, weight in zip(losses, weights, strict=True))
            tg.backward([total], self.params, retain=bool(self.heads))
            if self.heads:
                tg.backward(losses, self.heads)
        self._advance(weights, last)
        return Combination(names, values, weights, gram, target)

    def constrained_step(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Take the optimiser's step, corrected as little as possible so that no auxiliary loss rises to first order.

        Momentum, weight decay and adaptive rates can break what holds for the gradient. This corrects the change of the
        parameters itself, by multiples of the gradients that ``backward(..., keep=True)`` held. Methods without a main
        task keep every loss from rising. It needs one copy of the parameters; drift control has no part in it.

        Args:
            optimizer: over ``params``, and possibly more.

        Returns:
            Multipliers of the constraints, in units of the step.

        Raises:
            ValueError: no gradients are held.

        Source: archive 8907, with the optimiser's step in place of the main gradient.
        """
        if self._held is None:
            raise ValueError(
                "constrained_step needs the gradients of the tasks: call backward(..., keep=True) before it"
            )
        held, self._held = self._held, None
        first = 1 if self.method == "primary_auxiliary" else 0
        return held.constrain(optimizer, first, self._precision)

    def state_dict(self) -> dict[str, Any]:
        """Weights in use and lowest losses, as plain tensors and numbers. An open window is not part of it."""
        return {"names": list(self._names), "age": self._age, "weights": self._weights, "lowest": self._lowest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave.

        Raises:
            ValueError: other keys.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(f"state must have the keys {sorted(self.state_dict())}, got {sorted(state)}")
        device = self.params[0].device
        self._names, self._age = tuple(state["names"]), int(state["age"])
        self._weights, self._lowest = (None if state[k] is None else state[k].to(device) for k in ("weights", "lowest"))

    @property
    def _number(self) -> torch.dtype:
        return tg.wide(self.params[0].dtype)

    def _check(self, names: tuple[str, ...], outputs: list[Tensor], last: bool, keep: bool) -> None:
        """Refuse a call that does not go with the options or with the open window."""
        if self._window is not None and names != self._names:
            raise ValueError(f"tasks must be the same in all calls of a window, got {names} after {self._names}")
        if (self.via == "features") != bool(outputs):
            raise ValueError("features must be given with via='features', and only then")
        if not all(isinstance(output, Tensor) and output.requires_grad for output in outputs):
            raise ValueError("features must be tensors with gradients: the shared output that all losses depend on")
        kept = self.via == "losses" and self.gradients == "kept"
        if keep and (not kept or self.refresh > 1):
            raise ValueError("keep holds the gradients of all tasks: use gradients='kept', via='losses', refresh=1")
        if not last and not kept and self.method in ("grad_norm", "geo_mean"):
            raise ValueError(f"last=False with method {self.method!r} needs gradients='kept': its weights have a scale")
        if self.gradients == "layerwise" and tg.world() > 1:
            raise ValueError(
                "gradients='layerwise' works in one process: means over processes would be needed layer by layer "
                "inside the backward pass; use gradients='kept'"
            )
        missing = [name for name in names[1:] if self.drift and self.reference and name not in self.reference]
        if missing:
            raise ValueError(f"reference must have a loss for every auxiliary task, got none for {missing[0]!r}")

    def _ready_weights(self, values: Tensor, plain: bool) -> Tensor | None:
        """Weights that need no inner products now: fixed ones, or those of an earlier call."""
        if self._window is not None or self._weights is not None:
            return self._weights
        if plain and (self.method == "sum" or (len(values) == 1 and self.method in SOLVED and not self.normalize)):
            return torch.ones_like(values)
        return values.reciprocal() if plain and self.method == "geo_mean" else None

    def _advance(self, weights: Tensor | None, last: bool) -> None:
        """Keep the weights for the rest of the window, and for ``refresh`` steps."""
        self._age = 0 if self._weights is None else self._age
        self._weights = weights
        if last:
            self._age += 1
            if self._age >= self.refresh:
                self._weights = None

    def _solve(
        self, gram: Tensor, values: Tensor, primaries: int, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Weights, and what drift control asks for; the Gram matrix is put in units of the unscaled losses."""
        if scale is not None:
            gram /= scale.to(gram) ** 2
        if (self.check_finite or scale is not None) and not gram.isfinite().all():
            if scale is None:
                check_values(self._names, gram.diagonal(), what="squared length of the gradient")
            return torch.full_like(values, torch.nan), None  # the scaler sees them and skips the step
        target = None
        if self.drift and len(values) > 1:
            aux, lengths = values[1:], gram.diagonal().clamp(min=0).sqrt()
            self._lowest = aux if self._lowest is None else torch.minimum(self._lowest, aux)
            reference = self._lowest
            if self.reference is not None:
                reference = torch.tensor([self.reference[name] for name in self._names[1:]]).to(aux)
            target = torch.minimum(self.drift * (aux - reference).relu().to(gram), lengths[1:] * lengths[0])
        weights = weigh(
            self.method, gram, values, primaries, normalize=self.normalize, target=target, precision=self._precision
        )
        return weights, target

    def _differentiate(self, losses: Sequence[Tensor], kept: tg.KeptGradients) -> None:
        """One backward pass per task: to what ``kept`` is for, and to the heads, which get their plain gradients."""
        plain: list[Tensor | None] = [None] * len(self.heads)
        inputs, cut = [*kept.params, *self.heads], len(kept.params)
        for task, (name, loss) in enumerate(zip(self._names, losses, strict=True)):
            found = tg.task_gradients(name, loss, inputs, retain=task + 1 < len(losses) or self.via == "features")
            kept.add(task, found[:cut])
            plain = [tg.plus(old, new) for old, new in zip(plain, found[cut:], strict=True)]
        tg.deposit(self.heads, plain)

    def _combine(self, kept: tg.KeptGradients, primaries: int, scale: Tensor | None, keep: bool) -> Combination:
        """Close a window: solve for the weights, and sum what was kept."""
        kept.average()
        weights = gram = target = None
        if needs_rows(self.method):
            sums: Iterable[Tensor | None] = kept.aggregated(self.method)
        else:
            gram = kept.gram(tg.preconditioner(self.metric, self.params))
            weights, target = self._solve(gram, kept.losses, primaries, scale)
            sums = kept.sums(weights, free=not keep)
            self._advance(weights, last=True)
        tg.deposit(self.params, sums, averaged=True)
        self._held = kept if keep else None
        return Combination(self._names, kept.losses, weights, gram, target)

    def _through_features(
        self, losses: Sequence[Tensor], values: Tensor, weights: Tensor | None, primaries: int, scale: Tensor | None,
        outputs: Sequence[Tensor],
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
        kept, gram, target = tg.KeptGradients(outputs, len(losses)), None, None
        self._differentiate(losses, kept)
        for task, name in enumerate(self._names):
            if all(parts[task] is None for parts in kept.parts):
                raise ValueError(f"task {name!r} does not depend on features")
        if weights is None:
            gram = kept.gram({})
            if tg.world() > 1:  # the features of all processes are one long vector
                dist.all_reduce(gram)
                gram /= tg.world() ** 2
            weights, target = self._solve(gram, values, primaries, scale)
        seeds = [(output, seed) for output, seed in zip(outputs, kept.sums(weights), strict=True) if seed is not None]
        tg.backward([output for output, _ in seeds], self.params, [seed for _, seed in seeds])
        return gram, target, weights
