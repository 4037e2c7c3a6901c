import copy
import warnings

import pytest
import torch
import transformers as hosts
from torch import nn

from danlu.hosts.architecture import UnsupportedArchitecture, read_architecture
from danlu.tuning.ladder import init as ladder_init
from danlu.tuning.ladder.model import LadderConfig, LadderModel
from tuning.ladder_hosts import FAMILIES, SIZES, VOCABULARY, bert, gpt2, llama, tokens, widened


def batches(count=3):
    return [{"input_ids": tokens(2, 7, seed=s), "labels": tokens(2, 7, seed=s)} for s in range(count)]


def squared_gradients(backbone):
    """Sum over single samples of squared gradients, by whole-model backward passes."""
    model = copy.deepcopy(backbone).requires_grad_(True)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches():
        for row in range(2):
            model.zero_grad()
            model(**{name: value[row : row + 1] for name, value in batch.items()}).loss.backward()
            for name, p in model.named_parameters():
                total[name] += p.grad.square()
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_scores_are_sums_of_squared_gradients_of_single_samples(family):
    backbone = FAMILIES[family]()
    expected = squared_gradients(backbone)
    architecture = read_architecture(backbone)
    scores = ladder_init.fisher_scores(architecture, batches())
    checked = 0
    for matrix in architecture.matrices():
        square = expected[f"{matrix.name}.weight"]
        square = (square.T if matrix.transposed else square)[matrix.start : matrix.stop]
        rows, columns = scores[matrix.name, matrix.start]
        assert torch.allclose(rows, square.sum(1)) and torch.allclose(columns, square.sum(0))
        checked += 1
    table = next(iter(architecture.embeddings))
    assert torch.allclose(scores[table, 0][1], expected[f"{table}.weight"].sum(0))
    assert checked == 4 * (7 if family == "llama" else 6)
    assert all(p.grad is None and p.requires_grad for p in backbone.parameters()) and not backbone.training


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_copies_the_sub_matrices_that_the_scores_choose(family):
    """Zero out all but chosen channels of the backbone: the scores must find them, and the copies must be they."""
    backbone = FAMILIES[family]()
    architecture = read_architecture(backbone)
    residual = torch.tensor([1, 4, 9, 12, 17, 20, 30, 31])
    units = {layer: torch.arange(layer, 64, 4)[:16] for layer in range(4)}
    if family == "gpt2":
        units = {layer: torch.arange(layer, 128, 4)[:32] for layer in range(4)}
    with torch.no_grad():
        for layer, block in enumerate(architecture.blocks):
            weak = torch.ones(len(block.feed_forward.up.weight), dtype=torch.bool)
            weak[units[layer]] = False
            block.feed_forward.up.weight[weak] *= 1e-3
            block.feed_forward.down.weight[:, weak] *= 1e-3
            if block.feed_forward.gate is not None:
                block.feed_forward.gate.weight[weak] *= 1e-3
        faint = torch.ones(32, dtype=torch.bool)
        faint[residual] = False
        for block in architecture.blocks:
            for matrix in (block.attention.query, block.attention.key, block.attention.value, block.feed_forward.up):
                matrix.weight[:, faint] *= 1e-2
            block.feed_forward.down.weight[faint] *= 1e-2
            block.attention.output.weight[faint] *= 1e-2
        next(iter(architecture.embeddings.values())).weight[:, faint] *= 1e-2
    model = LadderModel(backbone, LadderConfig(reduction=4, init="magnitude", layers=(1, 3), links="select"))
    for layer, rung in zip((1, 3), model.side.rungs, strict=True):
        source = architecture.blocks[layer]
        small = rung.block
        target = dict(small.named_modules())
        prefix = len(source.name) + 1
        for name in ("up", "gate", "down"):
            matrix = getattr(source.feed_forward, name)
            if matrix is None:
                continue
            copied = target[matrix.name[prefix:]].weight
            copied = copied.T if matrix.transposed else copied
            wide = matrix.weight
            expected = wide[residual][:, units[layer]] if name == "down" else wide[units[layer]][:, residual]
            assert torch.equal(copied, expected), name
        for name, norm in source.norms.items():
            assert torch.equal(target[name[prefix:]].weight, norm.weight[residual])
    ids = tokens()
    selected = nn.functional.one_hot(residual, 32).double()
    assert torch.equal(model.side.down[0].weight, selected) and torch.equal(model.side.up.weight, selected.T)
    assert model(ids).logits.isfinite().all()


def test_heads_keep_one_pair_of_each_frequency_band_and_values_their_best():
    backbone = llama(num_key_value_heads=2, hidden_size=64)  # 4 heads of 16: 8 frequencies, r = 4 keeps 2 of them
    block = read_architecture(backbone).blocks[0]
    scores = ladder_init.magnitude_scores(read_architecture(backbone))
    for name in (block.attention.query.name, block.attention.key.name, block.attention.value.name):
        scores[name, 0][0].zero_()
    scores[block.attention.output.name, 0][1].zero_()
    key = scores[block.attention.key.name, 0][0]
    query = scores[block.attention.query.name, 0][0]
    key[3] = 1.0  # head 0: frequency 3 of the first band
    query[16 + 8 + 6] = 1.0  # query head 1 shares key head 0: frequency 6, second half of the head
    key[16 + 5] = 1.0  # key head 1: frequency 5, and the first of the band where all are equal
    value = scores[block.attention.value.name, 0][0]
    value[[2, 5, 7, 11]] = 1.0
    scores[block.attention.output.name, 0][1][[3 * 16 + 1, 2 * 16 + 9]] = 1.0  # query heads 2 and 3 share head 1
    model = LadderModel(backbone, LadderConfig(reduction=4, init="random"))
    kept = ladder_init.block_channels(block, scores, model.side_config, backbone.config)
    assert kept.key.tolist() == [3, 6, 11, 14, 16, 21, 24, 29]
    # in head 0 the pairs of frequencies 3 and 6 are channels (3, 11) and (6, 14)
    assert kept.query.tolist() == [head * 16 + c for head in (0, 1) for c in (3, 6, 11, 14)] + [
        head * 16 + c for head in (2, 3) for c in (0, 5, 8, 13)
    ]
    assert kept.value.tolist() == [2, 5, 7, 11] + [16 + c for c in (0, 1, 2, 9)]
    assert kept.output.tolist() == [head * 16 + c for head in (0, 1) for c in (2, 5, 7, 11)] + [
        head * 16 + c for head in (2, 3) for c in (0, 1, 2, 9)
    ]


def test_merged_heads_compete_for_the_channels():
    backbone = gpt2()  # 4 heads of 8, r = 16: one head of 2 is left
    block = read_architecture(backbone).blocks[0]
    scores = ladder_init.magnitude_scores(read_architecture(backbone))
    attention = block.attention
    for matrix in (attention.query, attention.key):
        scores[matrix.name, matrix.start][0].zero_()
    scores[attention.key.name, attention.key.start][0][[9, 26]] = 1.0
    model = LadderModel(backbone, LadderConfig(reduction=16, init="random", min_head_dim=2))
    assert model.side_config.num_attention_heads == 1
    kept = ladder_init.block_channels(block, scores, model.side_config, backbone.config)
    assert kept.key.tolist() == [9, 26] and kept.query.tolist() == [9, 26]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Qwen3", {"head_dim": 16}),  # a norm for each head
        ("Olmo2", {}),  # a norm over all heads
        ("Glm", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0,
                                                     "partial_rotary_factor": 0.5}}),  # interleaved, half rotated
        ("Cohere", {"logit_scale": 1.0}),  # interleaved
        ("Phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),  # fused
    ],
)  # fmt: skip
def test_a_full_width_copy_is_the_backbone_whatever_the_projections_look_like(name, options):
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0}
    config = getattr(hosts, f"{name}Config")(**sizes, **options, bos_token_id=1, eos_token_id=2)
    backbone = widened(hosts.AutoModelForCausalLM.from_config(config))
    model = LadderModel(
        backbone, LadderConfig(reduction=1, init="magnitude", links="select", gate="constant", gate_value=1.0)
    ).eval()
    with torch.no_grad():
        assert torch.allclose(model(tokens()).logits, backbone(tokens()).logits, atol=1e-6)
    small = LadderModel(backbone, LadderConfig(reduction=4, init="magnitude")).eval()
    assert small(tokens()).logits.isfinite().all()


def test_fisher_keeps_what_the_loss_depends_on():
    backbone = llama()
    architecture = read_architecture(backbone)
    with (
        torch.no_grad()
    ):  # 24 channels of the residual stream say nothing, but a token that is never read is huge there
        alive = torch.arange(2, 32, 4)
        dead = torch.ones(32, dtype=torch.bool)
        dead[alive] = False
        for block in architecture.blocks:
            attention, feed = block.attention, block.feed_forward
            for matrix in (attention.query, attention.key, attention.value, feed.up, feed.gate):
                matrix.weight[:, dead] = 0
            for matrix in (attention.output, feed.down):
                matrix.weight[dead] = 0
        backbone.lm_head.weight[:, dead] = 0
        backbone.model.embed_tokens.weight[:, dead] = 0
        backbone.model.embed_tokens.weight[1, dead] = 1e4
    scores = ladder_init.importance(backbone, "fisher", batches())
    assert torch.equal(ladder_init.residual_channels(architecture, scores, 8), alive)
    size = ladder_init.importance(backbone, "magnitude", None)
    assert not torch.equal(ladder_init.residual_channels(architecture, size, 8), alive)


def test_samples_are_checked():
    for samples, message in (([], "at least one batch"), ([{"input_ids": tokens()}], "must hold labels")):
        with pytest.raises(ValueError, match=message):
            LadderModel(llama(), LadderConfig(reduction=4), samples=samples)
    backbone = llama()
    assert all(p.requires_grad for p in backbone.parameters())
    LadderModel(backbone, LadderConfig(reduction=4), samples=batches())


# --- quantised backbones ----------------------------------------------------------------------------------------------


def quantised(build=llama):
    backbone = build(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = torch.ao.quantization.quantize_dynamic(backbone.base_model, {nn.Linear}, dtype=torch.qint8)
    setattr(backbone, backbone.base_model_prefix, base)
    return backbone.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [llama, bert])
def test_an_integer_backbone_is_trained_over_but_not_pruned(build, tmp_path):
    backbone = quantised(build)
    with pytest.raises(UnsupportedArchitecture, match="init='magnitude' needs the backbone's weights.*init='random'"):
        LadderModel(backbone, LadderConfig(reduction=4, init="magnitude"))
    with pytest.raises(UnsupportedArchitecture, match="init='fisher' needs the backbone's weights"):
        LadderModel(backbone, LadderConfig(reduction=4), samples=batches())
    model = LadderModel(backbone, LadderConfig(reduction=4, init="random")).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(30):
        loss = model(tokens(), labels=tokens()).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model.eval().save_pretrained(tmp_path)
    again = LadderModel.from_pretrained(tmp_path, backbone)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


class FourBit(nn.Module):
    """A linear layer without a floating-point weight: two signed numbers of 4 bits in a byte."""

    def __init__(self, layer):
        super().__init__()
        self.bias = layer.bias
        self.scale = nn.Buffer(layer.weight.abs().amax(1, keepdim=True) / 7)
        whole = (layer.weight / self.scale).round().clamp(-8, 7).to(torch.int16) + 8
        self.weight = nn.Parameter((whole[:, ::2] * 16 + whole[:, 1::2]).to(torch.uint8), requires_grad=False)

    def forward(self, x):
        packed = self.weight.to(torch.int16)
        whole = torch.stack((packed // 16, packed % 16), -1).flatten(1) - 8
        return nn.functional.linear(x, whole.to(x) * self.scale, self.bias)


def test_a_packed_backbone_is_trained_over():
    backbone = llama(torch.float32)
    for layer in backbone.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, FourBit(child))
    with pytest.raises(
        UnsupportedArchitecture, match="q_proj must be a plain floating-point linear layer, got FourBit"
    ):
        LadderModel(backbone, LadderConfig(reduction=4, init="magnitude"))
    model = LadderModel(backbone, LadderConfig(reduction=4, init="random")).train()
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.side.parameters())


class Deaf(nn.Linear):
    def forward(self, x):
        return super().forward(x.detach()).detach()


def test_a_head_that_passes_no_gradient_is_named():
    backbone = llama(torch.float32)
    backbone.lm_head = Deaf(32, VOCABULARY, bias=False)
    model = LadderModel(backbone, LadderConfig(reduction=4, init="random")).train()
    with pytest.raises(ValueError, match="the backbone's head must pass gradients on"):
        model(tokens(), labels=tokens())
