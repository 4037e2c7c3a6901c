"""The toy of recall from many contexts: a tiny Llama that has learnt to look up one key among a few pairs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from danlu.lab.claim import Context
from danlu.lab.training import Batch, Schedule, train, trained

# Recall: keys, values and a question mark; a context is pairs, a question the mark and a key.
_KEYS, _VALUES, PAIRS = 80, 16, 4
_MARK = _KEYS + _VALUES
LENGTH = 2 * PAIRS + 2
#: Share of questions whose key is not among the pairs, in the second half of training.
_ABSENT = 0.25
_SCHEDULE = Schedule(steps=900, batch=128, learning_rate=4e-3)


def recall_model(seed: int, context: Context) -> nn.Module:
    """The trained recall model, cached by everything that its weights depend on."""
    from danlu import __version__

    document = {
        "version": __version__,
        "seed": seed,
        "schedule": asdict(_SCHEDULE),
        "sizes": [_KEYS, _VALUES, PAIRS],
        "absent": _ABSENT,
    }
    key = hashlib.sha256(json.dumps({**document, "task": "recall"}, sort_keys=True).encode()).hexdigest()[:16]

    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=_MARK + 1,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=LENGTH + 1,  # with the answer
                rope_parameters={"rope_type": "default", "rope_theta": 100.0},
                tie_word_embeddings=True,
                initializer_range=0.1,
                bos_token_id=None,
                eos_token_id=None,
                attn_implementation="eager",
            )
        )

    def fit(model: nn.Module) -> None:
        train(model, recall_batches(_SCHEDULE.batch), _SCHEDULE, seed, context, "training recall")

    return trained(key, build, fit, seed, context)


def recall_batches(batch: int) -> Batch:
    """Training batches of 0 to 4 pairs, then a question for each, alone behind the pairs, as inputs and targets.

    Questions of one row are packed: each sees the pairs and itself, at the positions it would have alone.
    """
    drawn = 0

    def draw(generator: torch.Generator) -> dict[str, Any]:
        nonlocal drawn
        drawn += 1
        share = _ABSENT if drawn > _SCHEDULE.steps // 2 else 0.0
        pairs = int(torch.randint(PAIRS + 1, (), generator=generator))
        keys = torch.rand(batch, _KEYS, generator=generator).argsort(1)
        values = _KEYS + torch.randint(_VALUES, (batch, _KEYS), generator=generator)
        shown = torch.stack([keys[:, :pairs], values[:, :pairs]], -1).flatten(1)
        asked = torch.rand(batch, max(pairs, 1), generator=generator).argsort(1)
        absent = torch.rand(batch, asked.shape[1], generator=generator) < (share if pairs else 2.0)
        asked = torch.where(absent, torch.randint(pairs, _KEYS, asked.shape, generator=generator), asked)
        questions = torch.stack([torch.full_like(asked, _MARK), keys.gather(1, asked)], -1).flatten(1)
        ids = torch.cat([shown, questions], 1)
        answers = values.gather(1, asked)
        start, count = 2 * pairs, asked.shape[1]
        targets = torch.full_like(ids, -100)
        targets[:, start + 1 :: 2] = answers
        places = torch.cat([torch.arange(start), start + torch.arange(2).repeat(count)])
        return {
            "input_ids": ids,
            "position_ids": places.expand(batch, -1),
            "attention_mask": packed_mask(start, count),
            "targets": targets,
        }

    return draw


def packed_mask(start: int, count: int) -> Tensor:
    """Additive mask (1, 1, length, length): ``count`` questions of two tokens see ``start`` tokens and themselves."""
    length = start + 2 * count
    question = torch.cat([torch.full((start,), -1), torch.arange(count).repeat_interleave(2)])
    seen = (question[None, :] == -1) | (question[None, :] == question[:, None])
    seen &= torch.ones(length, length, dtype=torch.bool).tril()
    return torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)


def recall_trial(count: int, generator: torch.Generator) -> tuple[list[list[int]], list[int], int]:
    """Contexts with different keys, a question about one of them, and its answer."""
    keys = torch.randperm(_KEYS, generator=generator)[: count * PAIRS]
    values = _KEYS + torch.randint(_VALUES, (count * PAIRS,), generator=generator)
    asked = int(torch.randint(count * PAIRS, (), generator=generator))
    parts = torch.stack([keys, values], -1).reshape(count, -1).tolist()
    return parts, [_MARK, int(keys[asked])], int(values[asked])


@torch.no_grad()
def recall_rates(model: nn.Module, count: int, settings: dict[str, Any], examples: int, seed: int) -> dict[str, float]:
    """Accuracy by setting, and of the contexts concatenated and cut to the trained length.

    Args:
        model: the recall model.
        count: contexts.
        settings: name to pooling, beta (None: ``count - 1``) and top-p.
        examples: trials.
        seed: of the trials; the same for every setting.
    """
    from danlu.context.naive_bayes.combine import Settings, combine
    from danlu.context.naive_bayes.contexts import NaiveBayesContexts

    host: Any = model
    reader = NaiveBayesContexts(model)
    ways = {
        name: Settings(count - 1 if beta is None else beta, 0.1, top_p, pooling)
        for name, (pooling, beta, top_p) in settings.items()
    }
    hits = dict.fromkeys((*ways, "concatenated", f"last {LENGTH} tokens"), 0)
    generator = torch.Generator().manual_seed(seed + 104729)
    for _ in range(examples):
        parts, question, answer = recall_trial(count, generator)
        logits, _ = reader.prepare(parts).rows.feed(torch.tensor(question))
        for name, way in ways.items():
            hits[name] += int(combine(logits, way).scores.argmax()) == answer
        joined = torch.tensor([[*(token for part in parts for token in part), *question]])
        hits["concatenated"] += int(host(joined).logits[0, -1].argmax()) == answer
        hits[f"last {LENGTH} tokens"] += int(host(joined[:, -LENGTH:]).logits[0, -1].argmax()) == answer
    return {name: value / examples for name, value in hits.items()}


def read_work(model: nn.Module, count: int, concatenated: bool) -> int:
    """Floating-point operations of reading ``count`` contexts and predicting one token, two per multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode

    from danlu.context.naive_bayes.contexts import NaiveBayesContexts

    parts, question, _ = recall_trial(count, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if concatenated:
            model(torch.tensor([[*(token for part in parts for token in part), *question]]), logits_to_keep=1)
        else:
            NaiveBayesContexts(model).generate(parts, question, max_new_tokens=1)
    return counter.get_total_flops()
