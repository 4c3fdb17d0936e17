"""The browser of the page's tests. ``python -m tests.support.browser`` says whether there is one, by its exit code."""

import shutil
import sys

from playwright.sync_api import Playwright, sync_playwright


def find_browser(playwright: Playwright) -> str | None:
    """The system's Chromium or Chrome, else the one that Playwright has installed."""
    names = ("chromium", "chromium-browser", "google-chrome", playwright.chromium.executable_path)
    return next((path for path in map(shutil.which, names) if path is not None), None)


if __name__ == "__main__":
    with sync_playwright() as playwright:
        sys.exit(find_browser(playwright) is None)
