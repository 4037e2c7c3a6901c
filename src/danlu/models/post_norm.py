"""Blocks of host models with a post-norm residual: replaced modules that keep the names of all parameters.

A replacement is an instance of a subclass of the host's own class that adopts the parameters, children, hooks and flags
of the module it replaces. Recording of hidden states, gradient checkpointing and sharding by class go on working.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from danlu.hosts.architecture import Architecture, Block, UnsupportedArchitecture
from danlu.hosts.parameters import is_norm
from danlu.models.residual import scaled_residual

__all__ = ["check_convertible", "is_post_norm_replacement", "set_residual", "unset_residual"]


class _Replacement:
    """Marks every class that is made here."""

    _host_class: type[nn.Module]
    _host_arguments: tuple[str, ...]


class _PostNormBlock(_Replacement):
    """A decoder block as norm(alpha x + F(x)), twice; its host computes x + F(norm(x))."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Hosts pass the rest by position (GPT-2) or by name (Llama).
        kwargs.update(zip(self._host_arguments, args, strict=False))
        attend, feed = _branches(self, kwargs)
        first, second = (getattr(self, name) for name in self._norm_names)
        alpha = self.deepnorm_alpha
        hidden_states = first(scaled_residual(hidden_states, attend(hidden_states), alpha))
        return second(scaled_residual(hidden_states, feed(hidden_states), alpha))


class _PostNormOutput(_Replacement):
    """BERT's output module, LayerNorm(dropout(dense h) + x), with x times alpha."""

    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        update = self.dropout(self.dense(hidden_states))
        return self.LayerNorm(scaled_residual(input_tensor, update, self.deepnorm_alpha))


class _IdleNorm(_Replacement):
    """The norm after the last block, which a post-norm stack has inside its last block already.

    It hands its input on. Its parameters stay at rest and frozen, so that checkpoints keep the host's keys.
    """

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return hidden_states


def check_convertible(architecture: Architecture) -> None:
    """Refuse a model whose blocks cannot be given a post-norm residual; changes nothing.

    A decoder block is tried out: its host's forward pass on random numbers must be x + F(norm(x)), twice.

    Args:
        architecture: reading of the model.

    Raises:
        UnsupportedArchitecture: other residual paths (parallel, scaled, norms after a branch), more than two norms, or
            dropout on the branches outside attention and feed-forward.
        ValueError: something has put another forward function on the blocks.
    """
    for block in architecture.blocks:
        for module in _replaced(architecture, block):
            if "forward" in vars(module):
                raise ValueError(
                    f"{block.name} must have the forward of its class, got one set on the instance "
                    "(offloading and device_map do that); convert the model first, then dispatch it"
                )
    if architecture.family == "bert":
        for block in architecture.blocks:
            for module in _replaced(architecture, block):
                if not all(hasattr(module, part) for part in ("dense", "dropout", "LayerNorm")):
                    raise UnsupportedArchitecture(
                        f"{block.name} must end its sublayers with dense, dropout and LayerNorm (BERT, RoBERTa), "
                        f"got {type(module).__name__} without one of them"
                    )
        return
    seen = set()
    for block in architecture.blocks:
        if (kind := type(block.module)) not in seen:
            seen.add(kind)
            _check_sequential_pre_norm(architecture, block)


def set_residual(architecture: Architecture, alpha: float) -> None:
    """Replace the blocks of a decoder, or the output modules of an encoder, by such with norm(alpha x + F(x)).

    Args:
        architecture: reading of the model, checked by :func:`check_convertible`. Its blocks' ``module`` fields go
            stale: read the model again afterwards.
        alpha: > 0.
    """
    if architecture.family == "bert":
        for block in architecture.blocks:
            attention: Any = block.attention.module
            layer: Any = block.module
            attention.output = _adopt(attention.output, _PostNormOutput, deepnorm_alpha=alpha)
            layer.output = _adopt(layer.output, _PostNormOutput, deepnorm_alpha=alpha)
        return
    blocks: Any = architecture.model.get_submodule(architecture.blocks_name)
    # A block that stands at several depths stays one block.
    made: dict[int, nn.Module] = {}
    for index, block in enumerate(architecture.blocks):
        if id(block.module) not in made:
            made[id(block.module)] = _adopt(
                block.module, _PostNormBlock, deepnorm_alpha=alpha, _norm_names=_block_norms(block)
            )
        blocks[index] = made[id(block.module)]
    if architecture.final_norm is not None:
        name, norm = architecture.final_norm
        idle = _adopt(norm, _IdleNorm)
        idle.requires_grad_(False)
        _put(architecture.model, name, idle)


def unset_residual(architecture: Architecture) -> None:
    """Put the host's own output modules back into an encoder; the function it computes changes unless alpha is 1."""
    for block in architecture.blocks:
        for owner in (block.attention.module, block.module):
            output: Any = owner.output
            host = output._host_class
            plain = host.__new__(host)
            plain.__dict__ = {key: value for key, value in vars(output).items() if key != "deepnorm_alpha"}
            owner.output = plain


def is_post_norm_replacement(module: nn.Module) -> bool:
    """Whether a module was put in by :func:`set_residual`."""
    return isinstance(module, _Replacement)


def _replaced(architecture: Architecture, block: Block) -> list[nn.Module]:
    if architecture.family != "bert":
        return [block.module]
    return [block.attention.module.output, block.module.output]  # type: ignore[list-item]


def _block_norms(block: Block) -> tuple[str, ...]:
    return tuple(name for name, child in block.module.named_children() if is_norm(child))


def _branches(block: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Attention and feed-forward of a decoder block as functions of the hidden states."""
    if kwargs.pop("encoder_hidden_states", None) is not None:
        raise ValueError("encoder_hidden_states must be None, got a tensor: the model has no cross-attention")
    kwargs.pop("encoder_attention_mask", None)
    attention = block.self_attn if hasattr(block, "self_attn") else block.attn
    return (lambda x: attention(hidden_states=x, **kwargs)[0]), block.mlp


def _adopt(module: nn.Module, mixin: Any, **attributes: Any) -> nn.Module:
    host: Any = type(module)
    made = _subclass(mixin, host)
    new = made.__new__(made)
    # The dictionaries are shared: handles of hooks refer to them.
    new.__dict__ = {**vars(module), **attributes}
    return new


@functools.cache
def _subclass(mixin: Any, host: Any) -> Any:
    arguments = tuple(
        name for name, value in inspect.signature(host.forward).parameters.items() if value.kind != value.VAR_KEYWORD
    )
    body = {"_host_class": host, "_host_arguments": arguments[2:], "__module__": __name__}
    return type(f"PostNorm{host.__name__}", (mixin, host), body)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


@torch.no_grad()
def _check_sequential_pre_norm(architecture: Architecture, block: Block) -> None:
    kind = type(block.module).__name__
    norms = _block_norms(block)
    if len(norms) != 2:
        raise UnsupportedArchitecture(
            f"{block.name} must have two norms, one before each sublayer, got {list(norms)} in {kind}"
        )
    dropped = [name for name, child in block.module.named_children() if isinstance(child, nn.Dropout) and child.p > 0]
    if dropped:
        raise UnsupportedArchitecture(
            f"{block.name} must have no dropout of its own, got {dropped} in {kind}; set it to 0"
        )
    trial: Any = copy.deepcopy(block.module).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in trial.parameters():
        if parameter.ndim > 1:  # branches as large as the stream, so that a missing factor shows
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    for module in trial.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = "eager"
    like = next(trial.parameters())
    x = torch.randn(1, 3, architecture.config.hidden_size, generator=generator).to(like)
    places = torch.arange(3, device=like.device)[None]
    rotary = getattr(architecture.base, "rotary_emb", None)
    kwargs = {"attention_mask": None} | ({} if rotary is None else {"position_embeddings": rotary(x, places)})
    try:
        ours = x
        for norm, branch in zip(norms, _branches(trial, dict(kwargs)), strict=True):
            ours = ours + branch(getattr(trial, norm)(ours))
        hosts = trial(x, **kwargs)
        hosts = hosts[0] if isinstance(hosts, tuple) else hosts
    except (TypeError, AttributeError) as error:
        raise UnsupportedArchitecture(f"{block.name} ({kind}) cannot be called on its own: {error}") from error
    if not torch.allclose(ours, hosts, rtol=1e-2, atol=1e-2):
        raise UnsupportedArchitecture(
            f"{block.name} must compute x + F(norm(x)) for attention and then for feed-forward, got another residual "
            f"path in {kind} (parallel or scaled branches, or norms after them)"
        )
