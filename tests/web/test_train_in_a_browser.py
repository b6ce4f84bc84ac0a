"""A person at the page: starts a small training, sees a preview, loses the page, finds the run again, stops it with a
checkpoint, resumes it, and evaluates it."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from feature_helpers import write_script
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from improved_diffusion.service.commands import read_record
from improved_diffusion.service.trainings import PROCESS_FILE

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,  # a training, its resumption and an evaluation
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
    pytest.mark.timeout(900),
]
FIRST = {"image_size": 8, "batch_size": 24, "max_steps": 1_000_000, "sample_interval": 4, "save_interval": 100_000}
GROUPS = {
    "Training loop": {"log_interval": 1, "ema_rate": 0.5},
    "Network": {"channels": 1, "num_channels": 32, "num_heads": 1, "channel_mult": 1, "attention_resolutions": 4},
    "Diffusion": {"diffusion_steps": 4, "noise_schedule": "cosine"},
}
PICTURES = os.environ.get("SCREENSHOTS")  # a folder to leave pictures of the page in


class Page:
    """The web command, and a browser that looks at it."""

    def __init__(self, browser, folder, features):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "improved_diffusion", "web", "--runs", f"{folder}/runs", "--data_root",
             f"{folder}/data", "--features", features, "--port", "0"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        address = next(match[0] for match in map(re.compile(r"http://\S+").search, self.process.stdout) if match)
        self.tab = browser.new_page(viewport={"width": 1280, "height": 900})
        self.tab.set_default_timeout(120_000)
        self.errors = []
        self.tab.on("pageerror", lambda error: self.errors.append(error.stack))
        self.tab.goto(address)

    def open(self, name):
        tab = self.tab.get_by_role("tab", name=name)
        tab.click()
        expect(tab).to_have_attribute("aria-selected", "true")

    def fill(self, name, value):
        self.tab.locator(f"#{name}").locator("textarea, input").first.fill(str(value))

    def choose(self, name, text):
        self.tab.locator(f"#{name} input").first.click()
        self.tab.get_by_role("option").filter(has_text=text).first.click()

    def click(self, name):
        self.tab.locator(f"#{name}").click()

    def wait_for(self, name, text):
        self.tab.locator(f"#{name}").filter(has_text=re.compile(text)).wait_for()

    def look(self, name):
        """The page is as wide as a screen and a phone; pictures of both, where they are asked for."""
        for width in (1280, 390):
            self.tab.set_viewport_size({"width": width, "height": 900})
            self.tab.wait_for_timeout(1000)
            assert self.tab.evaluate("document.documentElement.scrollWidth") <= width
            if PICTURES:
                self.tab.wait_for_timeout(2000)
                self.tab.screenshot(path=f"{PICTURES}/{name}_{width}.png", full_page=True)
        self.tab.set_viewport_size({"width": 1280, "height": 900})

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "digits").mkdir(parents=True)
    for i in range(48):
        pixels = np.random.RandomState(i).randint(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "digits" / f"{i}.png")
    (tmp_path / "runs").mkdir()
    yield tmp_path
    for name in os.listdir(tmp_path / "runs"):
        record = read_record(f"{tmp_path}/runs/{name}", PROCESS_FILE)
        if record:
            record.process.kill()


@pytest.fixture
def open_page(folder, browser):
    """Starts the web command and opens its page; ended after the test."""
    features, opened = write_script(folder / "features.pt"), []

    def start():
        opened.append(Page(browser, folder, features))
        return opened[-1]

    yield start
    for page in opened:
        page.kill()
        assert page.errors == []


@pytest.fixture
def browser():
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_train_lose_the_page_stop_resume_evaluate(folder, open_page):
    page = open_page()
    page.open("Train")
    page.choose("train-data_dir", "digits (48 images)")
    page.fill("train-name", "mine")
    page.choose("train-preset", "none")
    page.fill("train-lr", "-1")
    for name, value in FIRST.items():
        page.fill(f"train-{name}", value)
    for group, options in GROUPS.items():
        page.tab.locator("button.label-wrap:visible", has_text=group).click()
        for name, value in options.items():
            (page.choose if name == "noise_schedule" else page.fill)(f"train-{name}", value)
        page.tab.locator("button.label-wrap:visible", has_text=group).click()

    page.click("train-start")
    page.wait_for("train-message", "--lr -1.0 must be positive")
    page.wait_for("train-lr", "must be positive")  # beside the option
    assert os.listdir(folder / "runs") == []
    page.fill("train-lr", "1e-3")
    page.click("train-start")
    page.wait_for("train-message", "mine has started")
    page.wait_for("train-table", "time per step")
    page.wait_for("train-state", r"running.*[\d,]+ of 1,000,000 steps.*loss.*images/s")
    page.tab.locator("#train-previews img").first.wait_for()
    page.wait_for("train-log", "step ")
    page.look("train")

    page.kill()
    process = read_record(f"{folder}/runs/mine", PROCESS_FILE).process
    assert process.is_running()

    page = open_page()
    page.open("Train")
    page.wait_for("train-state", r"running.*\d steps")
    page.click("train-stop")
    page.wait_for("train-state", "stopped.*SIGTERM")
    (stopped,) = {int(path.stem.removeprefix("model")) for path in (folder / "runs" / "mine").glob("model*.pt")} - {0}
    page.fill("train-until", stopped + 6)
    page.click("train-resume")
    page.wait_for("train-state", f"finished.*{stopped + 6:,} of {stopped + 6:,} steps")
    assert (folder / "runs" / "mine" / f"model{stopped + 6:06d}.pt").exists()

    page.open("Evaluate")
    page.choose("evaluate-model_path", "mine")
    page.choose("evaluate-reference", "digits")
    for name, value in {"num_samples": 40, "steps": 2, "name": "first"}.items():
        page.fill(f"evaluate-{name}", value)
    page.click("evaluate-start")
    page.wait_for("evaluate-message", "first is finished")
    page.wait_for("evaluate-report", "FID")
    page.tab.locator("#evaluate-pictures img").first.wait_for()
    page.look("evaluate")
