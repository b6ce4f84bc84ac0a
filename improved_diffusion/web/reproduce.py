"""The command and the Python that draw the same images again, byte for byte."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

R = TypeVar("R", bound="Recipe")


@dataclass(frozen=True)
class Recipe:
    """How to draw images again: those with the given numbers, or all.

    :param path: of the checkpoint.
    """

    path: str

    def of(self: R, path: str) -> R:
        """The same of another checkpoint: a run may have a newer one by the time that it draws."""
        return replace(self, path=path)

    def command(self, numbers: Sequence[int] = ()) -> str:
        """Command lines."""
        raise NotImplementedError

    def python(self, numbers: Sequence[int] = ()) -> str:
        """A program."""
        raise NotImplementedError


@dataclass(frozen=True)
class SampleRecipe(Recipe):
    """Samples.

    :param options: those that differ from the command's defaults.
    """

    n: int
    seed: int
    classes: Sequence[Any]
    options: Mapping[str, Any]

    def command(self, numbers: Sequence[int] = ()) -> str:
        count = {"seeds": _commas(numbers)} if numbers else {"num_samples": self.n}
        return _command("sample", self.path, {**count, "seed": self.seed, **_flag(self.classes), **self.options})

    def python(self, numbers: Sequence[int] = ()) -> str:
        count = {"seeds": _commas(numbers)} if numbers else {"n": self.n}
        chosen = {"classes": list(self.classes)} if self.classes else {}
        return _python(self.path, f"model.sample({_call({**count, **chosen, 'seed': self.seed, **self.options})})")


@dataclass(frozen=True)
class EditRecipe(Recipe):
    """Images made from others, which the zip holds; all of them, since they depend on each other's files.

    :param name: of the method, and of the editing command unless `command_name` is given.
    :param inputs: the files by the option's name, such as {"images": "image.png", "mask": "mask.png"}.
    :param first: the method's positional arguments, as Python.
    """

    name: str
    inputs: Mapping[str, str]
    first: str
    options: Mapping[str, Any]
    classes: Sequence[Any] = ()
    command_name: str = ""

    def command(self, numbers: Sequence[int] = ()) -> str:
        options = {"num_samples" if name == "n" else name: value for name, value in self.options.items()}
        name = self.command_name or f"edit {self.name}"
        return _command(name, self.path, {**self.inputs, **_flag(self.classes), **options})

    def python(self, numbers: Sequence[int] = ()) -> str:
        chosen = {"classes": list(self.classes)} if self.classes else {}
        return _python(self.path, f"model.{self.name}({self.first}, {_call({**chosen, **self.options})})")


@dataclass(frozen=True)
class TransformRecipe(Recipe):
    """An image encoded as its own class, and decoded as others."""

    classes: Sequence[Any]
    others: Sequence[Any]
    options: Mapping[str, Any]

    def command(self, numbers: Sequence[int] = ()) -> str:
        there = {"images": "image.png", **_flag(self.classes), **self.options}
        back = {"latents": "latents/latents.npz", "num_samples": len(self.others), **_flag(self.others)}
        encode = _command("edit encode", self.path, there, out_dir="latents")
        return f"{encode} &&\n{_command('edit decode', self.path, {**back, **self.options})}"

    def python(self, numbers: Sequence[int] = ()) -> str:
        options = _call({"classes": list(self.classes), **self.options})
        back = _call({"n": len(self.others), "classes": list(self.others), **self.options})
        return _python(self.path, f'model.decode(model.encode("image.png", {options}), {back})')


def _command(name: str, path: str, options: Mapping[str, Any], out_dir: str = "images") -> str:
    """A command line with these options, one on each line."""
    values = {"model_path": path, **options, "out_dir": out_dir}
    flags = [f"--{option} {shlex.quote(str(value))}" for option, value in values.items()]
    return " \\\n    ".join([f"improved-diffusion {name}", *flags])


def _python(path: str, call: str) -> str:
    """A program that loads the model, draws and writes the images."""
    return f'import improved_diffusion as idf\n\nmodel = idf.load({path!r})\nmade = {call}\nmade.save("images")\n'


def _call(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _commas(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))


def _flag(classes: Sequence[Any]) -> dict[str, str]:
    return {"classes": _commas(classes)} if classes else {}
