"What is committed agrees with itself: notebooks, library, README, site configuration."
import ast
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT/"nbs").glob("[!_]*.ipynb"))
NAMES = [p.stem for p in NOTEBOOKS]
sys.path.insert(0, str(ROOT/"tools"))
import check_sync  # noqa: E402


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])


def python_of(path):
    "Code cells without magics, as one text."
    res = "\n\n".join(source(c) for c in cells(path) if c["cell_type"] == "code")
    return re.sub(r"^\s*[%!].*$", "", res, flags=re.M)


def test_there_are_notebooks(): assert NOTEBOOKS


@pytest.fixture(scope="module")
def found(): return check_sync.problems(ROOT)


@pytest.mark.parametrize("kind", ["library", "notebooks", "readme"])
def test_in_sync(found, kind): assert not found[kind], "\n".join(found[kind])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_stored_outputs(path):
    "Outputs are there, none is an error or a warning or names a machine's folders, and the file is under 500 KB."
    outputs = [o for c in cells(path) if c["cell_type"] == "code" for o in c["outputs"]]
    assert outputs, "never run"
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    text = "".join("".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in outputs)
    assert not re.search(r"(?<![\w.])/(home|root|Users|tmp|work)/", text)
    assert path.stat().st_size < 500_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_imports_only_from_above(path):
    "The spine: a notebook uses modules of notebooks before it, and its own."
    home = {m[1]: p.stem for p in NOTEBOOKS if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", python_of(p), re.M))}
    tree = ast.parse(python_of(path), feature_version=(3, 10))  # also: no syntax newer than the oldest Python supported
    used = {n.module.split(".")[1] for n in ast.walk(tree)
            if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("ddpm_nbdev.")}
    below = {m for m in used if home[m] > path.stem}  # index sorts after the numbers: it may use all
    assert not below


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_import_cells_hold_nothing_else(path):
    "nbdev's documentation runs import cells alone, so other code in them fails there."
    for cell in cells(path):
        text = source(cell)
        if cell["cell_type"] != "code" or text.lstrip()[:1] in "%!" or "eval: false" in text: continue
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(re.sub(r"^\s*[%!].*$", "", text, flags=re.M)).body}
        assert len(kinds) < 2, text


def test_equation_numbers_are_given_once():
    tags = [n for p in NOTEBOOKS for c in cells(p) if c["cell_type"] == "markdown" for n in re.findall(r"\\tag\{(\w+)\}", source(c))]
    assert len(tags) == len(set(tags)), sorted(tags)


def test_sidebar_lists_every_notebook():
    def files(entries):
        for e in entries:
            if isinstance(e, str): yield e
            elif "href" in e: yield e["href"]
            else: yield from files(e["contents"])
    config = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))
    listed = list(files(config["website"]["sidebar"]["contents"]))
    assert {p.name for p in NOTEBOOKS} == set(listed) and len(listed) == len(set(listed))
    assert yaml.safe_load((ROOT/"nbs"/"_quarto.yml").read_text()) == {"metadata-files": ["../_quarto.yml"]}


def test_readme_links():
    "Every relative link and picture of README.md exists."
    if not (ROOT/"README.md").exists(): pytest.skip("no README.md yet")
    text = re.sub(r"^```.*?^```$|`[^`\n]+`", "", (ROOT/"README.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"""(?:\]\(|\b(?:src|href)=")([^)\s"#]+)""", text)
    assert not [o for o in links if not re.match(r"[a-z]+:", o) and not (ROOT/o).exists()]
