"""Claims on robustness to length: randomised positions, hybrid window and full attention, key normalisation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danlu.context.methods import KeyNorm, LogN
from danlu.lab import toy
from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.runner import claim
from danlu.lab.training import Schedule, train, trained

_MASK, _TRAINED, _RANGE = 256, 64, 2048
_LENGTHS = (64, 128, 256, 512)
_SCHEDULE = Schedule(steps=600, batch=32)


@claim(
    name="randomised-positions",
    title="Randomised positions in training carry a masked model further",
    source="archive 9444; arXiv:2305.16843",
    statement="Training with positions stretched by a random factor of mean 1 lets a masked language model read "
    "several times "
    "its trained length, best of all together with log n scaling.",
    measurement="Masked bytes of the standard library (15%), a 2-layer bidirectional model trained at 64 bytes with "
    "plain, "
    "equal-mean (exponential) and sorted-subset positions; accuracy on held-out modules up to 512 bytes.",
    budget=180,
)
def randomised_positions(context: Context) -> Evidence:
    """Three trainings, each tested with and without log n."""
    from danlu.context.text import held_out_files, training_files
    from danlu.positions.randomised import evenly_spaced_positions

    seed = context.seeds[0]
    train_bytes, test_bytes = _bytes(training_files()), _bytes(held_out_files())
    accuracy: dict[str, list[float]] = {}
    for kind in ("plain", "equal_mean", "subset"):
        model = _masked_model(kind, train_bytes, seed, context)
        for name, with_log_n in ((kind, False), (f"{kind} + log n", True)):
            row = []
            for length in _LENGTHS:
                factor = math.log(length) / math.log(_TRAINED) if with_log_n else 1.0
                positions = evenly_spaced_positions(length, _RANGE) if kind == "subset" else torch.arange(length)
                with _sharpened(model, factor):
                    row.append(masked_accuracy(model, test_bytes, positions))
            accuracy[name] = row
    plain, best = accuracy["plain"], accuracy["equal_mean + log n"]
    checks = [
        Check(
            "equal-mean with log n beats plain by 0.10 at 512",
            best[-1] - plain[-1] >= 0.1,
            f"{best[-1]:.3f}, {plain[-1]:.3f}",
        ),
        Check(
            "equal-mean alone beats plain at 512",
            accuracy["equal_mean"][-1] > plain[-1],
            f"{accuracy['equal_mean'][-1]:.3f}",
        ),
        Check("log n lifts equal-mean at 512", best[-1] > accuracy["equal_mean"][-1], f"{best[-1]:.3f}"),
    ]
    return Evidence(
        summary=f"Accuracy at 512 after training at 64: equal-mean with log n {best[-1]:.3f}, plain {plain[-1]:.3f}; "
        "the price "
        f"at 64 is {plain[0] - best[0]:.3f} ({best[0]:.3f} against {plain[0]:.3f}).",
        checks=tuple(checks),
        tables=(
            Table(
                "Accuracy on masked bytes",
                ("positions in training", *(f"{length} bytes" for length in _LENGTHS)),
                tuple((name, *row) for name, row in accuracy.items()),
            ),
        ),
        plots=(
            Plot(
                "Masked bytes past the trained length",
                "length, bytes",
                "accuracy",
                tuple(float(length) for length in _LENGTHS),
                {name: tuple(row) for name, row in accuracy.items()},
                log_x=True,
            ),
        ),
        notes=(
            "The model is the host library's EuroBERT with 2 layers of width 96, trained for 600 steps of 32 windows.",
            "Log n is applied at test only: at the one trained length its factor is 1.",
        ),
    )


@claim(
    name="hwfa",
    title="HWFA reads any length as trained",
    source="archive 9603",
    statement="Window attention with RoPE in all layers but the last, which is full attention without positions and "
    "with log n, "
    "extrapolates unchanged.",
    measurement="Toy of 2 layers (window 8; full without positions) trained at 32 tokens, tested at 256 as it is, "
    "against "
    "plain RoPE and a sliding window at test, mean over seeds.",
    seeds=(0, 1),
    budget=180,
)
def hwfa(context: Context) -> Evidence:
    """The hybrid against plain RoPE."""
    # Log n belongs to the architecture: it is on in training and at test, in the full layer alone.
    scaled = LogN(toy.TRAINED_LENGTH, clip=False)
    runs: dict[str, Any] = {
        "plain RoPE": (toy.Toy(), ()),
        "sliding window 32 at test": (toy.Toy(), ("window:window=32",)),
        "HWFA, window 8": (toy.Toy(build=("hwfa", hwfa_model), methods=(scaled,)), (scaled,)),
    }
    mean = toy.mean_scores(context, runs)
    plain, window, hybrid = mean.values()
    checks = [
        Check("HWFA near at least .95, unchanged", hybrid["near"] >= 0.95, f"{hybrid['near']:.2f}"),
        Check("HWFA far at least .9, unchanged", hybrid["far"] >= 0.9, f"{hybrid['far']:.2f}"),
        Check("sliding window far at most .05", window["far"] <= 0.05, f"{window['far']:.2f}"),
    ]
    return Evidence(
        summary=f"At 8x, near/far: HWFA {hybrid['near']:.2f}/{hybrid['far']:.2f}, plain RoPE {plain['near']:.2f}/"
        f"{plain['far']:.2f}, sliding window {window['near']:.2f}/{window['far']:.2f}.",
        checks=tuple(checks),
        tables=(toy.score_table(mean),),
        plots=(toy.score_plot(mean, "HWFA, as trained"),),
        notes=(toy.SETTING,),
    )


@claim(
    name="key-norm",
    title="Key normalisation extrapolates by itself",
    source="archive 9859",
    statement="Attention with normalised keys, trained so, reads past its trained length unchanged and is no worse "
    "within it; "
    "it cannot place far positions well.",
    measurement="Toy Llama trained at 32 tokens with and without key normalisation, tested at 256 as it is, mean "
    "over seeds.",
    seeds=(0, 1),
    budget=180,
)
def key_norm(context: Context) -> Evidence:
    """The same model with and without key normalisation."""
    runs = {
        "plain RoPE": (toy.Toy(), ()),
        "normalised keys": (toy.Toy(methods=(KeyNorm(),)), (KeyNorm(),)),
    }
    mean = toy.mean_scores(context, runs)
    plain, normed = mean.values()
    gain = normed["near"] - plain["near"]
    checks = [
        Check("near above plain RoPE by .15", gain >= 0.15, f"{normed['near']:.2f} against {plain['near']:.2f}"),
        Check(
            "no worse than plain RoPE at the trained length (within .02)",
            normed["trained"] >= plain["trained"] - 0.02,
            f"{normed['trained']:.3f} against {plain['trained']:.3f}",
        ),
        Check("far stays below .5", normed["far"] < 0.5, f"{normed['far']:.2f}"),
    ]
    return Evidence(
        summary=f"At 8x, near/far: normalised keys {normed['near']:.2f}/{normed['far']:.2f}, plain {plain['near']:.2f}/"
        f"{plain['far']:.2f}.",
        checks=tuple(checks),
        tables=(toy.score_table(mean),),
        plots=(toy.score_plot(mean, "Key normalisation, as trained"),),
        notes=(toy.SETTING,),
    )


def hwfa_model(base: float) -> nn.Module:
    """The toy as HWFA: a window layer with RoPE, then a full layer without positions."""
    from transformers import LlamaConfig, SmolLM3ForCausalLM

    from danlu.attention.hybrid import hwfa_config

    sizes = LlamaConfig(**toy.toy_shape(base), pad_token_id=None, bos_token_id=None, eos_token_id=None)
    return SmolLM3ForCausalLM(hwfa_config(sizes, toy.TRAINED_LENGTH, window=8))


def _bytes(paths: list[Path]) -> Tensor:
    text = b"\n".join(path.read_bytes() for path in paths)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _masked_model(kind: str, text: Tensor, seed: int, context: Context) -> nn.Module:
    """A bidirectional model trained on masked bytes with one kind of positions, cached like the toys."""
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    from danlu import __version__

    config = EuroBertConfig(
        vocab_size=_MASK + 1, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, head_dim=32, max_position_embeddings=_TRAINED, bos_token_id=0, eos_token_id=0,
        pad_token_id=0, mask_token_id=_MASK, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip

    def fit(model: nn.Module) -> None:
        train(model, _masked_batches(kind, text, seed), _SCHEDULE, seed, context, f"masked bytes, {kind}")

    key = f"masked-{kind}-{seed}-{_SCHEDULE.steps}x{_SCHEDULE.batch}-{__version__}"
    return trained(key, lambda: EuroBertForMaskedLM(config), fit, seed, context)


def _masked_batches(kind: str, text: Tensor, seed: int) -> Callable[[torch.Generator], dict[str, Any]]:
    from danlu.positions.randomised import RandomPositionCollator

    def stack(rows: Any) -> dict[str, Any]:
        ids = torch.stack(list(rows))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    collate: Callable[[Any], dict[str, Any]] = stack
    if kind == "equal_mean":
        collate = RandomPositionCollator(stack, "equal_mean", trained_length=_TRAINED, seed=seed)
    elif kind == "subset":
        collate = RandomPositionCollator(stack, "subset", trained_length=_TRAINED, max_length=_RANGE, seed=seed)

    def draw(generator: torch.Generator) -> dict[str, Any]:
        starts = torch.randint(len(text) - _TRAINED, (_SCHEDULE.batch,), generator=generator)
        tokens = text[starts[:, None] + torch.arange(_TRAINED)].long()
        masked = torch.rand(tokens.shape, generator=generator) < 0.15
        inputs = collate(tokens.masked_fill(masked, _MASK).unbind())
        return {**inputs, "targets": tokens.masked_fill(~masked, -100)}

    return draw


@torch.no_grad()
def masked_accuracy(
    model: nn.Module, text: Tensor, positions: Tensor, *, count: int = 65536, seed: int = 7919
) -> float:
    """Share of masked bytes that the model ranks first, over about ``count`` bytes of text.

    Args:
        model: a masked language model over bytes.
        text: uint8 (bytes,).
        positions: (length,), its length is the length of the windows.
        count: bytes read in all.
        seed: of windows and masks.

    Returns:
        A number in 0..1.
    """
    generator = torch.Generator().manual_seed(seed)
    length = len(positions)
    starts = torch.randint(len(text) - length, (count // length,), generator=generator)
    tokens = text[starts[:, None] + torch.arange(length)].long()
    masked = torch.rand(tokens.shape, generator=generator) < 0.15
    hits = 0
    for rows, hidden in zip(tokens.split(32), masked.split(32), strict=True):
        inputs = rows.masked_fill(hidden, _MASK)
        output = model(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), position_ids=positions.expand(len(rows), -1)
        )
        hits += int(((output.logits.argmax(-1) == rows) & hidden).sum())
    return hits / int(masked.sum())


@contextlib.contextmanager
def _sharpened(model: nn.Module, factor: float) -> Iterator[None]:
    """Attention logits times a factor. In a bidirectional model every row sees as many keys, so log n is one number."""
    layers: list[Any] = [
        module for module in model.modules() if hasattr(module, "scaling") and hasattr(module, "q_proj")
    ]
    before = [layer.scaling for layer in layers]
    try:
        for layer in layers:
            layer.scaling = layer.scaling * factor
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling
