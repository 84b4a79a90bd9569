"What the site's own scripts and styles do for a reader, in Chromium: where one is, search, keys, narrow windows, print."
import json
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import ThreadingHTTPServer

import pytest
from conftest import NO_BROWSER, NOTEBOOKS, ROOT, Quiet, build, page_of
from test_site import PIXEL, cell, project, shown

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(NO_BROWSER), reason=NO_BROWSER or "-")]
PAGES = [page_of(s) for s in NOTEBOOKS]
LESSONS = [s for s in NOTEBOOKS if re.match(r"(0[1-9]|1[0-9])_|live$|before$", s)]
FRAME = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"



@pytest.fixture(scope="module")
def toy_captions(tmp_path_factory):
    "The address of a page with formulas in a caption, built by the tool."
    cap = r'#| fig-cap: "The signal $\bar\alpha_t$ and \(x_{t-1}\) of `eps`, for $5 and $6"'.replace("\\", "\\\\")
    root = project(tmp_path_factory.mktemp("captions"), {"index": [cell("# Toy\n> A toy.", "markdown"), cell(f"{cap}\n1", outputs=shown("image/png", PIXEL))]})
    res = build(root, root/"_docs")
    assert set(res.stderr.splitlines()) <= {"styles.css: live/live.css does not exist"}, res.stderr    # the toy has nothing that lives
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root/"_docs")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()
    server.server_close()


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
    texts = {e["href"]: " ".join([e["href"], e["title"], e["section"] or "", e["text"]]).lower() for e in json.loads((site/"search.json").read_text(encoding="utf-8"))}
    tab.goto("/index.html")
    found = hits(tab, words)
    assert found[0][0].startswith(first), found[:3]
    for href, _, _ in found:
        for w in re.split(r"\W", words.lower()): assert re.search(rf"(?<![^\W_]){w}", texts[href]), (href, w)


def test_search_of_no_word_and_of_a_whole_page_does_not_take_longer(tab):
    "Signs are no words; a Greek letter is its name; what nobody types is not looked for alike, which takes seconds and more."
    tab.goto("/index.html")
    def search(words, what):
        tab.fill("[type=search]", "")
        tab.wait_for_selector(".smalldocs-search-results:not(.show)", state="attached")
        start = tab.evaluate("performance.now()")
        tab.fill("[type=search]", words)
        tab.wait_for_selector(what)
        return tab.evaluate("performance.now()") - start
    search("posterior", ".search-result")                                        # the index is there
    alike = search("zqxjzqxjzqxj", "text=No results")
    for words in (".*", "::"): search(words, "text=No results")
    assert search("zqxj"*125, "text=No results") < alike + 2000                 # was 40 times as long
    search("noise "*300, ".search-result")
    search("β_t", ".search-result")


@pytest.mark.parametrize("stored", ["constructor", "__proto__", "all", ""])
def test_a_mode_that_is_none_is_the_story(tab, stored):
    tab.goto("/posterior.html")
    tab.evaluate("v => localStorage.setItem('read', v)", stored)
    tab.reload()
    assert tab.evaluate("document.documentElement.dataset.read") == "story"


def test_an_address_of_a_name_opens_its_source(tab):
    tab.goto("/schedule.html#quadratic_schedule")
    tab.wait_for_function("""[...document.querySelectorAll("details.code-fold[open] code")].some(e => /^def quadratic_schedule/m.test(e.textContent))""")
    tab.goto("/schedule.html#%")
    assert tab.locator("main h1").inner_text()


def test_search_of_a_word_that_is_misspelled(tab):
    tab.goto("/index.html")
    assert any(href.startswith("posterior.html") for href, _, _ in hits(tab, "postrior")[:3])


# --- keys and fingers


def test_skip_link(tab):
    "The first stop of the tab key is seen and leads past the bars; the next stop is in the text."
    tab.goto("/forward.html")
    tab.keyboard.press("Tab")
    link = tab.locator(":focus")
    assert link.inner_text() == "Skip to the text" and link.bounding_box()["y"] >= 0
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.closest('main') !== null")
    assert tab.locator(".skip").bounding_box()["y"] < -10


@pytest.mark.parametrize("name", ["index.html", "forward.html"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_focus_is_seen(tab, name, theme):
    "Every stop of the tab key has a frame, in the bar at the top, in the sidebar and in the text."
    tab.emulate_media(color_scheme=theme)
    tab.goto(f"/{name}")
    seen = set()
    for start in ("body", "main", "main .cell-output, main pre"):
        tab.evaluate("w => { const e = document.querySelector(w); e.tabIndex = -1; e.focus(); }", start)
        for _ in range(12):
            tab.keyboard.press("Tab")
            tag, style, width, frame, ground = tab.evaluate("""() => { const e = document.activeElement, s = getComputedStyle(e);
              let under = e.parentElement, ground = v => getComputedStyle(v).backgroundColor;
              while (ground(under).endsWith(", 0)")) under = under.parentElement;
              return [e.outerHTML.slice(0, 60), s.outlineStyle, parseFloat(s.outlineWidth), s.outlineColor, ground(under)]; }""")
            assert style == "solid" and width >= 2 and frame != ground, tag
            seen.add(tag)
    assert len(seen) > 15


@pytest.fixture
def phone(browser, base):
    "A fresh page on a phone: 390 pixels, a finger instead of a mouse."
    context = browser.new_context(base_url=base, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, reduced_motion="reduce")
    context.set_default_timeout(15_000)
    yield context.new_page()
    context.close()


def test_contents_on_a_phone(phone):
    "Folded at the top of the text, and complete; beside the text, where there is room, and only there."
    phone.goto("/reverse.html")
    box = phone.locator("main .contents details")
    assert box.is_visible() and box.get_attribute("open") is None and box.bounding_box()["y"] < 600
    box.locator("summary").tap()
    link = box.get_by_text("Four variances", exact=True)
    link.tap()
    phone.wait_for_url("**/reverse.html#four-variances")
    names = "w => [...document.querySelectorAll(w)].map(e => e.textContent)"
    assert phone.evaluate(names, ".contents a") == phone.evaluate(names, "#TOC a")
    for width, beside in ((1366, True), (1240, True), (1100, False), (700, False)):
        phone.set_viewport_size({"width": width, "height": 844})
        assert phone.locator("#TOC").is_visible() is beside and phone.locator("main .contents").is_visible() is not beside, width


def test_a_finger_copies_code(phone):
    phone.goto("/posterior.html")
    phone.context.grant_permissions(["clipboard-read", "clipboard-write"])
    box = phone.locator("details[open] .code-copy-outer-scaffold").first
    button = box.locator(".code-copy-button")
    assert button.evaluate("e => getComputedStyle(e).opacity") == "1" and min(button.bounding_box()[k] for k in ("width", "height")) >= 36
    button.tap()
    phone.wait_for_selector(".code-copy-button-checked")
    assert phone.evaluate("navigator.clipboard.readText()").strip()


def test_an_equation_that_is_named_is_told_by_key(tab):
    tab.goto("/reverse.html")
    link = tab.locator("main p a[title='jump to any step']").first
    told = "e => getComputedStyle(e, '::after').content"
    assert link.evaluate(told) == "none"
    tab.keyboard.press("Tab")                       # a key was pressed last: focus is one of the keyboard
    link.focus()
    assert "jump to any step" in link.evaluate(told)


# --- nothing is cut

OPENED = """async () => {
  await window.MathJax?.startup?.promise;
  document.querySelectorAll("details").forEach(e => { e.open = true; });
  await Promise.all([...document.images].map(e => { e.loading = "eager"; return e.decode().catch(() => {}); }));
}"""
# Blocks that are wider than the column; those that scroll in a box of their own are named apart, with whether that shows.
CUT = r"""() => {
  const cut = [], scroll = [], edge = document.querySelector("main").getBoundingClientRect().right + 2;
  for (const e of document.querySelectorAll("main :is(pre, table, .sd-table, .math.display, .math.alone, img, figure, canvas, .live, .sliders, .animation), main svg:not(mjx-container svg)")) {
    const r = e.getBoundingClientRect();
    if (!r.width || !e.checkVisibility()) continue;
    const kind = e.matches("pre") ? "pre" : e.matches("table, .sd-table") ? "table" : e.matches(".math") ? "formula" : "figure";
    const words = `${kind} ${e.scrollWidth} ${e.textContent.trim().slice(0, 60)}`;
    const box = e.closest("pre, .sd-table, .math.display, .math.alone"), scrolls = box && box.scrollWidth > box.clientWidth + 1;
    if (box && /auto|scroll/.test(getComputedStyle(box).overflowX) && scrolls) {
      if (e === box) scroll.push([kind, getComputedStyle(box).maskImage !== "none", box.tabIndex === 0, e.matches(".columns"), words]);
    } else if (scrolls || r.right > edge) cut.push(words);
  }
  return [cut, scroll];
}"""
# The longest line of code that is broken although it has no more columns than it may have.
BROKEN = """([code, printed]) => {
  const rule = document.createElement("style"), bad = [];
  const boxes = [...document.querySelectorAll("main pre")].filter(e => e.checkVisibility());
  rule.textContent = "main pre, main pre code, main pre code.sourceCode { white-space: pre !important; }";
  document.head.append(rule);
  for (const e of boxes) {
    const most = e.closest(".cell-output") ? printed : code, longest = Math.max(...e.textContent.split("\\n").map(v => v.length));
    if (longest <= most && e.scrollWidth > e.clientWidth + 1) bad.push([longest, e.textContent.slice(0, 60)]);
  }
  rule.remove();
  return bad;
}"""


@pytest.fixture(scope="module")
def measured(browser, base):
    "What is cut, what scrolls and what is broken on a page, at three widths, with everything opened."
    context = browser.new_context(base_url=base, viewport={"width": 1366, "height": 768}, reduced_motion="reduce")
    context.add_init_script("localStorage.setItem('read', 'everything')")
    page, notes = context.new_page(), {}
    def get(name):
        if name in notes: return notes[name]
        page.set_viewport_size({"width": 1366, "height": 768})
        page.goto(f"/{name}")
        page.evaluate(OPENED)
        notes[name] = {}
        for width in (1366, 1024, 390):
            page.set_viewport_size({"width": width, "height": 844})
            page.evaluate(FRAME)
            page.evaluate(FRAME)
            notes[name][width] = (*page.evaluate(CUT), page.evaluate(BROKEN, [88, 100]))
        return notes[name]
    yield get
    context.close()


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_cut(measured, name):
    "On a laptop and on a tablet nothing scrolls sideways; on a phone formulas, tables and what is printed as one do, and show it."
    for width, (cut, scroll, _) in measured(name).items():
        assert not cut, (width, cut)
        assert width == 390 or not scroll, (width, scroll)
        for kind, shows, by_key, columns, words in scroll: assert shows and by_key and (kind in ("table", "formula") or columns), (width, words)


@pytest.mark.parametrize("name", PAGES)
def test_lines_of_code_stay_whole(measured, name):
    "On a laptop 88 columns of code fit and 100 of what it prints, on a tablet too; they need not be broken."
    for width in (1366, 1024):
        assert not measured(name)[width][2], width


@pytest.mark.parametrize("name", ["ablation.html", "bound.html"])
def test_the_end_of_what_scrolls_has_no_shade(phone, name):
    phone.goto(f"/{name}")
    phone.evaluate("window.MathJax?.startup?.promise")
    phone.evaluate(FRAME)
    box = phone.locator("main .more").first
    handle = box.element_handle()
    handle.evaluate("e => { e.scrollLeft = e.scrollWidth; }")
    phone.wait_for_function("e => getComputedStyle(e).maskImage === 'none'", arg=handle)


# --- figures and frames


def test_captions_start_at_the_left_and_formulas_in_them_are_typeset(tab, toy_captions):
    tab.goto("/reverse.html")
    assert set(tab.evaluate("[...document.querySelectorAll('.quarto-figure figcaption')].map(e => getComputedStyle(e).textAlign)")) == {"left"}
    tab.goto(toy_captions)
    tab.evaluate("window.MathJax?.startup?.promise")
    caption = tab.locator("figcaption").first
    assert caption.locator("mjx-container svg").count() == 2 and caption.locator("code").inner_text() == "eps"
    assert "for $5 and $6" in caption.inner_text() and caption.inner_text().count("$") == 2 and "\\" not in caption.inner_text()
    alt = tab.locator("img").first.get_attribute("alt")
    assert alt == "The signal \u03b1_t and x_{t-1} of eps, for $5 and $6".replace("{", "").replace("}", ""), alt


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_algorithms_are_as_dark_as_the_text(tab, theme):
    tab.emulate_media(color_scheme=theme)
    tab.goto("/reverse.html")
    colors = tab.evaluate("['main blockquote', 'main blockquote p', 'body'].map(w => getComputedStyle(document.querySelector(w)).color)")
    assert len(set(colors)) == 1


def test_pictures_are_not_stretched(tab):
    "None is drawn with more pixels than it has; in the dark each lies on white, also one that is transparent."
    tab.emulate_media(color_scheme="dark")
    for name in ("reverse.html", "quality.html", "index.html"):
        tab.goto(f"/{name}")
        tab.evaluate(OPENED)
        assert not tab.evaluate("""[...document.querySelectorAll("main img")].filter(e => e.naturalWidth && e.getBoundingClientRect().width > e.naturalWidth + 1
          && getComputedStyle(e).imageRendering !== "pixelated").map(e => e.alt)"""), name
        grounds = tab.evaluate("[...document.querySelectorAll('main .cell-output-display img')].map(e => getComputedStyle(e).backgroundColor)")
        assert set(grounds) <= {"rgb(255, 255, 255)"}


# --- print


def test_on_paper_there_is_only_the_text(tab):
    "No bars, no folded lines that cannot be opened, links like text, figures in one piece; what a story shows is there."
    tab.set_viewport_size({"width": 700, "height": 990})
    tab.goto("/reverse.html")
    tab.wait_for_selector("html[data-read=story]")
    tab.emulate_media(media="print")
    for bar in ("#quarto-header", "#quarto-sidebar", "#quarto-margin-sidebar", ".contents", ".reading", ".notebook-links", ".page-navigation", ".skip"):
        assert not tab.locator(bar).first.is_visible(), bar
    assert tab.locator("main details.idea pre").first.is_visible() and not tab.get_by_text("Check, which passes").first.is_visible()
    assert tab.evaluate("getComputedStyle(document.querySelector('main p a')).color === getComputedStyle(document.querySelector('main p')).color")
    assert tab.evaluate("[...document.querySelectorAll('main figure, main img')].every(e => getComputedStyle(e).breakInside === 'avoid')")
    box = tab.locator("main").bounding_box()
    assert box["x"] < 20 and box["width"] > 650
    assert tab.pdf(format="A4", print_background=True)[:5] == b"%PDF-"


def test_what_is_read_in_the_dark_is_printed_dark_on_white(tab):
    tab.emulate_media(color_scheme="dark")
    tab.goto("/reverse.html")
    tab.wait_for_selector("html.quarto-dark")
    tab.emulate_media(color_scheme="dark", media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    pale = tab.evaluate("""[...document.querySelectorAll("main :is(h1, h2, p, li, td, figcaption, pre, pre span, summary)")].filter(e => e.checkVisibility())
      .filter(e => { const [r, g, b] = getComputedStyle(e).color.match(/[\\d.]+/g).map(Number); return .3*r + .6*g + .1*b > 150; }).map(e => e.outerHTML.slice(0, 80))""")
    assert pale == []


# --- the living page

FRAMES = """ms => new Promise(done => {
  const gaps = [], start = performance.now();
  let last = start;
  requestAnimationFrame(function frame(now) {
    gaps.push(now - last);
    last = now;
    if (performance.now() - start < ms) requestAnimationFrame(frame); else done(gaps.slice(1).sort((a, b) => a - b));
  });
})"""


def test_a_chain_that_runs_leaves_the_page_at_its_pace(tab):
    "The network computes beside the page: of frames and of long tasks there are no other than before. Other programs can stop a tab for a while, but not three times."
    for attempt in range(3):
        tab.goto("/live.html")
        place = tab.locator(".live[data-part=digit]")
        place.scroll_into_view_if_needed()
        run = place.get_by_role("button", name="Run", exact=True)
        run.wait_for()
        tab.wait_for_timeout(500)
        place.get_by_text("Start from pure noise").click()
        before = tab.evaluate(FRAMES, 1500)
        tab.evaluate("""() => { window.long = []; new PerformanceObserver(l => l.getEntries().forEach(e => long.push(e.duration))).observe({type: "longtask"}); }""")
        run.click()
        during = tab.evaluate(FRAMES, 1500)
        moved = place.get_attribute("data-t")
        assert 0 < int(moved) < 1000 or moved == "0"
        median, was = during[len(during)//2], before[len(before)//2]
        long = [d for d in tab.evaluate("long") if d > max(50, 3*before[-1])]
        if median <= max(17.5, 1.5*was) and not long: return
    raise AssertionError((median, was, long))


def test_pdf_of_a_page(site, tmp_path):
    "Its text is text, and its sections are bookmarks; a page that is not there is named in one line."
    pypdf = pytest.importorskip("pypdf")
    tool = [sys.executable, ROOT/"tools"/"make_pdf", tmp_path/"a.pdf", "--site", site, "--pages"]
    res = subprocess.run([*tool, "posterior"], text=True, capture_output=True)
    assert res.returncode == 0 and "MB" in res.stdout, res.stderr
    pdf = pypdf.PdfReader(tmp_path/"a.pdf")
    text = " ".join(" ".join(page.extract_text().split()) for page in pdf.pages)
    assert "If we knew the clean image, what would the ideal step back be?" in text and "def q_posterior_mean_variance" in text
    assert "Open in Colab" not in text and pdf.outline[0].title == "The posterior" and len(pdf.outline) == 2
    res = subprocess.run([*tool, "nowhere"], text=True, capture_output=True)
    assert res.returncode == 1 and "nowhere.html: build the site first" in res.stderr and len(res.stderr.splitlines()) == 1
