"""Models in folders of diffusers: a pipeline (model_index.json), or a UNet2DModel alone (config.json).

Network and scheduler become options of ours. What a model of ours says of itself is beside the tensors, and counts
where it says the same of network and schedule as the configs in the folder.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
import torch as th

from .. import distributed
from ..config import Config, DiffusionConfig, ModelConfig, UserError, shown
from ..config.messages import naming
from ..config.model import MAX_DIFFUSION_STEPS, MAX_SHIFT, MIN_SHIFT
from ..logs import logger
from ..models.build import build_diffusion, build_model
from ..schedules import get_named_beta_schedule, shift_schedule, zero_terminal_snr
from ..unet import UNetModel
from ..utils import files
from ..utils.outline import outline
from ..utils.text import listed
from . import diffusers_network as networks
from .description import KEY, read_description
from .foreign_config import ForeignConfig

C = TypeVar("C", bound=Config)

INDEX, CONFIG, SCHEDULER_CONFIG = "model_index.json", "config.json", "scheduler_config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # the first one that is there
_ANY_WEIGHTS = re.compile(r"diffusion_pytorch_model[.-].*(safetensors|bin)")  # also shards, and variants such as fp16
UNET, SCHEDULER = "unet", "scheduler"  # folders in a pipeline's; older pipelines have all files in one
_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
_MAX_CONFIG_BYTES = 2**24

# Files


def is_folder(folder: str) -> bool:
    """Whether a folder is one of diffusers."""
    names = files.list_dir(folder)
    return INDEX in names or (CONFIG in names and any(map(_ANY_WEIGHTS.fullmatch, names)))


def find_weights(folder: str) -> str:
    """The weights in a folder of diffusers. Raises UserError for another pipeline, and for a missing file."""
    names = files.list_dir(folder)
    if INDEX in names:
        path = files.join(folder, INDEX)
        _check_class(files.read_json(path, _MAX_CONFIG_BYTES), _PIPELINES, path)
        if UNET in names:
            folder = files.join(folder, UNET)
            names = files.list_dir(folder)
    found = next((name for name in WEIGHTS if name in names), None)
    others = list(filter(_ANY_WEIGHTS.fullmatch, names))
    if found is None and others:
        raise UserError(
            f"{folder} has its weights in {listed(others, 10)}, shards or a variant, and no {WEIGHTS[0]}: load it in "
            "diffusers, and write it by save_pretrained without max_shard_size and variant"
        )
    if found is None:
        raise UserError(f"{folder} has no {WEIGHTS[0]}, which holds the weights: copy or download it again")
    return files.join(folder, found)


def is_weights(path: str) -> bool:
    """Whether a path is that of the weights in a folder of diffusers."""
    return path.replace("\\", "/").rpartition("/")[2] in WEIGHTS


def _check_class(values: Any, expected: tuple[str, ...], path: str) -> None:
    found = values.get("_class_name") if isinstance(values, dict) else None
    if found not in expected:
        raise UserError(f"{path} is not of a {' or '.join(expected)}: its _class_name is {shown(found)}")


def _read_configs(path: str) -> tuple[tuple[str, Any], tuple[str, Any] | None]:
    """(path, content) of the network's config and of the scheduler's, None without one, for a file with weights."""
    folder = files.folder_of(path)
    config = files.join(folder, CONFIG)
    beside = [files.join(folder, SCHEDULER_CONFIG)]
    if folder.replace("\\", "/").rpartition("/")[2] == UNET:
        beside.append(files.join(files.join(files.folder_of(folder), SCHEDULER), SCHEDULER_CONFIG))
    scheduler = next((name for name in beside if files.exists(name)), None)
    network = (config, files.read_json(config, _MAX_CONFIG_BYTES))
    return network, (scheduler, files.read_json(scheduler, _MAX_CONFIG_BYTES)) if scheduler else None


def convert(state_dict: Mapping[str, th.Tensor], path: str) -> dict[str, th.Tensor]:
    """Our state dict, with its description in `_metadata`, of a file in a folder of diffusers. Collective.

    Raises UserError for configs that are missing, damaged, or of a network or a scheduler that ours are not.
    """
    (network_path, network_values), scheduler = distributed.from_rank0(_read_configs, path)
    _check_class(network_values, ("UNet2DModel",), network_path)
    config = networks.read_config(network_values, network_path)
    tensors = dict(state_dict)
    table = tensors.pop(networks.TIMESTEPS, None) if config["time_embedding_type"] == "learned" else None
    options = networks.options_of(config)
    if scheduler is not None:
        options |= _diffusion_options(_read_scheduler_config(scheduler[1], scheduler[0]), options["learn_sigma"])
    options |= networks.timestep_options(config, table, options.get("diffusion_steps"), path)
    if scheduler is None:
        logger.log(f"{path}: there is no {SCHEDULER_CONFIG}, so flags or their defaults give the noise schedule")
    described = _described(getattr(state_dict, "_metadata", {}), path)
    with naming(path):
        description = _agreed(described, options, path)
        network = _outline(_group(ModelConfig, description["config"]), options["learn_sigma"])
    table_of_names = networks.rows(network, networks.sines_first(config.values))
    converted: Any = OrderedDict(networks.to_ours(tensors, network, table_of_names, path))
    converted._metadata = {KEY: {"json": json.dumps(description)}}
    return converted


def _group(kind: type[C], options: Mapping[str, Any]) -> C:
    """The options of one group."""
    return kind(**{f.name: options[f.name] for f in fields(kind) if f.name in options})


def _outline(model: ModelConfig, learn_sigma: bool) -> UNetModel:
    """The network of these options, without memory for its numbers."""
    with outline():
        return build_model(model, learn_sigma)


def _described(metadata: Any, path: str) -> dict[str, Any]:
    """What is beside the tensors; {} where nothing is."""
    entry = metadata.get(KEY) if isinstance(metadata, dict) else None
    return read_description(entry.get("json") if isinstance(entry, dict) else None, path) if entry else {}


def _agreed(described: dict[str, Any], options: dict[str, Any], path: str) -> dict[str, Any]:
    """The description where it agrees with the options from the configs, otherwise those."""
    if not described:
        return {"config": options}
    config = {**options, **described.get("config", {})}
    if _meaning(config) == _meaning({**config, **options}):
        own = {"sigma_small": options["sigma_small"]} if "sigma_small" in options else {}  # both need not agree on it
        return {**described, "config": {**config, **own}}
    logger.log(f"{path}: {CONFIG} and {SCHEDULER_CONFIG} are not those of its description, and count instead of it")
    return {"config": options}


def _meaning(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a model's options make of a network and of a noise schedule of theirs."""
    model, diffusion = _group(ModelConfig, options), _group(DiffusionConfig, options)
    network = networks.config_of(model, diffusion, _outline(model, diffusion.learn_sigma))
    return network, {**scheduler_config(diffusion), "variance_type": ""}


# The scheduler

_SCHEDULER_DEFAULTS = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "variance_type": "fixed_small", "clip_sample": True, "clip_sample_range": 1.0,
    "prediction_type": "epsilon", "thresholding": False, "rescale_betas_zero_snr": False,
}  # fmt: skip
_HOW_TO_SAMPLE = {  # of any value: options of the sampling commands decide these
    "dynamic_thresholding_ratio", "sample_max_value", "timestep_spacing", "steps_offset", "set_alpha_to_one",
    "skip_prk_steps",
}  # fmt: skip
_LEAST_BETA = 1e-9
_PREDICTIONS = ("epsilon", "sample", "v_prediction")


def scheduler_config(diffusion: DiffusionConfig) -> dict[str, Any]:
    """The arguments of the DDPMScheduler of all steps of a diffusion."""
    steps = diffusion.diffusion_steps
    plain = diffusion.schedule_shift == 1 and not diffusion.zero_terminal_snr
    schedule: dict[str, Any]
    if plain and diffusion.noise_schedule == "linear":
        schedule = {"beta_schedule": "linear", "beta_start": 0.1 / steps, "beta_end": 20 / steps}
    elif plain and diffusion.noise_schedule == "cosine":
        schedule = {"beta_schedule": "squaredcos_cap_v2"}
    else:
        schedule = {"trained_betas": build_diffusion(replace(diffusion, timestep_respacing="")).betas.tolist()}
    fixed = "fixed_small" if diffusion.sigma_small else "fixed_large"
    return {
        "num_train_timesteps": steps,
        **schedule,
        "variance_type": "learned_range" if diffusion.learn_sigma else fixed,
        "prediction_type": _PREDICTIONS[1 if diffusion.predict_xstart else 2 if diffusion.predict_v else 0],
        "clip_sample": True,
        "timestep_spacing": "trailing" if diffusion.zero_terminal_snr else "leading",  # the last step must be there
    }


def _read_scheduler_config(values: Any, path: str) -> ForeignConfig:
    _check_class(values, _SCHEDULERS, path)
    return ForeignConfig.of(values, _SCHEDULER_DEFAULTS, path, ignored=_HOW_TO_SAMPLE)


def _diffusion_options(config: ForeignConfig, learn_sigma: bool) -> dict[str, Any]:
    """Our options of a scheduler of theirs. Raises UserError, by name and value, for another process than ours."""
    steps = config.whole("num_train_timesteps", 1, MAX_DIFFUSION_STEPS)
    prediction = config.choice("prediction_type", _PREDICTIONS)
    options = {
        "diffusion_steps": steps,
        "predict_xstart": prediction == "sample",
        "predict_v": prediction == "v_prediction",
        **_schedule_options(config, _betas(config, steps)),
    }
    if config["_class_name"] == "DDPMScheduler":  # the others have no variance of their own
        allowed = ("learned_range",) if learn_sigma else ("fixed_small", "fixed_small_log", "fixed_large")
        kind = config.choice("variance_type", allowed)
        if not learn_sigma:
            options["sigma_small"] = kind != "fixed_large"
    _say_how_they_sample(config)
    return options


def _say_how_they_sample(config: ForeignConfig) -> None:
    """Log what sampling here does otherwise unless a flag says it."""
    clips, bound = config.choice("clip_sample", (True, False)), config.number("clip_sample_range", 0, 1e9)
    if not clips or bound != 1:
        clipped = f"x_0 to [-{bound:g}, {bound:g}]" if clips else "nothing"
        here = "sampling here clips x_0 to [-1, 1], or nothing with --clip_denoised False"
        logger.log(f"{config.path} clips {clipped}: {here}")
    if config.choice("thresholding", (True, False)):
        logger.log(f"{config.path} has dynamic thresholding: sampling has the flag --dynamic_threshold for it")


def _betas(config: ForeignConfig, steps: int) -> np.ndarray:
    """The betas [T] of a scheduler of theirs. Raises UserError for some that are no noise schedule."""
    name = "beta_start"
    if config["trained_betas"] is not None:
        name = "trained_betas"
        betas = np.array(config.numbers(name, _LEAST_BETA, 1), dtype=np.float64)
        if len(betas) != steps:
            raise config.refused(name, f"num_train_timesteps, {steps}, numbers")
    elif config.choice("beta_schedule", ("linear", "squaredcos_cap_v2")) == "linear":
        betas = np.linspace(config.number(name, _LEAST_BETA, 1), config.number("beta_end", _LEAST_BETA, 1), steps)
    else:
        betas = get_named_beta_schedule("cosine", steps)
    rescaled = config.choice("rescale_betas_zero_snr", (False, True)) and steps > 1
    with np.errstate(all="ignore"):
        used = zero_terminal_snr(betas) if rescaled else betas
    if betas[0] == 1 or (betas[:-1] == 1).any() or not np.isfinite(used).all():
        raise config.refused(name, "betas below 1 before the last, which leave a signal")
    return used


def _schedule_options(config: ForeignConfig, betas: np.ndarray) -> dict[str, Any]:
    """Our options for the betas [T]. Raises UserError where none of our schedules has them."""
    ends_in_noise = betas[-1] == 1
    for name in ("linear", "cosine", "sigmoid"):
        ours = get_named_beta_schedule(name, len(betas))
        if not (ours < 1).all():
            continue
        # The first step is that of the shifted schedule, whether or not the end was rescaled.
        snr, other = (1 - ours[0]) / ours[0], (1 - betas[0]) / betas[0]
        shift = round(float(np.sqrt(snr / other)), 6) if other > 0 else 1.0
        if not MIN_SHIFT <= shift <= MAX_SHIFT:
            continue
        shifted = shift_schedule(ours, shift) if shift != 1 else ours
        if np.allclose(zero_terminal_snr(shifted) if ends_in_noise else shifted, betas, rtol=1e-4, atol=1e-8):
            return {"noise_schedule": name, "schedule_shift": shift, "zero_terminal_snr": bool(ends_in_noise)}
    if config["trained_betas"] is not None:
        raise config.refused("trained_betas", "those of one of this package's schedules")
    raise config.refused("beta_start", f"0.1/T with a beta_end of 20/T, which is {shown(config['beta_end'])}")
