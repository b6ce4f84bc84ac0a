"""Train a model on a folder of images: python examples/train.py photos/ runs/photos 64 20000"""

import sys

import improved_diffusion as idf

data_dir, out_dir, size, steps = sys.argv[1:]
method = dict(learn_sigma=True, noise_schedule="cosine", batch_size=16, resume="auto")
model = idf.train(data_dir, image_size=size, max_steps=steps, out_dir=out_dir, **method)
model.sample(16, sampler="dpmpp_2m_sde", steps=20).save(f"{out_dir}/samples")
