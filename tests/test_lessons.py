"What every lesson has: a question at the top, three exercises with solutions that cells check, a summary; what a workshop has; and the site's movement."
import base64
import json
import re

import pytest
from conftest import NOTEBOOKS

LESSONS = [stem for stem in NOTEBOOKS if re.match(r"\d\d_", stem) and not stem.startswith("00_")]
WORKSHOPS = [stem for stem in NOTEBOOKS if re.match(r"\d\d[a-z]_|00_", stem)]   # behind a page, for implementers
ASSERTS = r"\bassert\b|assert_close|test_eq|test_fail|assert_allclose"


def cells(stem): return json.loads(NOTEBOOKS[stem].read_text(encoding="utf-8"))["cells"]


def source(cell): return "".join(cell["source"])


def test_there_are_lessons_and_workshops():
    assert len(LESSONS) >= 20 and len(WORKSHOPS) >= 11
    assert sorted([*LESSONS, *WORKSHOPS, "index", "live", "before"]) == sorted(NOTEBOOKS)


@pytest.mark.parametrize("stem", LESSONS + WORKSHOPS)
def test_title_and_question(stem):
    first = cells(stem)[0]
    assert first["cell_type"] == "markdown" and re.fullmatch(r"# [^\n]+\n\n> [^\n]+\n?", source(first))


@pytest.mark.parametrize("stem", LESSONS)
def test_three_exercises_with_checked_solutions(stem):
    "After each solution comes a cell that asserts something."
    found = cells(stem)
    start = next(i for i, c in enumerate(found) if "## Exercises" in source(c))
    end = next(i for i, c in enumerate(found) if "## Summary" in source(c))
    assert start < end
    solutions = [i for i in range(start, end) if "<details><summary>Solution</summary>" in source(found[i])]
    assert len(solutions) >= 3
    for i, after in zip(solutions, [*solutions[1:], end]):
        checks = "\n".join(source(c) for c in found[i+1:after] if c["cell_type"] == "code")
        assert re.search(ASSERTS, checks), f"solution {solutions.index(i)+1} is not checked"


@pytest.mark.parametrize("stem", WORKSHOPS)
def test_a_workshop_checks_its_tools(stem):
    "No exercises are asked of it, but something must be asserted, in a cell that the tests run."
    code = [source(c) for c in cells(stem) if c["cell_type"] == "code"]
    assert any(re.search(ASSERTS, s) for s in code if not re.search(r"^#\|\s*(slow|gpu|data|notest|eval: false)", s, re.M))


def animations():
    "Every player in the stored outputs: (notebook, name, HTML)."
    for stem in NOTEBOOKS:
        for c in cells(stem):
            for out in c.get("outputs", []):
                html = "".join(out.get("data", {}).get("text/html", ""))
                if 'class="animation"' in html: yield stem, re.search(r"show_anim\(.*?, '([^']+)'", source(c), re.S)[1], html


MOVIES = list(animations())


def test_there_is_movement(): assert len({(stem, name) for stem, name, _ in MOVIES if stem != "00a_plot"}) >= 6


@pytest.mark.parametrize("stem, name, html", MOVIES, ids=[f"{s}-{n}" for s, n, _ in MOVIES])
def test_animation(stem, name, html):
    "Under 400 KB, with words for those who do not see it, a caption, and frames that differ; nothing from elsewhere."
    assert len(html) < 400_000
    assert re.search(r'<img[^>]*alt="[^"]{20,}"', html) and re.search(r"<figcaption[^>]*>[^<]{20,}", html)
    frames = re.findall(r"\biVBOR[A-Za-z0-9+/]+=*", html)
    assert len(set(frames)) >= 10 and all(base64.b64decode(f, validate=True).startswith(b"\x89PNG") for f in frames)
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", html)
