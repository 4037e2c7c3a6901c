"""DeepNorm for host models: initialise, scale the residual, save, load, and fold the scale away."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from danlu.hosts.architecture import Architecture, read_architecture
from danlu.hosts.parameters import Kind, classify_parameters
from danlu.models.initialise import initialise, signs_of_training
from danlu.models.post_norm import check_convertible, is_post_norm_replacement, set_residual, unset_residual
from danlu.models.residual import Norm, Recipe, check_positive, deepnorm_constants

__all__ = [
    "DeepNorm",
    "apply_deepnorm",
    "fold_alpha",
    "load_deepnorm",
    "restore_deepnorm",
    "vector_rate_groups",
]

logger = logging.getLogger("danlu.models")

_KEYS = ("deepnorm_alpha", "deepnorm_gain", "deepnorm_norm")
#: exponents of 2N for the learning rate of gains, offsets and biases
_VECTOR_RATES = {"sgd": -0.5, "adam": -1.0}


class DeepNorm(NamedTuple):
    """What :func:`apply_deepnorm` did: layers counted, residual factor, initial gain, place of the norms."""

    layers: int
    alpha: float
    gain: float
    norm: str


def apply_deepnorm(
    model: Any,
    optimizer: Recipe = "paper",
    norm: Norm = "post",
    *,
    alpha: float | None = None,
    gain: float | None = None,
    force: bool = False,
    seed: int | torch.Generator = 0,
) -> DeepNorm:
    """Make a fresh host model a DeepNorm model, in place: initial weights anew, and with ``norm="post"`` the residual.

    Every block becomes ``x = norm(alpha x + F(x))``, twice. Decoders of the Llama and GPT-2 kinds are pre-norm by
    construction: their blocks are replaced by ones that keep all parameter names, and the norm after the last block is
    frozen and idle, as the last block ends with one. In encoders of the BERT kind the two output modules are replaced.
    With ``norm="pre"`` nothing is replaced.

    All matrices of the blocks are drawn from a Xavier normal, std = gain sqrt(2 / (fan_in + fan_out)), with the gain on
    value, attention output and all feed-forward matrices, and 1 on query and key, which softmax hides. In a fused
    matrix each part has its own fan_out. Biases of the blocks become 0 and norms go back to rest; embeddings and head
    stay. ``model.config`` says ``deepnorm_alpha``, ``deepnorm_gain`` and ``deepnorm_norm``. A stock ``from_pretrained``
    knows nothing of them: load post-norm models with :func:`load_deepnorm`, or see :func:`fold_alpha`.

    ``alpha=1, gain=1`` is the vanilla post-norm model to compare with.

    Args:
        model: a ``transformers`` model that :func:`danlu.hosts.architecture.read_architecture` understands.
        optimizer: recipe for the constants, see :func:`danlu.deepnorm_constants`; N is the number of blocks.
        norm: ``post`` or ``pre``.
        alpha: residual factor in place of the recipe's, > 0; pre-norm has 1.
        gain: initial gain in place of the recipe's, > 0.
        force: initialise a model that seems to be trained.
        seed: or a generator on the CPU, from which the weights are drawn.

    Returns:
        The constants used.

    Raises:
        ValueError: the model seems trained (loaded from a checkpoint, or norms or biases moved), has DeepNorm already,
            is on the meta device, or pre-norm is asked of an encoder or with ``alpha`` other than 1.
        UnsupportedArchitecture: the blocks are of another kind; nothing has been changed.

    Source: Scientific Spaces archive 8978; arXiv:2203.00555
    """
    alpha = None if alpha is None else check_positive("alpha", alpha)
    gain = None if gain is None else check_positive("gain", gain)
    architecture = read_architecture(model)
    layers = len(architecture.blocks)
    if alpha is None or gain is None:
        constants = deepnorm_constants(n_decoder=layers, optimizer=optimizer, norm=norm)
        alpha = constants.decoder_alpha if alpha is None else alpha
        gain = constants.decoder_beta if gain is None else gain
    if alpha is None or gain is None or norm not in ("post", "pre"):
        raise ValueError(f"norm must be post or pre, got {norm!r}")
    if norm == "pre" and alpha != 1:
        raise ValueError(f"alpha must be 1 with norm='pre', got {alpha:g}: a pre-norm stream is never normalised")
    _check_fresh(architecture, norm, force)
    if norm == "post":
        check_convertible(architecture)
    if len({id(block.feed_forward.down.module.weight) for block in architecture.blocks}) < layers:
        logger.warning(
            "blocks of %s share their weights; N = %d counts applications, not matrices", type(model).__name__, layers
        )
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    initialise(architecture, gain, generator)
    if norm == "post":
        set_residual(architecture, alpha)
    for key, value in zip(_KEYS, (alpha, gain, norm), strict=True):
        setattr(model.config, key, value)
    return DeepNorm(layers, alpha, gain, norm)


def restore_deepnorm(model: Any) -> None:
    """Put the residual that ``model.config`` asks for into a model with loaded weights; no weight changes.

    Args:
        model: a model made by a stock ``from_pretrained`` (or ``from_config``) of a saved DeepNorm model.

    Raises:
        ValueError: the config says nothing of DeepNorm, or the residual is there already.

    Source: Scientific Spaces archive 8978
    """
    alpha, norm = (getattr(model.config, key, None) for key in ("deepnorm_alpha", "deepnorm_norm"))
    if alpha is None or norm not in ("post", "pre"):
        raise ValueError("model.config must hold deepnorm_alpha and deepnorm_norm, as apply_deepnorm writes them")
    if norm == "pre":
        return
    if _has_deepnorm(model):
        raise ValueError("model must not have DeepNorm already; its residual is scaled once")
    architecture = read_architecture(model)
    check_convertible(architecture)
    set_residual(architecture, check_positive("deepnorm_alpha", alpha))


def load_deepnorm(path: str | Path, auto_class: Any, **options: Any) -> Any:
    """Load a saved DeepNorm model: ``auto_class.from_pretrained`` and then :func:`restore_deepnorm`.

    Args:
        path: folder (or hub name) of a model that was saved with ``save_pretrained``.
        auto_class: class with ``from_pretrained``, such as ``AutoModelForCausalLM``.
        options: for ``from_pretrained``; with a ``device_map`` over several devices, the blocks cannot be replaced.

    Returns:
        The model in evaluation mode, with the function it had when it was saved.

    Raises:
        ValueError: its config says nothing of DeepNorm.

    Source: Scientific Spaces archive 8978
    """
    model = auto_class.from_pretrained(path, **options)
    restore_deepnorm(model)
    return model


@torch.no_grad()
def fold_alpha(model: Any) -> None:
    """Turn a DeepNorm encoder of the BERT kind into a stock host model of the same function, in place.

    Each norm that feeds a residual is multiplied by alpha (gain and offset) and the matrices that read it are divided
    by alpha: with y = alpha x, ``LN(alpha x + F(x))`` is ``LN(y + F(y / alpha))``. The last norm, which feeds the head,
    stays. No eps changes, so it is exact up to rounding, dropout and tied heads included. Afterwards every runtime that
    knows the host reads the model. Fold when training is over: the folded weights have other gradients.

    Decoders cannot be folded: the hosts of the Llama and GPT-2 kinds have no post-norm block.

    Args:
        model: a model that :func:`apply_deepnorm` made, of the BERT kind.

    Raises:
        ValueError: the model has no DeepNorm residual, is a decoder of another kind, or puts something between the
            first norm and the blocks.

    Source: danlu; the function is that of Scientific Spaces archive 8978
    """
    if not _has_deepnorm(model):
        raise ValueError("model must have a post-norm DeepNorm residual, got none; nothing is to be folded")
    architecture = read_architecture(model)
    first = architecture.embedding_norm
    if architecture.family != "bert" or first is None:
        raise ValueError(
            f"model must be of the BERT kind, got {type(model).__name__}, whose host has no post-norm block; save it "
            "and use load_deepnorm"
        )
    if hasattr(architecture.base, "embeddings_project"):
        raise ValueError("model must feed its first norm to the blocks, got a projection between them")
    alpha = model.config.deepnorm_alpha
    for block in architecture.blocks:
        for reader in (block.attention.query, block.attention.key, block.attention.value, block.feed_forward.up):
            reader.weight.div_(alpha)
    inner = [norm for block in architecture.blocks for norm in block.norms.values()]
    for norm in (first[1], *inner[:-1]):
        for parameter in norm.parameters():
            parameter.mul_(alpha)
    unset_residual(architecture)
    for key in _KEYS:
        delattr(model.config, key)


def vector_rate_groups(
    model: nn.Module,
    learning_rate: float,
    optimizer: str = "adam",
    *,
    factor: float | None = None,
    overrides: Mapping[str, Kind | str] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups with a smaller learning rate for gains, offsets and biases.

    DeepNorm bounds the updates of matrices. Neither source scales the vectors of a block, and in deep models they
    dominate the first updates; a rate of (2N)^(-1/2) for SGD or (2N)^(-1) for Adam bounds them too.

    Args:
        model: a host model.
        learning_rate: of matrices and embeddings, > 0.
        optimizer: ``sgd`` or ``adam``, for the factor.
        factor: of the learning rate of vectors in place of that, in 0..1; 0 freezes them until the group is changed.
        overrides: as in :func:`danlu.hosts.parameters.classify_parameters`.

    Returns:
        Two groups for a ``torch.optim`` optimiser, matrices and embeddings first; frozen parameters are left out.

    Raises:
        ValueError: an argument is outside its range, or there is no block to count.

    Source: measured here; see the page on DeepNorm
    """
    check_positive("learning_rate", learning_rate)
    if factor is None:
        if optimizer not in _VECTOR_RATES:
            raise ValueError(f"optimizer must be one of {', '.join(_VECTOR_RATES)} or factor given, got {optimizer!r}")
        factor = (2 * len(read_architecture(model).blocks)) ** _VECTOR_RATES[optimizer]
    if not 0 <= factor <= 1:
        raise ValueError(f"factor must be in 0..1, got {factor}")
    kinds = classify_parameters(model, overrides)
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": learning_rate},
        {"params": [], "lr": learning_rate * factor},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[kinds[name] not in (Kind.MATRIX, Kind.EMBEDDING)]["params"].append(parameter)
    return groups


def _has_deepnorm(model: nn.Module) -> bool:
    return any(is_post_norm_replacement(module) for module in model.modules())


def _check_fresh(architecture: Architecture, norm: str, force: bool) -> None:
    model: Any = architecture.model
    name = type(model).__name__
    if _has_deepnorm(model):
        raise ValueError(f"{name} has DeepNorm already; build a fresh model to change its constants")
    if norm == "pre" and architecture.post_norm:
        raise ValueError(f"norm must be post for {name}, which is post-norm by construction, got 'pre'")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{name} must have its weights in memory, got parameters on the meta device")
    if not force and (reason := signs_of_training(architecture)):
        raise ValueError(
            f"{name} seems to be trained ({reason}) and would be initialised anew; make it from its config, or pass "
            "force=True to lose the weights"
        )
