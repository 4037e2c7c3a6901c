"""Absorbed decoding of the host's latent models: outputs, caches, masks, and that it goes away again."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from danlu.attention.latent import host as absorb_host
from danlu.attention.latent.absorb import absorb, unabsorb
from danlu.attention.latent.cache import LatentLayer
from reference.latent_hosts import FAMILIES, YARN, caches_latents, latent_model

PROMPT = torch.randint(1, 59, (2, 13), generator=torch.Generator().manual_seed(0))
# Families whose indexer hands its choice on; that of glm5_next makes a mask of it.
INDEXED = {"axk2", "deepseek_v32", "dots3_note", "glm_moe_dsa", "hy_v4", "mistral_large4"}


def pair(family: str = "deepseek_v3", **changes):
    """A stock model and an absorbed copy of it."""
    stock = latent_model(family, **changes)
    if not caches_latents(stock):
        pytest.skip(f"transformers {transformers.__version__} caches expanded keys for {family}")
    return stock, absorb(copy.deepcopy(stock))


@pytest.fixture
def absorbed_calls(monkeypatch):
    """(layer, queries, keys read) of every absorbed call."""
    calls = []
    real = absorb_host.absorbed_attention

    def spy(q_nope, q_rope, latent, *args, **kwargs):
        calls.append((q_nope.shape[2], latent.shape[1]))
        return real(q_nope, q_rope, latent, *args, **kwargs)

    monkeypatch.setattr(absorb_host, "absorbed_attention", spy)
    return calls


def close(a, b, tolerance=1e-5):
    assert (a - b).abs().max() <= tolerance * b.abs().max()


def generate(model, ids=PROMPT, **options):
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)


def same_generation(stock, ours, *args, **options):
    a, b = generate(stock, *args, **options), generate(ours, *args, **options)
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.logits, b.logits, strict=True):
        close(y, x)
    return a


def latent_layers(model):
    return [m for m in model.modules() if hasattr(m, "kv_b_proj")]


# every family of the host


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_unchanged_and_steps_are_absorbed(family, absorbed_calls):
    stock, ours = pair(family)
    absorbed_calls.clear()
    same_generation(stock, ours)
    steps = [keys for queries, keys in absorbed_calls if queries == 1]
    assert len(steps) == 9 * len(latent_layers(ours)) == len(absorbed_calls)
    if family in INDEXED:  # a step reads the selected latents only
        assert min(steps) < 13 and (family == "dots3_note" or max(steps) < 13)
    else:
        assert sorted(set(steps)) == list(range(14, 23))


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_and_chunks_are_unchanged(family):
    stock, ours = pair(family)
    mask = torch.ones(2, 36, dtype=torch.long)
    mask[0, :5] = 0
    ids = torch.randint(1, 59, (2, 36))
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    caches, start = [None, None], 0
    for size in (16, 1, 7, 11, 1):
        outs = []
        for i, model in enumerate((stock, ours)):
            with torch.no_grad():
                out = model(
                    ids[:, start : start + size],
                    attention_mask=mask[:, : start + size],
                    position_ids=positions[:, start : start + size],
                    past_key_values=caches[i],
                    use_cache=True,
                )
            caches[i] = out.past_key_values
            outs.append(out.logits)
        real = mask[:, start : start + size].bool()
        close(outs[1][real], outs[0][real])
        assert torch.isfinite(outs[1]).all()
        start += size


# the variants within a family


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_interleave": False},
        {"q_lora_rank": None},
        {"attention_bias": True},
        {"rope_parameters": YARN},
        {"attn_implementation": "eager"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_variants_of_the_layer_are_unchanged(changes):
    stock, ours = pair(**changes)
    if "attention_bias" in changes:
        for (name, a), (_, b) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
            if name.endswith("bias"):
                with torch.no_grad():
                    b.copy_(a.normal_())
    layer = latent_layers(stock)[0]
    assert ("rope_parameters" in changes) == (abs(layer.scaling - 12**-0.5) > 1e-3)
    same_generation(stock, ours)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32"])
@pytest.mark.parametrize("queries", [1, 2, 18, 19, 20, 21, 60, 200])
def test_a_chunk_takes_the_cheaper_form_on_both_sides_of_the_crossover(family, queries, absorbed_calls):
    # 20 new tokens: 2 * 20 - 8 - 12 = 20 more multiplications per pair against 20 * (8 + 12) = 400 once per key
    stock, ours = pair(family)
    ids = torch.randint(1, 59, (1, 250 + queries))
    outs = []
    for model in (stock, ours):
        with torch.no_grad():
            cache = model(ids[:, :250], use_cache=True).past_key_values
            absorbed_calls.clear()
            outs.append(model(ids[:, 250:], past_key_values=cache).logits)
    close(outs[1], outs[0])
    assert bool(absorbed_calls) == (queries <= 18)  # 400 (1 - T / L) < 20 T, with L = 250 + T


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "top_k": 20}, {"num_return_sequences": 2, "num_beams": 2}]
)
def test_beams_and_samples_are_unchanged(options):
    stock, ours = pair()
    sequences = []
    for model in (stock, ours):
        torch.manual_seed(3)
        sequences.append(generate(model, **options).sequences)
    assert torch.equal(*sequences)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_cache_of_the_host_serves(kind, implementation, absorbed_calls):
    stock, ours = pair(attn_implementation=implementation)
    mask = torch.ones_like(PROMPT)
    mask[1, :4] = 0
    absorbed_calls.clear()
    same_generation(stock, ours, cache_implementation=kind, attention_mask=mask)
    assert len(absorbed_calls) == 9 * 3


def test_a_static_cache_with_free_slots_serves_chunks():
    stock, ours = pair()
    ids = torch.randint(1, 59, (2, 30))
    outs = []
    for model in (stock, ours):
        cache = transformers.StaticCache(config=model.config, max_cache_len=64)
        with torch.no_grad():
            parts = [
                model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 12), (12, 20), (20, 21), (21, 30))
            ]
        outs.append(torch.cat(parts, 1))
    close(outs[1], outs[0])
    with torch.no_grad():
        close(outs[1], stock(ids).logits)


@pytest.mark.parametrize("given", [True, False])
def test_plain_caches_append_in_place_until_undone(given):
    stock, ours = pair()

    def layers(model):
        cache = transformers.DynamicCache() if given else None
        return model(PROMPT, past_key_values=cache, use_cache=True).past_key_values.layers

    assert {type(layer) for layer in layers(ours)} == {LatentLayer}
    undone = unabsorb(copy.deepcopy(ours))
    assert [type(layer) for layer in layers(undone)] == [type(layer) for layer in layers(stock)]
    assert not any(module._forward_pre_hooks for module in undone.modules())


def test_our_growing_cache_layer_serves_the_host():
    stock, ours = pair()
    cache = transformers.Cache(layer_class_to_replicate=LatentLayer)
    expected = generate(stock)
    got = generate(ours, past_key_values=cache)
    assert torch.equal(got.sequences, expected.sequences)
    assert isinstance(cache.layers[0], LatentLayer) and cache.get_seq_length() == 22
    assert cache.layers[0].keys.shape == (2, 1, 22, 20)
    for beams in (2, 3):
        cache = transformers.Cache(layer_class_to_replicate=LatentLayer)
        got = generate(ours, num_beams=beams, past_key_values=cache).sequences
        assert torch.equal(got, generate(stock, num_beams=beams).sequences)


def test_a_custom_four_dimensional_mask_is_obeyed():
    stock, ours = pair()
    ids = torch.randint(1, 59, (2, 20))
    visible = (torch.rand(2, 1, 5, 20) < 0.5) & torch.ones(5, 20, dtype=torch.bool).tril(15)
    visible[..., 0] = True
    outs = []
    for model in (stock, ours):
        with torch.no_grad():
            cache = model(ids[:, :15], use_cache=True).past_key_values
            outs.append(model(ids[:, 15:], attention_mask=visible, past_key_values=cache).logits)
    close(outs[1], outs[0])


def test_a_decoded_step_is_a_full_pass():
    for family in ("deepseek_v3", "deepseek_v2", "longcat_flash"):
        stock, ours = pair(family)
        ids = torch.randint(1, 59, (1, 25))
        with torch.no_grad():
            whole = stock(ids).logits
            cache = ours(ids[:, :20], use_cache=True).past_key_values
            steps = [ours(ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, 25)]
        close(torch.cat(steps, 1), whole[:, 20:])


# what is left to the stock form


def test_output_attentions_are_the_stock_ones(absorbed_calls):
    stock, ours = pair(attn_implementation="eager")
    absorbed_calls.clear()
    a, b = (generate(model, output_attentions=True) for model in (stock, ours))
    assert torch.equal(a.sequences, b.sequences) and not absorbed_calls
    for x, y in zip(a.attentions, b.attentions, strict=True):
        for one, two in zip(x, y, strict=True):
            assert torch.equal(one, two)


def test_training_and_prefill_are_bitwise_the_stock_ones(absorbed_calls):
    for implementation in ("sdpa", "eager"):
        stock, ours = pair(attn_implementation=implementation)
        absorbed_calls.clear()
        grads = []
        for model in (stock, ours):
            model.train()
            model(PROMPT, labels=PROMPT).loss.backward()
            grads.append([p.grad for p in model.parameters()])
        for a, b in zip(*grads, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        assert not absorbed_calls


def test_dropout_takes_the_stock_form(absorbed_calls):
    stock, ours = pair(attention_dropout=0.3)
    absorbed_calls.clear()
    with torch.no_grad():
        cache = ours(PROMPT, use_cache=True).past_key_values
        ours.train()(PROMPT[:, :1], past_key_values=cache)
    assert not absorbed_calls


def test_gradients_flow_through_an_absorbed_step():
    stock, ours = pair()
    grads = []
    for model in (stock, ours):
        with torch.no_grad():
            cache = model(PROMPT, use_cache=True).past_key_values
        model(PROMPT[:, :1], past_key_values=cache).logits.square().sum().backward()
        grads.append(latent_layers(model)[-1].kv_b_proj.weight.grad)
    close(grads[1], grads[0], 1e-4)


def test_an_adapter_put_on_later_takes_the_stock_form(absorbed_calls):
    peft = pytest.importorskip("peft")
    stock, ours = pair()
    config = peft.LoraConfig(r=2, target_modules=["kv_b_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    stock = peft.get_peft_model(stock, config)
    torch.manual_seed(0)
    ours = peft.get_peft_model(ours, config)
    absorbed_calls.clear()
    same_generation(stock, ours)
    assert not absorbed_calls
    with pytest.raises(ValueError, match="kv_b_proj must be a plain linear layer.*merge the adapter"):
        absorb(stock)
    merged = ours.merge_and_unload()
    same_generation(stock, merged)
    assert absorbed_calls


# numbers


def test_bfloat16_is_as_close_to_float64_as_the_stock_form():
    stock, ours = pair(first_k_dense_replace=3, hidden_size=64, kv_lora_rank=64, qk_nope_head_dim=32, v_head_dim=32)
    exact = copy.deepcopy(stock).bfloat16().double()
    stock, ours = stock.bfloat16(), absorb(unabsorb(ours).bfloat16())
    ids = torch.randint(1, 59, (4, 90))
    errors = []
    with torch.no_grad():
        expected = exact(ids).logits[:, 80:]
        for model in (stock, ours):
            cache = model(ids[:, :80], use_cache=True).past_key_values
            steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(80, 90)]
            errors.append(((torch.cat(steps, 1).double() - expected).norm() / expected.norm()).item())
    assert errors[1] < 0.05 and errors[1] < 1.3 * errors[0]


def test_float64_steps_agree_to_rounding():
    stock, ours = pair(first_k_dense_replace=3)
    stock, ours = stock.double(), absorb(unabsorb(ours).double())
    with torch.no_grad():
        outs = []
        for model in (stock, ours):
            cache = model(PROMPT, use_cache=True).past_key_values
            outs.append(model(PROMPT[:, :1], past_key_values=cache).logits)
    close(outs[1], outs[0], 1e-12)


# it goes away again


def test_unabsorb_restores_the_model_to_the_bit(absorbed_calls):
    stock, ours = pair()
    assert unabsorb(ours) is ours
    absorbed_calls.clear()
    a, b = generate(stock), generate(ours)
    assert all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))
    assert not absorbed_calls and ours.config._attn_implementation == "sdpa"
    for before, after in zip(stock.modules(), ours.modules(), strict=True):
        assert vars(before).keys() == vars(after).keys()
        assert not before._forward_hooks and not after._forward_hooks
    assert unabsorb(ours) is ours


def test_absorbing_twice_changes_nothing(absorbed_calls):
    _, ours = pair()
    absorbed_calls.clear()
    assert absorb(ours) is ours and not absorbed_calls  # not even a probe


def test_a_deep_copy_is_absorbed_and_independent(absorbed_calls):
    stock, ours = pair()
    twin = copy.deepcopy(ours)
    absorbed_calls.clear()
    same_generation(stock, twin)
    assert absorbed_calls
    with torch.no_grad():
        for layer in latent_layers(ours):
            layer.kv_b_proj.weight.zero_()
    same_generation(stock, twin)
    unabsorb(ours)
    absorbed_calls.clear()
    same_generation(stock, twin)
    assert absorbed_calls


def test_a_saved_model_is_the_stock_one(tmp_path):
    stock, ours = pair()
    ours.save_pretrained(tmp_path)
    assert "danlu" not in (tmp_path / "config.json").read_text()
    loaded = type(stock).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    for (name, a), (_, b) in zip(stock.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_training_mode_and_hooks_are_left_as_they_were():
    stock = latent_model("deepseek_v3").train()
    if not caches_latents(stock):
        pytest.skip("this host caches expanded keys")
    stock.model.layers[0].eval()
    modes = [m.training for m in stock.modules()]
    state = torch.random.get_rng_state()
    absorb(stock)
    assert [m.training for m in stock.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_hooks for m in stock.modules())


def test_another_implementation_chosen_later_is_obeyed(absorbed_calls):
    stock, ours = pair()
    ours.set_attn_implementation("eager")
    absorbed_calls.clear()
    same_generation(stock, ours)
    assert not absorbed_calls
    assert unabsorb(ours).config._attn_implementation == "eager"


def test_extension_on_top_of_it_is_right_and_leaves_it_in_place(absorbed_calls):
    import danlu

    stock, ours = pair()
    for model in (stock, ours):
        danlu.extend(model, danlu.ReRoPE(window=6))
    same_generation(stock, ours)
    for model in (stock, ours):
        danlu.restore(model)
    absorbed_calls.clear()
    same_generation(stock, ours)
    assert absorbed_calls
    with pytest.raises(ValueError, match="must be one of.*'danlu'"):
        absorb(danlu.extend(stock, danlu.ReRoPE(window=6)))


def test_a_model_that_shares_its_configuration_stays_stock(absorbed_calls):
    stock, ours = pair()
    other = type(stock)(ours.config)
    other.load_state_dict(stock.state_dict())
    absorbed_calls.clear()
    same_generation(stock, other.eval())
    assert not absorbed_calls


# refusals


def test_models_without_latents_are_refused():
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM has no latent attention layer"):
        absorb(transformers.LlamaForCausalLM(config))


def test_a_single_layer_is_refused():
    stock, _ = pair()
    with pytest.raises(TypeError, match="must be or hold the Hugging Face model.*DeepseekV3DecoderLayer"):
        absorb(stock.model.layers[0])


def test_a_host_that_caches_expanded_keys_is_refused(monkeypatch):
    stock = latent_model("deepseek_v3")
    kind = type(latent_layers(stock)[0])
    monkeypatch.delattr(kind, "expand_kv", raising=False)
    with pytest.raises(ValueError, match="DeepseekV3Attention has no expand_kv: transformers .* caches"):
        absorb(stock)


def test_a_quantised_or_biased_up_projection_is_refused():
    stock, _ = pair()

    class Quantised(nn.Linear):
        pass

    layer = latent_layers(stock)[1]
    plain = layer.kv_b_proj
    layer.kv_b_proj = Quantised(20, 80, bias=False)
    with pytest.raises(ValueError, match="kv_b_proj must be a plain linear layer without bias, got Quantised"):
        absorb(stock)
    layer.kv_b_proj = nn.Linear(20, 80)
    with pytest.raises(ValueError, match="without bias"):
        absorb(stock)
    layer.kv_b_proj = nn.Linear(20, 81, bias=False)
    with pytest.raises(ValueError, match=r"kv_b_proj must map 20 to heads \* \(key \+ value\) = 80"):
        absorb(stock)
    layer.kv_b_proj = plain
    absorb(stock)


@pytest.mark.parametrize("where", ["expand_kv", "unused", "norm"])
def test_a_layer_that_does_more_than_one_linear_map_is_refused_and_restored(where, monkeypatch):
    stock, _ = pair()
    kind = type(latent_layers(stock)[0])
    original, forward = kind.expand_kv, kind.forward
    if where == "expand_kv":  # the values are not linear in the latent
        monkeypatch.setattr(
            kind, "expand_kv", lambda self, c, k: (original(self, c, k)[0], original(self, c, k)[1].tanh())
        )
    elif where == "unused":  # the layer does not hand on what expand_kv gives
        monkeypatch.setattr(kind, "forward", lambda self, *a, **k: (k["hidden_states"] * 2, None))
    else:  # the layer changes the expanded keys before it hands them on
        monkeypatch.setattr(kind, "expand_kv", lambda self, c, k: tuple(x * 1.01 for x in original(self, c, k)))
    ids = PROMPT
    with torch.no_grad():
        before = stock(ids).logits
        with pytest.raises(ValueError, match=r"DeepseekV3Attention \(layer 0\)"):
            absorb(stock)
        assert torch.equal(stock(ids).logits, before)
    assert stock.config._attn_implementation == "sdpa"
    assert not any("expand_kv" in vars(m) or "_danlu_probe" in vars(m) for m in stock.modules())
    monkeypatch.setattr(kind, "forward", forward)
    monkeypatch.setattr(kind, "expand_kv", original)
    absorb(stock)
