"""The attention probe on real host models: same outputs, numbers as from stored probabilities, nothing left behind."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import danlu
from context.families import BY_NAME, left_padded, tokens, widen
from danlu.attention.scale import effective_tokens, softmax_grad_l1
from danlu.attention.sparsity import effective_rank
from danlu.context.probe.capture import AttentionProbe
from danlu.context.probe.figures import render, write_probe
from danlu.context.probe.report import AttentionReport, grid

FAMILIES = ["llama", "qwen2-mixed", "qwen3", "gemma2", "gemma3", "phi3", "gpt-neox", "gpt-oss", "deepseek-v3"]
LENGTH = 24


def bert(**options) -> transformers.BertModel:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=64, **options)
    return widen(transformers.BertModel(config)).double().eval()


def expected(probabilities: Tensor, real: Tensor, sinks: int = 4, local: int = 32) -> list[dict[str, float]]:
    """Means over real rows (batch, L), per head, of stored probabilities (batch, heads, L, Lk)."""
    p = probabilities.double()
    length, n_keys = p.shape[-2:]
    position = torch.arange(n_keys - length, n_keys)
    gap = (position[:, None] - torch.arange(n_keys)).abs()
    first = real.int().argmax(-1)
    slot = torch.arange(n_keys)
    sunk = (slot >= first[:, None]) & (slot < first[:, None] + sinks)
    values = {
        "effective_tokens": effective_tokens(p),
        "entropy": torch.special.entr(p).sum(-1),
        "max_probability": p.amax(-1),
        "sink_mass": (p * sunk[:, None, None]).sum(-1),
        "local_mass": (p * (gap < local)).sum(-1),
        "distance": (p * gap).sum(-1),
    }
    rows = real[:, None].expand(p.shape[:3])
    return [{n: v[:, h][rows[:, h]].mean().item() for n, v in values.items()} for h in range(p.shape[1])]


def check(report: AttentionReport, layer: int, wanted: list[dict[str, float]], tolerance: float = 1e-6) -> None:
    for head, numbers in enumerate(wanted):
        for name, value in numbers.items():
            assert getattr(report.at(layer, head), name) == pytest.approx(value, rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("name", FAMILIES)
def test_same_outputs_and_the_numbers_of_stored_probabilities(name):
    model, ids = BY_NAME[name].build(torch.float32), tokens(2, LENGTH)
    with torch.no_grad():
        before = model(ids, output_attentions=True)
        with AttentionProbe(model, local=6) as probe:
            inside = model(ids)
    assert torch.equal(before.logits, inside.logits)
    assert "eager" not in ALL_ATTENTION_FUNCTIONS
    report = probe.report()
    assert report.indices() == list(range(model.config.num_hidden_layers)) and report.tokens == 2 * LENGTH
    for layer, p in enumerate(before.attentions):
        if name == "gpt-oss":  # its rows leave out the learnt sink: put it back
            p = torch.cat((p, 1 - p.sum(-1, keepdim=True)), -1)
            wanted = [{"effective_tokens": x.mean().item()} for x in effective_tokens(p).transpose(0, 1)]
            check(report, layer, wanted, 1e-4)
        else:
            check(report, layer, expected(p, torch.ones(2, LENGTH, dtype=torch.bool), local=6), 1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2-mixed", "qwen3", "cohere2-wide-window"])
def test_sdpa_gives_what_eager_gives(name):
    ids, reports, logits = tokens(2, LENGTH), [], []
    for backend in ("eager", "sdpa"):
        model = BY_NAME[name].build(torch.float64)
        model.set_attn_implementation(backend)
        with AttentionProbe(model, local=6) as probe, torch.no_grad():
            logits.append(model(ids).logits)
        assert model.config._attn_implementation == backend
        reports.append(probe.report())
    for one, two in zip(reports[0].heads, reports[1].heads, strict=True):
        for field in (
            "rows",
            "keys",
            "effective_tokens",
            "entropy",
            "distance",
            "effective_rank",
            "alpha",
            "best_alpha",
        ):
            assert getattr(one, field) == pytest.approx(getattr(two, field), rel=1e-5, nan_ok=True), field
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__name__ == "sdpa_attention_forward"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_in_no_number(side):
    model = BY_NAME["llama"].build(torch.float64)
    rows = [tokens(1, n, seed=n)[0] for n in (9, LENGTH)]
    ids, mask = left_padded(rows)
    if side == "right":
        ids, mask = ids.clone(), mask.clone()
        ids[0], mask[0] = ids[0].roll(9 - LENGTH), mask[0].roll(9 - LENGTH)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        with AttentionProbe(model, samples=0) as padded:
            model(ids, attention_mask=mask, position_ids=positions)
        with AttentionProbe(model, samples=0) as alone:
            for row in rows:
                model(row[None])
    one, two = padded.report(), alone.report()
    assert one.tokens == two.tokens == 9 + LENGTH and one.positions == two.positions
    for a, b in zip(one.heads, two.heads, strict=True):
        assert a.rows == 9 + LENGTH
        for field in ("keys", "effective_tokens", "effective_share", "entropy", "distance", "sink_mass", "local_mass"):
            assert getattr(a, field) == pytest.approx(getattr(b, field), rel=1e-6), field
    for layer in one.layers:
        assert one.by_position[layer] == pytest.approx(two.by_position[layer], rel=1e-6)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_bidirectional_encoder_with_padding(backend):
    model = bert()
    model.set_attn_implementation("eager")
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, 12:] = 0
    with torch.no_grad():
        stored = model(ids, attention_mask=mask, output_attentions=True).attentions
        model.set_attn_implementation(backend)
        with AttentionProbe(model, local=3, sinks=1) as probe:
            model(ids, attention_mask=mask)
    report = probe.report()
    for layer, p in enumerate(stored):
        check(report, layer, expected(p, mask.bool(), 1, 3))
    assert report.at(0, 0).keys == pytest.approx((12 * 12 + 20 * 20) / 32) and report.at(0, 0).rows == 32


def test_custom_four_dimensional_mask():
    model, ids = BY_NAME["llama"].build(torch.float64), tokens(1, LENGTH)
    model.set_attn_implementation("sdpa")
    document = torch.arange(LENGTH) // 10
    mask = (document[:, None] == document) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    with AttentionProbe(model) as probe, torch.no_grad():
        model(ids, attention_mask=mask[None, None])
    assert probe.report().at(0, 0).keys == pytest.approx(mask.sum(-1).double().mean().item())


@pytest.mark.parametrize("name", ["llama", "qwen2-mixed", "cohere2-wide-window"])
def test_decoding_with_a_cache_measures_the_same_rows(name):
    model, ids = BY_NAME[name].build(torch.float64), tokens(1, 40)
    with torch.no_grad():
        with AttentionProbe(model, samples=0, sinks=2) as whole:
            model(ids)
        cache = transformers.DynamicCache(config=model.config)
        with AttentionProbe(model, samples=0, sinks=2) as steps:
            model(ids[:, :30], past_key_values=cache)
            for i in range(30, 40):
                model(ids[:, i : i + 1], past_key_values=cache)
    for a, b in zip(whole.report().heads, steps.report().heads, strict=True):
        for field in ("rows", "keys", "effective_tokens", "distance", "sink_mass", "local_mass"):
            assert getattr(a, field) == pytest.approx(getattr(b, field), rel=1e-6), field
    assert whole.report().by_position == {k: pytest.approx(v) for k, v in steps.report().by_position.items()}


def test_rank_scale_and_position_of_one_head():
    model, ids = BY_NAME["llama"].build(torch.float64), tokens(1, 32)
    with torch.no_grad():
        p = model(ids, output_attentions=True).attentions[1][0].double()
        with AttentionProbe(model, layers=[1]) as probe:
            model(ids)
    report = probe.report()
    row = report.at(1, 2)
    assert row.rank_rows == 32 and row.effective_rank == pytest.approx(effective_rank(p[2]).item(), rel=1e-5)
    late = p[2][16:].log()
    hidden = late.isinf()
    spread = torch.stack([x[~m].std(correction=0) for x, m in zip(late, hidden, strict=True)]).mean().item()
    assert row.alpha == pytest.approx(spread, rel=1e-5)
    assert row.objective == pytest.approx(softmax_grad_l1(late / spread, spread).median().item(), rel=1e-5)
    grid_of_scales = torch.logspace(-1, 2, 400).tolist()
    values = [softmax_grad_l1(late / spread, a).median().item() for a in grid_of_scales]
    assert row.best_objective == pytest.approx(max(values), rel=1e-3) and row.best_objective >= row.objective
    share = effective_tokens(p)
    wanted = [share[:, low:high].mean().item() for low, high in ((0, 1), (1, 3), (3, 7), (7, 15), (15, 31), (31, 32))]
    assert report.positions == (0, 1, 3, 7, 15, 31) and report.by_position["1"] == pytest.approx(wanted, rel=1e-5)


def test_a_layer_that_attends_with_halves_of_its_heads_is_one_layer():
    from danlu.models.decoder.heads import DanluConfig, DanluModel

    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "mask": "mixed_heads",
    }
    config = DanluConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64)
    model = widen(DanluModel(config)).double().eval()
    with torch.no_grad():
        with AttentionProbe(model) as probe:
            model(tokens(2, 10))
            model(tokens(1, 10))
    report = probe.report()
    assert [(row.layer, row.head, row.rows) for row in report.heads] == [(i, h, 30) for i in (0, 1) for h in range(4)]
    assert all(row.keys == pytest.approx(5.5) for row in report.heads)


def test_averages_run_over_calls_and_layers_can_be_chosen():
    model = BY_NAME["llama"].build(torch.float64)
    a, b = tokens(1, 12, seed=1), tokens(3, 20, seed=2)
    with torch.no_grad():
        with AttentionProbe(model, layers=[1]) as both:
            model(a)
            model(b)
        singles = []
        for ids in (a, b):
            with AttentionProbe(model) as probe:
                model(ids)
            singles.append(probe.report().at(1, 0))
    row = both.report().at(1, 0)
    assert both.report().indices() == [1] and both.report().texts == 4
    mean = (12 * singles[0].entropy + 60 * singles[1].entropy) / 72
    assert row.rows == 72 and row.entropy == pytest.approx(mean)


def test_other_models_and_later_calls_are_not_measured():
    model, other = BY_NAME["llama"].build(), BY_NAME["llama"].build()
    ids = tokens(1, 8)
    with torch.no_grad():
        with AttentionProbe(model) as probe:
            other(ids)
        model(ids)
    assert probe.report().heads == () and probe.report().tokens == 0
    assert probe.report().verdict() == ["No row of attention was measured."]


def test_probes_can_overlap_and_close_in_any_order():
    model, ids = BY_NAME["llama"].build(), tokens(1, 8)
    first, second = AttentionProbe(model), AttentionProbe(model)
    with torch.no_grad():
        first.__enter__()
        second.__enter__()
        model(ids)
        first.__exit__()
        model(ids)
        second.__exit__()
        model(ids)
    assert (first.report().tokens, second.report().tokens) == (8, 16)
    assert "eager" not in ALL_ATTENTION_FUNCTIONS and not model.model._forward_pre_hooks


def test_everything_is_restored_after_an_error():
    model = BY_NAME["llama"].build()
    with pytest.raises(IndexError), AttentionProbe(model), torch.no_grad():
        model(torch.tensor([[5000]]))
    assert "eager" not in ALL_ATTENTION_FUNCTIONS and not model.model._forward_pre_hooks


def test_frequency_methods_can_be_probed_and_patterns_are_refused():
    model, ids = BY_NAME["llama"].build(torch.float64), tokens(1, 40)
    with danlu.extended(model, "ntk:factor=4"), AttentionProbe(model) as probe, torch.no_grad():
        p = model(ids, output_attentions=True).attentions[0]
    check(probe.report(), 0, expected(p, torch.ones(1, 40, dtype=torch.bool)))
    with danlu.extended(model, "rerope:window=7"):
        with pytest.raises(ValueError, match="inside its own attention function"):
            AttentionProbe(model).__enter__()


def test_model_in_half_precision_and_gradients_flow():
    model, ids = BY_NAME["llama"].build(torch.bfloat16), tokens(1, 16)
    with AttentionProbe(model) as probe:
        model(ids).logits.float().square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(math.isfinite(row.entropy) for row in probe.report().heads)


def test_report_round_trip_figures_and_page(tmp_path):
    model = BY_NAME["llama"].build()
    with AttentionProbe(model) as probe, torch.no_grad():
        model(tokens(1, 20))
    report = probe.report(model="<b>bold</b>", text="a & b", notes=["note"])
    path = report.save(tmp_path / "probe.json")
    assert AttentionReport.load(path) == report
    with pytest.raises(ValueError, match="format 1"):
        AttentionReport.from_json("{}")
    assert grid(report, lambda row: row.entropy)[1][3] == report.at(1, 3).entropy
    page = render(report)
    assert "&lt;b&gt;bold" in page and "<b>bold" not in page and "<svg" in page and "a &amp; b" in page
    assert write_probe(report, tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="must end in .html, .png, .json"):
        write_probe(report, tmp_path / "x.pdf")
    assert len(report.table().rows) == 2 and len(report.table("head").rows) == 8
    with pytest.raises(ValueError, match='by must be "layer" or "head"'):
        report.table("row")
    with pytest.raises(KeyError, match="layer 7"):
        report.at(7, 0)


def test_bad_input():
    model = BY_NAME["llama"].build()
    with pytest.raises(ValueError, match=r"layers must be in 0..1, got 2"):
        AttentionProbe(model, layers=[2])
    with pytest.raises(ValueError, match="rank_rows >= 2"):
        AttentionProbe(model, rank_rows=1)
    with pytest.raises(TypeError, match="Hugging Face"):
        AttentionProbe(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="one stack of layers"):
        sizes = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
        config = transformers.BartConfig(
            **sizes, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2
        )
        AttentionProbe(transformers.BartModel(config))
    with pytest.raises(ValueError, match="open already"), AttentionProbe(model) as probe:
        probe.__enter__()
    dropping = BY_NAME["llama"].build(attention_dropout=0.5).train()
    with pytest.raises(ValueError, match=r"dropout must be 0 while probing, got 0.5: call model.eval"):
        with AttentionProbe(dropping):
            dropping(tokens(1, 8))
    with pytest.raises(ValueError, match="static cache"), AttentionProbe(model), torch.no_grad():
        model(tokens(1, 8), past_key_values=transformers.StaticCache(config=model.config, max_cache_len=16))
