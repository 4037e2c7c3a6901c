"""The decoding loop of naive-Bayes context extension, inside the host's own ``generate``.

The host's ``generate(custom_generate=...)`` is its official place for another loop: it merges generation
configurations, builds logits processors, warpers and stopping criteria from them, and then calls ours. It sees one
sequence, the text that was read: what all rows begin with, the contexts one after another, the question, the answer so
far. So penalties and stop strings work as with a plain prompt of one context, every sampling option is the host's, and
the model runs on our rows only. Running ``generate`` on all rows with a logits processor would need equal draws in all
rows, and padding where here are groups of similar length.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danlu.context.naive_bayes.combine import Settings, combine
from danlu.context.naive_bayes.result import TokenTrace
from danlu.context.naive_bayes.rows import Rows

#: Options of ``generate`` that cannot mean anything here, and what to do instead.
_REFUSED = {
    "num_beams": (1, "rows are combined token by token: leave num_beams at 1"),
    "num_return_sequences": (1, "call generate again with another seed instead"),
    "guidance_scale": (None, "that is beta = guidance_scale - 1 with top_p=1 and one context"),
    "cache_implementation": (None, "rows keep the model's own growing caches"),
    "prompt_lookup_num_tokens": (None, "assisted decoding is for one prompt"),
    "penalty_alpha": (None, "contrastive search is for one prompt"),
    "dola_layers": (None, "layers are contrasted for one prompt"),
    "max_length": (None, "pass max_new_tokens: contexts differ in length"),
}
_FOREIGN = (
    "inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "assistant_model",
    "custom_generate", "negative_prompt_ids", "negative_prompt_attention_mask", "synced_gpus", "tokenizer",
)  # fmt: skip
_PASSED_ON = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")


def merge_options(model: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One generation configuration out of the model's, the caller's and single options, checked before any work.

    Args:
        model: with a ``generation_config``.
        options: keyword arguments as for the host's ``generate``.

    Returns:
        A configuration of its own, and the options that are no part of one: processors and criteria.

    Raises:
        ValueError: an option that has no meaning for several rows, with what to do instead.
        TypeError: an argument that is ours to set, or that the host does not know.
    """
    rest = dict(options)
    config = rest.pop("generation_config", None)
    config = copy.deepcopy(model.generation_config if config is None else config)
    config.max_length = None  # old configurations have a default, which says nothing
    rest = config.update(**rest)
    for name in rest:
        if name not in _PASSED_ON:
            what = "is set by NaiveBayesContexts itself" if name in _FOREIGN else "is no option of generate"
            raise TypeError(f"{name} {what}: leave it out")
    for name, (legal, advice) in _REFUSED.items():
        value = getattr(config, name, None)
        if value is not None and value != legal:
            raise ValueError(f"{name}={value!r} is not possible with several contexts: {advice}")
    if options.get("use_cache") is False:
        raise ValueError("use_cache=False is not possible: every row is kept in a cache")
    return config, rest


@dataclass
class Answer:
    """What the loop found: token ids, traces by row, and scores where they were asked for."""

    tokens: list[int]
    trace: list[TokenTrace]
    scores: Tensor | None


@dataclass
class Decoding:
    """The loop, as the host's ``custom_generate`` takes it.

    Attributes:
        rows: have read the question; row 0 has no context.
        logits: (rows, vocabulary), for the first token of the answer.
        index: for each row of the combination after the first, its place in ``logits``.
        sources: the source of each of those rows.
        total: number of sources, dropped ones included.
        settings: of the combination.
        generator: for sampling.
        streamer: the host's, gets each token.
        on_token: called with each token's trace.
    """

    rows: Rows
    logits: Tensor
    index: list[int]
    sources: list[int]
    total: int
    settings: Settings
    generator: torch.Generator
    streamer: Any = None
    on_token: Callable[[TokenTrace], None] | None = None

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **rest: Any,  # caches and masks for the one sequence, which is not run
    ) -> Answer:
        """Generate until the stopping criteria say so; the arguments are the host's."""
        for criterion in stopping_criteria:
            if hasattr(criterion, "max_position_embeddings"):
                criterion.max_position_embeddings = None  # each row is within it; their sum need not be
        gather = None
        if self.index != list(range(1, len(self.logits))):
            gather = torch.tensor([0, *self.index], device=self.logits.device)
        answer = Answer([], [], None)
        kept: list[Tensor] = []
        logits, previous = self.logits, None
        while True:
            step = combine(logits if gather is None else logits[gather], self.settings, previous)
            previous = step.context
            # the host's processors expect float32
            scores = logits_processor(input_ids, step.scores[None].float())
            if generation_config.do_sample:
                token = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)[0]
            else:
                token = scores.argmax(-1)
            number = int(token)
            row = step.context_of(number)
            answer.tokens.append(number)
            answer.trace.append(self._traced(step, number, row))
            if generation_config.output_scores:
                kept.append(scores[0])
            if self.streamer is not None:
                self.streamer.put(token.cpu())
            if self.on_token is not None:
                self.on_token(answer.trace[-1])
            input_ids = torch.cat([input_ids, token[None]], -1)
            if bool(stopping_criteria(input_ids, None).all()):
                break
            logits, _ = self.rows.feed(token)
        if self.streamer is not None:
            self.streamer.end()
        answer.scores = torch.stack(kept) if kept else None
        return answer

    def _traced(self, step: Any, token: int, row: int) -> TokenTrace:
        entropies: list[float | None] = [None] * self.total
        for source, entropy in zip(self.sources, step.entropies.tolist(), strict=True):
            entropies[source] = entropy
        prior, probability = step.log_probs[[0, row + 1], token].exp().tolist()
        return TokenTrace(token, self.sources[row], tuple(entropies), probability, prior)


def run(model: Any, read: list[int], decoding: Decoding, tokenizer: Any, config: Any, rest: dict[str, Any]) -> Answer:
    """Call the host's ``generate`` with our loop.

    Args:
        model: the host model.
        read: the text that was read, as one sequence, for processors and stopping criteria.
        decoding: the loop.
        tokenizer: for stop strings; None where there are none.
        config: what ``merge_options`` made, with ``max_new_tokens``.
        rest: processors and criteria.
    """
    from transformers import StoppingCriteriaList, StopStringCriteria

    criteria = StoppingCriteriaList(rest.get("stopping_criteria") or [])
    if config.stop_strings is not None:  # the host does not hand its tokenizer on to a loop of another's
        if tokenizer is None:
            raise ValueError("stop_strings needs a tokenizer: NaiveBayesContexts(model, tokenizer)")
        criteria.append(StopStringCriteria(stop_strings=config.stop_strings, tokenizer=tokenizer))
        config.stop_strings = None
    ids = torch.tensor([read], device=decoding.rows.host.device)
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        streamer=decoding.streamer,
        custom_generate=decoding,
        **(rest | {"stopping_criteria": criteria}),
    )
