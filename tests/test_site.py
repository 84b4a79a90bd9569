"The site as files: it builds without a warning, nothing leads nowhere, nothing comes from elsewhere. Nothing here needs a browser."
import json
import re
import subprocess
import sys
from collections import Counter
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from conftest import NO_SITE, NOTEBOOKS, ROOT, Page, build, equations, page_of

WEB = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))["website"]
pytestmark = pytest.mark.skipif(bool(NO_SITE), reason=NO_SITE or "-")


def test_builds_without_a_warning(built):
    _, res, clean = built
    assert res.returncode == 0 and not res.stderr, res.stderr
    assert clean, "the notebooks' folder was written to"


def test_one_page_for_each_notebook(pages):
    assert set(pages) == {page_of(s) for s in NOTEBOOKS} | {"live/one-file.html"}    # the living network, for a disk


def test_links_and_anchors(site, pages):
    lost = []
    for name, page in pages.items():
        for href in [a["href"] for a in page.all("a") if a.get("href")]:
            if re.match(r"[a-z]+:", href):
                if href.startswith(WEB["site-url"]): lost.append(f"{name}: {href} is absolute")
                continue
            path, _, anchor = href.partition("#")
            target = path.removeprefix("./") or name
            if not (site/target).is_file() or anchor and unquote(anchor) not in pages[target].ids: lost.append(f"{name}: {href}")
    assert not lost, "\n".join(lost)


def test_anchors_are_unique(pages):
    assert not {name: twice for name, page in pages.items() if (twice := [i for i, n in Counter(page.ids).items() if n > 1])}


def test_search_leads_to_what_exists(site, pages):
    entries = json.loads((site/"search.json").read_text(encoding="utf-8"))
    assert any("posterior" in e["text"] for e in entries)
    for e in entries:
        name, _, anchor = e["href"].partition("#")
        assert not anchor or anchor in pages[name].ids, e["href"]


def test_pictures_have_words(pages):
    pictures = [(name, a) for name, page in pages.items() for a in page.all("img")]
    assert len(pictures) > 40
    assert not [name for name, a in pictures if len(a.get("alt", "")) < 10]


@pytest.mark.parametrize("number", equations())
def test_each_equation_is_numbered_once(pages, number):
    homes = [name for name, page in pages.items() for m in page.math if rf"\tag{{{number}}}" in m]
    assert len(homes) == 1, homes
    assert f"eq-{number}" in pages[homes[0]].ids


def test_mentions_of_equations_lead_to_them(pages):
    hrefs = [a["href"].partition("#") for page in pages.values() for a in page.all("a") if "#eq-" in a.get("href", "")]
    assert {anchor for _, _, anchor in hrefs} >= {f"eq-{n}" for n in equations()[1:]} and {bool(page) for page, _, _ in hrefs} == {True, False}


def test_math_is_marked_as_math(pages):
    "No TeX in running text; pages with math load the typesetter, which is on the site."
    for name, page in pages.items():
        text = " ".join(page.prose)
        assert not re.findall(r".{0,40}(?:\$|\\[A-Za-z]{2,}).{0,40}", text), name
        assert bool(page.math) == any(a.get("src") == "site_libs/mathjax/tex-svg-full.js" for a in page.all("script")), name


def test_no_links_as_text(site):
    "nbdev links names in the comments of signatures, where Markdown is not read."
    for path in site.glob("*.html"): assert f"]({WEB['site-url']}" not in path.read_text(encoding="utf-8"), path.name


def test_nothing_is_loaded_from_elsewhere(site, pages):
    remote = re.compile(r"\s*(?:[a-z]+:)?//", re.I)
    for name, page in pages.items():
        used = [a[k] for t, a in page.tags for k in ("src", "srcset", "data", "poster") if k in a] + [a["href"] for a in page.all("link")]
        assert not [u for u in used if remote.match(u)], name
        assert "jsdelivr" not in (site/name).read_text(encoding="utf-8"), name
    for path in [*site.rglob("*.css"), *site.rglob("*.html")]:
        text = re.sub(r"<(pre|code)\b.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.S)
        found = re.findall(r"""(?:url\(\s*["']?|@import\s+["'])(?:https?:)?//[^)"']*""", text)
        assert not found, path.name


def test_size(site, pages):
    assert sum(p.stat().st_size for p in site.rglob("*") if p.is_file()) < 40e6
    assert not {name: size for name in pages if (size := (site/name).stat().st_size) > 3e6}


def order(entries):
    for e in entries:
        if isinstance(e, str): yield Path(e).stem
        elif "href" in e: yield Path(e["href"]).stem
        else: yield from order(e["contents"])


def test_previous_and_next(pages):
    stems = list(order(WEB["sidebar"]["contents"]))
    assert stems[0] == "index"
    for before, stem, after in zip([None, *stems], stems, [*stems[1:], None]):
        around = [page_of(s) for s in (before, after) if s]
        assert [a["href"] for a in pages[page_of(stem)].all("a") if a.get("class") == "pagination-link"] == around


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_links_to_source_and_colab(pages, stem):
    hrefs = [a["href"] for a in pages[page_of(stem)].all("a") if "href" in a]
    path = f"{WEB['repo-url'].removeprefix('https://github.com/')}/blob/{WEB['repo-branch']}/nbs/{stem}.ipynb"
    assert f"https://github.com/{path}" in hrefs
    assert f"https://colab.research.google.com/github/{path}" in hrefs


def cell(source, kind="code", outputs=()):
    res = {"cell_type": kind, "id": f"c{abs(hash(source))%10**7}", "metadata": {}, "source": source}
    return {**res, "execution_count": None, "outputs": list(outputs)} if kind == "code" else res


def shown(mime, data): return [{"output_type": "display_data", "metadata": {}, "data": {mime: data}}]


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def project(root, pages):
    "A project in the folder `root` whose notebooks are `pages`: name -> cells, of which the first is the page's title."
    (root/"nbs").mkdir()
    (root/"toylib").mkdir()
    (root/"toylib"/"__init__.py").touch()
    for name in ["settings.ini", "_quarto.yml", "nbs/_quarto.yml", "nbs/styles.css"]:
        (root/name).write_text((ROOT/name).read_text(encoding="utf-8").replace("ddpm_nbdev", "toylib"), encoding="utf-8")
    config = yaml.safe_load((root/"_quarto.yml").read_text(encoding="utf-8"))
    config["website"]["sidebar"]["contents"] = [f"{name}.ipynb" for name in sorted(pages, key=lambda n: n != "index")]
    (root/"_quarto.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for name, cells in pages.items():
        nb = {"cells": cells, "metadata": {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}},
              "nbformat": 4, "nbformat_minor": 5}
        (root/"nbs"/f"{name}.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "A project of two pages with one fault of each kind, and one picture for each source of alternative text; built by the tool."
    root = project(tmp_path_factory.mktemp("toysite"), {
        "00_toy": [cell("# Toy\n> A toy.", "markdown"), cell("## What's **it** for, then?", "markdown"),
                   cell('#| fig-cap: "A \\"gray\\" dot"\n1', outputs=shown("image/png", PIXEL)),
                   cell('#| fig-alt: "A <moving> dot"\n2', outputs=shown("text/html", f'<img id="a" src="data:image/png;base64,{PIXEL}">'))],
        "index": [cell("# Toys\n> All toys.", "markdown"), cell("[good](00_toy.ipynb#whats-it-for-then) and $x_1$", "markdown"),
                  cell("[bad anchor](00_toy.ipynb#nowhere)\n\n[bad page](01_none.ipynb)\n\n![far](https://example.org/far.png)", "markdown"),
                  cell("3", outputs=shown("image/png", PIXEL))]})
    return root/"_docs", build(root, root/"_docs"), root


@pytest.mark.parametrize("fault", ["toy.html#nowhere leads to an anchor that does not exist", "broken link 01_none.ipynb",
                                   "index.html: loads https://example.org/far.png from elsewhere",
                                   "index.html: 1 pictures without alternative text"])
def test_faults_fail_the_build(toy, fault): assert toy[1].returncode == 1 and fault in toy[1].stderr, toy[1].stderr


def test_good_parts_are_not_faults(toy):
    "A heading with punctuation has the anchor that links use; a caption is alternative text, also of an animation."
    out, res, _ = toy
    assert not re.search(r"whats-it-for-then|^toy\.html", res.stderr, re.M), res.stderr
    page = Page(out/"toy.html")
    assert [a["alt"] for a in page.all("img")] == ['A "gray" dot', "A <moving> dot"]


def test_a_folder_that_is_no_site_is_kept(toy, tmp_path):
    (tmp_path/"precious.txt").touch()
    res = build(toy[2], tmp_path)
    assert res.returncode == 1 and "not a site" in res.stderr and [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_a_checkout_a_file_and_what_is_no_project_are_refused_before_anything_is_built(tmp_path):
    "A worktree for publishing holds a site, and its history."
    for name in (".git", "site_libs"): (tmp_path/"pages"/name).mkdir(parents=True)
    (tmp_path/"file").touch()
    for root, out, words in ((ROOT, tmp_path/"pages", "is a checkout of git"), (ROOT, tmp_path/"file", "is not a folder"), (tmp_path, tmp_path/"new", "is no project")):
        res = build(root, out)
        assert res.returncode == 1 and words in res.stderr and len(res.stderr.splitlines()) == 1, res.stderr
    assert (tmp_path/"pages/.git").is_dir() and (tmp_path/"file").is_file() and not (tmp_path/"new").exists()


def test_a_link_in_a_link_is_none(tmp_path, monkeypatch):
    "Names that nbdev links inside the words of a link; and what would still be read as Markdown is a fault."
    monkeypatch.syspath_prepend(ROOT/"tools")
    tool = module_from_spec(spec_from_loader("build_site", SourceFileLoader("build_site", str(ROOT/"tools/build_site"))))
    tool.__loader__.exec_module(tool)
    cell = {"source": "See [`f` and [`g`](https://x.org/m.html#g), or [`h`](m.html#h)](20_cli.ipynb), [`f`](m.html#f), [not](n.html)."}
    tool.unlink_inner(cell)
    assert cell["source"] == "See [`f` and `g`, or `h`](20_cli.ipynb), [`f`](m.html#f), [not](n.html)."
    (tmp_path/"a.html").write_text("<html><body><p>see [the page](b.ipynb)</p><pre>a[0](1)</pre></body></html>")
    assert [line for line in tool.problems(tmp_path)] == ["a.html: Markdown that is read as text: ...see [the page](b.ipynb)"]


QUARTO = """<!doctype html><html><head><title>q</title>
<script src="https://cdnjs.cloudflare.com/polyfill/v3/polyfill.min.js?features=es6"></script>
<script src="https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-chtml-full.js" type="text/javascript"></script>
<script src="https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js" crossorigin="anonymous"></script>
<script src="https://cdnjs.cloudflare.com/ajax/libs/jquery/3.5.1/jquery.min.js" data-relocate-top="true"></script>
<script type="application/javascript">define('jquery', [],function() {return window.jQuery;})</script>
<script src="site_libs/own.js"></script></head><body><p>kept</p></body></html>"""


def own(folder): return subprocess.run([sys.executable, ROOT/"tools"/"build_site", "--own", folder], text=True, capture_output=True)


def test_a_site_of_quarto_loads_nothing_from_elsewhere(tmp_path):
    "Pages as Quarto writes them, as far as is known without it; what is not known is named."
    libs = tmp_path/"site_libs"
    (tmp_path/"deep").mkdir()
    libs.mkdir()
    (libs/"own.js").touch()
    (libs/"theme.css").write_text('@import"https://fonts.googleapis.com/css2?family=A:wght@400;700&display=swap";@import url(own.css);p{margin:0}')
    for name in ("index.html", "deep/page.html"): (tmp_path/name).write_text(QUARTO.replace("site_libs", "../site_libs" if "/" in name else "site_libs"))
    res = own(tmp_path)
    assert res.returncode == 0 and not res.stderr, res.stderr
    assert (libs/"theme.css").read_text() == "@import url(own.css);p{margin:0}"
    for name, at in (("index.html", "./"), ("deep/page.html", "../")):
        text = (tmp_path/name).read_text()
        assert re.findall(r"https?://|define\(", text) == [] and "<p>kept</p>" in text
        assert [a["src"] for a in Page(tmp_path/name).all("script")] == [f"{at}site_libs/mathjax/tex-svg-full.js", f"{at.removeprefix('./')}site_libs/own.js"]
    (tmp_path/"index.html").write_text(QUARTO.replace("site_libs/own.js", "https://example.org/new.js"))
    res = own(tmp_path)
    assert res.returncode == 1 and "index.html: loads https://example.org/new.js from elsewhere" in res.stderr
    assert "is not a site" in own(tmp_path/"deep").stderr
