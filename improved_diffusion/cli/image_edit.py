"""Edit images with a trained model: encode, decode, interpolate, inpaint or vary them."""

from ..config.settings import Decoding, Encoding, Inpainting, Interpolation, Variations
from .command import Command, CommandGroup

COMMAND = CommandGroup(
    "Edit images with a trained model.",
    {
        "encode": Command(
            "Find the noise that a deterministic sampler turns into each image.",
            Encoding,
            "image_edit:encode",
            first=("model_path", "images", "classes", "sampler", "steps", "batch_size", "precision", "seed", "out_dir"),
        ),
        "decode": Command(
            "Turn encoded noise back into images, of other classes with --classes.",
            Decoding,
            "image_edit:decode",
            first=(
                "model_path", "latents", "classes", "num_samples", "sampler", "steps", "guidance_scale", "batch_size",
                "seed", "out_dir",
            ),
        ),
        "interpolate": Command(
            "Make the images between two images, or between two samples.",
            Interpolation,
            "image_edit:interpolate",
            first=(
                "model_path", "images", "seeds", "frames", "classes", "sampler", "steps", "batch_size", "seed",
                "out_dir",
            ),
        ),
        "inpaint": Command(
            "Paint the masked part of images to fit the rest (RePaint).",
            Inpainting,
            "image_edit:inpaint",
            first=(
                "model_path", "images", "mask", "num_samples", "classes", "resamplings", "jump_length", "steps", "seed",
                "out_dir",
            ),
        ),
        "variations": Command(
            "Add noise to images and remove it again.",
            Variations,
            "image_edit:vary",
            first=(
                "model_path", "images", "strength", "num_samples", "classes", "sampler", "steps", "batch_size", "seed",
                "out_dir",
            ),
        ),
    },
)  # fmt: skip
