"""Claims on rotary positions: the wall at the trained length, rescaled frequencies, the lower bound of the base."""

from __future__ import annotations

from danlu.lab import nano, toy
from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.runner import claim


@claim(
    name="rope-explodes",
    title="Plain RoPE fails past its trained length",
    source="archive 9675, 9948",
    statement="A RoPE model read directly past the length it was trained at (direct extrapolation) gets much worse.",
    measurement="Loss of the last tokens of unseen text with 1 to 16 times the trained length in front of them, "
    "plain RoPE.",
    budget=60,
)
def rope_explodes(context: Context) -> Evidence:
    """Read growing contexts with the unmodified model."""
    report = nano.read(context, {"plain": "plain"})
    losses = [report.at("plain", length).loss for length in report.lengths]
    checks = [
        Check(
            "loss at 2x is above the loss at 1x by 0.05", losses[1] - losses[0] >= 0.05, f"{losses[1] - losses[0]:+.3f}"
        ),
        Check(
            "loss at 4x is above the loss at 1x by 0.3", losses[2] - losses[0] >= 0.3, f"{losses[2] - losses[0]:+.3f}"
        ),
        Check(
            "loss rises at every doubling from 2x on",
            all(a < b for a, b in zip(losses[1:], losses[2:], strict=False)),
            ", ".join(f"{loss:.2f}" for loss in losses),
        ),
    ]
    return Evidence(
        summary=f"Loss {losses[0]:.2f} at the trained length, {losses[1]:.2f} at twice and {losses[-1]:.2f} at 16 "
        "times.",
        checks=tuple(checks),
        tables=(nano.loss_table(report),),
        plots=(nano.loss_plot(report, "Plain RoPE past its trained length"),),
        notes=(nano.setting(report),),
    )


@claim(
    name="ntk-order",
    title="NTK-mixed beats NTK beats PI, untrained",
    source="archive 9675, 9706",
    statement="Applied to a trained model without tuning, NTK-aware scaling beats position interpolation and the "
    "mixed-radix "
    "form beats both.",
    measurement="Loss by context length under PI, NTK and NTK-mixed, the factor chosen for each length.",
    budget=120,
)
def ntk_order(context: Context) -> Evidence:
    """Compare the frequency methods at 2 to 8 times the trained length."""
    stacks = {name: name for name in ("plain", "window", "pi", "ntk", "ntk-mixed")}
    report = nano.read(context, stacks, (1, 2, 4, 8))
    checks = []
    for multiple, length in zip((2, 4, 8), report.lengths[1:], strict=True):
        loss = {name: report.at(name, length).loss for name in stacks}
        for better, worse in (("ntk-mixed", "ntk"), ("ntk", "pi")):
            words = f"{multiple}x: {better} has a lower loss than {worse}"
            checks.append(Check(words, loss[better] < loss[worse], f"{loss[better]:.3f} against {loss[worse]:.3f}"))
    last = {name: report.at(name, report.lengths[-1]).loss for name in stacks}
    return Evidence(
        summary=f"At 8x: NTK-mixed {last['ntk-mixed']:.2f}, NTK {last['ntk']:.2f}, PI {last['pi']:.2f}, "
        f"plain {last['plain']:.2f}, sliding window {last['window']:.2f}.",
        checks=tuple(checks),
        tables=(nano.loss_table(report),),
        plots=(nano.loss_plot(report, "Frequency methods, untrained"),),
        notes=(nano.setting(report),),
    )


_TOY_STACKS = {
    "plain": (),
    "PI": ("pi:factor=8",),
    "NTK-old": ("ntk-old:factor=8",),
    "NTK": ("ntk:factor=8",),
    "NTK-fixed": ("ntk-fixed:factor=8",),
    "YaRN, 4 turns": ("yarn:factor=8:turns=4",),
}


@claim(
    name="yarn",
    title="YaRN is the best of the frequency methods",
    source="archive 9859, 9948; arXiv:2309.00071",
    statement="Without tuning, YaRN (frequencies by turns, and sharper logits) is far above NTK scaling and just "
    "below ReRoPE; "
    "PI without tuning collapses.",
    measurement="Toy Llama trained on repeated permutations of 32 tokens, tested at 256 with factor 8, mean over "
    "seeds; and "
    "the loss of danlu-nano by context length.",
    seeds=(0, 1),
    budget=150,
)
def yarn(context: Context) -> Evidence:
    """Toy retrieval under every frequency method, and nano's loss."""
    mean = toy.mean_scores(context, {name: (toy.Toy(), methods) for name, methods in _TOY_STACKS.items()})
    near = {name: score["near"] for name, score in mean.items()}
    report = nano.read(context, {name: name for name in ("plain", "ntk", "yarn", "rerope")}, (1, 2, 4, 8))
    loss = {name: report.at(name, report.lengths[-1]).loss for name in report.stacks}
    fall = mean["plain"]["trained"] - mean["PI"]["trained"]
    checks = [
        Check(
            "toy: PI is not above plain RoPE", near["PI"] <= near["plain"], f"{near['PI']:.2f} and {near['plain']:.2f}"
        ),
        Check("toy: PI loses 0.5 at the trained length", fall > 0.5, f"{fall:.2f}"),
        Check(
            "toy: NTK is above plain RoPE", near["NTK"] > near["plain"], f"{near['NTK']:.2f} and {near['plain']:.2f}"
        ),
        Check(
            "toy: YaRN is above NTK by 0.1",
            near["YaRN, 4 turns"] > near["NTK"] + 0.1,
            f"{near['YaRN, 4 turns']:.2f} and {near['NTK']:.2f}",
        ),
        Check("text: YaRN is below NTK at 8x", loss["yarn"] < loss["ntk"], f"{loss['yarn']:.2f} and {loss['ntk']:.2f}"),
    ]
    return Evidence(
        summary=f"Toy at 8x: YaRN {near['YaRN, 4 turns']:.2f}, NTK {near['NTK']:.2f}, PI {near['PI']:.2f}, plain "
        f"{near['plain']:.2f}; text at 8x: YaRN {loss['yarn']:.2f}, NTK {loss['ntk']:.2f}, ReRoPE "
        f"{loss['rerope']:.2f}.",
        checks=tuple(checks),
        tables=(toy.score_table(mean), nano.loss_table(report)),
        plots=(nano.loss_plot(report, "YaRN, untrained"),),
        notes=(toy.SETTING, nano.setting(report)),
    )


#: Length in tokens to the base of the article, d = 128, two significant digits.
_ARTICLE_BASES = {1024: 4.3e3, 2048: 1.2e4, 4096: 2.7e4, 8192: 8.4e4}


@claim(
    name="base-bound",
    title="The context length bounds the rotary base from below",
    source="archive 10122; arXiv:2405.14591",
    statement="A similar token scores above a random one at every distance below L only for bases above b*(L), which "
    "grows "
    "faster than L; feasibility is not monotone in the base.",
    measurement="Search for b*(L) at 128 rotated dims, the length that base 10000 carries, and bases around the "
    "islands.",
    budget=30,
)
def base_bound(context: Context) -> Evidence:
    """Recompute the article's table and look for islands."""
    import numpy as np

    from danlu.positions.bound import max_length, recommended_base, similarity_sum

    lengths = list(_ARTICLE_BASES)
    found = {}
    for length in context.track(lengths, description="searching bases", total=len(lengths)):
        found[length] = recommended_base(length, 128, safe=False).b_star
    reach = max_length(10000.0, 128)
    # A feasible base below an infeasible one: bisection over bases would go wrong between them.
    feasible = {base: max_length(float(base), 128, limit=1024) is None for base in (4310, 5000, 5625, 5800, 6100)}
    worst = max(abs(found[length] / base - 1) for length, base in _ARTICLE_BASES.items())
    half = all(max_length(base, 64, pass_through=64, limit=1 << 14) is None for base in (10.0, 1e3, 1e4, 1e6))
    checks = [
        Check("b*(1024) = 4293.8 within 0.1%", abs(found[1024] / 4293.8 - 1) < 1e-3, f"{found[1024]:.1f}"),
        Check("base 10000 carries 1707 tokens", reach == 1707, str(reach)),
        Check("the article's bases for 1k to 8k within 5%", worst < 0.05, f"largest deviation {worst:.1%}"),
        Check(
            "at 1024 tokens 4310, 5625 and 6100 are feasible, 5000 and 5800 between them are not",
            feasible == {4310: True, 5000: False, 5625: True, 5800: False, 6100: True},
            ", ".join(f"{base} {'yes' if is_so else 'no'}" for base, is_so in feasible.items()),
        ),
        Check("with half of the dims unrotated there is no bound", half, "bases 10 to 1e6, 16384 distances"),
    ]
    distances = np.arange(0, 4096, 16)
    lines = {f"base {base:g}": tuple(similarity_sum(distances, base, 128).tolist()) for base in (1e3, 1e4, 1e6)}
    return Evidence(
        summary=f"b*(1024) = {found[1024]:.1f}, base 10000 carries {reach} tokens; the article's bases up to 8k are "
        "met "
        f"within {worst:.1%}.",
        checks=tuple(checks),
        tables=(
            Table(
                "Least feasible base, 128 rotated dims",
                ("length", "found", "article"),
                tuple((length, found[length], base) for length, base in _ARTICLE_BASES.items()),
            ),
        ),
        plots=(
            Plot("Mean advantage of a similar key", "distance", "sum of cosines", tuple(distances.tolist()), lines),
            Plot(
                "Least feasible base",
                "context length",
                "base / 1000",
                tuple(float(length) for length in lengths),
                {
                    "found": tuple(found[length] / 1000 for length in lengths),
                    "article": tuple(base / 1000 for base in _ARTICLE_BASES.values()),
                },
                log_x=True,
            ),
        ),
    )
