"""The five scripts repeat one another on purpose; what should be the same is held the same here, to the letter.

python tests/test_scripts_in_sync.py --fix    copy the shared parts from the reference script into the others
"""

import ast
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALL = "ddpo_is ddpo_sf ddpo_iskl rwr rwr_sparse".split()  # the first of a group is its reference
POLICY_GRADIENT = ["ddpo_is", "ddpo_sf", "ddpo_iskl"]
REGRESSION = ["rwr", "rwr_sparse"]

# parts of a script (see `parts`) and the scripts in which they are the same
SHARED = {
    "imports": [ALL],
    "Args": [ALL],
    "make_schedule predict_noise ddpm_step sample_trajectories decode make_generator": [ALL],
    "save_checkpoint load_checkpoint evaluate open_run load_model": [ALL],
    "main/reward main/log main/end __main__": [ALL],
    "main/start": [["ddpo_is", "ddpo_sf", "rwr", "rwr_sparse"]],
    "resolve main/sample": [POLICY_GRADIENT, REGRESSION],
    "accumulate_gradients": [["ddpo_is", "ddpo_sf"], REGRESSION],
    "compute_advantages": [POLICY_GRADIENT],
    "add_noise compute_loss main/train": [REGRESSION],
}
# what is each script's own, and why
OWN = {
    "docstring",
    "compute_loss",  # the algorithm
    "compute_weights",  # RWR's two weightings
    "accumulate_gradients",  # ISKL's scores the reference
    "main/start",  # ISKL loads the reference
    "main/train",  # one to five lines
}
# fields of Args whose default is the algorithm's own
OWN_DEFAULTS = {"num_updates", "lr"}
# `diff A B | grep -c '^[<>]'`
BUDGETS = {("ddpo_sf", "ddpo_is"): 45, ("ddpo_is", "ddpo_iskl"): 40, ("rwr", "rwr_sparse"): 25, ("ddpo_sf", "rwr"): 130}


@cache
def parts(text):
    """{name: (first line, last line)} of a script, counted from 0, the last one exclusive. Every line that is not blank
    belongs to one: the docstring, imports (with ANIMALS), each function, Args, and main's sections by banner."""
    lines, tree, found = text.splitlines(), ast.parse(text), {}
    body = tree.body
    found["docstring"] = (0, body[0].end_lineno)
    first_class = next(node for node in body if isinstance(node, ast.ClassDef))
    found["imports"] = (body[0].end_lineno, first_class.lineno - 2)
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            if node.name != "main":
                found[node.name] = (start, node.end_lineno)
                continue
            marks = [i for i in range(start, node.end_lineno) if lines[i].strip().startswith("# ----")]
            names = [lines[i].strip(" #-") for i in marks]
            for name, first, last in zip(["start", *names], [start, *marks], [*marks, node.end_lineno]):
                found[f"main/{name}"] = (first, last)
    found["__main__"] = (body[-1].lineno - 1, body[-1].end_lineno)
    return found


def source(text, name):
    first, last = parts(text)[name]
    return "\n".join(text.splitlines()[first:last]).strip("\n")


@cache
def fields(text):
    """{name: (its lines, default, first, last)} of Args; a line has the comment that is its help."""
    tree = ast.parse(text)
    (args,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    lines, found = text.splitlines(), {}
    for field in args.body:
        first, last = field.lineno - 1, field.end_lineno
        found[field.target.id] = ("\n".join(lines[first:last]), ast.get_source_segment(text, field.value), first, last)
    return found


def read(script):
    return (ROOT / f"{script}.py").read_text()


def without_default(field, text):
    return text.replace(f" = {field}  #", "  #", 1)


def compare(texts):
    """What differs in {script: text} though it should not: a list of sentences."""
    wrong = []
    for names, groups in SHARED.items():
        for name in names.split():
            for reference, *others in groups if name != "Args" else []:
                for other in others:
                    if name not in parts(texts[other]) or source(texts[reference], name) != source(texts[other], name):
                        wrong.append(f"{name} of {other}.py is not that of {reference}.py")
    reference, *others = ALL
    for other in others:
        mine, theirs = fields(texts[other]), fields(texts[reference])
        for name in mine.keys() & theirs.keys():
            a, b = mine[name][:2], theirs[name][:2]
            if name in OWN_DEFAULTS:
                a, b = without_default(a[1], a[0]), without_default(b[1], b[0])
            if a != b:
                wrong.append(f"--{name.replace('_', '-')} of {other}.py is not that of {reference}.py")
    return wrong


def fix():
    """Copy every shared part from its reference script; Args fields keep their own defaults."""
    texts = {script: read(script) for script in ALL}
    for names, groups in SHARED.items():
        for name in names.split():
            for reference, *others in groups if name != "Args" else []:
                for other in others:
                    first, last = parts(texts[other])[name]
                    lines = texts[other].splitlines()
                    a, b = parts(texts[reference])[name]
                    lines[first:last] = texts[reference].splitlines()[a:b]
                    texts[other] = "\n".join(lines) + "\n"
    for other in ALL[1:]:
        theirs = fields(texts[ALL[0]])
        for name in fields(texts[other]).keys() & theirs.keys():
            mine = fields(texts[other])[name]
            text = theirs[name][0]
            if name in OWN_DEFAULTS:
                text = text.replace(f" = {theirs[name][1]}  #", f" = {mine[1]}  #", 1)
            lines = texts[other].splitlines()
            lines[mine[2] : mine[3]] = text.splitlines()
            texts[other] = "\n".join(lines) + "\n"
    for script, text in texts.items():
        (ROOT / f"{script}.py").write_text(text)


def test_what_is_shared_is_the_same_to_the_letter():
    assert compare({script: read(script) for script in ALL}) == []


@pytest.mark.parametrize("script", ALL)
def test_every_part_is_either_shared_or_declared_the_scripts_own(script):
    """A new function has to be entered above, so that copies of it cannot drift unseen; so has every line of main."""
    shared = {name for names, groups in SHARED.items() for name in names.split() if any(script in g for g in groups)}
    found = parts(read(script))
    assert found.keys() - shared - OWN == set()
    lines = read(script).splitlines()
    covered = {i for first, last in found.values() for i in range(first, last)}
    left = [line for i, line in enumerate(lines) if i not in covered and line.strip()]
    assert left == []


@pytest.mark.parametrize("script", ALL[1:])
@pytest.mark.parametrize(
    "old, new, name",
    [
        ("few / vae.config.scaling_factor", "few * vae.config.scaling_factor", "decode"),
        ("clock.append(time.time())\n        # ---- train", "clock.append(0)\n        # ---- train", "main/reward"),
        ("track: bool = False", "track: bool = True", "--track"),
        ("# global gradient norm is", "# the gradient norm is", "--max-grad-norm"),
        ("from PIL import Image\n", "from PIL import Image as I\n", "imports"),
    ],
)
def test_drift_is_found(script, old, new, name):
    texts = {s: read(s) for s in ALL}
    assert texts[script].count(old) == 1
    texts[script] = texts[script].replace(old, new)
    assert compare(texts) == [f"{name} of {script}.py is not that of ddpo_is.py"]


def test_fix_restores_the_shared_parts_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    texts = {script: (Path(__file__).parent.parent / f"{script}.py").read_text() for script in ALL}
    for script, text in texts.items():
        if script == "rwr_sparse":
            text = text.replace("def decode(vae, latents):", "def decode(vae, latents):\n    latents = 2 * latents")
            text = text.replace("max_grad_norm: float = 1.0", "max_grad_norm: float = 2.0")
            text = text.replace("def add_noise(latents,", "def add_noise(latent,")
        (tmp_path / f"{script}.py").write_text(text)
    assert len(compare({script: read(script) for script in ALL})) == 3
    fix()
    assert {script: read(script) for script in ALL} == texts


@pytest.mark.parametrize("script", ALL)
def test_a_script_is_read_in_one_sitting(script):
    assert len(read(script).splitlines()) <= 400


@pytest.mark.skipif(shutil.which("diff") is None, reason="the budgets are those of diff")
@pytest.mark.parametrize("pair", BUDGETS)
def test_neighbours_differ_by_few_lines(pair):
    words = ["diff", *(str(ROOT / f"{script}.py") for script in pair)]
    lines = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
    assert 0 < sum(line[0] in "<>" for line in lines) <= BUDGETS[pair]


if __name__ == "__main__":
    if sys.argv[1:] != ["--fix"]:
        sys.exit(__doc__.strip())
    fix()
