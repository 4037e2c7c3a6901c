"""A decoder over continuous patches: conditions never look ahead, caches change nothing, hosts keep working."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen3Config,
    Qwen3Model,
)

from danlu.models.continuous import ContinuousCausalLM, ContinuousConfig
from reference.continuous import generate

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
HEAD = {"token_dim": 3, "head_width": 8, "head_depth": 2}
PLACE = 19  # the id of a patch


def patch_model(backbone=None, **options):
    torch.manual_seed(0)
    backbone = LlamaModel(LlamaConfig(vocab_size=1, **SIZES)) if backbone is None else backbone
    return shake(ContinuousCausalLM.from_backbone(backbone, **HEAD | options))


def text_model(host=LlamaForCausalLM, config=None, **options):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=20, **SIZES) if config is None else config
    return shake(ContinuousCausalLM.from_backbone(host(config), **HEAD | {"patch_token_id": PLACE} | options))


def shake(model):
    """Take zeros and small embeddings away, so that everything has an effect."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def danlu_decoder():
    from danlu.models.decoder.heads import DanluConfig, DanluModel

    return DanluModel(DanluConfig(vocab_size=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))


def forced(monkeypatch, model, tokens):
    """Let sampling take given normalised tokens, and keep the conditions it was asked with."""
    conditions, given = [], iter(tokens.unbind(1))

    def sample(z, *arguments, **options):
        conditions.append(z)
        return next(given)

    monkeypatch.setattr(model.diffusion_head, "sample", sample)
    return conditions


@pytest.mark.parametrize("kind", ["llama", "qwen3", "danlu"])
@pytest.mark.parametrize("places", [False, True])
def test_cached_conditions_equal_those_of_the_whole_sequence(monkeypatch, kind, places):
    backbones = {"llama": lambda: None, "danlu": danlu_decoder,
                 "qwen3": lambda: Qwen3Model(Qwen3Config(vocab_size=1, head_dim=8, **SIZES))}  # fmt: skip
    options = {"num_classes": 4} | ({"num_places": 5} if places else {})
    model = patch_model(backbones[kind](), token_mean=0.5, token_std=2.0, **options)
    patches, labels = torch.randn(2, 5, 3), torch.tensor([3, -1])
    order = torch.stack([torch.randperm(5), torch.randperm(5)]) if places else None
    whole = model(patches=patches, classes=labels, order=order).conditions
    conditions = forced(monkeypatch, model, model.normalise(patches))
    generated = model.generate_patches(5, labels, order=order)
    assert torch.allclose(torch.stack(conditions, 1), whole, atol=1e-5)
    assert torch.allclose(generated, patches, atol=1e-6)


def test_a_condition_depends_on_earlier_patches_alone():
    model = patch_model(num_classes=2)
    patches, labels = torch.randn(1, 5, 3), torch.tensor([1])
    before = model(patches=patches, classes=labels).conditions
    for j in range(5):
        changed = patches.clone()
        changed[:, j] += 1
        after = model(patches=changed, classes=labels).conditions
        assert torch.equal(after[:, : j + 1], before[:, : j + 1])
        assert j == 4 or ((after - before)[:, j + 1 :].abs().amax(-1) > 1e-6).all()
    assert not torch.allclose(model(patches=patches, classes=torch.tensor([0])).conditions[:, 0], before[:, 0])


def test_guided_sampling_equals_full_passes_and_loops_over_tokens():
    for order, ramp in ((None, "constant"), ([[2, 0, 1], [0, 2, 1]], "linear")):
        model = patch_model(num_classes=3, num_places=0 if order is None else 3, token_mean=0.3, token_std=1.7).double()
        expected = generate(model, [2, 0], 3, 4, 1.8, ramp, order, seed=7)
        drawn = model.generate_patches(
            3, torch.tensor([2, 0]), steps=4, guidance=1.8, guidance_ramp=ramp, generator=7,
            order=None if order is None else torch.tensor(order),
        )  # fmt: skip
        assert torch.allclose(drawn, expected, atol=1e-9)


def test_loss_is_that_of_the_head_on_normalised_tokens():
    model = patch_model(token_mean=[1.0, 2.0, 3.0], token_std=[1.0, 2.0, 4.0], mul=2)
    patches = torch.randn(4, 5, 3) * torch.tensor([1.0, 2.0, 4.0]) + torch.tensor([1.0, 2.0, 3.0])
    output = model(patches=patches, generator=torch.Generator().manual_seed(0))
    x = (patches - torch.tensor([1.0, 2.0, 3.0])) / torch.tensor([1.0, 2.0, 4.0])
    own = model.diffusion_head.loss(x, output.conditions, None, 2, torch.Generator().manual_seed(0))
    assert torch.allclose(output.loss, own) and output.logits is None and output.text_loss is None
    assert torch.allclose(model.denormalise(model.normalise(patches)), patches, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_text_beside_patches_is_the_hosts_text(kind):
    model = text_model() if kind == "llama" else text_model(
        GPT2LMHeadModel, GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )  # fmt: skip
    ids = torch.randint(0, 19, (2, 6))
    host = model.backbone(input_ids=ids, labels=ids)
    output = model(ids, labels=ids)
    assert torch.allclose(output.logits, host.logits, atol=1e-6)
    assert torch.allclose(output.loss, host.loss, atol=1e-6) and output.patch_loss is None


def test_mixed_spans_learn_text_by_cross_entropy_and_patches_by_the_head():
    model = text_model(patch_loss_weight=0.5)
    ids = torch.randint(0, 19, (2, 9))
    ids[0, 2:5] = ids[1, 4:6] = PLACE
    patches = torch.randn(5, 3)
    output = model(ids, patches, labels=ids, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(output.loss, output.text_loss + 0.5 * output.patch_loss)
    embeds = model.backbone.get_input_embeddings()(ids.clamp(max=18))
    embeds[ids == PLACE] = model.patch_embedding(patches)
    host = model.backbone(inputs_embeds=embeds, output_hidden_states=True)
    assert torch.allclose(output.logits, host.logits, atol=1e-6)
    hidden = host.hidden_states[-1]
    z = torch.stack([hidden[0, 1], hidden[0, 2], hidden[0, 3], hidden[1, 3], hidden[1, 4]])
    assert torch.allclose(output.conditions, z, atol=1e-6)
    text = torch.nn.functional.cross_entropy(
        host.logits[:, :-1].flatten(0, 1), ids.masked_fill(ids == PLACE, -100)[:, 1:].flatten()
    )
    assert torch.allclose(output.text_loss, text, atol=1e-6)
    masked = torch.tensor([True, False, False, True, False])
    part = model(ids, patches, patch_mask=masked, generator=torch.Generator().manual_seed(0))
    own = model.diffusion_head.loss(patches, z, masked, 4, torch.Generator().manual_seed(0))
    assert torch.allclose(part.patch_loss, own, atol=1e-6)


def test_padding_changes_nothing():
    model = text_model()
    ids = torch.tensor([[5, 7, PLACE, PLACE, 3]])
    patches = torch.randn(2, 3)
    plain = model(ids, patches, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    output = model(padded, patches, attention_mask=mask, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(output.logits[:, 3:], plain.logits, atol=1e-5)
    assert torch.allclose(output.loss, plain.loss, atol=1e-5)


@pytest.mark.parametrize("places", [0, 4])
def test_patches_after_prompts_of_different_lengths(monkeypatch, places):
    model = text_model(num_places=places)
    prompt = torch.tensor([[0, 0, 5, 6], [7, 8, PLACE, 9]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    seen, patches = torch.randn(1, 3), torch.randn(2, 4, 3)
    conditions = []
    for row, own in ((0, None), (1, seen)):
        ids = torch.cat([prompt[row][mask[row].bool()], torch.full((4,), PLACE)])[None]
        every = patches[row] if own is None else torch.cat([own, patches[row]])
        conditions.append(model(ids, every).conditions[-4:])
    kept = forced(monkeypatch, model, patches)
    model.generate_patches(4, input_ids=prompt, attention_mask=mask, patches=seen)
    assert torch.allclose(torch.stack(kept, 1), torch.stack(conditions), atol=1e-5)


def test_guidance_by_a_null_prompt_mixes_the_two_conditions(monkeypatch):
    model = text_model()
    prompt, null, patches = torch.tensor([[5, 6, 7], [1, 2, 3]]), torch.tensor([[4]]), torch.randn(2, 2, 3)
    calls = []

    def sample(z, steps, solver, temperature, guidance, generator, *, null):
        calls.append((z, null, guidance))
        return patches[:, len(calls) - 1]

    monkeypatch.setattr(model.diffusion_head, "sample", sample)
    model.generate_patches(2, input_ids=prompt, null_input_ids=null, guidance=3, guidance_ramp="linear")
    places = torch.full((2, 2), PLACE)
    for side, text in ((0, prompt), (1, null.expand(2, -1))):
        whole = model(torch.cat([text, places], 1), patches).conditions.view(2, 2, 16)
        assert torch.allclose(torch.stack([call[side] for call in calls], 1), whole, atol=1e-5)
    assert [call[2] for call in calls] == [2, 3]


def test_the_hosts_generate_goes_on_after_patches():
    model = text_model(num_places=3)
    ids = torch.tensor([[5, PLACE, PLACE, 6], [2, 3, PLACE, PLACE]])
    patches, order = torch.randn(2, 2, 3), torch.tensor([[2, 0], [1, 2]])
    written = model.generate(ids, patches=patches, order=order, max_new_tokens=3, do_sample=False, pad_token_id=0,
                             suppress_tokens=[PLACE])  # fmt: skip
    expected = ids
    for _ in range(3):
        logits = model(expected, patches, order=order, return_loss=False).logits[:, -1, :PLACE]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(written, expected)


def test_withheld_classes_and_input_noise_are_for_training_alone():
    model = patch_model(num_classes=2, condition_dropout=1.0, input_noise=0.5)
    patches, labels = torch.randn(4, 3, 3), torch.tensor([0, 1, 0, 1])
    none = model(patches=patches).conditions
    assert not torch.allclose(model(patches=patches, classes=labels).conditions, none)
    model.train()
    trained = model(patches=patches, classes=labels, generator=torch.Generator().manual_seed(0)).conditions
    assert torch.allclose(trained[:, 0], none[:, 0], atol=1e-6)  # all classes withheld, no patch read yet
    noised = model.normalise(patches) + 0.5 * torch.randn(patches.shape, generator=_after_classes(4))
    model.eval()
    assert torch.allclose(trained, model(patches=model.denormalise(noised)).conditions, atol=1e-5)


def _after_classes(count):
    generator = torch.Generator().manual_seed(0)
    torch.rand(count, generator=generator)
    return generator


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_round_trip_with_every_choice(tmp_path, tied):
    config = LlamaConfig(vocab_size=20, tie_word_embeddings=tied, **SIZES)
    model = text_model(config=config, num_places=4, num_classes=2, token_std=[1.0, 2.0, 3.0], objective="epsilon")
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is ContinuousCausalLM and loaded.config.to_dict()["token_std"] == [1.0, 2.0, 3.0]
    assert loaded.backbone.config._attn_implementation == model.backbone.config._attn_implementation == "sdpa"
    ids, patches = torch.tensor([[5, PLACE, PLACE, 6]]), torch.randn(1, 2, 3)
    outputs = [each.eval()(ids, patches, labels=ids, generator=torch.Generator().manual_seed(0))
               for each in (model, loaded)]  # fmt: skip
    assert torch.equal(outputs[0].loss, outputs[1].loss) and torch.equal(outputs[0].logits, outputs[1].logits)
    half = ContinuousCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.backbone.dtype == torch.bfloat16 and half.diffusion_head.output.weight.dtype == torch.float32
    low = half(ids, patches, labels=ids, generator=torch.Generator().manual_seed(0))
    assert low.patch_loss.dtype == torch.float32
    assert torch.allclose(low.loss, outputs[0].loss, rtol=0.05)


def test_the_backbone_keeps_its_weights_and_fresh_heads_start_at_zero(tmp_path):
    backbone = LlamaForCausalLM(LlamaConfig(vocab_size=20, **SIZES))
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = ContinuousCausalLM.from_backbone(backbone, patch_token_id=PLACE, **HEAD)
    assert model.backbone is backbone and all(torch.equal(weights[k], v) for k, v in backbone.state_dict().items())
    assert not model.diffusion_head.output.weight.any() and not model.diffusion_head.blocks[1].modulation.weight.any()
    assert model.diffusion_head.token.weight.abs().mean().item() > 0.1
    built = ContinuousCausalLM(ContinuousConfig(LlamaConfig(vocab_size=1, **SIZES), **HEAD))
    assert not built.diffusion_head.output.weight.any()
    assert torch.equal(built.diffusion_head.blocks[0].norm.weight, torch.ones(8))
    built.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    rest = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "diffusion_head" not in k}
    save_file(rest, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = ContinuousCausalLM.from_pretrained(tmp_path).diffusion_head
    assert not loaded.output.weight.any() and loaded.token.weight.abs().mean().item() > 0.1


def test_all_parameters_that_train_get_a_gradient():
    for model, inputs in (
        (patch_model(num_classes=2, num_places=3), {"classes": torch.tensor([0, 1])}),
        (text_model(num_places=3), {"input_ids": torch.tensor([[5, PLACE, PLACE, PLACE]] * 2)}),
    ):
        if "input_ids" in inputs:
            inputs["labels"] = inputs["input_ids"]
        model(patches=torch.randn(2, 3, 3), **inputs).loss.backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointed in (False, True):
        model = patch_model().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(patches=torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1)),
              generator=torch.Generator().manual_seed(0)).loss.backward()  # fmt: skip
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, atol=1e-6)


def test_adapters_train_beside_the_new_parts():
    peft = pytest.importorskip("peft")
    model = patch_model(num_classes=2)
    new = ["patch_embedding", "start_embedding", "diffusion_head"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=new))
    patches, labels = torch.randn(2, 4, 3), torch.tensor([0, 1])
    adapted(patches=patches, classes=labels).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert any("lora_A" in name for name in trained) and any("diffusion_head" in name for name in trained)
    assert not any("mlp.up_proj" in name for name in trained)
    assert adapted.generate_patches(2, labels, steps=2, guidance=2.0).shape == (2, 2, 3)


def test_the_hosts_trainer_accumulates_and_evaluates(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = text_model()
    ids = torch.tensor([5, 7, PLACE, PLACE, 3, 2])
    data = [{"input_ids": ids, "labels": ids, "patches": torch.randn(2, 3)} for _ in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    # not divided over the accumulation steps, the logged loss would be twice what one batch has
    whole = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    one = model.eval()(**whole, generator=torch.Generator().manual_seed(0)).loss.item()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(0.6 * one < loss < 1.6 * one for loss in logged)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(one, rel=0.4)


@pytest.mark.slow
def test_compiling_changes_no_loss():
    model = patch_model(num_classes=2).train()
    inputs = {"patches": torch.randn(2, 4, 3), "classes": torch.tensor([0, 1])}
    torch.manual_seed(1)
    plain = model(**inputs).loss
    compiled = torch.compile(model, backend="eager")
    torch.manual_seed(1)
    assert torch.allclose(compiled(**inputs).loss, plain)


def test_wrong_inputs_are_refused():
    model, text = patch_model(), text_model()
    patches = torch.randn(2, 3, 3)
    with pytest.raises(ValueError, match="order needs target positions"):
        model(patches=patches, order=torch.randperm(3))
    with pytest.raises(ValueError, match=r"places of patches must be in 0..1"):
        patch_model(num_places=2)(patches=patches)
    with pytest.raises(ValueError, match=r"order must be integers of shape \(2, 3\)"):
        patch_model(num_places=3)(patches=patches, order=torch.arange(2))
    with pytest.raises(ValueError, match=r"patches must be \(batch, patches, 3\)"):
        model(patches=patches[0])
    with pytest.raises(ValueError, match="patches must have 3 dimensions"):
        model(patches=patches[..., :2])
    with pytest.raises(ValueError, match=r"classes must be \(2,\) integers in 0..-1, or -1 for none, got \[0, 1\]"):
        model(patches=patches, classes=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="input_ids need a backbone with an output head"):
        model(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="got 1 places and 6 patches"):
        text(torch.tensor([[1, PLACE]]), patches)
    with pytest.raises(ValueError, match="must not begin with a patch"):
        text(torch.tensor([[PLACE, 1]]), patches[0, :1])
    with pytest.raises(ValueError, match="write the class as text"):
        text(torch.tensor([[1, 2]]), classes=torch.tensor([0]))
    with pytest.raises(ValueError, match="give input_ids, with a token before the patches"):
        text(patches=patches)


def test_wrong_requests_for_samples_are_refused():
    model, text = patch_model(num_classes=2), text_model()
    labels, ids = torch.tensor([0, 1]), torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="got classes given, num_classes 2 and condition_dropout 0.0"):
        patch_model(num_classes=2, condition_dropout=0.0).generate_patches(2, labels, guidance=2)
    with pytest.raises(ValueError, match="got classes None, num_classes 0"):
        patch_model().generate_patches(2, num_samples=1, guidance=2)
    with pytest.raises(ValueError, match="needs null_input_ids"):
        text.generate_patches(2, input_ids=ids, guidance=2)
    with pytest.raises(ValueError, match="guidance_ramp must be constant or linear"):
        model.generate_patches(2, labels, guidance_ramp="cosine")
    with pytest.raises(ValueError, match="count must be at least 1"):
        model.generate_patches(0, labels)
    with pytest.raises(ValueError, match="give classes, or num_samples"):
        model.generate_patches(2)
    with pytest.raises(ValueError, match="pad prompts on the left"):
        text.generate_patches(2, input_ids=ids, attention_mask=torch.tensor([[1, 0]]))
    with pytest.raises(ValueError, match="either input_ids or classes"):
        text.generate_patches(2, labels, input_ids=ids)


def test_wrong_configurations_are_refused():
    backbone = LlamaConfig(vocab_size=20, **SIZES)
    for options, message in (
        ({"text": True}, "patch_token_id must be an id in 0..19 that no text uses, got None"),
        ({"text": True, "patch_token_id": 20}, "got 20: add a special token"),
        ({"token_std": [1.0, 2.0]}, "token_std must be 1 or 16 numbers, got 2"),
        ({"token_std": 0.0}, "token_std must be above 0"),
        ({"objective": "v"}, "objective must be one of flow, epsilon"),
        ({"condition_dropout": 1.5}, "condition_dropout must be in 0..1"),
        ({"mul": 0}, "mul must be at least 1"),
        ({"input_noise": -1.0}, "input_noise must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ContinuousConfig(backbone, **options)
    from transformers import T5Config, T5ForConditionalGeneration

    small = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="got the encoder-decoder T5"):
        ContinuousCausalLM.from_backbone(T5ForConditionalGeneration(small), patch_token_id=1)
