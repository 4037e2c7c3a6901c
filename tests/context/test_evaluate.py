"""Loss by length against a direct computation, comparability of lengths, and refusal of what cannot run."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from danlu.context import memory
from danlu.context.evaluate import DECODE_TOKENS, evaluate_lengths, window_ends
from danlu.context.extend import active_methods, extend
from danlu.context.methods import LogN, ReRoPE, Window
from reference.tiny import TRAINED, Copyist, byte_tokenizer, tiny_config, tiny_llama

GPT2 = {
    "vocab_size": 257,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 257, (400,), generator=torch.Generator().manual_seed(3))


def direct_losses(model, ids, length, targets, ends):
    """Token by token in float64 log-probabilities, from the full logits of a separate pass."""
    losses = []
    for end in ends:
        row = ids[end - length : end]
        with torch.no_grad():
            probabilities = model(input_ids=row[None]).logits[0].double().softmax(-1)
        picked = [-math.log(probabilities[i - 1, row[i]]) for i in range(length - targets, length)]
        losses.append(sum(picked) / targets)
    return losses


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_loss_equals_a_direct_computation(model, ids, batch_size):
    report = evaluate_lengths(model, ids, [64, 32], ["plain"], targets=10, windows=3, batch_size=batch_size)
    ends = [64, 64 + (400 - DECODE_TOKENS - 64) // 2, 400 - DECODE_TOKENS]
    for length in (32, 64):
        expected = direct_losses(model, ids, length, 10, ends)
        assert report.at("plain", length).losses == pytest.approx(expected, abs=1e-5)
    assert report.lengths == (32, 64) and report.targets == 10 and report.windows == 3


def test_window_method_is_blind_to_what_lies_beyond(model, ids):
    """Two layers of window w see 2 (w - 1) tokens back, so lengths beyond targets + 2 (w - 1) give one loss."""
    report = evaluate_lengths(model, ids, [40, 80, 160], [Window(window=8)], targets=16, windows=2)
    first = report.measurements[0].losses
    for row in report.measurements[1:]:
        assert row.losses == pytest.approx(first, abs=1e-5)
    plain = evaluate_lengths(model, ids, [40, 80], ["plain"], targets=16, windows=2)
    assert abs(plain.change("plain")[0]) > 1e-3


def test_default_targets_are_half_the_shortest_length(model, ids):
    report = evaluate_lengths(model, ids, [32, 64], ["plain"], windows=2, decode_tokens=0)
    assert report.targets == 16
    assert report.measurements[0].decode_tokens_per_second is None
    assert evaluate_lengths(model, ids, [64], ["plain"], windows=2).measurements[0].decode_tokens_per_second > 0


def test_stacks_apply_and_the_model_returns_as_it_was(model, ids):
    model.train()
    extend(model, ReRoPE(window=5))
    try:
        report = evaluate_lengths(model, ids, [64], {"plain": (), "both": (ReRoPE(window=8), LogN())}, windows=2)
        assert active_methods(model) == (ReRoPE(window=5),)
        assert model.training
    finally:
        from danlu.context.extend import restore

        restore(model).eval()
    ends = [64, 400 - DECODE_TOKENS]
    assert report.at("plain", 64).losses == pytest.approx(direct_losses(model, ids, 64, 32, ends), abs=1e-5)
    extend(model, ReRoPE(window=8), LogN())
    try:
        assert report.at("both", 64).losses == pytest.approx(direct_losses(model, ids, 64, 32, ends), abs=1e-5)
    finally:
        restore(model)
    assert report.at("both", 64).methods == f"ReRoPE(window=8), LogN(trained_length={TRAINED}, clip=True)"


def test_factor_follows_the_length(model, ids):
    report = evaluate_lengths(model, ids, [32, 128], ["pi"], windows=1)
    assert [row.methods for row in report.measurements] == [
        "PositionInterpolation(factor=1.0)",
        "PositionInterpolation(factor=4.0)",
    ]


def test_first_token_replaces_the_start_only(model, ids):
    report = evaluate_lengths(model, ids, [32], ["plain"], targets=8, windows=1, first_token=256)
    end = 400 - DECODE_TOKENS
    changed = ids.clone()
    changed[end - 32] = 256
    assert report.measurements[0].losses == pytest.approx(direct_losses(model, changed, 32, 8, [end]), abs=1e-5)


def test_bytes_per_token_of_a_byte_tokenizer_is_one(model):
    tokenizer = byte_tokenizer()
    ids = tokenizer("abc def\n" * 30)["input_ids"]
    report = evaluate_lengths(model, ids, [32], ["plain"], windows=2, tokenizer=tokenizer)
    assert report.bytes_per_token == 1
    assert report.bits_per_byte(math.log(2)) == pytest.approx(1)


def test_model_without_logits_to_keep_is_noted(ids):
    report = evaluate_lengths(Copyist(tiny_config()), ids, [32], ["plain"], windows=1)
    assert "logits of every token" in report.notes[0]
    assert report.measurements[0].loss == pytest.approx(math.log(257), abs=0.1)


def test_bfloat16(ids):
    report = evaluate_lengths(tiny_llama().bfloat16(), ids, [32, 64], ["plain", "rerope+logn"], windows=1)
    assert report.dtype == "bfloat16"
    assert all(math.isfinite(row.loss) for row in report.measurements)


def test_progress_counts_tokens(model, ids):
    calls = []
    evaluate_lengths(model, ids, [32, 64], ["plain", "pi"], windows=2, progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done) and calls[-1][:2] == (384, 384) and calls[0] == (0, 384, "plain at 32")


def test_window_ends_never_score_a_token_twice():
    for tokens in range(100, 400, 7):
        ends = window_ends(tokens, 90, 16, 5, after=4)
        assert ends[0] >= 90 and ends[-1] + 4 <= tokens and len(ends) <= 5
        assert all(later - earlier >= 16 for earlier, later in zip(ends, ends[1:], strict=False))
    assert len(window_ends(400, 90, 16, 5)) == 5


def test_short_text_gives_fewer_windows_and_says_so(model, ids):
    report = evaluate_lengths(model, ids[:100], [64], ["plain"], windows=8)
    assert report.windows == 1
    assert "holds 1 windows" in report.notes[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [500]}, "400 tokens, but length 500 needs at least 516"),
        ({"lengths": []}, "at least one length"),
        ({"lengths": [1]}, "length must be >= 2, got 1"),
        ({"lengths": [64], "targets": 64}, "targets must be in 1..63, got 64"),
        ({"lengths": [64], "windows": 0}, "windows must be >= 1, got 0"),
        ({"lengths": [64], "methods": ["reropee"]}, "did you mean 'rerope'"),
        ({"lengths": [64], "methods": []}, "at least one stack"),
        ({"lengths": [64], "methods": [ReRoPE(window=32)]}, "window must be in 1..31"),
        ({"lengths": [64], "methods": ["plain", "plain"]}, "different stacks"),
        ({"lengths": [64], "trained_length": 1}, "trained_length must be >= 2"),
    ],
)
def test_bad_arguments(model, ids, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_lengths(model, ids, **arguments)


@pytest.mark.parametrize("bad", [torch.tensor([300, 1]), torch.tensor([]), torch.zeros(3, 4).long(), [0.5, 1.0]])
def test_bad_tokens(model, bad):
    with pytest.raises(ValueError, match="token_ids"):
        evaluate_lengths(model, bad, [2], ["plain"])


def test_model_without_rotary_positions_is_refused_before_the_work(ids):
    host = GPT2LMHeadModel(GPT2Config(**GPT2))
    calls = []
    with pytest.raises(ValueError, match="rotary"):
        evaluate_lengths(host, ids, [32], ["plain", "rerope"], progress=lambda *call: calls.append(call))
    assert not calls


def test_absolute_positions_cannot_be_read_past(ids):
    host = GPT2LMHeadModel(GPT2Config(**GPT2))
    evaluate_lengths(host, ids, [32], ["plain"], windows=1)
    with pytest.raises(ValueError, match="table of 64 positions"):
        evaluate_lengths(host, ids, [32, 128], ["plain"], windows=1)


def test_broken_weights_are_named(ids):
    host = tiny_llama()
    host.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="not a number at length 32"):
        evaluate_lengths(host, ids, [32], ["plain"], windows=1)


def test_memory_is_checked_before_the_work(model, ids, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    calls = []
    with pytest.raises(ValueError, match=r"length 64 needs about .*iB .*only 1000 B is available"):
        evaluate_lengths(model, ids, [32, 64], ["plain"], progress=lambda *call: calls.append(call))
    assert not calls


def test_memory_estimate_grows_as_it_must():
    model = tiny_llama()
    one, two = (memory.prefill_bytes(model, length, logits=8) for length in (1000, 2000))
    fixed = memory.prefill_bytes(model, 1, logits=8) * 2 - memory.prefill_bytes(model, 2, logits=8)
    assert two - fixed == pytest.approx(2 * (one - fixed))
    # The key/value cache alone: 2 layers, key and value, 2 heads of 8, 4 bytes.
    assert one > 1000 * 2 * 2 * 2 * 8 * 4
    eager = tiny_llama(attn_implementation="eager")
    assert memory.prefill_bytes(eager, 2000, logits=8) > two + 2000 * 2000 * 4 * 4


def test_peak_memory_sees_an_allocation():
    with memory.PeakMemory(torch.device("cpu")) as peak:
        torch.ones(16 * 2**20)
    if peak.bytes is None:
        pytest.skip("this system does not tell the resident peak")
    assert 60 * 2**20 < peak.bytes < 100 * 2**20
