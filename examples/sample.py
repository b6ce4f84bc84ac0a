"""Draw 16 images from a trained model: python examples/sample.py runs/photos out/"""

import sys

import improved_diffusion as idf

run, folder = sys.argv[1:]
images = idf.load(run).sample(16, sampler="dpmpp_2m_sde", steps=20, seed=0)
print("wrote", images.save(folder))
