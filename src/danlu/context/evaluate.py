"""Loss by context length: the same target tokens, read with more and more context, under each stack of methods.

For every window end ``e`` the model reads ``token_ids[e - length : e]`` and is scored on the last ``targets`` of them.
The targets do not depend on the length, so the differences between lengths are differences of context alone: a loss
that rises means that the model does not extrapolate, one that stays level that it ignores the distant text, one that
falls that it uses it.

Source: Scientific Spaces archive 9948, 9603 (fixed last segment, growing context).
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from danlu.context.memory import PEAK_KIND, PeakMemory, check_memory
from danlu.context.report import LengthReport, Measurement
from danlu.context.trial import (
    Progress,
    Stacks,
    applied,
    as_ids,
    check_lengths,
    check_position_table,
    check_stacks,
    evaluating,
    in_range,
    keeps_logits,
    last_logits,
    spelling,
    stacks_by_length,
    trained_length_of,
)

logger = logging.getLogger("danlu.evaluate")

#: Tokens of one-token decoding after the first window, unless the caller says otherwise.
DECODE_TOKENS = 16


def evaluate_lengths(
    model: nn.Module,
    token_ids: Tensor | Sequence[int],
    lengths: Sequence[int],
    methods: Stacks | None = None,
    *,
    targets: int | None = None,
    windows: int = 8,
    batch_size: int = 1,
    decode_tokens: int = DECODE_TOKENS,
    first_token: int | None = None,
    trained_length: int | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> LengthReport:
    """Measure loss, speed and memory of a model by context length, under each stack of methods.

    Args:
        model: a Hugging Face causal language model; read only, left as it was.
        token_ids: (tokens,) int64, one text at least as long as the longest length plus ``decode_tokens``.
        lengths: context lengths in tokens, each >= 2; sorted and made unique.
        methods: what to compare: ``{"label": (method, ...)}``, or a list of methods, stacks and written forms such as
            ``"rerope:window=64+logn"``; an empty stack is the model as it is. Options left open are filled in for
            each length (a factor becomes length / trained length). Default: ``default_stacks()``.
        targets: scored tokens at the end of each window, in 1..min(lengths) - 1; default half the shortest length.
        windows: window ends, spread evenly over the text; fewer (and a note in the report) when it holds fewer.
        batch_size: windows per forward pass.
        decode_tokens: steps of one-token decoding after the first window, timed with its cache; 0 leaves it out.
        first_token: put in place of the first token of every window, for models that expect a start token.
        trained_length: default ``config.max_position_embeddings``.
        tokenizer: gives the text's bytes per token, for losses in bits per byte.
        progress: called before each pass, counting tokens.

    Returns:
        A ``LengthReport``.

    Raises:
        ValueError: an argument out of range, a text shorter than the longest length, more memory needed than there is,
            a stack that the model does not support (all before the first pass), or a plain model that gives NaN.
    """
    ids = as_ids(token_ids, model)
    lengths = check_lengths(lengths)
    trained = trained_length_of(model, trained_length)
    targets = lengths[0] // 2 if targets is None else targets
    in_range("targets", targets, 1, lengths[0] - 1)
    in_range("windows", windows, 1)
    in_range("batch_size", batch_size, 1)
    in_range("decode_tokens", decode_tokens, 0)
    stacks_at = stacks_by_length(methods, lengths, trained)
    labels = tuple(stacks_at[lengths[0]])
    ends = window_ends(len(ids), lengths[-1], targets, windows, decode_tokens)
    notes = []
    if len(ends) < windows:
        notes.append(f"the text holds {len(ends)} windows of separate targets, not {windows}")
    if not keeps_logits(model):
        notes.append("the model cannot limit its logits to the scored tokens: memory includes logits of every token")
    kept = targets if keeps_logits(model) else lengths[-1]
    check_memory(model, lengths[-1], batch=min(batch_size, len(ends)), logits=kept)
    check_position_table(model, lengths[-1])
    check_stacks(model, stacks_at, trained)
    for note in notes:
        logger.info(note)

    runs = [(length, label) for length in lengths for label in labels]
    total, done = sum(lengths) * len(labels) * len(ends), 0
    rows = []
    with evaluating(model):
        last_logits(model, ids[None, : lengths[0]], targets + 1)  # first-use set-up must not count for the first stack
        for length, label in runs:
            stack = stacks_at[length][label]

            def step(rows: int, length: int = length, what: str = f"{label} at {length}") -> None:
                nonlocal done
                if progress is not None:
                    progress(done, total, what)
                done += rows * length

            with applied(model, stack, trained):
                numbers = _measure(model, ids, length, targets, ends, batch_size, decode_tokens, first_token, step)
            row = Measurement(stack=label, length=length, methods=spelling(stack), **numbers)
            if not stack and length <= trained and row.loss != row.loss:
                raise ValueError(
                    f"the model's own loss is not a number at length {length}, within its trained length of {trained}: "
                    "its weights may hold NaN, or its dtype may be too narrow"
                )
            rows.append(row)
    if progress is not None:
        progress(total, total, "done")
    parameter = next(model.parameters())
    return LengthReport(
        model=str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        trained_length=trained,
        lengths=tuple(lengths),
        stacks=labels,
        targets=targets,
        windows=len(ends),
        device=str(parameter.device),
        dtype=str(parameter.dtype).removeprefix("torch."),
        measurements=tuple(rows),
        bytes_per_token=None if tokenizer is None else _bytes_per_token(tokenizer, ids, ends, targets),
        memory_kind=PEAK_KIND.get(parameter.device.type, "not measured on this device"),
        notes=tuple(notes),
        versions=_versions(),
    )


def window_ends(tokens: int, longest: int, targets: int, windows: int, after: int = 0) -> list[int]:
    """Ends of the windows, spread evenly, no target scored twice.

    Args:
        tokens: length of the text.
        longest: the longest context; every end is >= this.
        targets: scored tokens before each end.
        windows: how many are wanted.
        after: tokens that must follow each end.

    Returns:
        At most ``windows`` ends, ascending.

    Raises:
        ValueError: not even one window fits.
    """
    room = tokens - after - longest
    if room < 0:
        raise ValueError(
            f"the text has {tokens} tokens, but length {longest} needs at least {longest + after}: "
            "pass a longer text or shorter lengths"
        )
    count = min(windows, 1 + room // targets)
    return [longest + (room * i // (count - 1) if count > 1 else room) for i in range(count)]


def _measure(
    model: nn.Module,
    ids: Tensor,
    length: int,
    targets: int,
    ends: list[int],
    batch_size: int,
    decode_tokens: int,
    first_token: int | None,
    step: Callable[[int], None],
) -> dict[str, Any]:
    """Loss of each window, accuracy, memory of the first pass, median speed of the others."""
    losses, right, speeds = [], 0, []
    peak = PeakMemory(ids.device)
    decode = None
    for first in range(0, len(ends), batch_size):
        batch = ends[first : first + batch_size]
        step(len(batch))
        rows = torch.stack([ids[end - length : end] for end in batch])
        labels = rows[:, -targets:].clone()
        if first_token is not None:
            rows[:, 0] = first_token
        with peak if first == 0 else contextlib.nullcontext():
            started = _now(ids.device)
            # One position more than targets: the logits at a position predict the next token.
            logits, cache = last_logits(model, rows, targets + 1)
            speeds.append(rows.numel() / (_now(ids.device) - started))
        if first == 0 and decode_tokens:
            decode = _decode_speed(model, ids[batch[0] : batch[0] + decode_tokens], cache, len(batch))
        del cache
        logits = logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses += loss.view(len(batch), targets).double().mean(1).tolist()
        right += int((logits.argmax(-1) == labels).sum())
    return {
        "losses": tuple(losses),
        "accuracy": right / (targets * len(ends)),
        # The first pass carries the set-up of a new shape, so it counts only when there is no other.
        "prefill_tokens_per_second": statistics.median(speeds[1:] or speeds),
        "decode_tokens_per_second": decode,
        "peak_bytes": peak.bytes,
    }


def _decode_speed(model: nn.Module, following: Tensor, cache: Any, rows: int) -> float | None:
    """Tokens per second of one-token steps that continue ``cache``; the first step is warm-up when there are more."""
    if cache is None or len(following) == 0:
        return None
    seconds = []
    for token in following:
        started = _now(following.device)
        output = model(input_ids=token.expand(rows, 1), past_key_values=cache, use_cache=True)
        seconds.append(_now(following.device) - started)
        cache = output.past_key_values
    return rows / statistics.median(seconds[1:] or seconds)


def _bytes_per_token(tokenizer: Any, ids: Tensor, ends: list[int], targets: int) -> float:
    texts = tokenizer.batch_decode([ids[end - targets : end].tolist() for end in ends])
    return sum(len(text.encode()) for text in texts) / (targets * len(ends))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _versions() -> dict[str, str]:
    import platform

    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
