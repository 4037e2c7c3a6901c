"""What the attention layers of a model read on calibration text: second moments, and a few inputs as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danlu.progress import watched
from danlu.tuning.latent.source import Source

#: Tokens whose inputs and outputs are kept whole, to measure errors on.
PROBE_TOKENS = 512
#: Tokens that go through the model at once.
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Moments:
    """Statistics of the inputs x of every attention layer.

    Args:
        second: per layer E[x~ x~'] with x~ = [x, 1], float64 (hidden + 1, hidden + 1).
        tokens: number of tokens in the mean.
        probe_ids: (n, length) a few of the texts.
        inputs: per layer (n, length, hidden) what it reads on them.
        outputs: per layer (n, length, hidden) what it gives back.
        loss: mean loss on them, nats per token.
    """

    second: list[Tensor]
    tokens: int
    probe_ids: Tensor
    inputs: list[Tensor]
    outputs: list[Tensor]
    loss: float


@torch.no_grad()
def collect(model: Any, source: Source, ids: Tensor) -> Moments:
    """Run calibration text through a model once, in evaluation mode, and put the mode back.

    Args:
        model: the host model.
        source: its reading.
        ids: (n, length) token ids without padding.
    """
    count, length = ids.shape
    layers = len(source.arch.blocks)
    kept = min(count, max(1, PROBE_TOKENS // length))
    probe = ids[:kept, :PROBE_TOKENS]
    second = [torch.zeros(source.hidden + 1, source.hidden + 1, dtype=torch.float64) for _ in range(layers)]
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    keep = False

    def hook(index: int) -> Any:
        def read(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: tuple[Tensor, ...]) -> None:
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if keep:
                inputs.append(x.detach())
                outputs.append(result[0].detach())
                return
            rows = x.detach().flatten(0, -2)
            # Sums of 16-bit numbers would stop growing; float32 holds the sum of one batch well.
            rows = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
            second[index][:-1, :-1] += (rows.T @ rows).to("cpu", torch.float64)
            second[index][:-1, -1] += rows.sum(0).to("cpu", torch.float64)

        return read

    handles = [
        block.attention.module.register_forward_hook(hook(index), with_kwargs=True)
        for index, block in enumerate(source.arch.blocks)
    ]
    training = model.training
    model.eval()
    try:
        for batch in watched(ids.split(max(1, _BATCH_TOKENS // length)), "calibration"):
            source.arch.base(input_ids=batch.to(model.device), use_cache=False)
        keep = True
        loss = token_loss(model, probe)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    for moment in second:
        moment /= ids.numel()
        moment[-1, :-1] = moment[:-1, -1]
        moment[-1, -1] = 1
    return Moments(second, ids.numel(), probe, inputs, outputs, loss)


@torch.no_grad()
def token_loss(model: Any, ids: Tensor) -> float:
    """Mean loss of the next token in nats, row by row.

    Args:
        model: a causal language model.
        ids: (n, length) token ids without padding.
    """
    ids = ids.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
