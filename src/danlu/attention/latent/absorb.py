"""Absorbed decoding for the latent attention (MLA) models of the host library, on the cache that they already keep."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["absorb", "unabsorb"]

logger = logging.getLogger("danlu.attention")

ModelT = TypeVar("ModelT", bound=nn.Module)

# Relative to the largest entry of a layer's output; the two forms round differently.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.02}
_PROBE_CALLS = (5, 2, 1)  # tokens of a prefill, of a chunk and of a step


def absorb(model: ModelT) -> ModelT:
    """Let a latent attention model decode on its cached latents, in place and with unchanged outputs.

    The host caches one latent per token, and expands the keys and values of the whole context from it at every step.
    Afterwards a step reads the latents as they are, some tens of times cheaper at a few thousand tokens. Each call
    takes the cheaper form (:func:`danlu.attention.latent.absorbed.prefers_absorbed`): a prefill or a long chunk runs as
    before, as does any call with ``output_attentions``, attention dropout or an adapter on ``kv_b_proj``. Layers with
    an indexer (DeepSeek-V3.2 and its kin, GLM-5-Next excepted) read only the selected latents in a step. Caches, beam
    search, padding and ``save_pretrained`` work as before; weights are not touched.

    It goes through the host's attention registry: the model's implementation becomes ``danlu_absorbed_sdpa`` or
    ``danlu_absorbed_eager``, and each latent layer's ``expand_kv`` is replaced on the instance, by a method that hands
    the latents on. Empty layers of a plain growing cache become ones that hold the same and append in place. The
    forward passes and classes of the host stay as they are; ``copy.deepcopy`` keeps the change, and a saved model does
    not have it. Both forms are compared on a few tokens in every layer before it is accepted.

    Args:
        model: a Hugging Face model with latent attention layers, possibly wrapped. Calling it again changes nothing.

    Returns:
        The same object.

    Raises:
        TypeError: a part of a model is given, such as one attention layer.
        ValueError: there is no latent attention layer, the installed host caches expanded keys, the up-projection is
            quantised or wrapped by an adapter, the attention implementation is not ``sdpa`` or ``eager``, or the
            outputs do not agree; the message names the class.

    Source: Scientific Spaces archive 10091; arXiv:2405.04434.
    """
    layers = _latent_layers(model)
    from danlu.attention.latent.host import PREFIX, is_served, serve

    if all(is_served(layer) and layer.config._attn_implementation.startswith(PREFIX) for layer in layers):
        return model
    unabsorb(model)
    for layer in layers:
        _check_layer(layer)
    owners = _owners(model, layers)
    if {id(owner.config) for owner in owners} != {id(layer.config) for layer in layers}:
        raise TypeError(
            f"model must be or hold the Hugging Face model of its attention layers, got {type(model).__name__}"
        )
    with _probing(model):
        stock, _ = _run_probe(model, layers)
        try:
            for layer in layers:
                serve(layer)
            for owner in owners:
                _set_implementation(owner, PREFIX + owner.config._attn_implementation)
            again, errors = _run_probe(model, layers)
            _compare(layers, stock, again, errors)
        except BaseException:
            unabsorb(model)
            raise
    logger.info("%s: %d latent attention layers decode in absorbed form", type(model).__name__, len(layers))
    return model


def unabsorb(model: ModelT) -> ModelT:
    """Undo :func:`absorb`: the model is as it was, to the bit.

    Args:
        model: the model, absorbed or not, or a copy of an absorbed one.

    Returns:
        The same object.

    Source: Scientific Spaces archive 10091.
    """
    from danlu.attention.latent.host import PREFIX, is_served, release

    layers: list[Any] = [module for module in model.modules() if is_served(module)]
    for layer in layers:
        release(layer)
    for owner in _owners(model, layers):
        name = owner.config._attn_implementation
        if name.startswith(PREFIX):
            _set_implementation(owner, name.removeprefix(PREFIX))
    return model


def _latent_layers(model: nn.Module) -> list[Any]:
    layers = [m for m in model.modules() if isinstance(getattr(m, "kv_b_proj", None), nn.Module)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no latent attention layer (one with a kv_b_proj); absorb is for MLA models "
            "such as DeepSeek-V2 and V3"
        )
    for layer in layers:
        if not callable(getattr(layer, "expand_kv", None)) or not hasattr(layer, "config"):
            import transformers

            raise ValueError(
                f"{type(layer).__name__} has no expand_kv: transformers {transformers.__version__} caches its expanded "
                "keys and values, or it is no layer of transformers; absorb needs a release that caches the latent"
            )
    return layers


def _check_layer(layer: Any) -> None:
    from danlu.attention.latent.host import BASES, plain_weight

    name = type(layer).__name__
    weight = plain_weight(layer)
    if weight is None:
        raise ValueError(
            f"{name}.kv_b_proj must be a plain linear layer without bias, got {type(layer.kv_b_proj).__name__}: "
            "merge the adapter, dequantise the layer or load it without offloading first"
        )
    rows = layer.num_heads * (layer.qk_nope_head_dim + layer.v_head_dim)
    if weight.shape != (rows, layer.kv_lora_rank):
        raise ValueError(
            f"{name}.kv_b_proj must map {layer.kv_lora_rank} to heads * (key + value) = {rows}, got a weight of shape "
            f"{tuple(weight.shape)}"
        )
    base = layer.config._attn_implementation
    if base not in BASES:
        raise ValueError(
            f"the attention implementation of {name} must be one of {sorted(BASES)}, got {base!r}: call "
            "model.set_attn_implementation('sdpa') (or danlu.restore(model)) first"
        )


def _owners(model: nn.Module, layers: list[Any]) -> list[Any]:
    """The outermost host model of each configuration that has latent layers: in a composite, the text part."""
    from transformers import PreTrainedModel

    wanted = {id(layer.config) for layer in layers}
    owners: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and id(module.config) in wanted:
            owners.setdefault(id(module.config), module)
    return list(owners.values())


def _set_implementation(owner: Any, name: str) -> None:
    owner.set_attn_implementation({"": name})  # parts with a configuration of their own keep theirs
    if owner.config._attn_implementation != name:
        raise ValueError(f"{type(owner).__name__} does not let its attention implementation be set to {name!r}")


@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _run_probe(model: Any, layers: list[Any]) -> tuple[list[list[Tensor]], list[list[float]]]:
    """Run a few tokens; per layer, the outputs and (once absorbed) the differences of the two forms."""
    from danlu.attention.latent.host import PROBE

    outputs: list[list[Tensor]] = [[] for _ in layers]
    errors: list[list[float]] = [[] for _ in layers]
    handles = []
    for layer, seen, record in zip(layers, outputs, errors, strict=True):
        layer.__dict__[PROBE] = record
        handles.append(layer.register_forward_hook(lambda _m, _a, output, seen=seen: seen.append(output[0])))
    try:
        ids, start, cache = _probe_ids(model), 0, None
        for length in _PROBE_CALLS:
            result = model(input_ids=ids[:, start : start + length], past_key_values=cache, use_cache=True)
            cache, start = result.past_key_values, start + length
    finally:
        for layer, handle in zip(layers, handles, strict=True):
            handle.remove()
            del layer.__dict__[PROBE]
    return outputs, errors


def _probe_ids(model: Any) -> Tensor:
    """A few token ids that stand for no image or other special thing."""
    table = model.get_input_embeddings().weight
    configs = [model.config, model.config.get_text_config()]
    special = {
        value
        for config in configs
        for name, value in vars(config).items()
        if isinstance(value, int) and name.endswith(("token_id", "token_index"))
    }
    plain = [i for i in range(min(table.shape[0], sum(_PROBE_CALLS) + len(special))) if i not in special]
    ids = [plain[i % len(plain)] for i in range(sum(_PROBE_CALLS))]
    return torch.tensor([ids], device=table.device)


def _compare(
    layers: list[Any], stock: list[list[Tensor]], again: list[list[Tensor]], errors: list[list[float]]
) -> None:
    from danlu.attention.latent.host import relative_error

    for layer, before, after, record in zip(layers, stock, again, errors, strict=True):
        name = f"{type(layer).__name__} (layer {getattr(layer, 'layer_idx', '?')})"
        if not record:
            raise ValueError(f"{name} never handed its latents to the attention function; absorb cannot serve it")
        tolerance = _TOLERANCE.get(layer.kv_b_proj.weight.dtype, 0.06)
        worst = max(*record, *(relative_error(a, b) for a, b in zip(after, before, strict=True)))
        if not worst <= tolerance:
            raise ValueError(
                f"{name}: absorbed and expanded outputs differ by {worst:.1e} of the largest entry, more than "
                f"{tolerance:.0e}; its keys and values are more than one linear map of the latent"
            )
