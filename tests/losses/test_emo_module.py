"""EMOLoss with host models: Trainer, PEFT, attached to a model, schedules and resuming."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from context.families import SUPPORTED, widen
from danlu.losses.emo import EMOLoss
from danlu.losses.emo_functional import emo_loss
from danlu.losses.mixing import MixingSchedule
from reference.tiny import tiny_llama

FAMILIES = {family.name: family for family in SUPPORTED}


def batch(rows=3, length=12, vocabulary=257, seed=1):
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :4] = -100
    labels[-1, -3:] = -100
    return {"input_ids": ids, "labels": labels}


def by_hand(model, inputs, table, num_items=None, **options):
    """The loss from logits, shifted by slicing."""
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
    return emo_loss(logits, inputs["labels"][:, 1:], table, num_items_in_batch=num_items, **options)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(mine, theirs, **tolerance):
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


class Rows(Dataset):
    """Rows with different numbers of tokens that count."""

    def __init__(self, count=24, length=10):
        ids = torch.randint(0, 257, (count, length), generator=torch.Generator().manual_seed(5))
        self.rows = [
            {"input_ids": row, "labels": torch.where(torch.arange(length) < i % 7, -100, row)}
            for i, row in enumerate(ids)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def arguments(folder, **options):
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=6,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    return TrainingArguments(**(settings | options))


class InOrder(Trainer):
    """Rows as they come, so that a loop by hand sees the same ones."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def loop(model, table, steps=6, rows=4, rate=1e-2, **options):
    """SGD on whole batches: what Trainer does in two parts."""
    data, losses = Rows(), []
    for step in range(steps):
        part = [data[(step * rows + i) % len(data)] for i in range(rows)]
        inputs = {key: torch.stack([row[key] for row in part]) for key in part[0]}
        chosen = {key: value(step) if callable(value) else value for key, value in options.items()}
        loss = by_hand(model, inputs, table, **chosen)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
        losses.append(loss.item())
    return losses


def logged(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("cost", ["fixed", "adaptive"])
def test_trainer_equals_a_loop_by_hand(tmp_path, attached, cost):
    model = tiny_llama(tie_word_embeddings=True)
    twin = copy.deepcopy(model).train()
    table = twin.lm_head.weight.detach()  # a view that follows the weight
    table = table.clone() if cost == "fixed" else table
    expected = loop(twin, table, mode="mix2")
    loss = EMOLoss(model, mode="mix2", cost=cost, row_chunk=7)
    if attached:
        loss.attach(model)
    trainer = InOrder(model, arguments(tmp_path), train_dataset=Rows(), compute_loss_func=None if attached else loss)
    trainer.train()
    assert logged(trainer) == pytest.approx(expected, rel=1e-4)
    assert (twin.lm_head.weight - tiny_llama().lm_head.weight).abs().max() > 1e-2
    close(model.state_dict(), twin.state_dict(), atol=1e-5, rtol=1e-4)


def test_accumulated_parts_have_the_gradient_of_the_whole_batch():
    model = tiny_llama(tie_word_embeddings=False).double()
    loss, inputs = EMOLoss(model), batch(4)
    items = (inputs["labels"][:, 1:] != -100).sum()
    by_hand(model, inputs, model.lm_head.weight.detach()).backward()
    whole = gradients(model)
    model.zero_grad()
    for part in range(4):
        rows = {key: value[part : part + 1] for key, value in inputs.items()}
        loss(model(rows["input_ids"]), rows["labels"], num_items_in_batch=items).backward()
    close(gradients(model), whole, atol=1e-12, rtol=1e-9)


HOSTS = [
    ("llama", {}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("gemma2", {"final_logit_softcapping": 2.0}),
    ("cohere", {"logit_scale": 0.3}),
    ("phi", {}),
]


@pytest.mark.parametrize(("name", "changes"), HOSTS, ids=[name for name, _ in HOSTS])
def test_attached_loss_equals_the_loss_of_logits(name, changes):
    model = FAMILIES[name].build(**changes).train()
    inputs = batch(vocabulary=97)
    head = model.get_output_embeddings()
    if name == "phi":
        torch.nn.init.normal_(head.bias)
    expected = by_hand(model, inputs, head.weight.detach(), num_items=20)
    expected.backward()
    theirs = gradients(model)
    model.zero_grad()
    with EMOLoss(model).attach(model):
        for _ in range(2):
            model.zero_grad()
            outputs = model(**inputs, num_items_in_batch=torch.tensor(20))
            assert outputs.logits.shape == (3, 1, 97)
            outputs.loss.backward()
    assert torch.allclose(outputs.loss, expected, atol=1e-12)
    close(gradients(model), theirs, atol=1e-10, rtol=1e-7)


@pytest.mark.parametrize("kind", ["granite", "gpt2", "bert"])
def test_attached_loss_in_other_hosts(kind):
    small = dict(vocab_size=97, pad_token_id=0)
    if kind == "granite":
        config = transformers.GraniteConfig(
            **small,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            logits_scaling=4.0,
        )
        model = transformers.GraniteForCausalLM(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            **small, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.BertConfig(
            **small,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = transformers.BertForMaskedLM(config)
    model = widen(model).double().train()
    inputs, table = batch(vocabulary=97), model.get_output_embeddings().weight.detach()
    if kind == "bert":  # not shifted; the masked language model takes its loss from the host without loss_function
        loss = EMOLoss(model)
        assert not loss.shift
        expected = emo_loss(model(inputs["input_ids"]).logits, inputs["labels"], table)
        assert torch.allclose(loss(model(inputs["input_ids"]), inputs["labels"]), expected)
        return
    expected = by_hand(model, inputs, table)
    with EMOLoss(model).attach(model):
        assert torch.allclose(model(**inputs).loss, expected, atol=1e-12)


def test_a_host_with_unknown_logits_is_refused():
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, input_ids, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids).last_hidden_state) * 1.5
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=257) if labels is not None else None
            return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    model = Odd(tiny_llama().config).train()
    EMOLoss(model).attach(model)
    with pytest.raises(ValueError, match="not its head's output up to a scale and a soft-cap.*compute_loss_func"):
        model(**batch())


def test_attached_model_is_as_before_without_training_or_labels():
    model = tiny_llama(tie_word_embeddings=False)
    inputs = batch()
    plain, own = model(inputs["input_ids"]).logits, model(**inputs).loss
    handle = EMOLoss(model, mode="mix2").attach(model)
    model.eval()
    outputs = model(**inputs)
    assert torch.equal(outputs.logits, plain)
    expected = by_hand(model, inputs, model.lm_head.weight.detach(), mode="mix2")
    assert torch.allclose(outputs.loss, expected) and not torch.allclose(expected, own)
    model.train()
    assert torch.equal(model(inputs["input_ids"]).logits, plain)
    assert model(**inputs).logits.shape[1] == 1
    assert torch.equal(model(inputs["input_ids"]).logits, plain)  # no hidden state is left over
    with pytest.raises(ValueError, match="has a loss attached already"):
        EMOLoss(model).attach(model)
    handle.remove()
    assert torch.equal(model(**inputs).loss, own) and torch.equal(model(**inputs).logits, plain)
    model.loss_function = lambda logits, labels, **kwargs: logits.sum() * 0 + 7
    EMOLoss(model).attach(model).remove()
    assert model(**inputs).loss == 7


def test_attached_bfloat16_model_and_autocast():
    model = tiny_llama().to(torch.bfloat16).train()
    inputs = batch()
    with EMOLoss(model).attach(model):
        loss = model(**inputs).loss
        loss.backward()
    exact = copy.deepcopy(model).float()
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, by_hand(exact, inputs, exact.lm_head.weight.detach()), rtol=2e-2)
    assert model.lm_head.weight.grad.dtype == torch.bfloat16
    with EMOLoss(exact).attach(exact), torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(exact(**inputs).loss, loss, rtol=2e-2)


def lora(model, **options):
    peft = pytest.importorskip("peft")
    settings = dict(r=3, lora_alpha=6, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    torch.manual_seed(2)
    return peft.get_peft_model(model, peft.LoraConfig(**(settings | options)))


@pytest.mark.parametrize("cost", ["fixed", "adaptive"])
def test_lora_on_the_head(cost):
    model = lora(tiny_llama(tie_word_embeddings=False).double()).train()
    head = model.get_base_model().lm_head
    merged = (head.weight + 2.0 * head.lora_B["default"].weight @ head.lora_A["default"].weight).detach()
    inputs = batch()
    loss = EMOLoss(model, cost=cost)
    assert loss.shift
    expected = by_hand(model, inputs, merged)
    expected.backward()
    theirs = gradients(model)
    assert any("lm_head.lora_A" in name for name in theirs) and not any("base_layer" in name for name in theirs)
    model.zero_grad()
    given = loss(model(inputs["input_ids"]), inputs["labels"])
    assert torch.allclose(given, expected, atol=1e-12)
    handle = loss.attach(model)
    outputs = model(**inputs)
    assert outputs.logits.shape[1] == 1
    outputs.loss.backward()
    assert torch.allclose(outputs.loss, expected, atol=1e-12)
    close(gradients(model), theirs, atol=1e-12, rtol=1e-8)
    # The adaptive cost follows the adapter, the fixed one does not.
    handle.remove()
    with torch.no_grad():
        head.lora_B["default"].weight.zero_()
    table = head.weight.detach() if cost == "adaptive" else merged
    given = loss(model(inputs["input_ids"]), inputs["labels"])
    assert torch.allclose(given, by_hand(model, inputs, table), atol=1e-12)


def test_peft_with_trainer_a_trained_copy_of_the_head_and_disabled_adapters(tmp_path):
    model = lora(tiny_llama(tie_word_embeddings=False), target_modules=["q_proj"], modules_to_save=["lm_head"])
    loss = EMOLoss(model, cost="adaptive")
    handle = loss.attach(model)
    before = model.get_base_model().lm_head.weight.clone()
    trainer = Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=Rows())
    trainer.train()
    assert not torch.equal(model.get_base_model().lm_head.weight, before)
    handle.remove()
    model = lora(tiny_llama(tie_word_embeddings=False))
    inputs = batch()
    with model.disable_adapter():
        expected = by_hand(model, inputs, model.get_base_model().lm_head.weight.detach())
        loss = EMOLoss(model, cost="adaptive")
        assert torch.allclose(loss(model(inputs["input_ids"]), inputs["labels"]), expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout must be 0 on the output head"),
        ({"use_dora": True}, "must be plain LoRA, got Dora"),
        ({"lora_bias": True, "init_lora_weights": True}, "lora_bias must be off"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(options, match):
    model = lora(tiny_llama(tie_word_embeddings=False), **options).train()
    with pytest.raises(ValueError, match=match):
        EMOLoss(model).attach(model)
        model(**batch())


def test_a_forward_that_passes_the_hooks_by_is_noticed():
    model = tiny_llama().train()
    EMOLoss(model).attach(model)
    with pytest.raises(ValueError, match="the model that is called.*after wrapping with PEFT"):
        model.forward(**batch())


def test_untied_model_takes_the_head_and_keeps_no_gradient_for_the_cost():
    model = tiny_llama(tie_word_embeddings=False)
    loss = EMOLoss(model)
    assert torch.allclose(loss.cost_embedding, F.normalize(model.lm_head.weight), atol=1e-6)
    assert not loss.cost_embedding.requires_grad and not list(loss.parameters())
    assert set(loss.state_dict()) == {"_extra_state"}
    inputs = batch()
    loss(model(inputs["input_ids"]), inputs["labels"]).backward()
    assert loss.cost_embedding.grad is None
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert torch.allclose(loss.cost_embedding, F.normalize(-model.lm_head.weight), atol=1e-6)


def test_tensors_and_tuples_as_outputs_and_classifiers():
    table = torch.randn(5, 8)
    loss = EMOLoss(table, mode="emo")
    logits, labels = torch.randn(7, 5), torch.randint(5, (7,))
    expected = emo_loss(logits, labels, table, mode="emo")
    assert torch.allclose(loss(logits, labels), expected)
    assert torch.allclose(loss((logits,), labels), expected)
    assert torch.allclose(loss({"logits": logits}, labels), expected)


def schedule():
    return MixingSchedule(((1, 0.0), (5, 1.0)))


def test_schedule_follows_the_step_and_a_resumed_run_goes_on(tmp_path):
    def trainer(folder, **options):
        model = tiny_llama()
        loss = EMOLoss(model, mode="mix2", schedule=schedule())
        made = InOrder(
            model,
            arguments(folder, **options),
            train_dataset=Rows(),
            compute_loss_func=loss,
            callbacks=[loss.callback()],
        )
        return made, loss

    twin = tiny_llama()
    expected = loop(twin.train(), twin.lm_head.weight.detach().clone(), mode="mix2", share=schedule())
    whole, loss = trainer(tmp_path / "whole")
    assert loss.step == 0
    whole.train()
    assert logged(whole) == pytest.approx(expected, rel=1e-4)
    assert loss.step == 5
    first, _ = trainer(tmp_path / "parts", max_steps=3, save_strategy="steps", save_steps=3)
    first.train()
    second, loss = trainer(tmp_path / "parts")
    second.train(resume_from_checkpoint=True)
    assert logged(second) == logged(whole)
    close(second.model.state_dict(), whole.model.state_dict(), atol=0, rtol=0)


def test_schedule_in_a_loop_of_ones_own(tmp_path):
    model = tiny_llama()
    loss, inputs = EMOLoss(model, schedule=schedule(), mode="emo"), batch()
    table = model.lm_head.weight.detach()
    with pytest.raises(ValueError, match="step must be set for the schedule.*callback"):
        loss(model(inputs["input_ids"]), inputs["labels"])
    for step, share in ((0, 0.0), (3, 0.5), (9, 1.0)):
        loss.step = step
        found = loss(model(inputs["input_ids"]), inputs["labels"])
        assert torch.allclose(found, by_hand(model, inputs, table, mode="emo", share=share))
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    other = EMOLoss(model, schedule=schedule())
    other.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    assert other.step == 9 and other.share == 1.0


def test_bad_input():
    model = tiny_llama()
    with pytest.raises(ValueError, match="cost must be one of fixed, adaptive, got 'free'"):
        EMOLoss(model, cost="free")
    with pytest.raises(ValueError, match="must be a model when cost is 'adaptive'"):
        EMOLoss(torch.randn(4, 2), cost="adaptive")
    with pytest.raises(ValueError, match="mode must be one of"):
        EMOLoss(model, mode="mixed")
    with pytest.raises(ValueError, match="must name its output head.*got LlamaModel"):
        EMOLoss(model.model)
    with pytest.raises(ValueError, match="labels must be given, got None"):
        EMOLoss(model)(model(batch()["input_ids"]), None)
    with pytest.raises(ValueError, match="outputs must hold logits"):
        EMOLoss(model)(model.model(batch()["input_ids"]), batch()["labels"])
    with pytest.raises(ValueError, match="at most as many rows as the vocabulary, 200, got 257"):
        EMOLoss(model)(torch.randn(3, 12, 200), batch()["labels"].clamp(max=199))


SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from reference.tiny import tiny_llama
from losses.test_emo_module import InOrder, Rows, arguments
from danlu.losses.emo import EMOLoss
model = tiny_llama(tie_word_embeddings=False)
loss = EMOLoss(model, mode="mix2")
attached = sys.argv[3] == "attached"
if attached:
    loss.attach(model)
trainer = InOrder(model, arguments(sys.argv[1], per_device_train_batch_size=1), train_dataset=Rows(),
                  compute_loss_func=None if attached else loss)
trainer.train()
assert trainer.args.world_size == 2
if trainer.is_world_process_zero():
    torch.save(model.state_dict(), sys.argv[1] + "/end.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["attached", "given"])
def test_two_processes_equal_one(tmp_path, way):
    (tmp_path / "run.py").write_text(SCRIPT)
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "run.py"), str(tmp_path), tests, way],
        timeout=240,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    twin = tiny_llama(tie_word_embeddings=False).train()
    loop(twin, twin.lm_head.weight.detach().clone(), mode="mix2")
    close(torch.load(tmp_path / "end.pt", weights_only=True), twin.state_dict(), atol=1e-5, rtol=1e-4)
