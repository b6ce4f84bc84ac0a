"""The page in a real browser: each tab's main job, as a user does it. Runs where there is a Chromium and playwright.

With WEB_SCREENSHOTS=FOLDER the tests leave pictures of the tabs there; docs/screenshots.py sets it.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from playwright.sync_api import sync_playwright
from script_helpers import environment
from web_helpers import png_files, run_command, run_python

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="needs chromium on the PATH")]
SECONDS = 60_000  # milliseconds that a step may take on a busy machine


@pytest.fixture(scope="module")
def address(runs, tmp_path_factory):
    """Where the command serves the page."""
    place = tmp_path_factory.mktemp("browser")
    words = ["--runs", str(runs), "--data_root", str(place), "--port", "0", "--device_threads", "1"]
    command = [sys.executable, "-m", "improved_diffusion", "web", *words]
    with open(place / "log.txt", "w") as log:
        server = subprocess.Popen(command, cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        for line in server.stdout:
            if found := re.search(r"http://[^ ]+", line):
                break
        else:
            pytest.fail((place / "log.txt").read_text())
        yield found[0]
    finally:
        server.terminate()
        server.communicate(timeout=60)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[1280, 390], ids=["wide", "phone"])
def page(browser, address, request):
    """A page that has asked no other host for anything, and fits the width."""
    page = browser.new_page(viewport={"width": request.param, "height": 900}, accept_downloads=True)
    page.set_default_timeout(SECONDS)
    asked, errors = [], []
    page.on("request", lambda sent: asked.append(sent.url))
    page.on("pageerror", lambda error: errors.append(error.stack))
    page.goto(address)
    page.wait_for_selector("#draw:not([disabled])")
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= request.param
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []
    page.close()


def picture(page, name):
    """Leave a picture of the page, where that is asked for."""
    folder = os.environ.get("WEB_SCREENSHOTS")
    if folder:
        page.wait_for_timeout(500)
        page.screenshot(path=f"{folder}/{name}_{page.viewport_size['width']}.png", full_page=True)


def choose(page, menu, text):
    page.click(f"#{menu} input")
    page.locator(f"#{menu} input").fill(text)
    page.get_by_role("option", name=text).first.click()
    page.keyboard.press("Tab")  # leaves a menu of several; from a menu of one it opens the next one


def draw_threes(page):
    choose(page, "classes", "3")
    page.click("#draw")
    page.wait_for_selector("#sample-gallery img")


def downloaded(page, button):
    with page.expect_download() as found:
        page.click(f"#{button}")
    return found.value


def code(page, name):
    return page.locator(f"#{name} .cm-content").inner_text()


def test_draws_digits_of_a_class_and_reproduces_a_picture(page, tmp_path):
    draw_threes(page)
    page.locator("#sample-gallery button.thumbnail-item").nth(1).click()
    page.locator("#sample-again button").first.click()
    page.locator("#sample-command .cm-content", has_text="--seeds 1").wait_for()
    picture(page, "sample")
    png = downloaded(page, "sample-png")
    assert png.suggested_filename == "3_000001.png"
    for run, name, folder in ((run_command, "sample-command", "shell"), (run_python, "sample-python", "python")):
        (tmp_path / folder).mkdir()
        run(code(page, name), tmp_path / folder)
        made = png_files(tmp_path / folder / "images")
        assert made == {"3_000001.png": png.path().read_bytes()}


def test_inpaints_with_a_drawn_mask(page, tmp_path):
    draw_threes(page)
    page.get_by_role("tab", name="Edit").click()
    page.click("#use-sample")
    page.wait_for_selector("#edit-image img")
    canvas = page.locator("#mask canvas").first
    page.wait_for_timeout(2000)  # the editor draws its background
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.45, box["y"] + box["height"] * 0.45)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.6, steps=8)
    page.mouse.up()
    page.wait_for_timeout(1000)
    page.locator("#inpaint-steps input").fill("10")
    page.click("#inpaint-go")
    page.wait_for_selector("#edit-gallery img")
    picture(page, "edit")
    with zipfile.ZipFile(downloaded(page, "edit-zip").path()) as archive:
        archive.extractall(tmp_path)
    page.locator("#edit-again button").first.click()
    run_command(code(page, "edit-command"), tmp_path)
    (made,) = png_files(tmp_path / "images").values()
    assert made == downloaded(page, "edit-png").path().read_bytes()


def test_a_model_that_enlarges_moves_the_user_to_its_tab(page):
    choose(page, "model", "super")
    page.wait_for_selector("#draw[disabled]")
    page.get_by_role("tab", name="Upscale").click()
    page.wait_for_selector("#upscale-go:not([disabled])")
    picture(page, "upscale")
