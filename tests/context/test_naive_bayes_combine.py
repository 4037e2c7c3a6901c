"""One combination step against the written-out reference, and the identities that the method promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from danlu.context.naive_bayes.combine import Settings, combine, nucleus
from reference import naive_bayes as reference


def rows(contexts: int = 4, vocabulary: int = 50, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(contexts + 1, vocabulary, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("pooling", ["min_entropy", "mean", "max"])
@pytest.mark.parametrize("beta", [-1.0, -0.5, 0.0, 0.25, 3.0])
@pytest.mark.parametrize("top_p", [0.3, 0.95, 1.0])
def test_a_step_is_the_written_out_one(pooling, beta, top_p):
    for seed in range(8):
        logits = rows(seed=seed, scale=(0.3, 1.0, 4.0, 90.0)[seed % 4])
        previous = None if pooling != "min_entropy" else seed % 3
        got = combine(logits, Settings(beta, 0.3, top_p, pooling), previous)
        out, chosen, entropies = reference.step(logits.numpy(), beta, 0.3, top_p, pooling, previous)
        np.testing.assert_allclose(got.scores.numpy(), out, rtol=0, atol=1e-12)
        np.testing.assert_allclose(got.entropies.numpy(), entropies, rtol=0, atol=1e-12)
        assert got.context == chosen


@pytest.mark.parametrize("contexts", [1, 2, 5])
def test_mean_with_beta_n_minus_one_is_the_exact_posterior(contexts):
    """A joint p(T) prod p(S_k | T) over small alphabets, summed out by hand."""
    generator = np.random.default_rng(contexts)
    prior = generator.dirichlet(np.ones(7))
    seen = generator.dirichlet(np.ones(3), size=(contexts, 7))[:, :, 1]  # p(S_k = what was seen | T)
    posterior = prior * seen.prod(0)
    posterior /= posterior.sum()
    single = prior * seen
    single /= single.sum(1, keepdims=True)
    logits = torch.from_numpy(np.log(np.vstack([prior, single])))
    got = combine(logits, Settings(contexts - 1, 0.1, 1.0, "mean"))
    np.testing.assert_allclose(got.scores.softmax(-1).numpy(), posterior, rtol=0, atol=1e-12)


def test_one_context_without_a_cut_is_classifier_free_guidance():
    from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor as Guidance

    logits = rows(1)
    host = Guidance(1.25, None)
    host.get_unconditional_logits = lambda ids: logits[:1, None]
    expected = host(torch.zeros(1, 1, dtype=torch.long), logits[1:])
    torch.testing.assert_close(combine(logits, Settings(0.25, top_p=1.0)).scores, expected[0], rtol=0, atol=1e-12)


def test_beta_zero_is_the_row_and_beta_minus_one_is_the_prior():
    logits = rows(1)
    logs = logits.log_softmax(-1)
    assert torch.equal(combine(logits, Settings(0.0, top_p=1.0)).scores, logs[1])
    assert torch.equal(combine(logits, Settings(-1.0, top_p=1.0)).scores, logs[0])


def test_order_of_contexts_moves_the_choice_and_nothing_else():
    logits, order = rows(5), [0, 3, 5, 1, 4, 2]
    for pooling in ("min_entropy", "mean", "max"):
        first = combine(logits, Settings(pooling=pooling))
        second = combine(logits[order], Settings(pooling=pooling))
        torch.testing.assert_close(first.scores, second.scores, rtol=0, atol=1e-12)
        if pooling == "min_entropy":
            assert order[second.context + 1] == first.context + 1


def test_a_duplicate_and_a_vague_context_change_nothing():
    logits = rows(3)
    first = combine(logits, Settings())
    for more in (logits[1:2], logits[2:3], torch.zeros(1, 50, dtype=torch.float64)):
        again = combine(torch.cat([logits, more]), Settings())
        assert torch.equal(again.scores, first.scores) and again.context == first.context


def test_the_prior_is_never_chosen_even_when_it_is_surest():
    logits = rows(2, scale=0.1)
    logits[0, 7] = 50.0
    assert combine(logits, Settings()).context in (0, 1)


def test_constants_on_rows_change_nothing():
    logits = rows(3)
    moved = logits + torch.tensor([[5.0], [-3.0], [100.0], [0.5]], dtype=torch.float64)
    torch.testing.assert_close(combine(moved, Settings()).scores, combine(logits, Settings()).scores)


def test_staying_needs_a_lead_of_eta_to_be_given_up():
    logits = rows(2)
    entropies = combine(logits, Settings()).entropies
    best = int(entropies.argmin())
    lead = float((entropies[1 - best] - entropies[best]).abs())
    assert combine(logits, Settings(eta=lead * 0.99), 1 - best).context == best
    assert combine(logits, Settings(eta=lead * 1.01), 1 - best).context == 1 - best
    assert combine(logits, Settings(eta=math.inf), 1 - best).context == 1 - best
    assert combine(logits, Settings(eta=0.0), 1 - best).context == best
    assert torch.equal(combine(logits, Settings(eta=9.0), 1 - best).entropies, entropies)


def test_ties_go_to_the_first_context():
    logits = rows(1)
    assert combine(torch.cat([logits, logits[1:], logits[1:]]), Settings()).context == 0


def test_outside_the_priors_nucleus_there_is_no_boost_and_outside_the_rows_there_is_nothing():
    logits = torch.full((2, 6), -20.0, dtype=torch.float64)
    logits[0, :2] = 5.0  # prior: tokens 0 and 1
    logits[1, 1:3] = 5.0  # context: tokens 1 and 2
    got = combine(logits, Settings(0.5)).scores
    logs = logits.log_softmax(-1)
    assert got[2] == logs[1, 2]
    torch.testing.assert_close(got[1], 1.5 * logs[1, 1] - 0.5 * logs[0, 1])
    assert got[[0, 3, 4, 5]].isneginf().all()


@pytest.mark.parametrize("beta", [-1.0, 0.0, 0.25])
def test_disjoint_nuclei_and_impossible_tokens_give_no_nan(beta):
    logits = torch.full((2, 4), -math.inf)
    logits[0, 0] = logits[1, 3] = 0.0
    got = combine(logits, Settings(beta)).scores
    assert not got.isnan().any()
    assert got[3] == 0 and got[[1, 2]].isneginf().all()
    assert got[0] == (0.0 if beta == -1 else -math.inf)


def test_disjoint_nuclei_leave_something_under_mean():
    logits = torch.full((3, 4), -30.0)
    logits[1, 1] = logits[2, 2] = 30.0
    got = combine(logits, Settings(0.25, pooling="mean")).scores
    assert got[[1, 2]].isfinite().all()


def test_ties_beyond_the_first_values_looked_at_stay_too():
    logs = torch.zeros(2, 200)
    logs[1, 7] = 9.0  # one row needs more than the first values, the other does not
    logs = logs.log_softmax(-1)
    floor, entropy = nucleus(logs, 0.2)
    kept = logs >= floor
    assert kept.sum(-1).tolist() == [200, 1]
    torch.testing.assert_close(entropy[0], torch.tensor(math.log(200)))


def test_gradients_are_finite_and_right():
    logits = rows(2, 12).requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        out = combine(x, Settings()).scores
        return out[out.isfinite()].softmax(0)[0]

    assert torch.autograd.gradcheck(loss, (logits,))


def test_half_precision_is_widened_before_anything_else():
    logits = rows(3).bfloat16()
    got, wide = combine(logits, Settings()), combine(logits.float(), Settings())
    assert got.scores.dtype == torch.float32
    assert torch.equal(got.scores, wide.scores)


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 65, 700, 1100])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.95, 0.999, 1.0])
def test_the_nucleus_is_the_hosts(vocabulary, top_p):
    from transformers import TopPLogitsWarper

    for scale in (0.01, 1.0, 8.0):
        logs = rows(3, vocabulary, scale=scale).log_softmax(-1)
        kept = logs >= nucleus(logs, top_p)[0]
        expected = TopPLogitsWarper(top_p)(None, logs).isfinite() if top_p < 1 else torch.ones_like(kept)
        assert torch.equal(kept, expected)


def test_ties_at_the_end_of_a_nucleus_all_stay():
    logs = torch.zeros(1, 8).log_softmax(-1)
    floor, entropy = nucleus(logs, 0.5)
    assert (logs >= floor).all()
    torch.testing.assert_close(entropy, torch.tensor([math.log(8)]))


def test_a_function_pools_and_the_token_tells_the_context():
    logits = rows(3)
    seen = []

    def first_two(logs: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
        seen.append((logs.shape, entropies.shape))
        return logs[:2].amax(0)

    got = combine(logits, Settings(0.0, top_p=1.0, pooling=first_two))
    assert seen == [((3, 50), (3,))]
    assert torch.equal(got.scores, logits.log_softmax(-1)[1:3].amax(0))
    token = int(got.scores.argmax())
    assert got.context is None
    assert got.context_of(token) == int(logits.log_softmax(-1)[1:, token].argmax())
    with pytest.raises(ValueError, match=r"pooling must return log probabilities of shape \(50,\), got \(3, 50\)"):
        combine(logits, Settings(pooling=lambda logs, entropies: logs))
    with pytest.raises(ValueError, match="got float"):
        combine(logits, Settings(pooling=lambda logs, entropies: 0.0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": -1.5}, ValueError, "beta must be a number >= -1 .* got -1.5"),
        ({"beta": math.inf}, ValueError, "beta must be"),
        ({"beta": "big"}, TypeError, "beta must be a number, got 'big'"),
        ({"beta": math.nan}, ValueError, "got nan"),
        ({"eta": -0.1}, ValueError, "eta must be >= 0 nats .* got -0.1"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\] .* got 0.0"),
        ({"top_p": 1.5}, ValueError, "got 1.5"),
        ({"pooling": "median"}, ValueError, "min_entropy, mean, max or a function, got 'median'"),
        ({"pooling": 3}, TypeError, "pooling must be a name or a function, got int"),
    ],
)
def test_settings_refuse_what_is_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        Settings(**options)


def test_a_step_needs_a_context():
    with pytest.raises(ValueError, match="at least one context, got shape"):
        combine(rows(3)[:1], Settings())


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_rows_without_a_distribution_are_named(value):
    logits = rows(3)
    logits[2] = value
    with pytest.raises(ValueError, match=r"logits of rows \[2\] hold nan, inf or only -inf"):
        combine(logits, Settings())
