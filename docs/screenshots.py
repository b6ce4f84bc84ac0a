"""Make the pictures of the web page: `make demo` trains the model that they show.

python docs/screenshots.py RUNS DATA_ROOT FOLDER [WIDTH]
"""

import re
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

CHROMIUM = "/usr/bin/chromium"
LONGEST = 180_000  # milliseconds that a step may take


def main() -> None:
    runs, data_root, folder = (str(Path(word).resolve()) for word in sys.argv[1:4])
    Path(folder).mkdir(parents=True, exist_ok=True)
    words = ["--runs", runs, "--data_root", data_root, "--port", "0"]
    server = subprocess.Popen(
        [sys.executable, "-m", "improved_diffusion", "web", *words], stdout=subprocess.PIPE, text=True
    )
    try:
        address = next(found[0] for line in server.stdout or () if (found := re.search(r"http://\S+", line)))
        with sync_playwright() as started:
            browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": int((sys.argv[4:] or ["1280"])[0]), "height": 900})
            page.set_default_timeout(LONGEST)
            page.goto(address)
            for name, (tab, show) in PICTURES.items():
                page.get_by_role("tab", name=tab).click()
                show(page)
                picture(page, f"{folder}/{name}")
            browser.close()
    finally:
        server.terminate()
        server.wait()


def picture(page: Page, path: str) -> None:
    page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")  # also out of sight
    page.wait_for_timeout(2500)  # whatever moves has come to rest
    page.screenshot(path=path, full_page=True)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def sample(page: Page) -> None:
    """Two rows of digits."""
    if not page.locator("#draw").is_enabled():  # there is no model
        return
    for name in "37":
        page.click("#classes input")
        page.get_by_role("option", name=name).first.click()
    page.keyboard.press("Tab")
    page.locator("#num-samples input").fill("8")
    page.click("#draw")
    page.wait_for_selector("#sample-gallery img")
    page.locator("#sample-again button").first.click()


def inpaint(page: Page) -> None:
    """A digit with its middle painted over."""
    if not page.locator("#inpaint-go").is_enabled():
        return
    page.click("#use-sample")
    page.wait_for_selector("#edit-image img")
    page.wait_for_timeout(2000)  # the editor draws its background
    canvas = page.locator("#mask canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box() or {}
    at = [(box["x"] + box["width"] * share, box["y"] + box["height"] * share) for share in (0.4, 0.6)]
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=8)
    page.mouse.up()
    page.locator("#inpaint-n input").fill("4")
    page.click("#inpaint-go")
    page.wait_for_selector("#edit-gallery img")


def vary(page: Page) -> None:
    """Images like the digit."""
    if page.locator("#vary-go").is_enabled():
        page.click("#vary-go")
        page.wait_for_selector("#vary-go:not([disabled])")


def leave(page: Page) -> None:
    """The tab as it is."""


def train(page: Page) -> None:
    """The form, and the newest run."""
    if page.locator("#draw").get_attribute("disabled") is None:  # there is a run
        page.locator("#train-previews img").last.scroll_into_view_if_needed()


def evaluate(page: Page) -> None:
    """The form, and the first report."""
    page.click("#evaluate-reports input")
    page.get_by_role("option").first.click()
    page.keyboard.press("Escape")
    page.locator("#evaluate-pictures img").first.wait_for()


PICTURES = {
    "web_sample.png": ("Sample", sample), "web_edit.png": ("Edit", inpaint), "web_vary.png": ("Vary", vary),
    "web_interpolate.png": ("Interpolate", leave), "web_class.png": ("Class", leave),
    "web_upscale.png": ("Upscale", leave), "web_train.png": ("Train", train),
    "web_evaluate.png": ("Evaluate", evaluate),
}  # fmt: skip


if __name__ == "__main__":
    main()
