import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from danlu.lab import find, nano
from danlu.lab.claim import VERDICTS, Context


@pytest.fixture
def context(tmp_path, monkeypatch):
    """A random byte-level model trained at "16 tokens", one window of a short text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("danlu.context.text.held_out_text", lambda: "def one(two): return two + 1\n" * 40)
    monkeypatch.setattr(nano, "WINDOWS", 2)
    monkeypatch.setattr(nano, "_LOADED", {})
    bars = []

    def track(items, description="", total=None):
        bars.append([total, 0])
        for item in items:
            bars[-1][1] += 1
            yield item

    return Context(seeds=(0,), cache=tmp_path / "cache", model=tmp_path / "model", track=track), bars


@pytest.mark.parametrize("name", ["rope-explodes", "ntk-order", "log-n"])
def test_claims_on_text_give_evidence(context, name):
    context, bars = context
    evidence = find(name).experiment(context)
    assert evidence.verdict in VERDICTS
    assert evidence.tables[0].columns[1] == "16 tokens"
    assert len(evidence.tables[0].rows) == len(evidence.plots[0].lines)
    assert bars and all(total == steps for total, steps in bars)


def test_the_model_is_read_once(context, monkeypatch):
    context, _ = context
    nano.read(context, {"plain": "plain"}, (1, 2))
    monkeypatch.setattr("danlu.context.text.held_out_text", None)
    report = nano.read(context, {"plain": "plain", "rerope": "rerope"}, (1,))
    # Within its window ReRoPE is plain RoPE, and the window is half of the trained length.
    assert report.at("plain", 16).losses != report.at("rerope", 16).losses
