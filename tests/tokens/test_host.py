"""BytePieceTokenizer against the host's own tokenizer, loaded by AutoTokenizer from the folder that ours saved."""

import copy
import inspect
import json
import math
import multiprocessing
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from danlu.tokens.bytepiece import BytePiece
from danlu.tokens.host import BytePieceTokenizer
from danlu.tokens.storage import FILE_NAME
from danlu.tokens.vocabulary import Vocabulary
from reference.tiny import tiny_llama

TEXTS = [
    "the watching of the né 天气 中文天\nthe\n\n\nwatch",
    "",
    "ab",
    "\n\nthe    watching\r\n of\u2028 👩‍👧 \x00 é",
    "the<eos>watch<bos>\n<bos> the <pad>",
    "a" * 90 + " the" * 30,
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<eos>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EXTRA = ("<|user|>", "<|assistant|>")


@pytest.fixture(scope="module")
def bytepiece(tokenizer) -> BytePiece:
    return BytePiece(tokenizer.vocabulary, special_tokens=("<pad>", "<bos>", "<eos>", *EXTRA))


@pytest.fixture
def pair(bytepiece, tmp_path):
    """Ours and the host's."""
    ours = bytepiece.to_transformers(model_max_length=200, chat_template=TEMPLATE)
    ours.save_pretrained(tmp_path / "saved")
    return ours, AutoTokenizer.from_pretrained(tmp_path / "saved")


def _all_of(encoded) -> dict:
    """Everything a BatchEncoding holds or can say, as plain values."""
    found = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in encoded.items()}
    for i, each in enumerate(encoded.encodings):
        found[i] = (
            each.ids, each.tokens, each.offsets, each.type_ids, each.special_tokens_mask, each.attention_mask,
            each.word_ids, each.sequence_ids, [over.ids for over in each.overflowing], each.n_sequences, len(each),
            [encoded.char_to_token(i, k) for k in range(12)],
            [encoded.token_to_chars(i, k) for k in range(len(each))],
        )  # fmt: skip
    return found


def _assert_same(pair, *args, **options):
    ours, theirs = (_all_of(each(*args, **options)) for each in pair)
    assert ours == theirs
    # What sampling uses, with nothing to draw.
    assert _all_of(pair[0](*args, alpha=math.inf, **options)) == theirs


RICH = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "return_length": True} | {
    "return_token_type_ids": True
}
OPTIONS = [
    {},
    {"padding": True},
    {"padding": "max_length", "max_length": 40},
    {"padding": True, "padding_side": "left", "pad_to_multiple_of": 8},
    {"padding": "max_length", "max_length": 13, "truncation": True, "return_tensors": "pt"},
    {"truncation": True, "max_length": 7},
    {"truncation": "only_first", "max_length": 7, "padding": True, "padding_side": "left"},
    {"truncation": True, "max_length": 11, "stride": 2, "return_overflowing_tokens": True},
    {"truncation": True, "max_length": 6, "return_overflowing_tokens": True, "padding": True},
    {"add_special_tokens": False},
    {"split_special_tokens": True},
    {"return_attention_mask": False},
]


@pytest.mark.parametrize("frame", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_texts_batches_pairs_and_words_are_encoded_as_by_the_host(pair, options, frame):
    for each in pair:
        for name, value in frame.items():
            setattr(each, name, value)
    for more in ({}, RICH):
        options = options | more
        _assert_same(pair, TEXTS, **options)
        for text in TEXTS[:5]:
            _assert_same(pair, text, **options)
        if options.get("truncation") != "only_first":
            _assert_same(pair, TEXTS[2:5], TEXTS[3:6], **options)
            _assert_same(pair, TEXTS[0], TEXTS[3], **options)
        words = [["the", "watching é\n", " of", "<eos>", "", "né"], ["天气"], ["a", "b"]]
        _assert_same(pair, words, is_split_into_words=True, **options)
        _assert_same(pair, words[0], is_split_into_words=True, **options)
        if options.get("truncation") != "only_first":
            _assert_same(pair, words[:2], words[1:], is_split_into_words=True, **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_both_sides_of_truncation(pair, side):
    for each in pair:
        each.truncation_side, each.add_bos_token = side, True
    for options in ({"max_length": 5}, {"max_length": 1}, {"max_length": 6, "padding": True}):
        _assert_same(pair, TEXTS, truncation=True, **options)


def test_other_frames_of_the_host(pair):
    around = processors.TemplateProcessing(
        single="<bos> $A:1 <eos>:1 $A", pair="$A $B", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    roberta = processors.RobertaProcessing(("<eos>", 2), ("<bos>", 1), trim_offsets=False, add_prefix_space=False)
    for frame in (around, roberta):
        for each in pair:
            each.backend_tokenizer.post_processor = frame
        _assert_same(pair, TEXTS, **RICH)
        _assert_same(pair, TEXTS, padding=True, truncation=True, max_length=12, **RICH)


def test_the_engine_does_the_plain_work(pair, monkeypatch):
    # Guards the speed: neither the host's model nor its full encoding may be touched for ids alone.
    ours, theirs = pair
    want = [
        each.data
        for each in (theirs(TEXTS[0]), theirs(TEXTS, padding=True), theirs(TEXTS, truncation=True, max_length=9))
    ]
    monkeypatch.setattr("danlu.tokens.backend.Backend.encoding", None)
    ours.backend_tokenizer.model = type(ours.backend_tokenizer.model)([("x", 0.0)])
    got = [
        each.data for each in (ours(TEXTS[0]), ours(TEXTS, padding=True), ours(TEXTS, truncation=True, max_length=9))
    ]
    assert got == want


def test_added_tokens_of_every_kind_are_found_as_by_the_host(pair):
    added = []
    for each in pair:
        strips = [AddedToken("of", single_word=True), AddedToken("<s>", lstrip=True)]
        kept = [AddedToken("<r>", rstrip=True, normalized=False), AddedToken("a\nb"), "e\u0302"]
        special = {"mask_token": "<mask>", "cls_token": "né é"}
        added.append(
            [each.add_tokens(["watch", "né", *strips]), each.add_tokens(kept), each.add_special_tokens(special)]
        )
    assert added[0] == added[1]
    assert len(pair[0]) == len(pair[1]) and pair[0].get_vocab() == pair[1].get_vocab()
    rng = random.Random(0)
    parts = [
        "watch",
        "né",
        "of",
        " of ",
        "<s>",
        " \n <s>",
        "<r>",
        "<r>  ",
        "a\nb",
        "ê",
        "<mask>",
        "<eos>",
        " the",
        "\n",
        "é",
    ]
    texts = ["".join(rng.choices(parts, k=9)) for _ in range(60)]
    _assert_same(pair, texts, **RICH)
    _assert_same(pair, texts, split_special_tokens=True)
    assert pair[0](texts, alpha=0.3)["input_ids"] != pair[1](texts)["input_ids"]
    for text, ids in zip(texts, pair[0](texts, alpha=0.3)["input_ids"], strict=True):
        assert pair[0].decode(ids) == pair[1].decode(pair[1](text)["input_ids"])


def test_offsets_cover_all_that_normal_form_joins(pair):
    rng = random.Random(1)
    parts = ["e\u0301", "a\u0323\u0302", "\u1100\u1161", "\u212b", "the", "<eos>", "\n", "天", "e"]
    for each in pair:
        each.add_tokens(["né", "é"])
    for _ in range(60):
        text = "".join(rng.choices(parts, k=8))
        ours, theirs = (each(text, return_offsets_mapping=True) for each in pair)
        assert ours["input_ids"] == theirs["input_ids"], text
        covered = np.zeros(len(text), bool)
        for (a, b), (c, d) in zip(ours["offset_mapping"], theirs["offset_mapping"], strict=True):
            assert a <= c and b >= d  # the host's show where a joined character begins, ours all of it
            covered[a:b] = True
        assert covered.all(), text
    text = "the e\u0301"
    got = pair[0](text, return_offsets_mapping=True)
    assert got["offset_mapping"][-1] == (4, 6) and got.char_to_token(5) == len(got["input_ids"]) - 1


def test_chat(pair):
    chat = [{"role": "user", "content": "the<eos>"}, {"role": "assistant", "content": "watching 天"}]
    for options in (
        {},
        {"add_generation_prompt": True},
        {"return_tensors": "pt"},
        {"return_assistant_tokens_mask": True},
    ):
        ours, theirs = (each.apply_chat_template(chat, **options) for each in pair)
        assert str(dict(ours)) == str(dict(theirs)), options
    assert sum(ours["assistant_masks"]) > 1
    ours, theirs = (each.apply_chat_template([chat, chat[:1]], padding=True) for each in pair)
    assert dict(ours) == dict(theirs)
    sampled = pair[0].apply_chat_template(chat, tokenizer_kwargs={"alpha": 0.0, "seed": 1})["input_ids"]
    assert sampled != theirs["input_ids"][0] and pair[0].decode(sampled) == pair[1].decode(theirs["input_ids"][0])


def test_sanitized_chats_are_not_sampled(pair):
    chat = [{"role": "user", "content": "the<eos>\nwatching"}]
    if "sanitize_control_tokens" not in inspect.signature(pair[1].apply_chat_template).parameters:
        pytest.skip("this host does not sanitize")
    theirs = pair[1].apply_chat_template(chat, sanitize_control_tokens=True)["input_ids"]
    assert pair[0].apply_chat_template(chat, sanitize_control_tokens=True)["input_ids"] == theirs
    pair[0].alpha = 0.1
    with pytest.raises(ValueError, match="sanitize_control_tokens"):
        pair[0].apply_chat_template(chat, sanitize_control_tokens=True)


def test_the_rest_of_the_interface(pair):
    ours, theirs = pair
    ids = ours(TEXTS)["input_ids"]
    assert ours.batch_decode(ids) == theirs.batch_decode(ids)
    assert ours.batch_decode(ids, skip_special_tokens=True) == theirs.batch_decode(ids, skip_special_tokens=True)
    assert ours.decode(ids[0]) == TEXTS[0] == ours.decode([1, *ids[0], 2], skip_special_tokens=True)
    names = ours.convert_ids_to_tokens(ids[4])
    assert names == theirs.convert_ids_to_tokens(ids[4]) == ours.tokenize(TEXTS[4])
    assert ours.convert_tokens_to_ids(names) == ids[4] == ours.encode(TEXTS[4])
    assert len(ours) == len(theirs) == ours.bytepiece.vocab_size
    assert ours.vocab_size == theirs.vocab_size
    assert (ours.pad_token_id, ours.bos_token_id, ours.eos_token_id) == (0, 1, 2)
    assert ours.all_special_tokens == theirs.all_special_tokens and ours.extra_special_tokens == list(EXTRA)
    assert ours(TEXTS[0], text_target=TEXTS[3]).data == theirs(TEXTS[0], text_target=TEXTS[3]).data
    assert ours.pad(ours(TEXTS), return_tensors="pt")["input_ids"].shape == (6, max(map(len, ids)))
    assert ours.num_special_tokens_to_add() == 0 and ours.is_fast and ours.padding_side == "right"


# Sampling


def test_a_seed_gives_what_the_tokenizer_inside_gives(pair, bytepiece):
    ours = pair[0]
    texts = [text for text in TEXTS if "<" not in text]
    assert ours(texts, alpha=0.2, seed=7)["input_ids"] == bytepiece.encode_batch(texts, alpha=0.2, seed=7)
    seeds = [5, 6, 7, 8, 2**64 - 1]
    assert ours(texts, alpha=0.2, seed=seeds)["input_ids"] == bytepiece.encode_batch(texts, alpha=0.2, seed=seeds)
    assert ours(texts[0], alpha=0.2, seed=7)["input_ids"] == bytepiece.encode(texts[0], alpha=0.2, seed=7)
    assert ours.encode(texts[0], alpha=0.2, seed=7) == bytepiece.encode(texts[0], alpha=0.2, seed=7)
    ours.alpha = 0.2
    assert ours(texts, seed=7)["input_ids"] == bytepiece.encode_batch(texts, alpha=0.2, seed=7)
    assert ours(texts, alpha=math.inf)["input_ids"] == bytepiece.encode_batch(texts)
    assert ours(texts, alpha=0, seed=7)["input_ids"] == bytepiece.encode_batch(texts, alpha=0, seed=7)


@pytest.mark.parametrize("kind", ["texts", "special", "pairs", "words"])
def test_sampled_rows_are_whole_fresh_and_independent(pair, kind):
    ours, theirs = pair
    text = "the watching of the né 天气" * 4
    one = {"texts": text, "special": f"{text}<eos>{text}<eos>{text}", "pairs": text, "words": [text] * 3}[kind]
    options = {"is_split_into_words": kind == "words", "return_offsets_mapping": kind != "texts"}
    batch = [[one] * 20, [one] * 20] if kind == "pairs" else [[one] * 20]
    drawn = ours(*batch, alpha=0.0, **options)
    assert len({tuple(ids) for ids in drawn["input_ids"]}) == 20
    assert ours(*batch, alpha=0.0, **options)["input_ids"] != drawn["input_ids"]
    assert (
        ours(*batch, alpha=0.0, seed=1, **options)["input_ids"]
        == ours(*batch, alpha=0.0, seed=1, **options)["input_ids"]
    )
    want = theirs(*[rows[:1] for rows in batch], **options)["input_ids"][0]
    assert {theirs.decode(ids) for ids in drawn["input_ids"]} == {theirs.decode(want)}
    if kind == "texts":
        return
    for i, ids in enumerate(drawn["input_ids"]):
        if kind != "pairs":  # the parts of a row have noise of their own
            ends = [
                k
                for k, span in enumerate(drawn["offset_mapping"][i])
                if (span[0] == 0 if kind == "words" else ids[k] == 2)
            ]
            parts = [tuple(part.tolist()) for part in np.split(np.array(ids), ends)]
            assert len({part[part[0] == 2 :] for part in parts if part}) == 3
        for token, span in zip(ids, drawn["offset_mapping"][i], strict=True):
            source = text if kind != "special" else one
            assert ours.decode([token]).strip("�") in source[slice(*span)]


def test_sampled_rows_can_be_cut_and_padded(pair):
    ours = pair[0]
    ours.add_bos_token = True
    options = dict(alpha=0.1, seed=3, truncation=True, max_length=9, padding=True)
    plain = ours(TEXTS, **options)
    rich = ours(TEXTS, return_overflowing_tokens=True, stride=2, **options)
    first = [rich["overflow_to_sample_mapping"].index(i) for i in range(len(TEXTS))]
    assert [rich["input_ids"][i] for i in first] == plain["input_ids"]
    assert plain[0].ids == plain["input_ids"][0] and len(plain.tokens(0)) == 9 and plain[0].offsets[1][0] == 0
    assert ours.convert_tokens_to_ids(plain.tokens(0)) == plain["input_ids"][0]


def test_the_draws_have_the_law_they_should(pair, bytepiece):
    text, alpha, n = "watching", 0.7, 4000
    table = bytepiece.segmentations(text, alpha)
    drawn = pair[0]([text] * n, alpha=alpha, seed=11)["input_ids"]
    counts = {ids: drawn.count(list(ids)) for ids in map(tuple, drawn)}
    for ids, count in counts.items():
        p = math.exp(table.log_prob(list(ids)))
        assert abs(count - n * p) < 5 * math.sqrt(n * p * (1 - p)) + 1


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"alpha": -1}, ValueError, "alpha must be at least 0"),
        ({"alpha": "x"}, TypeError, "alpha"),
        ({"alpha": 0.1, "seed": -1}, ValueError, "seed"),
        ({"alpha": 0.1, "seed": [1, 2, 3]}, ValueError, "each of the 1 texts, got 3"),
    ],
)
def test_bad_sampling_is_refused(pair, options, error, match):
    with pytest.raises(error, match=match):
        pair[0]("the", **options)
    if "seed" not in options:
        with pytest.raises(error, match=match):
            pair[0].alpha = options["alpha"]


# Files and copies


def test_the_folder_is_read_by_both(pair, tmp_path, bytepiece):
    ours, theirs = pair
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", FILE_NAME,
    }  # fmt: skip
    assert not isinstance(theirs, BytePieceTokenizer)
    assert (
        json.loads((tmp_path / "saved/tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
    assert list(theirs("the")) == list(ours("the")) == ["input_ids", "attention_mask"]
    again = BytePieceTokenizer.from_pretrained(tmp_path / "saved", alpha=0.5)
    assert again.bytepiece == bytepiece and again.alpha == 0.5
    assert (again.model_max_length, again.chat_template) == (200, TEMPLATE)
    again.alpha = None
    again.add_tokens(["watch"])
    again.add_eos_token = True
    again.save_pretrained(tmp_path / "again")
    third, host = (each.from_pretrained(tmp_path / "again") for each in (BytePieceTokenizer, AutoTokenizer))
    assert third(TEXTS)["input_ids"] == again(TEXTS)["input_ids"] == host(TEXTS)["input_ids"]
    assert third("watch")["input_ids"] == [bytepiece.vocabulary.pieces.index(b"watch") + 3, 2]
    assert [path.read_bytes() for path in sorted((tmp_path / "again").iterdir())] == [
        path.read_bytes() for path in sorted(_saved(third, tmp_path / "third").iterdir())
    ]
    host.save_pretrained(tmp_path / "host")
    assert AutoTokenizer.from_pretrained(tmp_path / "host")(TEXTS)["input_ids"] == again(TEXTS)["input_ids"]


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def test_the_host_alone_reads_the_folder(pair, tmp_path):
    code = (
        "import sys, json; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1]); "
        "assert not any(m.startswith('danlu') for m in sys.modules); print(json.dumps(t(sys.argv[2])['input_ids']))"
    )
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "saved", TEXTS[0]], capture_output=True, check=True)
    assert json.loads(out.stdout) == pair[0](TEXTS[0])["input_ids"]


def test_a_bytepiece_file_alone_is_enough(tokenizer, tmp_path):
    tokenizer.save(tmp_path / FILE_NAME)
    tokenizer.save(tmp_path / "published.model")
    for place in (tmp_path, tmp_path / "published.model"):
        assert BytePieceTokenizer.from_pretrained(place)(TEXTS[0])["input_ids"] == tokenizer.encode(TEXTS[0])


def test_wrong_folders_and_arguments_say_what_to_do(pair, tmp_path):
    pair[1].save_pretrained(tmp_path / "host")
    with pytest.raises(ValueError, match=f"bytepiece must be given, or a folder that holds {FILE_NAME}"):
        BytePieceTokenizer.from_pretrained(tmp_path / "host")
    with pytest.raises(ValueError, match="bytepiece must be given"):
        BytePieceTokenizer()
    with pytest.raises(TypeError, match="bytepiece must be a BytePiece, got 'x' of type str"):
        BytePieceTokenizer("x")
    other = BytePiece(Vocabulary.sorted([(bytes([i]), 2) for i in range(256)] + [(b"other", 9)]))
    other.save(tmp_path / "host" / FILE_NAME)
    with pytest.raises(ValueError, match="must be of one vocabulary"):
        BytePieceTokenizer.from_pretrained(tmp_path / "host")
    with pytest.raises(NotImplementedError, match="BytePiece.train"):
        pair[0].train_new_from_iterator([["the"]], 300)
    for wrong in ([1], [("a", "b", "c")], [("a", 1)]):
        with pytest.raises((TypeError, ValueError), match="text"):
            pair[0](wrong)
    with pytest.raises(TypeError, match="text must be a list of words"):
        pair[0]([["a", 1]], is_split_into_words=True)
    with pytest.raises(ValueError, match="lone surrogate"):
        pair[0]("a\ud800")


def test_copies_and_pickles_do_the_same(pair):
    ours = pair[0]
    ours.add_tokens(["watch it"])
    ours.alpha = 0.3
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.copy(ours)):
        assert other(TEXTS, seed=1)["input_ids"] == ours(TEXTS, seed=1)["input_ids"]
        assert other("watch it", alpha=math.inf)["input_ids"] == ours("watch it", alpha=math.inf)["input_ids"]
    encoded = ours(TEXTS, seed=1)
    again = pickle.loads(pickle.dumps(encoded))
    assert again.data == encoded.data and _all_of(again) == _all_of(encoded)


def _encode(job):
    tokenizer, seed = job
    return tokenizer(["the watching of the né 天气" * 9] * 3, alpha=0.0, seed=seed)["input_ids"]


def test_other_processes_draw_the_same_with_a_seed_and_fresh_without(pair):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seeded = pool.map(_encode, [(pair[0], 4)])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        fresh = pool.map(_encode, [(pair[0], None)] * 4, chunksize=1)
    assert seeded == [_encode((pair[0], 4))]
    assert len({tuple(ids) for batch in fresh for ids in batch}) == 12


def test_datasets_map(pair):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": TEXTS})
    out = data.map(lambda rows: pair[0](rows["text"]), batched=True, num_proc=2)
    assert out["input_ids"] == pair[1](TEXTS)["input_ids"]


def test_trainer(pair, tmp_path):
    ours = pair[0]
    ours.alpha = 0.2

    class Texts(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return ours("the watching of the né 天气" * (1 + index % 3), truncation=True, max_length=48)

    model = tiny_llama(vocab_size=len(ours), hidden_size=64, num_hidden_layers=2)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no"
    )
    collator = DataCollatorForLanguageModeling(ours, mlm=False)
    trainer = Trainer(model, arguments, train_dataset=Texts(), data_collator=collator, processing_class=ours)
    assert math.isfinite(trainer.train().training_loss)
    trainer.save_model(str(tmp_path / "out"))
    assert (
        BytePieceTokenizer.from_pretrained(tmp_path / "out")("the")["input_ids"]
        == ours("the", alpha=math.inf)["input_ids"]
    )


def test_published_models_are_the_same_in_both(published, tmp_path):
    text = "Ça va — the quick brown fox 天气很好 Добрый день\n    return x  \n\n" * 20
    for path in list(published.values())[-2:]:
        ours = BytePieceTokenizer.from_pretrained(path)
        ours.save_pretrained(tmp_path / path.stem)
        _assert_same((ours, AutoTokenizer.from_pretrained(tmp_path / path.stem)), [text, text[7:]], **RICH)


def test_a_piece_that_is_written_like_a_reserved_token(tmp_path):
    counts = {**{bytes([i]): 2 for i in range(256)}, b"<pad>": 500, b"<bos>": 80, b"the": 90}
    made = BytePiece(Vocabulary.sorted(counts.items()))
    hosted = made.to_transformers()
    assert (hosted.pad_token, hosted.bos_token, hosted.eos_token) == ("<|pad|>", "<|bos|>", "<eos>")
    assert (hosted.pad_token_id, hosted.bos_token_id, hosted.eos_token_id) == (0, 1, 2)
    text = "the <pad> and <bos>the"
    hosted.save_pretrained(tmp_path)
    for tokenizer in (hosted, AutoTokenizer.from_pretrained(tmp_path), BytePieceTokenizer.from_pretrained(tmp_path)):
        assert tokenizer(text)["input_ids"] == made.encode(text)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
