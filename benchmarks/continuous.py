"""Continuous autoregression: a training step against the same backbone with an MSE head, sampling against its parts.

The backbone is a small Llama, the head is sized to at most 15 percent of its training arithmetic. Sampling is compared
with the sum of the backbone's cached steps and the head's samples, both measured on their own.

    python benchmarks/continuous.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaModel

from danlu.models.continuous import ContinuousCausalLM

WIDTH, LAYERS, TOKEN, PATCHES, BATCH, STEPS = 512, 10, 16, 64, 8, 20
HEAD_WIDTH, HEAD_DEPTH, MUL = 256, 3, 4


def backbone() -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaModel(config)


class MeanModel(nn.Module):
    """The peer: the same decoder, a linear map to the next patch, squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()
        self.backbone.embed_tokens.requires_grad_(False)
        self.start = nn.Parameter(torch.zeros(WIDTH))
        self.patch_embedding = nn.Linear(TOKEN, WIDTH)
        self.head = nn.Linear(WIDTH, TOKEN)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """The loss of a batch (batch, patches, token)."""
        embeds = self.patch_embedding(patches[:, :-1])
        embeds = torch.cat([self.start.expand(len(patches), 1, -1), embeds], 1)
        return F.mse_loss(self.head(self.backbone(inputs_embeds=embeds, use_cache=False).last_hidden_state), patches)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work))
    return times


def trainer(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-4)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        optimiser.step()

    return step


@torch.no_grad()
def cached_steps(model: LlamaModel, rows: int) -> None:
    """What the backbone does while patches are sampled, with random inputs."""
    cache = None
    for _ in range(PATCHES):
        embeds = torch.randn(rows, 1, WIDTH, device=model.device)
        cache = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).past_key_values


@torch.no_grad()
def head_calls(head: nn.Module, rows: int) -> None:
    """What the head does: bare calls of the network, without a sampler around them."""
    z = torch.randn(rows, WIDTH, device=head.token.weight.device)
    for _ in range(PATCHES):
        y = torch.randn(rows, TOKEN, device=z.device)
        for step in range(STEPS):
            t = torch.full((rows,), 1 - step / STEPS, device=z.device)
            y = y - head(y, t, z) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    patches = torch.randn(BATCH, PATCHES, TOKEN, device=device)
    ours = ContinuousCausalLM.from_backbone(
        backbone(), token_dim=TOKEN, head_width=HEAD_WIDTH, head_depth=HEAD_DEPTH, mul=MUL
    ).to(device)
    ours.train()
    mean = MeanModel().to(device).train()
    training = interleaved(
        {
            "MSE head": trainer(mean, lambda: mean(patches)),
            "flow head": trainer(ours, lambda: ours(patches=patches).loss),
        },
        options.repeats,
    )
    ours.eval()
    few = max(5, options.repeats // 2)
    sampling = interleaved(
        {
            "generate_patches": lambda: ours.generate_patches(PATCHES, num_samples=BATCH, steps=STEPS),
            "backbone alone": lambda: cached_steps(ours.backbone, BATCH),
            "head alone": lambda: head_calls(ours.diffusion_head, BATCH),
        },
        few,
    )

    def middle(times: list[float]) -> float:
        return 1e3 * statistics.median(times)

    cost = statistics.median(a / b for a, b in zip(training["flow head"], training["MSE head"], strict=True))
    parts = [a + b for a, b in zip(sampling["backbone alone"], sampling["head alone"], strict=True)]
    speed = statistics.median(a / b for a, b in zip(parts, sampling["generate_patches"], strict=True))
    head_size = sum(p.numel() for p in ours.diffusion_head.parameters())
    body_size = sum(p.numel() for p in ours.backbone.layers.parameters())
    table = "\n".join(
        [
            "# Continuous autoregression: a training step, and sampling",
            "",
            f"Llama of {LAYERS} layers, width {WIDTH} ({body_size / 1e6:.1f} M), flow head {HEAD_DEPTH} x {HEAD_WIDTH} "
            f"({head_size / 1e6:.2f} M, {MUL} draws for each patch: {MUL * head_size / body_size:.0%} of its "
            f"arithmetic); {BATCH} sequences of {PATCHES} patches of {TOKEN} "
            f"numbers, {STEPS} Euler steps for each; {device}, {torch.get_num_threads()} threads; medians of "
            f"{options.repeats} and {few} interleaved repeats.",
            "",
            "| training step | ms | ratio | to reach |",
            "| --- | ---: | ---: | ---: |",
            f"| backbone with an MSE head | {middle(training['MSE head']):.0f} | 1.00 | |",
            f"| backbone with a flow head | {middle(training['flow head']):.0f} | {cost:.2f} | at most 1.20 |",
            "",
            "| sampling | ms | speed against the sum of the parts | to reach |",
            "| --- | ---: | ---: | ---: |",
            f"| backbone's cached steps alone | {middle(sampling['backbone alone']):.0f} | | |",
            f"| head's calls alone | {middle(sampling['head alone']):.0f} | | |",
            f"| generate_patches | {middle(sampling['generate_patches']):.0f} | {speed:.2f} | at least 0.90 |",
            "",
        ]
    )
    print(table)
    if options.repeats == parser.get_default("repeats"):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
