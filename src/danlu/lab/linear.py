"""Claims on linear attention and on attention to quantised keys."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.runner import claim

_TOKENS, _DIM, _CLUSTERS, _SPREAD = 2048, 32, 64, 0.3
_SIZES = (64, 128, 256, 512)
_METHODS = ("VQ", "soft VQ, tau 0.3", "soft VQ, tau 1", "FAVOR+")

_LENGTH, _BLOCK, _CODES, _WIDTH, _HEADS, _BATCH, _STEPS = 512, 64, 64, 64, 2, 4, 200
_KINDS = ("full", "vq", "window")


@claim(
    name="vq-against-performer",
    title="Codes keep what random features lose",
    source="archives 9844, 9862; arXiv:2309.16354; arXiv:2009.14794",
    statement="Quantised keys follow softmax attention at a state size where the random features of Performer do not.",
    measurement="Relative error of the output against softmax attention (2048 tokens, width 32, standard normal "
    "queries) by number of codes or features: keys and values in 64 clusters of spread 0.3, with k-means codes; the "
    "same keys with unrelated values; independent keys as a control. Mean over seeds.",
    seeds=(0, 1),
    budget=25,
)
def vq_against_performer(context: Context) -> Evidence:
    """Errors of four feature maps of equal size on three kinds of keys and values."""
    kinds = ("clusters", "clusters, unrelated values", "independent")
    runs = [(kind, size, seed) for kind in kinds for size in _SIZES for seed in context.seeds]
    sums: dict[tuple[str, int], dict[str, float]] = {}
    for kind, size, seed in context.track(runs, description="feature maps", total=len(runs)):
        row = sums.setdefault((kind, size), dict.fromkeys((*_METHODS, "mean of values"), 0.0))
        for name, error in map_errors(kind, size, seed).items():
            row[name] += error / len(context.seeds)
    at = sums["clusters", 256]
    control = sums["independent", 512]
    best = min(control[name] for name in _METHODS)
    unrelated = sums["clusters, unrelated values", 256]["VQ"]
    return Evidence(
        summary=f"At 256 the error is {at['VQ']:.3f} for VQ and {at['FAVOR+']:.2f} for FAVOR+ on clustered keys; on "
        f"independent keys no map of 512 is below {best:.2f}.",
        checks=(
            Check("clustered keys, 256 codes: VQ is below 0.05", at["VQ"] < 0.05, f"{at['VQ']:.3f}"),
            Check(
                "there, VQ is below a fifth of FAVOR+ of equal size",
                at["VQ"] < at["FAVOR+"] / 5,
                f"{at['VQ']:.3f} against {at['FAVOR+']:.2f}",
            ),
        ),
        tables=tuple(
            Table(
                f"Relative error: {kind}",
                ("codes or features", *_METHODS, "mean of values"),
                tuple((size, *sums[kind, size].values()) for size in _SIZES),
            )
            for kind in kinds
        ),
        plots=tuple(
            Plot(
                f"Output error: {kind}",
                "codes or features",
                "relative error",
                _SIZES,
                {name: tuple(sums[kind, size][name] for size in _SIZES) for name in _METHODS},
                log_x=True,
            )
            for kind in (kinds[0], kinds[2])
        ),
        notes=(
            f"VQ needs clusters in the keys and values that follow them: with unrelated values its error is "
            f"{unrelated:.2f}, and with independent keys it does little better than the mean of all values.",
            "Codes are fitted to the very keys; random features need no fitting.",
        ),
    )


def map_errors(kind: str, size: int, seed: int, tokens: int = _TOKENS) -> dict[str, float]:
    """Relative output error of each feature map against softmax attention over all tokens.

    Args:
        kind: ``clusters``, ``clusters, unrelated values`` or ``independent``.
        size: codes or features.
        seed: of data, k-means and rows.
        tokens: number of queries and of keys.

    Returns:
        Errors by method, and that of the plain mean of all values.
    """
    from danlu.attention.linear.engine import linear_attention
    from danlu.attention.linear.feature_maps import FavorFeatures, HardVQ, SoftVQ
    from danlu.attention.vq.key_compression import kmeans

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    label = torch.randint(_CLUSTERS, (tokens,), generator=generator)
    q, k, v = normal(tokens, _DIM), normal(tokens, _DIM), normal(tokens, _DIM)
    if kind != "independent":
        k = normal(_CLUSTERS, _DIM)[label] + _SPREAD * k
    if kind == "clusters":
        v = normal(_CLUSTERS, _DIM)[label] + _SPREAD * v
    codebook = kmeans(k * _DIM**-0.25, size, seed=seed)
    maps = (
        HardVQ(codebook),
        SoftVQ(codebook, tau=0.3),
        SoftVQ(codebook, tau=1.0),
        FavorFeatures(_DIM, size, seed=seed),
    )
    q, k, v = (x[None, None] for x in (q, k, v))
    exact = F.scaled_dot_product_attention(q, k, v)
    with torch.no_grad():
        outs = {
            name: linear_attention(q, k, v, feature_map, causal=False)[0]
            for name, feature_map in zip(_METHODS, maps, strict=True)
        }
    outs["mean of values"] = v.mean(-2, keepdim=True)
    return {name: float((out - exact).norm() / exact.norm()) for name, out in outs.items()}


@claim(
    name="vq-language-model",
    title="A compressed cache costs a language model little",
    source="archive 9844; arXiv:2309.16354",
    statement="A language model whose attention sees quantised keys, with a cache of constant size, is about as good "
    "as one with full attention.",
    measurement="Byte-level models of Python source, 2 layers, width 64, 512 tokens, blocks of 64, 64 codes; loss on "
    "held-out modules, against the same model with full attention and with the window of VQ attention alone.",
    seeds=(0,),
    budget=60,
)
def vq_language_model(context: Context) -> Evidence:
    """Train three byte models that differ in attention only."""
    losses: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    for kind in _KINDS:
        losses[kind], curves[kind] = language_model_loss(kind, context.seeds[0], context)
    ends = tuple(range(10, len(curves["full"]) + 1, 10))
    return Evidence(
        summary=f"Held-out loss {losses['vq']:.3f} nats per byte with quantised keys, {losses['full']:.3f} with full "
        f"attention, {losses['window']:.3f} with the window alone.",
        checks=(
            Check(
                "quantised keys are within 0.1 nats of full attention",
                losses["vq"] < losses["full"] + 0.1,
                f"{losses['vq']:.3f} against {losses['full']:.3f}",
            ),
            Check(
                "and not above the window alone by more than 0.02 nats",
                losses["vq"] < losses["window"] + 0.02,
                f"{losses['vq']:.3f} against {losses['window']:.3f}",
            ),
        ),
        tables=(
            Table("Held-out loss", ("attention", "nats per byte"), tuple((kind, losses[kind]) for kind in _KINDS)),
        ),
        plots=(
            Plot(
                "Training loss, mean of ten steps",
                "step",
                "nats per byte",
                ends,
                {kind: tuple(sum(curve[end - 10 : end]) / 10 for end in ends) for kind, curve in curves.items()},
            ),
        ),
        notes=(
            f"Source: 190 million parameters and up on Enwik8, PG-19 and images; here {_STEPS} steps of a toy.",
            "The window alone and full attention differ by "
            f"{losses['window'] - losses['full']:+.3f} nats. Where this is not clearly above zero, the toy has not "
            "learnt to use distant text, and codes for it can only do harm.",
        ),
    )


def language_model_loss(
    kind: str, seed: int, context: Context, steps: int = _STEPS, length: int = _LENGTH
) -> tuple[float, list[float]]:
    """Train one byte model and measure it on held-out modules.

    Args:
        kind: ``full``, ``vq`` or ``window``.
        seed: of weights and batches.
        context: for the progress bar.
        steps: of training.
        length: tokens of a sample.

    Returns:
        Held-out loss in nats per byte, and the training losses.
    """
    from danlu.lab import corpora
    from danlu.lab.training import Schedule, seeded, train

    corpus = corpora.code(2_000_000, 100_000)
    data, test = (_bytes("".join(texts)) for texts in (corpus.train, corpus.test))
    with seeded(seed):
        model = ByteModel(kind)

    def batches(generator: torch.Generator) -> dict[str, Any]:
        starts = torch.randint(len(data) - length, (_BATCH, 1), generator=generator)
        tokens = data[starts + torch.arange(length + 1)]
        return {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:]}

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets) + 1e-4 * model.commitment()

    schedule = Schedule(steps=steps, batch=_BATCH, learning_rate=3e-3)
    curve = train(model, batches, schedule, seed, context, label=kind, loss_function=loss)
    samples = test[: len(test) // (length + 1) * (length + 1)].view(-1, length + 1)[:32]
    with torch.no_grad():
        logits = model(samples[:, :-1]).logits
        return float(F.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten())), curve


class ByteModel(nn.Module):
    """A small pre-norm decoder over bytes.

    Args:
        kind: ``full``, ``vq`` or ``window``.
    """

    def __init__(self, kind: str) -> None:
        from danlu.attention.vq.layer import VQAttention

        super().__init__()
        self.embed = nn.Embedding(256, _WIDTH)
        words: dict[str, Any] = {
            "hidden_size": _WIDTH,
            "heads": _HEADS,
            "codes": _CODES,
            "block": _BLOCK,
            "position": "rotary",
        }
        mixers = [VQAttention(**words) if kind == "vq" else ExactAttention(kind, **words) for _ in range(2)]
        self.mixers = nn.ModuleList(mixers)
        self.feeds = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(_WIDTH), nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH))
            for _ in mixers
        )
        self.norms = nn.ModuleList(nn.RMSNorm(_WIDTH) for _ in mixers)
        self.head = nn.Sequential(nn.RMSNorm(_WIDTH), nn.Linear(_WIDTH, 256))

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """Logits (batch, length, 256) of the next byte."""
        x = self.embed(input_ids)
        places = torch.arange(input_ids.shape[1])
        for norm, mixer, feed in zip(self.norms, self.mixers, self.feeds, strict=True):
            x = x + mixer(norm(x), places)
            x = x + feed(x)
        return SimpleNamespace(logits=self.head(x))

    def commitment(self) -> Tensor | float:
        """Sum of the commitment losses of the last training forward."""
        losses = [getattr(mixer, "commitment_loss", None) for mixer in self.mixers]
        return sum(loss for loss in losses if loss is not None)


class ExactAttention(nn.Module):
    """VQ attention without quantisation: the same projections and normalisation, rotary positions.

    Args:
        kind: ``full``: all earlier tokens; ``window``: the block of a token and the one before.
        words: arguments of :class:`danlu.attention.vq.layer.VQAttention`.
    """

    def __init__(self, kind: str, **words: Any) -> None:
        from danlu.attention.vq.layer import VQAttention

        super().__init__()
        self.kind = kind
        self.layer = VQAttention(**words)
        del self.layer.codebook

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """Mix tokens causally."""
        from danlu.attention.key_norm import key_norm

        layer: Any = self.layer
        q, k, v = (
            projection(x).unflatten(-1, (_HEADS, -1)).transpose(1, 2)
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        seen = places[:, None] >= places
        if self.kind == "window":
            seen = seen & (places[:, None] // layer.block - places // layer.block <= 1)
        q, k = (layer.rotary.rotate(key_norm(y), places) for y in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return layer.o_proj(out.transpose(1, 2).flatten(2))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
