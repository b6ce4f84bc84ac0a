"""Sampling in the way of the published package's own script: its own loop, gathered by torch.distributed."""

import argparse
import os

import numpy as np
import torch as th
import torch.distributed as dist

from improved_diffusion import dist_util, logger
from improved_diffusion.script_util import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)


def parse():
    flags = dict(clip_denoised=True, num_samples=10000, batch_size=16, use_ddim=False, model_path="")
    flags.update(model_and_diffusion_defaults())
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, flags)
    return parser.parse_args()


def gather(tensor):
    parts = [th.zeros_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return [part.cpu().numpy() for part in parts]


def main():
    args = parse()
    dist_util.setup_dist()
    logger.configure()
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults().keys()))
    model.load_state_dict(dist_util.load_state_dict(args.model_path, map_location="cpu"))
    model.to(dist_util.dev())
    model.eval()

    images, labels = [], []
    sample_fn = diffusion.ddim_sample_loop if args.use_ddim else diffusion.p_sample_loop
    while len(images) * args.batch_size < args.num_samples:
        model_kwargs = {}
        if args.class_cond:
            model_kwargs["y"] = th.randint(low=0, high=NUM_CLASSES, size=(args.batch_size,), device=dist_util.dev())
        shape = (args.batch_size, 3, args.image_size, args.image_size)
        sample = sample_fn(model, shape, clip_denoised=args.clip_denoised, model_kwargs=model_kwargs)
        sample = ((sample + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous()
        images.extend(gather(sample))
        if args.class_cond:
            labels.extend(gather(model_kwargs["y"]))
        logger.log(f"created {len(images) * args.batch_size} samples")

    arrays = [np.concatenate(part)[: args.num_samples] for part in (images, labels) if part]
    if dist.get_rank() == 0:
        shape = "x".join(str(side) for side in arrays[0].shape)
        path = os.path.join(logger.get_dir(), f"samples_{shape}.npz")
        logger.log(f"saving to {path}")
        np.savez(path, *arrays)
    dist.barrier()
    logger.log("sampling complete")


if __name__ == "__main__":
    main()
