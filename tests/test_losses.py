"""What each algorithm claims: advantages, clip, KL penalty, RWR's weights, losses and gradients."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    STABLE_DIFFUSION,
    embed,
    load_policy,
    make_pipeline,
    read_metrics,
    run,
    without_times,
)
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

import ddpo_is
import ddpo_iskl
import ddpo_sf
import rwr
import rwr_sparse

POLICY_GRADIENT = [ddpo_sf, ddpo_is, ddpo_iskl]
REGRESSION = [rwr, rwr_sparse]
PROMPTS = ["cat", "dog", "cat", "bee"]


def name_of(script):
    return script.__name__


every_policy_gradient = pytest.mark.parametrize("script", POLICY_GRADIENT, ids=name_of)
every_regression = pytest.mark.parametrize("script", REGRESSION, ids=name_of)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load(script, model, moved=0.0, **changes):
    """A policy as main loads it, `moved` away from the pretrained weights, and its reference."""
    policy = load_policy(script, model, **changes)
    policy.script = script
    policy.reference = None
    policy.scaler = torch.amp.GradScaler("cpu", enabled=policy.args.precision == "fp16")
    if script is ddpo_iskl and policy.args.lora_rank == 0:
        policy.reference = load_policy(script, model, **changes).unet.requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for p in policy.params.values():
        p.data += moved * torch.randn(p.shape, generator=generator)
    return policy


def make_rollout(policy, advantages=(1.0, -0.5, 2.0, -1.5)):
    """Four trajectories drawn by the policy."""
    embeds = embed(policy.pipe, PROMPTS)
    noise = normal(4, policy.args.num_steps + 1, *policy.latent_shape)
    latents, log_probs = policy.script.sample_trajectories(
        policy.unet, embeds, noise, policy.schedule, policy.args
    )
    return {
        "latents": latents,
        "embeds": embeds,
        "log_probs": log_probs,
        "advantages": torch.tensor(advantages),
    }


def make_regression_rollout(policy):
    """Four finished latents with weights, and six draws of noise for each."""
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": normal(4, *policy.latent_shape),
        "noise": normal(4, 6, *policy.latent_shape, seed=1),
        "timesteps": torch.randint(1000, (4, 6), generator=generator),
        "embeds": embed(policy.pipe, PROMPTS),
        "weights": torch.tensor([0.7, 0.0, 0.3, 1.0]),
    }


def accumulate(policy, rollout):
    """accumulate_gradients on all four samples. Returns the gradient as one vector, and metrics."""
    inputs = [policy.unet]
    if policy.script is ddpo_iskl:
        inputs.append(policy.reference)
    inputs.append(rollout)
    if policy.script in POLICY_GRADIENT:
        inputs.append(torch.arange(4))
    info = policy.script.accumulate_gradients(*inputs, policy.schedule, policy.scaler, policy.args)
    grads = [p.grad.flatten() for p in policy.params.values() if p.grad is not None]
    return torch.cat(grads) / policy.scaler.get_scale(), info


def count_rows(unet):
    """A list that fills with the number of pairs of each forward pass."""
    rows = []
    unet.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0]) // 2))
    return rows


def assert_same_gradient(gradient, expected):
    """Equal up to the order of float32 sums."""
    assert expected.abs().max() > 0
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=atol)


def assert_same_autograd(gradient, loss, policy):
    """The gradient is that of a loss, by plain autograd."""
    grads = torch.autograd.grad(loss, list(policy.params.values()), allow_unused=True)
    expected = torch.cat([grad.flatten() for grad in grads if grad is not None])
    assert_same_gradient(gradient, expected)


def loss_of(script, log_prob, batch, args):
    """compute_loss of a policy gradient without a KL penalty."""
    if script is ddpo_sf:
        return script.compute_loss(log_prob, batch)
    return ddpo_is.compute_loss(log_prob, batch, args)


# ---- advantages ----


def advantages_of(rewards, prompts, history, adv_clip=5.0):
    return ddpo_is.compute_advantages(rewards, prompts, history, adv_clip)


def test_advantages_are_normalised_by_the_batch_at_first():
    history = {}
    rewards = np.array([1.0, 2.0, 3.0, 6.0])
    advantages = advantages_of(rewards, ["a", "a", "b", "b"], history)
    np.testing.assert_allclose(advantages, (rewards - 3.0) / (rewards.std() + 1e-6))
    assert history == {"a": [1.0, 2.0], "b": [3.0, 6.0]}


def test_advantages_are_normalised_by_the_prompts_own_last_16_rewards():
    history = {"a": [float(i) for i in range(16)], "b": [7.0] * 14}
    advantages = advantages_of([20.0, 5.0], ["a", "b"], history)
    own = np.array([*range(1, 16), 20.0])
    batch = np.array([20.0, 5.0])  # b has 15 rewards, one too few
    expected_a = (20 - own.mean()) / (own.std() + 1e-6)
    expected_b = (5 - batch.mean()) / (batch.std() + 1e-6)
    np.testing.assert_allclose(advantages, [expected_a, expected_b])
    assert history == {"a": own.tolist(), "b": [7.0] * 14 + [5.0]}


def test_the_whole_batch_enters_the_history_before_it_is_used():
    history = {"a": [0.0] * 14}
    advantages = advantages_of([4.0, 2.0], ["a", "a"], history)
    own = np.array([0.0] * 14 + [4.0, 2.0])
    expected = (np.array([4.0, 2.0]) - own.mean()) / (own.std() + 1e-6)
    np.testing.assert_allclose(advantages, expected)


def test_advantages_are_clipped_on_both_sides():
    prompts = [str(i) for i in range(100)]
    for sign in (1, -1):
        rewards = sign * np.array([0.0] * 99 + [1.0])
        advantages = advantages_of(rewards, prompts, {}, adv_clip=5.0)
        assert advantages[-1] == sign * 5.0
        assert advantages_of(rewards, prompts, {}, adv_clip=20.0)[-1] * sign > 9


def test_a_constant_reward_has_no_advantage():
    for n in range(1, 17):  # the mean of some of them is not exact
        assert (advantages_of(np.full(n, 2.3), ["cat"] * n, {}) == 0).all()


# ---- policy gradients: the loss ----


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope",
    [
        (2.0, 1.3, -2.2, 0.0),  # a good action already made likelier: clipped, no gradient
        (2.0, 0.7, -1.4, -1.4),  # a good action made unlikelier: the gradient stays
        (-2.0, 1.3, 2.6, 2.6),  # a bad action made likelier: the gradient stays
        (-2.0, 0.7, 1.8, 0.0),  # a bad action already made unlikelier: clipped
        (2.0, 1.05, -2.1, -2.1),  # inside the trust region
    ],
)
def test_clip_by_hand(advantage, ratio, loss, slope):
    """Clip range 0.1; d loss / d log_prob = -A ratio where it is not clipped."""
    log_prob = torch.tensor([np.log(ratio) - 3.0], dtype=torch.float64, requires_grad=True)
    batch = {
        "log_prob_old": torch.tensor([-3.0], dtype=torch.float64),
        "advantages": torch.tensor([advantage], dtype=torch.float64),
    }
    value, info = ddpo_is.compute_loss(log_prob, batch, ddpo_is.Args(clip_range=0.1))
    value.sum().backward()
    assert value.item() == pytest.approx(loss)
    assert log_prob.grad.item() == pytest.approx(slope)
    assert info["ratio_err"].item() == pytest.approx(abs(ratio - 1))
    assert info["clipfrac"].item() == (abs(ratio - 1) > 0.1)
    assert info["approx_kl"].item() == pytest.approx(0.5 * np.log(ratio) ** 2)


def test_the_score_function_loss_by_hand():
    log_prob = torch.tensor([-1.5], requires_grad=True)
    batch = {"log_prob_old": torch.tensor([-1.6]), "advantages": torch.tensor([3.0])}
    value, info = ddpo_sf.compute_loss(log_prob, batch)
    value.sum().backward()
    assert value.item() == pytest.approx(4.5)
    assert log_prob.grad.item() == -3.0
    assert info["ratio_err"].item() == pytest.approx(np.exp(0.1) - 1, rel=1e-5)
    assert info["approx_kl"].item() == pytest.approx(0.005, rel=1e-5)


def estimate(script, theta, theta_old, clip_range, n=200_000):
    """The mean gradient and its standard error, for x ~ N(theta_old, 1) and the reward x^2."""
    generator = torch.Generator().manual_seed(0)
    x = theta_old + torch.randn(n, generator=generator, dtype=torch.float64)
    thetas = torch.full((n,), theta, dtype=torch.float64, requires_grad=True)  # a gradient each
    batch = {
        "log_prob_old": torch.distributions.Normal(theta_old, 1.0).log_prob(x),
        "advantages": x**2 - theta_old**2 - 1,
    }
    log_prob = torch.distributions.Normal(thetas, 1.0).log_prob(x)
    loss, _ = loss_of(script, log_prob, batch, SimpleNamespace(clip_range=clip_range))
    (gradient,) = torch.autograd.grad(-loss.sum(), thetas)
    return gradient.mean().item(), gradient.std().item() / n**0.5


@pytest.mark.parametrize(
    "script, theta, theta_old, clip_range",
    [(ddpo_sf, 0.7, 0.7, None), (ddpo_is, 0.7, 0.7, 1e-4), (ddpo_is, 0.9, 0.6, 1e9)],
)
def test_the_estimator_agrees_with_the_analytic_gradient(script, theta, theta_old, clip_range):
    """d/dtheta E[x^2] = 2 theta for x ~ N(theta, 1)."""
    mean, error = estimate(script, theta, theta_old, clip_range)
    assert abs(mean - 2 * theta) < 3 * error
    assert error < 0.02 * 2 * theta


@pytest.mark.parametrize("script, clip_range", [(ddpo_sf, None), (ddpo_is, 1e-4)])
def test_off_policy_without_the_ratio_or_with_the_clip_the_estimator_is_biased(script, clip_range):
    """Importance sampling makes the estimate right; the trust region bounds it."""
    mean, error = estimate(script, 0.9, 0.6, clip_range)
    assert abs(mean - 2 * 0.9) > 20 * error


# ---- policy gradients: the gradient ----


@every_policy_gradient
def test_the_first_gradient_is_reinforce(tiny_sd, script):
    """With ratio 1, d(-A ratio) = -A d log_prob: plain autograd on the mean of -A log_prob."""
    policy = load(script, tiny_sd)
    rollout = make_rollout(policy)
    gradient, _ = accumulate(policy, rollout)
    losses = []
    for i in range(4):
        for s in range(6):
            latents = rollout["latents"][i : i + 1, s]
            next_latents = rollout["latents"][i : i + 1, s + 1]
            embeds = rollout["embeds"][:, i : i + 1]
            step = torch.tensor([s])
            t = policy.schedule.timesteps[step]
            uncond = policy.unet(latents, t, embeds[0]).sample
            text = policy.unet(latents, t, embeds[1]).sample
            noise_pred = uncond + 5.0 * (text - uncond)
            _, log_prob, _ = script.ddpm_step(
                noise_pred, latents, step, policy.schedule, next_latents
            )
            losses.append(-rollout["advantages"][i] * log_prob)
    assert_same_autograd(gradient, torch.cat(losses).mean(), policy)


@every_policy_gradient
def test_metrics_are_means_over_all_pairs_but_the_maximum_of_ratio_err(tiny_sd, script):
    """Against the densities of the moved policy, step by step."""
    policy = load(script, tiny_sd)
    rollout = make_rollout(policy)
    for p in policy.params.values():
        p.data += 0.01 * normal(*p.shape)
    log_probs = []
    with torch.no_grad():
        for s in range(6):
            step = torch.full((4,), s)
            latents = rollout["latents"][:, s]
            noise_pred = script.predict_noise(
                policy.unet, latents, policy.schedule.timesteps[step], rollout["embeds"], 5.0
            )
            _, log_prob, _ = script.ddpm_step(
                noise_pred, latents, step, policy.schedule, rollout["latents"][:, s + 1]
            )
            log_probs.append(log_prob)
    log_ratio = torch.stack(log_probs, dim=1) - rollout["log_probs"]
    policy.args.micro_batch = 7
    _, info = accumulate(policy, rollout)
    assert info["ratio_err"] == pytest.approx((log_ratio.exp() - 1).abs().max().item(), rel=1e-3)
    assert info["approx_kl"] == pytest.approx((log_ratio**2 / 2).mean().item(), rel=1e-3)
    assert info["ratio_err"] > 1e-3
    if script is ddpo_sf:
        loss = -(rollout["advantages"][:, None] * torch.stack(log_probs, dim=1)).mean()
        assert info["loss"] == pytest.approx(loss.item(), rel=1e-3)


@every_policy_gradient
def test_only_the_samples_of_the_update_count(tiny_sd, script):
    policy = load(script, tiny_sd)
    rollout = make_rollout(policy)
    gradients = []
    inputs = [policy.unet] if script is not ddpo_iskl else [policy.unet, policy.reference]
    for samples in ([0, 1], [2, 3], [0, 1, 2, 3]):
        script.accumulate_gradients(
            *inputs, rollout, torch.tensor(samples), policy.schedule, policy.scaler, policy.args
        )
        grads = [p.grad.flatten() for p in policy.params.values() if p.grad is not None]
        gradients.append(torch.cat(grads).clone())
    assert_same_gradient((gradients[0] + gradients[1]) / 2, gradients[2])
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()


@every_policy_gradient
def test_the_gradient_does_not_depend_on_the_microbatch(tiny_sd, script):
    policy = load(script, tiny_sd)
    rollout = make_rollout(policy)
    policy.args.micro_batch = 1
    expected, expected_info = accumulate(policy, rollout)
    for micro_batch in (7, 1000):
        policy.args.micro_batch = micro_batch
        gradient, info = accumulate(policy, rollout)
        assert_same_gradient(gradient, expected)
        assert info["loss"] == pytest.approx(expected_info["loss"], rel=1e-4)


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("script", POLICY_GRADIENT + REGRESSION, ids=name_of)
def test_the_gradient_in_fp16_is_that_in_fp32(tiny_sd, script, lora_rank):
    """GradScaler keeps what is under the smallest fp16 number, and takes its scale out again."""
    gradients = {}
    for precision in ("fp32", "fp16"):
        options = {"clip_range": 1.0} if hasattr(script.Args, "clip_range") else {}
        policy = load(script, tiny_sd, precision=precision, lora_rank=lora_rank, **options)
        policy.scaler.scale(torch.zeros(()))  # makes its scale, 2^16
        if script in REGRESSION:
            rollout = make_regression_rollout(policy)
            rollout["weights"] *= 1e-4
        else:
            rollout = make_rollout(policy)
            rollout["advantages"] *= 1e-4
        accumulate(policy, rollout)
        optimizer = torch.optim.SGD(policy.params.values(), lr=0.0)
        policy.scaler.unscale_(optimizer)
        grads = [p.grad.flatten() for p in policy.params.values() if p.grad is not None]
        gradients[precision] = torch.cat(grads)
    assert gradients["fp32"].norm() > 0
    error = (gradients["fp16"] - gradients["fp32"]).norm() / gradients["fp32"].norm()
    assert error < 0.05


@every_policy_gradient
def test_the_deterministic_last_step_is_left_out(tiny_sd_v, script):
    policy = load(script, tiny_sd_v)
    rollout = make_rollout(policy)
    assert policy.schedule.sigma[-1] == 0 and (policy.schedule.sigma[:-1] > 0).all()
    assert (rollout["log_probs"][:, -1] == 0).all() and (rollout["log_probs"][:, :-1] != 0).all()
    rows = count_rows(policy.unet)
    before, info = accumulate(policy, rollout)
    assert sum(rows) == 4 * 5
    assert np.isfinite(info["loss"])
    rollout["latents"][:, -1] += 7.0  # what the last step made cannot matter
    rollout["log_probs"][:, -1] += 7.0
    after, _ = accumulate(policy, rollout)
    assert_same_gradient(after, before)


@every_policy_gradient
def test_each_update_takes_an_equal_share_of_the_samples(
    tiny_sd, tmp_path, few_prompts, monkeypatch, script
):
    real = script.accumulate_gradients
    shares = []

    def spy(*inputs):
        shares.append(inputs[-4].tolist())  # samples, schedule, scaler, args
        return real(*inputs)

    monkeypatch.setattr(script, "accumulate_gradients", spy)
    run(script, tmp_path, tiny_sd, prompts=few_prompts, num_samples=6, num_updates=3, iterations=1)
    assert [len(share) for share in shares] == [2, 2, 2]
    assert sorted(itertools.chain(*shares)) == [0, 1, 2, 3, 4, 5]


# ---- the number of pairs per forward pass ----


@pytest.mark.parametrize(
    "precision, micro_batch, num_samples, num_pairs, expected",
    [
        ("fp32", 0, 16, 400, 100),  # the largest divisor of the pairs up to 100
        ("fp32", 64, 16, 400, 50),
        ("fp32", 10_000, 16, 400, 400),
        ("fp32", 7, 16, 400, 5),
        ("fp32", 1, 16, 400, 1),
        ("fp32", 64, 16, 401, 1),
        ("fp16", 0, 16, 400, 8),  # divides the samples of an update too
        ("bf16", 6, 16, 400, 4),
        ("fp16", 64, 6, 150, 3),
        ("fp16", 64, 6, 98, 1),
        ("bf16", 64, 2, 49, 1),
    ],
)
def test_micro_batch_divides_what_it_has_to(
    precision, micro_batch, num_samples, num_pairs, expected
):
    args = ddpo_is.Args(device="cpu", precision=precision, micro_batch=micro_batch)
    ddpo_is.choose_micro_batch(args, (4, 16, 16), num_samples, num_pairs)
    assert args.micro_batch == expected


@every_policy_gradient
def test_in_half_precision_training_has_the_batches_of_sampling(
    script, tiny_sd, few_prompts, tmp_path, monkeypatch
):
    """Row by row: rounding depends on a row's place in its batch, and the ratio must be 1."""
    sampled = []
    trained = []
    predict_noise = script.predict_noise

    def record(unet, latents, t, embeds, guidance_scale):
        batches = trained if torch.is_grad_enabled() else sampled
        batches.append(torch.cat([latents.detach().flatten(1), t[:, None].float()], dim=1))
        return predict_noise(unet, latents, t, embeds, guidance_scale)

    monkeypatch.setattr(script, "predict_noise", record)
    options = {"num_samples": 8, "num_updates": 2, "iterations": 1, "precision": "bf16"}
    folder = run(script, tmp_path, tiny_sd, prompts=few_prompts, **options)
    assert len(trained) == 10  # two updates of 4 samples x 5 steps, 4 pairs in each
    for batch in trained:
        assert any(batch.shape == other.shape and batch.equal(other) for other in sampled)
    assert read_metrics(folder)[1]["ratio_err"] == 0


def test_micro_batch_is_smaller_for_larger_latents():
    args = ddpo_is.Args(device="cpu", precision="fp32")
    ddpo_is.choose_micro_batch(args, (4, 64, 64), 16, 400)
    assert args.micro_batch == 8


# ---- the KL penalty ----


def scored_pairs(policy, rollout):
    """What compute_loss was given: log_prob, mean, log_prob_ref, mean_ref, (4, T, ...) each."""
    real = ddpo_iskl.compute_loss
    seen = []

    def spy(log_prob, mean, batch, *others):
        row = (log_prob.detach(), mean.detach(), batch["log_prob_ref"], batch["mean_ref"])
        seen.append(row)
        return real(log_prob, mean, batch, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpo_iskl, "compute_loss", spy)
        accumulate(policy, rollout)
    # they come step by step
    return [torch.cat(column).unflatten(0, (-1, 4)).transpose(0, 1) for column in zip(*seen)]


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_reference_scores_the_policys_own_trajectory(tiny_sd, lora_rank):
    """Step by step against a freshly loaded pretrained UNet, on what the moved policy stored."""
    policy = load(ddpo_iskl, tiny_sd, moved=0.05, lora_rank=lora_rank)
    rollout = make_rollout(policy)
    log_probs, _, log_probs_ref, means_ref = scored_pairs(policy, rollout)
    pretrained = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None).unet
    for s in range(6):
        latents, next_latents = rollout["latents"][:, s], rollout["latents"][:, s + 1]
        step = torch.full((4,), s)
        t = policy.schedule.timesteps[step]
        with torch.no_grad():
            noise_pred = ddpo_iskl.predict_noise(pretrained, latents, t, rollout["embeds"], 5.0)
        _, log_prob, mean = ddpo_iskl.ddpm_step(
            noise_pred, latents, step, policy.schedule, next_latents
        )
        torch.testing.assert_close(log_probs_ref[:, s], log_prob, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(means_ref[:, s], mean, atol=1e-5, rtol=1e-5)
        # a rollout of the reference's own would have been elsewhere: another log-prob
        _, own, _ = ddpo_iskl.ddpm_step(
            noise_pred, latents, step, policy.schedule, noise=normal(4, 4, 8, 8, seed=s)
        )
        assert (own - log_prob).abs().max() > 1e-3

    # the policy, its adapter on again, is still the one that drew them
    torch.testing.assert_close(log_probs, rollout["log_probs"], atol=1e-5, rtol=1e-5)
    assert (log_probs - log_probs_ref).abs().max() > 1e-3


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_in_a_run_the_penalty_of_the_first_update_is_zero(
    tiny_sd, tmp_path, few_prompts, lora_rank
):
    """Nothing has moved then, so that any other trajectory than the policy's would show."""
    folder = run(
        ddpo_iskl,
        tmp_path,
        tiny_sd,
        prompts=few_prompts,
        num_updates=1,
        lr=1e-2,
        kl_coef=1.0,
        lora_rank=lora_rank,
    )
    _, first, second = read_metrics(folder)
    assert first["kl_ref"] < 1e-6
    assert second["kl_ref"] > 1e-2


@pytest.mark.parametrize("kl", ["squared", "exact"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_penalty_and_its_gradient_are_zero_at_the_start(tiny_sd, lora_rank, kl):
    """The advantages are 0, which leaves the penalty alone."""
    gradients = {}
    metrics = {}
    for moved in (0.0, 0.02):
        policy = load(ddpo_iskl, tiny_sd, moved=moved, lora_rank=lora_rank, kl=kl, kl_coef=1.0)
        rollout = make_rollout(policy, advantages=(0.0, 0.0, 0.0, 0.0))
        gradients[moved], metrics[moved] = accumulate(policy, rollout)
    assert metrics[0.0]["kl_ref"] < 1e-6 and abs(metrics[0.0]["loss"]) < 1e-9
    assert metrics[0.02]["kl_ref"] > 1e-3 and metrics[0.02]["loss"] > 0
    assert gradients[0.0].norm() < 1e-3 * gradients[0.02].norm()


@pytest.mark.parametrize("kl", ["squared", "exact"])
def test_the_gradient_of_the_penalty_is_that_of_plain_autograd(tiny_sd, kl):
    policy = load(ddpo_iskl, tiny_sd, moved=0.02, kl=kl, kl_coef=0.7)
    rollout = make_rollout(policy, advantages=(0.0, 0.0, 0.0, 0.0))
    gradient, info = accumulate(policy, rollout)
    penalties = []
    for s in range(6):
        latents, next_latents = rollout["latents"][:, s], rollout["latents"][:, s + 1]
        step = torch.full((4,), s)
        t = policy.schedule.timesteps[step]
        densities = []
        for unet in (policy.unet, policy.reference):
            noise_pred = ddpo_iskl.predict_noise(unet, latents, t, rollout["embeds"], 5.0)
            _, _, mean = ddpo_iskl.ddpm_step(noise_pred, latents, step, policy.schedule, latents)
            densities.append(torch.distributions.Normal(mean, policy.schedule.sigma[s]))
        divergence = torch.distributions.kl_divergence(*densities).mean(dim=(1, 2, 3))
        if kl == "exact":
            penalties.append(divergence)
        else:
            log_prob, log_prob_ref = [d.log_prob(next_latents).mean((1, 2, 3)) for d in densities]
            penalties.append((log_prob - log_prob_ref - divergence.detach()) ** 2 / 2)
    penalty = 0.7 * torch.cat(penalties).mean()
    assert info["kl_penalty"] == pytest.approx(penalty.item(), rel=1e-3)
    assert info["loss"] == pytest.approx(penalty.item(), rel=1e-3)
    assert_same_autograd(gradient, penalty, policy)


@pytest.mark.parametrize("kl", ["squared", "exact"])
def test_both_penalties_equal_torch_distributions(kl):
    schedule = ddpo_iskl.make_schedule(DDIMScheduler(**STABLE_DIFFUSION), 6, "cpu")
    mean, mean_ref = normal(2, 6, 4, 8, 8)
    log_prob, log_prob_ref, advantages = normal(3, 6, seed=1)
    batch = {
        "step": torch.arange(6),
        "log_prob_old": log_prob,
        "advantages": advantages,
        "log_prob_ref": log_prob_ref,
        "mean_ref": mean_ref,
    }
    args = ddpo_iskl.Args(kl=kl, kl_coef=0.7)
    loss, info = ddpo_iskl.compute_loss(log_prob, mean, batch, schedule, args)

    sigma = schedule.sigma.view(-1, 1, 1, 1)
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, sigma), torch.distributions.Normal(mean_ref, sigma)
    )  # (6, 4, 8, 8)
    exact = divergence.mean(dim=(1, 2, 3))
    expected = {"exact": exact, "squared": (log_prob - log_prob_ref - exact) ** 2 / 2}
    torch.testing.assert_close(loss, -advantages + 0.7 * expected[kl])
    torch.testing.assert_close(info["kl_penalty"], 0.7 * expected[kl])
    # nats per image, whatever the penalty: the sum over the dimensions and steps of a trajectory
    torch.testing.assert_close(info["kl_ref"].mean(), divergence.sum())


def test_the_baseline_of_the_squared_penalty_is_what_it_is_in_the_mean(tiny_sd):
    """On the policy's own samples log_prob - log_prob_ref is the KL, plus noise of mean 0."""
    policy = load(ddpo_iskl, tiny_sd, moved=0.05)
    rollout = make_rollout(policy)
    log_probs, means, log_probs_ref, means_ref = scored_pairs(policy, rollout)
    sigma = policy.schedule.sigma[:, None, None, None]
    kl = (means - means_ref).square().mean(dim=(2, 3, 4)) / (2 * sigma.flatten() ** 2)
    differences = log_probs - log_probs_ref
    # 24 pairs of 256 dimensions: the noise of a pair has the variance 2 kl / 256
    noise = (differences - kl) / (2 * kl / 256).sqrt()
    assert abs(noise.mean()) < 3 / 24**0.5
    assert 0.5 < noise.std() < 1.6
    assert differences.mean() == pytest.approx(kl.mean().item(), rel=0.3)


@pytest.mark.parametrize(
    "advantage, ratio", itertools.product((2.0, -2.0), (1.3, 1.05, 0.7)), ids=str
)
def test_without_a_penalty_the_loss_of_iskl_is_that_of_is(advantage, ratio):
    schedule = ddpo_iskl.make_schedule(DDIMScheduler(**STABLE_DIFFUSION), 6, "cpu")
    log_prob = torch.tensor([np.log(ratio) - 3.0])
    mean = normal(1, 4, 8, 8)
    batch = {
        "step": torch.tensor([2]),
        "log_prob_old": torch.tensor([-3.0]),
        "advantages": torch.tensor([advantage]),
        "log_prob_ref": torch.tensor([-2.0]),
        "mean_ref": mean + 1,
    }
    args = ddpo_iskl.Args(clip_range=0.1, kl_coef=0.0)
    loss, info = ddpo_iskl.compute_loss(log_prob, mean, batch, schedule, args)
    expected, expected_info = ddpo_is.compute_loss(log_prob, batch, args)
    assert torch.equal(loss, expected)
    assert info["kl_ref"].item() > 0 and info["kl_penalty"].item() == 0
    for name, value in expected_info.items():
        assert torch.equal(info[name], value)


def test_without_a_penalty_a_run_of_iskl_is_one_of_is(tiny_sd, tmp_path, few_prompts):
    options = {"iterations": 3, "lr": 1e-3}
    expected = without_times(run(ddpo_is, tmp_path, tiny_sd, prompts=few_prompts, **options))
    rows = without_times(
        run(ddpo_iskl, tmp_path, tiny_sd, prompts=few_prompts, kl_coef=0.0, **options)
    )
    assert len(rows) == 4
    for row, expected_row in zip(rows, expected, strict=True):
        assert {name: row[name] for name in expected_row} == expected_row


def test_a_step_without_noise_has_no_kl(tiny_sd_v):
    policy = load(ddpo_iskl, tiny_sd_v, moved=0.02)
    rollout = make_rollout(policy)
    _, info = accumulate(policy, rollout)
    kl = 0
    with torch.no_grad():
        for s in range(5):  # of 6
            latents = rollout["latents"][:, s]
            step = torch.full((4,), s)
            t = policy.schedule.timesteps[step]
            means = []
            for unet in (policy.unet, policy.reference):
                noise_pred = ddpo_iskl.predict_noise(unet, latents, t, rollout["embeds"], 5.0)
                _, _, mean = ddpo_iskl.ddpm_step(
                    noise_pred, latents, step, policy.schedule, latents
                )
                means.append(mean)
            squares = (means[0] - means[1]) ** 2 / (2 * policy.schedule.sigma[s] ** 2)
            kl += squares.sum(dim=(1, 2, 3)).mean().item()
    assert info["kl_ref"] == pytest.approx(kl, rel=1e-3)


def test_the_reference_costs_one_forward_per_pair_and_iteration(
    tiny_sd, tmp_path, few_prompts, monkeypatch
):
    """Whatever the number of updates. The first model that main loads is the policy."""
    real = ddpo_iskl.load_model
    forwards = []  # rows of each forward pass, for each model loaded

    def load_model(args):
        pipe, params = real(args)
        forwards.append(count_rows(pipe.unet))
        return pipe, params

    monkeypatch.setattr(ddpo_iskl, "load_model", load_model)
    run(
        ddpo_iskl,
        tmp_path,
        tiny_sd,
        prompts=few_prompts,
        num_samples=8,
        num_updates=4,
        iterations=3,
        save_every=9,
    )
    assert len(forwards) == 2
    assert sum(forwards[1]) == 3 * 8 * 5


@pytest.mark.parametrize(
    "kl, num_steps, iterations, bound", [("squared", 6, 10, 0.5), ("exact", 4, 6, 0.25)]
)
def test_a_large_coefficient_holds_the_policy_closer(
    tiny_sd, tmp_path, few_prompts, brightness, kl, num_steps, iterations, bound
):
    last = {}
    for kl_coef in (0.0, 1e3):
        folder = run(
            ddpo_iskl,
            tmp_path / str(kl_coef),
            tiny_sd,
            prompts=few_prompts,
            reward=brightness,
            kl=kl,
            kl_coef=kl_coef,
            num_samples=8,
            num_steps=num_steps,
            iterations=iterations,
            save_every=99,
            lr=1e-4,
        )
        last[kl_coef] = read_metrics(folder)[-1]["kl_ref"]
    assert last[1e3] < bound * last[0.0]


def test_table_1s_large_learning_rate_ends_with_numbers(tiny_sd, tmp_path, few_prompts):
    folder = run(
        ddpo_iskl, tmp_path, tiny_sd, prompts=few_prompts, num_samples=8, iterations=6, lr=3e-3
    )
    rows = read_metrics(folder)
    assert len(rows) == 7
    for row in rows:
        assert np.isfinite(list(row.values())).all()
    assert rows[-1]["skipped"] == 0 and rows[-1]["kl_ref"] > 0


# ---- reward-weighted regression: the weights ----

RWR_PROMPTS = ["cat", "dog", "cat", "dog", "cat"]
CATS, DOGS = [0, 2, 4], [1, 3]


def rwr_weights(rewards, beta, center=False):
    args = SimpleNamespace(beta=beta, center_weights=center)
    return rwr.compute_weights(np.array(rewards), RWR_PROMPTS, args)


def sparse_weights(rewards, prompts, threshold=None, quantile=0.9, center=False):
    args = SimpleNamespace(threshold=threshold, quantile=quantile, center_weights=center)
    return rwr_sparse.compute_weights(np.array(rewards), prompts, args)


def test_rwr_weights_are_a_softmax_within_each_prompt():
    rewards = np.array([0.1, 5.0, 0.3, 4.0, -0.2])
    weights, info = rwr_weights(rewards, 2.0)
    sizes = {}
    for peers in (CATS, DOGS):
        exp = np.exp(2.0 * rewards[peers])
        np.testing.assert_allclose(weights[peers], exp / exp.sum(), rtol=1e-12)
        sizes[len(peers)] = 1 / np.sum(weights[peers] ** 2)
    # a mean over the samples
    assert info == {"effective_samples": pytest.approx((3 * sizes[3] + 2 * sizes[2]) / 5)}
    shifted, _ = rwr_weights(rewards + 37.0, 2.0)
    np.testing.assert_allclose(shifted, weights, rtol=1e-9)


def test_rwr_weights_at_the_limits_of_beta():
    rewards = [0.1, 5.0, 0.3, 4.0, -0.2]
    equal, info = rwr_weights(rewards, 0.0)
    np.testing.assert_allclose(equal, [1 / 3, 1 / 2, 1 / 3, 1 / 2, 1 / 3], rtol=1e-12)
    assert info["effective_samples"] == pytest.approx((3 * 3 + 2 * 2) / 5)
    best, info = rwr_weights(rewards, 1e4)
    np.testing.assert_allclose(best, [0, 1, 1, 0, 0], atol=1e-12)
    assert info["effective_samples"] == pytest.approx(1.0)


def test_rwr_weights_of_huge_rewards_are_finite():
    weights, _ = rwr_weights([1e4, -1e4, 1e4, 1e4, 0.0], 10.0)
    np.testing.assert_allclose(weights, [0.5, 0, 0.5, 1, 0], atol=1e-12)


def test_sparse_weights_at_above_and_below_the_threshold():
    rewards = [1.0, 2.0, 3.0, 2.0 - 1e-9]
    weights, info = sparse_weights(rewards, ["cat"] * 4, threshold=2.0)
    assert weights.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert info == {"threshold": 2.0, "passed": 0.5}


def test_a_threshold_of_0_is_a_threshold():
    weights, info = sparse_weights([-1.0, -2.0, -3.0], ["cat"] * 3, threshold=0.0)
    assert weights.tolist() == [0.0, 0.0, 0.0]
    assert info == {"threshold": 0.0, "passed": 0.0}


def test_sparse_weights_take_a_quantile():
    weights, info = sparse_weights(np.arange(9.0), ["cat"] * 9, quantile=0.75)
    assert weights.tolist() == [0.0] * 6 + [1.0] * 3
    assert info == {"threshold": 6.0, "passed": pytest.approx(1 / 3)}


def test_each_prompt_has_a_quantile_of_its_own():
    """A dog is never better than a cat here."""
    rewards = np.array([100.0, 1.0] * 5) + np.arange(10.0)
    weights, info = sparse_weights(rewards, ["cat", "dog"] * 5, quantile=0.75)
    assert weights.tolist() == [0.0] * 6 + [1.0] * 4
    assert info == {"threshold": 57.0, "passed": 0.4}


def test_centered_weights_sum_to_0_within_each_prompt():
    rewards = [0.1, 5.0, 0.3, 4.0, -0.2]
    plain, plain_info = rwr_weights(rewards, 2.0)
    weights, info = rwr_weights(rewards, 2.0, center=True)
    np.testing.assert_allclose(weights, plain - [1 / 3, 1 / 2, 1 / 3, 1 / 2, 1 / 3], rtol=1e-12)
    assert info == plain_info

    prompts = ["cat", "dog"] * 4
    weights, info = sparse_weights([9, 1, 2, 4, 3, 3, 1, 2], prompts, quantile=0.9, center=True)
    np.testing.assert_allclose(weights[::2], [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(weights[1::2], [-0.25, 0.75, -0.25, -0.25])
    assert info["passed"] == 0.25


def test_equal_weights_are_0_when_centered():
    assert not rwr_weights([0.1, 5.0, 0.3, 4.0, -0.2], 0.0, center=True)[0].any()
    for quantile in (0, 1):
        assert not sparse_weights([1, 1, 1], ["cat"] * 3, quantile=quantile, center=True)[0].any()
    weights, info = sparse_weights([1, 2, 3], ["cat"] * 3, threshold=-1.0, center=True)
    assert not weights.any() and info["passed"] == 1.0


@pytest.mark.parametrize("peers", [7, 14, 20])
def test_what_rounding_leaves_of_equal_weights_is_no_weight(peers):
    """A fifth draw of one prompt has 20 peers; 1e-17 would be an update without any pair."""
    prompts = ["cat"] * peers
    args = SimpleNamespace(beta=10.0, center_weights=True)
    for rewards in (np.full(peers, 2.5), 2.5 + 1e-8 * np.arange(peers)):
        assert not rwr.compute_weights(rewards, prompts, args)[0].any()
    assert not sparse_weights(np.full(peers, 2.5), prompts, center=True)[0].any()


# ---- reward-weighted regression: loss and gradient ----


def test_the_denoising_loss_by_hand():
    noise_pred = torch.zeros(2, 4, 8, 8)
    noise = torch.stack([torch.full((4, 8, 8), 2.0), torch.full((4, 8, 8), 3.0)])
    noise[1, :2] = 1.0
    weights = torch.tensor([0.25, 2.0])
    for script in REGRESSION:
        loss, info = script.compute_loss(noise_pred, noise, weights)
        assert loss.tolist() == [1.0, 10.0]
        assert info["mse"].tolist() == [4.0, 5.0]


@every_regression
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("micro_batch", [1, 7, 1000])
def test_the_weighted_loss_and_its_gradient_equal_a_sum_by_hand(
    tmp_path, script, prediction_type, micro_batch
):
    """Against diffusers' add_noise, one pair and one condition at a time, by plain autograd."""
    folder = make_pipeline(tmp_path, prediction_type=prediction_type)
    policy = load(script, folder, micro_batch=micro_batch)
    rollout = make_regression_rollout(policy)
    scheduler = DDIMScheduler(**STABLE_DIFFUSION)
    losses = []
    for i in range(4):
        for k in range(6):
            noise = rollout["noise"][i : i + 1, k]
            t = rollout["timesteps"][i : i + 1, k]
            latents = scheduler.add_noise(rollout["latents"][i : i + 1], noise, t)
            uncond = policy.unet(latents, t, rollout["embeds"][0, i : i + 1]).sample
            text = policy.unet(latents, t, rollout["embeds"][1, i : i + 1]).sample
            noise_pred = uncond + 5.0 * (text - uncond)
            if prediction_type == "v_prediction":
                # what diffusers' DDIM calls epsilon
                abar = scheduler.alphas_cumprod[t]
                noise_pred = abar.sqrt() * noise_pred + (1 - abar).sqrt() * latents
            losses.append(rollout["weights"][i] * ((noise - noise_pred) ** 2).mean())
    expected = torch.stack(losses).mean()
    gradient, info = accumulate(policy, rollout)
    assert info["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert_same_autograd(gradient, expected, policy)


@every_regression
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_unet_is_given_what_diffusers_add_noise_makes(tmp_path, script, prediction_type):
    """A UNet that predicts its target perfectly has no loss, at any of the 1000 timesteps."""
    policy = load(script, make_pipeline(tmp_path, prediction_type=prediction_type))
    scheduler = DDIMScheduler(**STABLE_DIFFUSION)
    rollout = make_regression_rollout(policy)
    rollout["timesteps"] = torch.tensor([[0, 1, 500, 998, 999, 20]]).repeat(4, 1)
    rollout["weights"] = torch.ones(4)
    shape = rollout["noise"].shape
    x0 = rollout["latents"][:, None].expand(shape).flatten(0, 1)
    noise = rollout["noise"].flatten(0, 1)
    t = rollout["timesteps"].flatten()
    expected_latents = scheduler.add_noise(x0, noise, t)
    target = noise
    if prediction_type == "v_prediction":
        target = scheduler.get_velocity(x0, noise, t)
    seen = []

    def unet(latents, t, embeds):
        first = sum(len(rows) for rows in seen)
        rows = target[first : first + len(latents) // 2]
        seen.append(latents.chunk(2)[0])
        rows = rows.clone().requires_grad_(True)
        return SimpleNamespace(sample=torch.cat([rows, rows]))

    unet.zero_grad = policy.unet.zero_grad
    unet.parameters = policy.unet.parameters
    info = script.accumulate_gradients(unet, rollout, policy.schedule, policy.scaler, policy.args)
    torch.testing.assert_close(torch.cat(seen), expected_latents)
    assert info["loss"] < 1e-6


def test_a_weight_that_float32_loses_is_left_out_of_the_computation(tiny_sd):
    policy = load(rwr, tiny_sd)
    rows = count_rows(policy.unet)
    rollout = make_regression_rollout(policy)
    rollout["weights"] = torch.tensor([1.0, 1e-9, 1e-6, 0.0])
    _, info = accumulate(policy, rollout)
    assert sum(rows) == 2 * 6
    # the loss is a mean over all 24 pairs, mse over those that were computed
    rollout["weights"] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    _, alone = accumulate(policy, rollout)
    assert alone["loss"] == pytest.approx(alone["mse"] * 6 / 24, rel=1e-5)
    assert alone["loss"] == pytest.approx(info["loss"], rel=1e-4)


@every_regression
def test_without_any_weight_there_is_nothing_to_compute(tiny_sd, script):
    policy = load(script, tiny_sd)
    rollout = make_regression_rollout(policy)
    rollout["weights"] = torch.zeros(4)
    info = script.accumulate_gradients(
        policy.unet, rollout, policy.schedule, policy.scaler, policy.args
    )
    assert info == {"loss": 0.0}
    assert all(p.grad is None for p in policy.params.values())


def test_no_sample_over_the_threshold_skips_the_update(tiny_sd, tmp_path, few_prompts, capsys):
    folder = run(
        rwr_sparse,
        tmp_path,
        tiny_sd,
        prompts=few_prompts,
        threshold=1e6,
        num_updates=2,
        weight_decay=0.1,
        lr=0.1,
    )
    assert capsys.readouterr().out.count("no sample has a weight, so there is no update") == 2
    before = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None).unet
    after = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    for name, weight in before.state_dict().items():
        assert torch.equal(after[name], weight)
    for row in read_metrics(folder)[1:]:
        assert row["passed"] == 0
        assert "loss" not in row and "grad_norm" not in row


@every_regression
def test_every_update_takes_all_samples_with_noise_of_its_own(
    tiny_sd, tmp_path, few_prompts, monkeypatch, script
):
    real = script.accumulate_gradients
    seen = []

    def spy(unet, rollout, *others):
        seen.append(dict(rollout))
        return real(unet, rollout, *others)

    monkeypatch.setattr(script, "accumulate_gradients", spy)
    run(
        script,
        tmp_path,
        tiny_sd,
        prompts=few_prompts,
        num_samples=8,
        num_steps=25,
        num_updates=3,
        iterations=1,
    )
    assert len(seen) == 3
    noise = torch.stack([rollout["noise"] for rollout in seen])
    timesteps = torch.stack([rollout["timesteps"] for rollout in seen])
    assert noise.shape == (3, 8, 25, 4, 8, 8) and timesteps.shape == (3, 8, 25)
    assert len(noise.flatten(0, 2).unique(dim=0)) == 3 * 8 * 25
    # uniform over all 1000 timesteps, whatever the 25 of sampling
    assert timesteps.min() < 20 and timesteps.max() > 979
    assert timesteps.float().mean().item() == pytest.approx(499.5, abs=5 * 289 / 600**0.5)


@every_regression
def test_each_prompt_is_drawn_several_times_and_its_samples_differ(
    tiny_sd, tmp_path, few_prompts, monkeypatch, script
):
    real = script.compute_weights
    seen = []

    def spy(rewards, prompts, args):
        seen.append((rewards, prompts))
        return real(rewards, prompts, args)

    monkeypatch.setattr(script, "compute_weights", spy)
    run(
        script,
        tmp_path,
        tiny_sd,
        prompts=few_prompts,
        num_samples=12,
        samples_per_prompt=4,
        iterations=1,
    )
    ((rewards, prompts),) = seen
    assert prompts == [prompts[0]] * 4 + [prompts[4]] * 4 + [prompts[8]] * 4
    assert len(set(prompts)) > 1
    assert len(set(rewards.tolist())) > 6
