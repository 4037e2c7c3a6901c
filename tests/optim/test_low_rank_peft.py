from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from danlu.optim.low_rank import LowRankOptimizer
from reference.low_rank import fill
from reference.tiny import tiny_llama

TARGETS = ["q_proj", "v_proj", "down_proj"]


def batch(step: int) -> Tensor:
    return torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(step))


def loss_of(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def adapted(model: nn.Module, **options: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": TARGETS, "lora_dropout": 0.0, **options}))


def pairs(model: Any) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            found[f"{name}.weight"] = (module.lora_A["default"].weight, module.lora_B["default"].weight)
    return found


@pytest.mark.parametrize("kind, resync", [
    ("sgd", "exact"), ("sgd", "incremental"), ("sgd with momentum", "exact"), ("adamw", "exact"),
    ("adamw", "incremental"), ("adamw, clipped", "exact"), ("adamw, accumulated", "exact"), ("folded", "exact"),
])  # fmt: skip
def test_training_is_that_of_peft_for_fifty_steps(kind: str, resync: str) -> None:
    base: Any = torch.optim.SGD if "sgd" in kind else torch.optim.AdamW
    settings: dict[str, Any] = {"lr": 0.02 if "sgd" in kind else 0.01, "weight_decay": 0.1}
    if "momentum" in kind:
        settings["momentum"] = 0.9
    parts = 2 if kind in ("adamw, accumulated", "folded") else 1
    clip = 0.05 if kind in ("adamw, clipped", "folded") else None
    plain = tiny_llama(num_hidden_layers=1).double()
    start = copy.deepcopy(plain.state_dict())
    reference = adapted(copy.deepcopy(plain), r=4, lora_alpha=10)
    modules = base([p for p in reference.parameters() if p.requires_grad], **settings)
    optimizer = LowRankOptimizer(
        plain, base, rank=4, alpha=10, target_modules=TARGETS, base_kwargs=settings, resync=resync,
        fold_in_backward=kind == "folded",
    )  # fmt: skip
    peers = pairs(reference)
    assert set(peers) == {site.name for site in optimizer.sites}
    for site in optimizer.sites:
        site.A.data.copy_(peers[site.name][0])
        assert not peers[site.name][1].any() and not site.B.any()
    clipped = 0
    for step in range(50):
        for part in range(parts):
            ids = batch(parts * step + part)
            ours, theirs = loss_of(plain, ids), loss_of(reference, ids)
            assert abs(ours.item() - theirs.item()) < 1e-12
            (ours / parts).backward()
            (theirs / parts).backward()
        if clip:
            norm = nn.utils.clip_grad_norm_((p for p in reference.parameters() if p.requires_grad), clip)
            torch.testing.assert_close(optimizer.clip_grad_norm_(clip), norm, rtol=1e-10, atol=0)
            clipped += bool(norm > clip)
        for one in (modules, optimizer):
            one.step()
            one.zero_grad()
    assert clip is None or clipped > 10
    for site in optimizer.sites:
        A, B = peers[site.name]
        torch.testing.assert_close(site.factors.A, A.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(site.factors.B, B.detach(), rtol=0, atol=1e-12)
        change = site.weight.detach() - start[site.name]
        torch.testing.assert_close(change, 2.5 * B.detach() @ A.detach(), rtol=0, atol=1e-12)
        assert change.abs().max() > 1e-3


@pytest.mark.parametrize("scheme", ["lora", "lora_symmetric", "additive", "random"])
def test_the_exported_adapter_gives_the_same_logits_in_peft(scheme: str, tmp_path: Path) -> None:
    model = tiny_llama()
    base = copy.deepcopy(model)
    options: dict[str, Any] = {"restart_every": 100} if scheme == "random" else {}
    optimizer = LowRankOptimizer(model, scheme=scheme, rank=4, base_kwargs={"lr": 0.02}, **options)
    for step in range(5):
        loss_of(model, batch(step)).backward()
        optimizer.step()
    optimizer.to_peft(tmp_path)
    ranks = {
        tensor.shape[0] for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items() if "_A" in name
    }
    assert ranks == {4 if scheme == "lora" else 8}
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    ids = batch(9)
    with torch.no_grad(), loaded.disable_adapter():
        before = loaded(input_ids=ids).logits
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, loaded(input_ids=ids).logits
    assert (ours - before).abs().max() > 0.05
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * float(ours.abs().max()))


class Network(nn.Module):
    """Every layout that PEFT adapts, in one model."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.lines = nn.Conv1d(8, 10, 3, padding=1)
        self.pixels = nn.Conv2d(1, 4, (2, 3), padding=(1, 1))
        self.turned = Conv1D(10, 10)
        self.plain = nn.Linear(10, 6)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.lines(self.table(ids).mT).mT.contiguous()
        return self.plain(self.turned(h) + self.pixels(h[:, None]).mean(1)[:, :-1, : h.shape[-1]])


@pytest.mark.parametrize("scheme", ["lora", "lora_symmetric"])
def test_every_layout_goes_to_peft_and_back(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Network()
    base = copy.deepcopy(model)
    targets = ["table", "lines", "pixels", "turned", "plain"]
    optimizer = LowRankOptimizer(model, scheme=scheme, rank=3, alpha=4, target_modules=targets)
    fill(optimizer)
    optimizer.to_peft(tmp_path)
    ids = torch.arange(14).view(2, 7)
    ours = model(ids)
    assert (ours - base(ids)).abs().max() > 0.1
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(loaded(ids), ours, rtol=1e-5, atol=1e-5)
    again = copy.deepcopy(base)
    resumed = LowRankOptimizer.from_peft(again, tmp_path, base_kwargs={"lr": 0.1})
    torch.testing.assert_close(again(ids), ours, rtol=1e-5, atol=1e-5)
    for site, other in zip(optimizer.sites, resumed.sites, strict=True):
        rank = 3 if scheme == "lora" else 6
        assert other.A.shape[-2] == rank and other.scale == pytest.approx(site.scale)
        torch.testing.assert_close(resumed.delta(other.name), optimizer.delta(site.name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["MixtralConfig", "GptOssConfig"])
def test_banks_of_experts_go_to_peft_and_back(family: str, tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, family)(
        vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    base = copy.deepcopy(model)
    optimizer = LowRankOptimizer(model, rank=2, alpha=2, base_kwargs={"lr": 0.02})
    banks = {site.name.rpartition(".")[2]: site.layout for site in optimizer.sites if "experts" in site.name}
    turned = family == "GptOssConfig"
    assert banks == dict.fromkeys(("gate_up_proj", "down_proj"), "turned bank" if turned else "bank")
    whole = LowRankOptimizer(copy.deepcopy(base), rank=2, target_modules=["experts"])
    assert len(whole.sites) == 2  # and none of GPT-OSS's biases, which have two dimensions too
    ids = torch.randint(40, (2, 10))
    for _ in range(4):
        loss_of(model, ids).backward()
        optimizer.step()
    optimizer.to_peft(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        assert (ours - base(input_ids=ids).logits).abs().max() > 0.05
        torch.testing.assert_close(loaded(input_ids=ids).logits, ours, rtol=0, atol=2e-5 * float(ours.abs().max()))
        again = copy.deepcopy(base)
        resumed = LowRankOptimizer.from_peft(again, tmp_path)
        assert len(resumed.sites) == len(optimizer.sites)
        torch.testing.assert_close(again(input_ids=ids).logits, ours, rtol=0, atol=2e-5 * float(ours.abs().max()))


def test_a_tied_table_is_exported_for_both_places(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    base = copy.deepcopy(model)
    optimizer = LowRankOptimizer(model, rank=4, target_modules=["lm_head", "q_proj"])
    fill(optimizer)
    optimizer.to_peft(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    ids = batch(0)
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, loaded(input_ids=ids).logits
        assert (ours - base(input_ids=ids).logits).abs().max() > 1
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * float(ours.abs().max()))
    again = copy.deepcopy(base)
    resumed = LowRankOptimizer.from_peft(again, tmp_path)
    torch.testing.assert_close(resumed.delta("lm_head"), optimizer.delta("lm_head"), rtol=1e-5, atol=1e-6)
    one_place = adapted(copy.deepcopy(base), target_modules=["lm_head"])
    one_place.save_pretrained(tmp_path / "head", save_embedding_layers=False)
    with pytest.raises(ValueError, match="in all its tied places, got lm_head alone"):
        LowRankOptimizer.from_peft(copy.deepcopy(base), tmp_path / "head")


@pytest.mark.parametrize("resync", ["exact", "incremental"])
@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}]
)
def test_an_adapter_of_peft_goes_on_in_the_optimiser(options: dict, resync: str, tmp_path: Path) -> None:
    base = tiny_llama()
    peer = adapted(copy.deepcopy(base), r=4, lora_alpha=6, **options)
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.2)
    peer.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    optimizer = LowRankOptimizer.from_peft(
        model, tmp_path, base=torch.optim.SGD, base_kwargs={"lr": 0.1}, resync=resync
    )
    plain = torch.optim.SGD([p for p in peer.parameters() if p.requires_grad], 0.1)
    for step in range(3):
        ours, theirs = loss_of(model, batch(step)), loss_of(peer, batch(step))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        ours.backward()
        theirs.backward()
        optimizer.step()
        plain.step()
        plain.zero_grad()
    optimizer.detach_delta()
    torch.testing.assert_close(model.state_dict(), base.state_dict(), rtol=0, atol=0 if resync == "exact" else 1e-5)


def test_what_no_adapter_can_hold_is_refused(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Linear(8, 8))
    bare = LowRankOptimizer([layer[0].weight], rank=2)
    with pytest.raises(ValueError, match="must be built from a model"):
        bare.to_peft(tmp_path)
    restarted = LowRankOptimizer(layer, rank=2, restart_every=2)
    for _ in range(2):
        layer(torch.ones(1, 8)).sum().backward()
        restarted.step()
    with pytest.raises(ValueError, match="got 1 restarts; save the model itself"):
        restarted.to_peft(tmp_path)
    grouped = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="0.weight must be an ungrouped convolution for PEFT"):
        LowRankOptimizer(grouped, rank=2).to_peft(tmp_path)
    assert not list(tmp_path.iterdir())


def test_foreign_adapters_are_refused(tmp_path: Path) -> None:
    base = tiny_llama()
    adapted(copy.deepcopy(base)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="options must not hold 'rank'"):
        LowRankOptimizer.from_peft(base, tmp_path, rank=3)
    with pytest.raises(ValueError, match="must hold LoRA factors of this model's weights alone"):
        LowRankOptimizer.from_peft(tiny_llama(num_hidden_layers=1), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for name, value in (("use_dora", True), ("bias", "all"), ("peft_type", "IA3")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(ValueError, match=name):
            LowRankOptimizer.from_peft(base, tmp_path)


def test_dropout_of_an_adapter_is_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny_llama()
    adapted(copy.deepcopy(base), lora_dropout=0.1).save_pretrained(tmp_path)
    LowRankOptimizer.from_peft(base, tmp_path)
    assert "lora_dropout 0.1" in caplog.text
