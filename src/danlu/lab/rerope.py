"""Claims on ReRoPE, its inverse for training, and log n scaling of the queries."""

from __future__ import annotations

from danlu.context.methods import LeakyReRoPE, LogN
from danlu.lab import nano, toy
from danlu.lab.claim import Check, Context, Evidence
from danlu.lab.runner import claim

_WINDOWS = (8, 16, 24)


@claim(
    name="rerope-longer-lower",
    title="ReRoPE: longer context, lower loss",
    source="archive 9708, 9948",
    statement="With ReRoPE an untuned model reads far past its trained length, nothing changes within it, and its "
    "loss falls "
    "as the context grows.",
    measurement="Loss by context length up to 16 times the trained length, against the sliding window; and toy "
    "retrieval at 8 "
    "times the trained length, with trained periods (near) and one that only far distances reach (far), mean over "
    "seeds.",
    seeds=(0, 1),
    budget=180,
)
def rerope_longer_lower(context: Context) -> Evidence:
    """Text and toy, against plain RoPE and the sliding window."""
    stacks = {name: name for name in ("plain", "window", "rerope", "rerope+logn")}
    report = nano.read(context, stacks)
    runs: dict[str, tuple[toy.Toy, tuple[str, ...]]] = {
        "plain RoPE": (toy.Toy(), ()),
        "sliding window 32": (toy.Toy(), ("window:window=32",)),
    }
    runs |= {f"ReRoPE w{window}": (toy.Toy(), (f"rerope:window={window}",)) for window in _WINDOWS}
    runs["Leaky w8 k16"] = (toy.Toy(), ("leaky:window=8:stride=16",))
    mean = toy.mean_scores(context, runs)
    losses = {name: [report.at(name, length).loss for length in report.lengths] for name in report.stacks}
    best = min(("rerope", "rerope+logn"), key=lambda name: losses[name][-1])
    falling = losses[best]
    drift = abs(mean["ReRoPE w16"]["trained"] - mean["plain RoPE"]["trained"])
    far = max(mean["ReRoPE w8"]["far"], mean["ReRoPE w16"]["far"])
    plain, window = mean["plain RoPE"], mean["sliding window 32"]
    checks = [
        Check(
            f"text: {best} has a lower loss at every length past the trained one than at it",
            all(loss < falling[0] for loss in falling[1:]),
            ", ".join(f"{loss:.3f}" for loss in falling),
        ),
        Check(
            f"text: {best} loses less at every doubling up to 16x",
            all(a > b for a, b in zip(falling, falling[1:], strict=False)),
            ", ".join(f"{loss:.3f}" for loss in falling),
        ),
        Check(
            f"text: {best} is below the sliding window at 16x",
            falling[-1] < losses["window"][-1],
            f"{falling[-1]:.3f} and {losses['window'][-1]:.3f}",
        ),
        Check(
            "text: plain RoPE is above its own loss at the trained length by 0.3 at 16x",
            losses["plain"][-1] - losses["plain"][0] >= 0.3,
            f"{losses['plain'][-1]:.3f} and {losses['plain'][0]:.3f}",
        ),
        Check(
            "toy: ReRoPE w16 near at least .95", mean["ReRoPE w16"]["near"] >= 0.95, _two(mean["ReRoPE w16"]["near"])
        ),
        Check("toy: better of w8 and w16, far at least .85", far >= 0.85, _two(far)),
        Check("toy: within .01 of plain RoPE at the trained length", drift <= 0.01, f"{drift:.3f}"),
        Check(
            "toy: plain RoPE near at most .5 and far at most .1",
            plain["near"] <= 0.5 and plain["far"] <= 0.1,
            f"{_two(plain['near'])} and {_two(plain['far'])}",
        ),
        Check("toy: sliding window far at most .05", window["far"] <= 0.05, _two(window["far"])),
    ]
    return Evidence(
        summary=f"Text from 1x to 16x: {best} {falling[0]:.3f} to {falling[-1]:.3f}, window "
        f"{losses['window'][-1]:.3f}, plain "
        f"{losses['plain'][-1]:.2f}. Toy at 8x, near/far: ReRoPE w16 {_two(mean['ReRoPE w16']['near'])}/"
        f"{_two(mean['ReRoPE w16']['far'])}, window {_two(window['near'])}/{_two(window['far'])}, plain "
        f"{_two(plain['near'])}/{_two(plain['far'])}.",
        checks=tuple(checks),
        tables=(nano.loss_table(report), toy.score_table(mean)),
        plots=(nano.loss_plot(report, "ReRoPE, untrained"),),
        notes=(nano.setting(report), toy.SETTING),
    )


@claim(
    name="log-n",
    title="Clipped log n helps a model that was trained without it",
    source="archive 8823, 9706, 9708",
    statement="Multiplying queries by max(1, ln n / ln N) lowers the loss past the trained length N, on top of "
    "ReRoPE and of "
    "NTK scaling.",
    measurement="Loss by context length with and without the factor, for ReRoPE, NTK and NTK-mixed.",
    budget=150,
)
def log_n(context: Context) -> Evidence:
    """Pairs of stacks that differ in log n alone."""
    pairs = {name: f"{name}+logn" for name in ("rerope", "ntk", "ntk-mixed")}
    report = nano.read(context, {name: name for pair in pairs.items() for name in pair}, (1, 2, 4, 8))
    checks, gains = [], {}
    for name, helped in pairs.items():
        gain = [report.at(name, length).loss - report.at(helped, length).loss for length in report.lengths]
        gains[name] = gain[-1]
        checks += [
            Check(f"{name}: lower at 8x with log n", gain[3] > 0, f"gain {gain[3]:+.3f}"),
            Check(f"{name}: lower at 4x with log n", gain[2] > 0, f"gain {gain[2]:+.3f}"),
        ]
    same = max(abs(report.at("rerope", n).loss - report.at("rerope+logn", n).loss) for n in report.lengths[:1])
    checks.append(Check("unchanged within the trained length", same < 1e-4, f"{same:.1e}"))
    return Evidence(
        summary="Gain of log n at 8x, nats per token: "
        + ", ".join(f"{n} {gain:+.3f}" for n, gain in gains.items())
        + ".",
        checks=tuple(checks),
        tables=(nano.loss_table(report),),
        plots=(nano.loss_plot(report, "With and without log n"),),
        notes=(nano.setting(report),),
    )


@claim(
    name="leaky-inverse",
    title="Train with inverse Leaky ReRoPE, then use plain RoPE at any length",
    source="archive 9728",
    statement="A model trained with stretched far distances (stride 1/16) can be used with plain RoPE, at full speed, "
    "past its trained length.",
    measurement="Toy Llama trained at 32 tokens with window 8, stride 1/16, log n and rotary base 80000; tested at 256 "
    "tokens as plain RoPE with log n, against a toy trained with plain RoPE.",
    budget=180,
)
def leaky_inverse(context: Context) -> Evidence:
    """The inverse in training, against plain RoPE in training."""
    scaled = LogN(toy.TRAINED_LENGTH, clip=False)
    inverse = toy.Toy(base=80000.0, methods=(LeakyReRoPE(window=8, stride=1 / 16), scaled))
    mean = toy.mean_scores(context, {"plain RoPE throughout": (toy.Toy(), ()), "inverse": (inverse, (scaled,))})
    plain, trained = mean.values()
    gain = trained["near"] - plain["near"]
    checks = [
        Check("near at least .9", trained["near"] >= 0.9, _two(trained["near"])),
        Check("near above plain RoPE by .1", gain >= 0.1, f"{_two(trained['near'])} and {_two(plain['near'])}"),
        Check("far at least .5", trained["far"] >= 0.5, _two(trained["far"])),
        Check("at least .9 at the trained length", trained["trained"] >= 0.9, _two(trained["trained"])),
    ]
    return Evidence(
        summary=f"Plain RoPE at 8x, near/far: trained with the inverse {_two(trained['near'])}/{_two(trained['far'])}, "
        f"without {_two(plain['near'])}/{_two(plain['far'])}; {_two(trained['trained'])} at the trained length.",
        checks=tuple(checks),
        tables=(toy.score_table(mean),),
        plots=(toy.score_plot(mean, "Inverse Leaky ReRoPE in training"),),
        notes=(toy.SETTING, "A training step costs 2.5 times that of plain RoPE at this length of 32 tokens."),
    )


def _two(value: float) -> str:
    return f"{value:.2f}"
