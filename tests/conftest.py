"What several test files share: the site, built once, and a browser to read it in."
import json
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {p.stem: p for p in sorted((ROOT/"nbs").glob("[!_]*.ipynb"))}
TO_BUILD = [m for m in ("smalldocs", "mathjax") if find_spec(m) is None]
NO_SITE = f"no site is built: {' and '.join(TO_BUILD)} not installed (smalldocs needs Python 3.11)" if TO_BUILD else ""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TO_BROWSE = [m for m in ("playwright", "axe_playwright_python") if find_spec(m) is None] + ([] if CHROMIUM else ["Chromium"])
NO_BROWSER = NO_SITE or (f"nothing is looked at in a browser: {' and '.join(TO_BROWSE)} not installed" if TO_BROWSE else "")
# As root Chromium runs only without its sandbox; the rest keeps it from asking other hosts. Its profile is new each time.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


def pytest_addoption(parser):
    parser.addoption("--site", type=Path, help="look at the site in this folder instead of building it")


def pytest_configure(config):
    config.addinivalue_line("markers", "browser: opens the built site in Chromium; skipped where there is none")


class Page(HTMLParser):
    "The tags of a page, its text outside code and math, and its math."
    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.prose, self.math = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.ids = [a["id"] for _, a in self.tags if a.get("id")]

    def handle_starttag(self, tag, attrs):
        attrs = {k: v or "" for k, v in attrs}
        self.tags.append((tag, attrs))
        if tag in ("script", "style", "pre", "code"): self.open.append((tag, "code"))
        elif tag == "span": self.open.append((tag, "math" if "math" in attrs.get("class", "").split() else "span"))

    def handle_endtag(self, tag):
        if self.open and self.open[-1][0] == tag: self.open.pop()

    def handle_data(self, data):
        kinds = {kind for _, kind in self.open}
        if "math" in kinds: self.math.append(data)
        elif "code" not in kinds: self.prose.append(data)

    def all(self, tag): return [a for t, a in self.tags if t == tag]


def build(root, out):
    return subprocess.run([sys.executable, ROOT/"tools"/"build_site", root, "--out", out], text=True, capture_output=True)


def snapshot(folder):
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def page_of(stem):
    "The page of a notebook: named after its module where it has one."
    text = NOTEBOOKS[stem].read_text(encoding="utf-8")
    module = re.search(r'"#\|\s*default_exp\s+(\w+)', text)
    return f"{module[1]}.html" if module else f"{re.sub('^[0-9]+[a-z]?_', '', stem)}.html"


def equations():
    "The numbers of the equations that the map of the paper does not put off until later."
    cells = json.loads(NOTEBOOKS["index"].read_text(encoding="utf-8"))["cells"]
    rows = re.findall(r"^\| Eq\. (\d+) \|([^|]*)\|", "\n".join("".join(c["source"]) for c in cells), re.M)
    return [int(n) for n, says in rows if "*(later)*" not in says]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    if NO_SITE: pytest.skip(NO_SITE)
    out, before = tmp_path_factory.mktemp("site")/"_docs", snapshot(ROOT/"nbs")
    res = build(ROOT, out)
    return out, res, before == snapshot(ROOT/"nbs")


@pytest.fixture(scope="session")
def site(request): return request.config.getoption("--site") or request.getfixturevalue("built")[0]


@pytest.fixture(scope="session")
def pages(site): return {p.relative_to(site).as_posix(): Page(p) for p in sorted(site.rglob("*.html"))}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="session")
def base(site):
    "The address at which the built site is served, without a slash at the end."
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    "One Chromium for all tests of a file; not for the whole session, since Playwright's event loop would be in the way of others."
    if NO_BROWSER: pytest.skip(NO_BROWSER)
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser, base):
    "A fresh page of a fresh profile, 1300 x 900, for a test that clicks; `tab.goto('/index.html')` opens a page of the site."
    context = browser.new_context(base_url=base, viewport={"width": 1300, "height": 900}, reduced_motion="reduce")
    context.set_default_timeout(15_000)
    yield context.new_page()
    context.close()
