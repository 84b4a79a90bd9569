"The site as a reader meets it: in a browser. One Chromium for all; each page is opened once, and what most tests ask is noted then."
import base64
import io
import json
import re
from collections import Counter
from importlib.resources import files
from urllib.parse import unquote, urlsplit

import pytest
from conftest import NO_BROWSER, NOTEBOOKS, equations, page_of

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(NO_BROWSER), reason=NO_BROWSER or "-")]
PAGES = [page_of(s) for s in NOTEBOOKS]
ANIMATED = [page_of(s) for s, p in NOTEBOOKS.items() if r'class=\"animation\"' in p.read_text(encoding="utf-8")]
SLID = [page_of(s) for s, p in NOTEBOOKS.items() if r'class=\"sliders\"' in p.read_text(encoding="utf-8")]

# Lazy pictures are loaded, solutions and folded code are opened: what a reader can open is looked at, too.
OPEN = """async () => {
  await window.MathJax?.startup?.promise;
  document.querySelectorAll("details").forEach(e => { e.open = true; });
  await Promise.all([...document.images].map(e => { e.loading = "eager"; return e.decode().catch(() => {}); }));
}"""
LOOK = r"""() => {
  const all = (what, root = document) => [...root.querySelectorAll(what)];
  const short = e => e.textContent.trim().replace(/\s+/g, " ").slice(0, 80);
  const text = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode())
    if (!walker.currentNode.parentElement.closest("pre, code, script, style, mjx-container")) text.push(walker.currentNode.data);
  const number = e => all("[data-c]", e).map(g => String.fromCodePoint(parseInt(g.dataset.c, 16))).join("");
  return {
    untypeset: all("span.math").filter(e => !e.querySelector("mjx-container svg")).map(short),
    raw: text.join(" ").match(/.{0,30}(?:\$\S|\\[A-Za-z]{2,}|\\[([]).{0,30}/g) || [],
    wrong: all("mjx-container").filter(e => e.querySelector("mjx-merror, merror, [data-mjx-error], [data-mml-node=merror], [fill=red]")).map(short),
    tags: all("svg[data-labels] > g > [data-mml-node=mtd], svg[data-labels] [data-mml-node=mtd]").map(number),
    math: all("span.math").length,
    cut: all("span.math.display").filter(e => e.scrollWidth > e.clientWidth + 1).map(short),
    images: all("img").map(e => ({src: e.src.slice(0, 80), width: e.naturalWidth, alt: e.alt})),
    ids: all("[id]").map(e => e.id),
    links: all("a[href]").map(e => new URL(e.getAttribute("href"), document.baseURI).href),   // an SVG's href is an object
    twice: all('.cell:has(a[style*="float:right"])').flatMap(c => all("p, ul, ol, pre, table, blockquote", c).map(e => [e, e.getBoundingClientRect()])
      .filter(([e, r]) => r.width > 1 && r.height > 1 && e.checkVisibility() && (c.nextElementSibling?.getBoundingClientRect().top ?? 1e9) < r.bottom
        && short(e) !== "source")).map(([e]) => short(e)),
  };
}"""
FRAME = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
# What is wider than the window, unless a box around it scrolls; formulas are boxes of their own.
WIDE = r"""() => {
  const root = document.documentElement, scrolls = e => e && e !== document.body && e !== root
    && (/auto|scroll|hidden/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  const wide = [...document.querySelectorAll("main, main *:not(mjx-container *)")].filter(e => e.getBoundingClientRect().right > root.clientWidth + 1
    && !scrolls(e.parentElement)).map(e => e.outerHTML.slice(0, 100));
  return [root.scrollWidth, wide.slice(0, 5)];
}"""
# The longest line of code, and of what it prints, that is wider than its box.
CUT = r"""() => [...document.querySelectorAll("main pre")].filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth)
  .map(e => e.innerText.split("\n").reduce((a, b) => b.length > a.length ? b : a, ""))"""
# What axe-core would do to thousands of colored words in code and of strokes in formulas takes minutes, and is the same for all of
# a kind: one word of each color stays in code, strokes go, and contrast is measured once for each set of colors, size and weight.
THIN = """() => {
  const seen = new Set(), drop = [];
  for (const e of document.querySelectorAll("pre code span")) {
    const box = e.closest("pre").parentElement, key = e.className + getComputedStyle(box).backgroundColor + box.parentElement.className;
    if (!e.className || seen.has(key)) drop.push(e); else seen.add(key);
  }
  drop.forEach(e => e.replaceWith(...e.childNodes));
  document.querySelectorAll("mjx-container svg").forEach(e => e.replaceChildren());
}"""
AXE = """async () => (await axe.run(document, {resultTypes: ["violations"], preload: false, rules: {"color-contrast": {enabled: false}}})).violations"""
CONTRAST = """async () => {
  const kinds = new Map();
  const ground = e => { for (; e; e = e.parentElement) { const s = getComputedStyle(e);
    if (s.backgroundImage !== "none" || !/, 0[)]$|transparent/.test(s.backgroundColor)) return s.backgroundColor + s.backgroundImage; } };
  const faint = e => e ? getComputedStyle(e).opacity * faint(e.parentElement) : 1;
  for (const e of document.body.querySelectorAll("*")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !e.checkVisibility({visibilityProperty: true})) continue;
    const s = getComputedStyle(e), key = [s.color, s.fontSize, s.fontWeight, s.textShadow, ground(e), faint(e)].join();
    if (!kinds.has(key)) kinds.set(key, e);
  }
  return (await axe.run({include: [...kinds.values()]}, {resultTypes: ["violations"], preload: false, runOnly: ["color-contrast"]})).violations;
}"""
SERIOUS = """vs => vs.filter(v => ["serious", "critical"].includes(v.impact))
  .flatMap(v => v.nodes.map(n => `${v.id}: ${n.html.slice(0, 120)} ${n.failureSummary.split("\\n")[1] || ""}`))"""


def look(context, name, html=None):
    "Open a page once, at 1300 pixels and then at 390, light and then dark, and note what the tests ask; `html` stands in for the page's file."
    page, seen = context.new_page(), {"said": [], "asked": []}
    try:
        page.on("console", lambda m: seen["said"].append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: seen["said"].append(f"exception: {e}"))
        page.on("request", lambda r: seen["asked"].append(r.url))
        if html: page.route(f"**/{name}", lambda route: route.fulfill(body=html, content_type="text/html"))
        page.goto(f"/{name}")
        page.evaluate(OPEN)
        seen |= page.evaluate(LOOK)
        seen["at 1300"] = page.evaluate(WIDE)
        page.set_viewport_size({"width": 1366, "height": 768})
        page.evaluate(FRAME)
        seen["code cut at 1366"] = page.evaluate(CUT)
        page.set_viewport_size({"width": 390, "height": 844})
        page.evaluate(FRAME)
        seen["at 390"] = page.evaluate(WIDE)
        page.set_viewport_size({"width": 1300, "height": 900})
        page.evaluate(FRAME)
        page.evaluate(THIN)
        page.evaluate((files("axe_playwright_python")/"axe.min.js").read_text(encoding="utf-8"))
        seen["light"] = page.evaluate(SERIOUS, page.evaluate(AXE) + page.evaluate(CONTRAST))
        page.emulate_media(color_scheme="dark", reduced_motion="reduce")
        if not html: page.wait_for_function("document.documentElement.classList.contains('quarto-dark')")
        seen["dark"] = page.evaluate(SERIOUS, page.evaluate(CONTRAST))
        return seen
    finally: page.close()


@pytest.fixture(scope="module")
def looking(browser, base):
    context = browser.new_context(base_url=base, viewport={"width": 1300, "height": 900}, reduced_motion="reduce", color_scheme="light")
    yield context
    context.close()


@pytest.fixture(scope="module")
def visit(looking, base, once):
    "What was noted on a page; each is opened once, by one of the workers, which differ in the address of their copy of the site."
    notes = {}
    def get(name):
        if name not in notes:
            there, seen = once(f"visit-{name}", lambda folder: (base, look(looking, name)))
            notes[name] = json.loads(json.dumps(seen).replace(there, base))
        return notes[name]
    return get


def elsewhere(seen, base): return [u for u in seen["asked"] if urlsplit(u).scheme not in ("data", "blob") and not u.startswith(f"{base}/")]


@pytest.mark.parametrize("name", PAGES)
def test_loads_in_silence(visit, base, name):
    "No error, no warning, no request to another host."
    seen = visit(name)
    assert not seen["said"] and not elsewhere(seen, base) and f"{base}/styles.css" in seen["asked"]


@pytest.mark.parametrize("name", PAGES)
def test_math_is_typeset(visit, pages, name):
    seen = visit(name)
    assert not seen["untypeset"] and not seen["raw"] and not seen["wrong"]
    assert bool(seen["math"]) == bool(pages[name].math)


@pytest.mark.parametrize("name", PAGES)
def test_formulas_fit_their_column(visit, name):
    "One that does not scrolls, and its number is out of sight."
    assert not visit(name)["cut"]


@pytest.mark.parametrize("number", equations())
def test_each_equation_is_numbered_once(visit, number):
    homes = [name for name in PAGES for tag in visit(name)["tags"] if tag == f"({number})"]
    assert len(homes) == 1, homes


def test_no_other_numbers(visit):
    assert Counter(t for name in PAGES for t in visit(name)["tags"]).keys() == {f"({n})" for n in equations()}


@pytest.mark.parametrize("name", PAGES)
def test_links_and_anchors(visit, base, name):
    "Also those that scripts add to a page."
    lost = []
    for path, _, anchor in {href.removeprefix(f"{base}/").partition("#") for href in visit(name)["links"] if href.startswith(base)}:
        if path == "live/one-file.html": continue                     # a file to take home (test_live.py)
        if path not in PAGES or anchor and unquote(anchor) not in visit(path)["ids"]: lost.append(f"{path}#{anchor}")
    assert not lost and len(visit(name)["links"]) > len(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_nothing_lies_over_the_code(visit, name):
    "Of nbdev's signature and docstring only the link to the source is in sight, and what stands below it is not covered."
    assert visit(name)["twice"] == []


@pytest.mark.parametrize("name", PAGES)
def test_pictures(visit, name): assert not [i for i in visit(name)["images"] if not i["width"] or len(i["alt"].strip()) < 10]


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [390, 1300])
def test_nothing_is_wider_than_the_window(visit, name, width):
    found, culprits = visit(name)[f"at {width}"]
    assert found <= width and not culprits


@pytest.mark.parametrize("name", PAGES)
def test_no_code_is_cut(visit, name):
    "On the smallest usual laptop; a reader should not have to scroll a line to its end."
    assert visit(name)["code cut at 1366"] == []


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible(visit, name, theme):
    "What axe-core calls serious or critical; in the dark, the contrast of colors."
    assert not visit(name)[theme]


TOY = r"""<!doctype html><html lang="en"><head><title>Toy</title><script>window.MathJax = {options: {enableMenu: false}};</script>
<script src="site_libs/mathjax/tex-svg-full.js" defer></script></head><body><main><h1>Toy</h1>
<p><span class="math inline">\(x\)</span> <span class="math display">\[y \tag{99}\]</span> <span class="math inline">\(\frac{z}\)</span>
<span class="math inline">\(\nosuchmacro\)</span> <span class="math inline">never typeset</span> and raw $\beta_t$ </p>
<p style="width: 500px">as wide as a desk</p> <p style="overflow: auto"><span style="display: block; width: 500px">in a box</span></p>
<p style="color: #999; background: #fff">pale</p> <p style="color: #003b4f; background: #212121">dark on dark</p>
<pre><code><span class="kw">for</span> <span class="kw">if</span> <span class="no" style="color: #ddd">pale code</span></code></pre>
<pre style="width: 40px; overflow: auto"><code>cut code</code></pre>
<div class="cell" style="height: 0"><p><a style="float:right" href="#">source</a></p><p>printed over code</p></div><div class="cell">code</div>
<span class="math display" style="display: block; overflow: auto; width: 50px">\[abcdefghijklmnopqrstuvwxyz\]</span>
<img src="none.png" alt="a picture that is not there"> <img src="http://nowhere.invalid/far.png"> <input type="range">
<script>console.warn("careful"); noSuchFunction()</script></main></body></html>"""


@pytest.fixture(scope="module")
def toy(looking): return look(looking, "faults.html", TOY)


def test_faults_are_seen(toy, base):
    "A page with one fault of each kind: what the tests above ask of a page can be answered with no."
    said = "\n".join(toy["said"])
    assert "warning: careful" in said and "noSuchFunction is not defined" in said and "404" in said
    assert elsewhere(toy, base) == ["http://nowhere.invalid/far.png"]
    assert toy["untypeset"] == ["never typeset"] and len(toy["raw"]) == 1 and r"$\beta_t$" in toy["raw"][0]
    assert len(toy["wrong"]) == 2 and toy["tags"] == ["(99)"] and len(toy["cut"]) == 1 and toy["math"] == 6
    assert [i["width"] for i in toy["images"]] == [0, 0] and toy["images"][1]["alt"] == ""
    assert toy["at 1300"] == [1300, []] and toy["at 390"][0] > 390 and len(toy["at 390"][1]) == 1 and "a desk" in toy["at 390"][1][0]
    assert toy["code cut at 1366"] == ["cut code"] and toy["twice"] == ["printed over code"]
    for theme in ("light", "dark"):
        for bad in (">pale<", "dark on dark", ">pale code<"): assert any("color-contrast" in v and bad in v for v in toy[theme]), bad
    assert Counter(v.partition(":")[0] for v in toy["light"])["image-alt"] == 1 and any(v.startswith("label:") for v in toy["light"])


def shown(tab, what):
    "Whether the whole of it is in the window, below the bar at the top."
    return tab.wait_for_function("""e => {
      const r = e.getBoundingClientRect(), bar = document.querySelector("#quarto-header").getBoundingClientRect().bottom;
      return r.height > 0 && r.top >= bar - 1 && r.bottom <= innerHeight; }""", arg=tab.locator(what).element_handle())


def settled(tab): tab.evaluate("window.MathJax?.startup?.promise")


FOLDS = """() => Object.fromEntries(["idea", "source", "check", "imports", "code"].map(kind => [kind, [...document.querySelectorAll("main details.code-fold")]
  .filter(e => (e.classList.contains("idea") ? "idea" : {E: "source", C: /^Check/.test(e.innerText) ? "check" : "code", I: "imports"}[e.innerText[0]]) === kind)
  .map(e => e.open)]))"""


def test_three_ways_to_read(tab):
    "A story shows the lines that are equations; code the exported source; everything the checks. The choice goes from page to page."
    tab.goto("/reverse.html")
    tab.wait_for_selector("html[data-read=story]")
    seen = tab.evaluate(FOLDS)
    assert seen["idea"] and all(seen["idea"]) and not any(sum((seen[k] for k in ("source", "check", "imports", "code")), []))
    assert len(seen["check"]) > 5 and len(seen["source"]) >= 2 and tab.locator("details.idea >> text=p_sample_loop").count()
    tab.get_by_role("button", name="code", exact=True).click()
    seen = tab.evaluate(FOLDS)
    assert all(seen["idea"] + seen["source"]) and not any(seen["check"] + seen["imports"])
    tab.get_by_role("button", name="everything").click()
    tab.goto("/bound.html")
    tab.wait_for_selector("html[data-read=everything]")
    assert all(sum(tab.evaluate(FOLDS).values(), []))
    tab.get_by_role("button", name="story").focus()
    tab.keyboard.press("Enter")
    assert tab.locator("[data-read=story][aria-pressed=true]").count() == 1 and not any(tab.evaluate(FOLDS)["check"])


def test_one_color_for_each_symbol(tab):
    "In formulas and in code the same; words for those who do not see colors; the equation that a link names is told."
    tab.goto("/reverse.html")
    tab.wait_for_selector("[data-symbol=theta]")
    fills = tab.evaluate("""() => Object.fromEntries(["x0", "xt", "eps", "theta"].map(k => [k, [...new Set([...document.querySelectorAll(`[data-symbol=${k}]`)]
      .map(e => getComputedStyle(e).fill))]]))""")
    assert all(len(colors) == 1 for colors in fills.values()) and len({c[0] for c in fills.values()}) == 4
    words = tab.evaluate("() => [...new Set([...document.querySelectorAll('[data-symbol] > title')].map(e => e.textContent))]")
    assert len(words) == 4 and any("the image after t steps" in w for w in words)
    code = tab.evaluate("() => getComputedStyle(document.querySelector('main pre .s-xt')).color")
    assert code == fills["xt"][0]
    symbols = tab.evaluate("""() => [...document.querySelectorAll("#algorithm-2 ~ *, #algorithm-2 [data-symbol]")].map(e => e.dataset.symbol).filter(Boolean)""")
    assert {"xt", "x0", "theta"} <= set(symbols)
    assert tab.locator("a[title='the reverse process']").count() and tab.locator("a[title='jump to any step']").count()


def test_without_scripts_nothing_is_folded_that_a_reader_needs(browser, base):
    context = browser.new_context(base_url=base, java_script_enabled=False)
    try:
        tab = context.new_page()
        tab.goto("/forward.html")
        assert not tab.locator(".reading").is_visible()
        shut = [e.inner_text() for e in tab.locator("main details.code-fold:not([open]) > summary").all()]
        assert shut and "Exported source" not in shut and tab.locator("main details.code-fold[open]").count() > 5, shut
    finally: context.close()


def test_sidebar_and_neighbors_lead_on(tab):
    tab.goto("/index.html")
    tab.click("#quarto-sidebar >> text=3 The posterior: the ideal step back")
    tab.wait_for_url("**/posterior.html")
    assert tab.locator("#quarto-sidebar [aria-current=page]").inner_text() == "3 The posterior: the ideal step back"
    tab.click(".nav-page-next a")
    tab.wait_for_url("**/toy.html")
    tab.click(".nav-page-previous a")
    tab.wait_for_url("**/posterior.html")


@pytest.mark.parametrize("name", ["schedule.html", "run.html"])
def test_sidebar_shows_where_one_is(tab, name):
    "The first entries and the last ones are screens apart."
    tab.goto(f"/{name}")
    settled(tab)
    tab.wait_for_function("""() => {
      const [bar, here] = [document.getElementById("quarto-sidebar"), document.querySelector("#quarto-sidebar .active")].map(e => e.getBoundingClientRect());
      return here.top >= bar.top && here.bottom <= Math.min(bar.bottom, innerHeight);
    }""")


def test_sections_of_the_sidebar_fold_by_key(tab):
    tab.goto("/index.html")
    section, entry = tab.locator("#quarto-sidebar >> text=The argument"), tab.locator("#quarto-sidebar >> text=1 The noise schedule")
    section.locator("xpath=..").focus()
    assert entry.is_visible()
    tab.keyboard.press("Enter")
    entry.wait_for(state="hidden")
    tab.keyboard.press("Enter")
    entry.wait_for(state="visible")


def test_sidebar_on_a_phone(tab):
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.goto("/index.html")
    entry = tab.locator("#quarto-sidebar >> text=3 The posterior: the ideal step back")
    assert not entry.is_visible()
    tab.click(".quarto-btn-toggle")
    entry.click()
    tab.wait_for_url("**/posterior.html")
    assert not entry.is_visible()


def test_mentions_of_equations_lead_to_them(tab, pages):
    "From another page and on the page itself; typesetting, which moves everything, does not lose the place."
    home = next(name for name, page in pages.items() if "eq-7" in page.ids)
    tab.goto("/index.html")
    tab.click(f"main a[href='{home}#eq-7'] >> nth=0")
    tab.wait_for_url(f"**/{home}#eq-7")
    settled(tab)
    shown(tab, "#eq-7")
    tab.evaluate("scrollTo(0, document.body.scrollHeight)")
    mention = tab.locator("main a[href='#eq-7']").last
    mention.click()
    shown(tab, "#eq-7")


def test_deep_links_are_in_sight_after_typesetting(tab):
    tab.goto("/posterior.html#exercises")
    settled(tab)
    shown(tab, "#exercises > h2")


def test_what_is_printed_in_columns_scrolls_by_key(tab):
    "Code has its lines broken on a phone; a printed table would be no table then."
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.goto("/ablation.html")
    settled(tab)
    box = tab.locator("main .cell-output pre[tabindex='0']").first
    box.focus()
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("e => e.scrollLeft > 0", arg=box.element_handle())


@pytest.mark.parametrize("by", ["key", "click"])
def test_search_finds_and_opens(tab, by):
    tab.goto("/index.html")
    tab.keyboard.press("/")
    tab.keyboard.type("posterior")
    first = tab.locator(".search-result").first
    first.wait_for()
    title, href = first.locator(".search-result-title").inner_text(), first.get_attribute("href")
    assert "posterior" in title.lower() and href.startswith("./posterior.html")
    first.click() if by == "click" else tab.keyboard.press("Enter")
    tab.wait_for_url(f"**/{href.removeprefix('./')}")
    assert "posterior" in tab.locator("main h1").inner_text().lower()


def test_search_says_when_there_is_nothing(tab):
    tab.goto("/index.html")
    tab.fill("[type=search]", "zqxjzqxjzqxj")
    tab.wait_for_selector("text=No results")


@pytest.mark.parametrize("prefers", ["light", "dark"])
def test_theme(tab, prefers):
    "It follows the reader's system until the button is pressed; the choice holds on the next page and over a reload."
    colors = "JSON.stringify(['backgroundColor', 'color'].map(k => getComputedStyle(document.body)[k]))"
    tab.emulate_media(color_scheme=prefers)
    tab.goto("/index.html")
    def dark(is_so): tab.wait_for_function(f"document.documentElement.classList.contains('quarto-dark') === {str(is_so).lower()}")
    dark(prefers == "dark")
    before = tab.evaluate(colors)
    tab.click(".quarto-color-scheme-toggle")
    dark(prefers != "dark")
    after = tab.evaluate(colors)
    assert before != after
    for go in (tab.reload, lambda: tab.goto("/weighting.html")):
        go()
        dark(prefers != "dark")
        assert tab.evaluate(colors) == after
    tab.click(".quarto-color-scheme-toggle")
    dark(prefers == "dark")
    assert tab.evaluate(colors) == before


@pytest.mark.parametrize("name", ANIMATED)
def test_animations_play(tab, name):
    "Each on its page: still until it is started, then picture and slider move, and they stop."
    tab.emulate_media(reduced_motion="no-preference")
    tab.goto(f"/{name}")
    settled(tab)
    players = tab.locator(".animation").all()
    assert players
    for player in players:
        player.scroll_into_view_if_needed()
        handle = player.element_handle()
        tab.wait_for_function("e => e.querySelector('img').naturalWidth > 0", arg=handle)
        def state(): return tab.evaluate("e => [e.querySelector('img').src, e.querySelector('[type=range]').value]", handle)
        still = state()
        tab.wait_for_timeout(300)
        assert state() == still, "moves by itself"
        player.locator("button[title=Play]").click()
        tab.wait_for_function("""([e, src, value]) => e.querySelector('img').src !== src && e.querySelector('[type=range]').value !== value""",
                              arg=[handle, *still])
        player.locator("button[title=Pause]").click()
        still = state()
        tab.wait_for_timeout(500)
        assert state() == still, "does not stop"


PIXELS = """e => { const c = e.querySelector("canvas"), n = c.width*c.height, p = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
  return [[c.height, c.width], [...Array(n*3).keys()].map(k => p[4*Math.floor(k/3) + k%3])]; }"""
STOPPED = """e => [e.querySelector("canvas, img").tagName, e.querySelector("canvas, img").getAttribute("aria-label"), e.querySelectorAll("img").length]"""


@pytest.mark.parametrize("name", SLID)
def test_sliders_choose_pictures(tab, name):
    "Each on its page, by key: what is seen is the tile of the sprite that belongs there, and the place is said in sight and aloud."
    import numpy as np
    from PIL import Image
    tab.goto(f"/{name}")
    settled(tab)
    boxes = tab.locator(".sliders").all()
    assert boxes
    for box in boxes:
        box.scroll_into_view_if_needed()
        handle = box.element_handle()
        tab.wait_for_function("e => e.querySelector('canvas')", arg=handle)
        kind, said, images = handle.evaluate(STOPPED)
        assert kind == "CANVAS" and len(said) >= 10 and images == 0       # the picture of the start has given way
        code = handle.evaluate("e => e.querySelector('script').textContent")
        sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([\w+/=]+)", code)[1]))).convert("RGB"))
        inputs = box.locator("input").all()
        labels = [json.loads(row.get_attribute("data-labels")) for row in box.locator(".sliders-row").all()]
        def seen():
            size, values = handle.evaluate(PIXELS)
            return np.array(values, np.uint8).reshape(*size, 3)
        def expected(places):
            h, w = handle.evaluate(PIXELS)[0]
            k, ncol = (places[0] if len(places) == 1 else places[0]*len(labels[1]) + places[1]), sheet.shape[1]//w
            return sheet[k//ncol*h:, k % ncol*w:][:h, :w]
        places = [int(i.input_value()) for i in inputs]
        assert (seen() == expected(places)).all()
        for i, key in [(0, "Home"), (len(inputs)-1, "End"), (len(inputs)-1, "ArrowLeft"), (0, "ArrowRight"), (0, "End")]:
            inputs[i].focus()
            tab.keyboard.press(key)
            last = len(labels[i])-1
            places[i] = {"Home": 0, "End": last, "ArrowLeft": max(0, places[i]-1), "ArrowRight": min(last, places[i]+1)}[key]
            assert [int(e.input_value()) for e in inputs] == places and (seen() == expected(places)).all(), (key, places)
            for e, of, place, row in zip(inputs, labels, places, box.locator(".sliders-row").all()):
                assert e.get_attribute("aria-valuetext").endswith(f" = {of[place]}")
                assert " ".join(row.inner_text().split()) == e.get_attribute("aria-valuetext")


def test_the_bar_of_the_workshop(tab):
    "By hand: the bar stands where its sliders say, with the gray that they say."
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.goto("/plot.html")
    settled(tab)
    box = tab.locator("#sliders_a_20_bar")
    box.scroll_into_view_if_needed()
    tab.wait_for_function("e => e.querySelector('canvas')", arg=box.element_handle())
    for i, at in ((0, .25), (1, .02), (0, .98)):
        slider = box.locator("input").nth(i)
        where = slider.bounding_box()
        slider.click(position={"x": at*where["width"], "y": where["height"]/2})
        place, gray = (int(e.get_attribute("aria-valuetext").rpartition(" ")[2]) for e in box.locator("input").all())
        (h, w), values = box.element_handle().evaluate(PIXELS)
        row = values[4*w*3:5*w*3:3]
        assert (h, w) == (10, 14) and row == [230, *([255]*place), gray, *([255]*(11-place)), 230]
    assert (place, gray) == (11, 0)
    width = box.locator("canvas").bounding_box()["width"]
    assert 14*14 - 1 <= width <= 390


def test_sliders_without_a_script(browser, base):
    "The picture of the start is there, with its description, and the names of the sliders with their values."
    context = browser.new_context(base_url=base, java_script_enabled=False)
    try:
        page = context.new_page()
        page.goto("/plot.html")
        box = page.locator("#sliders_a_20_bar")
        picture = box.locator("img")
        assert picture.is_visible() and picture.bounding_box()["width"] == 14*14 and "bar" in picture.get_attribute("alt")
        assert " ".join(box.locator(".sliders-rows").inner_text().split()) == "place = 6 gray = 128"
    finally: context.close()


NUMBERS = "e => Object.fromEntries([...e.querySelectorAll('[data-out]')].map(d => [d.dataset.out, [+d.dataset.value, d.textContent]]))"
SET = """(e, [name, value]) => { const i = e.querySelector(`[data-in=${name}]`); i.value = value; i.dispatchEvent(new Event('input', {bubbles: true})); }"""


@pytest.mark.parametrize("x0, t, eps", [(.7, 150, -.8), (-1, 1, 2.5), (.33, 2, 0), (0, 1000, -3), (1, 500, 1.07)])
def test_the_pixel_to_play_with(tab, x0, t, eps):
    "What the browser computes on the forward page is what the package computes."
    import torch
    from ddpm_nbdev.forward import q_mean_variance, q_sample
    from ddpm_nbdev.posterior import q_posterior_mean_variance
    from ddpm_nbdev.schedule import linear_schedule
    tab.goto("/forward.html")
    box = tab.locator(".q-explorer").element_handle()
    for name, value in (("x0", x0), ("t", t), ("eps", eps)): box.evaluate(SET, [name, value])
    sched, step = linear_schedule(), torch.tensor([t])
    image, noise = (torch.full((1, 1), float(v), dtype=torch.float64) for v in (x0, eps))
    xt = q_sample(sched, image, step, noise)
    mean, variance = q_mean_variance(sched, image, step)
    posterior_mean, posterior_variance = q_posterior_mean_variance(sched, image, xt, step)
    expected = dict(beta=sched.beta[t], alpha_bar=sched.alpha_bar[t], xt=xt, mean=mean, variance=variance,
                    posterior_mean=posterior_mean, posterior_variance=posterior_variance)
    found = box.evaluate(NUMBERS)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        exact, text = found[name]
        assert exact == pytest.approx(value.item(), rel=1e-9, abs=1e-12), name
        assert float(text.replace("\N{MINUS SIGN}", "-")) == pytest.approx(exact, rel=1e-3, abs=5.1e-6), name


def test_the_pixel_moves(tab):
    "By key as well as by hand: numbers, curves and the dot change; at t = 1 the posterior has no width."
    tab.goto("/forward.html")
    box = tab.locator(".q-explorer").element_handle()
    def state(): return box.evaluate("e => [...e.querySelectorAll('path[class], circle')].map(p => (p.getAttribute('d') || '') + p.getAttribute('cx'))")
    numbers, drawn = box.evaluate(NUMBERS), state()
    tab.locator(".q-explorer [data-in=t]").focus()
    tab.keyboard.press("ArrowRight")
    moved = box.evaluate(NUMBERS)
    assert all(moved[name] != numbers[name] for name in numbers) and all(a != b for a, b in zip(drawn[:2], state()))
    tab.keyboard.press("Home")
    assert box.evaluate(NUMBERS)["posterior_variance"][0] == 0 and "NaN" not in "".join(state())


def test_code_is_copied(tab):
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.goto("/posterior.html")
    box = tab.locator(".code-copy-outer-scaffold", has_text="def q_posterior_mean_variance").last
    box.hover()
    box.locator(".code-copy-button").click()
    tab.wait_for_selector(".code-copy-button-checked")
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert "def q_posterior_mean_variance(" in copied and copied.strip() == box.locator("pre code").inner_text().strip()
    compile(copied, "copied", "exec")
