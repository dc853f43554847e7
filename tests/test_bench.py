"""bench.py on a small model: it counts right, and its table is whole. No time is asserted."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from transformers import CLIPTokenizer

import bench
import ddpo_is
import ddpo_iskl
import rwr

SCRIPTS = ("ddpo_sf", "ddpo_is", "ddpo_iskl", "rwr", "rwr_sparse")


def table(capsys, model, **options):
    """What bench.py prints: the rows of its table as {column: cell}, and the other lines."""
    defaults = {
        "num_samples": 4,
        "num_steps": 3,
        "repeats": 1,
        "device": "cpu",
        "peak_tflops": 1.0,
    }
    bench.main(bench.BenchArgs(model=model, **(defaults | options)))
    lines = capsys.readouterr().out.splitlines()
    rows = []
    for line in lines:
        if line.startswith("| ") and "microbatch" not in line:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows.append(dict(zip(bench.COLUMNS, cells, strict=True)))
    return rows, lines


def number(cell):
    """The median of a cell such as "12.3 (11.9-12.5)"."""
    return float(cell.split(" ")[0].strip("%"))


def load(script, model, **options):
    defaults = {"num_samples": 4, "num_steps": 2, "device": "cpu"}
    return bench.load_policy(script, model=model, **(defaults | options))


def test_flops_of_a_convolution():
    layer = torch.nn.Conv2d(3, 5, kernel_size=3, padding=1)
    images = torch.zeros(2, 3, 8, 8)
    outputs = 2 * 5 * 8 * 8
    expected = 2 * outputs * 3 * 9
    assert bench.count_flops(lambda: layer(images)) == expected


def test_flops_of_a_matrix_product_and_its_gradient():
    a = torch.zeros(4, 6)
    b = torch.zeros(6, 7, requires_grad=True)
    product = 2 * 4 * 6 * 7
    assert bench.count_flops(lambda: a @ b) == product
    assert bench.count_flops(lambda: (a @ b).sum().backward()) == 2 * product


def test_flops_of_attention():
    x = torch.zeros(2, 3, 10, 16)  # rows, heads, tokens, size
    scores = 2 * 2 * 3 * 10 * 10 * 16
    values = scores
    attention = bench.count_flops(lambda: F.scaled_dot_product_attention(x, x, x))
    assert attention == scores + values


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_row_for_every_setting(script, capsys, tiny_sd):
    rows, lines = table(
        capsys,
        tiny_sd,
        script=script,
        micro_batch=(2, 6),
        gradient_checkpointing=(False, True),
    )
    assert [row["microbatch"] for row in rows] == ["2", "2", "6", "6"]
    assert [row["checkpointing"] for row in rows] == ["False", "True", "False", "True"]
    for row in rows:
        assert row["precision"] == "fp32"
        assert row["compile"] == "False"
        for column in bench.COLUMNS[4:]:
            assert number(row[column]) >= 0
        assert number(row["images/s"]) > 0
        assert number(row["train pairs/s"]) > 0
    text = "\n".join(lines)
    assert f"{script}.py, full fine-tuning, 4 samples of 3 steps" in text
    assert "commit" in text
    assert "peak in fp32" in text


def test_the_microbatch_is_the_one_that_the_script_chooses(capsys, tiny_sd):
    rows, _ = table(capsys, tiny_sd)
    assert [row["microbatch"] for row in rows] == ["6"]  # 4 samples, 3 steps, 2 updates


def test_half_precision_with_lora(capsys, tiny_sd):
    rows, lines = table(capsys, tiny_sd, precision=("fp32", "bf16"), lora_rank=2)
    assert [row["precision"] for row in rows] == ["fp32", "bf16"]
    assert any("LoRA of rank 2" in line for line in lines)


def test_mfu_is_of_the_peak_that_is_given(capsys, tiny_sd):
    rows, lines = table(capsys, tiny_sd, peak_tflops=0.001)
    (line,) = [line for line in lines if line.startswith("GFLOP: ")]
    words = line.split(" ")
    sampling = float(words[1])
    training = float(words[6])
    decoder = float(words[11])

    # 0.001 TFLOPS is 1 GFLOP per second
    row = rows[0]
    expected = 100 * training * number(row["train pairs/s"])
    assert number(row["MFU training"]) == pytest.approx(expected, rel=0.02)
    expected = 100 * (3 * sampling + decoder) * number(row["images/s"])
    assert number(row["MFU sampling"]) == pytest.approx(expected, rel=0.02)


def test_the_peak_is_measured_where_it_is_not_given():
    assert bench.measure_peak("cpu", "fp32", repeats=1) > 0


def test_training_costs_what_its_passes_cost(tiny_sd):
    """In forward passes: full fine-tuning about 3, the reference 1 more, LoRA less."""

    def relative_cost(script, **options):
        forward, _, training = bench.count_operations(load(script, tiny_sd, **options))
        return training / forward

    full = relative_cost(ddpo_is)
    assert 2.6 < full < 3.1  # backward: to the inputs and to the weights
    assert relative_cost(rwr) == pytest.approx(full)
    assert relative_cost(ddpo_iskl) == pytest.approx(full + 1)
    assert 1.5 < relative_cost(ddpo_is, lora_rank=2) < 2.6  # backward: to the inputs alone


def test_the_operations_of_a_pair_do_not_depend_on_the_microbatch(tiny_sd):
    counts = []
    for micro_batch in (1, 4):
        policy = load(ddpo_is, tiny_sd, micro_batch=micro_batch)
        assert policy.args.micro_batch == micro_batch
        counts.append(bench.count_operations(policy))
    assert counts[0] == counts[1]


def test_training_is_the_scripts_and_leaves_the_weights(tiny_sd):
    policy = load(ddpo_is, tiny_sd)
    before = {name: p.detach().clone() for name, p in policy.params.items()}
    bench.train(policy, bench.sample(policy))
    for name, p in policy.params.items():
        assert torch.equal(p, before[name])
        assert p.grad is not None


def test_memory_that_is_exceeded_is_a_row(capsys, tiny_sd, monkeypatch):
    def accumulate_gradients(*inputs):
        raise torch.OutOfMemoryError

    counted = bench.count_operations(load(ddpo_is, tiny_sd))
    monkeypatch.setattr(bench, "count_operations", lambda policy: counted)
    monkeypatch.setattr(ddpo_is, "accumulate_gradients", accumulate_gradients)
    rows, _ = table(capsys, tiny_sd, micro_batch=(2, 6))
    assert [row["images/s"] for row in rows] == ["out of memory", "out of memory"]


def test_the_random_model_has_the_shapes_of_stable_diffusion():
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models/emoji/tokenizer")
    with torch.device("meta"):
        parts = bench.random_stable_diffusion(tokenizer)
    # the published weights have as many
    assert parts["unet"].num_parameters() == 859_520_964
    assert parts["vae"].num_parameters() == 83_653_863
    assert parts["text_encoder"].num_parameters() == 123_060_480
    assert parts["text_encoder"].config.eos_token_id == tokenizer.eos_token_id
