"The page of questions: what it answers, links to and quotes is there."
import contextlib
import functools
import importlib
import io
import json
import pkgutil
import re
from configparser import ConfigParser
from pathlib import Path
from unittest.mock import patch

import pytest

from ddpm_nbdev import cli, codec_cli, interpolate_cli

ROOT = Path(__file__).parents[1]
CFG = ConfigParser(delimiters=["="])
CFG.read(ROOT/"settings.ini", encoding="utf-8")
NBS, URL = ROOT/"nbs", "{git_url}/blob/{branch}/tests/".format_map(CFG["DEFAULT"])
LONGEST = 90   # words: an answer that needs more is a page


def anchor(heading):
    "Of the marks that renderers treat differently none may occur but a ? at the end, which all of them drop."
    assert re.fullmatch(r"[A-Za-z0-9 -]+\??", heading), heading
    return heading.rstrip("?").lower().replace(" ", "-")


def cells(name): return json.loads((NBS/name).read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])
def printed(cell): return "".join("".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in cell.get("outputs", []))
def headings(name): return re.findall(r"^#{2,4} (.+)$", "\n".join(source(c) for c in cells(name) if c["cell_type"] == "markdown"), re.M)


def read_page():
    "The questions listed at the top, and those that are answered: {question: (answer, what the cells below it print)}."
    listed, answered, question = [], {}, None
    for c in cells("24_questions.ipynb"):
        text = source(c)
        if c["cell_type"] == "code":
            if question: answered[question][1] += printed(c)
        elif "\n### " in f"\n{text}":
            heading, _, answer = text[text.index("### ")+4:].partition("\n")
            assert "\n#" not in answer and heading not in answered, heading
            question = heading
            answered[question] = [answer, ""]
        elif text.startswith("## "): question = None
        elif not answered: listed += re.findall(r"^\* \[(.+)\]\(#(.+)\)$", text, re.M)
    return listed, answered


LISTED, ANSWERS = read_page()


def links(answer): return re.findall(r"\[([^]]+)\]\(([^)\s]+)\)", answer)


def test_the_list_is_the_questions():
    assert LISTED == [(q, anchor(q)) for q in ANSWERS]
    assert len(ANSWERS) >= 20


@pytest.mark.parametrize("question", ANSWERS)
def test_answer_is_short_and_shown(question):
    answer = ANSWERS[question][0]
    assert 10 < len(re.sub(r"\]\([^)]*\)", "]", answer).split()) <= LONGEST
    assert links(answer), "nothing shows that it is true"
    for text, target in links(answer):
        if target.startswith(URL):
            name = re.fullmatch(r"`(test_\w+)`", text)[1]
            assert re.search(rf"^def {name}\(", (ROOT/"tests"/target.removeprefix(URL)).read_text(encoding="utf-8"), re.M), (name, target)
        else:
            page, _, place = target.partition("#")
            assert place in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings(page)], target
            next(anchor(h) for h in headings(page) if re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") == place)


@functools.cache
def options(command):
    "The options that a command's help lists."
    with patch("sys.argv", [command, "--help"]), contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
        next(getattr(m, command) for m in (cli, codec_cli, interpolate_cli) if hasattr(m, command))()
    return set(re.findall(r"(?<![\w-])--([\w-]+)", said.getvalue()))


@pytest.mark.parametrize("question", ANSWERS)
def test_commands_have_these_options(question):
    for command, rest in re.findall(r"`(ddpm_\w+) ([^`]+)`", ANSWERS[question][0]):
        for option in re.findall(r"--([\w-]+)", rest): assert option in options(command), (command, option)
    known = set().union(*map(options, ("ddpm_train", "ddpm_sample", "ddpm_evaluate")))
    assert {"steps", "resume", "exact"} <= known
    for option in re.findall(r"`--([\w-]+)[^`]*`", ANSWERS[question][0]):
        assert option in known | {"max-restarts"}, option   # the last is torchrun's


@pytest.mark.parametrize("question", ANSWERS)
def test_numbers_are_those_of_the_pages(question):
    "A number with three digits or a decimal point stands on a page or in a test that the answer links to, or is printed below it."
    answer, below = ANSWERS[question]
    found = below
    for _, target in links(answer):
        if target.startswith(URL): found += (ROOT/"tests"/target.removeprefix(URL)).read_text(encoding="utf-8")
        else: found += "\n".join(source(c) + printed(c) for c in cells(target.partition("#")[0]))
    numbers = lambda s: {n.replace(",", "").lstrip("0") for n in re.findall(r"(?<![\w.])(?:\d[\d,]*\.?\d*|\.\d+)(?:e-?\d+)?", s)}
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", answer)
    wanted = {n.rstrip(".") for n in numbers(prose)}
    missing = {n for n in wanted if ("." in n or "e" in n or len(n) > 2)} - {n.rstrip(".") for n in numbers(found)}
    assert not missing, missing


def test_where_next_names_what_is_there():
    "The page ends with what to do after it; each paper has an address, and changes a piece that the package has."
    import ddpm_nbdev
    public = {n: m for m in map(importlib.import_module, (f"ddpm_nbdev.{m.name}" for m in pkgutil.iter_modules(ddpm_nbdev.__path__)))
              for n in getattr(m, "__all__", ())}
    last = source(cells("24_questions.ipynb")[-1])
    assert last.startswith("## Where next\n")
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in last.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 8
    for paper, change, pieces in rows:
        number = re.search(r"\[arXiv (\d{4}\.\d{4,5})\]\(https://arxiv.org/abs/(\d{4}\.\d{4,5})\)$", paper)
        assert number and number[1] == number[2] and re.search(r" 20\d\d, \*[^*]+\*, ", paper) and change.endswith("."), paper
        for name in re.findall(r"`([\w.]+)`", pieces):
            first, _, rest = name.partition(".")
            assert first == "model" or first in public and (not rest or hasattr(getattr(public[first], first), rest)), name
    for name in re.findall(r"`(\w+)\.?\w*`", last): assert name in public or name == "model", name
