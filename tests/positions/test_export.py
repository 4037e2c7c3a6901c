"""Exported configurations: same logits as the rescaled rotary module, kept by save and load, no danlu at run time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from danlu.positions import export_config, host_frequencies, rescaled, rope_inv_freq, rope_tables, to_longrope

TINY = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "llama/llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "llama/yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "mistral": {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": None},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    "stablelm": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "cohere": {"num_key_value_heads": 2},
}


def tiny(family: str) -> tuple[object, torch.nn.Module]:
    config = AutoConfig.for_model(family.split("/")[0], **TINY, **FAMILIES[family])
    torch.manual_seed(1)
    return config, AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def exported(config, model: torch.nn.Module, method: str, **options) -> torch.nn.Module:
    other = AutoModelForCausalLM.from_config(export_config(config, method, **options), attn_implementation="eager")
    other.load_state_dict(model.state_dict())
    return other.eval()


def turn(model: torch.nn.Module, config, method: str, factor: float) -> None:
    """Put rescaled frequencies straight into the host's rotary module."""
    inv_freq, host_scaling = host_frequencies(config)
    new, scaling = rescaled(inv_freq, method, factor=factor, trained_length=64)
    (rotary,) = [module for module in model.modules() if hasattr(module, "inv_freq")]
    assert torch.allclose(rotary.inv_freq.double(), inv_freq, rtol=1e-6)
    rotary.inv_freq.copy_(new)
    rotary.attention_scaling = host_scaling * scaling


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["ntk-mixed", "yarn"])
@torch.no_grad()
def test_same_logits_as_the_rescaled_module(family: str, method: str) -> None:
    config, model = tiny(family)
    before = json.dumps(config.to_dict(), default=str)
    other = exported(config, model, method, factor=4.0)
    assert json.dumps(config.to_dict(), default=str) == before, "the original config was changed"
    assert other.config.max_position_embeddings == 256
    ids = torch.randint(1, 97, (2, 150))
    plain = model(ids).logits
    turn(model, config, method, 4.0)
    expected = model(ids).logits
    assert float((plain - expected).abs().max()) > 1e-4, "the test does not see the rescaling"
    torch.testing.assert_close(other(ids).logits, expected, rtol=0, atol=1e-6)
    # across the length where the host's longrope would switch tables, and token by token
    prompt = other(ids[:, :63], use_cache=True)
    step = other(ids[:, 63:70], past_key_values=prompt.past_key_values).logits
    torch.testing.assert_close(step, expected[:, 63:70], rtol=0, atol=1e-6)


@torch.no_grad()
def test_saved_model_runs_where_danlu_is_not_installed(tmp_path) -> None:
    config, model = tiny("llama")
    other = exported(config, model, "yarn", factor=4.0)
    other.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    assert saved["rope_type"] == "longrope" and saved["short_factor"] == saved["long_factor"]
    ids = torch.randint(1, 97, (1, 100))
    torch.save({"ids": ids, "logits": other(ids).logits}, tmp_path / "expected.pt")
    script = (
        "import sys; sys.modules['danlu'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "saved = torch.load(sys.argv[1] + '/expected.pt')\n"
        "with torch.no_grad(): error = (model(saved['ids']).logits - saved['logits']).abs().max().item()\n"
        "assert error < 1e-6, error\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


@torch.no_grad()
def test_tables_by_layer_type() -> None:
    config = AutoConfig.for_model(
        "gemma3_text",
        **TINY,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    new = export_config(config, "ntk", factor=8.0)
    assert new.rope_parameters["sliding_attention"] == config.rope_parameters["sliding_attention"]
    assert new.rope_parameters["full_attention"]["rope_type"] == "longrope"
    model = AutoModelForCausalLM.from_config(new).eval()
    base = rope_tables(config)["full_attention"]["rope_theta"]
    expected, _ = rope_inv_freq("ntk", 16, base, factor=8.0)
    rotary = next(module for module in model.modules() if hasattr(module, "full_attention_inv_freq"))
    assert torch.allclose(rotary.full_attention_inv_freq.double(), expected, rtol=1e-6)
    assert bool(torch.isfinite(model(torch.randint(1, 97, (1, 100))).logits).all())
    with pytest.raises(ValueError, match="layer_types"):
        export_config(config, "ntk", factor=8.0, layer_types=("chunked_attention",))


def test_lengths() -> None:
    config, _ = tiny("llama")
    by_length = export_config(config, "ntk-mixed", target_length=200)
    assert by_length.rope_parameters["factor"] == 200 / 64
    assert by_length.rope_parameters["original_max_position_embeddings"] == by_length.max_position_embeddings == 200
    assert export_config(config, "pi", factor=2.0, trained_length=16).max_position_embeddings == 64
    assert "short_mscale" not in by_length.rope_parameters
    yarn = export_config(config, "yarn", factor=4.0).rope_parameters
    assert yarn["short_mscale"] == yarn["long_mscale"] == yarn["attention_factor"] > 1


def test_refuses_what_longrope_cannot_hold() -> None:
    config, _ = tiny("llama")
    with pytest.raises(ValueError, match="rotary"):
        export_config(GPT2Config(), "pi", factor=2.0)
    with pytest.raises(ValueError, match="shape"):
        to_longrope(torch.ones(3), config)
    with pytest.raises(ValueError, match="> 0"):
        to_longrope(torch.zeros(8), config)
    with pytest.raises(ValueError, match="layer_type"):
        host_frequencies(config, "full_attention")
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="dynamic"):
        export_config(config, "ntk", factor=2.0)
    config.rope_parameters = {"rope_type": "ntk_mixd", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="rope_type"):
        export_config(config, "ntk", factor=2.0)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "mscale_all_dim": 1.0}
    with pytest.raises(ValueError, match="mscale_all_dim"):
        export_config(config, "ntk", factor=2.0)
