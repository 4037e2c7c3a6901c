import copy

import pytest
import torch
import transformers as hosts
from torch import nn

from danlu.tuning.ladder.model import LadderConfig, LadderModel
from tuning.ladder_hosts import FAMILIES, VOCABULARY, bert, gpt2, llama, tokens, unset

TIGHT = dict(atol=1e-9, rtol=1e-9)


def ladder(backbone, **options):
    options = {"reduction": 4, "init": "magnitude", **options}
    return unset(LadderModel(backbone, LadderConfig(**options))).eval()


# --- an independent reading of the formula ----------------------------------------------------------------------------


def state(backbone, depth, ids):
    """H_depth by a backbone that ends there: fewer blocks, no norm at the end."""
    base = copy.deepcopy(backbone.base_model)
    base.config.num_hidden_layers = depth
    if hasattr(base, "encoder"):
        base.encoder.layer = base.encoder.layer[:depth]
    elif hasattr(base, "h"):
        base.h, base.ln_f = base.h[:depth], nn.Identity()
    else:
        base.layers, base.norm = base.layers[:depth], nn.Identity()
    with torch.no_grad():
        return base(ids, use_cache=False).last_hidden_state


def one_block(side, block, y):
    """S_j by a host model of this one block."""
    config = copy.deepcopy(side.base.config)
    config.num_hidden_layers = 1
    model = type(side.base)(config).double().eval()
    if hasattr(model, "encoder"):
        model.encoder.layer[0] = block
        # only the encoder: the embeddings would norm their input
        return model.encoder(y, attention_mask=None).last_hidden_state
    if hasattr(model, "h"):
        model.h[0], model.ln_f = block, nn.Identity()
        model.wpe.weight.data.zero_()
    else:
        model.layers[0], model.norm = block, nn.Identity()
    return model(inputs_embeds=y, use_cache=False).last_hidden_state


def reference(model, ids):
    """Logits by the formula, block by block."""
    side, config, backbone = model.side, model.ladder_config, model.backbone

    def down(k, h):
        return h @ side.down[k].weight.T + side.down[k].bias

    y = down(0, state(backbone, 0, ids))
    for j, layer in enumerate(model.layers):
        link = down(j + 1, state(backbone, layer + 1, ids))

        def mixed(x, j=j, link=link):
            if config.gate == "none":
                return x + link
            mu = config.gate_value if config.gate == "constant" else 1 / (1 + (-side.gates[j] / 0.1).exp())
            return mu * x + (1 - mu) * link

        block = side.rungs[j].block
        y = one_block(side, block, mixed(y)) if config.mix == "before" else mixed(one_block(side, block, y))
    norm = side.norm if isinstance(side.norm, nn.LayerNorm) else getattr(side.base, "ln_f", None) or side.base.norm
    states = norm(y) @ side.up.weight.T + side.up.bias
    head = backbone.cls if hasattr(backbone, "cls") else backbone.lm_head
    return head(states)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mix", ["before", "after"])
@pytest.mark.parametrize("gate", ["sigmoid", "none"])
def test_logits_are_those_of_the_formula(family, mix, gate):
    model = ladder(FAMILIES[family](), mix=mix, gate=gate, layers=(0, 2))
    ids = tokens()
    assert torch.allclose(model(ids).logits, reference(model, ids), **TIGHT)


@pytest.mark.parametrize("options", [{"layers": "all"}, {"layers": "every:2", "gate": "constant", "gate_value": 0.3}])
def test_logits_are_those_of_the_formula_at_every_choice_of_layers(options):
    model = ladder(llama(), **options)
    ids = tokens()
    assert model.layers == ((0, 1, 2, 3) if options["layers"] == "all" else (1, 3))
    assert torch.allclose(model(ids).logits, reference(model, ids), **TIGHT)


def test_a_full_width_copy_with_closed_gates_is_the_backbone():
    # r = 1: pruning keeps everything, D and Up are the identity, and a closed ladder is the backbone's own blocks.
    for family, build in FAMILIES.items():
        backbone = build()
        model = LadderModel(
            backbone,
            LadderConfig(reduction=1, init="magnitude", links="select", gate="constant", gate_value=1.0),
        ).eval()
        if family in ("bert", "roberta"):  # a norm of its own after a norm: take it off
            model.side.norm = nn.Identity()
        ids = tokens()
        with torch.no_grad():
            assert torch.allclose(model(ids).logits, backbone(ids).logits, **TIGHT), family


def test_merging_the_last_state_reads_what_the_head_of_the_backbone_reads():
    backbone = llama()
    model = ladder(backbone, merge_last=True, layers=(1,))
    ids, g = tokens(), torch.sigmoid(model.merge / 0.1)
    plain = ladder(backbone, layers=(1,))
    plain.side.load_state_dict(model.side.state_dict())
    # the head is linear: it may be applied to the two parts
    expected = g * plain(ids).logits + (1 - g) * backbone(ids).logits
    assert torch.allclose(model(ids).logits, expected, **TIGHT)


# --- gates ------------------------------------------------------------------------------------------------------------


def features(model, seed=0):
    shape = (2, len(model.layers) + 1, 9, 32)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_open_and_closed_gates_decide_what_the_output_depends_on():
    model = ladder(llama())
    given, other = features(model), features(model, seed=1)
    model.side.gates.data.fill_(1e4)
    kept = torch.cat((given[:, :1], other[:, 1:]), 1)  # another backbone after the embeddings
    assert torch.equal(model(features=given).logits, model(features=kept).logits)
    model.side.gates.data.fill_(-1e4)
    kept = torch.cat((other[:, :-1], given[:, -1:]), 1)  # the same state at the last link only
    assert torch.equal(model(features=given).logits, model(features=kept).logits)
    model.side.gates.data.zero_()
    for link in range(given.shape[1]):
        kept = given.clone()
        kept[:, link] = other[:, link]
        assert not torch.allclose(model(features=given).logits, model(features=kept).logits)


def test_a_gate_starts_at_one_half_and_its_slope_has_the_temperature():
    model = LadderModel(llama(), LadderConfig(reduction=4, init="random", temperature=0.1)).eval()
    halves = LadderModel(llama(), LadderConfig(reduction=4, init="random", gate="constant")).eval()
    ids = tokens()
    assert torch.allclose(model(ids).logits, halves(ids).logits, **TIGHT)
    slow = LadderModel(llama(), LadderConfig(reduction=4, init="random", temperature=1.0)).eval()
    for each in (model, slow):
        each(ids, labels=ids).loss.backward()
    assert torch.allclose(model.side.gates.grad, 10 * slow.side.gates.grad)


# --- gradients --------------------------------------------------------------------------------------------------------


NO_DROPOUT = {
    gpt2: {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    bert: {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


# not Llama: its norms compute in float32 whatever comes in
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [gpt2, bert])
def test_gradients_match_finite_differences(build, training):
    model = ladder(build(**NO_DROPOUT[build]), merge_last=True, layers=(0, 2)).train(training)
    ids = tokens()
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4, -100)
    model(ids, labels=labels).loss.backward()
    step = 1e-6
    for name in ("side.down.0.weight", "side.down.1.bias", "side.down.2.weight", "side.gates", "side.up.weight",
                 "side.up.bias", "merge"):  # fmt: skip
        parameter = model.get_parameter(name)
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
        losses = []
        for sign in (1, -1):
            parameter.data.add_(sign * step * direction)
            losses.append(model(ids, labels=labels).loss.item())
            parameter.data.sub_(sign * step * direction)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-6, abs=1e-8), name


def test_the_loss_in_training_is_the_loss_of_all_logits_and_so_are_its_gradients(monkeypatch):
    monkeypatch.setattr("danlu.tuning.ladder.head._CHUNK_ROWS", 4)
    monkeypatch.setattr("danlu.tuning.ladder.head._CHUNK_NUMBERS", 5 * VOCABULARY)
    model, ids = ladder(llama()), tokens(3)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[2] = -100
    gradients = {}
    for training in (True, False):
        model.train(training).zero_grad()
        out = model(ids, labels=labels)
        (3 * out.loss).backward()
        gradients[training] = [p.grad.clone() for p in model.side.parameters()], out.loss
        assert (out.logits is None) == training
    for one, other in zip(gradients[True][0], gradients[False][0], strict=True):
        assert torch.allclose(one, other, **TIGHT)
    host = model.backbone.loss_function(model(ids).logits, labels, VOCABULARY)
    assert gradients[True][1].item() == pytest.approx(host.item(), rel=1e-6)  # the host's is in float32
    summed = model.train()(ids, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    assert summed.item() == pytest.approx(gradients[True][1].item() * (labels[:, 1:] != -100).sum().item() / 7)
    assert model(ids, labels=torch.full_like(ids, -100)).loss.item() == 0


def test_the_backbone_keeps_no_gradient_and_does_not_change():
    for build in FAMILIES.values():
        model = ladder(build()).train()
        before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
        buffers = {name: value.clone() for name, value in model.backbone.named_buffers()}
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        model(tokens(), labels=tokens()).loss.backward()
        optimiser.step()
        assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
        assert all(p.grad is not None for p in model.side.parameters())
        assert all(torch.equal(before[name], value) for name, value in model.backbone.state_dict().items())
        assert all(torch.equal(buffers[name], value) for name, value in model.backbone.named_buffers())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.backbone.modules())


def test_blocks_get_no_gradient_even_when_someone_thaws_them():
    model = ladder(llama())
    model.backbone.requires_grad_(True)
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is None for p in model.backbone.model.parameters())


def test_dropout_of_the_backbone_is_always_off():
    model = ladder(gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))
    expected = model(tokens()).logits
    model.train()
    assert not any(module.training for module in model.backbone.modules())
    assert any(module.training for module in model.side.modules())
    model.eval()
    model.backbone.train()
    assert torch.equal(model(tokens()).logits, expected)


def test_blocks_above_the_last_link_do_not_run():
    ran = []
    for merge, expected in ((False, [0, 1]), (True, [0, 1, 2, 3])):
        model = ladder(llama(), layers=(0, 1), merge_last=merge)
        for index, block in enumerate(model.backbone.model.layers):
            block.register_forward_hook(lambda *_, index=index: ran.append(index))
        ran.clear()
        model(tokens())
        assert ran == expected


def test_checkpointing_the_side_changes_nothing_and_leaves_the_backbone_alone():
    model = ladder(llama()).train()
    losses, gradients = [], []
    for _ in range(2):
        model.zero_grad()
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.side.parameters()])
        model.gradient_checkpointing_enable()
    assert (
        model.side.rungs[0].block.gradient_checkpointing and not model.backbone.model.layers[0].gradient_checkpointing
    )
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- heads ------------------------------------------------------------------------------------------------------------


def test_a_new_head_reads_the_last_token_of_a_causal_model_and_the_first_of_another():
    ids = tokens(3)
    mask = torch.tensor([[0, 0] + [1] * 7, [1] * 5 + [0] * 4, [1] * 9])
    for build, places in ((llama, [8, 4, 8]), (bert, [2, 0, 0])):
        every = ladder(build(), head="tokens", num_labels=3)
        one = ladder(build(), head="classification", num_labels=3)
        one.load_state_dict(every.state_dict())
        expected = every(ids, attention_mask=mask).logits[torch.arange(3), places]
        assert torch.equal(one(ids, attention_mask=mask).logits, expected)
        loss = one(ids, attention_mask=mask, labels=torch.tensor([0, 2, 1])).loss
        assert torch.allclose(loss, nn.functional.cross_entropy(expected, torch.tensor([0, 2, 1])))


def test_merged_features_feed_a_new_head_too():
    model = ladder(llama(), head="classification", num_labels=3, merge_last=True)
    assert model.head.in_features == 32 and model(tokens()).logits.shape == (2, 3)
    assert ladder(llama(), head="classification", num_labels=3).head.in_features == 8


def test_the_scales_and_caps_of_a_host_head_are_applied():
    options = {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, "pad_token_id": 0}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    backbone = hosts.Gemma2ForCausalLM(hosts.Gemma2Config(**sizes, **options, intermediate_size=64)).eval()
    model = ladder(backbone)
    model.side.up.weight.data.mul_(100)
    assert 2.9 < model(tokens()).logits.abs().max() <= 3.0


# --- sizes and memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "count"), [("all", 4), ("every:2", 2)])
def test_the_number_of_parameters_is_known(layers, count):
    model = LadderModel(llama(), LadderConfig(reduction=4, init="random", layers=layers))
    d, s, f = 32, 8, 16
    block = 2 * s * s + 2 * s * s // 2 + 3 * s * f + 2 * s
    expected = count * block + s + (count + 1) * (d * s + s) + count + (s * d + d)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_heads_are_kept_or_merged_until_they_fit():
    def heads(**options):
        model = LadderModel(llama(num_key_value_heads=4), LadderConfig(init="magnitude", **options))
        config = model.side_config
        return config.num_attention_heads, config.num_key_value_heads, config.head_dim

    assert heads(reduction=4) == (4, 4, 2)
    assert heads(reduction=8) == (2, 2, 2)  # one rotated channel per head is not possible
    assert heads(reduction=4, min_head_dim=4) == (2, 2, 4)
    assert heads(reduction=4, min_head_dim=64) == (1, 1, 8)


def test_the_side_has_the_dtype_of_the_backbone():
    model = LadderModel(llama(torch.bfloat16), LadderConfig(reduction=4, init="magnitude", merge_last=True)).train()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    exact = LadderModel(llama(torch.float32), LadderConfig(reduction=4, init="magnitude", merge_last=True)).train()
    assert loss.item() == pytest.approx(exact(tokens(), labels=tokens()).loss.item(), abs=0.1)
    assert loss.dtype == torch.float32


def test_a_float32_side_trains_over_a_bfloat16_backbone_under_autocast():
    model = LadderModel(llama(torch.bfloat16), LadderConfig(reduction=4, init="random")).train()
    model.side.float()
    with pytest.raises(TypeError, match="states are torch.bfloat16 and the side is torch.float32"):
        model(tokens(), labels=tokens())
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens(), labels=tokens()).loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.side.parameters())


def test_a_single_token_is_enough():
    model = ladder(llama())
    assert torch.allclose(model(tokens(1, 1)).logits, reference(model, tokens(1, 1)), **TIGHT)


def test_embeddings_may_stand_for_tokens():
    model = ladder(llama())
    embeds = model.get_input_embeddings()(tokens()).detach()
    assert torch.equal(model(inputs_embeds=embeds).logits, model(tokens()).logits)
    with pytest.raises(ValueError, match="inputs_embeds must not require gradients"):
        model(inputs_embeds=embeds.requires_grad_())
