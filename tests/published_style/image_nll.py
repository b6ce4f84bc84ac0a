"""Evaluating the bound in the way of the published package's own script: reduced by torch.distributed."""

import argparse
import os

import numpy as np
import torch.distributed as dist

from improved_diffusion import dist_util, logger
from improved_diffusion.image_datasets import load_data
from improved_diffusion.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)


def parse():
    flags = dict(data_dir="", clip_denoised=True, num_samples=1000, batch_size=1, model_path="")
    flags.update(model_and_diffusion_defaults())
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, flags)
    return parser.parse_args()


def reduced_mean(values):
    mean = values.mean(dim=0) / dist.get_world_size()
    dist.all_reduce(mean)
    return mean.detach().cpu().numpy()


def evaluate(model, diffusion, data, num_samples, clip_denoised):
    bpd, metrics, done = [], {"vb": [], "mse": [], "xstart_mse": []}, 0
    while done < num_samples:
        batch, kwargs = next(data)
        batch = batch.to(dist_util.dev())
        kwargs = {key: value.to(dist_util.dev()) for key, value in kwargs.items()}
        found = diffusion.calc_bpd_loop(model, batch, clip_denoised=clip_denoised, model_kwargs=kwargs)
        for key, rows in metrics.items():
            rows.append(reduced_mean(found[key]))
        bpd.append(reduced_mean(found["total_bpd"]))
        done += dist.get_world_size() * batch.shape[0]
        logger.log(f"done {done} samples: bpd={np.mean(bpd)}")
    if dist.get_rank() == 0:
        for key, rows in metrics.items():
            np.savez(os.path.join(logger.get_dir(), f"{key}_terms.npz"), np.mean(np.stack(rows), axis=0))
    dist.barrier()


def main():
    args = parse()
    dist_util.setup_dist()
    logger.configure()
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults().keys()))
    model.load_state_dict(dist_util.load_state_dict(args.model_path, map_location="cpu"))
    model.to(dist_util.dev())
    model.eval()
    data = load_data(
        data_dir=args.data_dir,
        batch_size=args.batch_size,
        image_size=args.image_size,
        class_cond=args.class_cond,
        deterministic=True,
    )
    evaluate(model, diffusion, data, args.num_samples, args.clip_denoised)


if __name__ == "__main__":
    main()
