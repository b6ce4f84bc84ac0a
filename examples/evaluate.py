"""Score samples against real images: python examples/evaluate.py samples/ photos/ features.pt2 report/"""

import sys

import improved_diffusion as idf

samples, reference, features, folder = sys.argv[1:]
report = idf.evaluate(samples, reference, features=features, trust_features=True, out_dir=folder)
print(f"FID {report.fid}, KID {report.kid}, precision {report.precision}, recall {report.recall}")
