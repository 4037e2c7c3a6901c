"""Mode I: noisy copies change nothing but themselves, and the joint pass equals one that reads a cache."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from danlu.models.continuous import JointLayout, JointNoiseDecoder, joint_noise_mask
from reference.continuous import joint_mask


def backbone(attention="sdpa"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=None, bos_token_id=None, eos_token_id=None, attn_implementation=attention,
    )  # fmt: skip
    return LlamaModel(config).double()


def shaken(attention="sdpa", objective="flow"):
    made = JointNoiseDecoder(backbone(attention), 3, objective).double().eval()
    with torch.no_grad():
        for parameter in made.output.parameters():
            parameter.add_(0.3)
    return made


@pytest.mark.parametrize("sizes", [(0, 1, 0, 0), (0, 4, 3, 0), (2, 3, 2, 2), (1, 5, 1, 0), (3, 2, 0, 4)])
def test_the_mask_is_that_of_the_kinds_of_tokens(sizes):
    text, patches, levels, later = sizes
    layout = JointLayout(patches, levels, text, later)
    expected = joint_mask(*sizes)
    assert torch.equal(joint_noise_mask(layout), expected)
    assert layout.length == len(expected) and layout.pairs == int(expected.sum())


@pytest.mark.parametrize(("patches", "levels", "pairs"), [(256, 100, 3_322_496), (256, 0, 32_896)])
def test_pairs_of_the_joint_sequence_are_far_fewer_than_those_of_the_naive_expansion(patches, levels, pairs):
    layout = JointLayout(patches, levels)
    assert layout.pairs == patches * (patches + 1) // 2 + levels * sum(range(1, patches + 1)) == pairs
    naive = patches * 100 * (patches * 100 + 1) // 2
    assert naive == 327_692_800 and layout.pairs < naive / 98


def test_a_noisy_copy_stands_at_the_position_of_its_clean_patch():
    assert JointLayout(3, 2, text=2, later_text=2).position_ids().tolist() == [0, 1, 2, 3, 4, 2, 2, 3, 3, 4, 4, 5, 6]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_mask_function_serves_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    layout = JointLayout(40, 3, text=2, later_text=6)
    length = layout.length
    mask = create_block_mask(layout.mask_mod(), None, None, length, length, device="cpu", BLOCK_SIZE=16)
    q, k, v = torch.randn(3, 1, 1, length, 8)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=joint_noise_mask(layout))
    assert torch.allclose(flex_attention(q, k, v, block_mask=mask), dense, atol=1e-5)
    # noisy copies fill three quarters of rows and columns, and of that square only the diagonal blocks are touched
    assert mask.sparsity() > 60


def test_adding_or_deleting_noise_levels_changes_no_other_output():
    made = shaken()
    x, y = torch.randn(2, 4, 3).double(), torch.randn(2, 4, 5, 3).double()
    t = torch.rand(2, 4, 5).double()
    clean, predicted = made(x, y, t)
    for levels in (0, 1, 3):
        fewer, some = made(x, y[:, :, :levels], t[:, :, :levels])
        assert torch.allclose(fewer, clean, atol=1e-12)
        assert torch.allclose(some, predicted[:, :, :levels], atol=1e-12)
    changed = y.clone()
    changed[:, 2, 3] += 1
    clean_again, again = made(x, changed, t)
    assert torch.allclose(clean_again, clean, atol=1e-12)
    moved = (again - predicted).abs().amax(-1) > 1e-9
    assert moved[:, 2, 3].all() and int(moved.sum()) == 2


def test_a_copy_depends_on_earlier_patches_alone_and_on_its_level():
    made = shaken()
    x, y, t = torch.randn(1, 4, 3).double(), torch.randn(1, 4, 1, 3).double(), torch.rand(1, 4, 1).double()
    predicted = made(x, y, t)[1]
    x[:, 2] += 1
    moved = ((made(x, y, t)[1] - predicted).abs().amax((0, 2, 3)) > 1e-9).tolist()
    assert moved == [False, False, False, True]
    assert not torch.allclose(made(x, y, t * 0.5)[1], made(x, y, t)[1])


def test_eager_attention_gives_the_same():
    x, y, t = torch.randn(1, 3, 3).double(), torch.randn(1, 3, 2, 3).double(), torch.rand(1, 3, 2).double()
    for a, b in zip(shaken()(x, y, t), shaken("eager")(x, y, t), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@torch.no_grad()
def test_queries_read_the_cache_without_a_trace_and_equal_the_joint_pass():
    made = shaken()
    x, y, t = torch.randn(2, 3, 3).double(), torch.randn(2, 3, 2, 3).double(), torch.rand(2, 3, 2).double()
    clean, predicted = made(x, y, t)
    cache = made.backbone(inputs_embeds=made.start.expand(2, 1, -1), use_cache=True).past_key_values
    for i in range(3):
        for level in range(2):
            assert torch.allclose(made.query(y[:, i, level], t[:, i, level], cache), predicted[:, i, level])
        assert cache.get_seq_length() == i + 1
        embeds = made._embed(x[:, i : i + 1])
        outputs = made.backbone(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        assert torch.allclose(outputs.last_hidden_state[:, 0], clean[:, i])


@pytest.mark.parametrize("objective", ["flow", "epsilon"])
def test_it_learns_and_samples(objective):
    made = JointNoiseDecoder(backbone().float(), 1, objective)
    optimiser = torch.optim.Adam(made.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(40):
        first = torch.randn(32, 1, 1, generator=generator)
        optimiser.zero_grad()
        loss = made.loss(torch.cat([first, -first], 1), 2, generator)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    drawn = made.eval().generate_patches(2, 5, steps=4, generator=1)
    assert drawn.shape == (5, 2, 1) and torch.equal(drawn, made.generate_patches(2, 5, steps=4, generator=1))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="patches must be at least 1, got 0"):
        JointLayout(0, 1)
    with pytest.raises(ValueError, match="levels must be at least 1"):
        shaken().loss(torch.randn(1, 2, 3), 0)
    with pytest.raises(ValueError, match="x must be"):
        shaken()(torch.randn(1, 2, 3), torch.randn(1, 3, 1, 3), torch.rand(1, 3, 1))
    with pytest.raises(ValueError, match="objective must be one of"):
        JointNoiseDecoder(backbone(), 3, "score")
    with pytest.raises(ValueError, match="count and num_samples must be at least 1"):
        shaken().generate_patches(0)
