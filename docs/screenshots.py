"""Make the pictures of the web page: the tests of the page in a browser leave them.

python docs/screenshots.py FOLDER
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "pytest", "-q", "tests/web", "-m", "browser"]
    return subprocess.run(words, cwd=ROOT, env={**os.environ, "WEB_SCREENSHOTS": str(folder)}).returncode


if __name__ == "__main__":
    sys.exit(main())
