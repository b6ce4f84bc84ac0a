"""Every command and every block of Python in the documentation runs."""

import re
import shlex

import pytest
from helpers import ROOT
from page_runner import Page, Shared, blocks, is_ours, option_names, words_of

from improved_diffusion.cli.parsing import parse

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "datasets/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
NEEDED = {"the network", "a GPU", "several hosts", "SLURM", "published weights", "the Hub", "Docker", "a server",
          "minutes", "a browser"}  # fmt: skip  # what a block that is not run needs


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Shared(tmp_path_factory.mktemp("shared"))


def run_page(page, folder, shared, slow):
    world = Page(folder, shared)
    for block in blocks(page):
        if "not run" not in block.marks and (slow or "slow" not in block.marks):
            world.run(block)


@every_page
def test_the_blocks_of_a_page_run_in_their_order(page, tmp_path, shared):
    run_page(page, tmp_path, shared, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any("slow" in b.marks for b in blocks(page))])
@pytest.mark.filterwarnings("default")
def test_the_slow_blocks_of_a_page_run_too(page, tmp_path, shared):
    run_page(page, tmp_path, shared, slow=True)


@every_page
def test_what_is_not_run_says_what_it_needs_and_parses(page):
    for block in blocks(page):
        if "not run" not in block.marks:
            continue
        assert block.marks["not run"] in NEEDED, f"line {block.line}"
        if block.language == "python":
            compile(block.text, page.name, "exec")
            continue
        for line in block.commands:
            words = words_of(line)
            if is_ours(words):
                command, rest = option_names(words)
                parse(command.settings, rest, words=command.words)


@every_page
def test_extras_that_are_installed_exist(page):
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for names in re.findall(r"pip install -e '\.\[([\w,]+)\]'", page.read_text()):
        assert set(names.split(",")) <= set(re.findall(r"^(\w+) = ", extras, re.M))


@every_page
def test_commands_stand_in_blocks_that_are_run(page):
    indented = re.findall(r"^ {4,}(?:improved-diffusion|python|mpiexec|pip) .*$", page.read_text(), re.M)
    fenced = [line for block in blocks(page) for line in block.text.splitlines()]
    assert [line for line in indented if line not in fenced] == []
    assert not re.search(r"^```(sh|shell|console|py)?\n(improved|python|pip)", page.read_text(), re.M)


def test_few_blocks_are_not_run():
    marks = [block.marks for page in PAGES for block in blocks(page)]
    assert sum("not run" in mark for mark in marks) <= len(marks) / 3


def test_every_mark_is_known():
    for page in PAGES:
        for comment in re.findall(r"<!--(.*?)-->", page.read_text(), re.S):
            kind = comment.strip().split(":")[0]
            assert kind in ("test", "before", "slow", "not run"), f"{page.name}: {comment}"
            if kind == "test":
                shlex.split(comment)
