"""README, docs/ and CONTRIBUTING name only files, commands, flags and Python names that exist."""

import ast
import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
import textwrap

import pytest
from helpers import ROOT

import improved_diffusion as idf
from improved_diffusion import api
from improved_diffusion.cli.command import Command
from improved_diffusion.cli.main import COMMANDS
from improved_diffusion.config import settings

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "datasets/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

COMMON_FLAGS = {"--help", "--help-all", "--config", "--preset"}
FLAGS_OF_OTHERS = {"--version", "--index-url", "--nproc-per-node", "--ntasks-per-node", "--shm-size", "--signal"}
FLAGS_OF_OTHERS |= {"--build", "--build-arg", "--entrypoint", "--gpus", "--init", "--profile", "--rm", "--stop-timeout"}
FLAGS_OF_OTHERS |= {"--target", "--to", "--user"}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")


def flags_by_command():
    """The flags of each command, by its name and by its script's; those of a group are named "group command"."""
    flags = {"scripts/classifier_sample.py": flags_of(settings.ClassifierSampling)}
    for name, (module, _) in COMMANDS.items():
        command = importlib.import_module(f"improved_diffusion.cli.{module}").COMMAND
        for script in (name, f"scripts/{module}.py"):
            if isinstance(command, Command):
                flags[script] = flags_of(command.settings)
                continue
            flags |= {f"{script} {word}": flags_of(each.settings) for word, each in command.commands.items()}
            flags[script] = flags[f"{script} {command.default}"] if command.default else COMMON_FLAGS
    return flags


def flags_of(kind):
    options = kind.options()
    return COMMON_FLAGS | {f"--{name}" for f in options.values() for name in (f.name, *f.metadata["flags"])}


def flags_in_source(path):
    return {"--help", *re.findall(r'"(--[a-z][a-z0-9_-]*)"', path.read_text())}


def command_lines(text):
    """Each command line of ours, as words."""
    joined = re.sub(r"\\\n\s*", " ", text)
    pattern = r"(?:improved-diffusion [a-z]|(?:scripts|datasets|benchmarks)/\w+\.py)[^`\n|)\]]*"
    return [line.removeprefix("improved-diffusion ").split() for line in re.findall(pattern, joined)]


def headings(page):
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert ROOT in linked.parents or linked == ROOT, target
        assert not anchor or anchor in headings(linked), target


@every_page
def test_every_command_exists_and_has_the_flags_shown(page):
    known = flags_by_command()
    for words in command_lines(page.read_text()):
        flags = {word for part in words for word in FLAG.findall(part)}
        if words[0].startswith(("datasets/", "benchmarks/")):
            allowed = flags_in_source(ROOT / words[0])
        else:
            grouped = any(name.startswith(f"{words[0]} ") for name in known)
            name = " ".join(words[:2] if grouped and words[1:2] and words[1][0] not in "-." else words[:1])
            assert name in known, f"there is no command {name!r}"
            allowed = known[name]
        assert flags <= allowed, f"{' '.join(words[:2])} has no {sorted(flags - allowed)}"


@every_page
def test_every_flag_named_exists(page):
    known = COMMON_FLAGS | FLAGS_OF_OTHERS
    for kind in vars(settings).values():
        if inspect.isclass(kind) and issubclass(kind, settings.Settings):
            known |= flags_of(kind)
    for script in (*ROOT.glob("datasets/*.py"), *ROOT.glob("benchmarks/*.py")):
        known |= flags_in_source(script)
    text = page.read_text()
    if page.name.startswith("from-"):  # the first column of these tables has the names of another program
        text = re.sub(r"^\|.*?\|", "|", text, flags=re.M)
    assert set(FLAG.findall(text)) <= known


@every_page
def test_python_blocks_use_names_that_exist(page):
    holders = {"idf": idf, "model": api.Model, "images": api.Images, "step": api.SamplingStep, "report": api.Report}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        for node in ast.walk(ast.parse(textwrap.dedent(block))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in holders:
                holder = holders[node.value.id]
                fields = {f.name for f in dataclasses.fields(holder)} if dataclasses.is_dataclass(holder) else set()
                assert node.attr in fields or hasattr(holder, node.attr), ast.unparse(node)


def test_python_page_names_everything_public():
    text = (ROOT / "docs" / "python.md").read_text()
    names = [f"idf.{name}(" for name in idf.__all__ if inspect.isfunction(getattr(idf, name))]
    names += [f"`{name}`" for name in ("Images", "Latents", "Model", "Report", "SamplingStep")]
    names += [f"model.{name}" for name in vars(api.Model) if not name.startswith("_")]
    names += [f"images.{name}(" for name, member in vars(api.Images).items() if name[0] != "_" and callable(member)]
    assert [name for name in names if name not in text] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in index] == []


PICTURE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")


@every_page
def test_every_picture_is_made_by_a_named_script(page):
    by_pictures = (ROOT / "docs" / "pictures.py").read_text()
    for link in PICTURE.findall(page.read_text()):
        picture = (page.parent / link).resolve()
        if picture.parent == ROOT / "benchmarks" / "results":
            made = [script for script in ROOT.glob("benchmarks/*.py") if picture.name.startswith(f"{script.stem}_")]
            assert made or picture.name in by_pictures, link
        else:
            assert f'"{picture.name}"' in by_pictures or picture.name in screenshots(), link


def screenshots():
    """The names of the pictures of the web page."""
    return {*re.findall(r'"(\w+\.png)"', (ROOT / "docs" / "screenshots.py").read_text())}


def test_no_picture_lies_unused():
    used = {(page.parent / link).resolve() for page in PAGES for link in PICTURE.findall(page.read_text())}
    assert [path.name for path in (ROOT / "docs").glob("**/*.png") if path not in used] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; a warning is an error."""
    pytest.importorskip("material", reason="needs the packages of the extra docs")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_page(site):
    for page in (ROOT / "docs").glob("*.md"):
        name = "index.html" if page.name == "README.md" else f"{page.stem}/index.html"
        assert (site / name).exists()


def test_the_site_loads_nothing_from_other_hosts(site):
    outside = r"=\"?(?:https?:)?//"
    loaded = rf"<(?:script|img|iframe|source)[^>]*\ssrc{outside}|<link[^>]*rel=\"?stylesheet[^>]*href{outside}"
    for path in site.rglob("*.html"):
        assert not re.search(loaded, path.read_text()), path
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text()), path


def test_the_reference_shows_what_is_public(site):
    text = (site / "reference" / "index.html").read_text()
    for name in ("Model.sample", "Images.grid", "GaussianDiffusion.p_sample_loop", "TrainLoop", "load"):
        assert re.search(rf'id="improved_diffusion\.[\w.]*{re.escape(name)}"', text), name
    assert ":param" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.S)
