"""The weights against brute force over all active sets, in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from danlu.optim import gradient_solvers
from danlu.optim.gradient_solvers import solve_min_norm, solve_mixed, solve_primary

EXAMPLE = torch.tensor([[1, -0.9, 0.3], [-0.9, 1.5, 0.1], [0.3, 0.1, 0.8]], dtype=torch.float64)


def brute_primary(gradients: Tensor, main: Tensor, target: Tensor) -> Tensor:
    """The step, by trying every set of tight constraints on gradients of length 1."""
    lengths = gradients.norm(dim=1)
    unit, target = (gradients[lengths > 0] / lengths[lengths > 0, None]), (target / lengths)[lengths > 0]
    for size in range(len(unit) + 1):
        for rows in map(list, itertools.combinations(range(len(unit)), size)):
            step = main.clone()
            if rows:
                right = (target[rows] - unit[rows] @ main)[:, None]
                multipliers = torch.linalg.lstsq(unit[rows] @ unit[rows].T, right, driver="gelsd").solution[:, 0]
                step = main + multipliers @ unit[rows]
                if (multipliers < -1e-9).any():
                    continue
            if (unit @ step - target >= -1e-9).all():
                return step
    raise AssertionError("no active set fits")


def brute_shortest(gradients: Tensor, primaries: int) -> Tensor:
    """The least norm over the faces of (simplex) x (cone), by the stationary point of each face."""
    n, best = len(gradients), None
    for size in range(1, n + 1):
        for rows in map(list, itertools.combinations(range(n), size)):
            main = torch.tensor([float(row < primaries) for row in rows], dtype=gradients.dtype)
            if not main.any():
                continue
            system = torch.zeros(size + 1, size + 1, dtype=gradients.dtype)
            system[:size, :size] = gradients[rows] @ gradients[rows].T
            system[:size, size] = system[size, :size] = main
            right = torch.zeros(size + 1, 1, dtype=gradients.dtype)
            right[-1] = 1
            weights = torch.linalg.lstsq(system, right, driver="gelsd").solution[:size, 0]
            if (weights < -1e-9).any() or abs(weights @ main - 1) > 1e-9:
                continue
            step = weights.clamp(min=0) @ gradients[rows]
            if best is None or step.norm() < best.norm():
                best = step
    return best


def random_problem(seed: int, most: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of very different lengths; every second problem has equal, opposite, zero or dependent ones."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, most + 1, (), generator=generator))
    p = int(torch.randint(2, 11, (), generator=generator))
    lengths = torch.exp(2 * torch.randn(n, 1, generator=generator, dtype=torch.float64))
    gradients = torch.randn(n, p, generator=generator, dtype=torch.float64) * lengths
    main = torch.randn(p, generator=generator, dtype=torch.float64)
    if n > 1 and seed % 2:
        gradients[1] = [3 * gradients[0], -gradients[0], 0 * gradients[0], gradients[0] + gradients[-1]][seed // 2 % 4]
    return gradients, main, gradients @ gradients.T, gradients @ main


@pytest.mark.parametrize("block", range(4))
def test_primary_meets_all_conditions_and_equals_brute_force(block):
    for seed in range(100 * block, 100 * (block + 1)):
        gradients, main, gram, cross = random_problem(seed)
        multipliers = solve_primary(gram, cross)
        step = main + multipliers @ gradients
        progress, lengths = gradients @ step, gradients.norm(dim=1)
        assert (multipliers >= 0).all() and multipliers.isfinite().all()
        assert (progress >= -1e-10 * lengths * main.norm()).all()
        # In multiples of l_i <= |g_0| / |g_i|, which is what a multiplier without cancellation can reach.
        assert ((multipliers * progress).abs() <= 1e-10 * (1 + multipliers * lengths) * main.norm()).all()
        torch.testing.assert_close(step, brute_primary(gradients, main, torch.zeros(len(gradients))), atol=1e-8, rtol=0)


def test_primary_with_one_auxiliary_is_the_closed_form():
    for seed in range(50):
        gradients, main, gram, cross = random_problem(seed, most=1)
        expected = torch.relu(-(gradients[0] @ main)) / gradients[0].square().sum()
        torch.testing.assert_close(solve_primary(gram, cross), expected[None], atol=1e-12, rtol=1e-12)


def greedy(gradients: Tensor, main: Tensor, rounds: int = 10_000) -> Tensor:
    """The published rule: re-optimise the multiplier of the most violated constraint until all hold."""
    multipliers = torch.zeros(len(gradients), dtype=gradients.dtype)
    for _ in range(rounds):
        progress = gradients @ (main + multipliers @ gradients)
        worst = progress.argmin()
        if progress[worst] >= -1e-12:
            break
        multipliers[worst] = torch.relu(multipliers[worst] - progress[worst] / gradients[worst].square().sum())
    return multipliers


def test_counter_example_to_the_published_rule_is_solved():
    gradients = torch.tensor([[-1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    main = torch.tensor([-2.0, -2.0], dtype=torch.float64)
    published = greedy(gradients, main)
    torch.testing.assert_close(published, torch.tensor([0.4, 1.2], dtype=torch.float64))
    multipliers = solve_primary(gradients @ gradients.T, gradients @ main)
    torch.testing.assert_close(multipliers, torch.tensor([0.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(main + multipliers @ gradients, torch.tensor([-2.0, 0.0], dtype=torch.float64))


def test_targets_are_met_exactly_where_they_bind():
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        gradients = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        main = torch.randn(6, generator=generator, dtype=torch.float64)
        target = torch.rand(4, generator=generator, dtype=torch.float64)
        multipliers = solve_primary(gradients @ gradients.T, gradients @ main, target)
        step = main + multipliers @ gradients
        slack = gradients @ step - target
        assert slack.min() >= -1e-10 and (multipliers * slack).abs().max() <= 1e-9
        torch.testing.assert_close(step, brute_primary(gradients, main, target), atol=1e-8, rtol=0)


def test_targets_that_no_step_meets_count_as_zero():
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    main = torch.tensor([0.5, 0.7], dtype=torch.float64)
    gram, cross, target = gradients @ gradients.T, gradients @ main, torch.tensor([0.3, 0.0], dtype=torch.float64)
    for multipliers in (solve_primary(gram, cross, target), gradient_solvers._enumerate(gram, cross, target, 1e-15)):
        torch.testing.assert_close(main + multipliers @ gradients, torch.tensor([0.0, 0.7], dtype=torch.float64))


def test_primary_ignores_the_scale_of_auxiliary_losses_and_follows_that_of_the_main_one():
    for seed in range(0, 100, 2):
        gradients, main, gram, cross = random_problem(seed)
        step = main + solve_primary(gram, cross) @ gradients
        sizes = torch.logspace(-6, 6, len(gradients), dtype=torch.float64)
        scaled = gradients * sizes[:, None]
        again = main + solve_primary(scaled @ scaled.T, scaled @ main) @ scaled
        torch.testing.assert_close(again, step, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(solve_primary(gram, 1e6 * cross), 1e6 * solve_primary(gram, cross))


def test_nothing_changes_without_conflict():
    gradients = torch.eye(3, dtype=torch.float64)
    assert (solve_primary(gradients, torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)) == 0).all()


@pytest.mark.parametrize("block", range(4))
def test_min_norm_is_the_shortest_convex_combination(block):
    for seed in range(100 * block, 100 * block + 60):
        gradients, _, gram, _ = random_problem(seed, most=6)
        weights = solve_min_norm(gram)
        step = weights @ gradients
        size = gram.diagonal().max().sqrt()
        assert weights.min() >= 0 and abs(weights.sum() - 1) < 1e-12
        assert (gradients @ step - step.square().sum()).min() >= -1e-10 * size * max(1.0, float(size))
        torch.testing.assert_close(step, brute_shortest(gradients, len(gradients)), atol=1e-7 * float(size), rtol=1e-7)


def test_min_norm_of_the_worked_example():
    weights = solve_min_norm(EXAMPLE)
    expected = torch.tensor([24 / 43, 19 / 43, 0], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, atol=1e-14, rtol=0)
    assert float(weights @ EXAMPLE @ weights) == pytest.approx(0.16046511627906976)


def test_min_norm_of_two_is_the_closed_form():
    for seed in range(100):
        gradients, main, _, _ = random_problem(seed, most=1)
        pair = torch.stack((gradients[0], main))
        gram = pair @ pair.T
        first = ((pair[1] - pair[0]) @ pair[1] / (pair[0] - pair[1]).square().sum()).clamp(0, 1)
        expected = torch.stack((first, 1 - first))
        torch.testing.assert_close(solve_min_norm(gram), expected, atol=1e-10, rtol=0)
        torch.testing.assert_close(gradient_solvers._nearest_of_two(gram), expected, atol=1e-10, rtol=0)
    same = torch.ones(2, 2, dtype=torch.float64)
    assert gradient_solvers._nearest_of_two(same).tolist() == [0.5, 0.5]


def test_min_norm_keeps_its_digits_beside_a_gradient_a_million_times_longer():
    gradients = torch.tensor([[1e-3, 2e-3, 0], [2e-3, -1e-3, 1e-3], [4e3, 1e3, 2e3]], dtype=torch.float64)
    for scale in (1.0, 1e-6, 1e6):
        step = solve_min_norm(scale**2 * gradients @ gradients.T) @ gradients
        torch.testing.assert_close(step, brute_shortest(gradients, 3), rtol=1e-9, atol=0)


@pytest.mark.parametrize("block", range(2))
def test_mixed_equals_brute_force(block):
    for seed in range(60 * block, 60 * (block + 1)):
        gradients, _, gram, _ = random_problem(seed, most=5)
        for primaries in range(1, len(gradients) + 1):
            weights = solve_mixed(gram, primaries)
            assert weights.min() >= 0 and abs(weights[:primaries].sum() - 1) < 1e-12
            size = float(gram.diagonal().max().sqrt())
            found, expected = weights @ gradients, brute_shortest(gradients, primaries)
            torch.testing.assert_close(found, expected, atol=1e-7 * size, rtol=1e-7)


def test_mixed_reduces_to_both_special_cases():
    for seed in range(0, 60, 2):
        gradients, main, _, _ = random_problem(seed)
        rows = torch.cat((main[None], gradients))
        gram = rows @ rows.T
        expected = main + solve_primary(gram[1:, 1:], gram[1:, 0]) @ gradients
        torch.testing.assert_close(solve_mixed(gram, 1) @ rows, expected, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(solve_mixed(gram, len(gram)), solve_min_norm(gram))


def test_device_forms_equal_the_active_set_method():
    for seed in range(300):
        gradients, main, gram, cross = random_problem(seed, most=2)
        target = torch.full_like(cross, 0.1) if seed % 3 == 0 else None
        found = gradient_solvers._enumerate(gram, cross, target, 1e-15)
        step = main + found @ gradients
        torch.testing.assert_close(step, main + solve_primary(gram, cross, target) @ gradients, atol=1e-9, rtol=1e-9)


def test_float32_inner_products_of_equal_and_opposite_gradients_give_sane_weights():
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(3, 1000, generator=generator)
        rows = torch.cat(
            (base, base[:1] * 0.7, -base[1:2], base[2:] + 1e-7 * torch.randn(1, 1000, generator=generator))
        )
        gram, main = rows @ rows.T, torch.randn(1000, generator=generator)
        multipliers = solve_primary(gram, rows @ main)
        assert (multipliers.norm() * rows.norm(dim=1).max()) < 10 * main.norm()
        step = main + multipliers @ rows
        assert (rows @ step >= -2e-3 * rows.norm(dim=1) * main.norm()).all()
        weights = solve_min_norm(gram)
        assert weights.isfinite().all() and abs(weights.sum() - 1) < 1e-5


def test_rounding_of_dependent_gradients_does_not_hide_other_conflicts():
    for seed in (*range(60), 2107, 2629):  # some of these go wrong where near dependence is judged without its error
        generator = torch.Generator().manual_seed(seed)
        dimension, tasks = 2 + seed % 7, 3 + seed % 17
        basis = torch.randn(dimension, 300, generator=generator)
        rows = torch.randn(tasks, dimension, generator=generator) @ basis
        if seed % 2:
            rows = rows + 1e-5 * torch.randn(tasks, 300, generator=generator)
        if seed % 3:
            rows[1] = -rows[0]
        main = torch.randn(300, generator=generator)
        step = main + solve_primary(rows @ rows.T, rows @ main) @ rows
        assert (rows @ step >= -5e-3 * rows.norm(dim=1) * main.norm()).all()


def test_many_tasks():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(30, 40, generator=generator, dtype=torch.float64)
    main = -gradients.sum(0)
    multipliers = solve_primary(gradients @ gradients.T, gradients @ main)
    step = main + multipliers @ gradients
    assert (gradients @ step).min() >= -1e-10 * gradients.norm() * main.norm()
    assert (multipliers * (gradients @ step)).abs().max() <= 1e-9


def test_a_dtype_is_kept():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        gram, cross = torch.eye(3, dtype=dtype), -torch.ones(3, dtype=dtype)
        assert solve_primary(gram, cross).dtype == dtype
        assert solve_primary(gram, cross).tolist() == [1, 1, 1]
        assert solve_min_norm(gram).dtype == dtype


def test_zero_main_gradients_give_a_zero_step():
    gram = torch.eye(2, dtype=torch.float64)
    assert solve_primary(gram, torch.zeros(2, dtype=torch.float64)).tolist() == [0, 0]
    gram[0] = 0
    assert solve_mixed(gram, 1).tolist() == [1, 0]
    assert solve_min_norm(gram).tolist() == [1, 0]
    assert solve_primary(torch.zeros(1, 1), torch.zeros(1), torch.ones(1)).tolist() == [0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve_primary(torch.ones(2), torch.ones(2)), "gram must be a square matrix of at least one task"),
        (lambda: solve_min_norm(torch.ones(0, 0)), "gram must be a square matrix of at least one task"),
        (lambda: solve_primary(torch.eye(2), torch.ones(3)), r"cross must have shape \(2,\)"),
        (lambda: solve_primary(torch.eye(3), torch.ones(3), torch.ones(1)), r"target must have shape \(3,\)"),
        (lambda: solve_primary(torch.eye(3), torch.ones(3), -torch.ones(3)), "target must be at least 0, got -1"),
        (lambda: solve_primary(torch.eye(3) * torch.nan, torch.ones(3)), "gram must be finite"),
        (lambda: solve_primary(torch.eye(3), torch.ones(3), precision=0.0), r"precision must be in \(0, 1\), got 0"),
        (lambda: solve_mixed(torch.eye(3), 0), r"primaries must be in 1\.\.3, the number of tasks, got 0"),
        (lambda: solve_mixed(torch.eye(3), 4), r"primaries must be in 1\.\.3"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
