"""The linear recurrence, forward and backward: against a loop over time, ``torch.associative_scan`` and other forms.

The peer of the loop is the batched one: one multiplication and one addition for each step, autograd as it is. The forms
of the source, Upper/Lower over the whole length and the Fourier transform, run forward and backward as well.

    python benchmarks/scan.py [--length 16384] [--repeats 7] [--compiled]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from danlu.context.memory import PeakMemory
from danlu.kernels.scan import linear_scan

BATCH, CHANNELS = 4, 64


def step_loop(a: Tensor, u: Tensor) -> Tensor:
    h, states = torch.zeros_like(u[:, 0]), []
    for x in u.unbind(1):
        h = a * h + x
        states.append(h)
    return torch.stack(states, 1)


def upper_lower(a: Tensor, u: Tensor) -> Tensor:
    batch, length, channels = u.shape
    powers = a[None]
    while 2 * len(powers) <= length:
        powers = torch.cat((powers, powers * powers[-1]))
    h, half = u.clone(), 1
    while half < length:
        lower, upper = h.view(batch, -1, 2, half, channels).unbind(2)
        h = torch.stack((lower, upper + powers[:half] * lower[:, :, -1:]), 2)
        half *= 2
    return h.view(u.shape)


def fourier(a: Tensor, u: Tensor) -> Tensor:
    length = u.shape[1]
    powers = a[None]
    while 2 * len(powers) <= length:
        powers = torch.cat((powers, powers * powers[-1]))
    kernel = torch.cat((torch.ones_like(powers[:1]), powers[:-1]))
    product = torch.fft.fft(u, 2 * length, dim=1) * torch.fft.fft(kernel, 2 * length, dim=0)
    return torch.fft.ifft(product, dim=1)[:, :length]


def associative(a: Tensor, u: Tensor, mode: str) -> Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    return associative_scan(combine, (a.expand_as(u).clone(), u), dim=1, combine_mode=mode)[1]


@functools.cache
def compiled_associative() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(functools.partial(associative, mode="generic"))


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "danlu, loops": linear_scan,
    "danlu, tensor form": functools.partial(linear_scan, backend="torch"),
    "loop over time": step_loop,
    "Upper/Lower, whole length": upper_lower,
    "Fourier": fourier,
    "associative_scan, eager": functools.partial(associative, mode="generic"),
}
#: With --compiled: compiling it takes minutes at the default length.
COMPILED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "associative_scan, compiled": lambda a, u: compiled_associative()(a, u),
}


def problem(dtype: torch.dtype, length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    radius = 0.9 + 0.099 * torch.rand(CHANNELS, generator=generator)
    angle = 6.28 * torch.rand(CHANNELS, generator=generator)
    a = torch.polar(radius, angle) if dtype.is_complex else radius
    u, g = (torch.randn(BATCH, length, CHANNELS, dtype=dtype, generator=generator) for _ in range(2))
    return a.requires_grad_(), u.requires_grad_(), g


def run(form: Callable[[Tensor, Tensor], Tensor], a: Tensor, u: Tensor, g: Tensor) -> tuple[float, float, Tensor]:
    start = time.perf_counter()
    h = form(a, u)
    middle = time.perf_counter()
    torch.autograd.grad(h, (a, u), g.to(h.dtype))
    return middle - start, time.perf_counter() - middle, h.detach()


def first_run(form: Callable[[Tensor, Tensor], Tensor], a: Tensor, u: Tensor, g: Tensor, expected: Tensor) -> str:
    """Why a form cannot take part, or nothing."""
    try:
        _, _, h = run(form, a, u, g)
    except Exception as error:  # whatever a prototype raises is the result
        return f"fails: {type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"
    error = ((h - expected).abs().max() / expected.abs().max()).item()
    return "" if error < 1e-3 else f"wrong by {error:.0e}"


def peak(form: Callable[[Tensor, Tensor], Tensor], a: Tensor, u: Tensor, g: Tensor) -> float:
    """Most memory above the level before, forward and backward, as a multiple of the input's."""
    with PeakMemory(u.device) as memory:
        run(form, a, u, g)
    return float("nan") if memory.bytes is None else memory.bytes / (u.numel() * u.element_size())


def table(dtype: torch.dtype, length: int, repeats: int) -> list[str]:
    a, u, g = problem(dtype, length)
    expected = run(linear_scan, a, u, g)[2]
    notes = {name: first_run(form, a, u, g, expected) for name, form in FORMS.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name, note in notes.items() if not note}
    for _ in range(repeats):
        for name in times:
            times[name].append(run(FORMS[name], a, u, g)[:2])
    ours = [sum(pair) for pair in times["danlu, loops"]]
    lines = [
        f"## {dtype}".replace("torch.", ""),
        "",
        "| form | forward, ms | backward, ms | both: times ours (median of pairs) | peak memory, times the input |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, note in notes.items():
        if note:
            lines.append(f"| {name} | {note} | | | |")
            continue
        forward, backward = (1e3 * statistics.median(column) for column in zip(*times[name], strict=True))
        ratio = statistics.median(sum(pair) / our for pair, our in zip(times[name], ours, strict=True))
        memory = peak(FORMS[name], a, u, g)
        lines.append(f"| {name} | {forward:.1f} | {backward:.1f} | {ratio:.1f} | {memory:.1f} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=16384, help="a power of two")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compiled", action="store_true", help="the compiled associative_scan as well")
    options = parser.parse_args()
    if options.compiled:
        FORMS.update(COMPILED)
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
    lines = [
        "# Linear recurrence h = a h + u, constant a",
        "",
        f"Batch {BATCH}, {CHANNELS} channels, length {options.length}, CPU, {torch.get_num_threads()} threads; "
        f"{options.repeats} interleaved runs, medians. Memory is the growth of the resident set in one forward and "
        "backward pass; the gradient that comes in is not counted.",
        "",
    ]
    for dtype in (torch.complex64, torch.float32):
        lines += table(dtype, options.length, options.repeats)
    text = "\n".join(lines)
    print(text)
    if options.length == parser.get_default("length") and options.repeats == parser.get_default("repeats"):
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
