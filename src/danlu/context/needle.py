"""Needle in a haystack: does the model still find one line of a long text when asked for it?

Lines such as ``self.river_lantern = None`` with two random words are put between the lines of a real text, one at each
depth; the text ends with questions, each the start of one of those lines (``self.river_``). A needle counts as found
when greedy decoding would write the whole second word. All needles of a trial share one pass: the questions come in
random order, each followed by its true answer, and the words of a trial are all different, so that no answer helps with
another.

The form is one that a small model trained on source code can solve by repeating what it has read, without following
instructions: of a dozen forms tried on danlu-nano it is the one that the model solves most often within its trained
length. A method that only sees nearby text (a sliding window) cannot score on distant needles, whatever its loss: that
is what this measures and loss by length hides.

Source: Scientific Spaces archive 9948 (distant text must stay usable); RULER, arXiv:2404.06654 (several keys at once).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from danlu.context.memory import check_memory
from danlu.context.report import NeedleScore
from danlu.context.trial import (
    Progress,
    Stacks,
    applied,
    as_ids,
    check_lengths,
    check_position_table,
    check_stacks,
    evaluating,
    last_logits,
    stacks_by_length,
    trained_length_of,
)

WORDS = tuple(
    "anchor apple arrow autumn badge basket beacon blossom bottle branch bridge bronze butter button candle "
    "canyon carpet castle cedar cherry circle clover cobalt copper coral cotton cradle desert dragon ember "
    "engine falcon feather fiddle forest garden ginger glacier granite hammer harbor hazel helmet indigo "
    "island ivory jacket jungle kettle ladder lantern lemon linen magnet maple marble meadow mirror monkey "
    "needle nickel orange orchid oyster paddle paper pebble pepper pillow planet pocket quartz rabbit raven "
    "ribbon river rocket saddle saffron salmon sandal shadow silver spider stone summer teapot temple thunder "
    "timber trumpet tulip tunnel turtle umbrella valley velvet violet walnut whistle willow window winter "
    "yellow zephyr".split()
)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Prompt:
    """One trial: the tokens, and for each needle the depth it lies at and where its value is asked for."""

    ids: Tensor  # (length,) int64
    depths: tuple[float, ...]
    answers: tuple[slice, ...]  # positions of the value's tokens within ids

    @property
    def questions_start(self) -> int:
        """Position before the first token of the first answer: logits are needed from here on."""
        return min(answer.start for answer in self.answers) - 1


def needle_scores(
    model: nn.Module,
    token_ids: Tensor | Sequence[int],
    tokenizer: Any,
    lengths: Sequence[int],
    methods: Stacks | None = None,
    *,
    depths: Sequence[float] = DEPTHS,
    trials: int = 4,
    seed: int = 0,
    first_token: int | None = None,
    trained_length: int | None = None,
    progress: Progress | None = None,
) -> tuple[NeedleScore, ...]:
    """Retrieval of random needles by stack, length and depth.

    Args:
        model: a Hugging Face causal language model; read only, left as it was.
        token_ids: (tokens,) int64, the text that hides the needles, at least as long as the longest length.
        tokenizer: the model's tokenizer.
        lengths: prompt lengths in tokens, needles and questions included.
        methods: as in ``evaluate_lengths``.
        depths: where the needles lie, each in 0..1; 0 is the start of the text, 1 just before the questions.
        trials: prompts per length; every stack reads the same ones.
        seed: of keys, values, order and place in the text.
        first_token: put in place of the first token of every prompt, for models that expect a start token.
        trained_length: default ``config.max_position_embeddings``.
        progress: called before each pass, counting tokens.

    Returns:
        One ``NeedleScore`` per stack, length and depth: the share of needles whose value is predicted whole, the share
        of its tokens, and the mean log-probability (nats) per value token.

    Raises:
        ValueError: an argument out of range, a text that is too short, or a length that cannot hold the needles.
    """
    ids = as_ids(token_ids, model)
    lengths = check_lengths(lengths)
    trained = trained_length_of(model, trained_length)
    stacks_at = stacks_by_length(methods, lengths, trained)
    if trials < 1:
        raise ValueError(f"trials must be >= 1, got {trials}")
    if not depths or any(not 0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths must be one or more numbers in 0..1, got {tuple(depths)}")
    check_memory(model, lengths[-1], logits=lengths[0])
    check_position_table(model, lengths[-1])
    check_stacks(model, stacks_at, trained)
    breaks = _line_breaks(ids, tokenizer)
    prompts = {
        length: [build_prompt(ids, breaks, tokenizer, length, depths, seed * 1_000_003 + i) for i in range(trials)]
        for length in lengths
    }
    if first_token is not None:
        for prompt in (prompt for group in prompts.values() for prompt in group):
            prompt.ids[0] = first_token
    total, done = sum(lengths) * len(stacks_at[lengths[0]]) * trials, 0
    scores: list[NeedleScore] = []
    with evaluating(model):
        for length in lengths:
            for label, stack in stacks_at[length].items():
                readings: dict[float, list[tuple[float, float, float]]] = {depth: [] for depth in depths}
                with applied(model, stack, trained):
                    for prompt in prompts[length]:
                        if progress is not None:
                            progress(done, total, f"needles: {label} at {length}")
                        done += length
                        for depth, reading in _read(model, prompt):
                            readings[depth].append(reading)
                scores += [_score(label, length, depth, readings[depth]) for depth in depths]
    if progress is not None:
        progress(total, total, "done")
    return tuple(scores)


def build_prompt(
    ids: Tensor, breaks: Tensor, tokenizer: Any, length: int, depths: Sequence[float], seed: int
) -> Prompt:
    """A text of exactly ``length`` tokens with a needle near each depth, then the questions with their answers.

    Args:
        ids: (tokens,) the text.
        breaks: (tokens,) bool, tokens that start with a line end; needles go before the nearest.
        tokenizer: the model's tokenizer.
        length: tokens of the prompt.
        depths: as in ``needle_scores``.
        seed: of this prompt.

    Raises:
        ValueError: needles and questions would fill more than three quarters of the prompt, or the text is too short.
    """
    draw = random.Random(seed)
    words = iter(draw.sample(WORDS, 2 * len(depths)))
    needles = [_needle(tokenizer, next(words), next(words)) for _ in depths]
    size = 2 * sum(len(part) for needle in needles for part in needle)
    room = length - size
    if room < size // 3:
        raise ValueError(
            f"length {length} cannot hold {len(needles)} needles, which take {size} tokens with their questions: "
            f"use lengths from {needle_tokens(tokenizer, depths)} up, fewer depths, or no needles"
        )
    if room > len(ids):
        raise ValueError(
            f"the text has {len(ids)} tokens, but length {length} needs {room} of them: pass a longer text"
        )
    start = draw.randrange(len(ids) - room + 1)
    hay, line_ends = ids[start : start + room], breaks[start : start + room]
    pieces, used = [], 0
    for depth, needle in sorted(zip(depths, needles, strict=True), key=lambda pair: pair[0]):
        place = max(used, _nearest_break(line_ends, round(depth * room)))
        pieces += [hay[used:place].tolist(), *needle]
        used = place
    pieces.append(hay[used:].tolist())
    order = draw.sample(range(len(needles)), len(needles))
    answers = []
    position = sum(map(len, pieces))
    for index in order:
        key, value, end = needles[index]
        answers.append(slice(position + len(key), position + len(key) + len(value)))
        pieces += [key, value, end]
        position += len(key) + len(value) + len(end)
    tokens = torch.tensor([token for piece in pieces for token in piece], device=ids.device)
    return Prompt(tokens, tuple(depths[index] for index in order), tuple(answers))


def _read(model: nn.Module, prompt: Prompt) -> Iterable[tuple[float, tuple[float, float, float]]]:
    """(depth, (found, share of tokens, log-probability per token)) of each needle of a prompt."""
    first = prompt.questions_start
    logits, _ = last_logits(model, prompt.ids[None], len(prompt.ids) - first)
    scores = logits[0].float().log_softmax(-1)
    for depth, answer in zip(prompt.depths, prompt.answers, strict=True):
        value = prompt.ids[answer]
        predicted = scores[answer.start - 1 - first : answer.stop - 1 - first]
        right = predicted.argmax(-1) == value
        log_probability = predicted.gather(-1, value[:, None]).mean()
        yield depth, (float(right.all()), float(right.float().mean()), float(log_probability))


def _score(label: str, length: int, depth: float, readings: list[tuple[float, float, float]]) -> NeedleScore:
    found, tokens, log_probability = (sum(column) / len(readings) for column in zip(*readings, strict=True))
    return NeedleScore(label, length, depth, len(readings), found, tokens, log_probability)


def needle_tokens(tokenizer: Any, depths: Sequence[float] = DEPTHS) -> int:
    """The shortest prompt that holds needles at ``depths`` whatever words are drawn, a quarter of it real text."""
    longest = max(sum(map(len, _needle(tokenizer, word, word))) for word in WORDS)
    return -(-8 * longest * len(depths) // 3)


def _needle(tokenizer: Any, key: str, value: str) -> tuple[list[int], list[int], list[int]]:
    """Question, value and end of one needle; encoded apart, so that needle and question are the same tokens."""
    return _encode(tokenizer, f"\nself.{key}_"), _encode(tokenizer, value), _encode(tokenizer, " = None")


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _line_breaks(ids: Tensor, tokenizer: Any) -> Tensor:
    """Which tokens start with a line end, (tokens,) bool."""
    known = ids.unique().tolist()
    texts = tokenizer.batch_decode([[token] for token in known])
    starting = [token for token, text in zip(known, texts, strict=True) if text.startswith("\n")]
    return torch.isin(ids, torch.tensor(starting, dtype=ids.dtype, device=ids.device))


def _nearest_break(breaks: Tensor, place: int) -> int:
    """The position of the line end nearest to ``place``, or ``place`` in a text without lines."""
    found = breaks.nonzero().flatten()
    return place if len(found) == 0 else int(found[(found - place).abs().argmin()])
