"""Vector quantisation with a learnt codebook (VQ-VAE and its cures for collapse), and lookup-free quantisation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from danlu.attention.vq.codebook import VQCodebook, nearest_codes
from danlu.vision.fsq import FSQ
from danlu.vision.quantizer import Quantizer, QuantizerOutput, require, working

# Distances held at once, in elements.
_CHUNK_ELEMENTS = 1 << 22
# Bits whose joint entropy is computed exactly, from a table of 2 ** 8 probabilities per vector.
_ENTROPY_BITS = 8


class VectorQuantizer(Quantizer):
    """The nearest row e of a codebook replaces each vector z.

    Forward value ``e``. How it is learnt:

    - ``update="gradient"`` (VQ-VAE): the loss is ``beta |e - sg z|^2 + gamma |z - sg e|^2``, summed over channels and
      averaged over vectors.
    - ``update="ema"``: rows follow the mean of their vectors, ``n <- decay n + (1 - decay) count`` and the sums
      likewise, with no beta term; a training forward takes effect when the next begins, summed over processes.
    - ``estimator="straight_through"``: the gradient of e is given to z unchanged. ``"rotation"``: turned and scaled by
      the map that takes z to e, ``G = (|e|/|z|)(I - 2 w w^T + 2 v u^T)``, ``u = z/|z|``, ``v = e/|e|``,
      ``w = (u + v)/|u + v|``, held constant. It needs codes as long as the vectors: call :meth:`initialise`, and expect
      to tune gamma again.
    - ``transform=True`` (SimVQ): the codebook is ``E W``, with E frozen at its random start and W trained from the
      identity on; all codes move together.

    Memory is bounded: distances are computed for some vectors at a time.

    Args:
        codebook_size: number of codes, >= 1.
        dim: length of a vector.
        update: see above.
        estimator: see above.
        transform: see above; not with ``update="ema"``.
        beta: weight of moving codes to vectors, >= 0; None: 1, and 0 with ``update="ema"``, which takes no other.
        gamma: weight of holding vectors at their codes, >= 0, usually below beta.
        decay: of the moving average, in [0, 1).
        revive_below: ``ema`` only: codes whose count falls below this are replaced by vectors of the batch; 0: never.
        channel_dim: axis of the vectors, see :class:`danlu.vision.quantizer.Quantizer`.
        seed: of the first codes: uniform in +-1/codebook_size where they are trained themselves, otherwise normal with
            variance 1/dim.

    Raises:
        ValueError: an option out of range, or two that exclude each other.

    Source: Scientific Spaces archives 9826, 10489, 10519; arXiv:1711.00937 (VQ-VAE), arXiv:1906.00446 (moving average),
    arXiv:2410.06424 (rotation), arXiv:2411.02038 (SimVQ)
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        update: Literal["gradient", "ema"] = "gradient",
        estimator: Literal["straight_through", "rotation"] = "straight_through",
        transform: bool = False,
        beta: float | None = None,
        gamma: float = 0.25,
        decay: float = 0.99,
        revive_below: float = 0.0,
        channel_dim: int = -1,
        seed: int = 0,
    ) -> None:
        if isinstance(codebook_size, bool) or not isinstance(codebook_size, int) or codebook_size < 1:
            raise ValueError(f"codebook_size must be an int >= 1, got {codebook_size!r}")
        if update not in ("gradient", "ema"):
            raise ValueError(f"update must be 'gradient' or 'ema', got {update!r}")
        if estimator not in ("straight_through", "rotation"):
            raise ValueError(f"estimator must be 'straight_through' or 'rotation', got {estimator!r}")
        if update == "ema" and transform:
            raise ValueError("transform=True needs update='gradient': its codebook is trained, not averaged")
        if update == "ema" and beta:
            raise ValueError(f"beta must be None or 0 with update='ema', got {beta}: the average takes its place")
        if update != "ema" and revive_below:
            raise ValueError(f"revive_below needs update='ema', got {revive_below}")
        beta = (0.0 if update == "ema" else 1.0) if beta is None else beta
        if not (beta >= 0 and gamma >= 0):
            raise ValueError(f"beta and gamma must be at least 0, got {beta} and {gamma}")
        super().__init__(dim, (codebook_size,), channel_dim)
        self.update, self.estimator, self.transform = update, estimator, transform
        self.beta, self.gamma, self.seed = beta, gamma, seed
        generator = torch.Generator(device="cpu").manual_seed(seed)
        first = torch.randn(codebook_size, dim, generator=generator, device="cpu") / dim**0.5
        if update == "ema":
            self.average = VQCodebook(1, codebook_size, dim, decay=decay, revive_below=revive_below, seed=seed)
            self.average.set(first[None])
        elif transform:
            self.register_buffer("rows", first)
            self.weight = nn.Parameter(torch.eye(dim))
        else:
            first = (2 * torch.rand(codebook_size, dim, generator=generator, device="cpu") - 1) / codebook_size
            self.rows = nn.Parameter(first)
        self.decay, self.revive_below = decay, revive_below

    @property
    def config(self) -> dict[str, Any]:
        """See the base class."""
        names = ("codebook_size", "dim", "update", "estimator", "transform", "beta", "gamma", "decay", "revive_below")
        return {"kind": "vq"} | {name: getattr(self, name) for name in (*names, "channel_dim", "seed")}

    @property
    def codebook(self) -> Tensor:
        """The codes (codebook_size, dim), with the gradient that they have."""
        if self.update == "ema":
            return self.average.codebook[0]
        if not self.transform:
            return self.rows
        with torch.autocast(self.rows.device.type, enabled=False):
            return self.rows @ self.weight

    @torch.no_grad()
    def initialise(self, z: Tensor, *, iterations: int = 10, seed: int = 0) -> None:
        """Start the codes at k-means centres; with several processes, at those of the first one's vectors.

        Args:
            z: vectors of training data as for ``forward``, at least ``codebook_size`` of them.
            iterations: of Lloyd's algorithm, after a k-means++ start; 0: the start alone.
            seed: of the start.

        Raises:
            ValueError: too few vectors, or vectors that are not finite.
        """
        from danlu.attention.vq.key_compression import kmeans

        vectors = working(self._channels_last(z)).reshape(-1, self.dim)
        centres = kmeans(vectors, self.codebook_size, iterations=iterations, seed=seed).float()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(centres, 0)
        if self.update == "ema":
            self.average.set(centres[None])
            return
        self.rows.copy_(centres)
        if self.transform:
            self.weight.copy_(torch.eye(self.dim))

    def _quantise(self, z: Tensor) -> QuantizerOutput:
        wide = working(z)
        flat = wide.reshape(-1, self.dim)
        if self.update == "ema" and self.training:
            self.average.apply_pending()
        codebook = self.codebook
        indices = self._nearest(flat, codebook)
        if self.update == "ema" and self.training:
            self.average.record(flat[None, None], indices[None, None])
        chosen = codebook.to(flat.dtype)[indices]
        distance = self.gamma * (flat - chosen.detach()).square()
        if self.beta:
            distance = distance + self.beta * (chosen - flat.detach()).square()
        loss = distance.sum(-1).mean() if len(flat) else distance.sum()
        value = chosen.detach()
        carrier = _rotate(flat, value) if self.estimator == "rotation" else flat
        # the value is e bit for bit: z + (e - z) would round
        quantized = _Carry.apply(carrier, value).view(z.shape).to(z.dtype)
        return QuantizerOutput(quantized, indices.view(*z.shape[:-1], 1), quantized, loss.float())

    def _find(self, z: Tensor) -> Tensor:
        return self._nearest(working(z).reshape(-1, self.dim), self.codebook).view(*z.shape[:-1], 1)

    def _look_up(self, indices: Tensor, dtype: torch.dtype | None) -> Tensor:
        codebook = self.codebook
        return codebook[indices[..., 0]].to(dtype or codebook.dtype)

    @torch.no_grad()
    def _nearest(self, flat: Tensor, codebook: Tensor) -> Tensor:
        require(flat.sum().isfinite(), "z must be finite; look for an overflow or 0/0 before the quantizer")
        rows = max(1, _CHUNK_ELEMENTS // self.codebook_size)
        # autocast would compare distances in half precision
        with torch.autocast(flat.device.type, enabled=False):
            parts = [nearest_codes(part[None, None], codebook[None])[0, 0] for part in flat.split(rows)]
        return torch.cat(parts)


class LFQ(FSQ):
    """Lookup-free quantisation: one bit per channel, with losses that make every code likely and every choice sure.

    FSQ with two levels and the sigmoid bound, and the loss
    ``commitment |z - sg c|^2 + entropy (mean H(p) - diversity H(mean p))`` over the probabilities ``p`` of the codes,
    ``softmax(-|z - c|^2 / temperature)``, which is ``sigmoid(4 z / temperature)`` for each bit. The second entropy is
    of all bits together for up to 8 bits, and beyond a sum over groups of 8, which is never less.

    Departure from the source: gradients pass the sign as those of ``tanh(z/2)``, not unchanged.

    Args:
        bits: number of channels, 1 to 63.
        dim: length of the vectors; where it is not ``bits``, a linear map leads in and one out.
        commitment: weight of the distance, a sum over channels.
        entropy: weight of both entropies, in nats.
        diversity: weight of the entropy of the mean within that.
        temperature: of the probabilities, > 0.
        channel_dim: axis of the vectors, see :class:`danlu.vision.quantizer.Quantizer`.

    Raises:
        ValueError: an option out of range.

    Source: Scientific Spaces archive 9826; arXiv:2310.05737
    """

    def __init__(
        self,
        bits: int,
        dim: int | None = None,
        *,
        commitment: float = 0.25,
        entropy: float = 0.1,
        diversity: float = 1.0,
        temperature: float = 1.0,
        channel_dim: int = -1,
    ) -> None:
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 63:
            raise ValueError(f"bits must be an int from 1 to 63, got {bits!r}")
        if not min(commitment, entropy, diversity) >= 0:
            raise ValueError(
                f"commitment, entropy and diversity must be at least 0, got {commitment}, {entropy} and {diversity}"
            )
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        super().__init__([2] * bits, dim, bound="sigmoid", channel_dim=channel_dim)
        self.commitment, self.entropy, self.diversity, self.temperature = commitment, entropy, diversity, temperature

    @property
    def config(self) -> dict[str, Any]:
        """See the base class."""
        names = ("dim", "commitment", "entropy", "diversity", "temperature", "channel_dim")
        return {"kind": "lfq", "bits": len(self.levels)} | {name: getattr(self, name) for name in names}

    def _losses(self, channels: Tensor, codes: Tensor) -> Tensor:
        flat, codes = channels.reshape(-1, len(self.levels)), codes.detach().reshape(-1, len(self.levels))
        if not len(flat):
            return flat.sum().float()
        distance = (flat - codes).square().sum(-1).mean()
        logits = 4 * flat / self.temperature
        up, down = nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)
        sure = -(up.exp() * up + down.exp() * down).sum(-1).mean()
        spread = flat.new_zeros(())
        for first in range(0, len(self.levels), _ENTROPY_BITS):
            joint = flat.new_zeros(len(flat), 1)
            for bit in range(first, min(first + _ENTROPY_BITS, len(self.levels))):
                joint = torch.cat((joint + down[:, bit : bit + 1], joint + up[:, bit : bit + 1]), -1)
            mean = joint.exp().mean(0)
            spread = spread + torch.special.entr(mean).sum()
        return (self.commitment * distance + self.entropy * (sure - self.diversity * spread)).float()


class _Carry(torch.autograd.Function):
    """The second argument as value, the first as where gradients go."""

    @staticmethod
    def forward(carrier: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _rotate(z: Tensor, e: Tensor) -> Tensor:
    """``sg[G] z``; equal to e but for rounding. Where e = -z, w is 0 and G only mirrors."""
    least = torch.finfo(z.dtype).tiny ** 0.5
    with torch.no_grad():
        length = z.norm(dim=-1, keepdim=True).clamp_min(least)
        u, v = z / length, nn.functional.normalize(e, dim=-1, eps=least)
        w = nn.functional.normalize(u + v, dim=-1, eps=1e-6)
        scale = e.norm(dim=-1, keepdim=True) / length
    turned = z - 2 * w * (w * z).sum(-1, keepdim=True) + 2 * v * (u * z).sum(-1, keepdim=True)
    return scale * turned
