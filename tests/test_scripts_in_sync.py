"""The five scripts repeat one another on purpose. Whatever is not an algorithm's own stays equal.

Each script is cut into parts: the fields of Args, the functions, the sections of main. NEIGHBOURS
says which parts of two scripts may differ, and by how many lines; all others must be equal.
"""

import ast
import difflib
import re
import shutil
import subprocess
from functools import cache

import pytest
from conftest import ROOT

SCRIPTS = ["ddpo_sf", "ddpo_is", "ddpo_iskl", "rwr", "rwr_sparse"]
BANNER = "# " + "-" * 98 + "\n"
SECTIONS = ["settle", "load", "open", "sample", "reward", "train", "log", "evaluate"]

# (script, script): {part: the number of lines that differ, or None for any number}
NEIGHBOURS = {
    ("ddpo_sf", "ddpo_is"): {
        "docstring": None,
        "default of --lr": None,
        "default of --num-updates": None,
        "--clip-range": None,
        "default of --clip-range": None,
        "check_algorithm": None,
        "compute_loss": None,
        "accumulate_gradients": 2,  # the arguments of compute_loss
        "main: log": 3,  # the notice about ratio_err
    },
    ("ddpo_is", "ddpo_iskl"): {
        "docstring": None,
        "--kl": None,
        "default of --kl": None,
        "--kl-coef": None,
        "default of --kl-coef": None,
        "check_algorithm": 2,
        "compute_loss": None,
        "score_reference": None,
        "accumulate_gradients": 8,  # the reference
        "main: load": 3,  # the reference
        "main: train": 4,
    },
    ("rwr", "rwr_sparse"): {
        "docstring": None,
        "--beta": None,
        "default of --beta": None,
        "--threshold": None,
        "default of --threshold": None,
        "--quantile": None,
        "default of --quantile": None,
        "check_algorithm": None,
        "compute_weights": None,
    },
    ("ddpo_sf", "rwr"): {
        "docstring": None,
        "default of --iterations": None,
        "default of --lr": None,
        "--num-updates": 2,
        "default of --num-updates": None,
        "--adv-clip": None,
        "default of --adv-clip": None,
        "--samples-per-prompt": None,
        "default of --samples-per-prompt": None,
        "--center-weights": None,
        "default of --center-weights": None,
        "--beta": None,
        "default of --beta": None,
        "check_algorithm": None,
        "compute_advantages": None,
        "compute_weights": None,
        "compute_loss": None,
        "accumulate_gradients": None,
        "main: settle": 2,  # the number of pairs
        "main: open": 2,  # the history of rewards
        "main: sample": 6,
        "main: train": None,
        "main: log": None,
    },
}
# the most lines that `diff A.py B.py | grep -c '^[<>]'` may count
BUDGETS = {
    ("ddpo_sf", "ddpo_is"): 45,
    ("ddpo_is", "ddpo_iskl"): 60,
    ("rwr", "rwr_sparse"): 40,
    ("ddpo_sf", "rwr"): 170,
}


def read(script):
    return (ROOT / f"{script}.py").read_text()


def blocks(text):
    """{first line after a banner: all that follows, up to the next banner}."""
    found = {}
    for block in text.split(BANNER)[1:]:
        name, _, rest = block.partition("\n")
        found[name] = rest
    return found


@cache
def parts(text):
    """{name: text} of the parts of a script, in their order. Every line belongs to one."""
    tree = ast.parse(text)
    lines = text.splitlines(keepends=True)
    starts = {0: "docstring", tree.body[0].end_lineno: "imports"}
    with_default = set()
    for i, line in enumerate(lines):
        if line == BANNER:
            starts[i] = "banner: " + lines[i + 1].strip()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            first = min([node, *node.decorator_list], key=lambda part: part.lineno)
            starts[first.lineno - 1] = node.name
        if isinstance(node, ast.ClassDef):
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    flag = "--" + field.target.id.replace("_", "-")
                    starts[field.lineno - 1] = flag
                    with_default.add(flag)
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            for i in range(node.lineno, node.end_lineno):
                section = re.match(r"(?: {4}){1,2}# (\w+)", lines[i])
                if section and section[1] in SECTIONS:
                    starts[i] = "main: " + section[1]
        if isinstance(node, ast.If) and "__name__" in lines[node.lineno - 1]:
            starts[node.lineno - 1] = "__main__"

    found = {}
    borders = [*sorted(starts), len(lines)]
    for start, end in zip(borders, borders[1:]):
        name = starts[start]
        assert name not in found, f"two parts are called {name}"
        found[name] = "".join(lines[start:end]).strip("\n")
        if name in with_default:
            # the default is a part of its own, with the comment behind it
            first_line, _, rest = found[name].partition("\n")
            declaration, equals, default = first_line.partition(" = ")
            found[name] = f"{declaration}\n{rest}"
            found[f"default of {name}"] = default
    return found


def changed_lines(a, b):
    """The number of lines of two texts that differ."""
    if a == b:
        return 0
    difference = difflib.unified_diff(a.splitlines(), b.splitlines(), n=0, lineterm="")
    return sum(line[0] in "+-" for line in list(difference)[2:])


def find_drift(texts):
    """What differs in {script: text} although it should not: a list of (part, script, script)."""
    drift = []
    for (a, b), may_differ in NEIGHBOURS.items():
        parts_a, parts_b = parts(texts[a]), parts(texts[b])
        for name in {**parts_a, **parts_b}:
            allowed = may_differ.get(name, 0)
            if allowed is None:
                continue
            if name not in parts_a or name not in parts_b:
                drift.append((name, a, b))
            elif changed_lines(parts_a[name], parts_b[name]) != allowed:
                drift.append((name, a, b))
        order_a = [name for name in parts_a if name in parts_b]
        order_b = [name for name in parts_b if name in parts_a]
        if order_a != order_b:
            drift.append(("order", a, b))
    return drift


def test_what_is_shared_is_equal():
    assert find_drift({script: read(script) for script in SCRIPTS}) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_the_same_blocks_and_sections_as_the_others(script):
    assert list(blocks(read(script))) == [
        "# the sampler: a diffusion model as a policy",
        "# the algorithm",
        "# plumbing, the same in all five scripts",
        "# main",
    ]
    sections = [name for name in parts(read(script)) if name.startswith("main: ")]
    assert sections == [f"main: {section}" for section in SECTIONS]


@pytest.mark.parametrize("script", SCRIPTS[1:])
@pytest.mark.parametrize(
    "block",
    ["# the sampler: a diffusion model as a policy", "# plumbing, the same in all five scripts"],
)
def test_sampler_and_plumbing_are_the_same_bytes(script, block):
    text = blocks(read(script))[block]
    assert text == blocks(read("ddpo_sf"))[block]
    assert text.count("\ndef ") > 4


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "old, new, part",
    [
        ("latents.split(4)", "latents.split(8)", "decode"),
        ("@torch.no_grad()\ndef decode", "def decode", "decode"),
        ("weights_only=True", "weights_only=False", "load_checkpoint"),
        ("reward_time = time.time()", "reward_time = start", "main: reward"),
        ("iteration % args.save_every == 0", "not iteration % args.save_every", "main: evaluate"),
        ("main(parse_args())", "main(Args())", "__main__"),
        ("track: bool = False", "track: bool = True", "default of --track"),
        ("track: bool = False", "track: int = False", "--track"),
        ('"""denoising steps (T)"""', '"""denoising steps"""', "--num-steps"),
        ("    # optimisation\n", "    # optimiser\n", "--guidance-scale"),
        ("from PIL import Image\n", "from PIL import Image as I\n", "imports"),
        ("raccoon", "racoon", "imports"),
        ("    average_gradients(unet)\n", "", "accumulate_gradients"),
        ("\n\ndef gather(", "\n\ndef one():\n    return 1\n\n\ndef gather(", "one"),
    ],
)
def test_drift_is_found(script, old, new, part):
    texts = {name: read(name) for name in SCRIPTS}
    assert texts[script].count(old) == 1
    texts[script] = texts[script].replace(old, new)
    expected = []
    for pair, may_differ in NEIGHBOURS.items():
        if script in pair and may_differ.get(part, 0) is not None:
            expected.append((part, *pair))
    assert find_drift(texts) == expected
    assert expected != []


def test_another_order_is_found():
    texts = {name: read(name) for name in SCRIPTS}
    seed = parts(texts["rwr_sparse"])["--seed"].replace("seed: int", "seed: int = 1") + "\n"
    assert texts["rwr_sparse"].count(seed) == 1
    texts["rwr_sparse"] = texts["rwr_sparse"].replace(seed, "")
    texts["rwr_sparse"] = texts["rwr_sparse"].replace("    out: str", seed + "    out: str")
    assert find_drift(texts) == [("order", "rwr", "rwr_sparse")]


@pytest.mark.skipif(shutil.which("diff") is None, reason="the budgets are those of diff")
@pytest.mark.parametrize("pair", BUDGETS, ids=" ".join)
def test_neighbours_differ_by_few_lines(pair):
    files = [str(ROOT / f"{script}.py") for script in pair]
    difference = subprocess.run(["diff", *files], capture_output=True, text=True)
    lines = difference.stdout.splitlines()
    assert 0 < sum(line[0] in "<>" for line in lines) <= BUDGETS[pair]
