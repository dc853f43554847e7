"""What the five scripts share is the same in all of them."""

import ast
import itertools

import pytest
from conftest import ROOT

SCRIPTS = ["ddpo_sf", "ddpo_is", "ddpo_iskl", "rwr", "rwr_sparse"]
MAY_DIFFER = {"iterations", "lr", "num_updates"}  # defaults


def read(name):
    return (ROOT / f"{name}.py").read_text()


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        ("\nimport csv\n", "\n    # run\n"),
        ("\n# ---- the sampler", "\n# ---- the algorithm"),
        ("\n# ---- plumbing", "\n# ---- main"),
        ("\ndef main(", "\n    # settle the arguments\n"),
        ("\n        # pass i evaluates and", "\n        # sample: "),
    ],
)
def test_blocks_are_the_same_bytes(begin, end):
    blocks = set()
    for name in SCRIPTS:
        _, rest = read(name).split(begin)
        blocks.add(rest.split(end)[0])
    assert len(blocks) == 1


def fields(name):
    """{field of Args: (its type, its default, its help)}, as written."""
    tree = ast.parse(read(name))
    (args,) = [node for node in tree.body if getattr(node, "name", "") == "Args"]
    pairs = zip(args.body[::2], args.body[1::2], strict=True)
    return {
        field.target.id: (*map(ast.unparse, (field.annotation, field.value)), help.value.value)
        for field, help in pairs
    }


@pytest.mark.parametrize(("name", "other"), itertools.combinations(SCRIPTS, 2))
def test_a_flag_is_the_same_in_all_scripts_that_have_it(name, other):
    own = fields(name)
    others = fields(other)
    shared = [field for field in own if field in others]
    assert shared == [field for field in others if field in own]  # in the same order
    for field in shared:
        kind, default, text = own[field]
        if field == "num_updates" and name.startswith("ddpo") != other.startswith("ddpo"):
            text = others[field][2]  # an update of RWR takes all samples
        if field in MAY_DIFFER:
            default = others[field][1]
        assert (kind, default, text) == others[field], field
