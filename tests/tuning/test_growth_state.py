"""What an optimiser carries over: gradients of the grown model are mapped gradients of the small one."""

from __future__ import annotations

import copy

import pytest
import torch

from danlu.optim.lion import Lion
from danlu.optim.tiger import Tiger
from danlu.tuning.growth.grow import grow
from danlu.tuning.growth.plan import plan_growth, read_growable
from danlu.tuning.growth.sizes import sizes_of
from danlu.tuning.growth.state import grow_optimizer, symmetry_gap
from reference.growth_hosts import build, everything, tokens


def backward(model, seed=0):
    ids = tokens(seed=seed)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()


def known(made, source):
    """Which entries of a grown parameter have a gradient that the small one knows."""
    return made.apply_to_gradient(torch.ones_like(source), 1) != 0


SIZES = [
    ("llama", None),
    ("llama-tied", None),
    ("llama", {"hidden_size": 60}),
    ("llama-tied", {"hidden_size": 60}),
    ("qwen2", None),
    ("qwen3", {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4}),
    ("gemma", None),
    ("gemma2", None),
    ("gemma2", {"hidden_size": 60}),
    ("phi3", None),
    ("smollm3", None),
    ("gpt2", None),
    ("gpt2-untied", {"hidden_size": 144}),
    ("bert", None),
    ("bert-untied", {"hidden_size": 144}),
    ("roberta", None),
]


@pytest.mark.parametrize(
    ("name", "sizes"), SIZES, ids=[f"{n}-{'all' if s is None else s['hidden_size']}" for n, s in SIZES]
)
def test_gradients_of_the_grown_model_are_the_mapped_ones(name, sizes):
    model = build(name, torch.float64)
    grown = grow(model, **(sizes or everything(name)), symmetry="none")
    backward(model)
    backward(grown)
    maps = plan_growth(model, sizes_of(read_growable(grown))).maps
    limit = 1e-10 if name.startswith(("gpt2", "bert", "roberta")) else 2e-5
    compared = 0
    for key, parameter in grown.named_parameters():
        made = maps[key]
        source = model.get_parameter(made.source)
        if source.grad is None:
            continue
        expected = made.apply_to_gradient(source.grad, 1)
        inside = known(made, source)
        if "key.bias" in key or "k_proj.bias" in key:  # attention does not see it: zero but for rounding
            continue
        error = (parameter.grad - expected)[inside].abs()
        if inside.any():
            compared += 1
            assert error.max() <= limit * source.grad.abs().max(), key
    assert compared > 12


def test_gains_of_norms_over_the_head_are_mapped_exactly_and_their_rows_closely():
    model = build("qwen3", torch.float64)
    grown = grow(model, head_dim=16, symmetry="none")
    backward(model)
    backward(grown)
    maps = plan_growth(model, sizes_of(read_growable(grown))).maps
    for key in ("q_norm.weight", "k_norm.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight"):
        name = f"model.layers.0.self_attn.{key}"
        source, parameter = model.get_parameter(name), grown.get_parameter(name)
        expected, inside = maps[name].apply_to_gradient(source.grad, 1), known(maps[name], source)
        if key in ("q_proj.weight", "k_proj.weight"):
            likeness = torch.cosine_similarity(parameter.grad[inside], expected[inside], dim=0)
            assert 0.8 < likeness < 0.9999, key
        else:
            torch.testing.assert_close(parameter.grad[inside], expected[inside], atol=1e-7, rtol=2e-5)


def test_centred_padding_maps_gradients_closely():
    model = build("gpt2-untied", torch.float64)
    grown = grow(model, hidden_size=66, symmetry="none")
    backward(model)
    backward(grown)
    for key, made in plan_growth(model, sizes_of(read_growable(grown))).maps.items():
        source, parameter = model.get_parameter(made.source), grown.get_parameter(key)
        inside = known(made, source)
        if key.endswith(("c_proj.weight", "wte.weight")):
            expected = made.apply_to_gradient(source.grad, 1)
            assert torch.cosine_similarity(parameter.grad[inside], expected[inside], dim=0) > 0.9, key


@pytest.mark.parametrize("kind", ["adamw", "amsgrad", "sgd", "lion", "tiger"])
def test_a_step_of_the_grown_optimiser_is_the_mapped_step(kind):
    model = build("gpt2", torch.float64)
    makers = {
        "adamw": lambda p: torch.optim.AdamW(p, 1e-3, eps=1e-30, weight_decay=0),
        "amsgrad": lambda p: torch.optim.Adam(p, 1e-3, eps=1e-30, amsgrad=True),
        "sgd": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9),
        "lion": lambda p: Lion(p, 1e-3),
        "tiger": lambda p: Tiger(p, 1e-3, weight_decay=0, rule="plain", stochastic_rounding=False),
    }
    optimizer = makers[kind](model.parameters())
    for seed in range(3):
        backward(model, seed)
        optimizer.step()
    sizes = {"hidden_size": 96, "intermediate_size": 80, "num_attention_heads": 12}
    grown = grow(model, **sizes, symmetry="none")
    carried = grow_optimizer(optimizer, model, grown)
    assert type(carried) is type(optimizer) and len(carried.param_groups) == 1
    maps = plan_growth(model, sizes_of(read_growable(grown))).maps
    before = {name: p.detach().clone() for name, p in (*model.named_parameters(), *grown.named_parameters())}
    before = {"old": {n: p.detach().clone() for n, p in model.named_parameters()}}
    before["new"] = {n: p.detach().clone() for n, p in grown.named_parameters()}
    for one, step in ((model, optimizer), (grown, carried)):
        backward(one, 7)
        step.step()
    for name, parameter in grown.named_parameters():
        made = maps[name]
        source = model.get_parameter(made.source)
        small = (source - before["old"][made.source]).detach()
        step = (parameter - before["new"][name]).detach()
        if kind == "sgd":  # its step is linear in the gradient
            torch.testing.assert_close(step, made.apply_to_gradient(small, 1), atol=1e-12, rtol=1e-6)
            continue
        for i, dimension in enumerate(made.dimensions):
            if dimension is not None:
                small = small.index_select(i, dimension.axis.index)
        # Attention does not see the key's bias: its gradient is rounding, and a sign of it is anything.
        seen = torch.ones_like(step, dtype=torch.bool)
        if name.endswith("c_attn.bias"):
            seen[96:192] = False
        torch.testing.assert_close(step[seen], small[seen], atol=1e-9, rtol=1e-4)


def test_groups_schedules_and_saved_states(tmp_path):
    model = build("llama")
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], 1e-3
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    backward(model)
    optimizer.step()
    schedule.step()
    grown = grow(model, hidden_size=96, num_hidden_layers=4)
    carried = grow_optimizer(optimizer, model, grown)
    assert [group["weight_decay"] for group in carried.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in carried.param_groups] == [5e-4, 5e-4]
    assert carried.param_groups[0]["initial_lr"] == 1e-3
    listed = [p for group in carried.param_groups for p in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in grown.parameters()} and len(listed) == len(set(map(id, listed)))
    assert all(
        (p.ndim > 1) == (group is carried.param_groups[0]) for group in carried.param_groups for p in group["params"]
    )
    # The old one is left alone, and the new one steps, saves and loads as any.
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
    assert all(carried.state[p]["exp_avg_sq"].shape == p.shape for p in grown.parameters())
    torch.save(carried.state_dict(), tmp_path / "state.pt")
    fresh = torch.optim.AdamW([{"params": g["params"]} for g in carried.param_groups], 1.0)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    backward(grown)
    carried.step()
    hooked = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(1))
    carried.step()
    assert not hooked and carried.state[grown.lm_head.weight]["step"] == 3


def test_what_the_small_model_never_saw_starts_calmly():
    model = build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    backward(model)
    optimizer.step()
    grown = grow(model, hidden_size=60, head_dim=16, num_hidden_layers=3, placement=[0])
    carried = grow_optimizer(optimizer, model, grown, placement=[0])
    new, old = grown.model.layers[0], model.model.layers[0]
    state, source = carried.state[new.mlp.down_proj.weight], optimizer.state[old.mlp.down_proj.weight]
    assert not state["exp_avg"].any() and state["exp_avg_sq"].min() > 0
    k = carried.state[grown.model.layers[1].self_attn.k_proj.weight]
    free = torch.arange(3 * 16).reshape(3, 2, 8)[:, :, 1::2].flatten()
    assert not k["exp_avg"][free].any()
    used = [i for i in range(48) if i not in free.tolist()]
    assert k["exp_avg"][used][:, :48].any()
    torch.testing.assert_close(k["exp_avg_sq"][free], k["exp_avg_sq"][used][:, :48].mean().expand(len(free), 60))
    assert source["exp_avg"].any()


def test_mapped_moments_have_the_powers_of_the_gradient():
    model = build("bert", torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), 0.0, betas=(0.0, 0.0))
    backward(model)
    optimizer.step()
    grown = grow(model, hidden_size=96, symmetry="none")
    carried = grow_optimizer(optimizer, model, grown)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    small, state = optimizer.state[model.get_parameter(name)], carried.state[grown.get_parameter(name)]
    # Rows stay, columns are repeated with half the weight: the gradient of a copy is whole.
    torch.testing.assert_close(state["exp_avg"], small["exp_avg"].repeat_interleave(2, 1))
    name = "bert.encoder.layer.0.output.dense.weight"
    small, state = optimizer.state[model.get_parameter(name)], carried.state[grown.get_parameter(name)]
    torch.testing.assert_close(state["exp_avg"], small["exp_avg"].repeat_interleave(2, 0) / 2)
    torch.testing.assert_close(state["exp_avg_sq"], small["exp_avg_sq"].repeat_interleave(2, 0) / 4)
    assert torch.equal(state["step"], small["step"])


def test_refused_by_name():
    model, grown = build("llama"), grow(build("llama"), hidden_size=96, num_hidden_layers=3)
    strange = torch.optim.Adamax(model.parameters())
    backward(model)
    strange.step()
    with pytest.raises(ValueError, match="exp_avg, .*, but Adamax holds 'exp_inf'"):
        grow_optimizer(strange, model, grown)
    tiger = Tiger(model.parameters(), accumulation_steps=2)
    backward(model)
    tiger.step()
    with pytest.raises(ValueError, match="Tiger holds 'window'"):
        grow_optimizer(tiger, model, grown)
    other = torch.optim.SGD(grown.parameters(), 0.1)
    with pytest.raises(ValueError, match="must hold parameters of old"):
        grow_optimizer(other, build("llama"), grown)
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with pytest.raises(ValueError, match="new must be what grow made of old with the same placement"):
        grow_optimizer(sgd, model, grow(model, hidden_size=96, widening="pad"))
    moved = copy.deepcopy(grow(model, hidden_size=96))
    with torch.no_grad():
        moved.model.norm.weight.add_(1)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is not"):
        grow_optimizer(sgd, model, moved)


def test_bfloat16_states_keep_their_type():
    model = build("llama", torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    backward(model)
    optimizer.step()
    grown = grow(model, hidden_size=96)
    carried = grow_optimizer(optimizer, model, grown)
    assert {state["momentum_buffer"].dtype for state in carried.state.values()} == {torch.bfloat16}


def test_tiger_keeps_its_settings():
    model = build("llama")
    tiger = Tiger(model.parameters(), 1e-3, accumulation_steps=3, seed=5)
    for seed in range(3):
        backward(model, seed)
        tiger.step()
    grown = grow(model, hidden_size=96)
    carried = grow_optimizer(tiger, model, grown)
    assert (carried.accumulation_steps, carried.seed, carried.param_groups[0]["step"]) == (3, 5, 1)
    for seed in range(3):
        backward(grown, seed)
        carried.step()
    assert min(symmetry_gap(model, grown).values()) >= 0 and carried.param_groups[0]["step"] == 2
