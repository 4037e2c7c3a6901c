"""Generation with extended models: greedy, beams, guesses, static caches, turns; saving; refused calls."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from torch import Tensor, nn

from context.families import BY_NAME, NEW, STACKS, generate, left_padded, tokens
from danlu.context.extend import active_methods, extend, extended, restore


@pytest.fixture(scope="module")
def models() -> dict[str, transformers.PreTrainedModel]:
    """Float64 models by family, built once; every test leaves them plain."""
    return {name: BY_NAME[name].build() for name in ("llama", "gemma3", "deepseek-v3")}


def by_hand(model: nn.Module, ids: Tensor, steps: int = NEW) -> Tensor:
    """Greedy continuation of (1, length) by a whole forward pass, without a cache, at each step."""
    for _ in range(steps):
        logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("stack", [*STACKS, "ntk-mixed:factor=4"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek-v3"])
@torch.no_grad()
def test_greedy_generation_is_the_argmax_of_whole_forward_passes(models, name, stack):
    if name == "gemma3" and "sinks" in stack:
        stack = "window:window=9"
    model, ids = models[name], tokens(1, 9)
    plain = generate(model, ids)
    with extended(model, stack):
        out = generate(model, ids)
        assert torch.equal(out, by_hand(model, ids))
    assert not torch.equal(out, plain), "the method must matter for this text"


@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_padded_batches_generate_as_single_rows(models, stack):
    model, rows = models["llama"], [tokens(1, n, seed=n)[0] for n in (12, 5, 1)]
    with extended(model, stack):
        ids, mask = left_padded(rows)
        out = generate(model, ids, mask)[:, 12:]
        for i, row in enumerate(rows):
            assert torch.equal(out[i], generate(model, row[None])[0, len(row) :])


def beams_by_hand(model: nn.Module, ids: Tensor, width: int, steps: int) -> tuple[Tensor, float]:
    """Best of ``width`` beams without a cache; there is no end token, so all beams are equally long."""
    beams = [(0.0, ids)]
    for _ in range(steps):
        grown = []
        for score, row in beams:
            logs = model(row, use_cache=False).logits[0, -1].log_softmax(-1)
            for value, token in zip(*logs.topk(width), strict=True):
                grown.append((score + float(value), torch.cat([row, token.view(1, 1)], 1)))
        beams = sorted(grown, key=lambda pair: -pair[0])[:width]
    return beams[0][1], beams[0][0]


@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_beam_search_reorders_the_cache(models, stack):
    model, rows = models["llama"], [tokens(1, n, seed=n)[0] for n in (12, 7)]
    options = {"num_beams": 3, "max_new_tokens": 20, "length_penalty": 0.0}
    with extended(model, stack):
        ids, mask = left_padded(rows)
        cached = generate(model, ids, mask, **options)
        assert torch.equal(cached, generate(model, ids, mask, use_cache=False, **options))
        hand, _ = beams_by_hand(model, rows[1][None], 3, 20)
        assert torch.equal(cached[1, 5:], hand[0])
        assert not torch.equal(cached, generate(model, ids, mask, max_new_tokens=20)), "beams must differ from greedy"


@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_guessed_tokens_are_taken_back_from_the_cache(models, stack):
    """Prompt lookup guesses runs of tokens and crops the cache where a guess was wrong."""
    model = models["llama"]
    ids = torch.cat([tokens(1, 9)] * 2, 1)
    with extended(model, stack):
        assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=4), generate(model, ids))


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_a_static_cache_generates_the_same(models, name, stack):
    if name == "gemma3" and "sinks" in stack:
        stack = "window:window=9"
    model, rows = models[name], [tokens(1, n, seed=n)[0] for n in (12, 5)]
    with extended(model, stack):
        ids, mask = left_padded(rows)
        dynamic = generate(model, ids, mask)
        static = generate(model, ids, mask, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, dynamic)


@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_a_cache_goes_on_in_a_second_turn(models, stack):
    model, first, second = models["llama"], tokens(1, 9, seed=1), tokens(1, 6, seed=2)
    with extended(model, stack):
        turn = generate(model, first, max_new_tokens=12, return_dict_in_generate=True)
        both = torch.cat([turn.sequences, second], 1)
        go_on = generate(model, both, past_key_values=turn.past_key_values)
        assert torch.equal(go_on, generate(model, both))


@torch.no_grad()
def test_sampling_is_reproducible(models):
    model, ids = models["llama"], tokens(1, 9)
    with extended(model, "rerope:window=7"):
        torch.manual_seed(5)
        one = generate(model, ids, do_sample=True)
        torch.manual_seed(5)
        assert torch.equal(generate(model, ids, do_sample=True), one)


@pytest.mark.parametrize("stack", [*STACKS, "ntk-mixed:factor=4+logn:clip=False"])
@torch.no_grad()
def test_a_saved_model_remembers_its_methods(stack, tmp_path):
    model, ids = BY_NAME["llama"].build(torch.float32), tokens(1, 50)
    plain = model(ids).logits
    extend(model, stack, trained_length=12)
    expected, methods = model(ids).logits, active_methods(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    assert torch.equal(again(ids).logits, plain), "without danlu the folder is the plain model"
    extend(again)
    assert active_methods(again) == methods
    assert torch.equal(again(ids).logits, expected)
    assert torch.equal(restore(again)(ids).logits, plain)


def test_no_methods_and_none_remembered_is_an_error(models):
    with pytest.raises(ValueError, match="at least one method"):
        extend(models["llama"])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_sdpa_models_extend_as_eager_ones(name):
    model, ids = BY_NAME[name].build(), tokens(2, 50)
    with extended(model, "rerope:window=7"):
        expected = model(ids).logits
    model.set_attn_implementation("sdpa")
    plain = model(ids).logits
    with extended(model, "rerope:window=7"):
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, plain)
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_attention_matrices_are_refused(models):
    model = models["llama"]
    with (
        extended(model, "rerope:window=7"),
        pytest.raises(ValueError, match="output_attentions"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        model(tokens(1, 20), output_attentions=True)


@pytest.mark.parametrize("stack", ["rerope:window=7", "leaky:window=5:stride=4.0", "dynamic-ntk"])
@torch.no_grad()
def test_positions_that_skip_or_are_real_are_refused(models, stack):
    model, ids = models["llama"], tokens(1, 20)
    at = torch.arange(20)[None]
    with extended(model, stack):
        expected = model(ids).logits
        torch.testing.assert_close(model(ids, position_ids=at + 7).logits, expected, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="position_ids must not skip"):
            model(ids, position_ids=at * 2)
        with pytest.raises(ValueError, match="position_ids must be whole numbers"):
            model(ids, position_ids=at * 0.5)


@torch.no_grad()
def test_frequency_methods_take_any_positions(models):
    model, ids = models["llama"], tokens(1, 20)
    at = torch.arange(20)[None]
    halved = model(ids, position_ids=at * 0.5).logits
    with extended(model, "pi:factor=2"):
        torch.testing.assert_close(model(ids).logits, halved, rtol=0, atol=1e-5)
