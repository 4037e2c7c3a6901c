"""The earth-mover loss against the whole cost matrix: values, gradients, chunks, masks, types."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from danlu.lab.measuring import peak_bytes
from danlu.losses.emo_functional import Cost, emo_loss, linear_emo_loss
from danlu.losses.mixing import MixingSchedule, Mixture
from reference.emo_dense import cost_matrix, one_hot, token_losses

V, WIDTH, HIDDEN = 23, 5, 6
OPTIONS = {
    "mix1": dict(mode="mix1"),
    "mix1-plain": dict(mode="mix1", ratio="plain"),
    "mix1-clipped": dict(mode="mix1", ratio_clip=3.0),
    "mix2": dict(mode="mix2"),
    "mix2-plain": dict(mode="mix2", ratio="plain"),
    "emo": dict(mode="emo"),
    "weighted": dict(mode="weighted", weight=0.7),
    "shared": dict(mode="mix2", share=0.3),
}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def problem(n=11, dtype=torch.float64, padding=2):
    """Logits, labels with repetitions and two ignored ones, and clustered embeddings of the first tokens."""
    table = random(V - padding, WIDTH, seed=1) + 2 * random(4, WIDTH, seed=2)[torch.arange(V - padding) % 4]
    table[3] = 0  # a row of zeros has no direction
    labels = torch.randint(0, V, (n,), generator=torch.Generator().manual_seed(3))
    labels[1] = labels[5] = labels[7]
    labels[2], labels[8] = -100, -100
    labels[9] = 3
    return (2 * random(n, V, seed=4)).to(dtype), labels, table.to(dtype)


def dense(logits, labels, table, mode="mix1", weight=None, ratio="released", ratio_clip=None, share=1.0):
    """Losses of the rows that count, and the places of these rows."""
    kept = labels != -100
    targets = one_hot(labels[kept], V, logits.dtype)
    cost = cost_matrix(table, V)
    return token_losses(
        logits[kept], targets, cost, mode, weight=weight, ratio=ratio, clip=ratio_clip, share=share
    ), kept


def gradient(loss, *tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_the_dense_form(options, reduction):
    logits, labels, table = problem()
    logits.requires_grad_()
    losses, kept = dense(logits, labels, table, **options)
    found = emo_loss(logits, labels, table, reduction=reduction, row_chunk=4, **options)
    upstream = random(len(labels), seed=9) if reduction == "none" else random(1, seed=9)[0]
    if reduction == "none":
        assert torch.equal(found == 0, ~kept)
        expected, found_ = (losses * upstream[kept]).sum(), (found * upstream).sum()
        assert torch.allclose(found[kept], losses, atol=1e-12, rtol=0)
    else:
        expected = (losses.mean() if reduction == "mean" else losses.sum()) * upstream
        found_ = found * upstream
    assert torch.allclose(found_, expected, atol=1e-12, rtol=0)
    (mine,), (theirs,) = gradient(found_, logits), gradient(expected, logits)
    assert torch.allclose(mine, theirs, atol=1e-10, rtol=0)
    assert mine[~kept].abs().max() == 0
    assert mine[kept].sum(1).abs().max() < 1e-12


def test_gradient_matches_finite_differences():
    logits, labels, table = problem(10)
    logits.requires_grad_()
    for options in (OPTIONS["emo"], OPTIONS["weighted"]):
        assert torch.autograd.gradcheck(lambda z, o=options: emo_loss(z, labels, table, row_chunk=2, **o), (logits,))
    hidden, weight, bias = random(10, HIDDEN), random(V, HIDDEN, seed=5), random(V, seed=6)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]

    def loss(h, w, b, **chunks):
        return linear_emo_loss(h, w, labels, table, bias=b, softcap=3.0, logit_scale=0.7, mode="emo", **chunks)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradcheck(lambda *x: loss(*x, vocab_chunk=5), inputs)
    assert torch.autograd.gradcheck(lambda *x: loss(*x, reduction="none", row_chunk=2), inputs)


def test_gradient_of_emo_alone_is_bounded_by_one_half():
    logits, labels, table = problem(200)
    logits = (4 * logits).requires_grad_()
    (found,) = gradient(emo_loss(logits, labels, table, mode="emo", reduction="sum"), logits)
    assert found.abs().max() <= 0.5
    p = torch.softmax(logits, -1)
    c = cost_matrix(table, V).T[labels.clamp_min(0)]
    expected = p * (c - (p * c).sum(1, keepdim=True)) * (labels != -100)[:, None]
    assert torch.allclose(found, expected, atol=1e-12)


def test_orthogonal_embeddings_give_one_minus_the_target_probability():
    logits, labels, _ = problem()
    turn = torch.linalg.qr(random(V, V, seed=7)).Q * torch.rand(V, 1, dtype=torch.float64).add(0.1)
    found = emo_loss(logits, labels, turn, mode="emo", reduction="none")
    p = torch.softmax(logits, -1)
    kept = labels != -100
    assert torch.allclose(found[kept], 1 - p[kept, labels[kept]], atol=1e-12)


def test_lengths_of_embeddings_and_shifts_of_logits_do_not_matter():
    logits, labels, table = problem()
    before = emo_loss(logits, labels, table, mode="mix2", reduction="none")
    scaled = table * torch.rand(len(table), 1, dtype=torch.float64).add(0.1)
    shifted = logits + 100 * random(len(logits), 1, seed=8)
    assert torch.allclose(emo_loss(logits, labels, scaled, mode="mix2", reduction="none"), before, atol=1e-12)
    assert torch.allclose(emo_loss(shifted, labels, table, mode="mix2", reduction="none"), before, atol=1e-11)


def test_values_of_the_released_mixtures():
    logits, labels, table = problem()
    kept = labels != -100
    p_t = torch.softmax(logits, -1)[kept, labels[kept]]
    # The target's own similarity is 1, or 0 for a token without a direction.
    known = (labels[kept] < len(table)) & (labels[kept] != 3)

    def of(**options):
        return emo_loss(logits, labels, table, reduction="none", **options)[kept]

    emo, ce = of(mode="emo"), F.cross_entropy(logits[kept], labels[kept], reduction="none")
    released = emo + p_t * known
    assert torch.allclose(of(mode="mix1"), ce, atol=1e-12)
    assert torch.allclose(of(mode="mix1", ratio="plain"), ce, atol=1e-12)
    assert torch.allclose(of(mode="mix2"), 2 * released, atol=1e-12)
    assert torch.allclose(of(mode="mix2", ratio="plain"), 2 * emo, atol=1e-12)
    assert torch.allclose(of(mode="weighted", weight=2.0), ce + 2 * emo, atol=1e-12)
    assert torch.allclose(of(mode="emo", share=0.0), ce, atol=1e-12)
    assert (ce / released).max() > 3
    assert (of(mode="mix1", ratio_clip=3.0) <= ce + 1e-12).all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunks", [{}, {"row_chunk": 3}, {"vocab_chunk": 7}, {"row_chunk": 4, "vocab_chunk": 5}])
@pytest.mark.parametrize("host", [{}, {"softcap": 2.0}, {"logit_scale": 0.3}, {"softcap": 1.5, "logit_scale": -2.0}])
def test_head_and_hidden_states_equal_the_dense_form(options, chunks, host):
    _, labels, table = problem()
    tensors = [x.requires_grad_() for x in (random(11, HIDDEN), random(V, HIDDEN, seed=5), random(V, seed=6))]
    hidden, weight, bias = tensors
    logits = host.get("logit_scale", 1.0) * (hidden @ weight.T + bias)
    if "softcap" in host:
        logits = host["softcap"] * torch.tanh(logits / host["softcap"])
    losses, _ = dense(logits, labels, table, **options)
    options = {"emo_weight" if name == "weight" else name: value for name, value in options.items()}
    found = linear_emo_loss(hidden, weight, labels, table, bias=bias, **host, **chunks, **options)
    assert torch.allclose(found, losses.mean(), atol=1e-12, rtol=0)
    for mine, theirs in zip(gradient(3 * found, *tensors), gradient(3 * losses.mean(), *tensors), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-10, rtol=0)


def test_losses_of_single_tokens_have_the_gradients_of_the_dense_form():
    _, labels, table = problem()
    hidden, weight = random(11, HIDDEN).requires_grad_(), random(V, HIDDEN, seed=5).requires_grad_()
    upstream = random(11, seed=9)
    losses, kept = dense(hidden @ weight.T, labels, table)
    expected = gradient((losses * upstream[kept]).sum(), hidden, weight)
    for head in (weight, weight.detach()):
        found = linear_emo_loss(hidden, head, labels, table, reduction="none", row_chunk=4)
        assert torch.allclose(found[kept], losses, atol=1e-12)
        wanted = (hidden, weight) if head.requires_grad else (hidden,)
        for mine, theirs in zip(gradient((found * upstream).sum(), *wanted), expected, strict=False):
            assert torch.allclose(mine, theirs, atol=1e-10)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_a_running_maximum_that_rises_late_or_starts_at_minus_infinity(start):
    _, labels, table = problem(padding=0)
    hidden, weight = random(11, HIDDEN), random(V, HIDDEN, seed=5)
    bias = torch.linspace(-300, 300, V, dtype=torch.float64)
    if start:
        bias = bias.flip(0)
    if start > 1:
        bias[:8] = -torch.inf
        labels = torch.where(labels < 8, 15, labels)
    if start > 2:
        bias[15:] = 0
    logits = hidden @ weight.T + bias
    expected = emo_loss(logits, labels, table, mode="weighted", weight=1.0)
    assert expected.isfinite()
    for chunk in (1, 4, 7, 22, 23, 40):
        found = linear_emo_loss(
            hidden, weight, labels, table, bias=bias, mode="weighted", emo_weight=1.0, vocab_chunk=chunk
        )
        assert torch.allclose(found, expected, rtol=1e-12)


def test_chunks_do_not_change_the_result():
    logits, labels, table = problem(17)
    logits.requires_grad_()
    first = None
    for chunk in (1, 2, 5, 16, 17, 100, None):
        loss = emo_loss(logits, labels, table, row_chunk=chunk)
        found = (loss, *gradient(loss, logits))
        first = first or found
        assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(found, first, strict=True))


def test_the_head_as_its_own_cost_is_a_constant():
    _, labels, _ = problem()
    hidden, weight = random(11, HIDDEN).requires_grad_(), random(V, HIDDEN, seed=5).requires_grad_()
    found = gradient(linear_emo_loss(hidden, weight, labels), hidden, weight)
    expected = gradient(linear_emo_loss(hidden, weight, labels, weight.detach().clone()), hidden, weight)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    losses, _ = dense(hidden @ weight.T, labels, weight.detach())
    assert torch.allclose(found[1], gradient(losses.mean(), weight)[0], atol=1e-10)


def test_one_hot_soft_labels_equal_labels():
    logits, labels, table = problem()
    logits.requires_grad_()
    soft = one_hot(labels.clamp_min(0), V, torch.float64)
    for options in OPTIONS.values():
        one = emo_loss(logits, labels, table, **options)
        other = emo_loss(logits, labels, table, soft_labels=soft, row_chunk=3, **options)
        assert torch.allclose(one, other, atol=1e-12)
        assert torch.allclose(*gradient(one, logits), *gradient(other, logits), atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_soft_labels_equal_the_dense_form(options):
    _, _, table = problem()
    soft = torch.softmax(2 * random(11, V, seed=10), -1)
    soft[4] = one_hot(torch.tensor(6), V, torch.float64)
    hidden, weight = random(11, HIDDEN).requires_grad_(), random(V, HIDDEN, seed=5).requires_grad_()
    logits = hidden @ weight.T
    arguments = {("clip" if name == "ratio_clip" else name): value for name, value in options.items()}
    losses = token_losses(logits, soft, cost_matrix(table, V), **arguments)
    found = emo_loss(logits, None, table, soft_labels=soft, reduction="none", row_chunk=4, **options)
    assert torch.allclose(found, losses, atol=1e-12)
    options = {"emo_weight" if name == "weight" else name: value for name, value in options.items()}
    labels = torch.where(torch.arange(11) == 2, -100, 0)
    found = linear_emo_loss(hidden, weight, labels, table, soft_labels=soft, vocab_chunk=6, **options)
    expected = losses[labels == 0].mean()
    assert torch.allclose(found, expected, atol=1e-12)
    for mine, theirs in zip(gradient(found, hidden, weight), gradient(expected, hidden, weight), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-10)


def test_soft_bound_is_above_transport_and_not_zero_at_the_target():
    _, _, table = problem(padding=0)
    table = table[4:]
    tau = torch.softmax(random(1, len(table), seed=3), -1)
    found = emo_loss(tau.log(), None, table, soft_labels=tau, mode="emo")
    mean = tau @ F.normalize(table)
    assert torch.allclose(found, 1 - mean.square().sum(), atol=1e-12)
    assert found > 0.1


def test_soft_labels_next_to_forbidden_tokens():
    logits, _, table = problem()
    logits[:, 5] = -torch.inf
    soft = torch.softmax(random(11, V, seed=10).index_fill(1, torch.tensor([5]), -torch.inf), -1)
    kept = torch.arange(V) != 5
    padded = torch.cat([table, table.new_zeros(2, WIDTH)])[kept]
    found = emo_loss(logits, None, table, soft_labels=soft)
    assert torch.allclose(found, emo_loss(logits[:, kept], None, padded, soft_labels=soft[:, kept]), atol=1e-12)


def test_ignored_tokens_and_the_number_of_items():
    logits, labels, table = problem()
    total = emo_loss(logits, labels, table, reduction="sum")
    assert torch.allclose(emo_loss(logits, labels, table), total / 9)
    assert torch.allclose(emo_loss(logits, labels, table, num_items_in_batch=40), total / 40)
    assert torch.allclose(emo_loss(logits, labels, table, num_items_in_batch=torch.tensor(40)), total / 40)
    other = torch.where(labels == -100, 7, labels)
    assert torch.allclose(emo_loss(logits, other, table, ignore_index=7, reduction="sum"), total) == bool(
        (labels != 7).all()
    )
    # Logits of ignored tokens are never looked at.
    logits[labels == -100] = torch.nan
    assert torch.allclose(emo_loss(logits, labels, table, reduction="sum"), total)


def test_nothing_to_count_is_zero():
    logits, labels, table = problem()
    logits.requires_grad_()
    for items in (None, 0, torch.tensor(0)):
        loss = emo_loss(logits, torch.full_like(labels, -100), table, num_items_in_batch=items)
        assert loss == 0
        assert gradient(loss, logits)[0].abs().max() == 0
    assert emo_loss(logits[:0], labels[:0], table, reduction="none").shape == (0,)
    one = emo_loss(logits[:1], labels[:1], table)
    assert torch.allclose(one, dense(logits[:1], labels[:1], table)[0][0])


def test_shapes_are_kept():
    logits, labels, table = problem(12)
    found = emo_loss(logits.view(3, 4, V), labels.view(3, 4), table, reduction="none")
    assert found.shape == (3, 4)
    assert torch.equal(found.flatten(), emo_loss(logits, labels, table, reduction="none"))
    transposed = logits.view(3, 4, V).transpose(0, 1)
    assert torch.allclose(
        emo_loss(transposed, labels.view(3, 4).T, table), emo_loss(logits, labels.int(), table), atol=1e-14
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_narrow_types(dtype, options):
    _, labels, table = problem()
    hidden, weight = random(11, HIDDEN), random(V, HIDDEN, seed=5)
    hidden, weight, table = (x.to(dtype) for x in (hidden, weight, table))
    names = {"emo_weight" if name == "weight" else name: value for name, value in options.items()}
    results = {}
    for kind in (dtype, torch.float64):
        h, w = hidden.to(kind).requires_grad_(), weight.to(kind).requires_grad_()
        losses, _ = dense(h.double() @ w.double().T, labels, table.double(), **options)
        logits = (h @ w.T).detach().requires_grad_()
        first = emo_loss(logits, labels, table.to(kind), row_chunk=4, **options)
        (dz,) = gradient(first, logits)
        whole = linear_emo_loss(h, w, labels, table.to(kind), row_chunk=4, **names)
        tiled = linear_emo_loss(h, w, labels, table.to(kind), vocab_chunk=6, **names)
        results[kind] = (first, whole, tiled, dz @ w.detach(), *gradient(whole, h, w), *gradient(tiled, h, w))
        assert whole.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
        assert dz.dtype == results[kind][4].dtype == kind
        assert torch.allclose(whole.double(), losses.mean(), rtol=2e-2)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    for mine, exact in zip(results[dtype], results[torch.float64], strict=True):
        assert (mine.double() - exact).abs().max() <= tolerance * max(1.0, exact.abs().max().item())


def test_sums_over_many_chunks_are_wide():
    n = 1500
    hidden = (1 + random(n, HIDDEN).abs()).bfloat16()
    weight = random(V, HIDDEN, seed=5).bfloat16().requires_grad_()
    labels, table = torch.full((n,), 4), random(V, WIDTH).bfloat16()
    (found,) = gradient(linear_emo_loss(hidden, weight, labels, table, row_chunk=1), weight)
    exact = weight.detach().double().requires_grad_()
    (expected,) = gradient(linear_emo_loss(hidden.double(), exact, labels, table.double()), exact)
    # A running sum in bfloat16 stalls when terms fall below 1/256 of it.
    assert (found.double() - expected).abs().max() < 1e-2 * expected.abs().max()


def test_chunks_that_nobody_names_hold_less_than_the_logits():
    from danlu.losses.emo_functional import _rows

    assert _rows(None, 4096, 32000) == 196 and _rows(None, 1024, 8000) == 128 and _rows(None, 10, 50) == 64
    assert _rows(None, 4096, 2**24) == 1 and _rows(None, 4096, None) == 4096 and _rows(None, 0, 50) == 64


def test_confident_predictions_stay_finite_in_half_precision():
    logits = torch.full((2, V), -40.0)
    logits[0, 4], logits[1, 5] = 40, 40
    labels = torch.tensor([4, 6])  # sure and right; sure and wrong
    table = random(V, WIDTH)
    for dtype, mode in itertools.product((torch.float16, torch.bfloat16, torch.float32), ("mix1", "mix2")):
        z = logits.to(dtype).requires_grad_()
        loss = emo_loss(z, labels, table.to(dtype), mode=mode)
        (found,) = gradient(loss, z)
        assert loss.isfinite() and found.isfinite().all() and found[1].abs().max() > 0
    # With orthogonal rows a sure and right token has CE = EMO = 0 exactly.
    for mode, ratio in itertools.product(("mix1", "mix2"), ("released", "plain")):
        z = logits.clone().requires_grad_()
        loss = emo_loss(z, labels, torch.eye(V), mode=mode, ratio=ratio)
        (found,) = gradient(loss, z)
        assert loss.isfinite() and found.isfinite().all()


def test_loss_scaling_reaches_float16_gradients():
    logits, labels, table = problem()
    z = (logits * 4).half().requires_grad_()
    exact = z.detach().double().requires_grad_()
    items = 10_000_000
    (plain,) = gradient(emo_loss(exact, labels, table, num_items_in_batch=items), exact)
    (scaled,) = gradient(emo_loss(z, labels, table.half(), num_items_in_batch=items) * 2.0**20, z)
    assert (scaled.double() / 2.0**20 - plain).abs().max() < 2e-2 * plain.abs().max()


def test_the_cost_never_gets_a_gradient():
    logits, labels, table = problem()
    logits.requires_grad_()
    trainable = table.clone().requires_grad_()
    for call in (lambda: emo_loss(logits, labels, trainable), lambda: Cost.of(trainable)):
        with pytest.raises(ValueError, match="cost_embedding must not require a gradient.*detach"):
            call()
    emo_loss(logits, labels, trainable.detach()).backward()
    assert trainable.grad is None and logits.grad is not None


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        shapes: list = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm):
                self.shapes.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    _, labels, table = problem()
    counts = {}
    for trained in (True, False):
        hidden, weight = random(11, HIDDEN).requires_grad_(), random(V, HIDDEN, seed=5).requires_grad_(trained)
        Products.shapes = []
        with Products():
            linear_emo_loss(hidden, weight, labels, table).backward()
        counts[trained] = len(Products.shapes)
        assert (weight.grad is not None) == trained
    assert counts == {True: 4, False: 3}
    Products.shapes = []
    with Products(), torch.no_grad():
        linear_emo_loss(hidden, weight, labels, table)
    assert len(Products.shapes) == 2


def test_similarities_are_computed_once_for_each_distinct_label():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Rows(TorchDispatchMode):
        seen: list = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten.mm and args[0].shape[1] == WIDTH:
                self.seen.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    labels = torch.tensor([7, 1, 9, 1, 7, 9, 9, 1, 7, 7, 7, -100])
    logits, table = random(12, V), random(V, WIDTH)
    with Rows():
        emo_loss(logits, labels, table, row_chunk=4)
    assert Rows.seen == [2, 1, 1]  # chunks of sorted rows: 1 1 1 7, 7 7 7 7, 9 9 9


def test_a_second_backward_pass_is_right():
    logits, labels, table = problem()
    logits.requires_grad_()
    loss = 3 * emo_loss(logits, labels, table)
    loss.backward(retain_graph=True)
    once = logits.grad.clone()
    loss.backward()
    assert torch.allclose(logits.grad, 2 * once, atol=1e-14)


def test_autocast_takes_products_in_its_type():
    _, labels, table = problem()
    hidden, weight = random(11, HIDDEN).float().requires_grad_(), random(V, HIDDEN, seed=5).float().requires_grad_()
    table = table.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_emo_loss(hidden, weight, labels, table)
        explicit = linear_emo_loss(hidden.bfloat16(), weight.bfloat16(), labels, table)
        given = emo_loss(hidden @ weight.T, labels, table)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, explicit) and torch.allclose(given, loss, rtol=1e-6)
    found = gradient(loss, hidden, weight)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert torch.allclose(loss, linear_emo_loss(hidden, weight, labels, table), rtol=2e-2)


def test_memory_is_one_gradient_of_the_logits_and_a_few_tiles():
    """Bytes of new tensors, counted as they are made: in level 1 logits' gradient and tiles, in level 2 tiles alone."""
    n, v, d = 512, 3000, 16
    labels = torch.randint(0, v, (n,))
    table = torch.randn(v, d)

    logits = torch.randn(n, v).requires_grad_()
    hidden, weight = torch.randn(n, d).requires_grad_(), torch.randn(v, d).requires_grad_()
    full = n * v * 4
    assert full <= peak_bytes(lambda: emo_loss(logits, labels, table, row_chunk=16).backward()) < 1.3 * full
    assert peak_bytes(lambda: linear_emo_loss(hidden, weight, labels, table, row_chunk=16).backward()) < 0.3 * full
    assert peak_bytes(lambda: linear_emo_loss(hidden, weight, labels, table, vocab_chunk=64).backward()) < 0.3 * full


def test_bad_input():
    logits, labels, table = problem()
    hidden, weight = random(11, HIDDEN), random(V, HIDDEN)

    def refused(error, match, *arguments, **options):
        with pytest.raises(error, match=match):
            emo_loss(*arguments, **options)

    refused(TypeError, "logits must be floating-point, got torch.int64", logits.long(), labels, table)
    refused(TypeError, "labels must be integers, got torch.float64", logits, labels.double(), table)
    refused(TypeError, "cost_embedding must be a floating-point tensor, got torch.int64", logits, labels, table.long())
    refused(ValueError, r"cost_embedding must have shape \(vocabulary, width\)", logits, labels, table[0])
    refused(ValueError, "at most as many rows as the vocabulary, 22, got 23", logits[:, :22], labels, random(23, 2))
    refused(
        ValueError,
        "must be finite, got an infinity or NaN in row 2",
        logits,
        labels,
        table.index_fill(0, torch.tensor(2), torch.nan),
    )
    refused(
        ValueError, r"labels must lie in 0..22 or be ignore_index -100, got 23", logits, labels.clone().fill_(23), table
    )
    refused(ValueError, r"got -1", logits, labels.clone().fill_(-1), table)
    refused(ValueError, r"labels must have shape \(11,\), got \(10,\)", logits, labels[1:], table)
    refused(ValueError, "labels must be given when soft_labels are not", logits, None, table)
    refused(ValueError, "soft_labels must be floating-point of shape", logits, None, table, soft_labels=logits[1:])
    refused(ValueError, "soft_labels must be >= 0 and sum to 1", logits, None, table, soft_labels=logits)
    refused(
        ValueError, "soft_labels must not require", logits, None, table, soft_labels=logits.softmax(1).requires_grad_()
    )
    refused(ValueError, "mode must be one of mix1, mix2, emo, weighted, got 'mix3'", logits, labels, table, mode="mix3")
    refused(ValueError, "ratio must be one of", logits, labels, table, ratio="new")
    refused(ValueError, "weight must be a finite number >= 0", logits, labels, table, mode="weighted")
    refused(ValueError, "weight must be None in mode 'mix1'", logits, labels, table, weight=1.0)
    refused(ValueError, "ratio_clip must be None in mode 'emo'", logits, labels, table, mode="emo", ratio_clip=3.0)
    refused(ValueError, "ratio_clip must be > 0", logits, labels, table, ratio_clip=0.0)
    refused(ValueError, r"share must lie in 0..1, got 1.5", logits, labels, table, share=1.5)
    refused(ValueError, "reduction must be one of", logits, labels, table, reduction="max")
    refused(
        ValueError,
        "num_items_in_batch needs reduction='mean'",
        logits,
        labels,
        table,
        reduction="sum",
        num_items_in_batch=3,
    )
    refused(ValueError, "row_chunk must be at least 1, got 0", logits, labels, table, row_chunk=0)

    def refused_head(error, match, *arguments, **options):
        with pytest.raises(error, match=match):
            linear_emo_loss(*arguments, **options)

    refused_head(TypeError, "hidden and weight must be floating-point", hidden.long(), weight, labels)
    refused_head(ValueError, r"hidden \(..., d\) and weight \(V, d\) must agree", hidden[:, 1:], weight, labels)
    refused_head(ValueError, "one dtype, got torch.float64 and torch.float32", hidden, weight.float(), labels)
    refused_head(ValueError, "cost_embedding must be a tensor or 'weight', got 'head'", hidden, weight, labels, "head")
    refused_head(ValueError, r"bias must have shape \(23,\)", hidden, weight, labels, bias=hidden[0])
    refused_head(ValueError, "softcap must be > 0", hidden, weight, labels, softcap=0.0)
    refused_head(ValueError, "logit_scale must be finite and not 0", hidden, weight, labels, logit_scale=0.0)
    refused_head(ValueError, "vocab_chunk must be at least 1", hidden, weight, labels, vocab_chunk=0)


def test_schedule_is_linear_between_points():
    schedule = MixingSchedule(((10, 0.0), (20, 0.5), (40, 1.0)))
    assert [schedule(step) for step in (0, 10, 15, 20, 30, 40, 99)] == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert MixingSchedule(((5, 0.3),))(77) == 0.3
    for points, match in (
        ((), "at least one"),
        (((3, 0.1), (3, 0.2)), "rise"),
        (((-1, 0.1),), "rise"),
        (((0, 1.1),), "0..1"),
    ):
        with pytest.raises(ValueError, match=match):
            MixingSchedule(points)
    with pytest.raises(ValueError, match="mode must be one of"):
        Mixture("ce")
