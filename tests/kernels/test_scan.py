"""The linear recurrence: both backends against loops, a matrix and a Fourier transform, and its gradients."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from danlu.kernels.scan import BLOCK, linear_scan
from reference.scan import fourier_scan, loop_scan, toeplitz_scan, upper_lower_scan

BACKENDS = ("loops", "torch")
LENGTHS = (0, 1, 2, 3, 31, BLOCK, BLOCK + 1, 257, 2 * BLOCK + 45)


def factors(shape: tuple[int, ...], dtype: torch.dtype, top: float = 0.999) -> Tensor:
    """Factors of length 0.9 to ``top``."""
    length = 0.9 + (top - 0.9) * torch.rand(shape, dtype=torch.float64)
    if not dtype.is_complex:
        return (length * torch.randn(shape).sign()).to(dtype)
    return torch.polar(length, 6.28 * torch.rand(shape, dtype=torch.float64)).to(dtype)


def problem(
    dtype: torch.dtype, length: int, per_step: bool = False, batch: int = 2, channels: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    a = factors((batch, length, channels) if per_step else (channels,), dtype)
    return a, torch.randn(batch, length, channels, dtype=dtype), torch.randn(batch, channels, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_all_forms_agree_in_float64(backend, length):
    a, u, _ = problem(torch.complex128, length)
    found = linear_scan(a, u, backend=backend)
    for form in (loop_scan, toeplitz_scan, upper_lower_scan, fourier_scan):
        torch.testing.assert_close(found, form(a, u), rtol=0, atol=1e-12 * found.abs().max().item() * 10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_states_and_gradients_are_those_of_a_loop(backend, dtype, per_step, reverse, masked):
    for length in (0, 1, 2, 7, 261):
        inputs = [x.requires_grad_() for x in problem(dtype, length, per_step)]
        reset = torch.rand(2, length) < 0.1 if masked else None
        hold = torch.rand(2, length) < 0.2 if masked else None
        reference = loop_scan(*inputs, reset, hold, reverse)
        last = inputs[2] if length == 0 else reference[:, 0 if reverse else -1]
        h, final = linear_scan(*inputs, reset, hold=hold, reverse=reverse, return_final=True, backend=backend)
        torch.testing.assert_close((h, final), (reference, last), rtol=0, atol=1e-12)
        weights = torch.randn_like(h), torch.randn_like(final)

        def gradients(h: Tensor, final: Tensor) -> tuple[Tensor, ...]:
            loss = (h * weights[0]).sum() + (final * weights[1]).sum()  # noqa: B023
            loss = loss.real if loss.is_complex() else loss
            return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)  # noqa: B023

        torch.testing.assert_close(gradients(h, final), gradients(reference, last), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_step", [False, True])
def test_gradients_match_finite_differences(backend, per_step):
    nu_log = torch.randn(2, dtype=torch.float64).sub(1).requires_grad_()
    theta_log = torch.randn(2, dtype=torch.float64).requires_grad_()
    _, u, h0 = problem(torch.complex128, 5, channels=2)
    scale = torch.rand(2, 5, 2, dtype=torch.float64) + 0.5

    def states(nu_log: Tensor, theta_log: Tensor, u: Tensor, h0: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        a = torch.exp(torch.complex(-nu_log.exp(), theta_log.exp()))
        a = a * scale if per_step else a
        return linear_scan(a, u, h0, return_final=True, backend=backend)

    inputs = (nu_log, theta_log, u.requires_grad_(), h0.requires_grad_(), scale.requires_grad_(per_step))
    assert torch.autograd.gradcheck(states, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_single_precision_stays_close(backend):
    a = torch.polar(torch.linspace(0.9, 0.999, 6, dtype=torch.float64), torch.linspace(0, 6, 6, dtype=torch.float64))
    a, u = a.to(torch.complex64), torch.randn(1, 16384, 6, dtype=torch.complex64)
    found = linear_scan(a, u, backend=backend)
    exact = linear_scan(a.to(torch.complex128), u.to(torch.complex128), backend="loops")
    assert (found - exact).abs().max() < 2e-5 * exact.abs().max()
    torch.testing.assert_close(exact, fourier_scan(a.to(torch.complex128), u.to(torch.complex128)))


def test_gradient_of_a_constant_factor_is_summed_in_double_precision():
    u, found = torch.rand(1, 1 << 17, 1), []
    for dtype in (torch.float32, torch.float64):
        a = torch.full((1,), 0.3, dtype=dtype, requires_grad=True)
        linear_scan(a, u.to(dtype)).sum().backward()
        found.append(a.grad.item())
    assert abs(found[0] / found[1] - 1) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_and_single_steps_give_the_whole(backend):
    a, u, h0 = problem(torch.complex64, 300)
    whole, last = linear_scan(a, u, h0, return_final=True, backend=backend)
    state, parts = h0, []
    for part in u.split([128, 1, 100, 1, 1, 69], 1):
        h, state = linear_scan(a, part, state, return_final=True, backend=backend)
        parts.append(h)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-5)
    torch.testing.assert_close(last, whole[:, -1], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [0, 1, 63, 64, 65, 200])
def test_any_number_of_channels(backend, channels):
    for dtype in (torch.float32, torch.complex64):
        a, u, h0 = problem(dtype, 5, batch=3, channels=channels)
        torch.testing.assert_close(linear_scan(a, u, h0, backend=backend), loop_scan(a, u, h0), rtol=1e-5, atol=1e-5)
        assert linear_scan(a, u[:0], h0[:0], backend=backend).shape == (0, 5, channels)


def test_threads_change_no_bit():
    a, u, h0 = (x.requires_grad_() for x in problem(torch.complex64, 700, batch=3, channels=130))
    g = torch.randn_like(u)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            h = linear_scan(a, u, h0)
            results.append((h, *torch.autograd.grad(h, (a, u, h0), g)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_real_factors_of_complex_states_and_mixed_types():
    a, u, h0 = factors((3,), torch.float64), torch.randn(2, 9, 3, dtype=torch.complex128), torch.randn(2, 3).double()
    h, final = linear_scan(a, u, h0, return_final=True)
    torch.testing.assert_close(h, loop_scan(a, u, h0.to(u.dtype)), rtol=0, atol=1e-12)
    assert torch.equal(final, h[:, -1])
    torch.testing.assert_close(linear_scan(a, u.real), loop_scan(a, u.real), rtol=0, atol=1e-12)
    complex_a = factors((3,), torch.complex64)
    assert linear_scan(complex_a, u.real.float()).dtype == torch.complex64


def test_lazy_conjugates_and_strides_are_read_right():
    a, u, h0 = problem(torch.complex128, 9)
    wide = torch.randn(2, 9, 6, dtype=torch.complex128)
    torch.testing.assert_close(linear_scan(a.conj(), u.conj(), h0.conj()), linear_scan(a, u, h0).conj())
    assert torch.equal(linear_scan(a, wide[..., ::2]), linear_scan(a, wide[..., ::2].contiguous()))
    u.requires_grad_()
    linear_scan(a, u).real.sum().backward()  # an expanded gradient, without strides
    assert torch.isfinite(u.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_factor_is_harmless_where_the_state_is_dropped(backend):
    for length in (1, 4):
        a = torch.full((1, length, 2), 0.5, dtype=torch.float64)
        a[:, 0] = torch.inf
        reset = torch.arange(length)[None] == 0
        u = torch.ones(1, length, 2, dtype=torch.float64, requires_grad=True)
        h = linear_scan(a.requires_grad_(), u, torch.ones(1, 2).double(), reset, backend=backend)
        assert h[0, :, 0].tolist() == [1.0, 1.5, 1.75, 1.875][:length]
        h.sum().backward()
        assert torch.isfinite(u.grad).all() and torch.isfinite(a.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_input_at_a_held_step_is_never_read(backend):
    a, u, h0 = problem(torch.float64, 6)
    hold = torch.tensor([[True, False, True, False, False, True]] * 2)
    plain = linear_scan(a, u, h0, hold=hold, backend=backend)
    assert torch.equal(linear_scan(a, u.masked_fill(hold[..., None], torch.nan), h0, hold=hold, backend=backend), plain)
    torch.testing.assert_close(plain[:, [1, 3, 4]], loop_scan(a, u[:, [1, 3, 4]], h0), rtol=0, atol=1e-12)


def test_compiled_and_checkpointed_results_are_the_plain_ones():
    a, u, h0 = (x.requires_grad_() for x in problem(torch.float32, 40))

    def loss(a: Tensor, u: Tensor, h0: Tensor) -> Tensor:
        h, final = linear_scan(a, u * 2, h0, return_final=True)
        return h.square().sum() + final.sum()

    plain = torch.autograd.grad(loss(a, u, h0), (a, u, h0))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(a, u, h0), (a, u, h0)), plain)
    kept = torch.autograd.grad(checkpoint(loss, a, u, h0, use_reentrant=False), (a, u, h0))
    assert all(torch.equal(x, y) for x, y in zip(kept, plain, strict=True))


def test_a_second_derivative_is_refused():
    a, u, _ = (x.requires_grad_() for x in problem(torch.float64, 5))
    (first,) = torch.autograd.grad(linear_scan(a, u).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_scan_backward"):
        first.sum().backward()


def test_the_operator_is_well_formed():
    a, u, h0 = (x.requires_grad_() for x in problem(torch.complex64, 5))
    for loops in (True, False):
        torch.library.opcheck(torch.ops.danlu.linear_scan.default, (a, u, h0, None, False, loops))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_types_that_cannot_hold_a_state_are_refused(dtype):
    u = torch.ones(1, 2, 3)
    with pytest.raises(TypeError, match=f"u must be float32, .* got {dtype}"):
        linear_scan(torch.ones(3), u.to(dtype))
    with pytest.raises(TypeError, match="h0 must be float32"):
        linear_scan(torch.ones(3), u, torch.ones(1, 3).to(dtype))


def test_what_does_not_fit_is_refused():
    a, u = torch.ones(3), torch.ones(2, 4, 3)
    with pytest.raises(ValueError, match=r"u must be \(batch, length, channels\), got shape \(4, 3\)"):
        linear_scan(a, u[0])
    with pytest.raises(ValueError, match=r"a must be \(3,\) or \(2, 4, 3\) like u, got \(4, 3\)"):
        linear_scan(u[0], u)
    with pytest.raises(ValueError, match=r"h0 must be \(2, 3\), got \(3,\)"):
        linear_scan(a, u, a)
    with pytest.raises(ValueError, match=r"reset must be bool \(2, 4\), got torch.float32"):
        linear_scan(a, u, reset=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"hold must be bool \(2, 4\), got torch.bool \(2, 3\)"):
        linear_scan(a, u, hold=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="backend must be one of auto, loops, torch, got 'cuda'"):
        linear_scan(a, u, backend="cuda")
    with pytest.raises(ValueError, match="one device, got cpu, meta"):
        linear_scan(a, u.to("meta"))
