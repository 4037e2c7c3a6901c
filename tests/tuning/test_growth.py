"""Growth: the same outputs for every host and every size, composition, symmetry, and what is refused."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from danlu.hosts.architecture import UnsupportedArchitecture
from danlu.tuning.growth.grow import grow, verify_growth
from danlu.tuning.growth.maps import copies, grow_head_dim, head_sources
from danlu.tuning.growth.state import symmetry_gap
from reference.growth_hosts import (
    BERT,
    COUPLED,
    GPT2,
    HOSTS,
    LLAMA,
    PLAIN_ROPE,
    build,
    dense_llama,
    everything,
    make,
    tokens,
)

NEAR = 1e-5


def close(old, new, limit=NEAR):
    check = verify_growth(old, new, tokens())
    assert check.relative_error <= limit, check
    assert check.agreement == 1 and check.positions == 48
    return check


def single_sizes(name):
    sizes = [{"intermediate_size": 67}, {"hidden_size": 96}, {"hidden_size": 144}]
    if name in COUPLED:
        return [*sizes, {"hidden_size": 96, "num_attention_heads": 12}, {"hidden_size": 96, "num_attention_heads": 8}]
    return [
        *sizes,
        {"num_attention_heads": 12},
        {"num_attention_heads": 12, "num_key_value_heads": 6},
        {"num_attention_heads": 8, "num_key_value_heads": 4},
        {"head_dim": 16},
        {"head_dim": 24},
        {"num_hidden_layers": 4},
    ]


CASES = [(name, everything(name)) for name in HOSTS]
CASES += [
    (name, sizes) for name in ("llama-tied", "gemma3", "phi3", "qwen3", "gpt2", "bert") for sizes in single_sizes(name)
]
CASES += [(name, {"hidden_size": 60}) for name in HOSTS if name not in COUPLED]


@pytest.mark.parametrize(
    ("name", "sizes"), CASES, ids=[f"{n}-{'-'.join(f'{v}' for v in s.values())}" for n, s in CASES]
)
def test_logits_stay(name, sizes):
    model = build(name)
    close(model, grow(model, **sizes))


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "bert", "bert-untied", "roberta"])
@pytest.mark.parametrize("symmetry", ["none", "antisymmetric"])
def test_float64_hosts_agree_to_rounding(name, symmetry):
    model = build(name, torch.float64)
    close(model, grow(model, **everything(name), symmetry=symmetry), 1e-12)
    if name == "gpt2-untied":
        close(model, grow(model, hidden_size=66, num_attention_heads=6), 1e-12)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3])
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("symmetry", ["none", "antisymmetric"])
def test_dense_llama_agrees_to_rounding(eps, k, tied, symmetry):
    model = build("llama", torch.float64, rms_norm_eps=eps, tie_word_embeddings=tied, attention_bias=True)
    before = dense_llama(model, tokens())
    torch.testing.assert_close(model(tokens()).logits, before, atol=1e-4, rtol=1e-5)
    sizes = {
        "hidden_size": 48 * k,
        "intermediate_size": 67,
        "num_attention_heads": 6 * k,
        "num_key_value_heads": 3 * (k - 1),
        "head_dim": 8 * k,
        "num_hidden_layers": 2 + k,
    }
    after = dense_llama(grow(model, **sizes, symmetry=symmetry), tokens())
    assert (before - after).abs().max() < 1e-12 * before.abs().max()
    after = dense_llama(grow(model, hidden_size=60, symmetry=symmetry), tokens())
    assert (before - after).abs().max() < 1e-12 * before.abs().max()


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3])
@pytest.mark.parametrize("act", ["gelu", "relu"])
@pytest.mark.parametrize("tied", [False, True])
def test_bert_agrees_at_every_epsilon(eps, act, tied):
    model = build("bert", torch.float64, layer_norm_eps=eps, hidden_act=act, tie_word_embeddings=tied)
    for k in (2, 3):
        close(model, grow(model, hidden_size=48 * k), 1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen3", "smollm3"])
def test_greedy_text_is_the_same_with_a_cache(name):
    model = build(name)
    grown = grow(model, **everything(name))
    ids = tokens(1, 9)
    options = dict(do_sample=False, max_new_tokens=64, attention_mask=torch.ones_like(ids), pad_token_id=0)
    text = model.generate(ids, **options)
    assert text.shape == (1, 73) and len(set(text[0, 9:].tolist())) > 3
    assert torch.equal(grown.generate(ids, **options), text)


@pytest.mark.parametrize("name", HOSTS)
def test_saved_and_loaded_by_the_host_alone(name, tmp_path):
    model = build(name)
    grown = grow(model, **everything(name))
    grown.save_pretrained(tmp_path)
    loader = AutoModelForMaskedLM if name.startswith(("bert", "roberta")) else AutoModelForCausalLM
    loaded = loader.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    for (one, a), (other, b) in zip(grown.named_parameters(), loaded.named_parameters(), strict=True):
        assert one == other and torch.equal(a, b)
    close(model, loaded)


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "gemma2", "gemma3", "phi3", "qwen3", "smollm3", "gpt2", "bert"]
)
def test_growing_twice_is_growing_once_by_the_product(name):
    model = build(name, torch.float64)
    if name in COUPLED:
        steps = [{"hidden_size": 96, "intermediate_size": 80}, {"hidden_size": 192, "intermediate_size": 160}]
        if name == "gpt2":
            steps = [steps[0] | {"num_hidden_layers": 4}, steps[1] | {"num_hidden_layers": 8}]
    else:
        first = dict(zip(LLAMA_SIZES, (96, 80, 24, 6, 16, 4), strict=True))
        steps = [first, dict(zip(LLAMA_SIZES, (192, 160, 96, 12, 32, 8), strict=True))]
    twice = grow(grow(model, **steps[0], symmetry="none"), **steps[1], symmetry="none")
    once = grow(model, **steps[1], symmetry="none")
    for (one, a), (other, b) in zip(twice.named_parameters(), once.named_parameters(), strict=True):
        assert one == other
        torch.testing.assert_close(a, b, atol=1e-7 if name.startswith("gemma") else 1e-14, rtol=0)


LLAMA_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_hidden_layers",
)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        ("LlamaForSequenceClassification", LLAMA | {"num_labels": 3}),
        ("LlamaForTokenClassification", LLAMA | {"num_labels": 3}),
        ("BertForSequenceClassification", BERT | {"num_labels": 3}),
        ("BertForTokenClassification", BERT | {"num_labels": 3}),
        ("RobertaForSequenceClassification", BERT | {"num_labels": 3}),
        ("GPT2ForSequenceClassification", GPT2 | {"num_labels": 3, "pad_token_id": 0}),
        ("BertLMHeadModel", BERT | {"is_decoder": True}),
    ],
)
def test_other_heads(cls, settings):
    model = make(cls, settings)
    check = verify_growth(model, grow(model, hidden_size=96, intermediate_size=67), tokens())
    assert check.relative_error <= NEAR


def test_heads_with_several_outputs():
    bert, gpt2 = make("BertForPreTraining", BERT), make("GPT2DoubleHeadsModel", GPT2)
    for model, names in ((bert, ("prediction_logits", "seq_relationship_logits")), (gpt2, ("logits", "mc_logits"))):
        grown = grow(model, hidden_size=96)
        inputs = {"input_ids": tokens()}
        if model is gpt2:
            inputs["mc_token_ids"] = torch.tensor([5, 9])
        assert verify_growth(model, grown, inputs).relative_error <= NEAR
        for name in names:
            before, after = (getattr(m(**inputs), name) for m in (model, grown))
            torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("placement", ["end", [0, 3], [1, 2], "even"])
def test_blocks_may_go_anywhere_and_keep_their_kind(placement):
    for name in ("qwen2", "smollm3", "gpt2-untied"):
        model = build(name)
        grown = grow(model, num_hidden_layers=4, placement=placement)
        close(model, grown)
        if name == "qwen2":
            kinds = {"end": "sfff", "even": "ssff"}.get(placement if isinstance(placement, str) else "", "ssff")
            if placement == [1, 2]:
                kinds = "sssf"
            assert [kind[0] for kind in grown.config.layer_types] == list(kinds)


def test_new_blocks_copy_a_neighbour_and_end_in_zeros():
    model = build("llama")
    grown = grow(model, num_hidden_layers=3, placement=[1])
    old, new, after = model.model.layers[0], grown.model.layers[1], grown.model.layers[2]
    assert torch.equal(new.mlp.up_proj.weight, old.mlp.up_proj.weight)
    assert not new.mlp.down_proj.weight.any() and not new.self_attn.o_proj.weight.any()
    assert torch.equal(after.mlp.down_proj.weight, model.model.layers[1].mlp.down_proj.weight)
    # Behind a norm, zeros would be blown up by the first step; the gain of the norm is zero instead.
    gemma = build("gemma2")
    new = grow(gemma, num_hidden_layers=3, placement=[1]).model.layers[1]
    assert new.mlp.down_proj.weight.any() and (new.post_feedforward_layernorm.weight == -1).all()
    assert (new.post_attention_layernorm.weight == -1).all()


def test_what_is_kept():
    model = build("llama").train()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.generation_config.max_new_tokens = 7
    before = copy.deepcopy(model.state_dict())
    grown = grow(model, hidden_size=96, num_hidden_layers=3)
    assert grown.training and not grown.model.embed_tokens.weight.requires_grad
    assert grown.generation_config.max_new_tokens == 7
    assert grown.lm_head.weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert grown.config.hidden_size == 96 and grown.config.head_dim == 8 and model.config.hidden_size == 48
    tied = grow(build("llama-tied"), hidden_size=96)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_bfloat16_halves_exactly_and_keeps_its_type():
    model = build("llama", torch.bfloat16)
    grown = grow(model, hidden_size=96, symmetry="none")
    assert {parameter.dtype for parameter in grown.parameters()} == {torch.bfloat16}
    wide = grow(build("llama", torch.bfloat16).float(), hidden_size=96, symmetry="none")
    assert all(torch.equal(a.float(), b) for a, b in zip(grown.parameters(), wide.parameters(), strict=True))
    noisy = verify_growth(model, grow(model, hidden_size=96), tokens())
    assert noisy.relative_error < 0.05


def test_noise_cancels_and_has_the_size_that_was_asked_for():
    model = build("llama")
    plain = grow(model, hidden_size=96, intermediate_size=80, symmetry="none")
    for noise in (0.5, 1.0):
        noisy = grow(model, hidden_size=96, intermediate_size=80, noise=noise, seed=3)
        for part in ("gate_proj", "down_proj"):
            a, b = (getattr(m.model.layers[0].mlp, part).weight for m in (plain, noisy))
            delta = (b - a).unflatten(1, (-1, 2))
            assert delta.sum(-1).abs().max() < 1e-6
            assert 0.9 < delta.std() / (noise * a.square().mean().sqrt()) < 1.1
        # The table and the norms take none.
        assert torch.equal(noisy.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    again = grow(model, hidden_size=96, intermediate_size=80, noise=1.0, seed=3)
    other = grow(model, hidden_size=96, intermediate_size=80, noise=1.0, seed=4)
    assert torch.equal(again.lm_head.weight, noisy.lm_head.weight)
    assert not torch.equal(other.lm_head.weight, noisy.lm_head.weight)


def test_three_copies_cancel_too():
    model = build("bert", torch.float64)
    grown = [grow(model, hidden_size=144, symmetry=symmetry) for symmetry in ("none", "antisymmetric")]
    a, b = (one.cls.predictions.transform.dense.weight for one in grown)
    delta = (b - a).unflatten(1, (-1, 3))
    assert delta.sum(-1).abs().max() < 1e-14 and delta.abs().min(-1).values.max() > 0


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama", {"hidden_size": 96, "intermediate_size": 80, "num_attention_heads": 12, "num_key_value_heads": 6}),
        ("bert", {"hidden_size": 96, "intermediate_size": 80}),
        ("gpt2", {"hidden_size": 96, "intermediate_size": 80, "num_attention_heads": 12}),
    ],
)
def test_copies_part_with_noise_and_never_without(name, sizes):
    model = build(name, torch.float64)
    gaps = {}
    for symmetry in ("none", "antisymmetric"):
        grown = grow(model, **sizes, symmetry=symmetry)
        optimizer = torch.optim.AdamW(grown.parameters(), 1e-3)
        for step in range(3):
            ids = tokens(seed=step)
            grown(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        gaps[symmetry] = symmetry_gap(model, grown)
    assert gaps["none"].keys() == gaps["antisymmetric"].keys() and len(gaps["none"]) > 10
    assert set(gaps["none"].values()) == {0.0}
    # Attention does not see the bias of the keys, so nothing moves it.
    assert min(gap for key, gap in gaps["antisymmetric"].items() if "key.bias" not in key) > 1e-6


def test_new_channels_all_learn():
    model = build("llama", torch.float64)
    for sizes in ({"hidden_size": 60}, {"head_dim": 16}, {"num_hidden_layers": 3}):
        grown = grow(model, **sizes)
        start = copy.deepcopy(grown.state_dict())
        optimizer = torch.optim.SGD(grown.parameters(), 1e-2)
        for step in range(3):
            ids = tokens(seed=step)
            grown(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, value in grown.state_dict().items():
            if value.ndim > 1 and "embed" not in name:
                assert (value != start[name]).double().mean() > 0.99, name


def test_head_dim_with_norms_over_the_head_learns():
    model = build("qwen3", torch.float64)
    grown = grow(model, head_dim=16)
    ids = tokens()
    grown(ids, labels=ids).loss.backward()
    gradient = grown.model.layers[0].self_attn.k_norm.weight.grad
    assert (grown.model.layers[0].self_attn.k_norm.weight == 0).sum() == 8
    assert gradient.abs().min() > 0


def test_head_maps():
    assert copies(2, 5).tolist() == [0, 0, 0, 1, 1]
    queries, keys, share = head_sources(6, 3, 12, 6)
    assert keys.tolist() == [0, 0, 1, 1, 2, 2]
    assert queries.tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5] and (share == 0.5).all()
    queries, keys, share = head_sources(6, 3, 9, 3)
    assert queries.tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5] and share.tolist() == [0.5, 0.5, 1.0] * 3
    assert (keys[torch.arange(9) // 3] == queries // 2).all()


@pytest.mark.parametrize("rotated", [8, 4, 0])
def test_scores_stay_at_every_distance(rotated):
    old, k = 8, 3
    dim = grow_head_dim(old, old * k, rotated, score=(old * k) ** 0.5 / old**0.5)
    g = torch.Generator().manual_seed(0)
    q, key = (
        torch.randn(5, old, dtype=torch.float64, generator=g),
        torch.randn(5, old, dtype=torch.float64, generator=g),
    )

    def turned(x, position, rotary, size):
        angles = position * 50.0 ** (-2 * torch.arange(rotary // 2, dtype=torch.float64) / size)
        a, b = x[..., : rotary // 2], x[..., rotary // 2 : rotary]
        out = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), x[..., rotary:])
        return torch.cat(out, -1)

    noise = torch.randn(5, old * k, dtype=torch.float64, generator=g) * (dim.tied < 0)
    for position in (0, 1, 7, 100):
        before = (turned(q, position, rotated, rotated) * key).sum(-1) / old**0.5
        grown = q[:, dim.index] * dim.query + noise
        after = turned(grown, position, rotated * k, rotated * k) * (key[:, dim.index] * dim.key)
        torch.testing.assert_close(after.sum(-1) / (old * k) ** 0.5, before)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        (
            "llama",
            {"hidden_size": 32},
            "hidden_size must be at least 48, the model's own, got 32: growth never shrinks",
        ),
        ("llama", {"num_hidden_layers": 1}, "num_hidden_layers must be at least 2"),
        ("llama", {}, "nothing grows: pass at least one size above .* hidden_size=48"),
        ("llama", {"hidden_size": 48}, "nothing grows"),
        ("llama", {"head_dim": 12}, "head_dim must be a multiple of 8 where heads are rotated, got 12"),
        ("llama", {"num_attention_heads": 9}, r"the host refuses a llama of these sizes: The hidden size \(48\)"),
        ("llama", {"num_attention_heads": 8}, "multiple of num_key_value_heads, got 8 and 3"),
        ("llama", {"num_key_value_heads": 6}, "must keep its 2 query heads.* pass num_attention_heads=12 or more"),
        ("bert", {"num_attention_heads": 12}, "num_attention_heads=12 would need hidden_size=96"),
        ("bert", {"head_dim": 16}, "head_dim=16 would need hidden_size=96"),
        ("gpt2", {"hidden_size": 50}, "hidden_size must be a multiple of num_attention_heads=6, got 50"),
        ("bert", {"hidden_size": 96, "num_key_value_heads": 12}, "num_key_value_heads must be num_attention_heads"),
        ("bert", {"hidden_size": 60}, "not exact: hidden_size 48 -> 60 by uneven copies.*allow_lossy=True"),
        ("gpt2", {"hidden_size": 60}, "not exact: hidden_size 48 -> 60 by uneven copies"),
        ("gpt2", {"hidden_size": 96, "widening": "pad"}, "by padding: a LayerNorm needs a centred table"),
        ("llama", {"hidden_size": 60, "widening": "repeat"}, "not exact: hidden_size 48 -> 60 by uneven copies"),
        ("bert", {"num_hidden_layers": 3}, "num_hidden_layers: a new block of a post-norm model normalises its input"),
        (
            "llama",
            {"hidden_size": 96, "symmetry": "independent"},
            "symmetry='independent': its noise changes the outputs",
        ),
        (
            "llama",
            {"hidden_size": 96, "symmetry": "random"},
            "symmetry must be one of antisymmetric, none, independent",
        ),
        ("llama", {"hidden_size": 96, "noise": -1.0}, "noise must be a finite number of at least 0, got -1.0"),
        ("llama", {"hidden_size": 96, "widening": "tile"}, "widening must be 'auto', 'repeat' or 'pad', got 'tile'"),
        ("llama", {"num_hidden_layers": 3, "placement": "start"}, "placement must be 'even', 'end' or the places"),
        ("llama", {"num_hidden_layers": 4, "placement": [1]}, "placement must be 2 different places in 0..3"),
        ("llama", {"num_hidden_layers": 4, "placement": [1, 4]}, "placement must be 2 different places in 0..3"),
    ],
)
def test_refused_before_any_work(name, sizes, message, monkeypatch):
    monkeypatch.setattr("danlu.tuning.growth.grow._fill", None)
    with pytest.raises(ValueError, match=message):
        grow(build(name), **sizes)


def test_sizes_are_integers():
    with pytest.raises(TypeError, match=r"hidden_size must be an integer, got 96.0"):
        grow(build("llama"), hidden_size=96.0)


def test_other_families_and_parts_are_refused_by_name():
    with pytest.raises(UnsupportedArchitecture, match=r"model must be one of bert, .*, got olmo2"):
        grow(make("Olmo2ForCausalLM", LLAMA), hidden_size=96)
    with pytest.raises(UnsupportedArchitecture, match="got Linear"):
        grow(torch.nn.Linear(2, 2), hidden_size=96)
    model = build("llama")
    model.model.layers[1].self_attn.temperature = torch.nn.Parameter(torch.ones(6))
    with pytest.raises(UnsupportedArchitecture, match=r"does not know: model\.layers\.1\.self_attn\.temperature"):
        grow(model, hidden_size=96)
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(UnsupportedArchitecture):
        grow(adapted, hidden_size=96)


@pytest.mark.parametrize(
    ("rope", "fine"),
    [
        ({"rope_type": "linear", "factor": 4.0}, True),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            True,
        ),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, False),
        ({"rope_type": "dynamic", "factor": 4.0}, False),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 32,
            },
            False,
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else None,
)
def test_scaled_rotation_grows_where_its_frequencies_allow(rope, fine):
    model = build("llama", rope_parameters=PLAIN_ROPE | rope)
    close(model, grow(model, hidden_size=96, num_attention_heads=12))
    if fine:
        close(model, grow(model, head_dim=16))
    else:
        with pytest.raises(ValueError, match=f"head_dim cannot grow.*{rope['rope_type']}"):
            grow(model, head_dim=16)


def test_lossy_growth_is_named_and_logged(caplog):
    model = build("bert")
    with caplog.at_level(logging.WARNING, "danlu"):
        grown = grow(model, hidden_size=60, num_hidden_layers=3, allow_lossy=True)
    assert "uneven copies" in caplog.text and "post-norm" in caplog.text
    assert grown.config.hidden_size == 60
    assert verify_growth(model, grown, tokens()).relative_error > 1e-3
    noisy = grow(build("llama"), hidden_size=96, symmetry="independent", noise=0.01, allow_lossy=True)
    assert 1e-3 < verify_growth(build("llama"), noisy, tokens()).relative_error < 0.5


def test_verify_reads_inputs_by_name_and_needs_logits():
    model = build("llama").train()
    grown = grow(model, intermediate_size=50)
    mask = torch.ones_like(tokens())
    mask[0, :4] = 0
    check = verify_growth(model, grown, {"input_ids": tokens(), "attention_mask": mask})
    assert check.relative_error <= NEAR and model.training and grown.training
    with pytest.raises(ValueError, match="LlamaModel has none"):
        verify_growth(model.model, grown.model, tokens())
    with pytest.raises(ValueError, match="one shape"):
        verify_growth(model, build("llama", vocab_size=62), tokens())
    other = verify_growth(model, build("llama", rms_norm_eps=1.0), tokens())
    assert other.relative_error > 1e-3


def test_the_bundled_model_grows():
    from danlu.assets import nano_path

    model = transformers.AutoModelForCausalLM.from_pretrained(nano_path(), dtype=torch.float32).eval()
    grown = grow(model, hidden_size=512, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=6)
    ids = torch.randint(0, 2048, (2, 64), generator=torch.Generator().manual_seed(0))
    check = verify_growth(model, grown, ids)
    assert check.relative_error <= NEAR and check.max_error < 1e-4 and check.agreement == 1
