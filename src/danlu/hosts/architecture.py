"""One reading of a host model: its blocks, what each matrix does, where the residual stream is written and read.

Fused projections, transposed layouts, grouped heads, gated feed-forward layers, tied heads and the place of the norms
differ between host families. Growth, DeepNorm and ladders ask here and need not know a family.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from danlu.hosts.parameters import is_norm


@dataclass(frozen=True)
class Matrix:
    """One linear map x -> W x + b, which may be a part of a fused module and may be stored transposed.

    Args:
        name: dotted name of the module in the model.
        module: holds ``weight`` and maybe ``bias``.
        start: first output row of this map in the module.
        stop: one past the last output row; none means all rows.
        transposed: the weight is stored as (in, out), as GPT-2's Conv1D does.
    """

    name: str
    module: nn.Module
    start: int = 0
    stop: int | None = None
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """A view of shape (out, in) that writes through to the parameter."""
        whole: Tensor = self.module.weight  # type: ignore[assignment]
        return (whole.T if self.transposed else whole)[self.start : self.stop]

    @property
    def bias(self) -> Tensor | None:
        """A view of shape (out,), or none."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias[self.start : self.stop]


@dataclass(frozen=True)
class Attention:
    """Projections of one attention layer: q (heads * head_dim, hidden), k and v (kv_heads * head_dim, hidden)."""

    name: str
    module: nn.Module
    query: Matrix
    key: Matrix
    value: Matrix
    output: Matrix
    heads: int
    kv_heads: int
    head_dim: int
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None


@dataclass(frozen=True)
class FeedForward:
    """down(act(up x)), or down(act(gate x) * up x) when there is a gate."""

    name: str
    module: nn.Module
    up: Matrix
    down: Matrix
    gate: Matrix | None = None


@dataclass(frozen=True)
class Block:
    """One layer: attention and feed-forward with their norms by dotted name, in the order of the forward pass."""

    name: str
    module: nn.Module
    attention: Attention
    feed_forward: FeedForward
    norms: dict[str, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """What a model is made of.

    Args:
        family: ``llama`` (pre-norm, q_proj and kin), ``gpt2`` (pre-norm, fused Conv1D) or ``bert``
            (post-norm).
        model: the whole host model.
        base: the part without the head.
        blocks_name: dotted name of the list of blocks.
        blocks: the layers in order.
        embeddings: tables by dotted name: tokens first, then positions and segments where there are any.
        embedding_norm: norm after the embeddings (BERT), with its name.
        final_norm: norm after the last block (pre-norm models), with its name.
        head: the map from the last hidden state to logits; none for models without one.
        tied: the head shares its weight with the token table.
        post_norm: norms come after the residual sum.
    """

    family: str
    model: nn.Module
    base: nn.Module
    blocks_name: str
    blocks: tuple[Block, ...]
    embeddings: dict[str, nn.Embedding]
    embedding_norm: tuple[str, nn.Module] | None
    final_norm: tuple[str, nn.Module] | None
    head: Matrix | None
    tied: bool
    post_norm: bool

    @property
    def config(self) -> Any:
        """The host's configuration."""
        return self.model.config

    def matrices(self) -> Iterator[Matrix]:
        """Every projection of every block, fused parts one by one."""
        for block in self.blocks:
            attention, feed = block.attention, block.feed_forward
            yield from (attention.query, attention.key, attention.value, attention.output)
            yield from (matrix for matrix in (feed.gate, feed.up, feed.down) if matrix is not None)


class UnsupportedArchitecture(ValueError):
    """The model is not built in a way that is understood here."""


@dataclass(frozen=True)
class Stack:
    """Where the blocks of a model are, without a reading of what is in them (they may be quantised).

    Args:
        base: the part without the head.
        name: dotted name of the list of blocks in ``base``.
        blocks: the list itself.
        norms: norms of ``base`` outside the blocks: after the embeddings (or none), after the last block (or none).
    """

    base: nn.Module
    name: str
    blocks: nn.ModuleList
    norms: tuple[nn.Module | None, nn.Module | None]


def find_blocks(model: Any) -> Stack:
    """Find the list of blocks of a host model, whatever its projections are made of.

    Args:
        model: a ``transformers`` model with one stack of blocks.

    Returns:
        Base model, blocks and the norms around them. Where the list has none of the usual names, it is the longest
        ``ModuleList`` of modules of one class.

    Raises:
        UnsupportedArchitecture: an encoder-decoder, cross-attention, no such list, or one that is not of the length
            that the configuration says.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedArchitecture(f"model must have one stack of blocks, {type(model).__name__} has two")
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    names = {id(module): name for name, module in base.named_modules()}
    try:
        name, blocks = _block_list(base, names)
    except UnsupportedArchitecture:
        lists = [m for m in base.modules() if isinstance(m, nn.ModuleList) and len({type(block) for block in m}) == 1]
        if not lists:
            raise
        blocks = max(lists, key=len)
        name = names[id(blocks)]
    layers = getattr(model.config, "num_hidden_layers", None)
    if layers != len(blocks):
        raise UnsupportedArchitecture(
            f"model must have as many blocks as its configuration says, {type(model).__name__} has {len(blocks)} in "
            f"{name} for num_hidden_layers={layers}"
        )
    if any(hasattr(block, part) for block in blocks for part in ("crossattention", "encoder_attn")):
        raise UnsupportedArchitecture(f"model must have no cross-attention, got one in {name}")
    return Stack(base, name, blocks, _outer_norms(base, blocks))


def read_architecture(model: Any) -> Architecture:
    """Read how a host model is built.

    Args:
        model: a ``transformers`` model of the Llama kind (Llama, Mistral, Qwen2, Qwen3, Gemma and others with q_proj,
            k_proj, v_proj and o_proj, or Phi-3's fused form), of the GPT-2 kind or of the BERT kind (BERT, RoBERTa).

    Returns:
        The reading; its matrices are views into the model's parameters.

    Raises:
        UnsupportedArchitecture: another kind; the message names the part that was not understood.
    """
    names = {id(module): name for name, module in model.named_modules()}
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    blocks_name, blocks = _block_list(base, names)
    read = tuple(_block(block, names, model) for block in blocks)
    tables = {
        names[id(module)]: module
        for module in base.modules()
        if isinstance(module, nn.Embedding) and not any(module is m for block in blocks for m in block.modules())
    }
    tokens = base.get_input_embeddings()
    tables = {names[id(tokens)]: tokens, **tables}
    before, after = _outer_norms(base, blocks)
    head_module: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head = None if head_module is None else Matrix(names[id(head_module)], head_module)
    family = "bert" if _is_bert(blocks[0]) else "gpt2" if hasattr(read[0].module, "ln_1") else "llama"
    return Architecture(
        family=family,
        model=model,
        base=base,
        blocks_name=blocks_name,
        blocks=read,
        embeddings=tables,
        embedding_norm=None if before is None else (names[id(before)], before),
        final_norm=None if after is None else (names[id(after)], after),
        head=head,
        tied=head is not None and head.module.weight is tokens.weight,
        post_norm=family == "bert",
    )


def _block_list(base: nn.Module, names: dict[int, str]) -> tuple[str, Any]:
    for path in ("layers", "h", "encoder.layer"):
        found: Any = base
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.ModuleList) and len(found):
            return names[id(found)], found
    raise UnsupportedArchitecture(
        f"model must keep its blocks in layers (Llama), h (GPT-2) or encoder.layer (BERT), got {type(base).__name__}"
    )


def _is_bert(block: Any) -> bool:
    return hasattr(block, "intermediate") and hasattr(getattr(block, "attention", None), "self")


def _block(block: Any, names: dict[int, str], model: nn.Module) -> Block:
    name = names[id(block)]
    config: Any = model.config
    norms = {names[id(module)]: module for module in block.modules() if is_norm(module)}
    if hasattr(block, "crossattention") or hasattr(block, "encoder_attn"):
        raise UnsupportedArchitecture(f"model must have no cross-attention, got one in {name}")

    def matrix(module: Any, start: int = 0, stop: int | None = None) -> Matrix:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or not weight.is_floating_point():
            raise UnsupportedArchitecture(
                f"{names[id(module)]} must be a plain floating-point linear layer, got {type(module).__name__}"
            )
        return Matrix(names[id(module)], module, start, stop, transposed=type(module).__name__ == "Conv1D")

    if _is_bert(block):
        attention, inner = block.attention, block.attention.self
        return Block(
            name,
            block,
            Attention(
                names[id(attention)],
                attention,
                query=matrix(inner.query),
                key=matrix(inner.key),
                value=matrix(inner.value),
                output=matrix(attention.output.dense),
                heads=inner.num_attention_heads,
                kv_heads=inner.num_attention_heads,
                head_dim=inner.attention_head_size,
            ),
            FeedForward(name, block, matrix(block.intermediate.dense), matrix(block.output.dense)),
            norms,
        )
    if hasattr(getattr(block, "attn", None), "c_attn"):
        attention, width, heads = block.attn, config.hidden_size, config.num_attention_heads
        return Block(
            name,
            block,
            Attention(
                names[id(attention)],
                attention,
                query=matrix(attention.c_attn, 0, width),
                key=matrix(attention.c_attn, width, 2 * width),
                value=matrix(attention.c_attn, 2 * width, 3 * width),
                output=matrix(attention.c_proj),
                heads=heads,
                kv_heads=heads,
                head_dim=width // heads,
            ),
            FeedForward(names[id(block.mlp)], block.mlp, matrix(block.mlp.c_fc), matrix(block.mlp.c_proj)),
            norms,
        )
    attention, feed_forward = getattr(block, "self_attn", None), getattr(block, "mlp", None)
    if attention is None or feed_forward is None or not hasattr(attention, "o_proj"):
        raise UnsupportedArchitecture(
            f"{name} must have self_attn and mlp (Llama), attn and mlp (GPT-2) or attention and intermediate (BERT), "
            f"got {', '.join(child for child, _ in block.named_children())}"
        )
    heads, head_dim = config.num_attention_heads, attention.head_dim
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if hasattr(attention, "qkv_proj"):
        queries, keys, fused = heads * head_dim, kv_heads * head_dim, attention.qkv_proj
        query, key = matrix(fused, 0, queries), matrix(fused, queries, queries + keys)
        value = matrix(fused, queries + keys, queries + 2 * keys)
    elif all(hasattr(attention, part) for part in ("q_proj", "k_proj", "v_proj")):
        query, key, value = matrix(attention.q_proj), matrix(attention.k_proj), matrix(attention.v_proj)
    else:
        raise UnsupportedArchitecture(f"{names[id(attention)]} must have q_proj, k_proj and v_proj, or qkv_proj")
    return Block(
        name,
        block,
        Attention(
            names[id(attention)],
            attention,
            query=query,
            key=key,
            value=value,
            output=matrix(attention.o_proj),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            query_norm=getattr(attention, "q_norm", None),
            key_norm=getattr(attention, "k_norm", None),
        ),
        _gated(feed_forward, names, matrix),
        norms,
    )


def _gated(module: Any, names: dict[int, str], matrix: Any) -> FeedForward:
    name = names[id(module)]
    if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Linear):
        half = module.gate_up_proj.weight.shape[0] // 2
        fused = module.gate_up_proj
        return FeedForward(
            name, module, matrix(fused, half, 2 * half), matrix(module.down_proj), matrix(fused, 0, half)
        )
    if hasattr(module, "down_proj") and hasattr(module, "up_proj"):
        gate = matrix(module.gate_proj) if hasattr(module, "gate_proj") else None
        return FeedForward(name, module, matrix(module.up_proj), matrix(module.down_proj), gate)
    raise UnsupportedArchitecture(
        f"{name} must have up_proj (or gate_up_proj) and down_proj, got "
        f"{', '.join(child for child, _ in module.named_children())}; expert layers are not supported"
    )


def _outer_norms(base: nn.Module, blocks: Any) -> tuple[nn.Module | None, nn.Module | None]:
    inside = {id(module) for block in blocks for module in block.modules()}
    outer = [module for module in base.modules() if is_norm(module) and id(module) not in inside]
    if _is_bert(blocks[0]):
        return (outer[0] if outer else None), None
    if len(outer) > 1:
        raise UnsupportedArchitecture(f"model must have one norm outside its blocks, got {len(outer)}")
    return None, (outer[0] if outer else None)
