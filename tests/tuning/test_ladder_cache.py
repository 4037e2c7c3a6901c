import pickle

import pytest
import torch
from transformers import Trainer, TrainingArguments

from danlu.tuning.ladder import cache as ladder_cache
from danlu.tuning.ladder.cache import LadderFeatures, PadRight
from danlu.tuning.ladder.model import LadderConfig, LadderModel
from tuning.ladder_hosts import VOCABULARY, bert, gpt2, llama, tokens, unset


def ladder(build=llama, dtype=torch.float64, **options):
    return unset(LadderModel(build(dtype), LadderConfig(**{"reduction": 4, "init": "magnitude", **options}))).eval()


def examples(count=7):
    data = []
    for index in range(count):
        ids = tokens(1, 4 + index % 5, seed=index)[0]
        data.append({"input_ids": ids.tolist(), "labels": ids.tolist()})
    return data


def batch(model, data, part):
    return {name: value for name, value in PadRight()([data[i] for i in part]).items()}


@pytest.mark.parametrize("build", [llama, gpt2, bert])
@pytest.mark.parametrize("options", [{}, {"layers": (0, 2), "merge_last": True}, {"head": "tokens", "num_labels": 70}])
def test_cached_states_give_the_logits_of_the_backbone(build, options, tmp_path):
    model, data = ladder(build, **options), examples()
    cached = model.precompute(data, tmp_path, dtype="float64", batch_size=3, shard_tokens=12)
    assert len(cached) == 7 and len(list(tmp_path.glob("*.safetensors"))) == 3
    for part in ([0, 1], [6, 2, 3], [5]):
        live, stored = batch(model, data, part), batch(model, cached, part)
        expected = model(**live)
        stored.pop("input_ids")
        out = model(**stored)
        keep = live["attention_mask"].bool()
        assert torch.allclose(out.logits[keep], expected.logits[keep], atol=1e-6)
        assert torch.allclose(out.loss, expected.loss, atol=1e-6)


def test_the_backbone_does_not_run_on_cached_states(tmp_path):
    model, data = ladder(), examples(3)
    cached = model.precompute(data, tmp_path)
    ran = []
    model.backbone.model.register_forward_hook(lambda *_: ran.append(1))
    model.train()(**batch(model, cached, [0, 1])).loss.backward()
    assert not ran and model.side.down[2].weight.grad.abs().sum() > 0
    model.precompute(data, tmp_path)
    model.features(data, tmp_path)
    assert not ran


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2e-3), ("bfloat16", 2e-2), ("float32", 1e-6)])
def test_states_are_stored_in_the_dtype_that_was_asked_for(dtype, error, tmp_path):
    model, data = ladder(), examples(2)
    cached = model.precompute(data, tmp_path, dtype=dtype)
    stored = cached[1]["features"]
    assert stored.dtype == getattr(torch, dtype) and stored.shape == (5, 5, 32)
    exact = model._examples(data, [1])[0]
    assert ((stored.double() - exact).abs() / exact.abs().max()).max() < error
    assert model(**batch(model, cached, [0, 1])).loss.dtype == torch.float64


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch):
    model, data = ladder(), examples()
    whole = model.precompute(data, tmp_path / "whole", shard_tokens=12)
    calls = []

    def stopping(dataset, part, states=model._examples):
        calls.append(part)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return states(dataset, part)

    monkeypatch.setattr(model, "_examples", stopping)
    with pytest.raises(KeyboardInterrupt):
        model.precompute(data, tmp_path / "part", shard_tokens=12)
    names = {path.name for path in (tmp_path / "part").iterdir()}
    assert names == {"features.json", "features-00000.safetensors", "features-00001.safetensors"}
    with pytest.raises(ValueError, match="features-00002.safetensors is missing or damaged.*run precompute again"):
        model.features(data, tmp_path / "part")
    done = calls[:2]
    calls.clear()
    calls.extend([None] * 10)  # no further stop
    seen = []
    again = model.precompute(data, tmp_path / "part", shard_tokens=12, progress=lambda *at: seen.append(at))
    assert not any(part in done for part in calls)
    assert seen == [(5, 7, "features")]
    for index in range(7):
        assert torch.equal(again[index]["features"], whole[index]["features"])


def test_features_of_anything_else_are_refused(tmp_path):
    model, data = ladder(), examples()
    model.precompute(data, tmp_path)
    stale = "features of another backbone, other layers, other data or another dtype"
    other_data = [*data[:-1], {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    for subject, dataset in (
        (model, other_data),
        (model, data[:-1]),
        (ladder(layers=(0, 2)), data),
        (ladder(merge_last=True), data),
        (ladder(lambda dtype: llama(dtype, rope_parameters={"rope_type": "default", "rope_theta": 50.0})), data),
    ):
        for call in (subject.features, subject.precompute):
            with pytest.raises(ValueError, match=stale):
                call(dataset, tmp_path)
    with pytest.raises(ValueError, match=stale):
        model.precompute(data, tmp_path, dtype="float32")
    model.backbone.model.layers[2].mlp.down_proj.weight.data[5] += 0.5
    with pytest.raises(ValueError, match=stale):
        model.features(data, tmp_path)
    # weights that the states do not depend on may change
    fresh = ladder()
    fresh.backbone.lm_head.weight.data += 1
    unset(fresh, seed=9)
    assert isinstance(fresh.features(data, tmp_path), LadderFeatures)


def test_damage_is_found_on_opening(tmp_path):
    model, data = ladder(), examples()
    with pytest.raises(FileNotFoundError, match="holds no features: run precompute first"):
        model.features(data, tmp_path)
    model.precompute(data, tmp_path)
    path = ladder_cache.shard_path(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="missing or damaged"):
        model.features(data, tmp_path)
    (tmp_path / "features.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read .*delete the folder"):
        model.features(data, tmp_path)


def test_states_too_large_for_float16_are_refused(tmp_path):
    model, data = ladder(), examples(2)
    model.backbone.model.embed_tokens.weight.data *= 1e6
    with pytest.raises(ValueError, match="do not fit into float16 .*use dtype='bfloat16'"):
        model.precompute(data, tmp_path, dtype="float16")
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "at least one token, got lengths"),
        ([{"input_ids": []}], {}, "at least one token"),
        ([{"text": "x"}], {}, "must hold input_ids, example 0 has text"),
        (examples(1), {"dtype": "int8"}, "dtype must be one of"),
        (examples(1), {"batch_size": 0}, "batch_size must be at least 1"),
        (examples(1), {"shard_tokens": 0}, "shard_tokens must be at least 1"),
    ],
)
def test_bad_input_is_refused(data, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ladder().precompute(data, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_cached_examples_have_an_end_and_travel_to_worker_processes(tmp_path):
    model, data = ladder(), examples(3)
    cached = model.precompute(data, tmp_path)
    assert len(list(cached)) == 3  # iteration ends
    cached[0]
    copy = pickle.loads(pickle.dumps(cached))  # what a DataLoader does to start a worker
    assert torch.equal(copy[-1]["features"], cached[2]["features"])
    with pytest.raises(IndexError, match=r"index must be in 0\.\.2, got 3"):
        cached[3]


def test_padding_fills_every_column_on_the_right():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "features": torch.ones(2, 3, 4)},
        {"input_ids": [8], "labels": [8], "features": torch.ones(2, 1, 4)},
    ]
    out = PadRight(pad_token_id=9)(rows)
    assert out["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert out["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert out["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert out["features"].shape == (2, 2, 3, 4) and out["features"][1, :, 1:].abs().sum() == 0
    assert PadRight()([{"input_ids": [1], "labels": 2}])["labels"].tolist() == [2]


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        save_steps=3, logging_steps=1, use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("from_disk", [False, True])
def test_the_trainer_trains_saves_resumes_and_evaluates(from_disk, tmp_path):
    data = examples(12)

    def trainer(folder):
        model = ladder(dtype=torch.float32)
        rows = model.precompute(data, tmp_path / "features", dtype="float32") if from_disk else data
        return Trainer(model=model, args=arguments(folder), train_dataset=rows, eval_dataset=rows[:4] if not from_disk
                       else torch.utils.data.Subset(rows, range(4)), data_collator=PadRight())  # fmt: skip

    whole = trainer(tmp_path / "whole")
    before = {name: value.clone() for name, value in whole.model.backbone.state_dict().items()}
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], value) for name, value in whole.model.backbone.state_dict().items())
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert {"ladder_config.json", "model.safetensors"} <= {path.name for path in checkpoint.iterdir()}
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for one, other in zip(whole.model.side.parameters(), resumed.model.side.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    metrics = whole.evaluate()
    assert metrics["eval_loss"] > 0
    predictions = whole.predict(whole.eval_dataset).predictions
    assert predictions.shape[0] == 4 and predictions.shape[-1] == VOCABULARY
    again = LadderModel.from_pretrained(tmp_path / "whole" / "checkpoint-6", llama(torch.float32))
    assert torch.equal(again(tokens()).logits, whole.model.eval()(tokens()).logits)
