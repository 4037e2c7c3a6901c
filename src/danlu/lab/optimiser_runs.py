"""What the claims on Tiger and Lion run: printed digits, a byte model, and counts of bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Build = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

_BATCH, _BETA = 64, 0.945


def optimiser(name: str, rate: float, **options: Any) -> Build:
    """A recipe for one of the optimisers that are compared, all with a decay of 0.01."""
    from danlu.optim.lion import Lion
    from danlu.optim.tiger import Tiger

    if name == "AdamW":
        return lambda params: torch.optim.AdamW(params, rate, weight_decay=0.01)
    if name == "Lion":
        return lambda params: Lion(params, rate, weight_decay=0.01)
    rule = "auto" if name == "Tiger" else "plain"
    return lambda params: Tiger(params, rate, _BETA, rule=rule, **options)


def held_out_loss(
    build: Build, width: int, seed: int, steps: int, dtype: torch.dtype = torch.float32, count: int = 1500
) -> float:
    """Loss on digits that were not trained on, after training on ``count`` others."""
    from danlu.lab.printed import printed_digits

    drawn = torch.Generator().manual_seed(seed)
    first, second, last = _layers(width, drawn)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last).to(dtype)
    _fit(model, build(model.parameters()), steps, drawn, count=count)
    pixels, labels = printed_digits(600, 2)
    with torch.no_grad():
        loss = F.cross_entropy(model(pixels.to(dtype)).float(), labels).item()
    return loss if math.isfinite(loss) else 100.0


def overflow_curve(dtype: torch.dtype, nonfinite: str, seed: int, steps: int = 400, wide: float = 300.0) -> list[float]:
    """Training losses of a network whose first two layers are too wide for float16, before a norm that forgives it."""
    from danlu.optim.groups import tiger_param_groups
    from danlu.optim.tiger import Tiger

    drawn = torch.Generator().manual_seed(seed)
    first, second, last = _layers(128, drawn)
    with torch.no_grad():
        first.weight.mul_(wide)
        second.weight.mul_(wide)
    model = nn.Sequential(first, nn.ReLU(), second, nn.LayerNorm(128), nn.ReLU(), last).to(dtype)
    return _fit(model, Tiger(tiger_param_groups(model), 1e-2, _BETA, nonfinite=nonfinite), steps, drawn, 1024.0)


def _layers(width: int, drawn: torch.Generator) -> list[nn.Linear]:
    layers = [nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=drawn) * layer.in_features**-0.5)
            layer.bias.zero_()
    return layers


def _fit(
    model: nn.Module,
    chosen: torch.optim.Optimizer,
    steps: int,
    drawn: torch.Generator,
    factor: float = 1.0,
    count: int = 1500,
) -> list[float]:
    """Train on the digits with a rate that falls linearly to 0; the loss of each step."""
    from danlu.lab.printed import printed_digits

    pixels, labels = printed_digits(count, 1)
    pixels = pixels.to(next(model.parameters()).dtype)
    rates = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 1 - step / steps)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(labels), (_BATCH,), generator=drawn)
        loss = F.cross_entropy(model(pixels[rows]).float(), labels[rows])
        (loss * factor).backward()
        chosen.step()
        chosen.zero_grad()
        rates.step()
        losses.append(loss.item())
    return losses


def window_bytes(name: str, hidden: int = 256, layers: int = 6, micro_batches: int = 8) -> dict[str, int]:
    """Bytes of parameters, state, largest gradient, and of all tensors at the peak of a window with accumulation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from danlu.lab.measuring import peak_bytes
    from danlu.optim.folding import fold_in_backward

    config = LlamaConfig(
        vocab_size=2048, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    chosen: Any = optimiser(name, 1e-3)(model.parameters())
    handle = fold_in_backward(chosen) if name == "Tiger" else None
    ids = torch.arange(8)[None]

    def window() -> None:
        for _ in range(micro_batches):
            model(input_ids=ids, labels=ids).loss.backward()
        chosen.step()
        chosen.zero_grad()

    window()
    sizes = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
    state = sum(
        value.numel() * value.element_size()
        for values in chosen.state.values()
        for value in values.values()
        if isinstance(value, Tensor) and value.ndim > 0
    )
    above = peak_bytes(window)
    if handle is not None:
        handle.remove()
    return {"parameters": sum(sizes), "state": state, "largest": max(sizes), "peak": sum(sizes) + state + above}


def bytes_of_python() -> tuple[Tensor, Tensor]:
    """Two megabytes to train on and the start of what is held out, (bytes,), int64."""
    from danlu.lab.corpora import code

    corpus = code(2_000_000, 200_000)
    both = ("".join(documents).encode() for documents in (corpus.train, corpus.test))
    train, test = (torch.frombuffer(bytearray(text), dtype=torch.uint8).long() for text in both)
    return train, test


def byte_loss(
    name: str, rate: float, text: Tensor, held_out: Tensor, seed: int, windows: int = 120, length: int = 64
) -> float:
    """Loss per byte of a 2-layer Llama after training with 4 micro-batches of 8 rows per window."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from danlu.optim.folding import fold_in_backward
    from danlu.optim.groups import tiger_param_groups
    from danlu.optim.tiger import Tiger

    config = LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=length, initializer_range=96**-0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    chosen: Any
    if name == "Tiger":
        chosen = Tiger(tiger_param_groups(model), rate, 0.965)
        fold_in_backward(chosen)
    else:
        chosen = optimiser(name, rate)(model.parameters())
    warmup = 10
    rates = torch.optim.lr_scheduler.LambdaLR(
        chosen, lambda step: min(1.0, (step + 1) / warmup, 1.02 * (1 - step / windows))
    )
    drawn = torch.Generator().manual_seed(seed)
    for _ in range(windows):
        for _ in range(4):
            starts = torch.randint(len(text) - length, (8,), generator=drawn)
            ids = text[starts[:, None] + torch.arange(length)]
            (model(input_ids=ids, labels=ids).loss / 4).backward()
        chosen.step()
        chosen.zero_grad()
        rates.step()
    model.eval()
    rows = held_out[: 256 * length].view(-1, length)
    with torch.no_grad():
        return sum(model(input_ids=part, labels=part).loss.item() for part in rows.split(64)) / 4


def accumulation_gap(seed: int, windows: int = 24, micro_batches: int = 8) -> float:
    """Largest difference of theta and m between accumulating in the momentum and averaging first, float64."""
    from danlu.optim.tiger import Tiger

    drawn = torch.Generator().manual_seed(seed)
    start = torch.randn(64, 48, dtype=torch.float64, generator=drawn)
    folded, mean = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    one, two = Tiger([folded], 1e-2, accumulation_steps=micro_batches), Tiger([mean], 1e-2)
    for _ in range(windows):
        gradients = torch.randn(micro_batches, 64, 48, dtype=torch.float64, generator=drawn)
        for gradient in gradients:
            folded.grad = gradient
            one.step()
        mean.grad = gradients.mean(0)
        two.step()
    momenta = one.state[folded]["momentum"] / micro_batches - two.state[mean]["momentum"]
    return max((folded - mean).abs().max().item(), (1 - 0.965) * momenta.abs().max().item())
