"""Edit images with a trained model: encode, decode, interpolate, inpaint or vary them."""

from functools import partial
from typing import Any

from .. import distributed
from ..checkpoints.loading import load_model
from ..config.settings import Decoding, Encoding, Inpainting, Interpolation, Variations
from ..editing.base import Edit
from ..editing.decode import Decode
from ..editing.encode import Encode
from ..editing.inpaint import Inpaint
from ..editing.interpolate import Interpolate
from ..editing.variations import Vary
from ..logs.run_folder import open_run
from ..utils.terminal import show
from .command import Command, CommandGroup
from .parsing import Parsed


def edit(kind: type[Edit], parsed: Parsed[Any]) -> None:
    """Run an editing command."""
    distributed.join_ranks(parsed.settings.run)
    loaded = load_model(parsed.settings, parsed.given, parsed.settings.edit.model_path)
    model = kind.prepare(loaded)
    if parsed.settings.sampler.print_steps:
        distributed.from_rank0(show, model.sampler.table())
        return
    command = kind.read(model)
    command.write(open_run(parsed.settings.run, command.name))


COMMAND = CommandGroup(
    "Edit images with a trained model.",
    {
        "encode": Command(
            "Find the noise that a deterministic sampler turns into each image.",
            Encoding,
            partial(edit, Encode),
            first=("model_path", "images", "classes", "sampler", "steps", "batch_size", "precision", "seed", "out_dir"),
        ),
        "decode": Command(
            "Turn encoded noise back into images, of other classes with --classes.",
            Decoding,
            partial(edit, Decode),
            first=(
                "model_path", "latents", "classes", "num_samples", "sampler", "steps", "guidance_scale", "batch_size",
                "seed", "out_dir",
            ),
        ),
        "interpolate": Command(
            "Make the images between two images, or between two samples.",
            Interpolation,
            partial(edit, Interpolate),
            first=(
                "model_path", "images", "seeds", "frames", "classes", "sampler", "steps", "batch_size", "seed",
                "out_dir",
            ),
        ),
        "inpaint": Command(
            "Paint the masked part of images to fit the rest (RePaint).",
            Inpainting,
            partial(edit, Inpaint),
            first=(
                "model_path", "images", "mask", "num_samples", "classes", "resamplings", "jump_length", "steps", "seed",
                "out_dir",
            ),
        ),
        "variations": Command(
            "Add noise to images and remove it again.",
            Variations,
            partial(edit, Vary),
            first=(
                "model_path", "images", "strength", "num_samples", "classes", "sampler", "steps", "batch_size", "seed",
                "out_dir",
            ),
        ),
    },
)  # fmt: skip
