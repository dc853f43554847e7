"""The tables of results/README.md follow from the committed metrics.csv."""

import re
import shlex

import pytest
import tyro
from conftest import ROOT

import plot

PAGE = ROOT / "results/README.md"
# a command that prints a table, and the lines of the table below it
SHOWN = re.compile(
    r"```bash\npython plot\.py ((?:table|equal|compare) [^\n]*)\n```\n\n((?:\|.*\n)+)"
)
TABLES = SHOWN.findall(PAGE.read_text(encoding="utf-8"))


def test_the_page_has_tables():
    commands = {command.split()[0] for command, _ in TABLES}
    assert commands == {"table", "equal", "compare"}


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


def test_every_run_on_the_page_is_committed_with_its_arguments():
    """And every number in it comes from one commit per set, without a path of a machine."""
    folders = [path.parent for path in ROOT.glob("results/**/metrics.csv")]
    assert folders
    for folder in folders:
        text = (folder / "args.json").read_text()
        assert '"git": "' in text
        assert '"/' not in text, f"{folder} names a path of a machine"


def test_pictures_and_links_of_the_page_exist():
    text = PAGE.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert targets
    for target in targets:
        if "://" not in target:
            assert (PAGE.parent / target).exists(), target
