"The map of the paper on the index page: every row that says done points to things that exist."
import importlib
import json
import re
from pathlib import Path

import pytest
from conftest import equations

NBS = Path(__file__).parent.parent/"nbs"


def cells(name, kind):
    return ["".join(c["source"]) for c in json.loads((NBS/name).read_text())["cells"] if c["cell_type"] == kind]


def rows():
    text = next(s for s in cells("index.ipynb", "markdown") if "## The map of the paper" in s)
    table = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert table[0] == ["Paper", "What it says", "Derived in", "Function", "Checked by", "Picture"]
    end = next((i for i, r in enumerate(table) if len(r) != 6), len(table))
    return table[2:end]


def status(row):
    "What the second column adds to what the part of the paper says; nothing means done."
    return (re.search(r"\*\((.*)\)\*$", row[1]) or ["", "done"])[1]


PUBLIC = {name for p in (NBS.parent/"ddpm_nbdev").glob("[a-z]*.py") for name in getattr(importlib.import_module(f"ddpm_nbdev.{p.stem}"), "__all__", ())}


def anchors(name):
    "The headings of a notebook as anchors; headings hold only letters, digits, spaces and hyphens where they are linked."
    headings = re.findall(r"^#{2,4} (.+)$", "\n".join(cells(name, "markdown")), re.M)
    return {h.strip().lower().replace(" ", "-") for h in headings}


ROWS = {r[0]: r for r in rows()}
WANTED = ([f"Eq. {i}" for i in range(1, 17)] + [f"Alg. {i}" for i in range(1, 5)] + [f"Fig. {i}" for i in range(1, 11)]
          + [f"Table {i}" for i in range(1, 5)] + ["App. A", "App. B", "App. C", "Fig. 12, 15", "Section 4.3", "Section 3.2"])


def test_every_part_of_the_paper_has_a_row():
    assert list(ROWS) == WANTED
    assert {status(r) for r in ROWS.values()} <= {"done", "at small scale", "later", "not at paper scale"}


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_row(row):
    paper, _, derived, code, checked, picture = row
    if status(row) == "later": return
    links = re.findall(r"\]\(([^)]+)\)", derived + checked + picture)
    assert links, f"{paper} says {status(row)} but links to nothing"
    for link in links:
        page, _, anchor = link.partition("#")
        assert (NBS/page).is_file(), f"{paper}: no page {page}"
        if anchor: assert anchor in anchors(page), f"{paper}: no heading {anchor} in {page}"
    for name in re.findall(r"`([\w.]+)`", code): assert name in PUBLIC, f"{paper}: no {name}"
    page, _, anchor = re.search(r"\]\(([^)]+)\)", picture)[1].partition("#")
    assert re.search(r"fig-cap|fig-alt|show_anim\(", section(page, anchor) if anchor else "\n".join(cells(page, "code"))), f"{paper}: no picture in {page}#{anchor}"
    if status(row) == "at small scale" or status(row) == "done" and paper.startswith(("Eq", "Alg")):
        assert "`" in code and "](" in derived and "](" in checked, f"{paper} is done but lacks its derivation, code or check"
        page, _, anchor = re.search(r"\]\(([^)]+)\)", checked)[1].partition("#")
        body = section(page, anchor) if anchor else "\n".join(cells(page, "code"))
        assert re.search(r"\bassert|test_\w+\(", body), f"{paper}: nothing is asserted in {page}#{anchor}"


def section(page, anchor):
    "The code cells between the heading with this anchor and the next heading of the same or a higher level."
    inside, level, out = False, 9, []
    for c in json.loads((NBS/page).read_text())["cells"]:
        source = "".join(c["source"])
        if c["cell_type"] == "code" and inside: out.append(source)
        if c["cell_type"] != "markdown": continue
        for h in re.finditer(r"^(#{2,4}) (.+)$", source, re.M):
            if inside and len(h[1]) <= level: inside = False
            if h[2].strip().lower().replace(" ", "-") == anchor: inside, level = True, len(h[1])
    return "\n".join(out)


@pytest.mark.parametrize("number", equations())
def test_each_done_equation_is_tagged_where_it_is_derived(number):
    page = re.search(r"\]\(([^)#]+)", ROWS[f"Eq. {number}"][2])[1]
    assert rf"\tag{{{number}}}" in "\n".join(cells(page, "markdown"))
