"""A pipeline of diffusers: a folder that DDPMPipeline.from_pretrained and DDIMPipeline.from_pretrained load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch as th

from ..checkpoints import diffusers_folder as folders
from ..checkpoints import diffusers_network as networks
from ..checkpoints import safetensors_file
from ..checkpoints.loading import LoadedModel
from ..config import UserError
from ..config.exchange import ExportConfig
from ..logs import logger
from ..models.build import build_model
from ..utils import files
from ..utils.outline import outline


def write(loaded: LoadedModel, options: ExportConfig) -> list[str]:
    """Write model_index.json, unet/ and scheduler/."""
    settings: Any = loaded.settings
    if settings.model.kind != "image":
        raise UserError(f"{loaded.path} is a super-resolution model: diffusers has no pipeline for such a network")
    if options.drop_variance and not settings.diffusion.learn_sigma:
        raise UserError(f"--drop_variance: {loaded.path} has no learned variance")
    _check_folder(options.out, loaded.path)
    state_dict, description = loaded.model.state_dict(), loaded.description()
    if options.drop_variance:
        settings = settings.replace(learn_sigma=False)
        description = {**description, "config": {**description["config"], "learn_sigma": False}}
        state_dict = {name: _mean(name, tensor) for name, tensor in state_dict.items()}
    student = loaded.metadata.get("distilled", {})
    pipeline = _pipeline(settings, state_dict, options.drop_variance, student.get("timestep_grid") == "trailing")
    if files.exists(files.join(options.out, folders.INDEX)):
        logger.warn(f"{options.out}: replaces the pipeline that was there")
    _save(pipeline, options.out, description)
    return _lost(settings, options.drop_variance, student)


def _mean(name: str, tensor: th.Tensor) -> th.Tensor:
    """A tensor without the part of the variance."""
    return tensor.chunk(2)[0] if name.startswith("out.2.") else tensor


def _pipeline(settings: Any, state_dict: dict[str, th.Tensor], ddim: bool, trailing: bool) -> Any:
    """The pipeline with the weights, which may share memory with the state dict.

    :param trailing: whether fewer steps are those of the grid of this name.
    """
    diffusers = _package()
    with outline():
        network = build_model(settings.model, settings.diffusion.learn_sigma)
    config = networks.config_of(settings.model, settings.diffusion, network)
    tensors = networks.to_theirs(state_dict, networks.rows(network, networks.sines_first(config)))
    if networks.has_table(settings.diffusion):
        tensors[networks.TIMESTEPS] = networks.table_of_timesteps(
            settings.diffusion.diffusion_steps, settings.model.num_channels, settings.model.time_freq_shift
        )
    with outline():
        unet = diffusers.UNet2DModel(**config)
    unet.load_state_dict(tensors, assign=True)
    steps = folders.scheduler_config(settings.diffusion)
    scheduler = diffusers.DDPMScheduler(**(steps | ({"timestep_spacing": "trailing"} if trailing else {})))
    if ddim:
        return diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler.from_config(scheduler.config))
    return diffusers.DDPMPipeline(unet, scheduler)


def _package() -> Any:
    try:
        import diffusers
    except ImportError:
        raise UserError(
            "--to diffusers needs the package diffusers: pip install 'improved_diffusion[diffusers]'"
        ) from None
    return diffusers


def _check_folder(folder: str, source: str) -> None:
    """Raise UserError for the pipeline that was read, and where one would be mixed with other files."""
    if files.is_url(folder):
        raise UserError(f"--out {folder}: diffusers loads local folders: give one, and upload it")
    if not files.exists(folder):
        return
    if not files.is_dir(folder):
        raise UserError(f"--out {folder} is a file: name a folder for the pipeline")
    unet, scheduler = (files.join(folder, name) for name in (folders.UNET, folders.SCHEDULER))
    for each in (folder, unet, scheduler):
        files.remove_leftovers(each)  # of an export that was killed, and their folders do not count
    names = [name for name in files.list_dir(folder) if files.join(folder, name) not in _empty(unet, scheduler)]
    if folders.is_weights(source) and any(files.same(files.folder_of(source), each) for each in (folder, unet)):
        raise UserError(f"--out {folder} is the pipeline to read: name a new folder")
    inside = files.list_dir(unet) if folders.UNET in names else []
    other = [name for name in inside if name not in (folders.CONFIG, folders.WEIGHTS[0])]
    if other or (names and folders.INDEX not in names):
        raise UserError(f"--out {folder} holds other files, such as {(other or names)[0]}: name a new folder")


def _empty(*paths: str) -> list[str]:
    """Those of the paths that are empty folders."""
    return [path for path in paths if files.is_dir(path) and not files.list_dir(path)]


def _save(pipeline: Any, folder: str, description: dict[str, Any]) -> None:
    """Write the files that the library would. None is visible before all are written, and model_index.json, without
    which nothing loads, is the last."""
    unet, scheduler = (files.join(folder, name) for name in (folders.UNET, folders.SCHEDULER))
    contents = {
        files.join(unet, folders.WEIGHTS[0]): safetensors_file.to_bytes(pipeline.unet.state_dict(), description),
        files.join(unet, folders.CONFIG): pipeline.unet.to_json_string().encode(),
        files.join(scheduler, folders.SCHEDULER_CONFIG): pipeline.scheduler.to_json_string().encode(),
        files.join(folder, folders.INDEX): pipeline.to_json_string().encode(),
    }
    try:
        files.make_dirs(unet)
        files.make_dirs(scheduler)
        files.write_together(contents.items())
    except BaseException:
        for each in (unet, scheduler):
            with suppress(OSError):
                os.rmdir(each)  # an empty one, which the next export would take for somebody's
        raise


def _lost(settings: Any, dropped: bool, student: Mapping[str, Any]) -> list[str]:
    """What the pipeline does not have.

    :param student: what a distilled model's file says of it; {} for others.
    """
    lost = ["the learned variance (DDIM does not use it)"] if dropped else []
    if student.get("sampler") == "ddim":
        lost.append(
            f"the student's own steps: call DDIMPipeline with num_inference_steps={student['steps']} and "
            "use_clipped_model_output=True"
        )
    elif student:
        lost.append(
            f"the student's sampler, {student['sampler']} in {student['steps']} steps, which diffusers does not have: "
            "it was not trained for others"
        )
    if settings.diffusion.learn_sigma:
        lost.append("sampling by DDIMPipeline, which takes no learned variance: give --drop_variance True for it")
    if settings.model.class_cond:
        lost.append("sampling by a pipeline, which passes no class_labels: docs/exchange.md has the loop that does")
    if settings.model.label_drop:
        lost.append("the hidden class, for guidance without a classifier")
    return lost
