"""The tables of results/README.md follow from the committed metrics.csv."""

import json
import re
import shlex

import pytest
import tyro
from conftest import ROOT

import plot

PAGE = ROOT / "results/README.md"
# a command that prints a table, and the lines of the table below it
SHOWN = re.compile(
    r"```bash\npython plot\.py ((?:table|equal|compare|gain) [^\n]*)\n```\n\n((?:\|.*\n)+)"
)
TABLES = SHOWN.findall(PAGE.read_text(encoding="utf-8"))


def test_the_page_has_tables():
    commands = {command.split()[0] for command, _ in TABLES}
    assert commands == {"table", "equal", "compare", "gain"}


@pytest.mark.parametrize("command, table", TABLES, ids=[command for command, _ in TABLES])
def test_a_table_is_what_its_command_prints(command, table, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = []
    for word in shlex.split(command):
        matches = sorted(str(path) for path in ROOT.glob(word)) if "*" in word else [word]
        assert matches, f"{word}: nothing matches"
        words += matches
    plot.main(tyro.cli(plot.COMMANDS, args=words))
    assert capsys.readouterr().out == table


def test_the_numbers_of_the_readme_are_in_the_tables():
    """Means with a spread, and the CLIP score in the cell behind each."""
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `(?:ddpo|rwr).*\+-.*$", readme, flags=re.MULTILINE)
    assert len(rows) == 7
    tables = "".join(table for _, table in TABLES)
    for row in rows:
        for size, align in re.findall(r"(\d\.\d{3} \+- \d\.\d{3}) \| (-?\d+\.\d) ", row):
            assert re.search(rf"{re.escape(size)} \|[^\n]*\| {re.escape(align)} \+- ", tables), size


def test_every_run_on_the_page_is_committed_with_its_arguments():
    """A set is of one commit, one machine and one model, and names no path of a machine."""
    sets = {}
    for path in ROOT.glob("results/**/metrics.csv"):
        text = (path.parent / "args.json").read_text()
        assert '"/' not in text, f"{path.parent} names a path of a machine"
        metadata = json.loads(text)
        origin = (metadata["git"], metadata["gpu"], metadata["weights"])
        sets.setdefault(path.relative_to(ROOT / "results").parts[0], set()).add(origin)
    page = PAGE.read_text(encoding="utf-8")
    assert len(sets) > 8
    for name in sets:
        assert f"| [{name}](#" in page, f"{name} is not in the table of sets"
    for name, origins in sets.items():
        assert len(origins) == 1, name
        ((commit, _, weights),) = origins
        assert len(commit) == 40 and len(weights) == 64


def test_pictures_and_links_of_the_page_exist():
    text = PAGE.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert targets
    for target in targets:
        if "://" not in target:
            assert (PAGE.parent / target).exists(), target
