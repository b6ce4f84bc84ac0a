"""What samples depend on, and the default name of their folder."""

from __future__ import annotations

import argparse
import os
from typing import Any

from .. import distributed
from ..config import fixed_names
from ..utils import files


def describe_request(options: argparse.Namespace, metadata: dict[str, Any], sampler: Any) -> dict[str, Any]:
    """What the samples that a Sampler draws from a checkpoint depend on."""
    names = {"seed", "classes", "sigma_small", "guidance_scale", "guidance_interval", "guidance_rescale"}
    names |= fixed_names() | ({"classifier_scale"} if options.classifier_path else set())
    request = {name: getattr(options, name) for name in sorted(names) if hasattr(options, name)}
    for name in ("model", "guide", "classifier"):
        if getattr(options, f"{name}_path", ""):
            request[f"{name}_sha256"] = distributed.from_rank0(files.sha256, getattr(options, f"{name}_path"))
    if hasattr(options, "base_samples"):
        request["base_samples"] = files.full_path(options.base_samples)
    model = {"model_path": files.full_path(options.model_path), "model_step": metadata.get("step")}
    return {**model, **sampler.request(), **request}


def samples_name(options: argparse.Namespace, sampler: str, steps: int) -> str:
    """The default folder of a checkpoint's samples."""
    path = os.path.abspath(options.model_path)
    run, stem = os.path.basename(os.path.dirname(path)), os.path.splitext(os.path.basename(path))[0]
    rule = "" if sampler == "ancestral" else sampler
    scale = getattr(options, "guidance_scale", 1)
    return f"{run}_{stem}_{steps}{rule}steps{'' if scale == 1 else f'_scale{scale:g}'}_seed{options.seed}"
