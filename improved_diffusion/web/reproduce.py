"""The command and the Python that draw the same images again, byte for byte."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any


def _call(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def sample_command(
    path: str, n: int, seed: int, classes: Sequence[Any], options: Mapping[str, Any], numbers: Sequence[int] = ()
) -> str:
    """The command line of a request for samples.

    :param path: of the checkpoint.
    :param numbers: of the images to draw; all `n` unless given.
    """
    count = {"seeds": ",".join(map(str, numbers))} if numbers else {"num_samples": n}
    return command("sample", path, {**count, "seed": seed, **_listed(classes), **options}, "samples")


def sample_python(
    path: str, n: int, seed: int, classes: Sequence[Any], options: Mapping[str, Any], numbers: Sequence[int] = ()
) -> str:
    """The Python of a request for samples; parameters as for `sample_command`."""
    count = f'seeds="{",".join(map(str, numbers))}"' if numbers else str(n)
    chosen = {"classes": list(classes)} if classes else {}
    return python(path, f"model.sample({count}, {_call({**chosen, 'seed': seed, **options})})", "samples")


def command(name: str, path: str, options: Mapping[str, Any], out_dir: str) -> str:
    """A command line with these options."""
    words = [f"improved-diffusion {name}"]
    for option, value in {"model_path": path, **options, "out_dir": out_dir}.items():
        words.append(f"--{option} {shlex.quote(str(value))}")
    return " \\\n    ".join(words)


def python(path: str, call: str, out_dir: str) -> str:
    """A program that loads a model, calls it and writes the images."""
    return (
        f"import improved_diffusion as idf\n\nmodel = idf.load({path!r})\nimages = {call}\nimages.save({out_dir!r})\n"
    )


def _listed(classes: Sequence[Any]) -> dict[str, str]:
    return {"classes": ",".join(map(str, classes))} if classes else {}
