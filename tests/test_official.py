"The page 'Paper against official code': 25 numbered points, each complete, named in the list, and with evidence that exists."
import importlib
import json
import pkgutil
import re
from configparser import ConfigParser
from pathlib import Path

import pytest

import ddpm_nbdev

ROOT = Path(__file__).parents[1]
NBS, PAGE = ROOT/"nbs", "23_official.ipynb"
CFG = ConfigParser(delimiters=["="])
CFG.read(ROOT/"settings.ini", encoding="utf-8")
TESTS = "{git_url}/blob/{branch}/tests/".format_map(CFG["DEFAULT"])
PARTS = ["Paper", "Official code", "If it is missed", "Here"]


def cells(name): return [(c["cell_type"], "".join(c["source"])) for c in json.loads((NBS/name).read_text(encoding="utf-8"))["cells"]]


def anchor(heading): return re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-")


def anchors(name): return {anchor(h) for kind, s in cells(name) if kind == "markdown" for h in re.findall(r"^#{2,4} (.+)$", s, re.M)}


def points():
    "Title, text and code of each point: its cell, and what follows up to the next heading."
    found, now = [], None
    for kind, text in cells(PAGE):
        heading = re.match(r"#{2,3} (.+)", text) if kind == "markdown" else None
        if heading: now = {"title": heading[1], "markdown": "", "code": ""} if heading[1].startswith("Point ") else None
        if heading and now: found.append(now)
        if now: now[kind] += text + "\n"
    return found


POINTS = points()
IDS = [p["title"].split(" - ")[0] for p in POINTS]


def test_there_are_25_in_order(): assert IDS == [f"Point {n}" for n in range(1, 26)]


def test_the_list_names_each_point_and_leads_to_it():
    table = next(s for kind, s in cells(PAGE) if kind == "markdown" and s.startswith("## The list"))
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")][2:]
    assert [r[:2] for r in rows] == [[str(n), f"[{p['title'].split(' - ')[1]}](#{anchor(p['title'])})"] for n, p in enumerate(POINTS, 1)]
    for _, _, missed, known in rows:
        assert missed and set(re.split("[,;] ", known)) <= {"exact", "measured", "reported"}


@pytest.mark.parametrize("point", POINTS, ids=IDS)
def test_a_point_is_complete(point):
    "Its four parts, in order, and none of them empty; what is done here has a name in the package, or is said not to be there yet."
    parts = re.split(r"^\* \*\*(.+?)\.\*\* ", point["markdown"], flags=re.M)
    assert parts[1::2] == PARTS and all(len(text.strip()) > 5 for text in parts[2::2])
    public = {n for m in pkgutil.iter_modules(ddpm_nbdev.__path__) for n in getattr(importlib.import_module(f"ddpm_nbdev.{m.name}"), "__all__", [])}
    named = {n.split(".")[0] for n in re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`", parts[-1])}
    assert named & (public | {"ddpm_train"}), f"nothing of the package is named: {named}"


@pytest.mark.parametrize("point", POINTS, ids=IDS)
def test_a_point_has_evidence_that_exists(point):
    "A cell that asserts something, here or behind a link, or a test of that name; and no link that leads nowhere."
    evidence = bool(re.search(r"^\s*(assert\b|assert_close\(|test_\w+\()", point["code"], re.M))
    for text, link in re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", point["markdown"]):
        if link.startswith(TESTS):
            text = text.replace("<wbr>", "")
            assert re.search(rf"^def {re.escape(text)}\(", (ROOT/"tests"/link.removeprefix(TESTS)).read_text(encoding="utf-8"), re.M), f"no {text} in {link}"
            evidence = True
        elif not link.startswith("http"):
            page, _, place = link.partition("#")
            page = page or PAGE
            assert (NBS/page).is_file() and (not place or place in anchors(page)), link
            evidence |= page != PAGE and any(kind == "code" and re.search(r"\bassert|test_\w+\(", s) for kind, s in cells(page))
    assert evidence
