"What several test files share: how tests are spread over the cores, the site, built once, and a browser to read it in."
import atexit
import json
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from filelock import FileLock

os.environ.setdefault("OMP_NUM_THREADS", "1")   # before torch is imported, and for what tests start: a core is a worker's
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


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """pytest-xdist on all cores, unless it is not there or the command line says otherwise.

    Not in an ini file: `-n` there would make pytest fail without pytest-xdist, and output (-s) and debuggers need one process.
    """
    option = config.option
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"): return
    alone = option.usepdb or option.trace or option.capture == "no" or option.collectonly or any("::" in a for a in config.args)
    if option.numprocesses is None and not option.tx: option.numprocesses = 0 if alone else min(cores(), 8)
    if option.numprocesses and option.dist == "no": option.dist, option.loadscopereorder = "loadgroup", False


# Files whose tests run in one worker, one after the other: they start several processes each, change what they share,
# or wait for something that takes longer to make than to look at.
TOGETHER = {"test_address.py", "test_benchmarks.py", "test_colab.py", "test_distributed.py", "test_hosts.py", "test_packaging.py", "test_site.py", "test_sync.py", "test_tools.py"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "What `xdist_group` and `--dist loadgroup` are for, which pytest-xdist 3.8 does not do under pytest 9.2: marks no longer reach the scheduler."
    if config.option.dist != "loadgroup": return None
    from xdist.scheduler import LoadScopeScheduling
    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if file.rpartition("/")[2] in TOGETHER else nodeid
    return Together(config, log)


def cores(): return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU; skipped where there is none")
    config.addinivalue_line("markers", "browser: opens the built site in Chromium; skipped where there is none")


# What the others wait for, then what takes long; the many short ones fill the gaps.
FIRST = ["test_site.py", "test_distributed.py", "test_hosts.py", "test_outputs.py", "test_browser.py", "test_benchmarks.py", "test_tools.py", "test_cli.py", "test_train.py"]


def pytest_collection_modifyitems(config, items):
    if "torch" in sys.modules: sys.modules["torch"].set_num_threads(1)
    if not hasattr(config, "workerinput"): return
    items.sort(key=lambda item: next((i for i, name in enumerate(FIRST) if name in item.nodeid), len(FIRST)))


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    "`once(name, make)` is what `make(folder)` returns, made by the first worker that asks, in a folder that all workers see."
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: base = base.parent
    def get(name, make):
        folder, value = base/f"once-{name}", base/f"once-{name}.pickle"
        with FileLock(f"{folder}.lock"):
            if not value.exists():
                shutil.rmtree(folder, ignore_errors=True)          # of a worker that failed
                folder.mkdir()
                value.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(value.read_bytes())
    return get


def began(fds, cwd, env, args):
    "In the fork: what `python *args` does, with these files as stdin, stdout and stderr, in a session of its own."
    os.setsid()
    multiprocessing.current_process()._config["daemon"] = False   # it may start others
    for fd, own in enumerate(fds): os.dup2(own.fileno(), fd)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode, closefd=False) for fd, mode in enumerate("rww"))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.argv = [args[0], *args[2:]]
    try:
        if args[0] == "-c": exec(compile(args[1], "<string>", "exec"), {"__name__": "__main__"})
        else: runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    finally: atexit._run_exitfuncs()


class Python:
    """`Python("-m", module, ...)` or `Python("-c", code)`: a process, with what tests use of `subprocess.Popen`.

    It is forked from a server that has imported torch and what the package needs, and has done nothing else: a process of its own
    in every respect that these tests look at, without the seconds of importing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.elastic.multiprocessing", "torch.distributed.launcher.api", "ddpm_nbdev.likelihood",
                                    "ddpm_nbdev.pretrained", "ddpm_nbdev.plot", "ddpm_nbdev.run", "conftest"])

    def __init__(self, *args, cwd=None, env=None, stderr=subprocess.PIPE):
        pairs = [os.pipe() for _ in range(2 + (stderr != subprocess.STDOUT))]
        theirs = [Connection(r if i == 0 else w, readable=i == 0, writable=i > 0) for i, (r, w) in enumerate(pairs)]
        self.stdin, self.stdout, *more = (os.fdopen(w if i == 0 else r, "w" if i == 0 else "r") for i, (r, w) in enumerate(pairs))
        self.stderr = more[0] if more else None
        fds = theirs if more else [*theirs, theirs[1]]
        self.process = self.context.Process(target=began, daemon=True,   # what hangs does not outlive pytest
                                            args=(fds, str(cwd or os.getcwd()), dict(env or os.environ), [str(a) for a in args]))
        self.process.start()
        for c in theirs: c.close()
        self.pid = self.process.pid

    @property
    def returncode(self): return self.process.exitcode

    def poll(self): return self.process.exitcode

    def send_signal(self, signum): os.kill(self.pid, signum)

    def kill(self): self.process.kill()

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None: raise subprocess.TimeoutExpired("python", timeout)
        return self.process.exitcode

    def communicate(self, timeout=None):
        "The rest of stdout, and of stderr, when it has ended."
        said = {}
        def read(name, file): said[name] = file.read()
        readers = [threading.Thread(target=read, args=(n, f), daemon=True) for n, f in (("out", self.stdout), ("err", self.stderr)) if f]
        self.stdin.close()
        for t in readers: t.start()
        self.wait(timeout)
        for t in readers: t.join(timeout)
        return said["out"], said.get("err")


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
def built(once):
    if NO_SITE: pytest.skip(NO_SITE)
    def make(folder):
        before = snapshot(ROOT/"nbs")
        return folder/"_docs", build(ROOT, folder/"_docs"), before == snapshot(ROOT/"nbs")
    return once("site", make)


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


@pytest.fixture
def call(monkeypatch, capsys):
    "Run a command as from the shell: status, stdout, stderr."
    def run(command, *args):
        monkeypatch.setattr(sys, "argv", [command.__name__, *map(str, args)])
        status = 0
        try: command()
        except SystemExit as e: status = e.code or 0
        return status, *capsys.readouterr()
    return run


def failed(result, status, *said):
    "One line on stderr that says what is wrong, no traceback."
    code, out, err = result
    assert code == status and not out, err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    for s in said: assert s in err, err


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
