"""Claims on what an attention operator can concentrate on, and on attention as a recurrence of constant size."""

from __future__ import annotations

import math
from collections.abc import Callable
from math import comb
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.attention.measure import attention_stats
from danlu.attention.sparsity import causal_logdet, effective_rank, numerical_rank
from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.measuring import peak_bytes
from danlu.lab.runner import claim

_WIDTH, _QUERIES, _KEYS = 64, 200, (256, 512, 1024, 2048, 4096, 8192)
_LENGTHS, _LAYERS = (8, 16, 32, 64), 2
_LONG = 32768

Map = Callable[[Tensor], Tensor]
#: feature map, kernel and scale of each operator
OPERATORS: dict[str, tuple[Map, Any, float]] = {
    "softmax, scale 1/4": (lambda x: x, "softmax", 1 / 4),
    "softmax, scale 1/8": (lambda x: x, "softmax", 1 / 8),
    "squared ReLU, scale 1/8": (lambda x: x, lambda s: s.relu().square(), 1 / 8),
    "linear, elu + 1": (lambda x: F.elu(x) + 1, lambda s: s, 1.0),
    "linear, ReLU": (torch.relu, lambda s: s, 1.0),
    "linear, exp": (torch.exp, lambda s: s, 1.0),
    "linear, identity": (lambda x: x, lambda s: s, 1.0),
}
_NONNEGATIVE = ("linear, elu + 1", "linear, ReLU", "linear, exp")


def concentration(name: str, keys: int, seed: int) -> dict[str, float]:
    """Mean effective tokens, sparsity and hit rate when every query is a copy of one of the keys.

    Args:
        name: of ``OPERATORS``.
        keys: how many random keys of 64 dimensions.
        seed: of keys and queries.

    Returns:
        ``effective``, ``sparsity`` and ``hits``, the share of queries whose own key has the largest weight.
    """
    features, kernel, scale = OPERATORS[name]
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(keys, _WIDTH, generator=generator)
    targets = torch.randint(keys, (_QUERIES,), generator=generator)
    k, q = features(k), features(k[targets])
    stats = attention_stats(q[None, None], k[None, None], kernel=kernel, scale=scale, targets=targets[None, None])
    mass = stats.target_mass
    if mass is None:
        raise ValueError("targets were given: there must be a mass on them")
    hits = mass >= stats.max_probability * (1 - 1e-6)
    return {
        "effective": stats.effective_tokens.mean().item(),
        "sparsity": stats.sparsity.mean().item(),
        "hits": hits.double().mean().item(),
    }


def ranks(n: int, d: int, seed: int) -> list[tuple[str, float, int]]:
    """Effective and numerical rank of random attention matrices: name, effective rank, numerical rank."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, d, dtype=torch.float64, generator=generator) for _ in range(2))
    scores = q @ k.T / math.sqrt(d)
    past = torch.ones(n, n, dtype=torch.bool).tril()
    wide = torch.randn(d, 2 * d, dtype=torch.float64, generator=generator) / math.sqrt(d)
    linear = torch.relu(q @ wide) @ torch.relu(k @ wide).T + 1e-9
    back, ahead = (scores.masked_fill(~mask, -torch.inf).softmax(-1) for mask in (past, past.T))
    matrices = {
        "softmax, bidirectional": scores.softmax(-1),
        "softmax, causal": back,
        "mean of forward and backward": (back + ahead) / 2,
        f"linear with {2 * d} features, bidirectional": linear / linear.sum(-1, keepdim=True),
        f"linear with {2 * d} features, causal": linear.tril() / linear.tril().sum(-1, keepdim=True),
    }
    if not math.isfinite(float(causal_logdet(back))):
        raise ValueError("a causal softmax has a positive diagonal, so its log-determinant must be finite")
    return [(name, float(effective_rank(m)), int(numerical_rank(m))) for name, m in matrices.items()]


@claim(
    name="attention-concentration",
    title="Linear attention cannot concentrate, softmax can",
    source="archive 9889, 9529",
    statement="Softmax attention can be as sparse as it likes; linear attention with non-negative features cannot, "
    "because its sparsity is the ratio of mean to spread of the features.",
    measurement="Every query is a copy of one of n random keys (64 dimensions, n up to 8192): effective number of "
    "tokens 1 / sum p^2 under softmax, squared ReLU and linear kernels, and how often the query's own key has the "
    "largest weight.",
    seeds=(0, 1),
    budget=15,
)
def attention_concentration(context: Context) -> Evidence:
    """Measure all operators at all numbers of keys."""
    runs = [(name, n) for name in OPERATORS for n in _KEYS]
    found: dict[tuple[str, int], dict[str, float]] = {}
    for name, n in context.track(runs, description="operators", total=len(runs)):
        each = [concentration(name, n, seed) for seed in context.seeds]
        found[name, n] = {field: sum(one[field] for one in each) / len(each) for field in each[0]}
    last, sharp = _KEYS[-1], "softmax, scale 1/4"
    floor = math.sqrt(2 / math.pi)
    checks = [
        Check(
            f"{sharp}: fewer than 3 effective tokens of {last}",
            found[sharp, last]["effective"] < 3,
            f"{found[sharp, last]['effective']:.1f}",
        ),
        *(
            Check(
                f"{name}: more than half of the {last} keys in use",
                found[name, last]["effective"] > last / 2,
                f"{found[name, last]['effective']:.0f}",
            )
            for name in _NONNEGATIVE
        ),
        Check(
            f"linear without a feature map: sparsity near its floor sqrt(2/pi) = {floor:.3f}, for its keys have mean 0",
            abs(found["linear, identity", last]["sparsity"] - floor) < 0.01,
            f"{found['linear, identity', last]['sparsity']:.3f}",
        ),
    ]
    rows: tuple[tuple[Any, ...], ...] = tuple(
        (name, *(found[name, n]["effective"] for n in _KEYS), found[name, last]["sparsity"], found[name, last]["hits"])
        for name in OPERATORS
    )
    matrices = ranks(256, 16, context.seeds[0])
    return Evidence(
        summary=f"Of {last} keys, softmax at scale 1/4 uses {found[sharp, last]['effective']:.1f}, at 1/8 "
        f"{found['softmax, scale 1/8', last]['effective']:.0f}, linear attention with elu + 1 "
        f"{found['linear, elu + 1', last]['effective']:.0f}.",
        checks=tuple(checks),
        tables=(
            Table(
                "Effective tokens by number of keys; sparsity and hit rate at the largest",
                ("operator", *(f"n = {n}" for n in _KEYS), "sparsity", "own key first"),
                rows,
            ),
            Table(
                "Rank of random attention matrices, n = 256, d = 16",
                ("matrix", "effective rank", "numerical rank"),
                tuple(matrices),
            ),
        ),
        plots=(
            Plot(
                "How many tokens attention spreads over",
                "number of keys",
                "effective tokens, share of n",
                tuple(float(n) for n in _KEYS),
                {name: tuple(found[name, n]["effective"] / n for n in _KEYS) for name in OPERATORS},
                log_x=True,
            ),
        ),
        notes=(
            "Linear attention is measured with the features as they are: a trained map may do better by growing the "
            "spread of its features, within the bound of the formula.",
            "The article's remark that more features help does not hold by the formula: the ratio of norms it relies "
            "on lies in [1/sqrt(d), 1]; see the documentation.",
            "Ranks are shown for orientation: formally any causal matrix has full rank, but a causal softmax has no "
            "larger effective rank than a bidirectional one.",
        ),
    )


def depth_first(length: int, seed: int) -> tuple[int, int, int, float]:
    """Evaluations, exponentials, live numbers and error of a depth-first evaluation of a random two-layer model."""
    from danlu.attention.streaming.rescan import depth_first_logits

    model = small_llama(_LAYERS, seed)
    ids = torch.randint(64, (1, length), generator=torch.Generator().manual_seed(seed))
    logits, count = depth_first_logits(model, ids)
    with torch.no_grad():
        error = (logits - model(ids).logits[0, -1]).abs().max().item()
    return count.evaluations, count.exponentials, count.live_numbers, error


def small_llama(layers: int, seed: int) -> Any:
    """A random Llama of width 32 in float64 with peaked attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def policies(steps: int, seed: int) -> list[tuple[str, int, float, float, bool]]:
    """Cache policies on a small decoder: name, numbers kept, share of the usual, flops of a step, same tokens."""
    from transformers import DynamicCache

    from danlu.attention.streaming.cost import recompute_cost
    from danlu.attention.streaming.recompute import RecomputeCache

    model = small_llama(4, seed)
    ids = torch.randint(64, (1, 24), generator=torch.Generator().manual_seed(seed))
    rows: list[tuple[str, int, float, float, bool]] = []
    wanted = _greedy(model, ids, DynamicCache(config=model.config), steps)
    usual = recompute_cost(model, 24 + steps, "kv").numbers
    settings: list[tuple[str, Any, int]] = [
        ("keys and values", "kv", 1),
        ("layer inputs", "x", 1),
        ("input of every 2nd layer", "x", 2),
        ("input of every 4th layer", "x", 4),
        ("token ids", "ids", 1),
    ]
    for name, policy, every in settings:
        cache = RecomputeCache(model, policy, every=every)
        same = torch.equal(_greedy(model, ids, cache, steps), wanted)
        flops = recompute_cost(model, 24 + steps, policy, every).flops
        rows.append((name, cache.numbers(), cache.numbers() / usual, float(flops), same))
    return rows


def _greedy(model: Any, ids: Tensor, cache: Any, steps: int) -> Tensor:
    chosen = []
    with torch.no_grad():
        for _ in range(steps + 1):
            ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            chosen.append(ids)
    return torch.cat(chosen, 1)


def long_attention(length: int) -> tuple[int, int, int]:
    """Peak bytes of chunked attention with one head of 64, causal and by segments; and of the matrix it never forms."""
    from danlu.attention.streaming.state import chunked_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, length, 64, generator=generator) for _ in range(3))
    segments = (torch.arange(length) // 2048)[None]
    plain = peak_bytes(lambda: chunked_attention(q, k, v, causal=True))
    packed = peak_bytes(lambda: chunked_attention(q, k, v, causal=True, segment_ids=segments))
    return plain, packed, 4 * length * length


@claim(
    name="attention-as-rnn",
    title="A transformer is an RNN of constant state that reads its history again",
    source="archive 10017; arXiv:2112.05682",
    statement="Softmax attention is a recurrence over a state of constant size, so a decoder can run in constant "
    "hidden memory; what it spends instead is computation, growing as a binomial of length and depth.",
    measurement="A two-layer model evaluated depth first with nothing kept but token ids, at 8 to 64 tokens: numbers "
    "held and layer evaluations. Cache policies between that and keys and values: same greedy tokens. Chunked "
    "attention at 32768 tokens: peak memory of tensors.",
    budget=25,
)
def attention_as_rnn(context: Context) -> Evidence:
    """Count, compare and measure."""
    seed, measured = context.seeds[0], {}
    for length in context.track(_LENGTHS, description="depth first", total=len(_LENGTHS)):
        measured[length] = depth_first(length, seed)
    kept = policies(24, seed)
    plain, packed, matrix = long_attention(_LONG)
    live = {row[2] for row in measured.values()}
    on_curve = all(
        (row[0], row[1]) == (comb(n + _LAYERS - 1, _LAYERS - 1), comb(n + _LAYERS, _LAYERS) - 1)
        for n, row in measured.items()
    )
    error = max(row[3] for row in measured.values())
    checks = (
        Check("numbers held are the same at every length", len(live) == 1, f"{sorted(live)}"),
        Check(
            "evaluations and exponentials are the binomials", on_curve, f"{measured[64][0]}, {measured[64][1]} at 64"
        ),
        Check("logits are those of the host", error < 1e-9, f"{error:.1e}"),
        Check("every cache policy gives the same greedy tokens", all(row[4] for row in kept), f"{len(kept)} policies"),
        Check(
            f"chunked attention at {_LONG} tokens takes less than 10 % of the attention matrix",
            max(plain, packed) < 0.1 * matrix,
            f"{plain / 2**20:.0f} and {packed / 2**20:.0f} MiB of {matrix / 2**20:.0f}",
        ),
    )
    return Evidence(
        summary=f"{sorted(live)[0]} numbers held at every length, {measured[64][0]} layer evaluations for token 64; "
        f"chunked attention over {_LONG} tokens takes {max(plain, packed) / 2**20:.0f} MiB where the matrix would take "
        f"{matrix / 2**30:.0f} GiB.",
        checks=checks,
        tables=(
            Table(
                "Nothing kept but token ids",
                ("length", "layer evaluations", "exponentials per head", "numbers held", "largest error"),
                tuple((n, *row) for n, row in measured.items()),
            ),
            Table(
                "Between that and a cache of keys and values (4 layers of width 32, 48 tokens)",
                ("kept", "numbers", "of the usual", "flops recomputed per step", "same tokens"),
                tuple((*row[:4], "yes" if row[4] else "no") for row in kept),
            ),
        ),
        plots=(
            Plot(
                "Work for the last token, nothing kept",
                "length",
                "count",
                tuple(float(n) for n in _LENGTHS),
                {
                    "layer evaluations": tuple(float(measured[n][0]) for n in _LENGTHS),
                    "exponentials per head": tuple(float(measured[n][1]) for n in _LENGTHS),
                    "numbers held": tuple(float(measured[n][2]) for n in _LENGTHS),
                },
                log_x=True,
            ),
        ),
        notes=(
            "The source's frame holds query and state; a residual layer must also hold its input, counted here.",
            "Token ids and outputs are not counted as memory, as in the source.",
        ),
    )
