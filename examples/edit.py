"""Fill a masked part, and make variations: python examples/edit.py runs/photos photo.png mask.png out/"""

import sys

import improved_diffusion as idf

run, photo, mask, folder = sys.argv[1:]
model = idf.load(run)
model.inpaint(photo, mask, n=4, seed=0).save(f"{folder}/inpainted")
model.variations(photo, n=4, strength=0.5, seed=0).save(f"{folder}/variations")
