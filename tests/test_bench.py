"""bench.py on a small model: what it counts is right, and its table is whole. No assertion about time."""

import pytest
import torch
from conftest import ROOT
from transformers import CLIPTokenizer

import bench


def table(capsys, **options):
    """The numbers of "X GFLOP a pair to sample, Y to train", and the rows of the table as lists of words."""
    bench.main(bench.BenchArgs(num_samples=2, num_steps=3, repeats=1, device="cpu", **options))
    lines = capsys.readouterr().out.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith("stage"))
    words = lines[start - 1].replace(",", "").split()
    return float(words[0]), float(words[6]), [line.split() for line in lines[start + 1 :]]


def test_flops_are_those_of_the_layers():
    conv, x = torch.nn.Conv2d(3, 5, 3, padding=1), torch.zeros(2, 3, 8, 8)
    assert bench.count_flops(lambda: conv(x)) == 2 * 2 * 5 * 8 * 8 * 3 * 9
    assert bench.count_flops(lambda: torch.zeros(4, 6) @ torch.zeros(6, 7)) == 2 * 4 * 6 * 7


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}])
def test_the_table_has_two_stages_for_every_microbatch(options, capsys, tiny_sd):
    sampled, trained, rows = table(capsys, model=tiny_sd, micro_batch=(2, 4, 0), **options)
    assert [row[:2] for row in rows] == [[stage, size] for size in ("2", "4", "64") for stage in ("sample", "train")]
    assert all(float(row[2]) > 0 and 0 < float(row[-1].strip("%")) for row in rows)
    low, high = (1.5, 2.6) if options else (2.6, 3.1)
    assert low < trained / sampled < high  # backward: inputs alone, or inputs and weights


def test_mfu_is_of_the_peak_that_is_given(capsys, tiny_sd):
    _, trained, rows = table(capsys, model=tiny_sd, peak_tflops=0.001)
    pairs_per_second, mfu = float(rows[1][2]), float(rows[1][-1].strip("%"))
    assert mfu == pytest.approx(100 * pairs_per_second * trained * 1e9 / 1e9, rel=0.02)


def test_the_random_model_has_the_shapes_of_stable_diffusion():
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models/emoji/tokenizer")
    with torch.device("meta"):
        parts = bench.random_stable_diffusion(tokenizer)
    sizes = {name: part.num_parameters() for name, part in parts.items()}
    assert sizes == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}  # of the published weights
    assert parts["text_encoder"].config.eos_token_id == tokenizer.eos_token_id
