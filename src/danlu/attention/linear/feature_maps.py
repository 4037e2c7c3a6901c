"""Feature maps of linear attention, kept as logarithms: softmax scores become sums over non-negative features.

Attention weights are ``sum_y exp(log_query(q)[y] + log_key(k)[y])``. A factor of a query that is the same for all its
features cancels in the normalisation and is left out; a factor of a key does not cancel and is kept.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from danlu.attention.linear.inputs import widen

Norms = Literal["chi", "regularised", "stratified"]
KeyWeight = Literal["none", "performer"]


class FeatureMap(nn.Module):
    """What the engine of linear attention asks of a map.

    Attributes:
        features: number of features per head.
        estimates_softmax: the features stand for ``exp(q.k)``, so that queries and keys share the scale of the logits
            and rotary positions keep their meaning; False for maps that act on each dimension by itself.
        bidirectional_only: each feature is normalised over all keys, those to come included.
    """

    features: int
    estimates_softmax = True
    bidirectional_only = False

    def log_query(self, q: Tensor) -> Tensor:
        """Logarithms of the features of queries.

        Args:
            q: (batch, kv_heads, rows, dim), already scaled.

        Returns:
            (batch, kv_heads, rows, features), float32 or better, up to a constant per row.
        """
        raise NotImplementedError

    def log_key(self, k: Tensor) -> Tensor:
        """Logarithms of the features of keys; -inf where a feature is zero.

        Args:
            k: (batch, kv_heads, length, dim), already scaled.

        Returns:
            (batch, kv_heads, length, features), float32 or better.
        """
        raise NotImplementedError


class _PerDimension(FeatureMap):
    """One feature per dimension."""

    estimates_softmax = False

    def __init__(self, features: int) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}")
        self.features = features


class EluFeatures(_PerDimension):
    """``elu(x) + 1``: the first-order expansion of the exponential above zero, the exponential itself below.

    Args:
        features: width of queries and keys.

    Source: Scientific Spaces archive 7546; arXiv:2006.16236
    """

    def log_query(self, q: Tensor) -> Tensor:
        """As the base class says."""
        q = widen(q)
        return torch.where(q > 0, q.clamp_min(0).log1p(), q)

    def log_key(self, k: Tensor) -> Tensor:
        """As the base class says."""
        return self.log_query(k)


class ExpFeatures(_PerDimension):
    """``exp(x)`` of each dimension: the plain activation that the source recommends.

    Args:
        features: width of queries and keys.

    Source: Scientific Spaces archive 8601
    """

    def log_query(self, q: Tensor) -> Tensor:
        """As the base class says."""
        return widen(q)

    def log_key(self, k: Tensor) -> Tensor:
        """As the base class says."""
        return self.log_query(k)


class EfficientFeatures(_PerDimension):
    """Efficient attention: softmax over the features of a query, and of each feature of the keys over the length.

    Args:
        features: width of queries and keys.

    Source: Scientific Spaces archive 7546; arXiv:1812.01243
    """

    bidirectional_only = True

    def log_query(self, q: Tensor) -> Tensor:
        """As the base class says."""
        return widen(q).log_softmax(-1)

    def log_key(self, k: Tensor) -> Tensor:
        """As the base class says; the engine normalises over the length."""
        return widen(k)


class FavorFeatures(FeatureMap):
    """Positive random features of the softmax kernel (FAVOR+), unbiased for ``exp(q.k)``.

    Args:
        head_dim: width of queries and keys.
        features: how many; default ``4 * head_dim``.
        norms: lengths of the orthogonal rows: ``chi`` as of Gaussian vectors, ``regularised`` all ``sqrt(head_dim)``
            (less variance, biased), ``stratified`` at the quantiles i/(features + 1) of the chi distribution.
        seed: of the rows.

    Raises:
        ValueError: a size below 1 or an unknown kind of norms.

    Source: Scientific Spaces archives 7921, 9862; arXiv:2009.14794
    """

    projection: Tensor

    def __init__(self, head_dim: int, features: int | None = None, *, norms: Norms = "chi", seed: int = 0) -> None:
        super().__init__()
        self.features = 4 * head_dim if features is None else features
        self.norms: Norms = norms
        self.seed = seed
        self.register_buffer("projection", orthogonal_features(self.features, head_dim, norms=norms, seed=seed))

    def reset_parameters(self) -> None:
        """Draw the rows of the seed again."""
        self.redraw(self.seed)

    @torch.no_grad()
    def redraw(self, seed: int) -> None:
        """Replace the rows, for instance every thousand steps of training; states made before become meaningless.

        Args:
            seed: of the new rows.
        """
        rows = orthogonal_features(self.features, self.projection.shape[-1], norms=self.norms, seed=seed)
        self.projection.copy_(rows)

    def log_query(self, q: Tensor) -> Tensor:
        """w.q; -|q|^2/2 and the number of features cancel."""
        q = widen(q)
        return q @ self.projection.to(q.dtype).mT

    def log_key(self, k: Tensor) -> Tensor:
        """w.k - |k|^2/2."""
        k = widen(k)
        return k @ self.projection.to(k.dtype).mT - k.square().sum(-1, keepdim=True) / 2


class _Codes(FeatureMap):
    def distance(self, k: Tensor, codebook: Tensor) -> Tensor:
        """Half of the squared distance of each key to each code."""
        half = k.square().sum(-1, keepdim=True) / 2 + codebook.square().sum(-1)[..., None, :] / 2
        return half - k @ codebook.mT


class HardVQ(_Codes):
    """Each key becomes its nearest code: attention to quantised keys, without a window.

    Args:
        codebook: (features, dim), or (kv_heads, features, dim); kept as a buffer. Ties go to the first code.

    Source: Scientific Spaces archives 9844, 9862; arXiv:2309.16354
    """

    codebook: Tensor

    def __init__(self, codebook: Tensor) -> None:
        super().__init__()
        self.features = codebook.shape[-2]
        self.register_buffer("codebook", codebook.detach().clone())

    def log_query(self, q: Tensor) -> Tensor:
        """q.c of each code."""
        q = widen(q)
        return q @ self.codebook.to(q.dtype).mT

    def log_key(self, k: Tensor) -> Tensor:
        """0 at the nearest code and -inf elsewhere."""
        k = widen(k)
        nearest = self.distance(k, self.codebook.to(k.dtype)).argmin(-1, keepdim=True)
        return torch.full_like(k[..., :1].expand(*k.shape[:-1], self.features), -torch.inf).scatter(-1, nearest, 0.0)


class SoftVQ(_Codes):
    """Keys spread over codes by ``softmax(-|k - c|^2 / (2 tau))``: between vector quantisation and FAVOR+.

    As tau goes to 0 this is :class:`HardVQ`. With ``key_weight="performer"`` and tau 1 it is FAVOR+ with the codes as
    its rows, whatever their lengths: a key keeps the factor that the softmax over codes divides out.

    Args:
        codebook: (features, dim), or (kv_heads, features, dim); a parameter, gradients reach it.
        tau: temperature in units of squared distance between scaled keys, > 0.
        key_weight: ``none``: every key has total weight 1; ``performer``: the features are
            ``exp((k.c - |k|^2/2) / tau)``.

    Raises:
        ValueError: tau is not positive, or an unknown key_weight.

    Source: Scientific Spaces archive 9862
    """

    def __init__(self, codebook: Tensor, *, tau: float = 1.0, key_weight: KeyWeight = "none") -> None:
        super().__init__()
        if not tau > 0:
            raise ValueError(f"tau must be > 0, got {tau}; take HardVQ for the limit of 0")
        if key_weight not in ("none", "performer"):
            raise ValueError(f'key_weight must be "none" or "performer", got {key_weight!r}')
        self.features = codebook.shape[-2]
        self.tau = tau
        self.key_weight = key_weight
        self.codebook = nn.Parameter(codebook.detach().clone())

    def log_query(self, q: Tensor) -> Tensor:
        """q.c of each code."""
        q = widen(q)
        return q @ self.codebook.to(q.dtype).mT

    def log_key(self, k: Tensor) -> Tensor:
        """Log-probability of each code, or the unnormalised weight."""
        k = widen(k)
        codebook = self.codebook.to(k.dtype)
        if self.key_weight == "performer":
            return (k @ codebook.mT - k.square().sum(-1, keepdim=True) / 2) / self.tau
        return (-self.distance(k, codebook) / self.tau).log_softmax(-1)


def orthogonal_features(features: int, dim: int, *, norms: Norms = "chi", seed: int = 0) -> Tensor:
    """Rows that are orthogonal in blocks of ``dim`` and, with ``chi`` norms, Gaussian one by one.

    Args:
        features: number of rows, >= 1; the last block is cut short.
        dim: length of a row, >= 1.
        norms: as in :class:`FavorFeatures`.
        seed: of the rows.

    Returns:
        float32 tensor (features, dim) on the CPU.

    Raises:
        ValueError: a size below 1 or an unknown kind of norms.

    Source: Scientific Spaces archive 7921; arXiv:2009.14794
    """
    if features < 1 or dim < 1:
        raise ValueError(f"features and dim must be at least 1, got {features} and {dim}")
    if norms not in ("chi", "regularised", "stratified"):
        raise ValueError(f'norms must be "chi", "regularised" or "stratified", got {norms!r}')
    # an explicit device: hosts build models under a default device that holds no numbers
    generator = torch.Generator(device="cpu").manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    blocks = -(-features // dim)
    q, r = torch.linalg.qr(torch.randn(blocks, dim, dim, **draw))  # type: ignore[call-overload]
    # the sign of the diagonal makes the rotation uniform
    rows = (q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]).mT.reshape(-1, dim)[:features]
    if norms == "regularised":
        lengths = torch.full((features,), dim**0.5, dtype=torch.float64, device="cpu")
    elif norms == "stratified":
        levels = torch.arange(1, features + 1, dtype=torch.float64, device="cpu") / (features + 1)
        # shuffled, so that a block of orthogonal rows does not hold neighbouring lengths
        lengths = chi_quantile(levels, dim)[torch.randperm(features, generator=generator, device="cpu")]
    else:
        lengths = torch.randn(features, dim, **draw).norm(dim=-1)  # type: ignore[call-overload]
    return (rows * lengths[:, None]).float()


def chi_quantile(level: Tensor, dim: int) -> Tensor:
    """Length below which a standard normal vector stays with a given probability.

    Args:
        level: float64 probabilities in (0, 1).
        dim: dimension of the vector, >= 1.

    Returns:
        Lengths, of the shape of ``level``.
    """
    half_dim = torch.full_like(level, dim / 2)
    low, high = torch.zeros_like(level), torch.full_like(level, dim**0.5 + 40.0)
    for _ in range(80):
        middle = (low + high) / 2
        below = torch.special.gammainc(half_dim, middle.square() / 2) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
