"""The sampler against diffusers: the schedule, one step, the whole chain, pictures, log-probs.

The sampler is the same in all five scripts (test_scripts_in_sync.py); ddpo_is.py stands for them.
"""

import copy
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, STABLE_DIFFUSION, ZERO_TERMINAL_SNR, embed, load_policy, make_pipeline
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from PIL import Image

import ddpo_is

# Schedulers of the folders that are tried; the last three are not read as they stand in the file.
SCHEDULERS = {
    "epsilon": {},
    "v_prediction": {"prediction_type": "v_prediction"},
    "zero_terminal_snr": ZERO_TERMINAL_SNR,
    "deterministic_last_step": {"set_alpha_to_one": True},
    "steps_offset_0": {"steps_offset": 0},
    "clip_sample": {"clip_sample": True},
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_with_diffusers(pipe, prompts, noise, **options):
    """Run StableDiffusionPipeline with eta = 1 on the given noise (N, T + 1, C, H, W)."""
    step_noise = iter(noise[:, 1:].unbind(dim=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "diffusers.schedulers.scheduling_ddim.randn_tensor",
            lambda *args, **kwargs: next(step_noise),
        )
        return pipe(
            prompts,
            num_inference_steps=noise.shape[1] - 1,
            guidance_scale=5.0,
            eta=1.0,
            latents=noise[:, 0],
            **options,
        ).images


# ---- the schedule ----


def test_stable_diffusions_own_pndm_config_gives_its_50_steps(tmp_path):
    """v1.4 ships a PNDMScheduler, read as a DDIMScheduler: 981, 961, ..., 1, as in the paper."""
    folder = make_pipeline(tmp_path)
    PNDMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    ).save_pretrained(tmp_path / "scheduler")
    schedule = load_policy(ddpo_is, folder, num_steps=50).schedule
    assert schedule.timesteps.tolist() == list(range(981, 0, -20))
    assert schedule.sigma[0].item() == pytest.approx(0.454, abs=1e-3)
    assert schedule.sigma[-1].item() == pytest.approx(0.0206, abs=1e-4)
    assert len(schedule.noisy_steps) == 50


def test_a_folder_is_read_with_steps_offset_1_as_the_pipeline_does(tmp_path):
    folder = make_pipeline(tmp_path, steps_offset=0, clip_sample=True)
    config = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    assert config["steps_offset"] == 0 and config["clip_sample"]
    schedule = load_policy(ddpo_is, folder, num_steps=50).schedule
    assert schedule.timesteps.tolist() == list(range(981, 0, -20))


def test_zero_terminal_snr_starts_from_pure_noise(tiny_sd_zero_snr):
    schedule = load_policy(ddpo_is, tiny_sd_zero_snr, num_steps=50).schedule
    abar, abar_prev, alpha, beta, sigma = schedule.tables
    assert schedule.timesteps.tolist() == list(range(999, 0, -20))
    assert abar[0] == 0 and alpha[0] == 0 and beta[0] == 1
    assert sigma[0] == pytest.approx((1 - abar_prev[0]).sqrt().item())
    assert schedule.tables.isfinite().all()


# ---- one step ----


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "zero_terminal_snr"])
def test_ddpm_step_equals_diffusers_ddim_with_eta_1(name):
    """All 50 steps, in float32 against diffusers in double precision, whose numbers are of size 1.

    eta is a hair below 1: at abar = 0 diffusers takes the square root of 0, or of -1e-17.
    """
    options = STABLE_DIFFUSION | SCHEDULERS[name]
    schedule = ddpo_is.make_schedule(DDIMScheduler(**options), 50, "cpu")
    scheduler = DDIMScheduler(**options)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(50)
    for i, t in enumerate(scheduler.timesteps):
        latents, noise_pred, noise = normal(3, 2, 4, 8, 8, seed=i)
        inputs = {"model_output": noise_pred.double(), "timestep": t, "sample": latents.double()}
        inputs["eta"] = 1 - 1e-14
        no_noise = torch.zeros_like(noise).double()
        expected_mean = scheduler.step(**inputs, variance_noise=no_noise).prev_sample
        expected = scheduler.step(**inputs, variance_noise=noise.double()).prev_sample
        next_latents, _, mean = ddpo_is.ddpm_step(
            noise_pred, latents, torch.full((2,), i), schedule, noise=noise
        )
        scale = max(latents.abs().max(), expected.abs().max())
        assert (mean - expected_mean).abs().max() < 1e-6 * scale
        assert (next_latents - expected).abs().max() < 1e-6 * scale


def test_each_row_has_its_own_step():
    schedule = ddpo_is.make_schedule(DDIMScheduler(**STABLE_DIFFUSION), 10, "cpu")
    latents, noise_pred, noise = normal(3, 10, 4, 8, 8)
    together = ddpo_is.ddpm_step(noise_pred, latents, torch.arange(10), schedule, noise=noise)
    for i in range(10):
        row = slice(i, i + 1)
        alone = ddpo_is.ddpm_step(
            noise_pred[row], latents[row], torch.tensor([i]), schedule, noise=noise[row]
        )
        for all_rows, one_row in zip(together, alone, strict=True):
            assert torch.equal(all_rows[row], one_row)


def test_log_prob_is_the_mean_of_the_normal_log_density():
    schedule = ddpo_is.make_schedule(DDIMScheduler(**STABLE_DIFFUSION), 10, "cpu")
    latents, noise_pred, noise = normal(3, 10, 4, 8, 8)
    step = torch.arange(10)
    next_latents, drawn, mean = ddpo_is.ddpm_step(
        noise_pred, latents, step, schedule, noise=1.5 * noise
    )
    _, scored, _ = ddpo_is.ddpm_step(noise_pred, latents, step, schedule, next_latents)
    density = torch.distributions.Normal(mean, schedule.sigma.view(-1, 1, 1, 1))
    expected = density.log_prob(next_latents).mean(dim=(1, 2, 3))
    torch.testing.assert_close(scored, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(drawn, scored)
    assert expected.std() > 0.1  # the steps differ, so that the comparison means something


def test_a_step_without_noise_has_log_prob_0_and_no_nan_in_its_gradient():
    options = STABLE_DIFFUSION | SCHEDULERS["deterministic_last_step"]
    schedule = ddpo_is.make_schedule(DDIMScheduler(**options), 10, "cpu")
    assert schedule.noisy_steps.tolist() == list(range(9))
    latents, noise_pred, next_latents = normal(3, 2, 4, 8, 8)
    noise_pred.requires_grad_(True)
    step = torch.tensor([8, 9])
    _, log_prob, mean = ddpo_is.ddpm_step(noise_pred, latents, step, schedule, next_latents)
    log_prob.sum().backward()
    assert log_prob[0] != 0 and log_prob[1] == 0
    assert mean.isfinite().all()
    assert noise_pred.grad.isfinite().all() and noise_pred.grad[0].norm() > 0


def test_guidance_mixes_both_predictions_of_the_same_latents_and_timesteps():
    def unet(latents, t, embeds):
        rows = latents.mean(dim=(1, 2, 3)) + 10 * t + embeds.mean(dim=(1, 2))
        return SimpleNamespace(sample=rows.view(-1, 1, 1, 1).expand_as(latents).half())

    latents = torch.stack([torch.full((4, 8, 8), 0.25), torch.full((4, 8, 8), 0.5)])
    t = torch.tensor([1, 2])
    uncond, text = torch.tensor([[1.0, 2.0], [4.0, 7.0]])
    embeds = torch.stack([uncond, text]).view(2, 2, 1, 1).expand(2, 2, 3, 5)
    noise_pred = ddpo_is.predict_noise(unet, latents, t, embeds, guidance_scale=5.0)
    base = torch.tensor([0.25 + 10, 0.5 + 20])
    expected = base + uncond + 5.0 * (text - uncond)
    assert noise_pred.dtype == torch.float32
    torch.testing.assert_close(noise_pred, expected.view(2, 1, 1, 1).expand(2, 4, 8, 8))


# ---- the whole chain ----


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_sampler_draws_what_diffusers_own_pipeline_draws(name, tmp_path):
    """Timesteps, guidance and every step, in chunks that do not divide the samples.

    At zero terminal SNR and, say, 7 steps diffusers' own rounding gives NaN; at 8 it does not.
    """
    folder = make_pipeline(tmp_path, **SCHEDULERS[name])
    policy = load_policy(ddpo_is, folder, num_steps=8, micro_batch=2)
    prompts = ["cat", "dog", "bee"]
    noise = normal(3, 9, *policy.latent_shape)
    expected = draw_with_diffusers(policy.pipe, prompts, noise, output_type="latent")
    latents, log_probs = ddpo_is.sample_trajectories(
        policy.unet, embed(policy.pipe, prompts), noise, policy.schedule, policy.args
    )
    assert latents.shape == (3, 9, 4, 8, 8) and log_probs.shape == (3, 8)
    assert latents.dtype == log_probs.dtype == torch.float32
    assert torch.equal(latents[:, 0], noise[:, 0])
    torch.testing.assert_close(latents[:, -1], expected, atol=1e-4, rtol=1e-4)
    assert (latents[0] - latents[1]).abs().max() > 0.1


def test_a_rectangular_model_draws_rectangles(tiny_sd_rectangle):
    policy = load_policy(ddpo_is, tiny_sd_rectangle)
    assert policy.latent_shape == (4, 8, 12)
    noise = normal(1, 7, *policy.latent_shape)
    expected = draw_with_diffusers(policy.pipe, ["cat"], noise, output_type="np")
    latents, _ = ddpo_is.sample_trajectories(
        policy.unet, embed(policy.pipe, ["cat"]), noise, policy.schedule, policy.args
    )
    images = ddpo_is.decode(policy.pipe.vae, latents[:, -1])
    assert images.shape == (1, 16, 24, 3)
    assert np.abs(images / 255 - expected).max() < 1.5 / 255


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("broken_step", [0, 3, 5])
def test_latents_that_are_not_finite_end_with_the_step(tiny_sd, broken_step, bad):
    policy = load_policy(ddpo_is, tiny_sd)
    broken_t = policy.schedule.timesteps[broken_step]

    def unet(latents, t, embeds):
        output = policy.unet(latents, t, embeds)
        output.sample[1, 0, 0, 0] += torch.where(
            t[0] == broken_t, bad, 0.0
        )  # one number of one row
        return output

    embeds = embed(policy.pipe, ["cat", "dog"])
    message = rf"latents are not finite from step {broken_step + 1} of 6 on \(sample 1\)"
    with pytest.raises(FloatingPointError, match=message):
        ddpo_is.sample_trajectories(
            unet, embeds, normal(2, 7, 4, 8, 8), policy.schedule, policy.args
        )


def test_zero_terminal_snr_is_finite_from_the_first_step_to_the_picture(tiny_sd_zero_snr):
    policy = load_policy(ddpo_is, tiny_sd_zero_snr)
    latents, log_probs = ddpo_is.sample_trajectories(
        policy.unet,
        embed(policy.pipe, ["cat", "dog"]),
        normal(2, 7, 4, 8, 8),
        policy.schedule,
        policy.args,
    )
    assert latents.isfinite().all() and (log_probs != 0).all()
    assert ddpo_is.decode(policy.pipe.vae, latents[:, -1]).std() > 1


# ---- pictures ----


def test_decode_equals_diffusers_decoder_and_image_processor(tiny_sd):
    """Ten pictures, more than one chunk of the decoder, with values outside of [-1, 1]."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    latents = 5 * normal(10, 4, 8, 8)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / 0.3).sample
    expected = pipe.image_processor.postprocess(decoded, output_type="np")
    images = ddpo_is.decode(pipe.vae, latents)
    assert images.shape == (10, 16, 16, 3) and images.dtype == np.uint8
    assert np.abs(images / 255 - expected).max() <= 0.5 / 255 + 1e-6
    assert decoded.abs().max() > 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_picture_that_is_not_finite_is_never_scored(tiny_sd, bad):
    policy = load_policy(ddpo_is, tiny_sd)
    latents = normal(6, 4, 8, 8)
    assert ddpo_is.decode(policy.pipe.vae, latents).shape == (6, 16, 16, 3)
    with torch.no_grad():
        policy.pipe.vae.decoder.conv_out.bias[1] = bad  # one channel
    with pytest.raises(FloatingPointError, match="VAE's pictures"):
        ddpo_is.decode(policy.pipe.vae, latents)


def grid_cells(path, height=16, width=16):
    """The pictures of a grid, row by row, as float arrays (H, W, 3) from 0 to 1."""
    grid = np.asarray(Image.open(path)) / 255
    rows = grid.reshape(grid.shape[0] // height, height, grid.shape[1] // width, width, 3)
    return rows.transpose(0, 2, 1, 3, 4).reshape(-1, height, width, 3)


def test_evaluate_shows_and_measures_what_diffusers_own_pipeline_draws(tiny_sd, tmp_path):
    """Order of the prompts, fixed noise, grid, reward with its error, diversity, alignment."""
    policy = load_policy(ddpo_is, tiny_sd)
    prompts = ["cat", "a red fox", "bee"]
    scored = []

    def score(images, prompts):
        scored.append((images, prompts))
        return images.mean(axis=(1, 2, 3)), {}

    def alignment(images, prompts):
        return images[:, 0, 0, 0].astype(float) + [len(prompt) for prompt in prompts]

    metrics = ddpo_is.evaluate(
        policy.pipe,
        tmp_path,
        3,
        prompts,
        score,
        alignment,
        policy.schedule,
        policy.latent_shape,
        policy.args,
    )

    noise = []
    for i in range(7):
        generator = ddpo_is.make_generator(0, 0, i, 1)
        noise.append(torch.randn((7, 4, 8, 8), generator=generator))
    all_prompts = [*prompts, *prompts, "elephant"]
    expected = draw_with_diffusers(policy.pipe, all_prompts, torch.stack(noise), output_type="np")
    cells = grid_cells(tmp_path / "images/0003.png")
    assert cells.shape == (6, 16, 16, 3)
    assert np.abs(cells - expected[:6]).max() < 1.5 / 255
    differences = [np.abs(a - b).mean() for a, b in itertools.combinations(expected, 2)]
    assert min(differences) > 0.05  # so the order of the prompts and noises matters

    (images, scored_prompts), *others = scored
    assert others == [] and scored_prompts == prompts + prompts
    assert np.abs(images / 255 - expected[:6]).max() < 1.5 / 255
    rewards = images.mean(axis=(1, 2, 3))
    distances = [np.sqrt(np.mean((images[i] / 255 - images[i + 3] / 255) ** 2)) for i in range(3)]
    assert metrics == {
        "eval_reward": pytest.approx(rewards.mean()),
        "eval_reward_se": pytest.approx(rewards.std(ddof=1) / 6**0.5),
        "eval_diversity": pytest.approx(np.mean(distances)),
        "eval_align": pytest.approx(images[:, 0, 0, 0].mean() + (3 + 9 + 3) / 3),
    }


def test_the_strip_shows_an_elephant_at_the_steps_of_figure_4(tiny_sd, tmp_path):
    """0 9 19 29 39 49 of 50 steps."""
    policy = load_policy(ddpo_is, tiny_sd, num_steps=50)
    ddpo_is.evaluate(
        policy.pipe,
        tmp_path,
        0,
        ["cat"],
        lambda images, prompts: (np.zeros(len(images)), {}),
        None,
        policy.schedule,
        policy.latent_shape,
        policy.args,
    )
    noise = torch.randn((1, 51, 4, 8, 8), generator=ddpo_is.make_generator(0, 0, 2, 1))
    after_step = []

    def keep(pipe, step, t, tensors):
        after_step.append(tensors["latents"])
        return tensors

    draw_with_diffusers(policy.pipe, ["elephant"], noise, callback_on_step_end=keep)
    shown = torch.cat([after_step[step] for step in (0, 9, 19, 29, 39, 49)])
    expected = ddpo_is.decode(policy.pipe.vae, shown) / 255
    cells = grid_cells(tmp_path / "trajectory/0000.png")
    assert cells.shape == expected.shape
    assert np.abs(cells - expected).max() < 1.5 / 255


def test_up_to_32_prompts_spread_over_the_list_are_evaluated(tiny_sd, tmp_path):
    policy = load_policy(ddpo_is, tiny_sd, num_steps=2)
    prompts = [f"p{i}" for i in range(94)]
    seen = []

    def score(images, prompts):
        seen.extend(prompts)
        return np.zeros(len(images)), {}

    ddpo_is.evaluate(
        policy.pipe,
        tmp_path,
        0,
        prompts,
        score,
        None,
        policy.schedule,
        policy.latent_shape,
        policy.args,
    )
    assert seen == prompts[::3] + prompts[::3]


# ---- what is stored is what is scored ----


def make_rollout(policy, prompts=("cat", "dog", "cat", "bee")):
    noise = normal(len(prompts), policy.args.num_steps + 1, *policy.latent_shape)
    embeds = embed(policy.pipe, prompts)
    latents, log_probs = ddpo_is.sample_trajectories(
        policy.unet, embeds, noise, policy.schedule, policy.args
    )
    return {
        "latents": latents,
        "embeds": embeds,
        "log_probs": log_probs,
        "advantages": torch.tensor([1.0, -0.5, 2.0, -1.5])[: len(prompts)],
    }


def ratio_err(policy, rollout):
    """max |ratio - 1| of a rollout, as a run measures it."""
    info = ddpo_is.accumulate_gradients(
        policy.unet,
        rollout,
        torch.arange(len(rollout["latents"])),
        policy.schedule,
        torch.amp.GradScaler("cpu", enabled=False),
        policy.args,
    )
    return info["ratio_err"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_copy_of_the_unet_has_weights_of_its_own(tiny_sd, lora_rank, precision):
    """An average of the weights, or a frozen copy, is made with copy.deepcopy."""
    policy = load_policy(ddpo_is, tiny_sd, lora_rank=lora_rank, precision=precision)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *policy.latent_shape, generator=generator)
    width = policy.unet.config.cross_attention_dim
    inputs = (latents, torch.tensor([5, 900]), torch.randn(2, 2, 77, width, generator=generator), 5)
    with torch.no_grad():
        before = ddpo_is.predict_noise(policy.unet, *inputs)
        duplicate = copy.deepcopy(policy.unet)
        assert torch.equal(ddpo_is.predict_noise(duplicate, *inputs), before)
        for p in policy.params.values():
            p.add_(0.1)
        assert not torch.equal(ddpo_is.predict_noise(policy.unet, *inputs), before)
        assert torch.equal(ddpo_is.predict_noise(duplicate, *inputs), before)


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd_v", "tiny_sd_zero_snr"])
def test_what_is_stored_is_what_is_scored(model, lora_rank, request, tmp_path):
    """Scored again with the same weights a trajectory has ratio 1, also after a checkpoint."""
    folder = request.getfixturevalue(model)
    policy = load_policy(ddpo_is, folder, lora_rank=lora_rank)
    before = make_rollout(policy)
    for micro_batch in (1, 7, 64):
        policy.args.micro_batch = micro_batch
        assert ratio_err(policy, before) < 1e-5

    optimizer = torch.optim.AdamW(policy.params.values(), lr=1e-2)
    optimizer.step()
    after = make_rollout(policy)
    state = {"rows": [{"iteration": 7}]}
    ddpo_is.save_checkpoint(tmp_path, policy.pipe, policy.params, optimizer, state, policy.args)

    restored = load_policy(ddpo_is, folder, lora_rank=lora_rank)
    for p in restored.params.values():
        p.data.zero_()
    new_optimizer = torch.optim.AdamW(restored.params.values(), lr=1e-2)
    assert ddpo_is.load_checkpoint(tmp_path, restored.params, new_optimizer) == state
    assert ratio_err(restored, after) < 1e-5
    assert ratio_err(restored, before) > 1e-4  # the step did move the policy
    assert len(new_optimizer.state) == len(optimizer.state) > 0


def test_a_moved_policy_has_the_ratio_of_its_two_densities(tiny_sd):
    """One number of the prediction moved by hand: log_ratio from the two Gaussians."""
    policy = load_policy(ddpo_is, tiny_sd)
    schedule = policy.schedule
    latents, noise_pred, noise = normal(3, 6, 4, 8, 8)
    step = torch.arange(6)
    next_latents, old, mean_old = ddpo_is.ddpm_step(
        noise_pred, latents, step, schedule, noise=noise
    )
    _, new, mean_new = ddpo_is.ddpm_step(noise_pred + 0.1, latents, step, schedule, next_latents)
    sigma = schedule.sigma.view(-1, 1, 1, 1)
    squares = ((next_latents - mean_old) ** 2 - (next_latents - mean_new) ** 2) / (2 * sigma**2)
    torch.testing.assert_close(new - old, squares.mean(dim=(1, 2, 3)), atol=1e-5, rtol=1e-4)


# ---- randomness ----


def test_noise_is_a_function_of_its_key():
    def draw(*key):
        return tuple(torch.randn(5, generator=ddpo_is.make_generator(*key)).tolist())

    assert draw(1, 2, 3, 0) == draw(1, 2, 3, 0)
    keys = [(1, 2, 3, 0), (2, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1)]
    assert len({draw(*key) for key in keys}) == 5


def test_a_sample_does_not_depend_on_the_others_of_its_batch(tiny_sd):
    policy = load_policy(ddpo_is, tiny_sd)
    prompts = ["cat", "a red fox", "bee"]

    def run_policy(numbers):
        return ddpo_is.run_policy(
            policy.pipe,
            [prompts[i] for i in numbers],
            [ddpo_is.make_generator(1, 5, i, 0) for i in numbers],
            policy.latent_shape,
            policy.schedule,
            policy.args,
        )

    latents, log_probs, embeds = run_policy([0, 1, 2])
    torch.testing.assert_close(embeds, embed(policy.pipe, prompts))
    noise = torch.randn((7, 4, 8, 8), generator=ddpo_is.make_generator(1, 5, 1, 0))
    assert torch.equal(latents[1, 0], noise[0])
    for i in range(3):
        alone, alone_log_probs, _ = run_policy([i])
        torch.testing.assert_close(latents[i], alone[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(log_probs[i], alone_log_probs[0], atol=1e-5, rtol=1e-5)


# ---- precision ----


@torch.no_grad()
def score_steps(policy, latents, embeds, steps):
    """log_prob (N, len(steps)) of some steps of trajectories (N, T + 1, C, H, W)."""
    log_probs = []
    for i in steps:
        step = torch.full((len(latents),), i)
        t = policy.schedule.timesteps[step]
        noise_pred = ddpo_is.predict_noise(policy.unet, latents[:, i], t, embeds, 5.0)
        _, log_prob, _ = ddpo_is.ddpm_step(
            noise_pred, latents[:, i], step, policy.schedule, latents[:, i + 1]
        )
        log_probs.append(log_prob)
    return torch.stack(log_probs, dim=1)


def test_the_noise_of_log_probs_by_precision():
    """Rounding against the clip range of 1e-4, when each weight of models/emoji moves by 1e-6.

    The true change is what fp32 shows, 3e-7. Over all 50 steps fp16 shows 4e-5 and bf16 4e-4: more
    than the clip range, so that the clip would cut rounding noise. `ratio_err` cannot see this,
    since the first update of an iteration repeats the forward passes of sampling exactly.
    """
    emoji = ROOT / "models/emoji"
    policy = load_policy(ddpo_is, emoji, num_steps=50)
    embeds = embed(policy.pipe, ["cat", "fox"])
    latents, _ = ddpo_is.sample_trajectories(
        policy.unet, embeds, normal(2, 51, *policy.latent_shape), policy.schedule, policy.args
    )

    noise = {}
    for precision in ("fp32", "fp16", "bf16"):
        policy = load_policy(ddpo_is, emoji, num_steps=50, precision=precision)
        steps = range(1, 50, 4)
        before = score_steps(policy, latents, embeds, steps)
        assert torch.equal(score_steps(policy, latents, embeds, [1])[:, 0], before[:, 0])
        generator = torch.Generator().manual_seed(0)
        for p in policy.params.values():
            p.data += 1e-6 * torch.randn(p.shape, generator=generator).sign()
        log_ratio = score_steps(policy, latents, embeds, steps) - before
        noise[precision] = log_ratio.abs().median().item()

    assert 0 < noise["fp32"] < 1e-6
    assert 1e-5 < noise["fp16"] < 1e-4
    assert 1e-4 < noise["bf16"] < 2e-3
