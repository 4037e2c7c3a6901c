"""The network of AMED: some 9,000 weights that read features of a sample and place the middle of an interval.

Source: Scientific Spaces archive 9881; arXiv:2312.00094.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.diffusion.amed_table import AMEDTable, Coefficients
from danlu.diffusion.process import widened

#: Numbers that the network sees of a sample.
FEATURES = 64
#: Called with the data that the model predicts (batch, ...) after each call of it; returns features (batch, ...).
Features = Callable[[Tensor], Tensor]


class AMEDPredictor(nn.Module):
    """Coefficients of an interval by features of the sample at its start.

    Features go through 64 - 128 - 4, the noise ratios of both ends through a shared embedding of 8; linear heads on the
    20 numbers give r, c and a. In the published form r is a sigmoid of its head alone: 8929 weights, and 21 for each of
    c and a. The residual form adds to every head a trainable offset for each interval and starts from heads of zero, so
    that it begins as a table that needs no features.

    Args:
        r: first places of the middles, one for each interval, between 0 and 1; without them the network has no offsets
            and starts at random around 1/2, as published.
        scale_c: c stays in ``1 - scale_c .. 1 + scale_c``; 0 fixes it at 1.
        scale_a: likewise for a.
        seed: of the first weights.

    Raises:
        ValueError: an r outside 0..1, or a scale outside 0..1 (1 excluded).
    """

    def __init__(
        self, r: Sequence[float] | None = None, scale_c: float = 0.01, scale_a: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        for name, scale in (("scale_c", scale_c), ("scale_a", scale_a)):
            if not 0 <= scale < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {scale}")
        self.scale_c, self.scale_a = float(scale_c), float(scale_a)
        self.embedding = nn.Linear(8, 8)
        self.inner = nn.Linear(FEATURES, 128)
        self.outer = nn.Linear(128, 4)
        names = ("r", *(name for name, scale in (("c", scale_c), ("a", scale_a)) if scale))
        self.heads = nn.ModuleDict({name: nn.Linear(20, 1) for name in names})
        self.offsets: nn.Parameter | None = None
        if r is not None:
            wrong = [value for value in r if not 0 < value < 1]
            if wrong or not len(r):
                raise ValueError(f"r must hold a place between 0 and 1 for each interval, got {list(r)}")
            self.offsets = nn.Parameter(torch.zeros(len(names), len(r)))
        self._initialise(r, torch.Generator().manual_seed(seed))

    @property
    def intervals(self) -> int | None:
        """How many intervals it has offsets for; None in the published form."""
        return None if self.offsets is None else self.offsets.shape[1]

    def forward(self, interval: int, features: Tensor, t: Tensor, u: Tensor) -> Coefficients:
        """Coefficients for every sample.

        Args:
            interval: which one it is.
            features: (batch, 64), see `pooled`.
            t: noise ratio at the start of the interval, 0-d.
            u: at its end.

        Returns:
            r, c and a, each (batch,).
        """
        with torch.autocast(features.device.type, enabled=False):
            weight = self.inner.weight
            seen = self.outer(F.silu(self.inner(features.to(weight.dtype))))
            ends = torch.cat([self._embedded(ratio.detach().to(weight)) for ratio in (t, u)])
            joint = torch.cat([seen, ends.expand(len(seen), -1)], 1)
            values = {name: head(joint)[:, 0] for name, head in self.heads.items()}
            if self.offsets is not None:
                values = {name: value + self.offsets[i, interval] for i, (name, value) in enumerate(values.items())}
            r = values["r"].sigmoid()
            return Coefficients(r, self._around_one(values, "c", r), self._around_one(values, "a", r))

    def table(self) -> AMEDTable:
        """What the offsets say alone: the coefficients of all samples while the heads are zero.

        Raises:
            ValueError: the published form has no offsets.
        """
        if self.offsets is None or self.intervals is None:
            raise ValueError("a predictor in the published form has no offsets: its coefficients need features")
        values = dict(zip(self.heads, self.offsets.detach().double(), strict=True))
        r = values["r"].sigmoid()
        columns = (r, self._around_one(values, "c", r), self._around_one(values, "a", r))
        return AMEDTable(*(tuple(column.tolist()) for column in columns))

    def _around_one(self, values: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
        scale = self.scale_c if name == "c" else self.scale_a
        return 1 - scale + 2 * scale * values[name].sigmoid() if name in values else torch.ones_like(like)

    def _embedded(self, ratio: Tensor) -> Tensor:
        rates = 1e-4 ** (torch.arange(4, device=ratio.device, dtype=ratio.dtype) / 3)
        return F.silu(self.embedding(torch.cat([(ratio * rates).sin(), (ratio * rates).cos()])))

    @torch.no_grad()
    def _initialise(self, r: Sequence[float] | None, generator: torch.Generator) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and layer is not self.embedding:
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.embedding.weight, generator=generator)
        nn.init.zeros_(self.embedding.bias)
        if self.offsets is not None:
            self.offsets[0] = torch.tensor(r, dtype=torch.float64).logit()
            for weight in self.heads.parameters():
                nn.init.zeros_(weight)


class Captured:
    """Features from inside a model: the output of one of its modules, kept by a forward hook without its gradient.

    Args:
        module: the bottleneck of a U-Net (``unet.mid_block``), a block of a transformer; its output, or the first
            tensor of it, is (batch, channels, height, width) or (batch, tokens, width).
    """

    def __init__(self, module: nn.Module) -> None:
        self._seen: Tensor | None = None
        self._hook = module.register_forward_hook(self._keep)

    def __call__(self, data: Tensor) -> Tensor:
        """The output of the last call; the predicted data only say how many samples there are.

        Raises:
            ValueError: the module was not called, or for another number of samples.
        """
        if self._seen is None or len(self._seen) != len(data):
            seen = "no call" if self._seen is None else f"a batch of {len(self._seen)}"
            raise ValueError(
                f"the captured module must run once for the {len(data)} samples of each model call, but {seen} went "
                "through it: with guidance, give a callable that picks the rows of one of the two passes"
            )
        return self._seen

    def remove(self) -> None:
        """Take the hook off."""
        self._hook.remove()

    def _keep(self, module: nn.Module, inputs: object, output: object) -> None:
        while isinstance(output, (tuple, list)) and output:
            output = output[0]
        if not isinstance(output, Tensor):
            raise TypeError(f"the captured module must return a tensor, got {type(output).__name__}")
        self._seen = output.detach()


def pooled(features: Tensor) -> Tensor:
    """Bring features of any kind to 64 numbers for each sample.

    Args:
        features: pictures or activations (batch, channels, height, width), more axes in between allowed: mean of all
            but the last two axes, then adaptive mean over 8 x 8 places. Tokens (batch, tokens, width): mean over the
            width, then 64 adaptive places. Vectors (batch, numbers): zeros behind them up to 64, or 64 adaptive places.

    Returns:
        Features (batch, 64) in float32 or better, without a gradient.

    Raises:
        ValueError: fewer than two axes, or an empty one.
    """
    if features.dim() < 2 or 0 in features.shape[1:]:
        raise ValueError(f"features must be (batch, ...) with at least one number each, got {tuple(features.shape)}")
    features = widened(features.detach())
    if features.dim() == 2:
        if features.shape[1] <= FEATURES:
            return F.pad(features, (0, FEATURES - features.shape[1]))
        return F.adaptive_avg_pool1d(features[:, None], FEATURES)[:, 0]
    if features.dim() == 3:
        return F.adaptive_avg_pool1d(features.mean(2)[:, None], FEATURES)[:, 0]
    while features.dim() > 3:
        features = features.mean(1)
    return F.adaptive_avg_pool2d(features[:, None], 8).flatten(1)
