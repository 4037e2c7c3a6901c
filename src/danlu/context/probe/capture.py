"""``AttentionProbe``: statistics of a host model's attention while it runs, by layer and head.

The host looks its attention function up in a registry at every call. While a probe is open, the entry that the model
uses is wrapped: the wrapper calls the entry and then measures the same queries, keys and mask. Nothing of the model or
of its configuration changes, so its outputs are the same to the last bit, with every backend.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from danlu.context.inspect import host_model
from danlu.context.probe.heads import LayerTotals, Sample, mean_by_position
from danlu.context.probe.report import AttentionReport, HeadReport

_REGISTRY, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"


class AttentionProbe:
    """Measure attention of a Hugging Face model while it runs, in a ``with`` block.

    Works with the eager, sdpa and flash backends, grouped heads, sliding windows, learnt sinks, encoders and decoders,
    padding, caches and custom masks. Frequency methods of ``danlu.extend`` can be probed; those that bring their own
    attention function (ReRoPE, dynamic scaling, ``Window``, ``LogN``) are refused.

    Args:
        model: a Hugging Face model with one stack of layers; put it in evaluation mode.
        layers: indices of the layers to measure; None: all.
        sinks: how many of the first tokens count as sinks, >= 0.
        local: keys closer than this count as near, >= 0.
        rank_rows: rows of the matrix whose effective rank is computed, >= 2; evenly spaced over one text.
        samples: texts per layer from which rank and best scale are taken, >= 0 (0: neither).

    Raises:
        TypeError: no Hugging Face model.
        ValueError: no such layer, an encoder-decoder, attention that does not go through the host's registry, or a
            method of ``danlu.extend`` with its own attention function.

    Source: Scientific Spaces archive 9889, 9812
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[int] | None = None,
        sinks: int = 4,
        local: int = 32,
        rank_rows: int = 128,
        samples: int = 2,
    ) -> None:
        if min(sinks, local, samples) < 0 or rank_rows < 2:
            raise ValueError(
                f"sinks, local and samples must be >= 0 and rank_rows >= 2, got {sinks}, {local}, {samples} and "
                f"{rank_rows}"
            )
        self.host = host_model(model)
        self.sinks, self.local, self.rank_rows, self.samples = sinks, local, rank_rows, samples
        found = _attention_modules(self.host)
        chosen = list(found) if layers is None else [int(layer) for layer in layers]
        for layer in chosen:
            if layer not in found:
                raise ValueError(f"layers must be in {min(found)}..{max(found)}, got {layer}")
        self.names = {layer: found[layer][0] for layer in sorted(chosen)}
        self._modules = {layer: found[layer][1] for layer in self.names}
        # one for each call of a layer in a forward pass: a layer may attend with parts of its heads one after another
        self._totals: dict[nn.Module, list[LayerTotals]] = {module: [] for module in self._modules.values()}
        self._calls: dict[nn.Module, int] = {}
        self._restore: list[Callable[[], None]] = []
        self._batch = _Batch()
        self.texts = self.tokens = 0

    def __enter__(self) -> AttentionProbe:
        if self._restore:
            raise ValueError("the probe is open already: use one with block, or a probe for each")
        taps: dict[tuple[int, str], tuple[Any, str]] = {}
        for module in self._totals:
            config: Any = module.config
            implementation = str(config._attn_implementation)
            _refuse(implementation, type(self.host).__name__)
            registry = _globals(module)[_REGISTRY]
            taps[id(registry), implementation] = (registry, implementation)
        base = getattr(self.host, getattr(self.host, "base_model_prefix", "") or "", self.host)
        self._restore = [base.register_forward_pre_hook(self._begin, with_kwargs=True).remove]
        self._restore += [_wrap(registry, name, self) for registry, name in taps.values()]
        return self

    def __exit__(self, *exception: object) -> None:
        for undo in reversed(self._restore):
            undo()
        self._restore = []

    def _begin(self, base: nn.Module, args: tuple, kwargs: dict) -> None:
        """Learn from the call of the base model which tokens are real, and how many came before."""
        given = inspect.signature(base.forward).bind_partial(*args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        cache = given.get("past_key_values")
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                "a static cache cannot be probed: its slots beyond the text hold no keys; use a dynamic one"
            )
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        mask = given.get("attention_mask")
        mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._calls = {}
        self._batch = _Batch(mask, 0 if cache is None else cache.get_seq_length())
        if inputs is not None:
            batch, length = inputs.shape[:2]
            self.texts += batch
            self.tokens += batch * length if mask is None else int(mask[:, -length:].sum())

    def observe(self, module: nn.Module, call: dict[str, Any], implementation: str) -> None:
        """Measure one call of an attention function; modules of other models are left alone."""
        totals = self._totals.get(module)
        if totals is None:
            return
        if call.get("dropout"):
            raise ValueError(f"attention dropout must be 0 while probing, got {call['dropout']}: call model.eval()")
        if call.get("position_bias") is not None:
            raise ValueError(f"{type(module).__name__} adds a position bias inside its attention, which is not probed")
        place = self._calls[module] = self._calls.get(module, -1) + 1
        if place == len(totals):
            totals.append(LayerTotals(self.sinks, self.local, self.rank_rows, self.samples))
        with torch.no_grad():
            totals[place].add(self._sample(module, call, implementation))

    def _sample(self, module: nn.Module, call: dict[str, Any], implementation: str) -> Sample:
        query, key, mask = call["query"], call["key"], call["attention_mask"]
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError("flex attention's block masks are not probed: model.set_attn_implementation('sdpa') first")
        n_rows, causal, window = query.shape[2], False, None
        said = call.get("is_causal")
        declared = bool(getattr(module, "is_causal", True) if said is None else said)
        if "flash" in implementation:
            causal, window = declared, call.get("sliding_window")
            if window is not None and not causal:
                raise ValueError("two-sided windows of flash attention are not probed: set_attn_implementation('sdpa')")
        elif implementation != "eager" and mask is None and n_rows > 1 and declared:
            causal, key = True, key[:, :, :n_rows]  # as the host does: such a call fills an empty cache
        if mask is not None and mask.ndim == 2:
            mask = mask.bool()[:, -key.shape[2] :]
        elif mask is not None:
            mask = mask[..., : key.shape[2]]
        first, real = self._batch.rows(query.shape[0], n_rows, key.shape[2], query.device)
        sink = call.get("s_aux")
        return Sample(
            query=query,
            key=key,
            mask=mask,
            causal=causal,
            window=window,
            scale=query.shape[-1] ** -0.5 if call.get("scaling") is None else float(call["scaling"]),
            softcap=call.get("softcap"),
            sink_logits=None if sink is None else sink.reshape(-1),
            first=first,
            real=real,
        )

    def report(self, *, model: str | None = None, text: str = "", notes: Sequence[str] = ()) -> AttentionReport:
        """The averages so far.

        Args:
            model: name to show; default: where the model was loaded from.
            text: what was read, for the page.
            notes: further sentences for the page.

        Returns:
            The report; more can be measured afterwards.
        """
        every = [totals for module in self._modules.values() for totals in self._totals[module]]
        bins = max((totals.used_bins() for totals in every), default=0)
        said = list(notes)
        blank = sum(totals.blank for totals in every)
        if blank:
            said.append(f"{blank} rows of heads saw no key and are left out.")
        heads: list[HeadReport] = []
        by_position: dict[str, tuple[float, ...]] = {}
        for layer, module in self._modules.items():
            before = len(heads)
            for totals in self._totals[module]:
                heads += totals.heads(layer, len(heads) - before)
            by_position[str(layer)] = mean_by_position(self._totals[module], bins)
        return AttentionReport(
            model=model or str(getattr(self.host.config, "_name_or_path", "") or type(self.host).__name__),
            layers={str(layer): name for layer, name in self.names.items()},
            heads=tuple(heads),
            texts=self.texts,
            tokens=self.tokens,
            sinks=self.sinks,
            local=self.local,
            positions=tuple(2**power - 1 for power in range(bins)),
            by_position=by_position,
            text=text,
            notes=tuple(said),
        )


class _Batch:
    """What a forward call said about its tokens."""

    def __init__(self, mask: Tensor | None = None, past: int = 0):
        self.mask, self.past = mask, past

    def rows(self, batch: int, n_rows: int, n_keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Slot of the first real token per text (batch,), negative where a cache has let it go, and the real rows."""
        total = self.past + n_rows
        mask = torch.ones(batch, total, dtype=torch.bool) if self.mask is None else self.mask
        mask = mask.expand(batch, -1).to(device)
        first = mask.int().argmax(-1) - (mask.shape[1] - n_keys)
        return first, mask[:, mask.shape[1] - n_rows :]


class _Tap:
    """An entry of the registry that passes every call on, and shows it to the probe while that is open."""

    def __init__(self, probe: AttentionProbe, inner: Callable[..., Any] | None, implementation: str):
        self.probe: AttentionProbe | None = probe
        self.inner, self.implementation = inner, implementation

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        inner = _globals(module)[_EAGER] if self.inner is None else self.inner
        out = inner(module, query, key, value, attention_mask, *args, **kwargs)
        if self.probe is not None:
            further = list(inspect.signature(inner).parameters)[5 : 5 + len(args)] if args else []
            call = {"query": query, "key": key, "attention_mask": attention_mask, **kwargs}
            self.probe.observe(module, {**call, **dict(zip(further, args, strict=True))}, self.implementation)
        return out


def _wrap(registry: Any, name: str, probe: AttentionProbe) -> Callable[[], None]:
    """Put a tap in front of an entry of a registry; returns what takes it away."""
    tap = _Tap(probe, registry.get(name), name)
    registry[name] = tap

    def undo() -> None:
        tap.probe = None
        if registry.get(name) is not tap:  # a probe that was opened later is still in front
            return
        before = tap.inner
        while isinstance(before, _Tap) and before.probe is None:
            before = before.inner
        del registry[name]
        if before is not None and registry.get(name) is not before:  # an entry of this registry alone
            registry[name] = before

    return undo


def _globals(module: nn.Module) -> dict[str, Any]:
    """The names that the method sees in which a module asks the registry; empty for one that does not."""
    for kind in type(module).__mro__:
        for method in vars(kind).values():
            plain: Any = inspect.unwrap(method) if callable(method) else None
            if _REGISTRY in getattr(getattr(plain, "__code__", None), "co_names", ()):
                return plain.__globals__
    return {}


def _attention_modules(host: Any) -> dict[int, tuple[str, nn.Module]]:
    """Attention modules by layer index, with their names."""
    name = type(host).__name__
    if getattr(host.config, "is_encoder_decoder", False):
        raise ValueError(f"model must have one stack of layers, {name} has an encoder and a decoder")
    parts = ((path, part) for path, part in host.named_modules() if not isinstance(part, PreTrainedModel))
    found = [(path, part) for path, part in parts if _globals(part)]
    if not found:
        raise ValueError(f"{name} does not call attention through the host's registry (AttentionInterface)")
    indices: list[Any] = [getattr(module, "layer_idx", None) for _, module in found]
    if not all(isinstance(index, int) for index in indices) or len(set(indices)) < len(indices):
        indices = list(range(len(found)))
    return {index: found[indices.index(index)] for index in sorted(indices)}


def _refuse(implementation: str, name: str) -> None:
    if implementation == "danlu":
        raise ValueError(
            f"{name} runs a method of danlu.extend that turns, scales or hides keys inside its own attention function, "
            "so its queries and keys are not those of the softmax: probe a frequency method (ntk, yarn) or restore it"
        )
    if implementation not in ("eager", "sdpa") and "flash" not in implementation:
        raise ValueError(
            f"attention implementation must be eager, sdpa or a flash one to be probed, got {implementation!r}: "
            "model.set_attn_implementation('sdpa')"
        )
