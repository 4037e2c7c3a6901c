"""What the evaluations by length share: checked arguments, stacks by length, a forward pass that keeps few logits."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from danlu.context.extend import extended
from danlu.context.inspect import trained_length
from danlu.context.methods import Method
from danlu.context.stacks import default_stacks, parse_methods, resolve_stack

StackLike: TypeAlias = str | Method | Sequence[Method]
Stacks: TypeAlias = Mapping[str, StackLike] | Sequence[StackLike]
#: Called as ``progress(tokens done, tokens in all, what runs now)``.
Progress: TypeAlias = Callable[[int, int, str], None]


def last_logits(model: nn.Module, rows: Tensor, count: int) -> tuple[Tensor, Any]:
    """Logits of the last ``count`` positions of each row, (batch, count, vocab), and the cache of the pass."""
    extra = {"logits_to_keep": count} if keeps_logits(model) else {}
    output = model(input_ids=rows, use_cache=True, **extra)
    return output.logits[:, -count:], getattr(output, "past_key_values", None)


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model's forward can limit its logits to the last positions."""
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # peft's wrapper takes anything
        inner = inner.get_base_model()
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def stacks_by_length(
    methods: Stacks | None, lengths: Sequence[int], trained_length: int
) -> dict[int, dict[str, tuple[Method, ...]]]:
    """Every accepted spelling of ``methods``, with open options filled in, as ``{length: {label: stack}}``.

    Raises:
        ValueError: no stack, a label used twice, an unknown method, or an option that does not fit the trained length.
    """
    if methods is None:
        methods = default_stacks()
    if not isinstance(methods, Mapping):
        stacks = [_as_stack(stack) for stack in methods]
        labels = ["+".join(str(method) for method in stack) or "plain" for stack in stacks]
        if len(set(labels)) < len(labels):
            raise ValueError(f"methods must be different stacks, got {', '.join(labels)}")
        methods = dict(zip(labels, stacks, strict=True))
    if not methods:
        raise ValueError("methods must name at least one stack, such as 'plain'")
    return {
        length: {label: resolve_stack(_as_stack(stack), trained_length, length) for label, stack in methods.items()}
        for length in lengths
    }


def _as_stack(stack: StackLike) -> tuple[Method, ...]:
    if isinstance(stack, str):
        return parse_methods(stack)
    return (stack,) if isinstance(stack, Method) else tuple(stack)


def check_stacks(model: nn.Module, stacks_at: Mapping[int, Mapping[str, tuple[Method, ...]]], trained: int) -> None:
    """Put every stack on the model and take it off again, so that what the model refuses is refused before the work."""
    seen = set()
    for stacks in stacks_at.values():
        for stack in stacks.values():
            if (key := spelling(stack)) not in seen:
                seen.add(key)
                with applied(model, stack, trained):
                    pass


def applied(model: nn.Module, stack: tuple[Method, ...], trained_length: int) -> contextlib.AbstractContextManager:
    """The model under a stack of methods, and as it was afterwards; an empty stack is the plain model."""
    return extended(model, *stack, trained_length=trained_length)


def spelling(stack: Sequence[Method]) -> str:
    """The stack as Python arguments: ``ReRoPE(window=64), LogN(trained_length=256)``."""
    return ", ".join(repr(method) for method in stack)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the training flag returns afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def check_position_table(model: nn.Module, length: int) -> None:
    """Refuse a length beyond a learned position table, which has no entry to look up.

    Raises:
        ValueError: ``length`` exceeds the table.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and re.search(r"wpe|pos", name.rpartition(".")[2]):
            rows = module.num_embeddings - int(getattr(module, "offset", 0))
            if length > rows:
                raise ValueError(
                    f"{type(model).__name__} has a learned table of {rows} positions and no rotary ones: "
                    f"it cannot read {length} tokens, use lengths up to {rows}"
                )


def as_ids(token_ids: Tensor | Sequence[int], model: nn.Module) -> Tensor:
    """Token ids as a checked 1-D int64 tensor on the model's device."""
    ids = torch.as_tensor(token_ids)
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1 or ids.is_floating_point() or ids.numel() == 0:
        raise ValueError(f"token_ids must be a non-empty 1-D integer tensor, got shape {tuple(ids.shape)}, {ids.dtype}")
    host: Any = model
    vocabulary = host.config.get_text_config().vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(f"token_ids must lie in 0..{vocabulary - 1}, got {int(ids.min())}..{int(ids.max())}")
    return ids.to(device=next(model.parameters()).device, dtype=torch.int64)


def check_lengths(lengths: Sequence[int]) -> list[int]:
    """Lengths sorted, unique, each an integer >= 2."""
    for length in lengths:
        in_range("length", length, 2)
    if not lengths:
        raise ValueError("lengths must name at least one length")
    return sorted(set(lengths))


def trained_length_of(model: nn.Module, given: int | None = None) -> int:
    """The length the model was trained at: ``given``, or what its configuration says."""
    length = trained_length(model) if given is None else given
    in_range("trained_length", length, 2)
    return length


def in_range(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Refuse what is not an integer in ``low..high``."""
    legal = f"{low}..{high}" if high is not None else f">= {low}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, {legal}, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {'in ' if high is not None else ''}{legal}, got {value}")
