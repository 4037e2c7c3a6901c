"""A training step of QB-Heat against masked autoencoding of a CNN on the full image.

The peer hides the same three quarters by zeros and runs the same backbone over the full image, since a convolution
cannot leave patches out; decoder, loss and optimiser are the same. The share of the fill is its own forward and
backward pass, of the median step.

    python benchmarks/qb_heat.py [--batch 4] [--size 256] [--repeats 9]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextModel, ResNetConfig, ResNetModel

from danlu.vision.qb_heat import QBHeatConfig, QBHeatForPreTraining

BACKBONES = {
    "ResNet-18": lambda: ResNetModel(
        ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    ),
    "ConvNeXt-nano": lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[80, 160, 320, 640], depths=[2, 2, 8, 2])),
}
FILLS = {
    "untied": {"mode": "untied"},
    "untied, oneshot": {"mode": "untied", "steps": "oneshot"},
    "inverse": {"mode": "inverse"},
}


class FullImage(nn.Module):
    """The peer: the backbone reads all pixels, hidden ones as zeros."""

    def __init__(self, model: QBHeatForPreTraining) -> None:
        super().__init__()
        self.backbone, self.decoder = copy.deepcopy(model.backbone), copy.deepcopy(model.decoder)
        self.positions = nn.Parameter(torch.zeros_like(model.positions))
        s = model.masker.stride
        hidden = torch.stack([model.masker.hidden(k) for k in range(len(model.masker.positions))])
        self.register_buffer("hidden", hidden.repeat_interleave(s, 1).repeat_interleave(s, 2))

    def forward(self, pixels: Tensor, number: int) -> Tensor:
        """Loss on hidden pixels."""
        hidden = self.hidden[number]
        cells = self.backbone(pixel_values=pixels * ~hidden).last_hidden_state
        image = self.decoder(cells + self.positions)
        return (image - pixels).square().mean(1)[:, hidden].mean()


def seconds(call, device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def stepper(model: nn.Module, loss):
    optimiser = torch.optim.AdamW(model.parameters(), 1e-4)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        optimiser.step()

    return step


def measure(build, options: argparse.Namespace, device: str) -> list[str]:
    torch.manual_seed(0)
    pixels = torch.randn(options.batch, 3, options.size, options.size, device=device)
    calls, fills = {}, {}
    first = None
    for name, words in FILLS.items():
        torch.manual_seed(0)
        model = QBHeatForPreTraining(build().to(device), config=QBHeatConfig(size=options.size, **words)).train()
        first = first or model
        calls[name] = stepper(model, lambda model=model: model(pixels, position="top-left").loss)
        half = (model.masker.height // 2, model.masker.width // 2)
        cells = torch.randn(options.batch, model.fill.channels, *half, device=device, requires_grad=True)
        shape = (0, 0, model.masker.height, model.masker.width)
        fills[name] = lambda model=model, cells=cells, shape=shape: model.fill(cells, *shape).sum().backward()
    peer = FullImage(first).to(device).train()
    calls["peer"] = stepper(peer, lambda: peer(pixels, 0))
    times: dict[str, list[float]] = {name: [] for name in calls}
    alone: dict[str, list[float]] = {name: [] for name in fills}
    for call in (*calls.values(), *fills.values()):
        call()
    for _ in range(options.repeats):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
        for name, call in fills.items():
            alone[name].append(seconds(call, device))
    middle = {name: statistics.median(found) for name, found in times.items()}
    rows = [f"| full image, masked | {1e3 * middle['peer']:.1f} | 1 | - |"]
    for name in FILLS:
        ratio = statistics.median(a / b for a, b in zip(times[name], times["peer"], strict=True))
        share = statistics.median(alone[name]) / middle[name]
        rows.append(f"| QB-Heat, {name} | {1e3 * middle[name]:.1f} | {ratio:.3f} | {100 * share:.2f} % |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = [
        "# QB-Heat against masked autoencoding of a CNN on the full image",
        "",
        f"Training step (forward, backward, AdamW) of {options.batch} images of {options.size} x {options.size} x 3, "
        f"{device}, float32, {torch.get_num_threads()} threads; {options.repeats} interleaved repeats.",
    ]
    for backbone, build in BACKBONES.items():
        lines += ["", f"## {backbone}", "", "| step | ms (median) | ratio to the full image | fill, of the step |"]
        lines += ["| --- | ---: | ---: | ---: |", *measure(build, options, device)]
    table = "\n".join(lines) + "\n"
    print(table)
    if all(getattr(options, name) == parser.get_default(name) for name in ("batch", "size", "repeats")):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
