import pytest
import torch

from danlu.lab import toy, training
from danlu.lab.claim import Context
from danlu.lab.toy import Toy, repeated_permutation
from danlu.lab.training import Schedule

SHORT = Schedule(steps=3, batch=4)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(training, "_MEMORY", {})


def context(path):
    return Context(seeds=(0,), cache=path)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_sample_repeats_distinct_tokens():
    tokens, counted = repeated_permutation(torch.Generator().manual_seed(0), 50, 100, (6, 24))
    assert tokens.shape == (50, 101) and counted.shape == (50, 100)
    periods = set()
    for row, mask in zip(tokens.tolist(), counted.tolist(), strict=True):
        period = mask.index(True) + 1  # the first counted target is token number `period`
        periods.add(period)
        assert len(set(row[:period])) == period
        assert all(row[i] == row[i - period] for i in range(period, 101))
        assert all(mask[period - 1 :])
    assert min(periods) >= 6 and max(periods) <= 24 and len(periods) > 10


def test_periods_are_checked():
    with pytest.raises(ValueError, match=r"1 <= low <= high <= 64, got \(6, 65\)"):
        repeated_permutation(torch.Generator(), 1, 8, (6, 65))


def test_two_trainings_are_identical():
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        model = toy.llama()
        losses.append(toy.train(model, toy.permutation_batch(32, 4), SHORT, 5, context(None)))
    assert losses[0] == losses[1]


def test_the_schedule_warms_up_and_ends_at_zero():
    schedule = Schedule(steps=100, warmup=10)
    factors = [schedule.factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == pytest.approx(1) and factors[10] == 1
    assert factors[55] == pytest.approx(0.5) and factors[100] == pytest.approx(0, abs=1e-12)


def test_trained_weights_come_from_memory_then_from_the_cache(tmp_path, monkeypatch):
    subject = Toy(schedule=SHORT)
    first = toy.train_toy(subject, context(tmp_path))
    assert toy.train_toy(subject, context(tmp_path)) is first
    training._MEMORY.clear()
    monkeypatch.setattr(toy, "train", None)  # a second training would fail
    loaded = toy.train_toy(subject, context(tmp_path))
    assert loaded is not first and same(loaded, first)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_a_damaged_cache_file_is_named(tmp_path):
    subject = Toy(schedule=SHORT)
    (tmp_path / f"{subject.key}.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(ValueError, match=f"{subject.key}.safetensors is damaged"):
        toy.train_toy(subject, context(tmp_path))


def test_the_key_covers_seed_base_schedule_and_methods():
    from danlu.context.methods import KeyNorm

    keys = {Toy().key, Toy(seed=1).key, Toy(base=8e4).key, Toy(schedule=SHORT).key, Toy(methods=(KeyNorm(),)).key}
    assert len(keys) == 5 and Toy().key in keys


def test_training_leaves_the_global_random_state_alone(tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    toy.train_toy(Toy(schedule=SHORT), context(tmp_path))
    assert torch.equal(torch.rand(3), expected)


def test_accuracy_counts_what_a_copying_model_gets_right():
    class Copier(torch.nn.Module):
        """Predicts the token of one period before the next."""

        def forward(self, input_ids):
            from types import SimpleNamespace

            guess = torch.roll(input_ids, 9, dims=1)
            # token i + 1 equals token i + 1 - 10, which sits 9 places before place i
            return SimpleNamespace(logits=torch.nn.functional.one_hot(guess, toy.VOCABULARY).float())

    assert toy.accuracy(Copier(), 64, (10, 10), samples=8) == 1.0
    assert toy.accuracy(Copier(), 64, (11, 11), samples=8) == 0.0


@pytest.mark.slow
def test_the_toy_learns_to_copy(tmp_path):
    model = toy.train_toy(Toy(schedule=Schedule(steps=600)), context(tmp_path))
    assert toy.accuracy(model, 32) > 0.8
