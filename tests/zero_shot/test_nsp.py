"""Next-sentence classification: scores against the host's own, ranking, batching, prompts, refusals, the pipeline."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import transformers

import danlu.zero_shot
from danlu.zero_shot import TASK, TEMPLATES, NSPClassifier, fill_blank, two_stage
from danlu.zero_shot.inside import soft_row
from danlu.zero_shot.scorer import Row, cut_longest
from reference.nsp_host import bert, texts, tokenizer

LABELS = ["w1 w2", "w3", "w4 w5 w6"]


@pytest.fixture(scope="module")
def host():
    return bert(), tokenizer()


@pytest.fixture(scope="module")
def classifier(host):
    return NSPClassifier(*host)


def hosts_logits(model, tokenizer, first, second, **options):
    """One pair at a time through the host's tokenizer and head."""
    rows = []
    with torch.no_grad():
        for a, b in zip(first, second, strict=True):
            rows.append(model(**tokenizer(a, b, return_tensors="pt", **options)).logits[0])
    return torch.stack(rows)


def watch_rows(classifier, monkeypatch):
    seen = []
    real = classifier.scorer.score_batch
    monkeypatch.setattr(classifier.scorer, "score_batch", lambda rows: seen.append(rows) or real(rows))
    return seen


def alike(found, expected):
    """Equal but for the rounding that the shape of a batch decides."""
    return (
        found["sequence"] == expected["sequence"]
        and found["labels"] == expected["labels"]
        and found["scores"] == pytest.approx(expected["scores"], abs=1e-5)
    )


# --- scores


def test_scores_are_differences_of_the_hosts_logits(host, classifier):
    first, second = texts(30), texts(30, seed=1)
    logits = hosts_logits(*host, first, second)
    scores = classifier.score_pairs(first, second)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, logits[:, 0] - logits[:, 1], atol=1e-5)
    assert torch.allclose(scores.sigmoid(), logits.softmax(-1)[:, 0], atol=1e-6)
    assert scores.std() > 0.1


@pytest.mark.parametrize("budget", [64, 200, 100_000])
def test_results_do_not_depend_on_the_batches(host, classifier, budget, monkeypatch):
    first, second = texts(50, 25), texts(50, 25, seed=1)
    small = NSPClassifier(*host, batch_tokens=budget)
    seen = watch_rows(small, monkeypatch)
    assert torch.allclose(small.score_pairs(first, second), classifier.score_pairs(first, second), atol=1e-5)
    for rows in seen:
        lengths = [len(row.first) + len(row.second) + 3 for row in rows]
        assert len(rows) * max(lengths) <= budget
    assert len(seen) == 1 if budget == 100_000 else len(seen) > 5
    total = sum(len(rows) * max(len(row.first) + len(row.second) + 3 for row in rows) for rows in seen)
    real = sum(len(row.first) + len(row.second) + 3 for rows in seen for row in rows)
    assert budget != 200 or total < 1.2 * real


def test_rows_come_in_chunks_without_loss(classifier, monkeypatch):
    whole = classifier.scores(texts(20), LABELS)
    monkeypatch.setattr("danlu.zero_shot.scorer._CHUNK", 7)
    assert torch.allclose(classifier.scores(texts(20), LABELS), whole, atol=1e-5)


def test_rows_are_what_the_tokenizer_writes(host, classifier, monkeypatch):
    model, tokens = host
    first, second = texts(6), texts(6, seed=1)
    seen = []
    monkeypatch.setattr(classifier.scorer, "base", lambda **inputs: seen.append(inputs) or model.base_model(**inputs))
    classifier.scorer.score_batch([Row(*classifier.scorer.encode([a, b])) for a, b in zip(first, second, strict=True)])
    wanted = tokens(first, second, padding=True, return_tensors="pt")
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert torch.equal(seen[0][name], wanted[name]), name


@pytest.mark.parametrize("cut", ["longest_first", "only_first", "only_second"])
def test_long_pairs_are_cut_as_the_tokenizer_does(host, cut, monkeypatch):
    first, second = texts(40, 30), texts(40, 30, seed=1)
    short = NSPClassifier(*host, max_length=36)
    pairs = [
        (a, b)
        for a, b in zip(first, second, strict=True)
        if (cut != "only_first" or len(b.split()) < 30) and (cut != "only_second" or len(a.split()) < 30)
    ]
    first, second = zip(*pairs, strict=True)
    logits = hosts_logits(*host, first, second, truncation=cut, max_length=36)
    scores = short.score_pairs(first, second, truncate=cut)
    assert torch.allclose(scores, logits[:, 0] - logits[:, 1], atol=1e-5)
    assert any(len(a.split()) + len(b.split()) > 33 for a, b in pairs)


def test_longest_first_cuts_add_up():
    for first in range(1, 9):
        for second in range(1, 9):
            a, b = cut_longest(first, second, 7)
            assert 1 <= a <= first and 1 <= b <= second and a + b == min(7, first + second)
            assert abs(a - b) <= 1 or a == first or b == second


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_head_is_computed_in_float32(dtype, host, classifier, monkeypatch):
    half = NSPClassifier(bert().to(dtype), host[1])
    first, second = texts(20), texts(20, seed=1)
    scores, exact = half.score_pairs(first, second), classifier.score_pairs(first, second)
    assert scores.dtype == torch.float32
    assert (scores - exact).abs().max() < 0.3 * exact.std() + 0.05
    hidden = torch.randn(20, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    monkeypatch.setattr(half.scorer, "base", lambda **inputs: (hidden,))
    pooler, head = half.scorer.pooler.dense, half.scorer.head
    pooled = torch.tanh(hidden[:, 0].float() @ pooler.weight.float().T + pooler.bias.float())
    logits = pooled @ head.weight.float().T + head.bias.float()
    found = half.scorer.score_batch([Row([5], [6])] * 20)
    assert torch.allclose(found, logits[:, 0] - logits[:, 1], atol=1e-6)
    assert pooler.weight.dtype == dtype


def test_training_mode_is_put_back_and_does_not_matter(host, classifier):
    expected = classifier.score_pairs(texts(4), texts(4, seed=1))
    host[0].train()
    assert torch.equal(classifier.score_pairs(texts(4), texts(4, seed=1)), expected)
    assert host[0].training
    host[0].eval()


@pytest.mark.parametrize("kind", ["BertForPreTraining", "ErnieForPreTraining", "MegatronBertForNextSentencePrediction"])
def test_other_heads_and_families(kind, host):
    model = bert(kind)
    found = NSPClassifier(model, host[1]).score_pairs(texts(5), texts(5, seed=1))
    rows = []
    for a, b in zip(texts(5), texts(5, seed=1), strict=True):
        output = model(**host[1](a, b, return_tensors="pt"))
        rows.append(output.seq_relationship_logits[0] if "PreTraining" in kind else output.logits[0])
    logits = torch.stack(rows)
    assert torch.allclose(found, logits[:, 0] - logits[:, 1], atol=1e-5)


def test_a_model_without_a_mask_gets_no_padding(host, monkeypatch):
    model = bert("FNetForNextSentencePrediction", use_tpu_fourier_optimizations=False)
    classifier = NSPClassifier(model, host[1])
    seen = watch_rows(classifier, monkeypatch)
    first, second = texts(12, 6), texts(12, 6, seed=1)
    found = classifier.score_pairs(first, second)
    assert all(len({len(row.first) + len(row.second) for row in rows}) == 1 for rows in seen)
    for a, b, score in zip(first, second, found, strict=True):
        inputs = host[1](a, b, return_tensors="pt")
        logits = model(input_ids=inputs["input_ids"], token_type_ids=inputs["token_type_ids"]).logits[0]
        assert (logits[0] - logits[1]).item() == pytest.approx(score.item(), abs=1e-5)


# --- labels


@pytest.mark.parametrize("position", ["prefix", "suffix"])
def test_a_classification_ranks_label_sentences(host, position):
    classifier = NSPClassifier(*host, template="w9 {} w8", position=position)
    sample = texts(5)
    results = classifier(sample, LABELS)
    for text, result in zip(sample, results, strict=True):
        sentences = [f"w9 {label} w8" for label in LABELS]
        pairs = [(one, text) if position == "prefix" else (text, one) for one in sentences]
        logits = hosts_logits(*host, *zip(*pairs, strict=True))
        scores = logits[:, 0] - logits[:, 1]
        assert result["sequence"] == text
        assert result["labels"] == [LABELS[i] for i in scores.argsort(descending=True)]
        assert result["labels"][0] == LABELS[int(logits.softmax(-1)[:, 0].argmax())]
        assert result["scores"] == pytest.approx(scores.softmax(0).sort(descending=True).values.tolist(), abs=1e-5)
        assert sum(result["scores"]) == pytest.approx(1)
    assert alike(classifier(sample[0], LABELS), results[0])


def test_several_labels_are_told_each_for_itself(classifier):
    result = classifier("w1 w2 w3", LABELS, multi_label=True)
    scores = dict(zip(result["labels"], result["scores"], strict=True))
    raw = classifier.scores(["w1 w2 w3"], LABELS)[0]
    assert [scores[label] for label in LABELS] == pytest.approx(raw.sigmoid().tolist(), abs=1e-6)
    assert classifier("w1 w2 w3", ["w3"], multi_label=True)["labels"] == ["w3"]


def test_permuted_labels_permute_the_scores(classifier):
    order = [2, 0, 1]
    a = classifier.scores(texts(4), LABELS)
    b = classifier.scores(texts(4), [LABELS[i] for i in order])
    assert torch.allclose(a[:, order], b, atol=1e-5)
    assert classifier(texts(4), LABELS)[0]["labels"] == classifier(texts(4), [LABELS[i] for i in order])[0]["labels"]


def test_prefix_and_suffix_are_the_same_inputs_the_other_way_round(classifier):
    prefix = classifier.scores(["w1 w2"], ["w3", "w4"], position="prefix")[0, 0]
    suffix = classifier.scores(["w3"], ["w1 w2", "w4"], position="suffix")[0, 0]
    assert torch.allclose(prefix, suffix, atol=1e-6)


def test_saturated_scores_still_rank(classifier, monkeypatch):
    values = torch.tensor([58.0, 60.0, 59.0])
    assert torch.equal(values.sigmoid(), torch.ones(3))
    monkeypatch.setattr(classifier.scorer, "score", lambda rows, total: values)
    result = classifier("w1", LABELS, multi_label=True)
    assert result["labels"] == [LABELS[1], LABELS[2], LABELS[0]]
    single = classifier("w1", LABELS)
    assert single["labels"] == result["labels"] and single["scores"][0] > single["scores"][1] > single["scores"][2]
    monkeypatch.setattr(classifier.scorer, "score", lambda rows, total: torch.zeros(3))
    assert classifier("w1", LABELS)["labels"] == LABELS


def test_labels_may_have_words_of_their_own(classifier):
    a = classifier("w7 w8", {"good": "w1", "bad": "w2"}, template="w9 {}")
    b = classifier("w7 w8", ["w1", "w2"], template="w9 {}")
    names = {"w1": "good", "w2": "bad"}
    assert a["labels"] == [names[label] for label in b["labels"]] and a["scores"] == b["scores"]


def test_templates_have_names_and_sides(host):
    named = NSPClassifier(*host, template="news-zh")
    assert named.template == ("这是一则{}新闻", "prefix")
    assert NSPClassifier(*host, template="opinion-en").template.position == "suffix"
    assert NSPClassifier(*host, template="opinion-en", position="prefix").template.position == "prefix"
    assert all("{}" in template.text for template in TEMPLATES.values())
    expected = named.scores(["苹果"], ["国", "好"])
    assert torch.equal(NSPClassifier(*host).scores(["苹果"], ["国", "好"], template="news-zh"), expected)


def test_calibration_subtracts_what_a_label_scores_by_itself(classifier):
    sample = texts(3)
    plain = classifier.scores(sample, LABELS)
    neutral = ["w50", "w51 w52"]
    prior = classifier.scores(neutral, LABELS).mean(0)
    assert torch.allclose(classifier.scores(sample, LABELS, calibrate=neutral), plain - prior, atol=1e-6)
    standard = classifier.scores(["N/A", "[MASK]"], LABELS).mean(0)
    assert torch.allclose(classifier.scores(sample, LABELS, calibrate=True), plain - standard, atol=1e-6)
    assert torch.allclose(classifier.prior(LABELS, position="suffix"),
                          classifier.scores(["N/A", "[MASK]"], LABELS, position="suffix").mean(0))  # fmt: skip
    own = classifier.scores(sample, LABELS, calibrate=sample)
    assert torch.allclose(own.mean(0), torch.zeros(3), atol=1e-5)
    assert classifier(sample[0], LABELS, calibrate=True)["labels"][0] == LABELS[int((plain - standard)[0].argmax())]


def test_only_the_text_is_cut_and_a_label_without_room_is_refused(host, monkeypatch):
    short = NSPClassifier(*host, max_length=12)
    seen = watch_rows(short, monkeypatch)
    text = " ".join(f"w{i}" for i in range(30))
    label = "w40 w41 w42 w43 w44"
    short.scores([text], [label, "w1"], position="prefix")
    rows = [row for batch in seen for row in batch]
    encode = short.scorer.encode
    assert [list(rows[0].first), list(rows[0].second)] == encode([label, "w0 w1 w2 w3"])
    seen.clear()
    short.scores([text], [label, "w1"], position="suffix")
    rows = [row for batch in seen for row in batch]
    assert [list(rows[0].first), list(rows[0].second)] == encode(["w0 w1 w2 w3", label])
    with pytest.raises(ValueError, match="leave room for the text in 12 tokens, got one of 9"):
        short.scores([text], [" ".join(f"w{i}" for i in range(9)), "w1"])


def test_candidates_of_each_text_are_ranked(classifier):
    own = [["w1", "w2 w3"], ["w4", "w5", "w6 w7 w8"]]
    results = classifier.rank(["w10 w11", "w12"], own, position="suffix")
    for text, candidates, result in zip(["w10 w11", "w12"], own, results, strict=True):
        scores = classifier.score_pairs([text] * len(candidates), candidates)
        assert result["labels"] == [candidates[i] for i in scores.argsort(descending=True)]
    with pytest.raises(ValueError, match="candidates must be one list for each text"):
        classifier.rank(["w1"], [["w1", "w2"], ["w3", "w4"]])
    assert classifier.rank([], []) == [] == classifier([], LABELS)


# --- inside a text


def test_two_stages_are_two_sentences(host, classifier, monkeypatch):
    seen = watch_rows(classifier, monkeypatch)
    results = two_stage(classifier, ["苹果很好"], ["苹果"], [["国", "买的东西"]])
    rows = [row for batch in seen for row in batch]
    wanted = classifier.scorer.encode(["苹果很好上文中苹果是指", "这个词是指买的东西"])
    assert [list(rows[0].first), list(rows[0].second)] == wanted
    scores = classifier.score_pairs(["苹果很好上文中苹果是指"] * 2, ["这个词是指国", "这个词是指买的东西"])
    assert results[0]["labels"] == [["国", "买的东西"][i] for i in scores.argsort(descending=True)]
    assert results[0]["sequence"] == "苹果很好"


def test_two_stages_cut_the_text_alone(host, monkeypatch):
    short = NSPClassifier(*host, max_length=30)
    seen = watch_rows(short, monkeypatch)
    text = " ".join(f"w{i}" for i in range(40))
    two_stage(short, [text], ["w3"], [["w50", "w51"]], "w55 {text} w56 {mention}", "w57 {}")
    row = seen[0][0]
    assert list(row.first) == short.scorer.encode(["w55 " + " ".join(f"w{i}" for i in range(22)) + " w56 w3"])[0]
    with pytest.raises(ValueError, match="mentions must be words of their texts, got 'w9'"):
        two_stage(short, ["w1"], ["w9"], [["w50", "w51"]])
    with pytest.raises(ValueError, match="mentions must be one for each text"):
        two_stage(short, ["w1"], [], [["w50", "w51"]])
    with pytest.raises(ValueError, match="first_stage must hold"):
        two_stage(short, ["w1"], ["w1"], [["w50", "w51"]], first_stage="{text}")
    with pytest.raises(ValueError, match="template must hold"):
        two_stage(short, ["w1"], ["w1"], [["w50", "w51"]], second_stage="no place")


def test_a_candidate_takes_the_positions_of_the_blank():
    left, right, candidate = [11, 12], [13, 14, 15], [21, 22]
    prefix = soft_row(left, right, candidate, "prefix")
    #                                       CLS  candidate SEP  left   right   SEP
    assert prefix == (candidate, left + right, [0, 4, 5, 1, 2, 3, 6, 7, 8, 9])
    suffix = soft_row(left, right, candidate, "suffix")
    #                                       CLS left  right    SEP candidate SEP
    assert suffix == (left + right, candidate, [0, 1, 2, 5, 6, 7, 8, 3, 4, 9])


@pytest.mark.parametrize("position", ["prefix", "suffix"])
def test_blanks_are_scored_at_their_positions(host, classifier, position):
    text, own = "w1 w2 [BLANK] w3", ["w4", "w5 w6"]
    result = fill_blank(classifier, [text], [own], position=position)[0]
    scores = []
    for candidate in own:
        pair = ("w1 w2 w3", candidate) if position == "suffix" else (candidate, "w1 w2 w3")
        inputs = host[1](*pair, return_tensors="pt")
        n = len(candidate.split())
        if position == "suffix":
            ids = [0, 1, 2, 3 + n, 4 + n, *range(3, 3 + n), 5 + n]
        else:
            ids = [0, *range(4, 4 + n), 1, 2, 3, 4 + n, 5 + n]
        logits = host[0](**inputs, position_ids=torch.tensor([ids])).logits[0]
        scores.append((logits[0] - logits[1]).item())
    best = [own[i] for i in sorted(range(2), key=lambda i: -scores[i])]
    assert result["labels"] == best and result["sequence"] == text
    spread = abs(scores[0] - scores[1])
    assert result["scores"][0] == pytest.approx(1 / (1 + math.exp(-spread)), abs=1e-5)


def test_a_long_text_keeps_what_is_beside_its_blank(host, monkeypatch):
    short = NSPClassifier(*host, max_length=14)
    seen = watch_rows(short, monkeypatch)
    words = [f"w{i}" for i in range(40)]
    for at, kept in ((20, range(15, 25)), (38, range(30, 40)), (1, range(10))):
        seen.clear()
        text = " ".join([*words[:at], "[BLANK]", *words[at:]])
        fill_blank(short, [text], [["w50", "w51"]])
        assert list(seen[0][0].second) == short.scorer.encode([" ".join(words[i] for i in kept)])[0]
        assert max(seen[0][0].positions) == 13
    for bad in ("w1 w2", "[BLANK] w1 [BLANK]", "[BLANK]"):
        with pytest.raises(ValueError, match="text 0 must be words around one"):
            fill_blank(short, [bad], [["w50", "w51"]])


# --- refusals


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["w1"], "labels must be at least 2, got 1"),
        (["w1", "w2", "w1"], "labels must differ, got 'w1' more than once"),
        (["w1", " "], "labels must not be empty"),
        ({"a": "w1", "b": "w1"}, "label words must differ"),
        ("w1,w2", "labels must be a list of strings"),
    ],
)
def test_bad_labels(classifier, labels, message):
    with pytest.raises(ValueError, match=message):
        classifier("w1", labels)


def test_bad_texts_and_settings(host, classifier):
    with pytest.raises(ValueError, match="text 1 must be a string with something in it, got '  '"):
        classifier(["w1", "  "], LABELS)
    with pytest.raises(ValueError, match="text 0 must be a string"):
        classifier([None], LABELS)
    with pytest.raises(ValueError, match="equally many, got 1 and 2"):
        classifier.score_pairs(["w1"], ["w1", "w2"])
    with pytest.raises(ValueError, match="truncate must be longest_first"):
        classifier.score_pairs(["w1"], ["w1"], truncate="right")
    with pytest.raises(ValueError, match=r"template must hold \{\} where the label goes, or be one of news-zh"):
        NSPClassifier(*host, template="no place")
    with pytest.raises(ValueError, match="position must be prefix or suffix, got 'left'"):
        NSPClassifier(*host, position="left")
    with pytest.raises(ValueError, match="batch_tokens must hold a row of 64"):
        NSPClassifier(*host, batch_tokens=10)
    with pytest.raises(ValueError, match="max_length must leave room for two sentences"):
        NSPClassifier(*host, max_length=4)


def test_models_with_another_question_are_refused(host, tmp_path):
    sizes = {"vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    roberta = transformers.RobertaModel(transformers.RobertaConfig(**sizes, intermediate_size=32))
    with pytest.raises(ValueError, match="got roberta: RoBERTa and its kin were trained without one"):
        NSPClassifier(roberta, host[1])
    albert = transformers.AlbertForPreTraining(transformers.AlbertConfig(**sizes, intermediate_size=32))
    with pytest.raises(ValueError, match="got albert: its head tells the right ORDER"):
        NSPClassifier(albert, host[1])
    albert.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="albert"):
        NSPClassifier.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="got BertModel, which has no next-sentence head"):
        NSPClassifier(host[0].bert, host[1])


def test_a_head_that_was_not_in_the_checkpoint_is_refused(host, tmp_path):
    bert("BertForMaskedLM").save_pretrained(tmp_path)
    host[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no trained .*cls.seq_relationship.weight.*random numbers"):
        NSPClassifier.from_pretrained(str(tmp_path))
    silent = transformers.AutoModelForNextSentencePrediction.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no weights for the head or the pooler.*trust_head=True"):
        NSPClassifier(silent, host[1])
    assert NSPClassifier(silent, host[1], trust_head=True)
    with pytest.raises(ValueError, match="trust_head"):
        transformers.pipeline(TASK, model=str(tmp_path), tokenizer=str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="does not exist"):
        NSPClassifier.from_pretrained(str(tmp_path / "none"))


def test_a_tokenizer_of_another_kind_is_refused(host):
    plain = tokenizer()
    plain._tokenizer.post_processor = None
    with pytest.raises(ValueError, match=r"tokenizer must write pairs as \[CLS\] A \[SEP\] B \[SEP\]"):
        NSPClassifier(host[0], plain)


# --- self-test and pipeline


def test_the_self_test_compares_continuations_with_other_sentences(host, classifier, caplog, monkeypatch):
    monkeypatch.setattr(
        "danlu.zero_shot.nsp.PAIRS",
        {"words": tuple((f"w{i}", f"w{i + 20}") for i in range(12)), "Greek": (("αβγ", "δεζ"), ("ηθι", "κλμ"))},
    )
    known = {(f"w{i}", f"w{i + 20}") for i in range(12)}
    calls = []

    def score(first, second, wrong=0, **options):
        calls.append(list(zip(first, second, strict=True)))
        return torch.tensor([1.0 if pair in known and i >= wrong else 0.0 for i, pair in enumerate(calls[-1])])

    monkeypatch.setattr(classifier, "score_pairs", score)
    result = classifier.self_test()
    assert result.accuracy == {"words": 1.0} and result.passed
    assert len(calls[0]) == 24 and not known & set(calls[0][12:])
    with caplog.at_level(logging.WARNING, "danlu.zero_shot"):
        monkeypatch.setattr(classifier, "score_pairs", lambda a, b: score(a, b, wrong=4))
        assert classifier.self_test().accuracy["words"] == pytest.approx(8 / 12)
    assert "67% in words of the pairs; scores of this model may mean nothing" in caplog.text


def test_the_built_in_pairs_are_distinct():
    for pairs in danlu.zero_shot.sentences.PAIRS.values():
        assert len(pairs) == 12
        assert len({sentence for pair in pairs for sentence in pair}) == 24


def test_the_hosts_pipeline(host, classifier, tmp_path):
    host[0].save_pretrained(tmp_path)
    host[1].save_pretrained(tmp_path)
    pipe = transformers.pipeline(TASK, model=str(tmp_path), device="cpu")
    sample = texts(4)
    expected = classifier(sample, LABELS, template="w9 {}", multi_label=True)
    options = {"hypothesis_template": "w9 {}", "multi_label": True}
    found = pipe(sample, candidate_labels=LABELS, **options)
    assert all(map(alike, found, expected))
    assert set(found[0]) == {"sequence", "labels", "scores"}
    assert alike(pipe(sample[0], LABELS, **options), found[0])
    assert all(map(alike, pipe((text for text in sample), candidate_labels=LABELS, **options), found))
    assert alike(pipe(sample[0], "w1 w2, w3, w4 w5 w6", **options), found[0])
    calibrated = pipe(sample[0], LABELS, calibrate=True, position="suffix")
    assert alike(calibrated, classifier(sample[0], LABELS, calibrate=True, position="suffix"))
    fixed = transformers.pipeline(TASK, model=host[0], tokenizer=host[1], candidate_labels=LABELS, device="cpu")
    assert fixed(sample[0])["labels"] == classifier(sample[0], LABELS)["labels"]
    with pytest.raises(ValueError, match="candidate_labels must be given"):
        pipe(sample[0])
    with pytest.raises(ValueError, match="options must be among.*got 'hypotesis'"):
        pipe(sample[0], LABELS, hypotesis="x")


def test_loading_by_name(host, classifier, tmp_path):
    bert("BertForPreTraining").save_pretrained(tmp_path)
    host[1].save_pretrained(tmp_path)
    loaded = NSPClassifier.from_pretrained(str(tmp_path), template="w9 {}", position="suffix", max_length=40)
    assert loaded.template == ("w9 {}", "suffix") and loaded.scorer.max_length == 40
    logits = bert("BertForPreTraining")(**host[1]("w1", "w2", return_tensors="pt")).seq_relationship_logits[0]
    assert float(loaded.score_pairs(["w1"], ["w2"])) == pytest.approx((logits[0] - logits[1]).item(), abs=1e-5)
