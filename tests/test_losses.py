"""What each algorithm claims: advantages, clip, KL penalty, RWR's weights, losses and gradients."""

import weakref

import numpy as np
import pytest
import torch
from conftest import load_policy, make_pipeline, read_metrics, run, without_times
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.distributions import Normal, kl_divergence

import ddpo_is
import ddpo_iskl
import ddpo_sf
import rwr
import rwr_sparse

POLICY_GRADIENT = [ddpo_sf, ddpo_is, ddpo_iskl]
REGRESSION = [rwr, rwr_sparse]
PROMPTS = ["cat", "dog", "cat", "bee"]


def name_of(value):
    return getattr(value, "__name__", None)


every_policy_gradient = pytest.mark.parametrize("script", POLICY_GRADIENT, ids=name_of)
every_regression = pytest.mark.parametrize("script", REGRESSION, ids=name_of)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load(script, model, **changes):
    """A policy as main loads it, with its reference and its GradScaler."""
    policy = load_policy(script, model, **changes)
    policy.script = script
    policy.reference = None
    if script is ddpo_iskl and policy.args.lora_rank == 0:
        policy.reference = load_policy(script, model, **changes).unet
    policy.scaler = torch.amp.GradScaler("cpu", enabled=policy.args.precision == "fp16")
    return policy


def move(policy, distance, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in policy.params:
        p.data += distance * torch.randn(p.shape, generator=generator)


def make_rollout(policy):
    """Four trajectories drawn by the policy."""
    generators = [policy.script.make_generator(1, 1, i, 0) for i in range(4)]
    inputs = (policy.pipe, PROMPTS, generators, policy.schedule, policy.args)
    rollout = policy.script.sample_trajectories(*inputs)
    return rollout | {"advantages": torch.tensor([1.0, -0.5, 2.0, -1.5])}


def make_regression_rollout(policy):
    """Four finished latents with weights, and six draws of noise for each."""
    rollout = policy.script.sample_trajectories(
        policy.pipe, PROMPTS, [torch.Generator() for _ in PROMPTS], policy.schedule, policy.args
    )
    return {
        "latents": normal(4, 4, 8, 8),
        "noise": normal(4, 6, 4, 8, 8, seed=1),
        "timesteps": torch.tensor([[0, 1, 20, 500, 998, 999]]).repeat(4, 1),
        "embeds": rollout["embeds"],
        "weights": torch.tensor([0.7, 0.0, 0.3, -1.0]),
    }


def accumulate(policy, rollout, samples=(0, 1, 2, 3)):
    """accumulate_gradients, its gradient as one vector. Returns the gradient and the metrics."""
    inputs = [policy.unet]
    if policy.script is ddpo_iskl:
        inputs.append(policy.reference)
    inputs.append(rollout)
    if policy.script in POLICY_GRADIENT:
        inputs.append(torch.tensor(samples))
    info = policy.script.accumulate_gradients(*inputs, policy.schedule, policy.scaler, policy.args)
    grads = [p.grad.flatten() for p in policy.params if p.grad is not None]
    return torch.cat(grads) / policy.scaler.get_scale(), info


def assert_same_gradient(gradient, expected):
    """Equal up to the order of float32 sums."""
    assert expected.abs().max() > 0
    atol = 2e-5 * expected.abs().max().item()
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=atol)


def autograd(loss, policy):
    """The gradient of a loss as one vector."""
    grads = torch.autograd.grad(loss, policy.params, allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


# ---- advantages ----


@every_policy_gradient
def test_advantages_are_normalised_by_the_batch_until_a_prompt_has_16_rewards(script):
    history = {}
    rewards = np.array([1.0, 2.0, 3.0, 6.0])
    advantages = script.compute_advantages(rewards, ["a", "a", "b", "b"], history, 5.0)
    np.testing.assert_allclose(advantages, (rewards - 3.0) / (rewards.std() + 1e-6))
    assert history == {"a": [1.0, 2.0], "b": [3.0, 6.0]}

    # the whole batch enters the history before it is used; b has 15 rewards then, one too few
    history = {"a": [float(i) for i in range(15)], "b": [7.0] * 14}
    rewards = np.array([20.0, 5.0, 30.0])
    advantages = script.compute_advantages(rewards, ["a", "b", "a"], history, 5.0)
    own = np.array([*range(1, 15), 20.0, 30.0])
    expected = (rewards - own.mean()) / (own.std() + 1e-6)
    expected[1] = (5.0 - rewards.mean()) / (rewards.std() + 1e-6)
    np.testing.assert_allclose(advantages, expected)
    assert history == {"a": own.tolist(), "b": [7.0] * 14 + [5.0]}


@every_policy_gradient
def test_advantages_are_clipped_on_both_sides_and_equal_rewards_have_none(script):
    prompts = [str(i) for i in range(100)]
    for sign in (1, -1):
        rewards = sign * np.array([0.0] * 99 + [1.0])
        assert script.compute_advantages(rewards, prompts, {}, 5.0)[-1] == sign * 5.0
        assert script.compute_advantages(rewards, prompts, {}, 20.0)[-1] * sign > 9
    for n in range(1, 17):  # the mean of some of them is not exact
        assert not script.compute_advantages(np.full(n, 2.3), ["cat"] * n, {}, 5.0).any()


# ---- policy gradients: loss and gradient ----


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
    log_prob_old = torch.tensor([-3.0], dtype=torch.float64)
    batch = {"log_prob_old": log_prob_old, "advantages": torch.tensor([advantage])}
    value, info = ddpo_is.compute_loss(log_prob, batch, ddpo_is.Args(clip_range=0.1))
    value.sum().backward()
    assert value.item() == pytest.approx(loss)
    assert log_prob.grad.item() == pytest.approx(slope)
    assert info["clipfrac"].item() == (abs(ratio - 1) > 0.1)


def density_of(unet, policy, rollout):
    """p(x_{t-1} | x_t), (4, T, C, H, W), of a UNet, by diffusers' DDIMScheduler with eta = 1."""
    scheduler = DDIMScheduler.from_config(policy.pipe.scheduler.config)
    scheduler.set_timesteps(policy.args.num_steps)
    means = []
    sigmas = []
    for s, t in enumerate(scheduler.timesteps):
        latents = rollout["latents"][:, s]
        uncond = unet(latents, t, rollout["embeds"][0]).sample
        text = unet(latents, t, rollout["embeds"][1]).sample
        inputs = {"model_output": uncond + 5.0 * (text - uncond), "timestep": t, "sample": latents}
        no_noise = torch.zeros_like(latents)
        mean = scheduler.step(**inputs, eta=1.0, variance_noise=no_noise).prev_sample
        shifted = scheduler.step(**inputs, eta=1.0, variance_noise=no_noise + 1).prev_sample
        means.append(mean)
        sigmas.append((shifted - mean).mean().detach())
    sigma = torch.stack(sigmas).view(-1, 1, 1, 1)
    assert (sigma > 0).sum() == len(policy.schedule.noisy_steps)
    return Normal(torch.stack(means, dim=1)[:, sigma.flatten() > 0], sigma[sigma.flatten() > 0])


def expected_metrics(policy, rollout, pretrained):
    """The loss and metrics of each pair, (4, T), from the densities of both models."""
    density = density_of(policy.unet, policy, rollout)
    steps = density.mean.shape[1]
    next_latents = rollout["latents"][:, 1 : steps + 1]
    log_prob = density.log_prob(next_latents).mean(dim=(2, 3, 4))
    log_ratio = log_prob - rollout["log_probs"][:, :steps]
    ratio = log_ratio.exp()
    advantages = rollout["advantages"][:, None]
    metrics = {"approx_kl": log_ratio**2 / 2, "ratio_err": (ratio - 1).abs()}
    if policy.script is ddpo_sf:
        return metrics | {"loss": -advantages * log_prob}

    clip_range = policy.args.clip_range
    clipped = ratio.clip(1 - clip_range, 1 + clip_range)
    metrics["clipfrac"] = ((ratio - 1).abs() > clip_range).float()
    metrics["loss"] = -torch.minimum(advantages * ratio, advantages * clipped)
    if policy.script is ddpo_iskl:
        with torch.no_grad():
            density_ref = density_of(pretrained, policy, rollout)
        kl = kl_divergence(density, density_ref)
        log_prob_ref = density_ref.log_prob(next_latents).mean(dim=(2, 3, 4))
        penalty = kl.mean(dim=(2, 3, 4))
        if policy.args.kl == "squared":
            penalty = (log_prob - log_prob_ref - penalty.detach()) ** 2 / 2
        metrics["kl_penalty"] = policy.args.kl_coef * penalty
        metrics["loss"] = metrics["loss"] + metrics["kl_penalty"]
        metrics["kl_ref"] = kl.sum(dim=(2, 3, 4)) * steps  # nats per image, in the mean over steps
    return metrics


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd_v"])
@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize(
    "script, options",
    [
        (ddpo_sf, {}),
        (ddpo_is, {"clip_range": 2e-3}),
        (ddpo_iskl, {"clip_range": 2e-3, "kl": "exact", "kl_coef": 10.0}),
        (ddpo_iskl, {"clip_range": 2e-3, "kl": "squared", "kl_coef": 1e3}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or value.get("kl", "-"),
)
def test_loss_and_gradient_are_those_of_torch_distributions_and_autograd(
    script, options, lora_rank, model, request
):
    """Three of four samples, drawn by a policy that moved away from the pretrained model, trained
    on after another move, in microbatches of any size. The reference is a pretrained UNet, freshly
    loaded, on the policy's own trajectories; the last step of tiny_sd_v has no density.
    """
    folder = request.getfixturevalue(model)
    pretrained = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).unet
    policy = load(script, folder, lora_rank=lora_rank, num_steps=4, **options)
    move(policy, 0.1 if lora_rank else 0.03, seed=1)
    rollout = make_rollout(policy)
    move(policy, 0.02 if lora_rank else 0.003, seed=2)

    samples = [3, 0, 1]
    expected = {}
    for name, value in expected_metrics(policy, rollout, pretrained).items():
        expected[name] = value[samples].mean()
        if name == "ratio_err":
            expected[name] = value[samples].max()
    expected_gradient = autograd(expected["loss"], policy)
    for micro_batch in (1, 7, 1000):
        policy.args.micro_batch = micro_batch
        gradient, info = accumulate(policy, rollout, samples)
        assert_same_gradient(gradient, expected_gradient)
        for name, value in expected.items():
            assert info[name] == pytest.approx(value.item(), rel=2e-3, abs=1e-6)
    assert info.keys() == expected.keys()
    assert expected["ratio_err"] > 4e-3
    if script is not ddpo_sf:
        assert 0.2 < expected["clipfrac"] < 0.9
    if script is ddpo_iskl:  # it counts
        assert expected["kl_penalty"] > 0.05


@pytest.mark.parametrize(
    "script, lora_rank",
    [(ddpo_sf, 0), (ddpo_is, 4), (ddpo_iskl, 0), (ddpo_iskl, 4), (rwr, 0), (rwr_sparse, 4)],
    ids=name_of,
)
def test_the_gradient_in_fp16_is_that_in_fp32(tiny_sd, script, lora_rank):
    """GradScaler keeps what is under the smallest fp16 number, and takes its scale out again."""
    gradients = {}
    for precision in ("fp32", "fp16"):
        policy = load(script, tiny_sd, precision=precision, lora_rank=lora_rank)
        policy.scaler.scale(torch.zeros(()))  # makes its scale, 2^16
        if script in REGRESSION:
            rollout = make_regression_rollout(policy)
            rollout["weights"] *= 1e-4
        else:
            rollout = make_rollout(policy)
            rollout["advantages"] *= 1e-4
        gradients[precision], _ = accumulate(policy, rollout)
    error = (gradients["fp16"] - gradients["fp32"]).norm() / gradients["fp32"].norm()
    assert error < 0.05


# ---- half precision: sampling and training round alike ----


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_sampling_in_half_precision_runs_the_kernels_of_training(tiny_sd, precision):
    """torch chooses other ones without gradients; in fp32 they are off, which saves memory.

    What a step has saved for a backward pass is gone before the next one saves its own.
    """
    policy = load(ddpo_is, tiny_sd, precision=precision)
    seen = set()
    saved = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()
            saved.add(self)

    def look(unet, inputs, output):
        seen.add((torch.is_grad_enabled(), output.sample.dtype))

    policy.unet.register_forward_pre_hook(lambda *_: seen.add(len(saved)))
    policy.unet.register_forward_hook(look)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda kept: kept.tensor):
        rollout = make_rollout(policy)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert seen == {0, (precision != "fp32", dtype)}
    assert not any(value.requires_grad for value in rollout.values())


@every_policy_gradient
def test_a_runs_updates_take_equal_shares_in_the_batches_of_sampling(
    script, tiny_sd, few_prompts, tmp_path, monkeypatch
):
    """Row by row: rounding depends on a row's place in its batch, and the ratio must be 1."""
    batches = {True: [], False: []}  # of training, of sampling
    ddpm_step = script.ddpm_step

    def record(unet, latents, step, *inputs, **options):
        is_training = "noise" not in options
        rows = torch.cat([latents.detach().flatten(1), step[:, None].float()], dim=1)
        batches[is_training].append(rows)
        return ddpm_step(unet, latents, step, *inputs, **options)

    monkeypatch.setattr(script, "ddpm_step", record)
    options = {"num_samples": 8, "num_updates": 2, "iterations": 1, "precision": "bf16"}
    folder = run(script, tmp_path, tiny_sd, prompts=few_prompts, **options)
    sampled = batches[False]
    trained = batches[True]
    # two updates of 4 samples x 5 steps, 4 pairs in each batch, which the reference scores too
    assert len(trained) == 10 * (2 if script is ddpo_iskl else 1)
    assert len(torch.cat(trained).unique(dim=0)) == 8 * 5
    for batch in trained:
        assert any(batch.equal(other) for other in sampled if batch.shape == other.shape)
    assert read_metrics(folder)[1]["ratio_err"] == 0


# ---- the KL penalty in a run ----


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_in_a_run_the_kl_is_zero_at_first_and_grows_from_the_pretrained_model(
    tiny_sd, tmp_path, few_prompts, lora_rank
):
    options = {"num_updates": 1, "lr": 1e-2, "lora_rank": lora_rank}
    _, first, second = read_metrics(
        run(ddpo_iskl, tmp_path, tiny_sd, prompts=few_prompts, **options)
    )
    assert first["kl_ref"] < 1e-6
    assert second["kl_ref"] > 1e-2


def test_without_a_penalty_a_run_of_iskl_is_one_of_is(tiny_sd, tmp_path, few_prompts):
    options = {"prompts": few_prompts, "lr": 1e-3}
    expected = without_times(run(ddpo_is, tmp_path, tiny_sd, **options))
    rows = without_times(run(ddpo_iskl, tmp_path, tiny_sd, kl_coef=0.0, **options))
    for row, expected_row in zip(rows, expected, strict=True):
        assert {name: row[name] for name in expected_row} == expected_row


# ---- reward-weighted regression: the weights ----


def rwr_weights(rewards, prompts, center=False, beta=10.0):
    args = rwr.Args(beta=beta, center_weights=center)
    return rwr.compute_weights(np.array(rewards), prompts, args)


def sparse_weights(rewards, prompts, center=False, **options):
    args = rwr_sparse.Args(center_weights=center, **options)
    return rwr_sparse.compute_weights(np.array(rewards), prompts, args)


def test_rwr_weights_are_a_softmax_within_each_prompt():
    rewards = np.array([0.1, 5.0, 0.3, 4.0, -0.2])
    prompts = ["cat", "dog", "cat", "dog", "cat"]
    weights, info = rwr_weights(rewards, prompts, beta=2.0)
    sizes = []
    for peers in ([0, 2, 4], [1, 3]):
        exp = np.exp(2.0 * rewards[peers])
        np.testing.assert_allclose(weights[peers], exp / exp.sum(), rtol=1e-12)
        sizes += [1 / np.sum(weights[peers] ** 2)] * len(peers)
    assert info == {"effective_samples": pytest.approx(np.mean(sizes))}
    shifted, _ = rwr_weights(rewards + 1e4, prompts, beta=2.0)  # exp(1e4) is infinite
    np.testing.assert_allclose(shifted, weights, rtol=1e-9)
    means = np.array([1 / 3, 1 / 2, 1 / 3, 1 / 2, 1 / 3])
    centered, centered_info = rwr_weights(rewards, prompts, beta=2.0, center=True)
    np.testing.assert_allclose(centered, weights - means, rtol=1e-9)
    assert centered_info == info

    equal, info = rwr_weights(rewards, prompts, beta=0.0)
    np.testing.assert_allclose(equal, means)
    assert info == {"effective_samples": pytest.approx((3 * 3 + 2 * 2) / 5)}
    best, info = rwr_weights(rewards, prompts, beta=1e4)
    np.testing.assert_allclose(best, [0, 1, 1, 0, 0])
    assert info == {"effective_samples": 1.0}


@pytest.mark.parametrize(
    "rewards, options, weights, info",
    [
        ([1, 2, 3, 2 - 1e-9], {"threshold": 2.0}, [0, 1, 1, 0], {"threshold": 2, "passed": 0.5}),
        ([-1, -2, -3, -4], {"threshold": 0.0}, [0] * 4, {"threshold": 0, "passed": 0}),
        (range(8), {"quantile": 0.75}, [0] * 6 + [1, 1], {"threshold": 5, "passed": 0.25}),
        ([100, 1, 101, 2, 102, 3], {}, [0] * 4 + [1, 1], {"threshold": 52.3, "passed": 1 / 3}),
    ],
)
def test_sparse_weights_are_1_from_the_threshold_or_the_prompts_own_quantile_on(
    rewards, options, weights, info
):
    """Cats and dogs in turn; a dog of the last row is never better than a cat."""
    prompts = ["cat", "dog"] * (len(rewards) // 2)
    actual, actual_info = sparse_weights(rewards, prompts, **options)
    assert actual.tolist() == weights and actual_info == pytest.approx(info)
    centered, centered_info = sparse_weights(rewards, prompts, center=True, **options)
    np.testing.assert_allclose(centered[::2], actual[::2] - actual[::2].mean())
    np.testing.assert_allclose(centered[1::2], actual[1::2] - actual[1::2].mean())
    assert centered_info == actual_info


@pytest.mark.parametrize("peers", [2, 3, 7, 14, 20])
def test_equal_rewards_have_no_weight(peers):
    """1e-17, what rounding leaves of equal weights, would be an update without any pair."""
    prompts = ["cat"] * peers
    equal = np.full(peers, 2.5)
    assert not rwr_weights(equal, prompts, center=True)[0].any()
    assert not rwr_weights(equal + 1e-9 * np.arange(peers), prompts, center=True)[0].any()
    assert not sparse_weights(equal, prompts, center=True)[0].any()


# ---- reward-weighted regression: loss, gradient, and what a run trains on ----


@every_regression
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_weighted_loss_and_its_gradient_equal_a_sum_by_hand(tmp_path, script, prediction_type):
    """Against diffusers' add_noise, one pair and one condition at a time, by plain autograd."""
    policy = load(script, make_pipeline(tmp_path, prediction_type=prediction_type))
    rollout = make_regression_rollout(policy)
    scheduler = DDIMScheduler.from_config(policy.pipe.scheduler.config)
    losses = []
    squares = []
    for i in range(4):
        for k in range(6):
            x0 = rollout["latents"][i : i + 1]
            noise = rollout["noise"][i : i + 1, k]
            t = rollout["timesteps"][i : i + 1, k]
            latents = scheduler.add_noise(x0, noise, t)
            uncond = policy.unet(latents, t, rollout["embeds"][0, i : i + 1]).sample
            text = policy.unet(latents, t, rollout["embeds"][1, i : i + 1]).sample
            noise_pred = uncond + 5.0 * (text - uncond)
            if prediction_type == "v_prediction":  # what diffusers' DDIM calls epsilon
                abar = scheduler.alphas_cumprod[t]
                noise_pred = abar.sqrt() * noise_pred + (1 - abar).sqrt() * latents
            mse = ((noise - noise_pred) ** 2).mean()
            losses.append(rollout["weights"][i] * mse)
            if i != 1:  # that sample has no weight, and is not computed
                squares.append(mse.item())
    expected = torch.stack(losses).mean()
    expected_gradient = autograd(expected, policy)
    for micro_batch in (1, 7, 1000):
        policy.args.micro_batch = micro_batch
        gradient, info = accumulate(policy, rollout)
        assert_same_gradient(gradient, expected_gradient)
        assert info["loss"] == pytest.approx(expected.item(), rel=1e-4)
        assert info["mse_sum"] == pytest.approx(sum(squares), rel=1e-4)
        assert info["num_pairs"] == 18


@every_regression
def test_a_run_draws_prompts_several_times_and_each_update_takes_all_samples_with_new_noise(
    tiny_sd, tmp_path, few_prompts, monkeypatch, script
):
    accumulate_gradients = script.accumulate_gradients
    rollouts = []

    def record(unet, rollout, *others):
        rollouts.append(dict(rollout))
        return accumulate_gradients(unet, rollout, *others)

    monkeypatch.setattr(script, "accumulate_gradients", record)
    options = {"num_samples": 12, "num_steps": 25, "num_updates": 3, "iterations": 1}
    run(script, tmp_path, tiny_sd, prompts=few_prompts, **options)
    assert len(rollouts) == 3
    prompt_embeds = rollouts[0]["embeds"][1]
    assert torch.equal(prompt_embeds, prompt_embeds[::4].repeat_interleave(4, dim=0))
    assert len(prompt_embeds.unique(dim=0)) > 1
    assert len(rollouts[0]["latents"].unique(dim=0)) == 12
    noise = torch.stack([rollout["noise"] for rollout in rollouts])
    assert noise.shape == (3, 12, 25, 4, 8, 8)
    assert len(noise.flatten(0, 2).unique(dim=0)) == 3 * 12 * 25
    # uniform over all 1000 timesteps, whatever the 25 of sampling
    timesteps = torch.stack([rollout["timesteps"] for rollout in rollouts])
    assert timesteps.min() < 20 and timesteps.max() > 979
    assert timesteps.float().mean().item() == pytest.approx(499.5, abs=5 * 289 / 900**0.5)


def test_no_sample_over_the_threshold_skips_the_update(tiny_sd, tmp_path, few_prompts, capsys):
    options = {"threshold": 1e6, "num_updates": 2, "weight_decay": 0.1, "lr": 0.1}
    folder = run(rwr_sparse, tmp_path, tiny_sd, prompts=few_prompts, **options)
    assert capsys.readouterr().out.count("no sample has a weight") == 2
    before = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet").state_dict()
    after = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    for row in read_metrics(folder)[1:]:
        assert row["passed"] == 0 and "loss" not in row
