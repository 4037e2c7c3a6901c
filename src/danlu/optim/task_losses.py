"""The losses of several tasks: their names, what they depend on, and what is refused before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

Losses = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def named_losses(losses: Losses, name: str) -> list[tuple[str, Tensor]]:
    """Names and losses; those of a sequence are numbered."""
    if isinstance(losses, Tensor):
        return [(name, losses)]
    if isinstance(losses, Mapping):
        return list(losses.items())
    return [(f"{name}_{index}", loss) for index, loss in enumerate(losses)]


def read_losses(main: Losses, aux: Losses, *, one_main: bool) -> tuple[tuple[str, ...], list[Tensor], int]:
    """Names, losses and the number of main tasks, which come first.

    Raises:
        TypeError: a loss that is no tensor; names the task.
        ValueError: no main task, several where there is one, a loss that is no scalar or has no gradient, a name twice.
    """
    mains = named_losses(main, "main" if isinstance(main, Tensor) else "task")
    others = named_losses(aux, "aux")
    if not mains:
        raise ValueError("main must hold at least one loss, got none; the first one is the main task")
    if one_main and others and len(mains) > 1:
        raise ValueError(f"main must be one loss for method 'primary_auxiliary', got {len(mains)}; use method='mixed'")
    names = tuple(name for name, _ in (*mains, *others))
    for name, loss in (*mains, *others):
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss of task {name!r} must be a tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"loss of task {name!r} must be a scalar, got shape {tuple(loss.shape)}; reduce it")
        if not loss.requires_grad:
            raise ValueError(f"loss of task {name!r} has no gradient; was it computed under no_grad or detached?")
        if names.count(name) > 1:
            raise ValueError(f"tasks must have different names, got {name!r} twice")
    return names, [loss for _, loss in (*mains, *others)], 1 if one_main else len(mains)


def check_values(names: Sequence[str], values: Tensor, what: str = "loss", *, positive: bool = False) -> None:
    """Refuse numbers that are not finite, or not positive; this waits for the device.

    Raises:
        ValueError: names the tasks.
    """
    for name, value in zip(names, values.tolist(), strict=True):
        if not abs(value) < float("inf"):
            raise ValueError(
                f"{what} of task {name!r} must be finite, got {value}; look at its data or the learning rate"
            )
        if positive and value <= 0:
            raise ValueError(f"{what} of task {name!r} must be positive for method 'geo_mean', got {value}")


def trainable(parameters: Iterable[nn.Parameter], name: str) -> list[nn.Parameter]:
    """The parameters that take gradients, each once.

    Raises:
        TypeError: something that is no tensor.
        ValueError: a parameter whose gradient is spread over processes.
    """
    found: dict[int, nn.Parameter] = {}
    for parameter in parameters:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name} must hold parameters, got {type(parameter).__name__}; try model.parameters()")
        if hasattr(parameter, "device_mesh") or getattr(parameter, "_is_flat_param", False):
            raise ValueError(
                f"{name} must hold whole tensors, got one that is sharded: inner products of task gradients need all "
                "of a gradient; train with DistributedDataParallel"
            )
        if parameter.requires_grad:
            found[id(parameter)] = parameter
    return list(found.values())


def leaves(loss: Tensor) -> set[int]:
    """The ids of all leaf tensors that a loss depends on."""
    found: set[int] = set()
    seen, stack = set(), [loss.grad_fn]
    if loss.grad_fn is None:
        found.add(id(loss))
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack.extend(next_node for next_node, _ in node.next_functions)
    return found


def check_reach(
    names: Sequence[str], losses: Sequence[Tensor], shared: Sequence[nn.Parameter], heads: Sequence[nn.Parameter]
) -> None:
    """Refuse tasks whose gradients have nothing in common, and parameters that would get no gradient.

    Raises:
        ValueError: names the task.
    """
    ours, others = {id(parameter) for parameter in shared}, {id(parameter) for parameter in heads}
    reached = [leaves(loss) for loss in losses]
    for name, reach in zip(names, reached, strict=True):
        if not reach & ours:
            raise ValueError(
                f"task {name!r} depends on none of params; leave it out, or pass the parameters that the tasks share "
                "(under re-entrant checkpointing they cannot be seen: use use_reentrant=False)"
            )
    for i, (name, reach) in enumerate(zip(names, reached, strict=True)):
        if len(losses) > 1 and not any(reach & other & ours for j, other in enumerate(reached) if j != i):
            raise ValueError(
                f"task {name!r} shares no parameter with another task: there is nothing to combine; "
                "call backward() on its loss instead"
            )
        if reach - ours - others:
            raise ValueError(
                f"task {name!r} depends on {len(reach - ours - others)} trainable tensors outside params and heads, "
                "which would get no gradient; pass the parameters of its head as heads, or freeze them"
            )
