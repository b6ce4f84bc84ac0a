"""Super-resolution sampling in the way of the published package's own script: each rank reads its share of an npz."""

import argparse
import os

import blobfile as bf
import numpy as np
import torch as th
import torch.distributed as dist

from improved_diffusion import dist_util, logger
from improved_diffusion.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)


def parse():
    flags = dict(clip_denoised=True, num_samples=10000, batch_size=16, use_ddim=False, base_samples="", model_path="")
    flags.update(sr_model_and_diffusion_defaults())
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, flags)
    return parser.parse_args()


def load_data_for_worker(base_samples, batch_size, class_cond):
    with bf.BlobFile(base_samples, "rb") as f:
        arrays = np.load(f)
        images = arrays["arr_0"]
        labels = arrays["arr_1"] if class_cond else None
    mine = range(dist.get_rank(), 10**9, dist.get_world_size())
    while True:
        for start in range(0, len(images) - batch_size + 1, batch_size):
            picked = [mine[i] % len(images) for i in range(start, start + batch_size)]
            batch = {"low_res": th.from_numpy(images[picked]).float().permute(0, 3, 1, 2) / 127.5 - 1}
            if class_cond:
                batch["y"] = th.from_numpy(labels[picked])
            yield batch


def main():
    args = parse()
    dist_util.setup_dist()
    logger.configure()
    model, diffusion = sr_create_model_and_diffusion(**args_to_dict(args, sr_model_and_diffusion_defaults().keys()))
    model.load_state_dict(dist_util.load_state_dict(args.model_path, map_location="cpu"))
    model.to(dist_util.dev())
    model.eval()
    data = load_data_for_worker(args.base_samples, args.batch_size, args.class_cond)
    images = []
    while len(images) * args.batch_size < args.num_samples:
        model_kwargs = {key: value.to(dist_util.dev()) for key, value in next(data).items()}
        shape = (args.batch_size, 3, args.large_size, args.large_size)
        sample = diffusion.p_sample_loop(model, shape, clip_denoised=args.clip_denoised, model_kwargs=model_kwargs)
        sample = ((sample + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous()
        parts = [th.zeros_like(sample) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, sample)
        images.extend(part.cpu().numpy() for part in parts)
        logger.log(f"created {len(images) * args.batch_size} samples")
    array = np.concatenate(images)[: args.num_samples]
    if dist.get_rank() == 0:
        shape = "x".join(str(side) for side in array.shape)
        np.savez(os.path.join(logger.get_dir(), f"samples_{shape}.npz"), array)
    dist.barrier()
    logger.log("sampling complete")


if __name__ == "__main__":
    main()
