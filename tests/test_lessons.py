"What every lesson has: a question at the top, three exercises with solutions that cells check, a summary; what a workshop has; and the site's movement."
import base64
import json
import re

import pytest
from conftest import NOTEBOOKS

LESSONS = [stem for stem in NOTEBOOKS if re.match(r"\d\d_", stem) and not stem.startswith("00_")]
WORKSHOPS = [stem for stem in NOTEBOOKS if re.match(r"\d\d[a-z]_|00_", stem)]   # behind a page, for implementers
OPEN_WITH_A_PICTURE = ["07a_normal", "11a_pretrained", "13a_run", "15a_ans", "15b_container", "20a_codec_cli"]
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


def first_screen(stem):
    "The cells before the first section."
    found = cells(stem)
    return found[:next(i for i, c in enumerate(found) if c["cell_type"] == "markdown" and re.search("^## ", source(c), re.M))]


@pytest.mark.parametrize("stem", [*LESSONS, *OPEN_WITH_A_PICTURE])
def test_the_first_screen_is_a_picture(stem):
    "It stands before the first section, after few words, and says in words what it shows."
    found = first_screen(stem)
    drawn = [i for i, c in enumerate(found) if any(k.startswith("image/") or k == "text/html" for o in c.get("outputs", []) for k in o.get("data", {}))]
    assert drawn
    words = " ".join(source(c) for c in found[:drawn[0]] if c["cell_type"] == "markdown")
    assert len(words.split()) < 150 and len(re.findall(r"^\|", words, re.M)) == 0 and "```" not in words
    assert re.search(r"^#\| fig-cap: ", source(found[drawn[0]]), re.M) or "show_anim" in source(found[drawn[0]])


@pytest.mark.parametrize("stem", [stem for stem in LESSONS if stem >= "20"])
def test_three_things_to_take_along(stem):
    "In words, above the table of the summary."
    summary = next(source(c) for c in cells(stem) if source(c).startswith("## Summary"))
    assert len(re.findall(r"^- .{40,}", summary.split("\n|")[0], re.M)) == 3


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
