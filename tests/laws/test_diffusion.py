"""The noise process against closed forms: for Gaussian data the ideal denoiser is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcond_jax.diffusion import gaussian, schedule, solvers

PROCESS = schedule.Schedule.cosine()
MEAN, STD = np.array([1.5, -0.5, 0.0]), np.array([0.3, 1.0, 2.0])


def ideal_noise(x, t):
    """E[noise | x_t] for data N(MEAN, STD^2)."""
    kept = jnp.asarray(PROCESS.alphas_cumprod, jnp.float32)[t]
    return jnp.sqrt(1 - kept) * (x - jnp.sqrt(kept) * MEAN) / (kept * STD**2 + 1 - kept)


def ideal(x, t):
    """The denoiser of that noise, for chains that do not look at v."""
    return jnp.concatenate([ideal_noise(x, t), jnp.zeros_like(x)], -1)


def ideal_v(process):
    """The v of the exact variance of x_{t-1} given x_t, by original time."""
    kept = process.alphas_cumprod[:, None]
    left_of_x0 = STD**2 * (1 - kept) / (kept * STD**2 + 1 - kept)
    exact = process.posterior_variance[:, None] + (
        process.posterior_mean_of_x0[:, None] ** 2 * left_of_x0
    )
    low, high = process.posterior_log_variance[:, None], np.log(process.betas)[:, None]
    v = np.zeros((len(PROCESS.betas), len(MEAN)), np.float32)
    v[process.timesteps[1:]] = (2 * (np.log(exact) - low) / (high - low) - 1)[1:]
    return jnp.asarray(v)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def assert_moments(x, *, mean, std):
    """Within four standard errors."""
    n = len(x)
    np.testing.assert_array_less(np.abs(np.mean(x, 0) - mean), 4 * std / np.sqrt(n))
    np.testing.assert_array_less(np.abs(np.std(x, 0) / std - 1), 4 / np.sqrt(2 * n))


def test_predict_x0_inverts_q_sample():
    t = jnp.array([0, 10, 300, 700, 950])
    x0, noise = normal(0, 5, 3), normal(1, 5, 3)
    x = gaussian.q_sample(x0, t, noise, schedule=PROCESS)
    np.testing.assert_allclose(
        gaussian.predict_x0(x, t, noise, schedule=PROCESS), x0, rtol=1e-4, atol=1e-5
    )


def test_q_sample_keeps_unit_variance_and_ends_in_noise():
    x0, noise = normal(0, 20000, 1), normal(1, 20000, 1)
    for t in (0, 400, 999):
        x = gaussian.q_sample(x0, jnp.full(20000, t), noise, schedule=PROCESS)
        assert_moments(np.asarray(x), mean=0.0, std=1.0)
    np.testing.assert_allclose(x, noise, atol=1e-3)


def test_a_respaced_process_has_the_same_marginals():
    kept = schedule.even_timesteps(1000, 37)
    short = PROCESS.respace(kept)
    np.testing.assert_allclose(short.alphas_cumprod, PROCESS.alphas_cumprod[kept], rtol=1e-10)
    assert short.timesteps.tolist() == kept.tolist()
    # Respacing twice is respacing once.
    twice = short.respace(np.array([3, 20, 36]))
    once = PROCESS.respace(kept[[3, 20, 36]])
    np.testing.assert_allclose(twice.betas, once.betas, rtol=1e-10)
    assert twice.timesteps.tolist() == once.timesteps.tolist()
    np.testing.assert_allclose(PROCESS.respace(np.arange(1000)).betas, PROCESS.betas, rtol=1e-9)


def test_closed_forms_of_timesteps():
    even = schedule.even_timesteps(1000, 100)
    assert even[0] == 0 and even[-3:].tolist() == [979, 989, 999]
    assert np.all(np.isin(np.diff(even), (10, 11)))
    assert schedule.even_timesteps(1000, 1).tolist() == [0]
    assert schedule.even_timesteps(7, 7).tolist() == list(range(7))
    assert schedule.trailing_timesteps(1000, 4).tolist() == [249, 499, 749, 999]
    assert schedule.trailing_timesteps(1000, 2, start=0.5).tolist() == [249, 499]
    assert schedule.trailing_timesteps(1000, 1, start=0.4).tolist() == [399]
    assert schedule.leading_timesteps(1000, 10).tolist() == list(range(0, 1000, 100))
    assert schedule.leading_timesteps(10, 4).tolist() == [0, 3, 6, 9]


def test_sections_are_spaced_on_their_own():
    sections = schedule.even_timesteps(10, 2, 1, 3)  # of 4, 3 and 3 steps
    assert sections.tolist() == [0, 3, 4, 7, 8, 9]


@pytest.mark.parametrize("start", [1.0, 0.95])
@pytest.mark.parametrize("num_kept", [2, 12, 900])
def test_log_snr_timesteps_are_even_where_the_process_is_fine_enough(num_kept, start):
    kept = schedule.log_snr_timesteps(PROCESS, num_kept, start=start)
    assert kept[0] == 0 and kept[-1] == 1000 * start - 1 and len(kept) == num_kept
    assert np.all(np.diff(kept) > 0)
    log_snr = np.log(PROCESS.alphas_cumprod) - np.log1p(-PROCESS.alphas_cumprod)
    middle = kept[(kept > 20) & (kept < 980)][:12]  # a step there is 0.1 at most
    if num_kept == 12:
        gaps = -np.diff(log_snr[middle])
        np.testing.assert_allclose(gaps, (log_snr[0] - log_snr[kept[-1]]) / 11, atol=0.1)


def test_one_log_snr_timestep_is_the_noisiest():
    assert schedule.log_snr_timesteps(PROCESS, 1, start=0.4).tolist() == [399]


@pytest.mark.parametrize("spacing", schedule.SPACINGS)
def test_impossible_numbers_of_timesteps_are_refused(spacing):
    for num_kept in (0, 1001):
        with pytest.raises(ValueError, match=f"{num_kept} sampling steps"):
            schedule.spaced_timesteps(PROCESS, num_kept, spacing=spacing)


@pytest.mark.parametrize(
    ("num_kept", "options", "message"),
    [
        (401, dict(spacing="trailing", start=0.4), "out of the 400 of the process"),
        (401, dict(spacing="log_snr", start=0.4), "out of the 400 of the process"),
        (2, dict(spacing="even", start=0.4), "needs spacing trailing or log_snr"),
        (2, dict(spacing="trailing", start=1.5), r"number in \(0, 1\]"),
        (2, dict(spacing="sideways"), "not one of even, leading"),
        (300, dict(spacing="leading"), "no whole stride takes 300 of 1000 steps: take 250"),
    ],
)
def test_spacings_that_do_not_fit_are_refused(num_kept, options, message):
    with pytest.raises(ValueError, match=message):
        schedule.spaced_timesteps(PROCESS, num_kept, **options)


def test_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="unknown solver 'euler'"):
        solvers.Solver(PROCESS, "euler")


def test_ddim_with_the_ideal_denoiser_reaches_the_data():
    solver = solvers.Solver(PROCESS.respace(schedule.trailing_timesteps(1000, 500)), "ddim")

    # The chain is affine in its start, so two starts tell the whole law it ends in.
    start = jnp.array([[0.0], [1.0]]) * jnp.ones(3)
    zero, one = jax.jit(lambda x: solver(ideal, x, jnp.zeros((500, 2, 3))))(start)
    np.testing.assert_allclose(zero, MEAN, atol=1e-2)
    np.testing.assert_allclose(one - zero, STD, rtol=2e-2)


@pytest.mark.parametrize(("kind", "order"), [("ddim", 1.0), ("dpm", 2.0)])
def test_error_falls_with_the_order_of_the_solver(kind, order):
    kept, deviations = PROCESS.alphas_cumprod, np.array([[-1.0], [0.5], [1.0]])

    def on_path(t):
        """For Gaussian data the equation the chain follows keeps standardised values."""
        return np.sqrt(kept[t]) * MEAN + np.sqrt(kept[t] * STD**2 + 1 - kept[t]) * deviations

    # From step 0, the last one visited, every chain goes to its prediction of x_0.
    shrink = np.sqrt(kept[0]) * STD**2 / (kept[0] * STD**2 + 1 - kept[0])
    exact = MEAN + shrink * (on_path(0) - np.sqrt(kept[0]) * MEAN)
    errors = []
    for num_steps in (16, 32, 64):
        timesteps = schedule.log_snr_timesteps(PROCESS, num_steps, start=0.95)
        solver = solvers.Solver(PROCESS.respace(timesteps), kind)
        start = jnp.asarray(on_path(timesteps[-1]), jnp.float32)
        end = solver(ideal, start, jnp.zeros((num_steps, *start.shape)))
        errors.append(np.abs(end - exact).max(0))
    # Steps are whole numbers, so the spacing is not quite that of the theory.
    np.testing.assert_allclose(-np.diff(np.log2(errors), axis=0), order, atol=0.1)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 25])
def test_dpm_keeps_what_it_must(num_steps):
    process = PROCESS.respace(schedule.trailing_timesteps(1000, num_steps))
    of_x, of_x0, of_x0_before = solvers.dpm_coefficients(process)
    # Noise of a path straight to x_0 falls as the process says, and the signal comes from x_0.
    kept, kept_next = process.alphas_cumprod, process.alphas_cumprod_prev
    np.testing.assert_allclose(of_x * np.sqrt(1 - kept), np.sqrt(1 - kept_next), atol=1e-12)
    signal = of_x * np.sqrt(kept) + of_x0 + of_x0_before
    np.testing.assert_allclose(signal, np.sqrt(kept_next), rtol=1e-12)
    # First order at both ends, so that two steps are those of DDIM.
    assert of_x0_before[0] == of_x0_before[-1] == of_x[0] == 0.0 and of_x0[0] == 1.0
    assert np.all(of_x0_before[1:-1] < 0.0)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_dpm_is_ddim_in_one_step_and_in_two(num_steps):
    process = PROCESS.respace(schedule.trailing_timesteps(1000, num_steps, start=0.9))
    start, noise = normal(0, 5, 3), normal(1, num_steps, 5, 3)
    ddim, dpm = (solvers.Solver(process, k)(ideal, start, noise) for k in ("ddim", "dpm"))
    np.testing.assert_allclose(dpm, ddim, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["ddim", "dpm"])
def test_a_prediction_that_never_changes_is_reached(kind):
    process = PROCESS.respace(schedule.log_snr_timesteps(PROCESS, 7, start=0.95))
    x0, start = normal(0, 4, 3), normal(1, 4, 3)

    def denoise(x, t):
        kept = jnp.asarray(PROCESS.alphas_cumprod, jnp.float32)[t]
        seen = (x - jnp.sqrt(kept) * x0) / jnp.sqrt(1 - kept)
        return jnp.concatenate([seen, jnp.zeros_like(x)], -1)

    end = solvers.Solver(process, kind)(denoise, start, jnp.zeros((7, 4, 3)))
    np.testing.assert_allclose(end, x0, atol=1e-4)


def test_ancestral_with_the_ideal_denoiser_is_exact_in_few_steps():
    process = PROCESS.respace(schedule.even_timesteps(1000, 8))
    solver, v = solvers.Solver(process), ideal_v(process)

    def denoise(x, t):
        return jnp.concatenate([ideal_noise(x, t), jnp.broadcast_to(v[t], x.shape)], -1)

    n = 20000
    x = jax.jit(lambda x, noise: solver(denoise, x, noise))(normal(0, n, 3), normal(1, 8, n, 3))
    assert_moments(np.asarray(x), mean=MEAN, std=STD)


@pytest.mark.parametrize("kind", solvers.KINDS)
def test_warm_start_in_one_step_returns_the_posterior_mean(kind):
    process = PROCESS.respace(schedule.trailing_timesteps(1000, 1, start=0.4))
    solver = solvers.Solver(process, kind)

    n = 20000
    guess = MEAN + STD * normal(0, n, 3)
    x = solver(ideal, solver.noised(guess, normal(1, n, 3)), normal(2, 1, n, 3))
    kept = PROCESS.alphas_cumprod[399]
    # The variance of E[x_0 | x_t]: what the noise has hidden is lost.
    std = STD * np.sqrt(kept * STD**2 / (kept * STD**2 + 1 - kept))
    assert_moments(np.asarray(x), mean=MEAN, std=std)


def test_temperature_scales_the_noise_of_all_steps_but_the_last():
    process = PROCESS.respace(schedule.even_timesteps(1000, 4))
    start, noise = normal(0, 1, 3), normal(1, 2, 4, 1, 3)

    def ends(temperature, noise):
        solver = solvers.Solver(process, temperature=temperature)
        return [np.asarray(solver(ideal, start, n)) for n in noise]

    cold = ends(0.0, noise)
    np.testing.assert_array_equal(*cold)
    warm = ends(1.0, noise)
    assert np.all(np.abs(warm[0] - warm[1]) > 1e-4)
    # With the ideal noise prediction the chain is affine in its noise.
    half = ends(0.5, noise)
    np.testing.assert_allclose(half[0], (cold[0] + warm[0]) / 2, rtol=1e-4, atol=1e-4)
    last = noise[0].at[-1].add(1.0)  # the chain uses its draws from noisiest to cleanest
    np.testing.assert_array_equal(warm[0], ends(1.0, [last])[0])


@pytest.mark.parametrize("kind", solvers.KINDS)
def test_clip_bounds_the_prediction(kind):
    solver = solvers.Solver(PROCESS.respace(np.array([999])), kind, clip=0.7)
    out = solver(lambda x, t: jnp.zeros((4, 6)), normal(0, 4, 3), normal(1, 1, 4, 3))
    np.testing.assert_allclose(np.abs(out), 0.7, rtol=1e-6)


def noised(t):
    t = jnp.asarray(t)
    x0, noise = normal(0, len(t), 3), normal(1, len(t), 3)
    return x0, gaussian.q_sample(x0, t, noise, schedule=PROCESS), t, noise


def test_each_part_of_the_loss_trains_its_own_half():
    x0, x, t, noise = noised([0, 1, 500, 999])

    def part(output, index):
        return jnp.sum(gaussian.loss(output, x0, x, t, noise, schedule=PROCESS)[index])

    gradient = jax.jit(jax.jacrev(lambda output: jnp.stack([part(output, 0), part(output, 1)])))
    gradient = np.asarray(gradient(normal(2, 4, 6)))
    mse, vb = (np.split(g, 2, axis=-1) for g in gradient)
    assert np.all(mse[0] != 0.0) and not mse[1].any()
    assert not vb[0].any() and np.all(vb[1] != 0.0)


def test_loss_vanishes_at_the_true_posterior():
    x0, x, t, noise = noised([1, 2, 100, 500, 900])
    truth = jnp.concatenate([noise, -jnp.ones_like(noise)], -1)
    mse, vb = gaussian.loss(truth, x0, x, t, noise, schedule=PROCESS)
    assert not mse.any()
    np.testing.assert_allclose(vb, 0.0, atol=1e-5)


def test_variational_term_is_the_divergence_in_bits():
    x0, x, t, noise = noised([700])
    output = jnp.concatenate([noise + 0.3, jnp.full_like(noise, 0.5)], -1)
    vb = gaussian.loss(output, x0, x, t, noise, schedule=PROCESS)[1]
    true_var = PROCESS.posterior_variance[700]
    var = np.exp(0.75 * np.log(PROCESS.betas[700]) + 0.25 * np.log(true_var))
    kept = PROCESS.alphas_cumprod[700]
    shift = PROCESS.posterior_mean_of_x0[700] * np.sqrt(1 / kept - 1) * 0.3
    nats = 0.5 * (np.log(var / true_var) - 1 + (true_var + shift**2) / var)
    np.testing.assert_allclose(vb, nats / np.log(2), rtol=1e-4)


@pytest.mark.parametrize("log_std", [-4.0, -1.0])
def test_discretised_likelihoods_of_all_levels_sum_to_one(log_std):
    levels = jnp.linspace(-1.0, 1.0, 256)
    for mean in (-1.2, 0.3):
        log_p = gaussian.discretized_log_likelihood(
            levels, jnp.full(256, mean), jnp.full(256, log_std)
        )
        np.testing.assert_allclose(jnp.sum(jnp.exp(log_p)), 1.0, atol=1e-5)
