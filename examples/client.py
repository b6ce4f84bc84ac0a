"""Ask a service for images: python examples/client.py http://localhost:8000 digits digits.zip 3 8"""

import json
import os
import sys
from pathlib import Path
from urllib.request import Request, urlopen

url, model, path, *classes = sys.argv[1:]
token = {"Authorization": f"Bearer {os.environ.get('IMPROVED_DIFFUSION_TOKEN', '')}"}
body = {"model": model, "n": 4, "classes": classes, "sampler": "dpmpp_2m_sde", "steps": 20, "format": "zip"}
asked = Request(f"{url}/v1/samples", json.dumps(body).encode(), {"Content-Type": "application/json", **token})
with urlopen(asked) as answer:
    Path(path).write_bytes(answer.read())
