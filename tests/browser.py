"""A real browser for tests: headless Chromium, which has no network and tells what it found."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Visit:
    """A page as the browser has it."""

    dom: str
    """the document, after everything in it was loaded"""
    complaints: list[str]
    """the console: what is wrong with the page, and all that it was kept from loading"""
    pixels: NDArray[np.uint8]
    """a screenshot: height, width, RGB"""


def visit(page: Path, folder: Path, width: int = 1200, height: int = 690) -> Visit:
    """Opens a local page. `folder` is for the screenshot and the browser's own files."""
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        message = f"no browser here (looked for {', '.join(PROGRAMS)}); launch/test.sh installs one"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    screenshot = folder / "screenshot.png"
    done = subprocess.run(
        [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9",
            f"--user-data-dir={folder / 'browser'}", f"--window-size={width},{height}",
            "--enable-logging=stderr", f"--screenshot={screenshot}", "--dump-dom", page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    complaints = re.findall(r"CONSOLE[^]]*\] (.*)", done.stderr)
    with Image.open(screenshot) as image:
        return Visit(done.stdout, complaints, np.asarray(image.convert("RGB")))
