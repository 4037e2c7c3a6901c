import pytest
import torch
import transformers as hosts
from transformers import DynamicCache

from danlu.tuning.ladder.model import LadderCache, LadderConfig, LadderModel
from tuning.ladder_hosts import VOCABULARY, bert, gpt2, llama, tokens, unset, widened


def ladder(build=llama, layers=(0, 2), **options):
    options = {"reduction": 4, "init": "magnitude", **options}
    return unset(LadderModel(build(torch.float64), LadderConfig(layers=layers, **options))).eval()


def gemma2(dtype):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4}
    config = hosts.Gemma2Config(**sizes, head_dim=8, query_pre_attn_scalar=8, num_key_value_heads=2,
                                intermediate_size=64, sliding_window=5, pad_token_id=0)  # fmt: skip
    # the host's own mask of a fully padded row is not a number in float64
    return widened(hosts.Gemma2ForCausalLM(config), torch.float32)


BUILDS = {"llama": llama, "gpt2": gpt2, "sliding-gemma2": gemma2}


def padded(rows):
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return ids, mask


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("layers", [(0, 2), "all"])
def test_decoding_step_by_step_is_one_pass(build, layers):
    model = ladder(BUILDS[build], layers)
    ids = tokens(2, 12)
    whole = model(ids).logits
    cache, steps = None, []
    for size in (5, 1, 1, 3, 2):
        start = 0 if cache is None else cache.get_seq_length()
        out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert isinstance(cache, LadderCache) and cache.get_seq_length() == 12
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)
    assert cache.side.get_seq_length() == 12 and len(cache.side.layers) == len(model.layers)


def test_memory_of_the_cache_is_that_of_both_parts():
    model = ladder(layers=(0, 2))
    cache = model(tokens(2, 12), use_cache=True).past_key_values
    one = 2 * 2 * 2 * 12 * 8 * 8  # keys and values, batch, heads, tokens, channels, bytes of one backbone layer
    # blocks 0, 1 and 2 of the backbone ran, and two blocks of a quarter of the width
    assert cache.bytes() == 3 * one + 2 * one // 4


@pytest.mark.parametrize("build", BUILDS)
def test_left_padded_prompts_generate_what_each_generates_alone(build):
    model = ladder(BUILDS[build])
    rows = [tokens(1, length, seed=length)[0] for length in (4, 9, 7)]
    ids, mask = padded(rows)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    for row, new in zip(rows, together, strict=True):
        alone = model.generate(input_ids=row[None], use_cache=False, **options)[0, len(row) :]
        assert torch.equal(new, alone)
    assert len({tuple(row.tolist()) for row in together}) > 1


def test_beams_are_reordered_in_both_caches():
    model = ladder()
    options = {"max_new_tokens": 10, "num_beams": 4, "do_sample": False, "pad_token_id": 0, "num_return_sequences": 3}
    with_cache = model.generate(input_ids=tokens(2, 5), **options)
    assert torch.equal(with_cache, model.generate(input_ids=tokens(2, 5), use_cache=False, **options))
    ids, order = tokens(3, 8), torch.tensor([2, 0, 0])
    cache = model(ids[:, :6], use_cache=True).past_key_values
    cache.reorder_cache(order)
    out = model(ids[order, 6:], past_key_values=cache).logits
    assert torch.allclose(out, model(ids[order]).logits[:, 6:], atol=1e-9)
    assert not torch.equal(*cache.side.layers[1].keys[[0, 1]])
    assert torch.equal(*cache.side.layers[1].keys[[1, 2], :, :6])


def test_sampling_with_a_cache_draws_what_it_draws_without():
    model = ladder()
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        drawn.append(
            model.generate(input_ids=tokens(2, 5), max_new_tokens=12, do_sample=True, top_k=20, pad_token_id=0,
                           use_cache=use_cache, num_return_sequences=2)
        )  # fmt: skip
    assert torch.equal(*drawn)


def test_a_prompt_can_be_continued_from_its_cache():
    model, ids = ladder(), tokens(1, 9)
    cache = model(ids[:, :6], use_cache=True).past_key_values
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(input_ids=ids, past_key_values=cache, **options), model.generate(input_ids=ids, **options)
    )


def test_a_cache_can_be_cropped_and_its_parts_are_written_apart():
    model, ids = ladder(), tokens(2, 9)
    cache = model(ids, use_cache=True).past_key_values
    for layer in cache.layers:
        if layer.get_seq_length():
            layer.crop(-3)
    out = model(ids[:, 6:], past_key_values=cache).logits
    assert torch.allclose(out, model(ids).logits[:, 6:], atol=1e-9)
    with pytest.raises(RuntimeError, match=r"write to \.backbone or \.side"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


def test_a_side_block_attends_as_the_layer_that_feeds_it():
    model = ladder(gemma2, layers=(1, 2))
    assert model.side_config.layer_types == ["full_attention", "sliding_attention"]
    assert [rung.block.self_attn.sliding_window for rung in model.side.rungs] == [None, 5]


def test_generation_settings_come_from_the_backbone():
    backbone = llama()
    backbone.generation_config.eos_token_id = 7
    model = LadderModel(backbone, LadderConfig(reduction=4, init="random"))
    assert model.generation_config.eos_token_id == 7


def test_generation_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="generate needs head='lm' over a causal model"):
        ladder(bert).generate(tokens(1, 4))
    with pytest.raises(ValueError, match="got head='tokens' over LlamaForCausalLM"):
        ladder(head="tokens", num_labels=2).generate(tokens(1, 4))
    with pytest.raises(ValueError, match="cache_implementation must be left out"):
        ladder().generate(tokens(1, 4), cache_implementation="static")
    with pytest.raises(TypeError, match="past_key_values must be a LadderCache"):
        ladder().generate(tokens(1, 4), past_key_values=DynamicCache(), max_new_tokens=2)
