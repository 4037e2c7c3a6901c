"""Claims on Tiger and Lion: one rate for all sizes, half precision, memory with accumulation, not finite gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.runner import claim

Build = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

_WIDTHS, _STEPS, _BATCH, _BETA = (32, 128, 512), 150, 64, 0.945
_GRIDS = {
    "Tiger": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "sign momentum": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "Lion": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "AdamW": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
_DIGITS = (
    "The task is printed digits of 8x8 pixels, drawn from the fonts of Matplotlib, turned, moved and noisy; the "
    "article has none of its own for this statement.",
    "The network is 64 - width - width - 10 with ReLU, weights of standard deviation fan_in^-0.5, batch 64.",
)


@claim(
    name="tiger-scale",
    title="One learning rate for all widths",
    source="archive 9512",
    statement="With rates relative to the RMS of each parameter, Tiger's best learning rate is the same for models of "
    "any size, and its quality is on a level with AdamW's.",
    measurement="Printed digits, widths 32, 128 and 512, 150 steps, five learning rates each for Tiger, plain sign "
    "momentum, Lion and AdamW; test loss, mean over seeds.",
    seeds=(0, 1),
    budget=90,
)
def tiger_scale(context: Context) -> Evidence:
    """Every optimiser at every width and rate."""
    losses: dict[str, dict[int, list[float]]] = {name: {} for name in _GRIDS}
    cells = [(name, width, rate) for name, rates in _GRIDS.items() for width in _WIDTHS for rate in rates]
    for name, width, rate in context.track(cells, description="widths and rates", total=len(cells)):
        runs = [test_loss(optimiser(name, rate), width, seed, _STEPS) for seed in context.seeds]
        losses[name].setdefault(width, []).append(sum(runs) / len(runs))
    best = {name: [_GRIDS[name][_lowest(row)] for row in by_width.values()] for name, by_width in losses.items()}
    lowest = {name: [min(row) for row in by_width.values()] for name, by_width in losses.items()}
    ratio = [a / b for a, b in zip(lowest["Tiger"], lowest["AdamW"], strict=True)]
    checks = (
        Check("Tiger's best rate is the same at all widths", len(set(best["Tiger"])) == 1, _words(best["Tiger"])),
        Check("that of plain sign momentum is not", len(set(best["sign momentum"])) > 1, _words(best["sign momentum"])),
        Check("Tiger's best loss is at most 1.25 of AdamW's at each width", max(ratio) <= 1.25, _words(ratio, ".2f")),
    )
    rows: list[tuple[Any, ...]] = [
        (name, width, *losses[name][width], f"{best[name][place]:g}")
        for name in _GRIDS
        for place, width in enumerate(_WIDTHS)
    ]
    names = ("optimiser", "width", "1st rate", "2nd rate", "3rd rate", "4th rate", "5th rate", "best rate")
    return Evidence(
        summary=f"Best rate at widths 32/128/512: Tiger {_words(best['Tiger'])}, sign momentum "
        f"{_words(best['sign momentum'])}, Lion {_words(best['Lion'])}, AdamW {_words(best['AdamW'])}; best loss "
        f"against AdamW's {_words(ratio, '.2f')}.",
        checks=checks,
        tables=(Table("Test loss by learning rate, each optimiser on its own grid", names, tuple(rows)),),
        plots=tuple(
            Plot(
                name,
                "learning rate",
                "test loss, at most 2.5",
                _GRIDS[name],
                {f"width {width}": tuple(min(x, 2.5) for x in row) for width, row in losses[name].items()},
                log_x=True,
            )
            for name in ("Tiger", "sign momentum", "AdamW")
        ),
        notes=_DIGITS,
    )


@claim(
    name="tiger-half-precision",
    title="Training in bfloat16 alone",
    source="archive 9512; arXiv:1502.02551",
    statement="Since a sign makes every step as large as its rate, Tiger trains with parameters and state in half "
    "precision.",
    measurement="Printed digits, width 128, 1200 steps at three learning rates, parameters and momentum in float32, in "
    "bfloat16 with stochastic rounding, and in bfloat16 rounded to nearest; test loss, mean over seeds.",
    seeds=(0, 1),
    budget=90,
)
def tiger_half_precision(context: Context) -> Evidence:
    """Three ways to keep numbers at three rates."""
    ways = {"float32": (torch.float32, True), "stochastic": (torch.bfloat16, True), "nearest": (torch.bfloat16, False)}
    rates = (1e-3, 2e-3, 4e-3)
    cells = [(way, rate) for way in ways for rate in rates]
    losses: dict[str, list[float]] = {way: [] for way in ways}
    for way, rate in context.track(cells, description="types and rates", total=len(cells)):
        dtype, rounding = ways[way]
        build = optimiser("Tiger", rate, stochastic_rounding=rounding)
        runs = [test_loss(build, 128, seed, 1200, dtype) for seed in context.seeds]
        losses[way].append(sum(runs) / len(runs))
    near = [a / b for a, b in zip(losses["stochastic"], losses["float32"], strict=True)]
    plain = [a / b for a, b in zip(losses["nearest"], losses["float32"], strict=True)]
    checks = (
        Check(
            "stochastic rounding is within 3% of float32 at each rate",
            max(abs(x - 1) for x in near) <= 0.03,
            _words(near, ".3f"),
        ),
        Check("rounding to nearest is at least 1.5 times worse at each rate", min(plain) >= 1.5, _words(plain, ".2f")),
    )
    return Evidence(
        summary=f"Loss against float32 at rates {_words(rates)}: stochastic rounding {_words(near, '.3f')}, rounding "
        f"to nearest {_words(plain, '.2f')}.",
        checks=checks,
        tables=(
            Table(
                "Test loss",
                ("parameters and momentum", *(f"rate {rate:g}" for rate in rates)),
                tuple((way, *row) for way, row in losses.items()),
            ),
        ),
        plots=(
            Plot("bfloat16 and float32", "learning rate", "test loss", rates,
                 {way: tuple(row) for way, row in losses.items()}, log_x=True),
        ),
        notes=(
            *_DIGITS,
            "The article argues with the range of float16; the precision of bfloat16 is what breaks, and only at the "
            "small steps of long trainings.",
        ),
    )  # fmt: skip


@claim(
    name="tiger-memory",
    title="Parameters, one momentum, one gradient",
    source="archives 9512, 8634",
    statement="The momentum of Tiger is also the accumulator of gradients, so that training with accumulation needs "
    "less memory than with Lion, and that less than with AdamW, at the same quality.",
    measurement="A Llama of 7 million parameters: bytes alive at the peak of a window of 8 micro-batches, counted by "
    "tensor. A smaller one on bytes of Python: held-out loss after 120 windows of 4, the better of two rates each. "
    "Random gradients: accumulation in the momentum against their mean, float64.",
    budget=120,
)
def tiger_memory(context: Context) -> Evidence:
    """Memory on one model, quality on another, the identity on a matrix."""
    names = ("Tiger", "Lion", "AdamW")
    peaks = {name: window_bytes(name) for name in names}
    parameters, largest = peaks["Tiger"]["parameters"], peaks["Tiger"]["largest"]
    ideal = 2 * parameters + largest
    text, held_out = _bytes_of_python()
    rates = {"Tiger": (5e-3, 1e-2), "Lion": (5e-4, 1e-3), "AdamW": (3e-3, 1e-2)}
    cells = [(name, rate) for name in names for rate in rates[name]]
    losses: dict[str, list[float]] = {name: [] for name in names}
    for name, rate in context.track(cells, description="byte models", total=len(cells)):
        losses[name].append(byte_loss(name, rate, text, held_out, context.seeds[0]))
    lowest = {name: min(row) for name, row in losses.items()}
    gap = accumulation_gap(context.seeds[0])
    measured = {name: peaks[name]["peak"] / parameters for name in names}
    checks = (
        Check(
            "Tiger: parameters + momentum + largest gradient, to 5%",
            abs(peaks["Tiger"]["peak"] / ideal - 1) <= 0.05,
            f"{peaks['Tiger']['peak'] / ideal:.3f} of that",
        ),
        Check(
            "memory Tiger < Lion < AdamW", measured["Tiger"] < measured["Lion"] < measured["AdamW"], _times(measured)
        ),
        Check(
            "Tiger's held-out loss at most 1.02 of AdamW's",
            lowest["Tiger"] <= 1.02 * lowest["AdamW"],
            f"{lowest['Tiger']:.3f}, {lowest['AdamW']:.3f}",
        ),
        Check("accumulation equals the mean gradient to 1e-12", gap <= 1e-12, f"{gap:.1e}"),
    )
    return Evidence(
        summary=f"Peak in copies of the parameters: {_times(measured)}; held-out loss Tiger {lowest['Tiger']:.3f}, "
        f"Lion {lowest['Lion']:.3f}, AdamW {lowest['AdamW']:.3f}.",
        checks=checks,
        tables=(
            Table(
                "Peak of a window of 8 micro-batches, MB",
                ("optimiser", "parameters", "state", "largest gradient", "peak", "peak / parameters"),
                tuple(
                    (name, *(peaks[name][key] / 1e6 for key in ("parameters", "state", "largest", "peak")), ratio)
                    for name, ratio in measured.items()
                ),
            ),
            Table(
                "Held-out loss per byte, nats",
                ("optimiser", "lower rate", "loss", "higher rate", "loss there"),
                tuple(
                    (name, rates[name][0], losses[name][0], rates[name][1], losses[name][1]) for name in names
                ),
            ),
        ),
        plots=(
            Plot("Peak of training with accumulation", "optimiser", "copies of the parameters", (0, 1, 2),
                 {"measured": tuple(measured.values())}, x_names=names),
        ),
        notes=(
            "Lion and AdamW accumulate in .grad; Tiger's gradients are folded into the momentum inside the backward "
            "pass and freed. The batch of the memory run is tiny, so that activations are below 1%.",
            "The article measured its own model; its order of quality, Lion >= Tiger >= AdamW, is not a check here.",
        ),
    )  # fmt: skip


@claim(
    name="tiger-nonfinite",
    title="Shrinking rescues a run whose activations overflow",
    source="archive 9512",
    statement="A gradient that is NaN in half precision alone means that numbers have grown too large: shrinking the "
    "parameters by 1% instead of stepping brings the run back.",
    measurement="Printed digits, float16 throughout, two layers before a LayerNorm drawn 300 times too wide, which "
    "changes nothing in float32 and overflows in float16: Tiger that shrinks, Tiger that skips as loss scaling does, "
    "and Tiger in float32; 400 steps, worst over seeds.",
    seeds=(0, 1),
    budget=60,
)
def tiger_nonfinite(context: Context) -> Evidence:
    """The same start in float16 with two answers, and in float32."""
    runs = {
        "float16, shrink": (torch.float16, "shrink"),
        "float16, skip": (torch.float16, "skip"),
        "float32": (torch.float32, "shrink"),
    }
    curves: dict[str, list[list[float]]] = {name: [] for name in runs}
    cells = [(name, seed) for name in runs for seed in context.seeds]
    for name, seed in context.track(cells, description="overflows", total=len(cells)):
        dtype, answer = runs[name]
        curves[name].append(overflow_curve(dtype, answer, seed))
    ends = {name: max(sum(curve[-50:]) / len(curve[-50:]) for curve in rows) for name, rows in curves.items()}
    lost = {name: max(sum(not math.isfinite(x) for x in curve) for curve in rows) for name, rows in curves.items()}
    shrunk, skipped, single = runs
    steps = len(curves[single][0])
    checks = (
        Check("in float32 the start trains, to a loss below 0.1", ends[single] < 0.1, f"{ends[single]:.3f}"),
        Check("in float16, shrinking, it does so too", ends[shrunk] < 0.1, f"{ends[shrunk]:.3f}"),
        Check("in float16, skipping, no loss is ever finite", lost[skipped] == steps, f"{lost[skipped]} of {steps}"),
    )
    every = range(0, steps, 10)
    return Evidence(
        summary=f"Training loss at the end: float16 with shrinking {ends[shrunk]:.3f} after {lost[shrunk]} steps "
        f"without a finite loss, with skipping {_loss(ends[skipped])}, float32 {ends[single]:.3f}.",
        checks=checks,
        tables=(
            Table(
                "Mean training loss of the last 50 steps, and steps lost, worst seed",
                ("run", "loss", "steps without a finite loss"),
                tuple((name, ends[name], lost[name]) for name in runs),
            ),
        ),
        plots=(
            Plot("First seed, where the loss is finite", "step", "training loss, at most 5", tuple(map(float, every)),
                 {name: tuple(_shown(rows[0][step]) for step in every) for name, rows in curves.items()}),
        ),
        notes=(
            _DIGITS[0],
            "The start is made too wide on purpose; the article speaks of runs that are sound in float32.",
            "The loss is multiplied by 1024, which cancels in the sign, so that gradients do not underflow.",
        ),
    )  # fmt: skip


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


def test_loss(build: Build, width: int, seed: int, steps: int, dtype: torch.dtype = torch.float32) -> float:
    """Loss on digits that were not trained on."""
    from danlu.lab.printed import printed_digits

    drawn = torch.Generator().manual_seed(seed)
    first, second, last = _layers(width, drawn)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last).to(dtype)
    _fit(model, build(model.parameters()), steps, drawn)
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
    model: nn.Module, chosen: torch.optim.Optimizer, steps: int, drawn: torch.Generator, factor: float = 1.0
) -> list[float]:
    """Train on the digits with a rate that falls linearly to 0; the loss of each step."""
    from danlu.lab.printed import printed_digits

    pixels, labels = printed_digits(1500, 1)
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


def _bytes_of_python() -> tuple[Tensor, Tensor]:
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


def _lowest(row: Sequence[float]) -> int:
    return min(range(len(row)), key=row.__getitem__)


def _words(numbers: Iterable[float], form: str = "g") -> str:
    return "/".join(format(x, form) for x in numbers)


def _times(ratios: dict[str, float]) -> str:
    return ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())


def _loss(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not finite"


def _shown(value: float) -> float | None:
    return min(value, 5.0) if math.isfinite(value) else None
