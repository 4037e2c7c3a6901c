"""Key normalisation: the formula, its invariances, and the hooks on real attention layers."""

import copy
import logging

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from danlu.attention.key_norm import add_key_norm, key_norm, remove_key_norm

SMALL = dict(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.3,
)


def tiny(kind: str = "llama", **kwargs):
    torch.manual_seed(0)
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SMALL, **kwargs))
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.k_proj.bias)
        return model.eval()
    return LlamaForCausalLM(LlamaConfig(**SMALL, **kwargs)).eval()


def tokens(rows: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def test_is_the_direction_times_root_head_dim():
    k = torch.randn(2, 3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    q = torch.randn(2, 3, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    cosine_like = q @ (k / k.norm(dim=-1, keepdim=True)).mT
    assert torch.allclose(q @ key_norm(k, eps=1e-12).mT / 16**0.5, cosine_like, atol=1e-9)


def test_length_of_a_key_does_not_matter():
    k = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(2))
    factor = torch.rand(1, 2, 6, 1, generator=torch.Generator().manual_seed(4)) * 9 + 1
    assert torch.allclose(key_norm(k * factor), key_norm(k), atol=1e-5)


def test_commutes_with_an_orthogonal_map():
    g = torch.Generator().manual_seed(5)
    k = torch.randn(4, 9, 8, dtype=torch.float64, generator=g)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=g)).Q
    assert torch.allclose(key_norm(k @ turn), key_norm(k) @ turn, atol=1e-12)


def test_zero_large_and_empty_keys():
    assert torch.equal(key_norm(torch.zeros(2, 8)), torch.zeros(2, 8))
    large = torch.full((1, 8), 6e4, dtype=torch.float16)
    assert torch.equal(key_norm(large), torch.ones(1, 8, dtype=torch.float16))
    assert key_norm(torch.zeros(2, 0, 8)).shape == (2, 0, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_keeps_dtype(dtype):
    k = torch.randn(3, 64, generator=torch.Generator().manual_seed(6)).to(dtype)
    out = key_norm(k)
    assert out.dtype == dtype
    assert torch.allclose(out.double(), key_norm(k.double()), atol=4 * torch.finfo(dtype).eps)


def test_gradient_matches_finite_differences():
    k = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7), requires_grad=True)
    assert torch.autograd.gradcheck(key_norm, (k,))


def test_bad_input():
    with pytest.raises(TypeError, match="floating"):
        key_norm(torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="eps must be > 0, got 0"):
        key_norm(torch.ones(2, 4), eps=0)
    with pytest.raises(ValueError, match="eps must be > 0"):
        add_key_norm(tiny(), eps=-1.0)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_scaling_the_key_projection_changes_nothing(kind, attention):
    model = tiny(kind, attn_implementation=attention)
    plain = model(tokens()).logits
    handles = add_key_norm(model)
    assert len(handles) == 2
    before = model(tokens()).logits
    assert (before - plain).abs().max() > 1e-2
    with torch.no_grad():
        for layer, factor in zip(model.model.layers, (7.0, 0.3), strict=True):
            for parameter in layer.self_attn.k_proj.parameters():
                parameter.mul_(factor)
    assert torch.allclose(model(tokens()).logits, before, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_matches_a_dense_layer(kind):
    # The host's eager attention takes its softmax in float32; sdpa stays in float64.
    model = tiny(kind, attn_implementation="sdpa").double()
    add_key_norm(model, eps=1e-12)
    layer = model.model.layers[0].self_attn
    x = torch.randn(1, 9, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    cos, sin = model.model.rotary_emb(x, torch.arange(9)[None])
    cos, sin = cos.double(), sin.double()
    mask = torch.full((9, 9), float("-inf"), dtype=torch.float64).triu(1)
    out = layer(x, position_embeddings=(cos, sin), attention_mask=mask[None, None])[0]

    def heads(linear):
        return (x @ linear.weight.T + (0 if linear.bias is None else linear.bias)).view(9, -1, 12)

    def turn(v):
        half = torch.cat((-v[..., 6:], v[..., :6]), -1)
        return v * cos[0, :, None] + half * sin[0, :, None]

    raw = heads(layer.k_proj)
    q, k, v = turn(heads(layer.q_proj)), turn(raw / raw.norm(dim=-1, keepdim=True)), heads(layer.v_proj)
    rows = []
    for h in range(4):
        logits = q[:, h] @ k[:, h // 2].T
        rows.append(torch.softmax(logits + mask, -1) @ v[:, h // 2])
    expected = torch.cat(rows, -1) @ layer.o_proj.weight.T
    assert torch.allclose(out[0], expected, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_decode_with_cache_is_the_full_forward(kind):
    model = tiny(kind)
    add_key_norm(model)
    ids = tokens(1)
    full = model(ids).logits
    cache = transformers.DynamicCache(config=model.config)
    steps = [model(ids[:, :7], past_key_values=cache).logits]
    steps += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(7, ids.shape[1])]
    assert torch.allclose(torch.cat(steps, 1), full, atol=1e-5)
    lengths = cache.layers[0].keys.norm(dim=-1)
    assert torch.allclose(lengths, torch.full_like(lengths, 12**0.5), atol=1e-3)


def test_bf16_gradients_and_checkpointing():
    model = tiny().to(torch.bfloat16).train()
    add_key_norm(model)
    logits = model(tokens()).logits
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in plain)
    model.zero_grad()
    model.gradient_checkpointing_enable()  # the name that every supported host version has
    model(tokens()).logits.float().square().mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))


def test_save_load_and_add_again(tmp_path, caplog):
    model = tiny()
    with caplog.at_level(logging.WARNING, "danlu"):
        add_key_norm(model)
    assert not caplog.records
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.danlu_key_norm is True
    assert not torch.allclose(loaded(tokens()).logits, expected, atol=1e-3)
    with caplog.at_level(logging.WARNING, "danlu"):
        add_key_norm(loaded)
    assert not caplog.records
    assert torch.equal(loaded(tokens()).logits, expected)


def test_warns_for_a_checkpoint_trained_without(tmp_path, caplog):
    tiny().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "danlu"):
        add_key_norm(model)
    assert "trained without key normalisation" in caplog.text


def test_remove_restores_and_copies_keep_the_hooks():
    model = tiny()
    plain = model(tokens()).logits
    add_key_norm(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens()).logits, model(tokens()).logits)
    assert remove_key_norm(model) == 2
    assert remove_key_norm(model) == 0
    assert torch.equal(model(tokens()).logits, plain)
    assert not hasattr(model.config, "danlu_key_norm")
    assert remove_key_norm(twin) == 2
    assert torch.equal(twin(tokens()).logits, plain)


def test_twice_is_an_error():
    model = tiny()
    add_key_norm(model)
    with pytest.raises(ValueError, match="LlamaAttention has key normalisation already"):
        add_key_norm(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.Phi3Config(**SMALL, pad_token_id=0), "Phi3Attention .* fused projection qkv_proj"),
        (
            transformers.GPTNeoXConfig(
                vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
            ),
            "GPTNeoXAttention .* fused projection query_key_value",
        ),
        (transformers.Qwen3Config(**SMALL, head_dim=12), "Qwen3Attention already normalises its keys with k_norm"),
        (
            transformers.DeepseekV3Config(
                **(SMALL | dict(num_key_value_heads=4)),
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=8,
                first_k_dense_replace=9,
            ),
            "DeepseekV3Attention builds its keys from a latent",
        ),
    ],
    ids=["phi3", "neox", "qwen3", "mla"],
)
def test_unsuitable_layers_are_refused_whole(config, message):
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=message):
        add_key_norm(model)
    assert not hasattr(model.config, "danlu_key_norm")


def test_models_without_attention_or_with_an_encoder_are_refused():
    with pytest.raises(ValueError, match="Linear has no attention layer"):
        add_key_norm(torch.nn.Linear(2, 2))
    bart = transformers.BartConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    with pytest.raises(ValueError, match="encoder-decoder"):
        add_key_norm(transformers.BartForConditionalGeneration(bart))


def test_peft_wrap_first(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["k_proj"], r=2)
    model = peft.get_peft_model(tiny(), lora)
    assert len(add_key_norm(model)) == 2
    hooked = tiny()
    add_key_norm(hooked)
    with pytest.raises(ValueError, match="already"):
        add_key_norm(peft.get_peft_model(hooked, lora))
