"""Recompute the golden arrays with this package: README.md beside this file says what they are.

    python tests/golden/generate.py                  # the largest difference of each file from what is stored
    python tests/golden/generate.py --all            # of each array
    python tests/golden/generate.py --out FOLDER     # also write the recomputed files

The stored files are the numbers of the published code, and their inputs are the inputs here.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' helpers

import numpy as np
import torch as th
from helpers import golden, golden_json, make_diffusion, set_golden_weights, stand_in_network
from PIL import Image

from improved_diffusion import nn
from improved_diffusion.config.published import model_and_diffusion_defaults, sr_model_and_diffusion_defaults
from improved_diffusion.data.stream import load_data
from improved_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from improved_diffusion.logs import logger
from improved_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from improved_diffusion.models.factories import create_model_and_diffusion, sr_create_model_and_diffusion
from improved_diffusion.resample import LossSecondMomentResampler
from improved_diffusion.respace import space_timesteps
from improved_diffusion.schedules import get_named_beta_schedule

Arrays = dict[str, np.ndarray]


def schedules(stored: Arrays) -> Arrays:
    """`{linear,cosine}_{T}`: betas."""
    names = [key.split("_") for key in stored]
    return {f"{name}_{steps}": get_named_beta_schedule(name, int(steps)) for name, steps in names}


def losses(stored: Arrays) -> Arrays:
    """`normal_kl` and `discretized_gaussian_log_likelihood` of the stored inputs."""
    g = {key: th.from_numpy(value) for key, value in stored.items()}
    likelihood = discretized_gaussian_log_likelihood(g["x"], means=g["means"], log_scales=g["log_scales"])
    return {
        "normal_kl": normal_kl(g["mean1"], g["logvar1"], g["mean2"], g["logvar2"]).numpy(),
        "discretized_gaussian_log_likelihood": likelihood.numpy(),
    }


def diffusion(stored: Arrays) -> Arrays:
    """One step of every published configuration."""
    prefixes = sorted({"/".join(key.split("/")[:5]) for key in stored if "/" in key})
    return {key: value for prefix in prefixes for key, value in _one_step(stored, prefix).items()}


def _one_step(stored: Arrays, prefix: str) -> Arrays:
    """The arrays of one configuration of diffusion.npz; `noise2` is whatever a step draws."""
    x0, noise, noise2, t = (th.from_numpy(stored[key]) for key in ("x_start", "noise", "noise2", "t"))
    schedule, mean, var, loss, scaling = prefix.split("/")
    process = make_diffusion(
        30, None if schedule == "linear" else space_timesteps(30, [15]), schedule,
        ModelMeanType[mean], ModelVarType[var], LossType[loss], scaling == "rescale",
    )  # fmt: skip
    model = stand_in_network(var.startswith("LEARNED"))
    t = t.clamp(max=process.num_timesteps - 1)
    x_t = process.q_sample(x0, t, noise)
    compute: dict[str, Callable] = {
        "p_mean_variance": lambda clip, name: process.p_mean_variance(model, x_t, t, clip == "clip=True")[name],
        "p_sample": lambda: process.p_sample(model, x_t, t)["sample"],
        "ddim_sample": lambda eta: process.ddim_sample(model, x_t, t, eta=float(eta[4:]))["sample"],
        "ddim_reverse_sample": lambda: process.ddim_reverse_sample(model, x_t, t)["sample"],
        "training_losses": lambda name: process.training_losses(model, x0, t, noise=noise)[name],
        "timestep_map": lambda: process.timestep_map,
        "betas": lambda: process.betas,
    }
    found: Arrays = {}
    with mock.patch.object(th, "randn_like", lambda x: noise2):
        for key in (key for key in stored if key.startswith(prefix + "/")):
            name, *arguments = key.removeprefix(prefix + "/").split("/")
            found[key] = np.asarray(compute[name](*arguments))
    return found


def loops(stored: Arrays) -> Arrays:
    """The sampling loops and the bound, after `torch.manual_seed(11)` each."""
    found: Arrays = {}
    model, shape = stand_in_network(True), (2, 3, 8, 8)
    for prefix in sorted({"/".join(key.split("/")[:2]) for key in stored if "/" in key}):
        schedule, respacing = prefix.split("/")
        process = make_diffusion(
            35, None if respacing == "all" else space_timesteps(35, respacing), schedule,
            var=ModelVarType.LEARNED_RANGE, loss=LossType.RESCALED_MSE, rescale=True,
        )  # fmt: skip
        th.manual_seed(11)
        found[f"{prefix}/p_sample_loop"] = process.p_sample_loop(model, shape, device="cpu").numpy()
        th.manual_seed(11)
        sample = process.ddim_sample_loop(model, shape, device="cpu", eta=0.3)
        found[f"{prefix}/ddim_sample_loop"] = sample.numpy()
        th.manual_seed(11)
        bound = process.calc_bpd_loop(model, th.from_numpy(stored["x_start"]))
        found |= {f"{prefix}/calc_bpd_loop/{name}": value.numpy() for name, value in bound.items()}
    return found


def _create(flags: dict, superres: bool):
    if superres:
        return sr_create_model_and_diffusion(**{**sr_model_and_diffusion_defaults(), **flags})
    return create_model_and_diffusion(**{**model_and_diffusion_defaults(), **flags})


def networks(stored: Arrays) -> Arrays:
    """The outputs of the small networks of model_*.json."""
    found: Arrays = {}
    for name in sorted({key.split("/")[0] for key in stored}):
        flags = golden_json(f"model_{name}")
        model = set_golden_weights(_create(flags, "large_size" in flags)[0])
        inputs = {key.removeprefix(f"{name}/"): th.from_numpy(stored[key]) for key in stored if key.startswith(name)}
        more = {"low_res": inputs["low_res"]} if "low_res" in inputs else {}
        if flags.get("class_cond"):
            more["y"] = inputs["y"]
        with th.no_grad():
            found[f"{name}/out"] = model(inputs["x"], inputs["t"], **more).numpy()
    return found


def resampler(stored: Arrays) -> Arrays:
    """The weights after each update."""
    history, uniform_prob = int(stored["history_per_term"]), float(stored["uniform_prob"])
    sampler, weights = LossSecondMomentResampler(make_diffusion(12), history, uniform_prob), []
    for ts, values in zip(stored["timesteps"], stored["losses"]):
        sampler.update_with_all_losses(ts.tolist(), values.tolist())
        weights.append(sampler.weights().copy())
    return {"weights": np.stack(weights)}


def timestep_embedding(stored: Arrays) -> Arrays:
    """The embedding of `t` in 32 and 33 dimensions."""
    t = th.from_numpy(stored["t"])
    return {f"dim{dim}": nn.timestep_embedding(t, dim).numpy() for dim in (32, 33)}


def image_pipeline(stored: Arrays) -> Arrays:
    """The one batch of the five images, saved as PNGs."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(5):
            path = Path(folder) / f"sub{i % 2}" / f"{('cat', 'dog', 'bird')[i % 3]}_{i:03d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(stored[f"image{i}"]).save(path)
        stream = load_data(
            data_dir=folder, batch_size=5, image_size=32, class_cond=True, deterministic=True, num_workers=0
        )
        batch, kwargs = next(stream)
    return {"batch32": batch.numpy(), "y": kwargs["y"].numpy()}


class _Timesteps:
    """A schedule sampler that gives these timesteps in turn."""

    def __init__(self, timesteps: list[np.ndarray]):
        self.timesteps = list(timesteps)

    def sample(self, batch_size: int, device: th.device) -> tuple[th.Tensor, th.Tensor]:
        return th.from_numpy(self.timesteps.pop(0)), th.ones(batch_size)


def trainer(stored: Arrays) -> Arrays:
    """Six steps of TrainLoop: [sum, sum of squares, the first four values] of each parameter of each file."""
    from improved_diffusion.train_util import TrainLoop

    rng = np.random.RandomState(5)
    batches = [rng.uniform(-1, 1, (4, 3, 32, 32)).astype(np.float32) for _ in range(6)]
    for _ in range(6):
        rng.randint(0, 1000, 4)  # labels, which this model does not take
    timesteps = [rng.randint(0, 100, 4) for _ in range(6)]
    noises = iter([th.from_numpy(rng.standard_normal((4, 3, 32, 32)).astype(np.float32)) for _ in range(6)])
    flags = dict(image_size=32, num_channels=32, num_res_blocks=1, learn_sigma=True, diffusion_steps=100)
    model, process = _create({**flags, "noise_schedule": "cosine"}, superres=False)
    set_golden_weights(model, 5)
    with tempfile.TemporaryDirectory() as folder:
        logger.configure(dir=folder, format_strs=[])
        with mock.patch.object(th, "randn_like", lambda x: next(noises)):
            TrainLoop(
                model=model, diffusion=process, data=((th.from_numpy(batch), {}) for batch in batches), batch_size=4,
                microbatch=-1, lr=2e-3, ema_rate="0.5,0.9", log_interval=10, save_interval=10000, resume_checkpoint="",
                schedule_sampler=_Timesteps(timesteps), weight_decay=0.05, lr_anneal_steps=6,
            ).run_loop()  # fmt: skip
        logger.reset()
        found: Arrays = {}
        for prefix, name in (("model", "model"), ("ema_0.5_", "ema_0.5_"), ("ema_0.9_", "ema_0.9_")):
            for key, value in th.load(f"{folder}/{name}000006.pt").items():
                flat = value.double().flatten().numpy()
                found[f"{prefix}/{key}"] = np.concatenate([[flat.sum(), (flat**2).sum()], flat[:4]])
        found["opt/lr"] = np.array(th.load(f"{folder}/opt000006.pt")["param_groups"][0]["lr"])
    return found


FILES: dict[str, Callable[[Arrays], Arrays]] = {
    function.__name__: function
    for function in (
        schedules, losses, diffusion, loops, networks, resampler, timestep_embedding, image_pipeline, trainer,
    )
}  # fmt: skip

INPUTS = {
    "losses": {"mean1", "logvar1", "mean2", "logvar2", "x", "means", "log_scales"},
    "diffusion": {"x_start", "noise", "noise2", "t"},
    "loops": {"x_start"},
    "resampler": {"timesteps", "losses", "history_per_term", "uniform_prob"},
    "timestep_embedding": {"t"},
    "image_pipeline": {f"image{i}" for i in range(5)},
}


def inputs_of(name: str, stored: Arrays) -> set[str]:
    """The arrays of a file that are inputs."""
    if name == "networks":
        return {key for key in stored if not key.endswith("/out")}
    return INPUTS.get(name, set())


def differences(name: str) -> dict[str, float]:
    """The largest absolute difference of each recomputed array of a file from the stored one."""
    stored = golden(name)
    return differences_from(stored, FILES[name](stored), inputs_of(name, stored))


def differences_from(stored: Arrays, found: Arrays, inputs: set[str]) -> dict[str, float]:
    """`differences` of given arrays. Raises ValueError unless these are the stored ones without the inputs."""
    if found.keys() != stored.keys() - inputs:
        raise ValueError(f"computed and stored arrays differ: {sorted(found.keys() ^ (stored.keys() - inputs))[:5]}")
    return {key: float(np.abs(found[key] - stored[key]).max(initial=0)) for key in sorted(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="print a line for each array")
    parser.add_argument("--out", type=Path, help="folder for the recomputed files")
    parser.add_argument("names", nargs="*", default=list(FILES), help="the files, without .npz")
    options = parser.parse_args()
    for name in options.names:
        stored = golden(name)
        found = FILES[name](stored)
        inputs = inputs_of(name, stored)
        by_array = differences_from(stored, found, inputs)
        if options.all:
            for key, difference in by_array.items():
                print(f"{name} {key} {difference:.3g}")
        worst = max(by_array, key=by_array.__getitem__)
        print(f"{name}: {len(by_array)} arrays, largest difference {by_array[worst]:.3g} ({worst})", flush=True)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(options.out / f"{name}.npz", **found, **{key: stored[key] for key in sorted(inputs)})


if __name__ == "__main__":
    main()
