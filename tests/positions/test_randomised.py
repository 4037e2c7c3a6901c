"""Randomised positions: their distributions, and that a transformers model sees them unharmed."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from danlu.positions import (
    RandomPositionCollator,
    equal_mean_positions,
    evenly_spaced_positions,
    subset_positions,
)


def test_subsets_are_sorted_distinct_and_uniform() -> None:
    drawn = subset_positions(3, 6, batch=20_000, seed=1)
    assert drawn.dtype == torch.int64 and drawn.shape == (20_000, 3)
    assert bool((drawn.diff(dim=1) > 0).all()) and int(drawn.min()) == 0 and int(drawn.max()) == 5
    counts = (drawn * torch.tensor([36, 6, 1])).sum(1).unique(return_counts=True)[1]
    assert counts.numel() == math.comb(6, 3)
    assert float((counts - 1000).abs().max()) < 5 * math.sqrt(1000)
    assert torch.equal(subset_positions(6, 6), torch.arange(6)[None])


@pytest.mark.parametrize(
    "options",
    [{}, {"distribution": "beta", "max_length": 64}, {"distribution": "beta", "max_length": 64, "concentration": 3.0}],
)
def test_equal_mean(options: dict) -> None:
    trained, draws = 16, 40_000
    drawn = equal_mean_positions(20, trained, batch=draws, seed=2, **options).double()
    assert drawn.dtype == torch.float64 and bool((drawn[:, 0] == 0).all())
    step = drawn[:, 1:2]
    torch.testing.assert_close(drawn, step * torch.arange(20), rtol=1e-6, atol=1e-5)
    error = drawn.std(0) / math.sqrt(draws)
    expected = torch.arange(20) * trained / (trained - 1)
    assert bool(((drawn.mean(0) - expected).abs() <= 4 * error + 1e-9).all())
    ends = drawn[:, trained - 1]
    if options:
        assert float(ends.max()) <= 64
    else:
        assert float((ends > 4 * trained).double().mean()) == pytest.approx(math.exp(-4), rel=0.15)


def test_beta_shape() -> None:
    ends = (
        equal_mean_positions(2, 16, distribution="beta", max_length=64, concentration=2.0, batch=40_000)[:, 1] * 15 / 64
    )
    a, b = 2.0, 6.0  # mean 16 / 64
    assert float(ends.mean()) == pytest.approx(a / (a + b), rel=0.02)
    assert float(ends.var()) == pytest.approx(a * b / ((a + b) ** 2 * (a + b + 1)), rel=0.05)


def test_evenly_spaced() -> None:
    assert torch.equal(evenly_spaced_positions(5, 9), torch.tensor([0.0, 2.0, 4.0, 6.0, 8.0]))
    assert evenly_spaced_positions(1, 9).tolist() == [0.0]
    assert torch.equal(evenly_spaced_positions(9, 9), torch.arange(9.0))


def test_seeds() -> None:
    assert torch.equal(subset_positions(4, 99, batch=3, seed=5), subset_positions(4, 99, batch=3, seed=5))
    generator = torch.Generator().manual_seed(5)
    first, second = (subset_positions(4, 99, batch=3, seed=generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(subset_positions(4, 99, batch=3, seed=torch.Generator().manual_seed(5)), first)


def bare(features: list[list[int]]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(features), "labels": torch.tensor(features)}


@pytest.mark.parametrize("kind", ["subset", "equal_mean"])
def test_collator_draws_once_per_sample(kind: str) -> None:
    options = {"max_length": 500} if kind == "subset" else {}
    collator = RandomPositionCollator(bare, kind, trained_length=8, seed=3, **options)
    batch = collator([[1, 2, 3, 4, 5, 6]] * 4)
    assert set(batch) == {"input_ids", "labels", "attention_mask", "position_ids"}
    assert torch.equal(batch["attention_mask"], torch.ones(4, 6, dtype=torch.int64))
    positions = batch["position_ids"]
    assert positions.dtype == (torch.int64 if kind == "subset" else torch.float32)
    assert len({tuple(row) for row in positions.tolist()}) == 4
    again = RandomPositionCollator(bare, kind, trained_length=8, seed=3, **options)
    assert torch.equal(again([[1, 2, 3, 4, 5, 6]] * 4)["position_ids"], positions)
    assert not torch.equal(again([[1, 2, 3, 4, 5, 6]] * 4)["position_ids"], positions)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_keeps_its_place(side: str) -> None:
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5])
    mask = mask.flip(1) if side == "left" else mask

    def padded(features: list) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.ones(3, 6, dtype=torch.int64), "attention_mask": mask}

    positions = RandomPositionCollator(padded, "subset", trained_length=6, max_length=4000)([])["position_ids"]
    for row, real in zip(positions, mask.bool(), strict=True):
        assert bool((row[real].diff() > 0).all())
    equal = RandomPositionCollator(padded, "equal_mean", trained_length=6)([])["position_ids"]
    for row, real in zip(equal, mask.bool(), strict=True):
        assert float(row[real][0]) == 0 and torch.allclose(
            row[real], row[real][-1] * torch.linspace(0, 1, int(real.sum()))
        )


def test_short_samples_use_the_whole_range() -> None:
    mask = torch.zeros(400, 50, dtype=torch.int64)
    mask[:, :2] = 1
    batch = {"input_ids": torch.ones_like(mask), "attention_mask": mask}
    positions = RandomPositionCollator(lambda _: batch, trained_length=50, max_length=300)([])["position_ids"]
    assert float(positions[:, 1].double().mean()) == pytest.approx(200, rel=0.05)  # larger of two from 0..299


def test_workers_and_epochs_draw_apart() -> None:
    collator = RandomPositionCollator(bare, trained_length=4, max_length=10_000, seed=7)
    loader = torch.utils.data.DataLoader(
        [[1, 2, 3, 4]] * 8, batch_size=2, collate_fn=collator, num_workers=2, generator=torch.Generator().manual_seed(0)
    )
    rows = [tuple(row) for _ in range(2) for batch in loader for row in batch["position_ids"].tolist()]
    assert len(set(rows)) == 16


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32, vocab_size=50
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_real_positions_pass_through_a_model() -> None:
    """Positions 1.3 j are ordinary positions on frequencies 1.3 theta; nothing rounds them on the way."""
    model = tiny_llama()
    ids = torch.randint(0, 50, (2, 20))
    mask = torch.ones_like(ids)
    positions = (1.3 * torch.arange(20.0)).expand(2, -1)
    got = model(ids, attention_mask=mask, position_ids=positions).logits
    truncated = model(ids, attention_mask=mask, position_ids=positions.long()).logits
    model.model.rotary_emb.inv_freq.mul_(1.3)
    torch.testing.assert_close(got, model(ids).logits, rtol=0, atol=2e-6)
    assert float((got - truncated).abs().max()) > 1e-4


@pytest.mark.parametrize("kind", ["subset", "equal_mean"])
@torch.no_grad()
def test_mask_keeps_gaps_from_being_taken_for_documents(kind: str) -> None:
    model = tiny_llama()
    options = {"max_length": 200} if kind == "subset" else {}
    batch = RandomPositionCollator(bare, kind, trained_length=20, **options)(torch.randint(0, 50, (2, 20)).tolist())
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    whole = model(**inputs, attention_mask=batch["attention_mask"], use_cache=False).logits
    packed = model(**inputs, use_cache=False).logits
    alone = model(inputs["input_ids"][:, -1:], position_ids=inputs["position_ids"][:, -1:], use_cache=False).logits
    torch.testing.assert_close(packed[:, -1:], alone, rtol=0, atol=1e-5)  # the last token sees only itself
    assert float((whole - packed).abs().max()) > 1e-4
    first = batch["input_ids"].clone()
    first[:, 0] = (first[:, 0] + 1) % 50
    moved = model(first, attention_mask=batch["attention_mask"], position_ids=inputs["position_ids"], use_cache=False)
    assert float((moved.logits[:, -1] - whole[:, -1]).abs().max()) > 1e-6  # the last token sees the first


def test_trains_with_the_host_trainer(tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    collator = RandomPositionCollator(lambda f: bare([x["input_ids"] for x in f]), "equal_mean", trained_length=12)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    data = [{"input_ids": torch.randint(0, 50, (12,)).tolist()} for _ in range(4)]
    result = Trainer(tiny_llama().train(), arguments, train_dataset=data, data_collator=collator).train()
    assert math.isfinite(result.training_loss)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: subset_positions(9, 8), "length"),
        (lambda: subset_positions(1, 8, batch=0), "batch"),
        (lambda: subset_positions(1, 8, seed=-1), "seed"),
        (lambda: equal_mean_positions(4, 1), "trained_length"),
        (lambda: equal_mean_positions(4, 8, max_length=16), "max_length"),
        (lambda: equal_mean_positions(4, 8, distribution="beta"), "max_length"),
        (lambda: equal_mean_positions(4, 8, distribution="beta", max_length=8), "max_length"),
        (lambda: equal_mean_positions(4, 8, distribution="beta", max_length=9, concentration=0), "concentration"),
        (lambda: equal_mean_positions(4, 8, distribution="normal"), "distribution"),
        (lambda: evenly_spaced_positions(9, 8), "length"),
        (lambda: RandomPositionCollator(bare, "sorted", trained_length=8), "kind"),
        (lambda: RandomPositionCollator(bare, "subset", trained_length=8), "max_length"),
        (lambda: RandomPositionCollator(bare, "subset", trained_length=8, max_length=8), "max_length"),
        (lambda: RandomPositionCollator(bare, trained_length=2, max_length=9)([[1, 2, 3]]), "trained_length"),
        (lambda: RandomPositionCollator(lambda f: {"input_ids": f}, trained_length=2, max_length=9)([[1]]), "tensor"),
        (
            lambda: RandomPositionCollator(
                lambda f: {"input_ids": torch.ones(1, 2), "position_ids": torch.ones(1, 2)},
                trained_length=2,
                max_length=9,
            )([]),
            "position_ids",
        ),
    ],
)
def test_refuses_bad_input(call, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()
