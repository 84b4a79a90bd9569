"The second cell of each notebook: where the package is missing, as on Colab, it is installed; nowhere else anything happens."
import ast
import json
import os
import re
import subprocess
import sys
import venv
from configparser import ConfigParser
from pathlib import Path

import pytest
from test_tools import cell, tool, write

ROOT = Path(__file__).parents[1]
CFG = ConfigParser(delimiters=["="])
CFG.read(ROOT/"settings.ini", encoding="utf-8")
CFG = CFG["DEFAULT"]
VERSION, WHAT = CFG["version"], "ddpm_nbdev[notebooks]"
INDEX, REPOSITORY = f"{WHAT}=={VERSION}", f"{WHAT} @ git+{CFG['git_url']}@{CFG['branch']}"
COMES_ALONG = {"IPython", "huggingface_hub"}   # with Jupyter, with diffusers
IMPORT_NAMES = {"pillow": "PIL"}
NOTEBOOKS = sorted((ROOT/"nbs").glob("[!_]*.ipynb"))
sys.path.insert(0, str(ROOT/"tools"))
import make_colab  # noqa: E402

SOURCE = "".join(make_colab.cell(ROOT)["source"])
# Notes what it is asked for, is noisy about it, and installs a package if WORKS occurs in that.
PIP = """
import json, os, sys
from pathlib import Path
with open(os.environ["CALLS"], "a") as f: print(json.dumps(sys.argv[1:]), file=f)
print("Collecting"); print("ERROR: perhaps", file=sys.stderr)
if not os.environ["WORKS"] or os.environ["WORKS"] not in sys.argv[-1]: sys.exit(1)
os.rename("../wheel/ddpm_nbdev", Path(__file__).parents[1]/"ddpm_nbdev")
"""


def package(folder, version=VERSION):
    (folder/"ddpm_nbdev").mkdir(parents=True)
    (folder/"ddpm_nbdev/__init__.py").write_text(f"__version__ = {version!r}\n")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    "A Python with nothing installed."
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=os.name != "nt")
    return folder/("Scripts/python.exe" if os.name == "nt" else "bin/python")


@pytest.fixture
def run(bare, tmp_path):
    "Runs the cell, and a line after it, in the folder notes/ of a new folder, where only a pip that pretends can be imported."
    here, site = tmp_path/"notes", tmp_path/"site"
    here.mkdir()
    (site/"pip").mkdir(parents=True)
    package(tmp_path/"wheel")
    (site/"pip/__init__.py").write_text("")
    (site/"pip/__main__.py").write_text(PIP)
    def run(then="", works=""):
        calls = tmp_path/"calls"
        calls.write_text("")
        env = {**os.environ, "PYTHONPATH": str(site), "CALLS": str(calls), "WORKS": works}
        res = subprocess.run([bare, "-c", f"{SOURCE}\n{then}"], cwd=here, env=env, text=True, capture_output=True)
        asked = [json.loads(line) for line in calls.read_text().splitlines()]
        assert all(a[:-1] == ["install", "-q"] for a in asked)   # no -U: what is there, torch say, stays
        return [a[-1] for a in asked], res.stdout, res.stderr
    run.here, run.site = here, site
    return run


WHERE = "import ddpm_nbdev; print(ddpm_nbdev.__version__, ddpm_nbdev.__file__)"


def test_the_cell_is_short():
    assert len(SOURCE.splitlines()) <= 10
    assert ast.parse(SOURCE, feature_version=(3, 10)) and SOURCE.startswith("#| hide\n#| eval: false\n")


@pytest.mark.parametrize("works, asked", [("==", [INDEX]), ("git+", [INDEX, REPOSITORY])], ids=["index", "repository"])
def test_where_the_package_is_missing_pip_is_asked(run, works, asked):
    "The index first, then the repository; what pip says is not shown."
    assert run(WHERE, works) == (asked, f"{VERSION} {run.site/'ddpm_nbdev'/'__init__.py'}\n", "")


def test_where_pip_fails_one_line_says_what_to_do(run):
    asked, out, err = run("import ddpm_nbdev")
    assert (asked, out) == ([INDEX, REPOSITORY], f"needs ddpm_nbdev {VERSION}, not None - use pip, then restart\n")
    assert err.endswith("ModuleNotFoundError: No module named 'ddpm_nbdev'\n")   # so no later cell is misunderstood


def test_where_the_package_is_installed_nothing_happens(run):
    package(run.site)
    assert run("print(os.path.abspath('..') in sys.path)")[1] == "False\n"


def test_another_version_is_named(run):
    package(run.site, "9.8.7")
    assert run() == ([], f"needs ddpm_nbdev {VERSION}, not 9.8.7 - use pip, then restart\n", "")


def test_a_clone_uses_its_own_package(run):
    "By a path that stays right when a later cell goes to another folder."
    package(run.here.parent)
    there = run.here.parent/"ddpm_nbdev"/"__init__.py"
    then = f"import os, sys; os.chdir('/'); del sys.modules['ddpm_nbdev']\n{WHERE}"
    assert run(then) == ([], f"{VERSION} {there}\n", "")


def test_a_folder_of_that_name_is_no_package(run):
    "As where the repository was cloned beside the notebook: Python imports the folder, as a namespace."
    (run.here/"ddpm_nbdev"/"nbs").mkdir(parents=True)
    assert run(WHERE, "==") == ([INDEX], f"{VERSION} {run.site/'ddpm_nbdev'/'__init__.py'}\n", "")


def test_torch_is_not_replaced():
    "Any version of it will do: pip leaves the one that is there, which on Colab fits the GPU."
    assert "torch" in CFG["requirements"].split() and not re.search("torch", CFG["notebooks_requirements"])


def test_what_pages_import_is_installed():
    wanted = {re.match(r"[\w.-]+", r)[0] for key in ("requirements", "notebooks_requirements") for r in CFG[key].split()}
    known = {IMPORT_NAMES.get(r, r) for r in wanted} | COMES_ALONG | {"ddpm_nbdev"} | set(sys.stdlib_module_names)
    for path in NOTEBOOKS:
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(c["source"])
            if c["cell_type"] != "code" or re.search(r"^#\|\s*(export|exports|slow|gpu|data)\b", source, re.M): continue
            tree = ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M))
            found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
            found |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            assert {m.partition(".")[0] for m in found} <= known, f"{path.name}: {found}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_has_the_cell(path):
    "Up to date, behind the title; otherwise run tools/make_colab.py."
    assert second(path) == make_colab.cell(ROOT)
    assert [c["id"] for c in json.loads(path.read_text(encoding="utf-8"))["cells"]].count(make_colab.ID) == 1


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "A project of two notebooks, exported; what it exports, and its README, before the tool gave them the cell."
    root = tmp_path_factory.mktemp("toylib")
    (root/"nbs").mkdir()
    (root/"settings.ini").write_text((ROOT/"settings.ini").read_text().replace("ddpm_nbdev", "toylib"))
    write(root/"nbs/00_toy.ipynb", cell("# Toy\n> A toy.", "markdown"), cell("#| default_exp toy"), cell("#| exports\ndef double(x): return 2*x"))
    write(root/"nbs/index.ipynb", cell("# Title\n> Promise.", "markdown"), cell("print(6*7)"))
    export = "from nbdev.doclinks import nbdev_export; nbdev_export(path='nbs')"
    def make():
        subprocess.run([sys.executable, "-c", export], cwd=root, check=True)
        assert tool("make_readme", root).returncode == 0
        return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.suffix in (".py", ".md")}
    return root, make, make()


def second(path): return json.loads(path.read_text(encoding="utf-8"))["cells"][1]


def test_the_tool_changes_nothing_else(toy):
    "The library and the README stay; nbdev finds nothing to clean; run_notebooks and nbdev_test leave the cell alone."
    root, make, before = toy
    bad = tool("make_colab", "--check", root)
    assert bad.returncode == 1 and bad.stdout.count("run tools/make_colab.py") == 2 and "00_toy.ipynb: its second cell" in bad.stdout
    assert tool("make_colab", root).returncode == 0
    assert tool("make_colab", "--check", root).returncode == 0
    for path in root.glob("nbs/*.ipynb"):
        assert second(path)["id"] == "colab" and f'toylib {VERSION}' in "".join(second(path)["source"])
    assert make() == before
    sync = tool("check_sync", root)
    assert sync.returncode == 0, sync.stdout
    run = tool("run_notebooks", root/"nbs")
    assert run.returncode == 0 and [line.split()[-1] for line in run.stdout.splitlines()] == ["ok", "ok"], run.stdout
    assert second(root/"nbs/00_toy.ipynb")["outputs"] == []


def test_the_tool_follows_the_settings(toy):
    "A cell that is old, or not in its place, is put right; nothing is given twice."
    root, *_ = toy
    assert tool("make_colab", root).returncode == 0
    settings, path = root/"settings.ini", root/"nbs/00_toy.ipynb"
    old = settings.read_text()
    settings.write_text(old.replace(f"version = {VERSION}", "version = 7.7").replace("branch = main", "branch = trunk"))
    nb = json.loads(path.read_text())
    nb["cells"].append(nb["cells"].pop(1))
    path.write_text(json.dumps(nb))
    assert tool("make_colab", "--check", root).returncode == 1
    assert tool("make_colab", root).returncode == 0
    assert [c["id"] for c in json.loads(path.read_text())["cells"]].count("colab") == 1
    source = "".join(second(path)["source"])
    assert "toylib 7.7" in source and "@trunk" in source and VERSION not in source
    settings.write_text(old)
