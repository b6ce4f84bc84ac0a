"""Runs the commands and the Python of a page of the documentation, at small sizes, in a folder of its own.

A comment before a block, which no reader sees, says what a test does otherwise:

    <!-- test: --num_samples 2 --features features.pt -->   other values of flags, of each command that has them
    <!-- test: n=2 -->                                      other values of keywords in Python
    <!-- before: x = 1 -->                                  Python that runs before the block
    <!-- slow: why -->                                      run only among the slow tests
    <!-- not run: why -->                                   only checked: its flags, its syntax

Files that a block names and that are not there are made: images, checkpoints of tiny models, feature networks.
"""

import ast
import contextlib
import importlib
import itertools
import json
import re
import shlex
import shutil
import sys
import textwrap
from dataclasses import dataclass, field

import numpy as np
import torch as th
from feature_helpers import write_program, write_script
from helpers import ROOT
from model_helpers import save_checkpoint, tiny_settings
from script_helpers import STUBS, _chdir, call, save_mask, write_images

from improved_diffusion.cli.command import Command
from improved_diffusion.cli.image_train import with_recipe
from improved_diffusion.cli.main import COMMANDS
from improved_diffusion.config.settings import SuperResModel

# What every training on a page is run with.
TRAINING = {
    "num_channels": 32, "num_res_blocks": 1, "num_heads": 1, "channel_mult": "1,1", "attention_resolutions": "4",
    "num_workers": 0, "max_steps": 2, "val_images": 4, "precision": "fp32", "sample_interval": 0, "diffusion_steps": 30,
}  # fmt: skip
# What a page's own values give way to.
SHOWN = {
    "image_size": 8, "large_size": 16, "small_size": 8, "batch_size": 4, "total_batch_size": 4, "microbatch": 2,
    "num_samples": 4, "classifier_width": 32, "save_interval": 1, "steps": 3, "timestep_respacing": "3",
    "nll_timesteps": 5, "val_interval": 1,
}  # fmt: skip
FEWEST_EVALUATED = 40
# Options that a student takes from its teacher.
OF_THE_TEACHER = ("num_channels", "num_res_blocks", "num_heads", "channel_mult", "attention_resolutions",
                  "diffusion_steps", "image_size")  # fmt: skip
OF_THE_GUIDED = ("channel_mult", "diffusion_steps", "image_size")  # options that a classifier takes from another model
RESULTS = ("--out_dir", "--out")  # flags whose value a command writes
LAUNCHER = re.compile(r"^(mpiexec -n \d+|torchrun --nproc-per-node \d+|srun --ntasks-per-node \d+|nohup) ")
MARK = re.compile(r"<!-- (test|before|slow|not run):\s(.*?)\s*-->", re.S)
BLOCK = re.compile(r"((?:<!--(?:(?!-->).)*-->\n)*)^```(bash|python)\n(.*?)^```$", re.S | re.M)


@dataclass(frozen=True)
class Block:
    """A block of a page that can be run."""

    language: str
    text: str
    line: int
    marks: dict = field(default_factory=dict)

    @property
    def commands(self):
        """The command lines of a bash block."""
        joined = re.sub(r"\\\n\s*", " ", self.text)
        lines = [line.split(" # ")[0].strip() for line in joined.splitlines()]
        return [line for line in lines if line and not line.startswith("#")]


def blocks(path):
    """The blocks of a page in their order."""
    text = path.read_text()
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(3)) + 1
        found.append(Block(match[2], match[3], line, dict(MARK.findall(match[1]))))
    return found


def option_names(words):
    """(the command's settings, the words after its name) of `improved-diffusion ...` or a script of ours."""
    names = {f"scripts/{module}.py": module for module, _ in COMMANDS.values()}
    if words[0] == "improved-diffusion":
        module, rest = COMMANDS[words[1]][0], words[2:]
    elif words[0] == "scripts/classifier_sample.py":
        module, rest = "classifier_sample", words[1:]
    else:
        module, rest = names[words[0]], words[1:]
    command = importlib.import_module(f"improved_diffusion.cli.{module}").COMMAND
    if isinstance(command, Command):
        return command, rest
    name = rest[0] if rest and rest[0] in command.commands else command.default
    return command.commands[name], rest[1:] if rest and rest[0] == name else rest


def is_ours(words):
    """Whether a command line is a command of this package, by its first words."""
    return words[0] == "improved-diffusion" or words[0].startswith("scripts/")


def words_of(line):
    """The words of a command line without launcher and interpreter."""
    words = shlex.split(LAUNCHER.sub("", line), comments=True)
    return words[1:] if words[0] == "python" else words


def with_values(words, values):
    """The words with other values of flags; a flag that is not there is added."""
    words = list(words)
    for name, value in values.items():
        flag = f"--{name}"
        if flag in words:
            at = words.index(flag)
            end = at + 1 + (at + 1 < len(words) and not words[at + 1].startswith("--"))
            words[at:end] = [flag, str(value)]
        else:
            words += [flag, str(value)]
    return words


def small(words, marked):
    """The words of a command at the size of a test."""
    if "--help" in words or "--help-all" in words:
        return words
    if words[:2] == ["improved-diffusion", "train"]:  # a recipe, unless the page itself has options of the model
        words = [*words[:2], *with_recipe(words[2:])]
    command, _ = option_names(words)
    options = command.settings.options()
    chosen = {name: value for name, value in SHOWN.items() if name in options and f"--{name}" in words}
    if {"features", "num_samples"} <= options.keys():
        marked = {name: value for name, value in marked.items() if name != "num_samples"}
        chosen |= {"num_samples": FEWEST_EVALUATED} if "--num_samples" in words else {}
    if "max_steps" in options:
        fixed = OF_THE_GUIDED if "classifier_width" in options else OF_THE_TEACHER if "teacher" in options else ()
        chosen |= {name: value for name, value in TRAINING.items() if name in options and name not in fixed}
        if "image_size" in options and not fixed:
            chosen["image_size"] = 8
        if "--total_batch_size" not in words:
            chosen["batch_size"] = 4
    return with_values(words, chosen | {name: value for name, value in marked.items() if name in options})


def flag_values(mark):
    """{name: value} of "--flag value ..."."""
    words, found = shlex.split(mark), {}
    for at, word in enumerate(words):
        if word.startswith("--"):
            following = words[at + 1] if at + 1 < len(words) else "True"
            found[word[2:]] = "True" if following.startswith("--") else following
    return found


class Smaller(ast.NodeTransformer):
    """Other values of keywords, wherever they are given; and the options of TRAINING in each idf.train(...)."""

    def __init__(self, values):
        self.values = values

    def visit_Call(self, node):
        self.generic_visit(node)
        given = {keyword.arg for keyword in node.keywords}
        new = {name: value for name, value in {**SHOWN, **self.values}.items() if name in given}
        if ast.unparse(node.func) == "idf.train":
            new |= TRAINING
            if "large_size" not in given:
                new |= {"image_size": 8}
            if "total_batch_size" not in given:
                new |= {"batch_size": 4}
            new |= self.values
        if ast.unparse(node.func) == "idf.distill":
            new |= {"max_steps": 2, "num_workers": 0, "batch_size": 4}
        node.keywords = [keyword for keyword in node.keywords if keyword.arg not in new]
        node.keywords += [ast.keyword(name, ast.Constant(value)) for name, value in new.items()]
        return node


class Page:
    """The folder in which a page's blocks run, one after the other."""

    def __init__(self, folder, shared):
        self.folder, self.shared, self.names = folder, shared, {"__name__": "page"}

    def run(self, block):
        """Run a block; an error names its line."""
        if block.language == "python":
            self.run_python(block)
            return
        for line in block.commands:
            self.run_line(line, flag_values(block.marks.get("test", "")))

    def run_python(self, block):
        values = ast.parse(f"dict({block.marks.get('test', '')})", mode="eval")
        tree = ast.parse(textwrap.dedent(block.text))
        results = {id(k.value) for node in ast.walk(tree) for k in getattr(node, "keywords", []) if k.arg == "out_dir"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in results:
                self.provide(node.value)
        tree = ast.fix_missing_locations(Smaller(ast.literal_eval(_as_dict(values))).visit(tree))
        with _chdir(self.folder):
            exec(block.marks.get("before", ""), self.names)
            exec(compile(tree, f"block at line {block.line}", "exec"), self.names)

    def run_line(self, line, values):
        if line.startswith("pip install"):
            return
        words = words_of(line)
        known = is_ours(words) or (ROOT / words[0]).is_file()
        assert known and words[1:2] not in (["serve"], ["web"]), f"mark the block with <!-- not run: ... -->: {line}"
        shown = {name: value for name, value in values.items() if f"--{name}" in words}
        words = small(words, values) if is_ours(words) else with_values(words, shown)
        for before, word in itertools.pairwise(words):
            if before not in RESULTS:
                for part in word.split(","):
                    self.provide(part)
        if words[0] == "improved-diffusion":
            script, rest = STUBS / "command", words[1:]
        else:
            script, rest = (ROOT / words[0]).with_suffix(""), words[1:]
        with _importable(script.parent):
            finished = call(script, *rest, cwd=self.folder)
        assert finished.code == 0, f"{' '.join(words)}\n{finished.out}\n{finished.err}"

    def provide(self, name):
        """Make the file or folder of this name where it is not there: of a run of this page, the same average of
        another step; else what PROVIDED says."""
        path = self.folder / name
        if not name or name.startswith(("-", "/")) or path.exists():
            return
        alike = sorted(path.parent.glob(re.sub(r"\d{6}\.pt$", "*.pt", path.name)))
        if match := re.fullmatch(r"model(\d+)\.pt", path.name):
            self.provide(str(path.parent.relative_to(self.folder) / f"ema_0.9999_{match[1]}.pt"))
        if path.suffix == ".pt" and alike:
            shutil.copy(alike[-1], path)
            return
        for pattern, make in PROVIDED:
            if re.fullmatch(pattern, name):
                path.parent.mkdir(parents=True, exist_ok=True)
                make(self.shared, path)
                return


def _as_dict(expression):
    keywords = expression.body.keywords
    return ast.Expression(ast.Dict([ast.Constant(k.arg) for k in keywords], [k.value for k in keywords]))


@contextlib.contextmanager
def _importable(folder):
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


class Shared:
    """What pages need, made once: checkpoints of tiny models by kind, and images."""

    def __init__(self, folder):
        self.folder = folder

    def checkpoint(self, kind):
        path = self.folder / f"{kind}.pt"
        if not path.exists():
            options, names = MODELS[kind]
            save_checkpoint(path, tiny_settings(**options), class_names=names)
        return path


DIGITS = [str(digit) for digit in range(10)]
MODELS = {
    "photos": (dict(class_cond=True, label_drop=0.1), ["cat", "dog"]),
    "mine": ({}, None),
    "digits": (dict(class_cond=True, label_drop=0.1, channels=1, image_size=16), DIGITS),
    "upsampler": (dict(kind=SuperResModel, image_size=None, large_size=16, small_size=8), None),
}


def _model(kind):
    def make(shared, path):
        if path.suffix == ".safetensors":
            import improved_diffusion as idf

            idf.load(shared.checkpoint(kind)).save(path)
        elif path.suffix == ".pt":
            shutil.copy(shared.checkpoint(kind), path)
        else:  # a run's folder
            path.mkdir()
            shutil.copy(shared.checkpoint(kind), path / "ema_0.9999_200000.pt")
            shutil.copy(shared.checkpoint(kind), path / "model200000.pt")

    return make


def _classifier(shared, path):
    photos, run = shared.folder / "photos", shared.folder / "classifier"
    if not run.exists():
        _photos(shared, photos)
        flags = f"--data_dir {photos} --model_path {shared.checkpoint('photos')} --batch_size 4 --num_workers 0"
        flags += " --classifier_width 32 --classifier_depth 1 --classifier_attention_resolutions 4"
        call("classifier_train", *flags.split(), "--max_steps", 1, "--out_dir", run, cwd=shared.folder).succeed()
    shutil.copy(run / "model000001.pt", path)


def _lightning(shared, path):
    weights = th.load(shared.checkpoint("photos"), weights_only=True)
    th.save({"epoch": 1, "state_dict": {f"model.{name}": value for name, value in weights.items()}}, path)


def _pipeline(shared, path):
    import improved_diffusion as idf

    kind = "photos" if path.name == "classes" else "mine"
    idf.load(shared.checkpoint(kind)).to_diffusers(path, drop_variance="ddim" in path.name)


def _labels(shared, path):
    path.write_text(json.dumps({f"{name}/{name}_{i:02d}.png": name for i in range(20) for name in ("cat", "dog")}))


def _photos(shared, path):
    for name in ("cat", "dog"):
        write_images(path / name, 20, classes=(name,), seed=len(path.name + name))


def _few(shared, path):
    write_images(path, 2, seed=1)


def _photo(shared, path):
    write_images(path.parent / f"{path.stem}.d", 1, seed=len(path.name))
    (path.parent / f"{path.stem}.d" / "cat_00.png").rename(path)


def _digits(shared, path):
    write_images(path, 40, size=(8, 8), channels=1, classes=DIGITS, seed=len(path.name))


def _mask(shared, path):
    save_mask(path, np.arange(64).reshape(8, 8) < 32)


def _samples(shared, path):
    write_images(path, 40, size=(16, 16), channels=1, classes=DIGITS, seed=3)


def _program(shared, path):
    write_program(path, side=16, logits=True)


PROVIDED = [
    (r".*(upsampler|super_res_train).*", _model("upsampler")),
    (r"(.*/)?classifier.*\.pt", _classifier),
    (r"data/digits/(train|test)", _digits),
    (r".*features\.pt2", _program),
    (r".*features\.pt", lambda shared, path: write_script(path)),
    (r"runs/digits/samples", _samples),
    (r"mine\.(pt|safetensors)|runs/mine", _model("mine")),
    (r".*digits.*(\.pt|\.safetensors)|runs/digits", _model("digits")),
    (
        r"(.*/)?(photos|model|other|ema_).*\.(pt|safetensors)|runs/(photos|other)",
        _model("photos"),
    ),
    (r"(photos|held_out|small_images|path/to/held_out|data/cifar10/cifar_(train|test)|images)/?", _photos),
    (r"chosen/", _few),
    (r"(photo|cat_1|dog_2)\.png", _photo),
    (r"mask\.png", _mask),
    (r"last\.ckpt", _lightning),
    (r"pipelines/.*|downloads/.*", _pipeline),
    (r"labels\.json", _labels),
]
