"""What each algorithm claims: unbiased policy gradients, a KL penalty on the policy's own trajectory, RWR's weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import embed, read_metrics
from diffusers import DDIMScheduler, StableDiffusionPipeline

import ddpo_is
import ddpo_iskl
import ddpo_sf
import rwr
import rwr_sparse

SCHEDULER = DDIMScheduler(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, set_alpha_to_one=False, steps_offset=1
)

# ---- policy gradients ----


def estimate(script, theta, theta_beh, clip_range, n=200_000):
    """The estimator's mean gradient and its standard error; x ~ N(theta_beh, 1), reward x^2 less its mean."""
    x = theta_beh + torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    thetas = torch.full((n,), theta, dtype=torch.float64, requires_grad=True)  # one each, for a gradient each
    log_prob = torch.distributions.Normal(thetas, 1.0).log_prob(x)
    log_prob_beh = torch.distributions.Normal(theta_beh, 1.0).log_prob(x)
    pairs = {"log_prob_beh": log_prob_beh, "advantages": x**2 - theta_beh**2 - 1}
    loss, _ = script.compute_loss(log_prob, None, pairs, None, SimpleNamespace(clip_range=clip_range))
    (g,) = torch.autograd.grad(loss.sum(), thetas)
    return -float(g.mean()), float(g.std() / n**0.5)


@pytest.mark.parametrize(
    "script, theta, theta_beh, clip_range",
    [(ddpo_sf, 0.7, 0.7, None), (ddpo_is, 0.7, 0.7, 1e-4), (ddpo_is, 0.9, 0.6, 1e9)],
)
def test_the_estimator_agrees_with_the_analytic_gradient(script, theta, theta_beh, clip_range):
    """d/dtheta E[x^2] = 2 theta for x ~ N(theta, 1)"""
    mean, error = estimate(script, theta, theta_beh, clip_range)
    assert abs(mean - 2 * theta) < 3 * error and error < 0.02 * 2 * theta


def test_what_the_textbook_says_about_the_biased_ones():
    """Off-policy REINFORCE and the clipped weight miss the gradient by many standard errors: importance sampling is
    what makes the estimate right, and the trust region what bounds it."""
    for script, clip_range in ((ddpo_sf, None), (ddpo_is, 1e-4)):
        mean, error = estimate(script, 0.9, 0.6, clip_range)
        assert abs(mean - 2 * 0.9) > 20 * error


# ---- the KL penalty ----


def kl_args(model, **changes):
    options = dict(device="cpu", precision="fp32", lora_rank=0, micro_batch=8, num_steps=6) | changes
    return ddpo_iskl.Args(model=model, **options)


def make_policy(args, moved=0.0):
    """(UNet of the policy, its parameters, frozen, schedule, data of 4 trajectories), `moved` away from pretrained."""
    pipe, params = ddpo_iskl.load_model(args)
    frozen = None if args.lora_rank else ddpo_iskl.load_model(args)[0].unet.requires_grad_(False)
    g = torch.Generator().manual_seed(5)
    for p in params.values():
        p.data += moved * torch.randn(p.shape, generator=g)
    schedule = ddpo_iskl.make_schedule(DDIMScheduler.from_config(pipe.scheduler.config), args.num_steps, "cpu")
    embeds = embed(pipe, ["cat", "dog", "cat", "bee"])
    noise = torch.randn((4, args.num_steps + 1, 4, 8, 8), generator=g)
    latents, log_probs = ddpo_iskl.sample_trajectories(pipe.unet, embeds, noise, schedule, args)
    data = {"latents": latents, "embeds": embeds, "log_prob_beh": log_probs, "advantages": torch.zeros_like(log_probs)}
    return pipe.unet, params, frozen, schedule, data


def penalty_gradient(unet, params, frozen, schedule, data, args):
    """(gradient of the penalty alone, as one vector, info): the advantages are 0."""
    info = ddpo_iskl.accumulate_gradients(unet, frozen, data, torch.arange(4), schedule, args)
    return torch.cat([p.grad.flatten() for p in params.values() if p.grad is not None]), info


def scored_pairs(unet, frozen, schedule, data, args):
    """What compute_loss was given: log_prob, mean, and the reference's log_prob and mean, (4, T, ...) each."""
    seen, real = [], ddpo_iskl.compute_loss

    def spy(log_prob, mean, pairs, *rest):
        seen.append((log_prob.detach(), mean.detach(), pairs["log_prob_ref"], pairs["mean_ref"]))
        return real(log_prob, mean, pairs, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpo_iskl, "compute_loss", spy)
        ddpo_iskl.accumulate_gradients(unet, frozen, data, torch.arange(4), schedule, args)
    return [torch.cat(x).unflatten(0, (4, -1)) for x in zip(*seen)]


@pytest.mark.parametrize("kl", ["squared", "exact"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_penalty_and_its_gradient_are_zero_at_the_start(tiny_sd, lora_rank, kl):
    args = kl_args(tiny_sd, lora_rank=lora_rank, kl=kl)
    g, info = penalty_gradient(*make_policy(args), args)
    assert info["kl_ref"] < 1e-6 and abs(info["loss"]) < 1e-9
    moved, moved_info = penalty_gradient(*make_policy(args, moved=0.02), args)
    assert moved_info["kl_ref"] > 1e-3 and g.norm() < 1e-3 * moved.norm()


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_reference_scores_the_policys_own_trajectory(tiny_sd, lora_rank):
    """Step by step against a freshly loaded pretrained UNet, on the latents that the (moved) policy stored."""
    args = kl_args(tiny_sd, lora_rank=lora_rank)
    unet, _, frozen, schedule, data = make_policy(args, moved=0.05)
    log_probs, _, log_prob_ref, mean_ref = scored_pairs(unet, frozen, schedule, data, args)
    pretrained = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None).unet
    for s in range(args.num_steps):
        x, y, step = data["latents"][:, s], data["latents"][:, s + 1], torch.full((4,), s)
        with torch.no_grad():
            noise_pred = ddpo_iskl.predict_noise(pretrained, x, schedule.timesteps[step], data["embeds"], schedule, 5.0)
        _, log_prob, mean = ddpo_iskl.ddpm_step(noise_pred, x, step, schedule, next_latents=y)
        torch.testing.assert_close(log_prob_ref[:, s], log_prob, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mean_ref[:, s], mean, atol=1e-5, rtol=1e-5)
        # the reference's own rollout would have been elsewhere: its log-prob of itself is not this one
        own = ddpo_iskl.ddpm_step(noise_pred, x, step, schedule, noise=torch.zeros_like(x))[1]
        assert (own - log_prob).abs().min() > 0.1
    # and the policy, its adapter on again, is still the one that drew them
    torch.testing.assert_close(log_probs, data["log_prob_beh"], atol=1e-5, rtol=1e-5)
    assert (log_probs - log_prob_ref).abs().max() > 1e-3


def test_in_a_run_the_penalty_of_the_first_update_is_zero(tiny_sd, tmp_path):
    """The whole script: nothing has moved in the first update, so that any other trajectory than the policy's shows."""
    options = dict(num_samples=4, num_steps=6, num_updates=1, save_every=9, device="cpu", lr=1e-2, kl_coef=1.0)
    run = ddpo_iskl.main(ddpo_iskl.Args(model=tiny_sd, out=str(tmp_path), iterations=2, **options))
    rows = read_metrics(run)
    assert rows[1]["kl_ref"] < 1e-6 < 1e-2 < rows[2]["kl_ref"]


def test_the_reference_costs_one_forward_of_a_pair_an_iteration(tiny_sd, tmp_path, monkeypatch):
    """Whatever the number of updates; the first model that main loads is the policy, the second the reference."""
    loaded, real = [], ddpo_iskl.load_model

    def load_model(args):
        pipe, params = real(args)
        loaded.append([])
        count = lambda module, inputs, output, rows=loaded[-1]: rows.append(len(inputs[0]) // 2)
        pipe.unet.register_forward_hook(count)
        return pipe, params

    monkeypatch.setattr(ddpo_iskl, "load_model", load_model)
    options = dict(num_samples=8, num_steps=5, num_updates=4, iterations=3, save_every=9, device="cpu")
    ddpo_iskl.main(ddpo_iskl.Args(model=tiny_sd, out=str(tmp_path), **options))
    assert len(loaded) == 2 and sum(loaded[1]) == 3 * 8 * 5


def test_both_penalties_equal_torch_distributions_and_a_hand_computation():
    schedule = ddpo_iskl.make_schedule(SCHEDULER, 6, "cpu")
    g = torch.Generator().manual_seed(0)
    mean, mean_ref = torch.randn((2, 6, 4, 8, 8), generator=g)
    log_prob, log_prob_ref, advantages = torch.randn((3, 6), generator=g)
    pairs = {"log_prob_beh": log_prob, "advantages": advantages, "log_prob_ref": log_prob_ref, "mean_ref": mean_ref}
    pairs["step"] = torch.tensor([0, 1, 2, 3, 4, 5])
    normal = [torch.distributions.Normal(m, schedule.sigmas.view(-1, 1, 1, 1)) for m in (mean, mean_ref)]
    kl = torch.distributions.kl_divergence(*normal)  # (6, 4, 8, 8)
    for name, expected in (("exact", kl.mean((1, 2, 3))), ("squared", (log_prob - log_prob_ref) ** 2 / 2)):
        args = ddpo_iskl.Args(kl=name, kl_coef=0.7)
        loss, info = ddpo_iskl.compute_loss(log_prob, mean, pairs, schedule, args)
        torch.testing.assert_close(loss, -advantages + 0.7 * expected)
        torch.testing.assert_close(info["kl_penalty"], 0.7 * expected)
        # nats per image: the mean over pairs is the sum over all dimensions and the six steps, of one trajectory
        torch.testing.assert_close(info["kl_ref"].mean(), kl.sum())


def test_a_step_without_noise_has_no_kl(tiny_sd_v):
    args = kl_args(tiny_sd_v)
    policy = make_policy(args, moved=0.02)
    _, info = penalty_gradient(*policy, args)
    unet, _, frozen, schedule, data = policy
    kl = 0
    with torch.no_grad():
        for s in range(5):  # of 6
            x, step = data["latents"][:, s], torch.full((4,), s)
            inputs = x, schedule.timesteps[step], data["embeds"], schedule, 5.0
            noise_preds = [ddpo_iskl.predict_noise(model, *inputs) for model in (unet, frozen)]
            means = [ddpo_iskl.ddpm_step(noise_pred, x, step, schedule, noise=x)[2] for noise_pred in noise_preds]
            kl += ((means[0] - means[1]) ** 2 / (2 * schedule.sigmas[s] ** 2)).sum((1, 2, 3)).mean()
    assert info["kl_ref"] == pytest.approx(float(kl), rel=1e-3)


@pytest.mark.parametrize("kl", ["squared", "exact"])
def test_a_large_coefficient_holds_the_policy_closer(tiny_sd, tmp_path, brightness, kl):
    last = {}
    for kl_coef in (0.0, 1e3):
        options = dict(num_samples=8, num_steps=6, save_every=99, device="cpu", lr=1e-4, iterations=10, kl=kl)
        args = ddpo_iskl.Args(model=tiny_sd, out=str(tmp_path / str(kl_coef)), reward=brightness, **options)
        args.kl_coef = kl_coef
        last[kl_coef] = read_metrics(ddpo_iskl.main(args))[-1]["kl_ref"]
    assert last[1e3] < 0.5 * last[0.0]


def test_without_a_penalty_iskl_is_is(tiny_sd, tmp_path):
    options = dict(model=tiny_sd, out=str(tmp_path), num_samples=4, num_steps=5, iterations=3, device="cpu", lr=1e-3)
    a = read_metrics(ddpo_is.main(ddpo_is.Args(**options)))
    b = read_metrics(ddpo_iskl.main(ddpo_iskl.Args(**options, kl_coef=0.0)))
    for x, y in zip(a, b, strict=True):
        assert all(x[name] == y[name] for name in x if not name.endswith("_s") and name != "peak_mem_gb")


def test_table_1s_bad_learning_rate_ends_with_numbers(tiny_sd, tmp_path):
    options = dict(model=tiny_sd, out=str(tmp_path), num_samples=8, num_steps=5, iterations=6, device="cpu")
    rows = read_metrics(ddpo_iskl.main(ddpo_iskl.Args(**options, lr=3e-3)))
    assert len(rows) == 7 and all(np.isfinite(list(row.values())).all() for row in rows)
    assert rows[-1]["skipped"] == 0 and rows[-1]["kl_ref"] > 0


# ---- reward-weighted regression ----

PROMPTS = ["cat", "dog", "cat", "dog", "cat"]


def rwr_weights(rewards, beta):
    return rwr.compute_weights(np.array(rewards), PROMPTS, SimpleNamespace(beta=beta))


def test_rwr_weights_are_a_softmax_within_each_prompt():
    rewards = [0.1, 5.0, 0.3, 4.0, -0.2]
    weights, info = rwr_weights(rewards, 2.0)
    for peers in ([0, 2, 4], [1, 3]):
        e = np.exp(2.0 * np.array(rewards)[peers])
        np.testing.assert_allclose(weights[peers], e / e.sum(), rtol=1e-12)
    np.testing.assert_allclose(rwr_weights(np.add(rewards, 37.0), 2.0)[0], weights, rtol=1e-9)
    sizes = [1 / np.sum(weights[peers] ** 2) for peers in ([0, 2, 4], [1, 3])]
    assert info["effective_samples"] == pytest.approx((3 * sizes[0] + 2 * sizes[1]) / 5)  # a mean over the samples


def test_rwr_weights_at_the_limits():
    rewards = [0.1, 5.0, 0.3, 4.0, -0.2]
    np.testing.assert_allclose(rwr_weights(rewards, 1e-9)[0], [1 / 3, 1 / 2, 1 / 3, 1 / 2, 1 / 3], atol=1e-8)
    np.testing.assert_allclose(rwr_weights(rewards, 1e4)[0], [0, 1, 1, 0, 0], atol=1e-12)
    huge, _ = rwr_weights([1e4, -1e4, 1e4, 1e4, 0.0], 10.0)
    np.testing.assert_allclose(huge, [0.5, 0, 0.5, 1, 0], atol=1e-12)


def test_sparse_weights_at_above_and_below_the_threshold():
    rewards = np.array([1.0, 2.0, 3.0, 2.0 - 1e-9])
    weights, info = rwr_sparse.compute_weights(rewards, ["cat"] * 4, SimpleNamespace(threshold=2.0, quantile=0.9))
    assert weights.tolist() == [0.0, 1.0, 1.0, 0.0] and info == {"threshold": 2.0, "passed": 0.5}
    args = SimpleNamespace(threshold=None, quantile=0.75)
    weights, info = rwr_sparse.compute_weights(np.arange(9.0), ["cat"] * 9, args)
    assert info["threshold"] == 6.0 and weights.tolist() == [0.0] * 6 + [1.0] * 3
    prompts = ["cat", "dog"] * 5  # each prompt has a quantile of its own: a dog is never better than a cat here
    weights, info = rwr_sparse.compute_weights(np.array([100.0, 1.0] * 5) + np.arange(10.0), prompts, args)
    assert weights.tolist() == [0.0] * 6 + [1.0] * 4 and info == {"threshold": 57.0, "passed": 0.4}
    args = SimpleNamespace(threshold=0.0, quantile=0.9)  # a threshold of 0 is a threshold
    assert rwr_sparse.compute_weights(-rewards, ["cat"] * 4, args)[0].sum() == 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_noised_latent_equals_diffusers_add_noise(prediction_type):
    scheduler = DDIMScheduler.from_config(SCHEDULER.config, prediction_type=prediction_type)
    schedule = rwr.make_schedule(scheduler, 20, "cpu")
    g = torch.Generator().manual_seed(0)
    latents, noise = torch.randn((2, 1000, 4, 2, 2), generator=g)
    t = torch.arange(1000)
    torch.testing.assert_close(rwr.add_noise(latents, noise, t, schedule), scheduler.add_noise(latents, noise, t))


def rwr_data(tiny_sd, script):
    args = script.Args(model=tiny_sd, device="cpu", precision="fp32", lora_rank=0, micro_batch=8, num_steps=6)
    pipe, params = script.load_model(args)
    schedule = script.make_schedule(DDIMScheduler.from_config(pipe.scheduler.config), args.num_steps, "cpu")
    g = torch.Generator().manual_seed(0)
    data = {"latents": torch.randn((4, 4, 8, 8), generator=g), "noise": torch.randn((4, 6, 4, 8, 8), generator=g)}
    data["timesteps"] = torch.randint(1000, (4, 6), generator=g)
    data["embeds"] = embed(pipe, ["cat", "dog", "cat", "bee"])
    data["weights"] = torch.tensor([0.7, 0.0, 0.3, 1.0])
    return pipe.unet, params, data, schedule, args


@pytest.mark.parametrize("script", [rwr, rwr_sparse])
@pytest.mark.parametrize("micro_batch", [1, 7, 1000])
def test_the_weighted_loss_and_its_gradient_equal_a_sum_by_hand(tiny_sd, script, micro_batch):
    """Against diffusers' add_noise, the UNet called for cond and uncond one at a time, and plain autograd."""
    unet, params, data, schedule, args = rwr_data(tiny_sd, script)
    args.micro_batch = micro_batch
    total = 0
    for i in range(4):
        for k in range(6):
            noise, t = data["noise"][i, k][None], data["timesteps"][i, k][None]
            x = SCHEDULER.add_noise(data["latents"][i][None], noise, t)
            uncond, cond = (unet(x, t, e[i][None]).sample for e in data["embeds"])
            total = total + data["weights"][i] * ((noise - (uncond + 5.0 * (cond - uncond))) ** 2).mean()
    expected = torch.autograd.grad(total / 24, list(params.values()), allow_unused=True)
    info = script.accumulate_gradients(unet, data, schedule, args)
    assert info["loss"] == pytest.approx(float(total.detach()) / 24, rel=1e-5)
    scale = max(float(e.abs().max()) for e in expected if e is not None)
    for p, e in zip(params.values(), expected):
        if e is not None:
            torch.testing.assert_close(p.grad, e, rtol=1e-3, atol=1e-5 * scale)


def test_a_weight_that_float32_loses_is_left_out_of_the_computation(tiny_sd):
    unet, params, data, schedule, args = rwr_data(tiny_sd, rwr)
    rows = []
    unet.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0]) // 2))
    data["weights"] = torch.tensor([1.0, 1e-9, 1e-6, 0.0])
    rwr.accumulate_gradients(unet, data, schedule, args)
    assert sum(rows) == 2 * 6


@pytest.mark.parametrize("script", [rwr, rwr_sparse])
def test_every_update_takes_all_samples_with_noise_of_its_own(tiny_sd, tmp_path, monkeypatch, script):
    seen, real = [], script.accumulate_gradients
    spy = lambda unet, data, *rest: seen.append((data["noise"], data["timesteps"])) or real(unet, data, *rest)
    monkeypatch.setattr(script, "accumulate_gradients", spy)
    options = dict(num_samples=8, num_steps=50, iterations=1, num_updates=3, device="cpu")
    script.main(script.Args(model=tiny_sd, out=str(tmp_path), **options))
    assert len(seen) == 3 and all(noise.shape == (8, 50, 4, 8, 8) for noise, _ in seen)
    noise, timesteps = (torch.stack(x) for x in zip(*seen))  # (3, 8, 50, ...)
    assert len(noise.flatten(0, 2).unique(dim=0)) == 3 * 8 * 50
    assert timesteps.min() < 10 and timesteps.max() > 989  # uniform over all 1000, whatever the 50 of sampling


@pytest.mark.parametrize("script", [rwr, rwr_sparse])
def test_each_prompt_is_drawn_several_times_and_the_samples_differ(tiny_sd, tmp_path, monkeypatch, script):
    seen, real = [], script.compute_weights
    spy = lambda rewards, prompts, args: seen.append((rewards, prompts)) or real(rewards, prompts, args)
    monkeypatch.setattr(script, "compute_weights", spy)
    options = dict(num_samples=12, samples_per_prompt=4, num_steps=4, iterations=1, num_updates=1, device="cpu")
    script.main(script.Args(model=tiny_sd, out=str(tmp_path), **options))
    ((rewards, prompts),) = seen
    assert [prompts[i : i + 4] for i in (0, 4, 8)] == [[prompts[i]] * 4 for i in (0, 4, 8)]
    assert len(set(prompts)) > 1 and len(set(rewards.tolist())) > 6


def test_no_sample_over_the_threshold_skips_the_update_with_one_line(tiny_sd, tmp_path, capsys):
    options = dict(num_samples=4, num_updates=2, num_steps=4, iterations=2, device="cpu", weight_decay=0.1)
    run = rwr_sparse.main(rwr_sparse.Args(model=tiny_sd, out=str(tmp_path), threshold=1e6, **options))
    assert capsys.readouterr().out.count("the update is skipped") == 4
    start = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None).unet.state_dict()
    end = rwr_sparse.UNet2DConditionModel.from_pretrained(run / "unet").state_dict()
    assert all(torch.equal(start[name], end[name]) for name in start)
    assert [row["passed"] for row in read_metrics(run)[1:]] == [0, 0]
