"""What holds for every module, beside the import contracts in pyproject.toml that `make check` runs."""

import ast
import subprocess
import sys

import pytest
from helpers import ROOT

PACKAGE = ROOT / "improved_diffusion"
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES = [name for name in FILES if name != "__init__"]
OF_EXTRAS = ("web", "service.http")  # rooms whose modules import the packages of an extra, as their whole purpose
OPTIONAL = [
    "mpi4py", "blobfile", "tqdm", "yaml", "sklearn", "scipy", "wandb", "tensorboard", "matplotlib", "gradio",
    "diffusers", "torchmetrics", "fastapi", "uvicorn", "prometheus_client", "pandas",
]  # fmt: skip


@pytest.mark.parametrize("what", ["import improved_diffusion", "every module"])
def test_importing_pulls_in_no_optional_package(what):
    plain = [name for name in MODULES if not name.startswith(OF_EXTRAS)]
    names = ["improved_diffusion", *(f"improved_diffusion.{name}" for name in plain if what == "every module")]
    # What torch imports on its own account, tqdm for one, is not ours.
    code = f"import sys{', torch' if what == 'every module' else ''}\nbefore = set(sys.modules)\n"
    code += "\n".join([f"import {name}" for name in names])
    code += f"\nprint([name for name in {OPTIONAL} if name in sys.modules and name not in before])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout == "[]\n"


def names_in(path):
    """Every name and attribute that a file's code mentions, without its texts."""
    tree = ast.parse(path.read_text())
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {part for alias in node.names for part in alias.name.split(".")}
            found |= set((getattr(node, "module", None) or "").split("."))
    return found


@pytest.mark.parametrize("name", MODULES)
def test_command_lines_are_a_matter_of_cli(name):
    if name == "cli" or name.startswith("cli."):
        return
    assert not names_in(FILES[name]) & {"argparse", "Namespace", "ArgumentParser"}


@pytest.mark.parametrize("name", FILES)
def test_every_module_says_what_it_is_for(name):
    assert ast.get_docstring(ast.parse(FILES[name].read_text()))
