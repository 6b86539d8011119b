"""Look for faults of accessibility in the site and in reports with axe-core in Chromium: `make accessibility`.

Opens the main pages of build/site and the reports of the studies that `make tutorials` left, or those whose addresses
have a WORD ("/" for all), on a desk in light colours and on a phone in dark ones. A serious or critical fault ends it
with exit code 1; moderate and minor ones are counted. The pages are served from this machine alone, and one that asks
for anything else fails too.

    python docs/accessibility.py [WORD ...]
"""

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

from selenium import webdriver

ROOT = Path(__file__).parents[1]
SITE, STUDIES = ROOT / "build" / "site", ROOT / "build" / "tutorials" / "work"
AXE = ROOT / "build" / "axe" / "axe_playwright_python" / "axe.min.js"
REPORTS = ROOT / "build" / "reports"
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-background-networking --disable-component-update".split()
MAIN = (
    "./",
    "contents/",
    "quickstart/",
    "reading-the-report/",
    "ways/",
    "glossary/",
    "api/study/",
    "tutorials/",
    "speed/",
)
VIEWS = ((1280, "light"), (390, "dark"))
STOPS = ("serious", "critical")


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a log."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def reports() -> list[Path]:
    """The page of each study, and of all of them side by side, with and without a decision."""
    REPORTS.mkdir(parents=True, exist_ok=True)
    studies = sorted(path.parent for path in STUDIES.rglob("results.json"))
    if not studies:
        raise SystemExit("no study to look at; run `make tutorials`")
    made = []
    for name, of, more in [
        *((study.name, [study], ["--queries-per-day", "1000"]) for study in studies),
        ("side-by-side", studies, []),
    ]:
        made.append(REPORTS / f"{name}.html")
        command = [sys.executable, "-m", "icl_ft_fast.cli", "report", *map(str, of), "--out", str(made[-1]), *more]
        subprocess.run([*command, "--overwrite"], check=True, stdout=subprocess.DEVNULL)
    return made


def browser() -> webdriver.Chrome:
    """Chromium without a window, which logs what it asks for."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def look(driver: webdriver.Chrome, address: str, width: int, theme: str) -> tuple[list[dict], list[str]]:
    """The violations that axe finds on a page, and the addresses elsewhere that the page asks for."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    driver.get_log("performance")
    driver.get(address)
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    host = address.split("/")[2]
    elsewhere = [url for url in asked if url.startswith("http") and url.split("/")[2] != host]
    driver.execute_script(AXE.read_text(encoding="utf-8"))
    done = driver.execute_async_script(
        "const done = arguments[0]; axe.run(document, {resultTypes: ['violations']}).then(found => done(found))"
    )
    return done["violations"], elsewhere


def main() -> int:
    """Look at all of them; whether any has a serious fault."""
    pages = [f"site/{path.parent.relative_to(SITE).as_posix()}/" for path in sorted(SITE.rglob("index.html"))]
    pages += [f"reports/{path.name}" for path in reports()]
    if chosen := sys.argv[1:]:
        pages = [page for page in pages if any(word in page for word in chosen)]
    else:
        pages = [page for page in pages if page.removeprefix("site/").startswith((*MAIN, "reports/"))]
    handler = functools.partial(Quiet, directory=str(ROOT / "build"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    driver, counts, failed = browser(), Counter[str](), 0
    driver.set_script_timeout(120)
    try:
        for page in pages:
            for width, theme in VIEWS:
                violations, elsewhere = look(driver, f"http://127.0.0.1:{server.server_port}/{page}", width, theme)
                counts.update(violation["impact"] for violation in violations)
                failed += len(elsewhere)
                for url in elsewhere:
                    print(f"{page}: asks for {url}")
                for violation in violations:
                    if violation["impact"] in STOPS:
                        failed += 1
                        nodes = violation["nodes"]
                        html = " ".join(nodes[0]["html"].split())[:160]
                        print(f"{page} ({width} pixels, {theme}): {violation['impact']}: {violation['help']}")
                        print(f"    {len(nodes)} places, the first: {nodes[0]['target']} {html}")
    finally:
        driver.quit()
        server.shutdown()
    told = ", ".join(f"{count} {impact}" for impact, count in counts.most_common()) or "no fault"
    print(f"{len(pages)} pages in {len(VIEWS)} views: {told}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
