"""Cache sizes: the published numbers, the host library's own caches, and what conversions save."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM, DynamicCache

from context.families import SUPPORTED, tokens
from danlu.tuning.kv_cache.layers import cache_layers
from danlu.tuning.kv_cache.report import LayerCache, kv_cache_report
from reference.latent_hosts import needs_latents


def llama(layers=32, heads=32, groups=32, dim=128, **options):
    return transformers.LlamaConfig(
        hidden_size=heads * dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        dtype="bfloat16",
        **options,
    )


def deepseek(kind, layers, heads=128):
    return getattr(transformers, f"Deepseek{kind}Config")(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        dtype="bfloat16",
    )


PUBLISHED = {
    "Llama-2-7B": (llama(), 8192, 524288),
    "Llama-3-8B": (llama(groups=8), 2048, 131072),
    "Llama-2-70B": (llama(80, 64, 8), 2048, 327680),
    "DeepSeek-V2": (deepseek("V2", 60), 576, 69120),
    "DeepSeek-V3": (deepseek("V3", 61), 576, 70272),
    "DeepSeek-V2-Lite": (deepseek("V2", 27, 16), 576, 31104),
    "DeepSeek-V2 as multi-head attention": (llama(60, 128, 128), 32768, 3932160),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config, numbers, per_token = PUBLISHED[name]
    report = kv_cache_report(config, [1, 4096], batch=3)
    now = report.rows[0]
    assert (now.name, now.numbers, now.bytes_per_token) == ("now", numbers, per_token)
    assert now.totals == (3 * per_token, 3 * 4096 * per_token)
    assert report.dtype == "bfloat16"


def held_by(model, length):
    """Numbers in the cache after one call of the model."""
    cache = DynamicCache(config=model.config)
    model(tokens(1, length), past_key_values=cache, use_cache=True)
    found = 0
    for layer in cache.layers:
        for name, value in vars(layer).items():
            parts = value.values() if isinstance(value, dict) else [value]
            found += sum(x.numel() for x in parts if isinstance(x, torch.Tensor) and "window" not in name)
    return found


@pytest.mark.parametrize("family", SUPPORTED, ids=str)
def test_counts_are_those_of_the_host_librarys_caches(family):
    # GPT-NeoX has as many key heads as query heads, whatever the tests' common settings say.
    options = {"num_key_value_heads": 4} if family.name == "gpt-neox" else {}
    model = family.build(torch.float32, **options)
    needs_latents(model)
    layers = cache_layers(model.config)
    for length in (5, 40):
        assert sum(layer.numbers(length) for layer in layers) == held_by(model, length)


SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 16,
    "first_k_dense_replace": 2,
}  # fmt: skip
DELTA = {
    "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "mlp_only_layers": [0, 1], "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
OTHERS = [
    ("DeepseekV2Config", SIZES | LATENT | {"head_dim": 8}, "latent"),
    ("DeepseekV32Config", SIZES | LATENT, "latent"),
    ("MiniCPM3Config", SIZES | LATENT, "latent"),
    ("Qwen3NextConfig", SIZES | DELTA, "state"),
    ("GPT2Config", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}, "attention"),
    ("GPTBigCodeConfig", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}, "attention"),
    ("BloomConfig", {"vocab_size": 97, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "attention"),
]


@pytest.mark.parametrize(("config", "options", "kind"), OTHERS)
def test_latents_states_and_single_key_heads_are_counted(config, options, kind):
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**options)).eval()
    layers = cache_layers(model.config)
    assert layers[0].kind == kind
    needs_latents(model)
    for length in (5, 40):
        assert sum(layer.numbers(length) for layer in layers) == held_by(model, length)


def test_what_conversions_save():
    report = kv_cache_report(llama(groups=8), [4096, 65536], kv_ranks=[512, 448], rope_dim=64, groups=[2, 1])
    assert [row.name for row in report.rows] == [
        "now",
        "2 key heads (GQA)",
        "one key head (MQA)",
        "latent, exact",
        "latent 512 + 64",
        "latent 448 + 64",
        "windows of 1,024, one full layer",
        "now, 8 bits per number",
    ]
    assert [row.numbers for row in report.rows] == [2048, 512, 256, 2048, 576, 512, 2048, 2048]
    now = report.row("now").totals
    assert report.row("latent, exact").totals == now
    assert report.row("now, 8 bits per number").totals == tuple(total // 2 for total in now)
    windows = report.row("windows of 1,024, one full layer")
    assert windows.totals[1] == 2 * 2048 * (65536 + 31 * 1023)
    with pytest.raises(ValueError, match="no row 'nothing': have now"):
        report.row("nothing")


def test_reported_sizes_of_a_conversion_are_those_of_the_converted_model():
    from danlu.tuning.latent.conversion import to_mla

    config = transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 2})
    model = AutoModelForCausalLM.from_config(config)
    report = kv_cache_report(model, [100], kv_ranks=[24], rope_dim=8)
    converted = to_mla(model, 24, 8, method="weight-svd").model
    assert kv_cache_report(converted, [100]).rows[0].totals == report.row("latent 24 + 8").totals
    exact = to_mla(model, method="exact").model
    assert kv_cache_report(exact, [100]).rows[0].totals == report.row("latent, exact").totals
    assert report.dtype == "float32" and report.rows[0].totals == (100 * 2 * 64 * 4,)


def test_windows_and_states_do_not_grow():
    config = transformers.MistralConfig(sliding_window=1024, num_hidden_layers=4, dtype="bfloat16")
    report = kv_cache_report(config, [512, 4096, 8192])
    assert report.rows[0].totals == tuple(2 * 4 * 2048 * n for n in (512, 1023, 1023))
    assert any("less one" in note for note in report.notes)
    mixed = transformers.Qwen3NextConfig(num_hidden_layers=4)
    layers = cache_layers(mixed)
    assert [layer.kind for layer in layers] == ["state"] * 3 + ["attention"]
    assert layers[0].numbers(10) == layers[0].numbers(10**6) == 32 * 128 * 128 + 4 * (2 * 16 * 128 + 32 * 128)
    if "kv_sharing_modes" in inspect.getsource(transformers.cache_utils):  # newer releases
        shared = transformers.LlamaConfig(num_hidden_layers=2)
        shared.kv_sharing_modes = ["store", "reuse"]
        idle = cache_layers(shared)
        assert [layer.kind for layer in idle] == ["attention", "none"] and idle[1].numbers(10) == 0
    report = kv_cache_report(transformers.FalconH1Config(num_hidden_layers=2), [10])
    assert any("not known" in note for note in report.notes)


def test_usual_latents_are_smaller_than_what_they_replace():
    names = {row.name for row in kv_cache_report(llama(groups=8), [10]).rows}
    assert {"latent 960 + 64", "latent 512 + 64", "latent 448 + 64"} <= names
    small = [row.numbers for row in kv_cache_report(llama(2, 4, 2, 16), [10]).rows if row.name.startswith("latent ")]
    assert small == [32]
    latent = kv_cache_report(deepseek("V3", 61), [10])
    assert [row.name for row in latent.rows] == ["now", "now, 8 bits per number"]


def test_a_configuration_of_its_own_kind_can_say_what_it_caches():
    class Own(transformers.LlamaConfig):
        def cache_elements(self):
            return [LayerCache("state", 0, None, 500), LayerCache("latent", 40)]

    report = kv_cache_report(Own(num_hidden_layers=2), [10, 20], dtype="float16")
    assert report.rows[0].totals == (2 * 900, 2 * 1300) and report.layers == 2


def test_mixers_of_danlus_own_decoder_are_told_apart():
    from danlu.models.decoder.config import DanluConfig

    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "kv_rank": 24, "rope_head_dim": 8}
    layers = cache_layers(DanluConfig(mixer=["full", "window", "latent", "linear"], sliding_window=8, **sizes))
    assert [(layer.kind, layer.width, layer.tokens) for layer in layers] == [
        ("attention", 128, None),
        ("attention", 128, 7),
        ("latent", 32, None),
        ("state", 0, None),
    ]


def test_report_prints_and_writes(capsys):
    report = kv_cache_report(llama(groups=8), [4096, 131072])
    Console(width=160).print(report)
    shown = capsys.readouterr().out
    assert "512.0 MiB" in shown and "16.0 GiB" in shown and "28.1%" in shown
    data = json.loads(report.to_json())
    assert data["rows"][0]["totals"] == [131072 * 4096, 131072 * 131072]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"lengths": []}, ValueError, "lengths"),
        ({"lengths": [0]}, ValueError, "lengths"),
        ({"batch": 0}, ValueError, "batch"),
        ({"window": 1}, ValueError, "window"),
        ({"kv_ranks": [0]}, ValueError, "kv_ranks"),
        ({"groups": [1.5]}, ValueError, "groups"),
        ({"rope_dim": 3}, ValueError, "rope_dim"),
        ({"dtype": "float64"}, ValueError, "dtype must be one of float32"),
        ({"model_or_config": "llama"}, TypeError, "got str"),
        ({"model_or_config": transformers.T5Config()}, ValueError, "decoder-only"),
    ],
)
def test_bad_input(options, kind, message):
    with pytest.raises(kind, match=message):
        kv_cache_report(**{"model_or_config": llama(), "lengths": [10], **options})


def test_dtypes_are_names_or_torch_types():
    sizes = [kv_cache_report(llama(), [1], dtype=d).rows[0].totals[0] for d in ("float32", torch.float16, "int8")]
    assert sizes == [2**20, 2**19, 2**18]
