"""The HTML page in a real browser: it renders whole, asks for nothing, complains about nothing.

A headless Chromium opens the stored sample. A wrapper page around it, served from a local port
that logs every request, sees what the browser sees: sizes after layout, and each fetch.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import threading
import zlib
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from reattend.report import Report

pytestmark = pytest.mark.slow
STORED = Path(__file__).parent / "data" / "report-1.json"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

PROBE = """<!doctype html><title>probe</title><link rel="icon" href="data:,">
<iframe id="page" src="/page" style="border:0;width:{width}px;height:900px"></iframe>
<pre id="out"></pre>
<script>
const frame = document.getElementById("page");
frame.onload = () => {{
  const seen = frame.contentDocument, root = seen.documentElement, win = frame.contentWindow;
  const lines = [];
  lines.push("overflow " + (root.scrollWidth - root.clientWidth));
  lines.push("resources " + win.performance.getEntriesByType("resource").length);
  seen.querySelectorAll("svg").forEach(svg => {{
    const box = svg.getBoundingClientRect();
    lines.push("svg " + Math.round(box.width) + " " + Math.round(box.height)
      + " " + svg.querySelectorAll("text").length);
  }});
  const small = [...seen.querySelectorAll("p, td, th, dd, dt, figcaption")]
    .filter(e => parseFloat(win.getComputedStyle(e).fontSize) < 12).length;
  lines.push("small " + small);
  document.getElementById("out").textContent = lines.join("\\n");
}};
</script>"""


@cache
def browser() -> str:
    """Path of Chromium; without one: a failure in CI, a skip elsewhere."""
    for name in NAMES:
        found = shutil.which(name)
        if found:
            return found
    reason = f"no browser on PATH (looked for {', '.join(NAMES)}): install chromium"
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(reason)
    pytest.skip(reason)


class Site:
    """A local server for the page and the probe that records every path asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.bodies: dict[str, str] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                body = outer.bodies.get(self.path, "").encode()
                self.send_response(200 if body else 404)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                """Say nothing on the console."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.root = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def local() -> Iterator[Site]:
    browser()
    site = Site()
    yield site
    site.close()


def run(profile: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the browser once with a fresh profile."""
    command = [
        browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--hide-scrollbars",
        "--force-device-scale-factor=1",
        "--virtual-time-budget=4000",
        "--enable-logging=stderr",
        f"--user-data-dir={profile}",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def console_lines(log: str) -> list[str]:
    """What the page wrote to the browser's console, errors and refusals included."""
    return [line for line in log.splitlines() if ":CONSOLE" in line]


def pixels(path: Path) -> tuple[tuple[int, int], tuple[int, ...], int]:
    """Width and height, colour of the first pixel, and number of distinct rows of a PNG file."""
    data, at, packed, size = path.read_bytes(), 8, b"", (0, 0)
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        if kind == b"IHDR":
            size = struct.unpack(">II", data[at + 8 : at + 16])
        if kind == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += 12 + length
    raw = zlib.decompress(packed)
    stride = len(raw) // size[1]
    # Every PNG filter leaves the first pixel as it is; byte 0 of a row names the filter.
    return size, tuple(raw[1:4]), len({raw[i * stride : (i + 1) * stride] for i in range(size[1])})


def test_the_page_is_whole_in_a_browser(tmp_path: Path) -> None:
    browser()
    Report.load(STORED).save(tmp_path)
    page = (tmp_path / "report.html").as_uri()
    done = run(tmp_path / "profile", "--dump-dom", page)
    dom = done.stdout
    assert not console_lines(done.stderr), console_lines(done.stderr)
    assert dom.count("<svg") == 4
    assert dom.count("</svg>") == 4
    assert dom.count("<table") == dom.count("<caption") == 8
    heads = [re.sub(r"<[^>]*>", "", h) for h in re.findall(r"<h2>(.*?)</h2>", dom)]
    assert heads == [
        "Quality",
        "Gates",
        "What was done",
        "Cost",
        "Where the error is",
        "Calibration",
        "Parity",
        "Every site",
        "Plan",
        "Provenance",
    ]


@pytest.mark.parametrize("width", [390, 820, 1280])
def test_the_page_fits_every_width_and_asks_for_nothing(
    width: int, local: Site, tmp_path: Path
) -> None:
    local.bodies = {"/page": Report.load(STORED).to_html(), "/": PROBE.format(width=width)}
    done = run(tmp_path / "profile", "--window-size=1400,1000", "--dump-dom", f"{local.root}/")
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found, done.stdout[-2000:]
    lines = found[1].split("\n")
    assert "overflow 0" in lines, "the page scrolls sideways"
    assert "resources 0" in lines
    assert "small 0" in lines, "text below 12 px"
    drawings = [line.split()[1:] for line in lines if line.startswith("svg ")]
    assert len(drawings) == 4
    for wide, high, texts in drawings:
        assert int(wide) >= min(width - 60, 340)
        assert int(high) >= 90
        assert int(texts) >= 4
    assert set(local.asked) == {"/", "/page"}, "the page asked for something"
    assert not console_lines(done.stderr)


def test_the_console_check_can_fail(local: Site, tmp_path: Path) -> None:
    """The policy in the page stops what escaping would have missed, and we would see it."""
    page = Report.load(STORED).to_html()
    bad = f'<img src="{local.root}/leak"><script>document.title = "broken"</script></main>'
    local.bodies = {"/page": page.replace("</main>", bad), "/leak": "x"}
    done = run(tmp_path / "profile", "--dump-dom", f"{local.root}/page")
    assert len(console_lines(done.stderr)) >= 2
    assert "/leak" not in local.asked
    assert "<title>broken" not in done.stdout


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_screenshot_shows_the_page(scheme: str, tmp_path: Path) -> None:
    browser()
    Report.load(STORED).save(tmp_path)
    shot = tmp_path / f"{scheme}.png"
    run(
        tmp_path / "profile",
        "--window-size=1100,2400",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
        f"--screenshot={shot}",
        (tmp_path / "report.html").as_uri(),
    )
    size, paper, rows = pixels(shot)
    assert size == (1100, 2400)
    assert paper == {"light": (253, 253, 251), "dark": (22, 23, 26)}[scheme]
    assert rows > 500, "most of the page is blank"
