"What the site's own scripts and styles do for a reader, in Chromium: where one is, search, keys, narrow windows, print."
import re

import pytest
from conftest import NO_BROWSER, NOTEBOOKS, page_of

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(NO_BROWSER), reason=NO_BROWSER or "-")]
PAGES = [page_of(s) for s in NOTEBOOKS]
LESSONS = [s for s in NOTEBOOKS if re.match(r"(0[1-9]|1[0-9])_|live$|before$", s)]
FRAME = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"

# --- where in the chain a page is


def test_lessons_say_where_they_are(site):
    "Each has its part of the chain lit and named; no other page has the strip, and every part leads to a page that says it is about it."
    assert len(LESSONS) == 21
    targets = set()
    for stem in NOTEBOOKS:
        text = (site/page_of(stem)).read_text(encoding="utf-8")
        strip = re.findall(r'<nav class="here".*?</nav>', text, re.S)
        assert len(strip) == (stem in LESSONS), stem
        if not strip: continue
        assert 'class="lit"' in strip[0] and len(re.sub(r"<svg.*</svg>|<[^>]+>", "", strip[0], flags=re.S).strip()) > 25, stem
        links = dict(re.findall(r'data-part="(\w+)"(?: class="lit")? href="([\w.]+)"', strip[0]))
        assert len(links) == 8
        targets |= {(k, v) for k, v in links.items()}
        current = re.findall(r'data-part="(\w+)"( class="lit")? href="([\w.]+)" aria-label="[^"]+" aria-current="page"', strip[0])
        assert [(c[2], bool(c[1])) for c in current] == [(page_of(stem), True)]*(page_of(stem) in links.values()), stem
    assert len(targets) == 8 and {v for _, v in targets} <= {page_of(s) for s in LESSONS}


STRIP = """() => {
  const box = document.querySelector(".here"), r = box.getBoundingClientRect(), svg = box.querySelector("svg").getBoundingClientRect();
  const lit = e => getComputedStyle(e.querySelector("circle, .arrow, .box, text")).color;
  return {height: r.height, width: r.width, svg: svg.width, over: box.scrollWidth > box.clientWidth, words: box.querySelector("p").getBoundingClientRect().height,
    after: document.querySelector("h1").getBoundingClientRect().bottom <= r.top, colors: ["x0", "xt", "q"].map(k => lit(box.querySelector(`[data-part=${k}]`))),
    gray: lit(box.querySelector("[data-part=L]"))};
}"""
FIRST = """() => Math.min(...[...document.querySelectorAll("main img, main .cell-output-display svg, main .cell-output-display canvas, main .live, main .sliders")]
  .map(e => e.getBoundingClientRect()).filter(r => r.height > 40).map(r => r.top + scrollY))"""


@pytest.mark.parametrize("width, theme", [(1366, "light"), (1366, "dark"), (390, "light"), (390, "dark")])
def test_the_strip_is_slim(tab, width, theme):
    "Lit parts have the symbols' colors of the theme; on a phone the words stand below the drawing."
    tab.emulate_media(color_scheme=theme)
    tab.set_viewport_size({"width": width, "height": 844})
    tab.goto("/forward.html")
    seen = tab.evaluate(STRIP)
    assert seen["height"] <= (75 if width > 500 else 130) and not seen["over"] and seen["svg"] <= seen["width"] <= width and seen["after"]
    symbols = tab.evaluate("""() => ["--x0", "--xt", "--eps"].map(v => { const e = document.createElement("i"); e.style.color = `var(${v})`;
      document.body.append(e); const c = getComputedStyle(e).color; e.remove(); return c; })""")
    assert seen["colors"] == symbols and seen["gray"] not in symbols
    tab.emulate_media(media="print")
    assert tab.locator(".here").is_visible()


@pytest.mark.parametrize("stem", LESSONS)
def test_the_first_picture_is_in_the_first_screen(tab, stem):
    tab.set_viewport_size({"width": 1366, "height": 900})
    tab.goto(f"/{page_of(stem)}")
    tab.evaluate("window.MathJax?.startup?.promise")
    tab.evaluate(FRAME)
    assert tab.evaluate(FIRST) < 900


def test_a_part_of_the_chain_leads_to_its_page_by_key(tab):
    tab.goto("/bound.html")
    tab.locator(".here [data-part=q]").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/forward.html")


# --- search

HITS = """() => [...document.querySelectorAll(".search-result")].map(e => [e.getAttribute("href").replace("./", ""),
  ...[".search-result-title", ".search-result-section"].map(w => e.querySelector(w)?.innerText ?? "")])"""


def hits(tab, words):
    tab.fill("[type=search]", "")
    tab.wait_for_selector(".smalldocs-search-results:not(.show)", state="attached")
    tab.fill("[type=search]", words)
    tab.wait_for_selector(".smalldocs-search-results.show")
    return tab.evaluate(HITS)


@pytest.mark.parametrize("words, first", [("posterior", "posterior.html"), ("ema", "train.html#ema"), ("fid", "quality.html#fid"), ("codec", "codec_cli.html"),
                                          ("sigma", "notation.html"), ("clip", "notation.html#words"), ("four variances", "reverse.html#four-variances"),
                                          ("linear_schedule", "schedule.html#linear_schedule"), ("U-Net", "unet.html")])
def test_search_finds_whole_words_in_headings_first(tab, site, words, first):
    "And nothing in which the word does not stand: ema is not in remain."
    import json
    texts = {e["href"]: " ".join([e["href"], e["title"], e["section"] or "", e["text"]]).lower() for e in json.loads((site/"search.json").read_text(encoding="utf-8"))}
    tab.goto("/index.html")
    found = hits(tab, words)
    assert found[0][0].startswith(first), found[:3]
    for href, _, _ in found:
        for w in re.split(r"\W", words.lower()): assert re.search(rf"(?<![^\W_]){w}", texts[href]), (href, w)


def test_search_of_a_word_that_is_misspelled(tab):
    tab.goto("/index.html")
    assert any(href.startswith("posterior.html") for href, _, _ in hits(tab, "postrior")[:3])
