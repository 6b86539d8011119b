"""Take the picture of a report that the README shows: `make picture`, or `python docs/picture.py RESULTS`.

RESULTS is the folder of a study, by default that of simple reversals in docs/results. Its report is made for 1,000
queries a day and opened in Chromium without a window; what a desk's screen shows first becomes docs/images/report.png.
"""

import base64
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from selenium import webdriver

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "report.png"
WIDTH, HEIGHT = 1100, 1000
MOST_BYTES = 200_000
FLAGS = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --disable-background-networking".split()


def main() -> int:
    """Write the picture."""
    results = sys.argv[1] if sys.argv[1:] else str(ROOT / "docs" / "results" / "simple-reversals")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        command = [sys.executable, "-m", "icl_ft_fast.cli", "report", results, "--out", str(page)]
        subprocess.run([*command, "--queries-per-day", "1000"], check=True)
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for flag in FLAGS:
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            light = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", light)
            driver.get(page.as_uri())
            picture = base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"])
        finally:
            driver.quit()
    if len(picture) > MOST_BYTES:
        raise SystemExit(f"{len(picture):,} bytes, more than {MOST_BYTES:,}: a README should load at once")
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_bytes(picture)
    print(f"{PICTURE.relative_to(ROOT)}: {len(picture):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
