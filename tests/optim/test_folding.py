"""Tiger folded into the backward pass: the same steps, less memory, inside the host's Trainer."""

import pytest
import torch
from torch import nn

from danlu.kernels.signs import apply
from danlu.lab.measuring import peak_bytes
from danlu.optim.folding import fold_in_backward, fold_in_trainer
from danlu.optim.groups import tiger_param_groups
from danlu.optim.lion import Lion
from danlu.optim.tiger import Tiger
from danlu.optim.windows import Item
from reference.tiny import tiny_llama


def batches(count: int, rows: int = 2, length: int = 12):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(257, (rows, length), generator=generator) for _ in range(count)]


def train(model, optimizer, ids, every: int):
    """A loop that accumulates by itself: a backward pass per batch, a step per window."""
    for place, batch in enumerate(ids, 1):
        model(input_ids=batch, labels=batch).loss.backward()
        if place % every == 0:
            optimizer.step()
            optimizer.zero_grad()


def everything(model, optimizer):
    return [tensor for p in model.parameters() for tensor in (p.detach(), optimizer.state[p]["momentum"])]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("every", [1, 4])
def test_folded_steps_equal_accumulated_ones(every, tied):
    ends = []
    for folded in (False, True):
        model = tiny_llama(tie_word_embeddings=tied).double().train()
        optimizer = Tiger(tiger_param_groups(model), 0.01)
        if folded:
            fold_in_backward(optimizer)
        train(model, optimizer, batches(12), every)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.allclose(*ends, atol=1e-13)
    assert not torch.allclose(
        ends[0], torch.cat([p.flatten() for p in tiny_llama().double().parameters()])[: len(ends[0])]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_steps_equal_the_optimisers_own_windows_to_the_bit(dtype):
    ends = []
    for folded in (False, True):
        model = tiny_llama().to(dtype).train()
        optimizer = Tiger(tiger_param_groups(model), 0.01, accumulation_steps=3)
        if folded:
            fold_in_backward(optimizer)
        for batch in batches(7):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
        ends.append(everything(model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_gradients_are_never_kept():
    model = tiny_llama().train()
    optimizer = Tiger(model.parameters())
    handle = fold_in_backward(optimizer)
    train(model, optimizer, batches(3), every=4)
    assert all(parameter.grad is None for parameter in model.parameters())
    handle.remove()
    train(model, optimizer, batches(1), every=4)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_the_momentum_and_the_largest_gradient(dtype):
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 64)).to(dtype)
    x = torch.randn(2, 256, dtype=dtype)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(p.numel() * p.element_size() for p in model.parameters())

    def window(optimizer):
        for _ in range(8):
            model(x).square().mean().backward()
        optimizer.step()

    optimizer = Tiger(model.parameters())
    with fold_in_backward(optimizer):
        window(optimizer)
        folded = peak_bytes(lambda: window(optimizer))
    small = (1 << 16) * 4 * 8  # float32 copies of one piece
    assert folded < 1.05 * largest + (small if dtype == torch.bfloat16 else 0)
    assert peak_bytes(lambda: window(optimizer)) >= total
    state = sum(s["momentum"].numel() * s["momentum"].element_size() for s in optimizer.state.values())
    assert state == total


@pytest.mark.parametrize("wrong", [(0,), (1,), (2,), (0, 1), (0, 2), (0, 1, 2), (4, 5)])
@pytest.mark.parametrize("own", [False, True])
def test_bad_micro_batches_are_left_out_as_without_folding(wrong, own):
    """Windows of three, closed by the optimiser or by the loop; theta shrinks once for each bad micro-batch."""
    ends = []
    for folded in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3, dtype=torch.float64)
        optimizer = Tiger(model.parameters(), 0.02, accumulation_steps=1 if folded and own else 3)
        if folded:
            fold_in_backward(optimizer)
        for place, x in enumerate(torch.randn(6, 5, 4, dtype=torch.float64)):
            # the gradient of a linear loss does not depend on theta, which shrinks earlier without folding
            (model(x).sum(-1) @ x[:, 0] * (float("nan") if place in wrong else 1.0)).backward()
            if not (folded and own) or place % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
        ends.append(torch.cat([model.weight.detach().flatten(), model.bias.detach()]))
    assert torch.allclose(*ends, atol=1e-15)


@pytest.mark.parametrize("rule", ["rms", "row_rms"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_way_of_other_devices_gives_the_same(dtype, rule):
    """On a device whose flags are dear to read, the same is done without reading any."""
    ends = []
    for unread in (False, True):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(6, 4).to(dtype))
        optimizer = Tiger([parameter], 0.02, rule=rule, accumulation_steps=3)
        group = optimizer.param_groups[0]
        for place in range(9):
            gradient = torch.randn(6, 4).to(dtype)
            gradient[place % 6] = 0
            gradient[0, 0] = float("nan") if place in (0, 4) else 1.0
            with torch.no_grad():
                if unread:
                    apply(optimizer._fold_unread(Item(parameter, group, 0, gradient), gradient))
                else:
                    optimizer._fold(parameter, gradient, group, 0)
            optimizer.step()
        ends.append([parameter.detach(), optimizer.state[parameter]["momentum"]])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_resumes_in_the_middle_of_a_folded_window():
    ids = batches(10)
    ends = []
    for stop in (None, 6):
        model = tiny_llama().train()
        optimizer = Tiger(tiger_param_groups(model), 0.01)
        fold_in_backward(optimizer)
        train(model, optimizer, ids[:stop], every=4)
        if stop:
            weights, state = model.state_dict(), optimizer.state_dict()
            model = tiny_llama().train()
            model.load_state_dict(weights)
            optimizer = Tiger(tiger_param_groups(model), 0.01)
            optimizer.load_state_dict(state)
            fold_in_backward(optimizer)
            for place, batch in enumerate(ids[stop:], stop + 1):
                model(input_ids=batch, labels=batch).loss.backward()
                if place % 4 == 0:
                    optimizer.step()
        ends.append(everything(model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_refusals():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="optimizer must be a Tiger, got Lion"):
        fold_in_backward(Lion(model.parameters()))
    optimizer = Tiger(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="must have no gradient yet"):
        fold_in_backward(optimizer)
    optimizer.zero_grad()
    with fold_in_backward(optimizer), pytest.raises(ValueError, match="folded already"):
        fold_in_backward(optimizer)
    with fold_in_backward(optimizer):
        pass


def test_raising_stops_the_backward_pass():
    model = nn.Linear(2, 2)
    with fold_in_backward(Tiger(model.parameters(), nonfinite="raise")):
        with pytest.raises(FloatingPointError, match="is not finite"):
            (model(torch.ones(1, 2)).sum() * float("nan")).backward()


def test_a_scaler_is_refused_while_folded_and_works_otherwise():
    model = nn.Linear(2, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = Tiger(model.parameters(), 0.1)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    before = model.bias.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.allclose(model.bias, before - 0.05)
    optimizer.zero_grad()
    with fold_in_backward(optimizer):
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        with pytest.raises(ValueError, match="GradScaler changes its scale"):
            scaler.step(optimizer)


def trainer(folder, *, folded, model=None, accumulate=4, optimizer_options=None, **options):
    from transformers import Trainer, TrainingArguments

    model = model or tiny_llama().double()
    data = [{"input_ids": row, "labels": row} for row in torch.cat(batches(24, rows=1))]
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=1, report_to=[], disable_tqdm=True,
        gradient_accumulation_steps=accumulate, num_train_epochs=2, save_steps=4, logging_steps=100, seed=3,
        **{"max_grad_norm": 0.0, **options},
    )  # fmt: skip
    groups = {"params": tiger_param_groups(model), "lr": 0.01, **(optimizer_options or {})}
    made = Trainer(model=model, args=arguments, train_dataset=data, optimizer_cls_and_kwargs=(Tiger, groups))
    if folded:
        fold_in_trainer(made)
    return made


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_trainer_folded_equals_trainer_and_resumes_to_the_bit(tmp_path, monkeypatch):
    ends, folds = {}, []
    fold = Tiger._fold
    monkeypatch.setattr(Tiger, "_fold", lambda self, *rest: folds.append(0) or fold(self, *rest))
    for folded in (False, True):
        made = trainer(tmp_path / str(folded), folded=folded)
        made.train()
        assert len(folds) == folded * 48 * len(list(made.model.parameters()))
        ends[folded] = weights(made.model)
        assert made.state.global_step == 12
        assert all(parameter.grad is None for parameter in made.model.parameters())
    assert torch.allclose(ends[False], ends[True], atol=1e-12)
    again = trainer(tmp_path / "True", folded=True)
    again.train(resume_from_checkpoint=str(tmp_path / "True" / "checkpoint-8"))
    assert torch.equal(weights(again.model), ends[True])


def test_trainer_takes_the_optimiser_by_class_alone(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny_llama()
    before = weights(model).clone()
    data = [{"input_ids": row, "labels": row} for row in torch.cat(batches(4, rows=1))]
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=2)
    Trainer(model=model, args=arguments, train_dataset=data, optimizer_cls_and_kwargs=(Tiger, {"lr": 1e-3})).train()
    assert not torch.equal(before, weights(model))


def test_trainer_refusals(tmp_path):
    with pytest.raises(ValueError, match="max_grad_norm must be 0 with folded gradients, got 1.0"):
        trainer(tmp_path, folded=True, max_grad_norm=1.0)
    made = trainer(tmp_path, folded=True, optimizer_options={"accumulation_steps": 4})
    with pytest.raises(ValueError, match=r"accumulation_steps=4 of the optimiser and gradient_accumulation_steps=4"):
        made.train()
    made = trainer(tmp_path, folded=False)
    made.args.fp16 = True
    with pytest.raises(ValueError, match="fp16 scales the loss"):
        fold_in_trainer(made)
