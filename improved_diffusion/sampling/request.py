"""What samples depend on, and the default name of their folder."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from .. import distributed
from ..checkpoints.loading import LoadedModel, find_file
from ..config import ReadingConfig, fixed_names
from ..utils import files
from ..utils.text import file_name
from .noise import SEED_SCHEME
from .sampler import Sampler


def describe_request(loaded: LoadedModel, sampler: Sampler) -> dict[str, Any]:
    """What the samples that a Sampler draws from a model depend on. Collective."""
    values = loaded.settings.values()
    names = {"seed", "classes", "sigma_small", "guidance_scale", "guidance_interval", "guidance_rescale"}
    names |= fixed_names() | ({"classifier_scale"} if values["classifier_path"] else set())
    names |= {"classifier_guidance"} if values["classifier_guidance"] == "published" else set()  # older folders lack it
    request = {name: values[name] for name in sorted(names & values.keys())}
    paths = {"model": loaded.path, "guide": values["guide_path"], "classifier": values["classifier_path"]}
    for name, path in paths.items():
        if path:
            request[f"{name}_sha256"] = distributed.from_rank0(_sha256, path)
    if "base_samples" in values:
        request["base_samples"] = files.full_path(values["base_samples"])
        # Entries that older folders of samples lack, only where they change the base images.
        options = [f for f in fields(ReadingConfig) if f.name != "max_image_pixels"]
        request |= {f.name: values[f.name] for f in options if values[f.name] != f.default}
    model = {"model_path": files.full_path(loaded.path), "model_step": loaded.metadata.get("step")}
    return {"seed_scheme": SEED_SCHEME, **model, **sampler.request(), **request}


def _sha256(path: str) -> str:
    """The checksum of a checkpoint; of a folder, that of the file in it that is loaded."""
    return files.sha256(find_file(path))


def model_name(path: str) -> str:
    """What a checkpoint is called in the names of folders: RUN_FILE."""
    path = os.path.abspath(path)
    return f"{os.path.basename(os.path.dirname(path))}_{os.path.splitext(os.path.basename(path))[0]}"


def samples_name(loaded: LoadedModel, sampler: str, steps: int) -> str:
    """The default folder of a checkpoint's samples."""
    values = loaded.settings.values()
    rule = "" if sampler == "ancestral" else f"_{sampler}"
    wanted = "-".join(part.strip() for part in str(values.get("classes", "")).split(",") if part.strip())
    classes = f"_classes-{file_name(wanted, 40)}" if wanted else ""
    scale = values.get("guidance_scale", 1)
    guided = "" if scale == 1 else f"_scale{scale:g}"
    return f"{model_name(loaded.path)}{rule}_{steps}steps{classes}{guided}_seed{values['seed']}"
