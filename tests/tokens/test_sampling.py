"""Exact sampling: laws against listing every segmentation, both samplers against each other, numerics at length."""

import math

import numpy as np
import pytest

from danlu.kernels import lattice
from danlu.kernels.viterbi import empty_ring
from danlu.tokens.bytepiece import BytePiece
from danlu.tokens.sampling import Sampler, random_states
from danlu.tokens.vocabulary import Vocabulary
from reference import unigram_dense as dense

DRAWS = 20_000


def _scores(tokenizer: BytePiece) -> dict[bytes, float]:
    return dict(zip(tokenizer.vocabulary.pieces, tokenizer.vocabulary.scores.tolist(), strict=True))


def _pieces(tokenizer: BytePiece, ids) -> tuple[bytes, ...]:
    return tuple(tokenizer.decode_bytes([i]) for i in ids)


def _by_viterbi_sampling(tokenizer: BytePiece, data: bytes, alpha: float, count: int, logs: bool = False):
    """Frequencies under the one-pass sampler, on weights or in the log domain."""
    sampler = Sampler(tokenizer.engine, alpha)
    sampler._on_weights = not logs
    texts = np.frombuffer(data * count, np.uint8)
    offsets = np.arange(count + 1) * len(data)
    out, counts = sampler.segment_batch(texts, offsets, random_states(5, count), 1)
    found: dict[tuple[bytes, ...], int] = {}
    for i in range(count):
        ids = out[offsets[i] + i :][: counts[i]] + 3
        path = _pieces(tokenizer, ids.tolist())
        found[path] = found.get(path, 0) + 1
    return found


def _by_filtering(tokenizer: BytePiece, data: bytes, alpha: float, count: int):
    found: dict[tuple[bytes, ...], int] = {}
    for ids in tokenizer.segmentations(data, alpha).sample(count, seed=11):
        path = _pieces(tokenizer, ids)
        found[path] = found.get(path, 0) + 1
    return found


def _normal(statistic: float, freedom: int) -> float:
    """A chi-square statistic as a standard normal one (Wilson and Hilferty)."""
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def _deviation(found, law) -> float:
    """Chi-square of frequencies against a law, as a standard normal number; rare paths are one cell."""
    count = sum(found.values())
    assert set(found) <= set(law)
    common = [path for path, probability in law.items() if probability * count >= 8]
    cells = [(found.get(path, 0), law[path] * count) for path in common]
    seen, expected = count - sum(o for o, _ in cells), count - sum(e for _, e in cells)
    if expected >= 8:
        cells.append((seen, expected))
    return _normal(sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1) if len(cells) > 1 else 0.0


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("draw", [_by_viterbi_sampling, _by_filtering])
def test_frequencies_follow_the_law(lattices, draw, alpha):
    deviations = []
    for tokenizer, data in lattices:
        law = dense.law(data, _scores(tokenizer), alpha)
        deviations.append(_deviation(draw(tokenizer, data, alpha, DRAWS // 4), law))
    # Twenty statistics that are about standard normal, all with a fixed seed.
    assert max(deviations) < 4
    assert abs(float(np.mean(deviations))) < 4 / math.sqrt(len(deviations))


def test_the_published_form_in_the_log_domain_has_the_same_law(lattices):
    for tokenizer, data in lattices[:6]:
        law = dense.law(data, _scores(tokenizer), 0.3)
        assert _deviation(_by_viterbi_sampling(tokenizer, data, 0.3, DRAWS // 4, logs=True), law) < 4


def test_both_samplers_agree_in_distribution(lattices):
    for tokenizer, data in lattices:
        one = _by_viterbi_sampling(tokenizer, data, 0.3, DRAWS // 4)
        two = _by_filtering(tokenizer, data, 0.3, DRAWS // 4)
        # Chi-square test of homogeneity over the paths that are frequent enough.
        pairs = [(one.get(path, 0), two.get(path, 0)) for path in {*one, *two}]
        pairs = [(a, b) for a, b in pairs if a + b >= 16]
        statistic = sum((a - b) ** 2 / (a + b) for a, b in pairs)
        assert len(pairs) < 2 or _normal(statistic, len(pairs) - 1) < 4


@pytest.fixture(scope="module")
def watching() -> tuple[BytePiece, bytes]:
    """Three segmentations of equal score and, at this alpha, nothing else."""
    words = {b"watch": 10**6, b"ing": 10**6, b"wat": 10**6, b"ching": 10**6, b"w": 10**6, b"atching": 10**6}
    return BytePiece(Vocabulary.sorted({**{bytes([i]): 1 for i in range(256)}, **words}.items())), b"watching"


@pytest.mark.parametrize("draw", [_by_viterbi_sampling, _by_filtering])
def test_three_equal_segmentations_come_equally_often(watching, draw):
    tokenizer, data = watching
    found = draw(tokenizer, data, 3.0, 30_000)
    assert len(found) == 3
    deviation = math.sqrt(30_000 * 2 / 9)
    assert all(abs(count - 10_000) < 4 * deviation for count in found.values())


def test_log_partition_entropy_and_marginals_equal_the_listing(lattices):
    for tokenizer, data in lattices:
        for alpha in (0.0, 0.3, 1.0):
            scores = _scores(tokenizer)
            law = dense.law(data, scores, alpha)
            made = tokenizer.segmentations(data, alpha)
            assert made.log_partition == pytest.approx(dense.log_partition(data, scores, alpha), abs=1e-10)
            assert made.entropy == pytest.approx(-sum(p * math.log(p) for p in law.values()), abs=1e-9)
            expected = np.zeros(len(data) + 1)
            for path, probability in law.items():
                ends = np.cumsum([0, *map(len, path)])
                expected[ends] += probability
            assert np.allclose(made.boundary_marginals, expected, atol=1e-10, rtol=0)
            for path, probability in list(law.items())[:50]:
                ids = [tokenizer.encode(piece)[0] for piece in path]
                if _pieces(tokenizer, ids) == path:
                    assert made.log_prob(ids) == pytest.approx(math.log(probability), abs=1e-9)


def test_forward_and_backward_agree(tokenizer):
    text = "watching the weather of an abababab aaaaaaa 天气 né " * 40
    data, alpha, engine = tokenizer.to_array(text), 0.7, tokenizer.engine
    expected = tokenizer.segmentations(text, alpha).log_partition
    assert Sampler(engine, alpha).segment(data, random_states(0, 1))[1] == pytest.approx(expected, rel=1e-12)
    out = np.empty(data.size + 1, np.int32)
    trie, place = (engine.links, engine.unit_scores), (engine.ended,)
    scratch = (empty_ring(engine.longest), random_states(0, 1), out)
    _, total = lattice.sample_log(data, 0, data.size, *trie, alpha, *place, *scratch)
    assert total == pytest.approx(expected, rel=1e-12)


def test_log_partition_of_a_million_letters_has_a_closed_form(watching):
    # Z_n = x Z_{n-1} + y Z_{n-2} with x = exp(alpha s_a), y = exp(alpha s_aa): a linear recurrence.
    n, alpha = 10**6, 0.4
    words = {b"a": 7000, b"aa": 900}
    tokenizer = BytePiece(Vocabulary.sorted({**{bytes([i]): 1 for i in range(256)}, **words}.items()))
    scores = _scores(tokenizer)
    x, y = math.exp(alpha * scores[b"a"]), math.exp(alpha * scores[b"aa"])
    root = math.sqrt(x * x + 4 * y)
    high, low = (x + root) / 2, (x - root) / 2
    # Z_n = (high^(n+1) - low^(n+1)) / (high - low), and low^n vanishes.
    expected = (n + 1) * math.log(high) - math.log(high - low)
    data = np.full(n, ord("a"), np.uint8)
    _, log_total = Sampler(tokenizer.engine, alpha).segment(data, random_states(0, 1))
    assert log_total == pytest.approx(expected, rel=1e-12)
    assert tokenizer.segmentations(bytes(data), alpha).log_partition == pytest.approx(expected, rel=1e-12)
    marginals = tokenizer.segmentations(bytes(data), alpha).boundary_marginals
    assert marginals[-1] == 1.0
    # Deep inside the text every boundary is as likely as any other.
    assert np.ptp(marginals[1000 : n - 1000]) < 1e-11


def test_large_alpha_is_the_best_segmentation(tokenizer):
    rng = np.random.default_rng(0)
    words = ["the", " of", "watching", "abab", "aaaa", "né", "天气", "  ", "ing", ".\n"]
    for i in range(300):
        text = "".join(rng.choice(words, 6))
        made = tokenizer.segmentations(text, 200.0)
        best = tokenizer.encode(text)
        drawn = tokenizer.encode(text, alpha=200.0, seed=i)
        if drawn != best:  # only by a tie
            assert made.log_prob(drawn) == pytest.approx(made.log_prob(best), abs=1e-6)
        assert tokenizer.encode(text, alpha=math.inf) == best


def test_every_alpha_gives_the_text_back(tokenizer):
    text = "watching the weather 天气 of né\n\nabababab\naaaaaaaa " * 20
    for alpha in (0, 0.01, 0.5, 1, 8, 20, 100, 1000, 1e6):
        assert tokenizer.decode(tokenizer.encode(text, alpha=alpha, seed=1)) == text


def test_seeds_repeat_differ_and_do_not_depend_on_threads_or_order(tokenizer):
    texts = ["watching the weather of an abab"] * 50 + ["aaaa " * 30_000]
    one = tokenizer.encode_batch(texts, alpha=0.2, seed=4, threads=1)
    assert one == tokenizer.encode_batch(texts, alpha=0.2, seed=4, threads=3)
    assert one[0] == tokenizer.encode(texts[0], alpha=0.2, seed=4)
    assert one != tokenizer.encode_batch(texts, alpha=0.2, seed=5)
    assert len({tuple(ids) for ids in one[:50]}) > 10  # equal texts of a batch do not share their noise
    seeds = list(range(51))
    ahead = tokenizer.encode_batch(texts, alpha=0.2, seed=seeds)
    back = tokenizer.encode_batch(texts[::-1], alpha=0.2, seed=seeds[::-1])
    assert ahead == back[::-1]
    assert tokenizer.encode(texts[0], alpha=0.2) != tokenizer.encode(texts[-1][:31], alpha=0.2)
    assert len({tuple(tokenizer.encode(texts[0], alpha=0.2)) for _ in range(20)}) > 5


def test_uniform_numbers_are_uniform():
    state = random_states(0, 1)
    drawn = np.array([lattice.uniform(state) for _ in range(50_000)])
    assert 0 < drawn.min() and drawn.max() <= 1
    counts = np.histogram(drawn, 100, (0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 99 + 5 * math.sqrt(198)
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.02


@pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
        (-0.1, ValueError, "alpha must be at least 0 .*, got -0.1"),
        (math.nan, ValueError, "alpha must be at least 0 .*, got nan"),
        ("1", TypeError, "alpha must be a number or None, got '1'"),
        (True, TypeError, "alpha must be a number or None, got True"),
    ],
)
def test_wrong_alpha(tokenizer, alpha, error, message):
    for call in (tokenizer.encode, tokenizer.encode_array, tokenizer.encode_with_offsets):
        with pytest.raises(error, match=message):
            call("a", alpha=alpha)
    with pytest.raises(error, match=message):
        tokenizer.encode_batch(["a"], alpha=alpha)
    with pytest.raises(error, match=message):
        tokenizer.stream(["a"], alpha=alpha)
    with pytest.raises(error, match=message):
        tokenizer.segmentations("a", alpha)


def test_wrong_seeds_and_counts(tokenizer):
    with pytest.raises(ValueError, match=r"seed must be in 0..2\*\*64 - 1, got -1"):
        tokenizer.encode("a", alpha=1, seed=-1)
    with pytest.raises(TypeError, match="seed must be an integer, got 1.5"):
        tokenizer.encode_batch(["a"], alpha=1, seed=[1.5])
    with pytest.raises(ValueError, match="seed must be one integer, or one for each of the 2 texts, got 3"):
        tokenizer.encode_batch(["a", "b"], alpha=1, seed=[1, 2, 3])
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        tokenizer.segmentations("a", 1.0).sample(0)
    with pytest.raises(ValueError, match="alpha must be finite here, got inf"):
        tokenizer.segmentations("a", math.inf)
