"""Who imports whom, read from the sources."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from helpers import ROOT

PACKAGE = ROOT / "improved_diffusion"
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES = [name for name in FILES if name != "__init__"]


def imports(path, top_level_only=False):
    """(module, name or None) of each import in a file; "." stands for the package itself."""
    tree = ast.parse(path.read_text())
    nested = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if top_level_only and node in nested:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = ["", *path.relative_to(PACKAGE).parts[: -node.level]]
                module = "." + ".".join([part for part in (*base, module) if part])
            found += [(module, alias.name) for alias in node.names]
    return found


def own(path):
    """The modules of the package that a file imports."""
    found = set()
    for module, name in imports(path):
        if module.startswith("improved_diffusion"):
            module = "." + module.removeprefix("improved_diffusion").lstrip(".")
        if module.startswith("."):
            full = module[1:]
            inner = f"{full}.{name}".lstrip(".")
            found.add(inner if inner in FILES else full or "__init__")
    return found


def others(path, top_level_only=False):
    """The packages that a file imports, other than ours and the standard library."""
    tops = {module.split(".")[0] for module, _ in imports(path, top_level_only) if not module.startswith(".")}
    return tops - set(sys.stdlib_module_names) - {"improved_diffusion"}


GRAPH = {name: own(path) for name, path in FILES.items()}

BASICS = {"config", "schedules", "losses", "nn"}
SERVICES = {"ema", "resample", "checkpoint", "image_datasets", "images", "logger"}
TRAINING = {"lr_schedule", "step_stats", "stop_signals", "checkpoint_sets", "train_state"}
OPTION_GROUPS = ("editing", "evaluation", "model", "run", "sampling", "training")
METRICS = {f"evaluation.{part}" for part in ("copies", "frechet", "inception_score", "kid", "manifold", "neighbours")}
MAY_IMPORT = {
    "__init__": set(),
    "config": {f"config.{part}" for part in ("base", *OPTION_GROUPS)},
    "config.base": set(),
    **{f"config.{part}": {"config.base"} for part in OPTION_GROUPS},
    "schedules": set(), "losses": set(), "nn": set(), "fp16_util": set(),
    "presets": {"config"},
    "files": {"config"},
    "samplers": {"schedules", "nn"},
    "unet": {"nn", "fp16_util"}, "classifier": {"nn", "unet"},
    "diffusion_types": set(),
    "gaussian_diffusion": BASICS | {"samplers", "diffusion_types"},
    "respace": BASICS | {"gaussian_diffusion"},
    "timestep_grids": BASICS | {"respace"},
    "watchdog": set(), "rendezvous": {"config"},
    "dist_util": {"config", "files", "rendezvous", "watchdog"},
    **{name: BASICS | {"dist_util", "files"} for name in SERVICES - {"image_datasets", "logger"}},
    "log_outputs": {"files"},
    "logger": {"dist_util", "files", "log_outputs"},
    "trackers": {"config", "dist_util", "files", "logger"},
    "plots": {"config", "files"},
    "curves": {"config", "files", "plots"},
    "image_sources": {"config", "files", "images"},
    "image_datasets": BASICS | {"dist_util", "files", "images", "image_sources"},
    "lr_schedule": set(),
    "step_stats": {"dist_util"}, "stop_signals": {"dist_util"},
    "checkpoint_sets": {"config", "checkpoint", "files"},
    "train_state": {"config", "checkpoint", "dist_util", "fp16_util", "logger"},
    "train_util": BASICS | SERVICES | TRAINING
    | {"samplers", "gaussian_diffusion", "respace", "dist_util", "files", "fp16_util"},
    "dry_run": {"dist_util", "files", "logger", "step_stats", "train_util"},
    "evaluation": set(), "evaluation.nll": set(), "evaluation.kid": set(), "evaluation.frechet": set(),
    "evaluation.inception_score": set(), "evaluation.neighbours": set(),
    **{f"evaluation.{part}": {"evaluation.neighbours"} for part in ("copies", "manifold")},
    "evaluation.paired": {"config", "files"},
    "comparison": {"config", "dist_util", "evaluation.paired", "files", "images", "logger"},
    "evaluation.nll_plot": {"evaluation.nll", "plots"},
    "bits_per_dim": {
        "config", "dist_util", "files", "image_datasets", "images", "logger", "samplers", "evaluation.nll",
        "evaluation.nll_plot",
    },
    "downloads": {"config", "dist_util", "files", "logger"},
    "evaluation.untrusted": {"config"},
    "evaluation.features": {"config", "downloads", "files", "evaluation.untrusted"},
    "evaluation.scores": METRICS,
    "feature_sets": {
        "config", "dist_util", "files", "image_datasets", "image_sources", "images", "logger", "evaluation.features",
        "evaluation.frechet",
    },
    "references": {
        "config", "dist_util", "feature_sets", "files", "images", "evaluation.features", "evaluation.frechet",
    },
    "report": {"config", "files", "images", "plots", "evaluation.scores"},
    "judging": METRICS
    | {"__init__", "config", "dist_util", "feature_sets", "files", "logger", "references", "report", "sample_util"}
    | {"image_datasets", "images"}
    | {"samplers", "evaluation.features", "evaluation.scores"},
    "drawing": {"config", "logger", "run_util", "sample_util", "sampling", "script_util"},
    "sweep": {
        "checkpoint", "config", "dist_util", "drawing", "files", "judging", "logger", "plots", "report", "run_util",
        "sample_util", "evaluation.scores",
    },
    "low_res": {"config", "dist_util"},
    "guidance": {"nn"},
    "preview": {"config", "dist_util", "files", "images", "logger", "low_res", "samplers", "timestep_grids"},
    "validation": SERVICES - {"ema", "resample", "checkpoint"}
    | {"config", "dist_util", "image_sources", "low_res", "samplers", "evaluation.nll"},
    "posthoc": {"config", "checkpoint", "ema", "files", "logger"},
    "classifier_util": {"config", "checkpoint", "classifier", "logger", "samplers", "script_util", "validation"},
    "command_line": {"config", "files", "presets"},
    "script_util": set(FILES)
    - {"classifier_util", "command_line", "train_util", "run_util", "sample_util", "preview", "validation"},
    "run_util": set(FILES) - {"sample_util"},
    "sample_util": set(FILES) - {"train_util", "run_util", "script_util", "unet", "sampling"},
    "latents": {"config", "dist_util", "files", "images", "logger", "sample_util"},
    "editing": {
        "config", "dist_util", "files", "image_datasets", "image_sources", "images", "latents", "logger", "sample_util",
        "samplers", "timestep_grids",
    },
    "sampling": set(FILES) - {"train_util", "run_util", "unet"},
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_module_imports_only_what_lies_below_it(name):
    assert name in MAY_IMPORT, "a new module needs its place in the table"
    assert GRAPH[name] <= MAY_IMPORT[name]


def test_no_imports_go_in_circles():
    list(TopologicalSorter(GRAPH).static_order())


def test_the_trainer_trains_whatever_it_is_given():
    assert not GRAPH["train_util"] & {"unet", "script_util", "run_util", "presets"}


def test_one_module_for_each_kind_of_network_knows_it():
    assert [name for name in MODULES if "unet" in GRAPH[name]] == ["classifier", "script_util"]
    assert [name for name in MODULES if "classifier" in GRAPH[name]] == ["classifier_util", "script_util"]


def test_options_are_turned_into_objects_by_script_util_and_the_scripts_helpers_only():
    groups = {
        node.name for name in FILES if name.startswith("config.") for node in ast.parse(FILES[name].read_text()).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config") and node.name != "Config"
    }  # fmt: skip
    assert len(groups) > 5
    users = {
        name
        for name in MODULES
        if not name.startswith("config") and groups & {imported for _, imported in imports(FILES[name])}
    }
    assert users <= {"script_util", "classifier_util", "run_util", "judging"}


COMMANDS = {"drawing", "sweep"}  # what several scripts do, written as one


@pytest.mark.parametrize("name", ["run_util", "sampling", *sorted(COMMANDS)])
def test_what_the_scripts_share_serves_nothing_but_whole_commands(name):
    assert {other for other in MODULES if name in GRAPH[other]} <= COMMANDS


def test_nothing_imports_the_scripts():
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")} | {"scripts", "tests"}
    assert len(scripts) > 5
    for path in FILES.values():
        assert not scripts & {module.split(".")[0] for module, _ in imports(path)}


@pytest.mark.parametrize("name", FILES)
def test_at_import_time_a_module_needs_torch_numpy_and_pillow_at_most(name):
    allowed = {
        **{name: set() for name in FILES if name.startswith("config")},
        "presets": set(), "files": set(), "__init__": set(),
        "images": {"torch", "numpy", "PIL"}, "image_datasets": {"torch", "numpy", "PIL"},
        "image_sources": {"numpy", "PIL"}, "evaluation.features": {"torch", "numpy", "PIL"},
    }  # fmt: skip
    assert others(FILES[name], top_level_only=True) <= allowed.get(name, {"torch", "numpy"})


OPTIONAL = [
    "mpi4py", "blobfile", "tqdm", "yaml", "sklearn", "scipy", "wandb", "tensorboard", "matplotlib", "gradio",
    "diffusers", "torchmetrics",
]  # fmt: skip


@pytest.mark.parametrize("what", ["import improved_diffusion", "every module"])
def test_importing_pulls_in_no_optional_package(what):
    names = ["improved_diffusion", *(f"improved_diffusion.{name}" for name in MODULES if what == "every module")]
    # What torch imports on its own account, tqdm for one, is not ours.
    code = f"import sys{', torch' if what == 'every module' else ''}\nbefore = set(sys.modules)\n"
    code += "\n".join([f"import {name}" for name in names])
    code += f"\nprint([name for name in {OPTIONAL} if name in sys.modules and name not in before])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout == "[]\n"


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_longer_than_450_lines(name):
    assert len(FILES[name].read_text().splitlines()) <= 450


@pytest.mark.parametrize("name", FILES)
def test_every_module_says_what_it_is_for(name):
    assert ast.get_docstring(ast.parse(FILES[name].read_text()))


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_its_tests(name):
    elsewhere = {
        "run_util": "scripts", "presets": "config", "evaluation": "evaluation_nll",
        "image_sources": "image_datasets", "command_line": "config", "classifier_util": "classifier",
        "diffusion_types": "gaussian_diffusion", "latents": "editing",
        "comparison": "scripts",
    }  # fmt: skip
    name = "config" if name.startswith("config.") else name
    assert (ROOT / "tests" / f"test_{elsewhere.get(name, name.replace('.', '_'))}.py").exists()
