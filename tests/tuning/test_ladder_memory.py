import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from danlu.lab.backward_memory import SavedForBackward
from danlu.tuning.ladder.model import LadderConfig, LadderModel

D, DEPTH, LENGTH = 128, 8, 256


def backbone(vocabulary=64):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, hidden_size=D, intermediate_size=384, num_hidden_layers=DEPTH,
                    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH)
    )  # fmt: skip


def saved(model, **inputs):
    model.train()
    with SavedForBackward(model) as counter:
        loss = model(**inputs).loss
    loss.backward()
    return counter.peak


IDS = torch.randint(64, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def test_the_counter_counts_what_is_saved_once():
    layer = torch.nn.Linear(8, 8)
    x = torch.ones(4, 8, requires_grad=True)
    with SavedForBackward(layer) as counter:
        y = layer(x)  # saves x; the weight is the model's own
        z = y * y  # saves y, twice the same storage
    assert counter.peak == 2 * 4 * 8 * 4
    del y, z
    with SavedForBackward(layer) as counter:
        for _ in range(3):
            layer(x).sum().backward()  # one at a time
    assert counter.peak == 4 * 8 * 4


@pytest.mark.parametrize(("layers", "reduction"), [("all", 4), ("all", 8), ("every:3", 8)])
def test_saved_bytes_are_those_of_the_links_and_of_a_narrow_side(layers, reduction):
    full = backbone()
    full.train()
    with SavedForBackward(full) as counter:
        full.model(IDS, use_cache=False).last_hidden_state.sum().backward()
    tokens = IDS.numel()
    per_layer = counter.peak / DEPTH
    model = LadderModel(backbone(), LadderConfig(reduction=reduction, layers=layers, init="random", head="tokens",
                                                 num_labels=2))  # fmt: skip
    linked = len(model.layers)
    mixed = 2 * tokens * D // reduction * 4  # both sides of a learned gate
    expected = (linked + 1) * tokens * D * 4 + linked * (per_layer / reduction + mixed)
    measured = saved(model, input_ids=IDS, labels=IDS % 2)
    assert measured == pytest.approx(expected, rel=0.10)


def test_a_ladder_saves_far_less_than_lora_and_full_tuning():
    bytes_of = {
        "full": saved(backbone(), input_ids=IDS, labels=IDS, use_cache=False),
        "lora": saved(
            get_peft_model(backbone(), LoraConfig(r=8, target_modules=["q_proj", "v_proj"])),
            input_ids=IDS, labels=IDS, use_cache=False,
        ),
        "ladder": saved(LadderModel(backbone(), LadderConfig(init="random")), input_ids=IDS, labels=IDS),
    }  # fmt: skip
    assert bytes_of["ladder"] < 0.3 * bytes_of["full"]
    assert bytes_of["ladder"] < 0.4 * bytes_of["lora"]


def test_a_large_vocabulary_costs_a_ladder_no_memory():
    sizes = [
        saved(LadderModel(backbone(vocabulary), LadderConfig(init="random")), input_ids=IDS, labels=IDS)
        for vocabulary in (64, 8192)
    ]
    # at most one chunk of logits in float32 and its softmax
    assert sizes[1] - sizes[0] <= 2 * 4 * (1 << 22)
    lora = saved(backbone(8192), input_ids=IDS, labels=IDS, use_cache=False) - saved(
        backbone(64), input_ids=IDS, labels=IDS, use_cache=False
    )
    assert lora > 4 * IDS.numel() * 8000
