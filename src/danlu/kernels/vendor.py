"""The vendor kernels behind `flash.attend`: one block in, one output and natural log-sum-exp (or gradients) out.

The operators are private names of PyTorch, so each is looked up once and tried before it is used.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from danlu.kernels.regions import Block, Part, can_plan

logger = logging.getLogger("danlu.kernels")


def choose_route(
    query: Tensor,
    value: Tensor,
    parts: Sequence[Part],
    *,
    softcap: float | None = None,
    bias: Tensor | None = None,
    q_slots: Tensor | None = None,
) -> tuple[str, str]:
    """Say which route computes an attention, and why.

    The first rule that applies decides:

    1. soft-capped scores, a bias or explicit query slots: math, no flash kernel takes them;
    2. a part that the planner cannot cut (`regions.can_plan`): math;
    3. no query at all: math;
    4. one query of float64 or float32 on the CPU, the value's batch and head axes foldable into one: row, two products
       and a softmax are faster there than the kernel and its merge;
    5. CPU tensors of float64, float32, bfloat16 or float16: cpu, if the kernel passes its trial;
    6. CUDA tensors of bfloat16 or float16, head sizes a multiple of 8 up to 256, compute capability 8 or more: cuda, if
       the kernel passes its trial;
    7. everything else: math.

    Args:
        query: (batch, heads, Lq, head_dim).
        value: (batch, kv_heads, Lk, value_dim).
        parts: the pairs of query and key.
        softcap: as for `flash.attend`.
        bias: as for `flash.attend`.
        q_slots: as for `flash.attend`.

    Returns:
        (route, reason), route one of "row", "cpu", "cuda", "math".
    """
    for name, given in (("softcap", softcap), ("bias", bias), ("q_slots", q_slots)):
        if given is not None:
            return "math", f"{name} is given"
    for part in parts:
        if not can_plan(part, value.shape[2]):
            return "math", f"{part} cannot be cut into blocks"
    if query.numel() == 0:  # the CPU kernel divides by the number of rows
        return "math", "there is no query"
    kind, head_dim = query.device.type, max(query.shape[-1], value.shape[-1])
    if kind == "cpu":
        if query.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return "math", f"the CPU kernel has no {query.dtype}"
        if query.shape[2] == 1 and query.dtype in (torch.float64, torch.float32) and _foldable(value):
            return "row", "one query"
        return ("cpu", "CPU flash kernel") if CPU_WORKS else ("math", "this PyTorch has no usable CPU flash kernel")
    if kind == "cuda":
        if query.dtype not in (torch.bfloat16, torch.float16):
            return "math", f"the CUDA kernel has no {query.dtype}"
        if head_dim % 8 or head_dim > 256:
            return "math", f"the CUDA kernel wants a head size that is a multiple of 8 up to 256, got {head_dim}"
        if cuda_works(query.device.index or 0):
            return "cuda", "CUDA flash kernel"
        return "math", "this GPU or PyTorch has no usable CUDA flash kernel"
    return "math", f"no flash kernel for {kind} tensors"


def _foldable(x: Tensor) -> bool:
    """Tell whether a batched product takes (batch, heads, ...) without a copy."""
    return x.shape[0] == 1 or x.shape[1] == 1 or x.stride(0) == x.shape[1] * x.stride(1)


def forward(block: Block, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend within one block.

    Args:
        block: the pairs.
        q: (batch, heads, rows, head_dim).
        k: (batch, kv_heads, columns, head_dim).
        v: like `k`.
        scale: factor of the scores.

    Returns:
        (out, lse), lse in natural logs.
    """
    if q.device.type == "cuda":
        return _cuda_forward(block, q, k, v, scale)
    mask = block.mask(q.dtype, q.device)
    group = q.shape[1] // k.shape[1]
    if q.shape[2] == 1 and group > 1:  # decoding: the heads of a group are rows, so that each key is read once
        out, lse = _cpu(q.reshape(q.shape[0], k.shape[1], group, -1), k, v, False, None, scale)
        return out.reshape(q.shape), lse.reshape(q.shape[:3])
    if block.kind != "band":
        return _cpu(q, k, v, block.kind == "causal", mask, scale)
    outs, lses = [], []
    for b in range(q.shape[0]):
        out, lse = _cpu(_tiles(q, b, block), _windows(k, b, block), _windows(v, b, block), False, mask, scale)
        outs.append(_untile(out))
        lses.append(_untile(lse))
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs), torch.cat(lses))


def backward(
    block: Block,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of one block from the output and log-sum-exp of the whole attention.

    Args:
        block: as for `forward`.
        q: as for `forward`.
        k: as for `forward`.
        v: as for `forward`.
        out: (batch, heads, rows, head_dim), merged over all blocks.
        lse: (batch, heads, rows), merged over all blocks.
        grad_out: like `out`.
        scale: as for `forward`.

    Returns:
        Gradients of q, k and v.
    """
    if q.device.type == "cuda":
        return _cuda_backward(block, q, k, v, out, lse, grad_out, scale)
    mask = block.mask(q.dtype, q.device)
    grad_out = _rows_contiguous(grad_out)
    if block.kind != "band":
        causal = block.kind == "causal"
        return _cpu_backward_op()(grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    for b in range(q.shape[0]):
        tiles = [_tiles(x, b, block) for x in (grad_out, q)]
        windows = [_windows(x, b, block) for x in (k, v)]
        state = [_tiles(x, b, block) for x in (out, lse)]
        grads = _cpu_backward_op()(*tiles, *windows, *state, 0.0, False, attn_mask=mask, scale=scale)
        dq.append(_untile(grads[0]))
        _add_windows(dk, b, block, grads[1])
        _add_windows(dv, b, block, grads[2])
    return (dq[0] if len(dq) == 1 else torch.cat(dq)), dk, dv


def _tiles(x: Tensor, b: int, block: Block) -> Tensor:
    """View the rows of one batch entry as (tiles, heads, tile, ...), without a copy."""
    return x[b].unflatten(1, (block.tiles, block.tile)).transpose(0, 1)


def _untile(x: Tensor) -> Tensor:
    """Undo `_tiles` on a kernel output, whose memory order (tiles, tile, heads, ...) makes this a view."""
    return x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _windows(x: Tensor, b: int, block: Block) -> Tensor:
    """View the slots of one batch entry as overlapping windows (tiles, kv_heads, tile + width - 1, head_dim)."""
    return x[b].unfold(1, block.tile + block.width - 1, block.tile).permute(1, 0, 3, 2)


def _add_windows(total: Tensor, b: int, block: Block, grad: Tensor) -> None:
    """Add gradients of overlapping windows, one non-overlapping strip of `tile` slots at a time."""
    size = grad.shape[2]
    for first in range(0, size, block.tile):
        step = min(block.tile, size - first)
        target = total[b, :, first:].unfold(1, step, block.tile)[:, : block.tiles].permute(1, 0, 3, 2)
        target += grad[:, :, first : first + step]


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (_rows_contiguous(x) for x in (q, k, v))
    return _cpu_forward_op()(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


def _cpu_forward_op() -> Callable[..., Any]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def _cpu_backward_op() -> Callable[..., Any]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def try_cpu() -> bool:
    """Try the CPU kernel on a case worked out by hand: grouped heads, and the log-sum-exp in natural logs."""
    try:
        q, k = torch.zeros(1, 2, 2, 8), torch.zeros(1, 1, 2, 8)
        v = torch.tensor([1.0, 3.0])[None, None, :, None].expand(1, 1, 2, 8)
        out, lse = _cpu(q, k, v, True, None, 1.0)
        grads = _cpu_backward_op()(out, q, k, v, out, lse, 0.0, True, scale=1.0)
        right = torch.allclose(out[0, :, :, 0], torch.tensor([1.0, 2.0]).expand(2, 2))
        right &= torch.allclose(lse[0], torch.tensor([0.0, 0.6931472]).expand(2, 2))
        right &= grads[1].shape == k.shape
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.debug("CPU flash kernel refused: %s", error)
        return False
    return bool(right)


# tried at import, not at the first call: a compiler cannot trace the trial
CPU_WORKS = try_cpu()

# CUDA: layout (batch, length, heads, head_dim); windows and bottom-right aligned causal masks are native.


def _cuda_limits(block: Block) -> tuple[bool, int | None, int | None]:
    if block.kind == "band":
        return False, block.width - 1, 0
    return block.kind == "causal", None, None


def _cuda_forward(block: Block, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    causal, left, right = _cuda_limits(block)
    out, lse, *_ = torch.ops.aten._flash_attention_forward.default(
        *(_rows_contiguous(x).transpose(1, 2) for x in (q, k, v)),
        *(None, None, q.shape[2], k.shape[2], 0.0, causal, False),
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    return out.transpose(1, 2), lse


def _cuda_backward(
    block: Block, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    causal, left, right = _cuda_limits(block)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # no dropout: the generator state is not read
    grads = torch.ops.aten._flash_attention_backward.default(
        *(_rows_contiguous(x).transpose(1, 2) for x in (grad_out, q, k, v, out)),
        lse.contiguous(),
        *(None, None, q.shape[2], k.shape[2], 0.0, causal, state, state.new_empty(0)),
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


@functools.cache
def cuda_works(index: int) -> bool:
    """Try the CUDA kernel once per device: a window of one key, forward and backward."""
    try:
        if torch.cuda.get_device_capability(index)[0] < 8:
            return False
        block = Block(Part(farthest=1), "band", (0, 8), (0, 8), 8, 1)
        q = torch.ones(1, 2, 8, 64, dtype=torch.bfloat16, device=f"cuda:{index}")
        k = v = q[:, :1] * torch.arange(8, device=q.device)[:, None].to(q.dtype)
        out, lse = _cuda_forward(block, q, k, v, 0.125)
        grads = _cuda_backward(block, q, k, v, out, lse, out, 0.125)
        right = torch.allclose(out[0, 1], v[0, 0]) and torch.allclose(
            lse[0, 0].float(), 8.0 * torch.arange(8.0).to(lse)
        )
        return right and grads[1].shape == k.shape
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.debug("CUDA flash kernel refused: %s", error)
        return False
