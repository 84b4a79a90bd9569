"The living network: the page's JavaScript beside the package, under Node and in a browser, and what a reader does with it."
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import NO_BROWSER, ROOT

from ddpm_nbdev.bound import prior_kl, vlb_terms
from ddpm_nbdev.data import load_dataset
from ddpm_nbdev.ddpm import DDPM, draw_samples
from ddpm_nbdev.decoder import discretized_gaussian_log_likelihood, to_model_range
from ddpm_nbdev.likelihood import even_steps, stride
from ddpm_nbdev.noise import indexed_noise, subseed
from ddpm_nbdev.toy import GaussianMixture, exact_eps

LIVE = ROOT/"nbs/live"
NODE = shutil.which("node")


def in_browser(test): return pytest.mark.browser(pytest.mark.skipif(bool(NO_BROWSER), reason=NO_BROWSER or "-")(test))


KINDS = [("beta", 1000), ("beta_tilde", 1000), ("optimal", 1000), ("beta_tilde", 50), ("optimal", 20), ("beta", 1)]

# What the module answers to the questions of `asked`; the text of a function of (D, files, asked).
ANSWERS = """(D, weights, text, asked) => {
  const config = JSON.parse(text), net = D.unet(config.model.args, D.readSafetensors(weights)), list = x => Array.from(x);
  const calls = asked.calls.map(({x, t}) => list(net(Float64Array.from(x), t)));
  const noise = t => D.indexedNoise(asked.key, 3, t, 64), sched = D.linearSchedule(config.schedule.args);
  let x = noise(1001);
  for (let t = 1000; t > 0; t--) x = D.pSample(D.pMeanVariance(sched, x, t, net(x, t)), t, noise(t));
  const x0 = Float64Array.from(asked.x0), mse = config.mse.values;
  const terms = asked.terms.map(({kind, steps, t}) => {
    const s = D.linearSchedule(config.schedule.args, steps), eps = D.indexedNoise(9, 2, t, 64), xt = D.qSample(s, x0, t, eps);
    return D.boundTerm(s, x0, xt, t, net(xt, s.net[t]), kind, config.levels, mse);
  });
  const tails = asked.tails.map(([x, mean, sigma, levels]) => D.decoderCost(Float64Array.of(x), Float64Array.of(mean), sigma, levels)[0]);
  const plane = list(D.exactEps(sched, asked.centers, asked.std, Float64Array.from(asked.points), asked.at));
  return {calls, noise: list(noise(7)), chain: list(x), terms, prior: D.priorTerm(sched, x0), tails, plane};
}"""


@pytest.fixture(scope="module")
def ddpm(): return DDPM.from_pretrained("digits")


@pytest.fixture(scope="module")
def asked():
    g = torch.Generator().manual_seed(0)
    ts = [1, 1000, *torch.randint(1, 1001, (18,), generator=g).tolist()]
    data = load_dataset("digits")
    return {"calls": [{"x": torch.randn(64, generator=g).tolist(), "t": t} for t in ts], "key": subseed(0, 2),
            "x0": to_model_range(data.test[5], data.levels).flatten().tolist(),
            "terms": [{"kind": kind, "steps": k, "t": t} for kind, k in KINDS for t in (1, 2, 3, 11, 40, 50, 700, 1000) if t <= k],
            "tails": [[-1., 3., .1, 17], [1., -2., .05, 17], [.5, -1., .02, 17], [0., .9, .3, 256], [.25, .25, 1e-3, 17]],
            "centers": torch.rand(7, 2, generator=g).tolist(), "std": .02, "points": torch.randn(20, generator=g).tolist(), "at": 130}


@pytest.fixture(scope="module")
def right(ddpm, asked):
    "The same answers by the package."
    image = lambda x: torch.tensor(x).view(1, 1, 8, 8)
    with torch.no_grad():
        calls = [ddpm.model(image(c["x"]), torch.tensor([c["t"]])).flatten().tolist() for c in asked["calls"]]
        index, x0, terms = torch.tensor([3]), image(asked["x0"]), []
        noise = lambda t, x: indexed_noise(asked["key"], index, torch.full_like(index, t), x)
        for _, x, _ in ddpm.chain(xT=noise(1001, torch.empty(1, 1, 8, 8)), noise=noise): pass
        for term in asked["terms"]:
            d = stride(replace(ddpm, variance=term["kind"]), even_steps(1000, term["steps"]))
            t = torch.tensor([term["t"]])
            terms.append(vlb_terms(d.sched, d.p, d.decoder, x0, t, indexed_noise(9, torch.tensor([2]), t, x0))[0].item()/math.log(2))
        tails = [-ddpm_cost(*v) for v in asked["tails"]]
        mixture = GaussianMixture(torch.full((7,), 1/7), torch.tensor(asked["centers"], dtype=torch.float64), torch.full((7,), asked["std"]))
        points = torch.tensor(asked["points"], dtype=torch.float64).view(-1, 2)
        plane = exact_eps(mixture, ddpm.sched, points, torch.full((len(points),), asked["at"])).flatten().tolist()
    return {"calls": calls, "noise": noise(7, x).flatten().tolist(), "chain": x.flatten().tolist(), "terms": terms,
            "prior": prior_kl(ddpm.sched, x0).item()/math.log(2), "tails": tails, "plane": plane}


def ddpm_cost(x, mean, sigma, levels):
    f = lambda v: torch.tensor([v], dtype=torch.float64)
    return discretized_gaussian_log_likelihood(f(x), f(mean), f(math.log(sigma**2)), levels).item()


def compare(found, right):
    far = lambda a, b: (torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)).abs().max().item()
    assert far(found["calls"], right["calls"]) < 1e-5
    assert far(found["noise"], right["noise"]) < 1e-6
    assert far(found["chain"], right["chain"]) < 1e-5
    assert far(found["plane"], right["plane"]) < 1e-9
    for name in ("terms", "tails"):
        for a, b in zip(found[name], right[name], strict=True): assert a == pytest.approx(b, rel=1e-4, abs=1e-6), name
    assert found["prior"] == pytest.approx(right["prior"], rel=1e-4)


@pytest.mark.skipif(not NODE, reason="Node is not installed: the module is tested in the browser alone")
def test_same_numbers_under_node(asked, right, tmp_path):
    (tmp_path/"asked.json").write_text(json.dumps(asked))
    model = ROOT/"ddpm_nbdev/weights/digits"
    code = f"""import fs from "fs"; import * as D from {json.dumps((LIVE/"ddpm.mjs").as_uri())};
const b = fs.readFileSync({json.dumps(str(model/"model.safetensors"))}), text = fs.readFileSync({json.dumps(str(model/"config.json"))}, "utf8");
const answers = {ANSWERS};
console.log(JSON.stringify(answers(D, b.buffer.slice(b.byteOffset, b.byteOffset + b.length), text, JSON.parse(fs.readFileSync("asked.json")))));"""
    (tmp_path/"ask.mjs").write_text(code)
    res = subprocess.run([NODE, "ask.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert res.returncode == 0, res.stderr
    compare(json.loads(res.stdout), right)


@pytest.mark.skipif(not NODE, reason="Node is not installed")
@pytest.mark.parametrize("entry", ['{"dtype":"F32","shape":[4],"data_offsets":[-16,0]}', '{"dtype":"F32","shape":[4],"data_offsets":[0,"x"]}',
                                   '{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,16]}', '{"dtype":"F32","shape":"x","data_offsets":[0,16]}',
                                   '{"dtype":"F32","shape":[400],"data_offsets":[0,1600]}', '{"dtype":"I64","shape":[2],"data_offsets":[0,16]}'])
def test_a_file_that_lies_is_refused(entry, tmp_path):
    (tmp_path/"ask.mjs").write_text(f"""import * as D from {json.dumps((LIVE/"ddpm.mjs").as_uri())};
const header = new TextEncoder().encode({json.dumps('{"a":' + entry + '}')}), file = new Uint8Array(8 + header.length + 16);
new DataView(file.buffer).setBigUint64(0, BigInt(header.length), true);
file.set(header, 8);
try {{ D.readSafetensors(file.buffer); console.log("accepted"); }} catch (e) {{ console.log("refused"); }}""")
    res = subprocess.run([NODE, "ask.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert res.stdout == "refused\n", res.stdout + res.stderr


def test_one_file_is_whole():
    "All modules are in it, none is loaded; what a page needs to know of itself stands in the notebook."
    sys.path.insert(0, str(ROOT/"tools"))
    try: from one_file import parts_of
    finally: sys.path.pop(0)
    cells = json.loads((ROOT/"nbs/live.ipynb").read_text(encoding="utf-8"))["cells"]
    found = list(parts_of("\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")))
    assert [part for part, _, _ in found] == ["digit", "bits", "mix", "plane", "pixel"] and all(heading for _, heading, _ in found)
    assert all(said for _, _, said in found[1:]) and not any("[" in said or "$" in said for _, _, said in found)


def test_the_ten_digits_are_test_images():
    data = load_dataset("digits")
    lines = re.findall(r"^(?:export const DIGITS = `)?([a-q]{64})", (LIVE/"digit.mjs").read_text(encoding="utf-8"), re.M)
    labels = data.test_labels.tolist()
    for i, line in enumerate(lines): assert [ord(c)-97 for c in line] == data.test[labels.index(i)].flatten().tolist()
    assert len(lines) == 10 and f"const KEY = {subseed(0, 2)};" in (LIVE/"worker.mjs").read_text(encoding="utf-8")


@pytest.fixture
def live(tab):
    "The page of the living network, awake."
    said = []
    tab.on("pageerror", lambda e: said.append(str(e)))
    tab.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") and "readback" not in m.text else None)   # of this file's own reading
    tab.goto("/live.html")
    awake(tab, "digit", "[data-t='400']")
    yield tab
    assert not said


def awake(tab, part, more=""):
    "The part, when it is in sight and alive."
    place = tab.locator(f".live[data-part={part}]")
    place.scroll_into_view_if_needed()
    tab.wait_for_selector(f".live[data-part={part}]{more} canvas" if part != "pixel" else f".live[data-part={part}] table")
    return place


PIXELS = "c => { const d = c.getContext('2d').getImageData(0, 0, 8, 8).data; return Array.from({length: 64}, (_, i) => d[4*i]); }"


def image(place, name): return torch.tensor(place.locator(f"canvas[aria-label^='{name}']").evaluate(PIXELS)).double()/127.5 - 1


def near(a, b): return (a.flatten().double() - b.flatten().double().clamp(-1, 1)).abs().max().item() < .005      # half a gray level of a screen


@in_browser
def test_same_numbers_in_a_browser(tab, asked, right):
    tab.goto("/live.html")
    found = tab.evaluate(f"""async asked => {{
      const D = await import("/live/ddpm.mjs"), answers = {ANSWERS};
      const weights = await (await fetch("/live/digits/model.safetensors")).arrayBuffer(), text = await (await fetch("/live/digits/config.json")).text();
      return answers(D, weights, text, asked);
    }}""", asked)
    compare(found, right)


@in_browser
def test_what_the_network_sees(live, ddpm):
    "x_t, the guess and x_0-hat at t = 400 and after the slider has moved."
    place = awake(live, "digit")
    assert not live.locator(".cell.live-still").is_visible()                      # the stored picture has made room
    x0 = to_model_range(load_dataset("digits").test[3:4], 17)
    for t in (400, 150):
        place.locator("input[type=range]").fill(str(t))
        live.wait_for_selector(f".live[data-part=digit][data-t='{t}']")
        eps, ts = indexed_noise(subseed(0, 2), torch.tensor([0]), torch.tensor([0]), x0), torch.tensor([t])
        xt = ddpm.sched.alpha_bar[t].sqrt()*x0 + (1-ddpm.sched.alpha_bar[t]).sqrt()*eps
        with torch.no_grad(): p, guess = ddpm.p(xt, ts), ddpm.model(xt, ts)
        assert near(image(place, "x_t"), xt) and near(image(place, "the image that"), p.x0) and near(image(place, "your digit"), x0)
        assert near(image(place, "the network"), guess/2.5) and near(image(place, "the noise that"), eps/2.5)


@in_browser
def test_it_draws_what_the_command_draws(live, ddpm):
    "From pure noise with all steps: the first images of seed 0; with twenty steps and beta-tilde, those of --steps-used 20."
    place = awake(live, "digit")
    drawn = to_model_range(draw_samples(ddpm, 2), 17)
    place.get_by_text("Start from pure noise").click()
    live.wait_for_selector(".live[data-part=digit][data-t='1000']")
    place.get_by_role("button", name="Run", exact=True).click()
    live.wait_for_selector(".live[data-part=digit][data-t='0']", timeout=60_000)
    assert (image(place, "x_t") - drawn[0].flatten()).abs().max() < .07           # half a gray level of the data
    place.get_by_label("chain of").select_option("20")
    place.get_by_label("variance").select_option("beta_tilde")
    place.get_by_text("Start from pure noise").click()
    place.get_by_role("button", name="New noise", exact=True).click()      # the words below the pictures say it too
    live.wait_for_selector(".live[data-part=digit][data-t='1000']")
    place.get_by_role("button", name="Run", exact=True).click()
    live.wait_for_selector(".live[data-part=digit][data-t='0']")
    short = to_model_range(draw_samples(stride(replace(ddpm, variance="beta_tilde"), even_steps(1000, 20)), 2), 17)
    assert (image(place, "x_t") - short[1].flatten()).abs().max() < .07


@in_browser
def test_step_pause_and_go_on(live):
    place = awake(live, "digit")
    place.get_by_text("One step back").click()
    live.wait_for_selector(".live[data-part=digit][data-t='399']")
    place.get_by_role("button", name="Run", exact=True).click()
    place.get_by_role("button", name="Pause").click()
    place.get_by_role("button", name="Run", exact=True).wait_for()
    before = place.get_attribute("data-t")
    live.wait_for_timeout(300)
    assert place.get_attribute("data-t") == before != "0"
    place.get_by_label("chain of").select_option("100")
    place.get_by_role("button", name="Run", exact=True).click()
    live.wait_for_selector(".live[data-part=digit][data-t='0']")


@in_browser
def test_draw_with_mouse_and_keys(live):
    place = awake(live, "digit")
    place.get_by_text("Clear", exact=True).click()
    pad = place.locator("canvas[tabindex]")
    assert (image(place, "your digit") == -1).all()
    box = pad.bounding_box()
    live.mouse.move(box["x"]+box["width"]*.3, box["y"]+box["height"]*.2)
    live.mouse.down()
    live.mouse.move(box["x"]+box["width"]*.3, box["y"]+box["height"]*.8, steps=5)
    live.mouse.up()
    drawn = image(place, "your digit").view(8, 8)
    assert (drawn[2:6, 2] > .5).all() and (drawn[:, 5:] == -1).all()
    pad.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", " "): live.keyboard.press(key)
    assert image(place, "your digit").view(8, 8)[4, 5] == 1 and "row 5, column 6: ink" in place.inner_text()


@in_browser
def test_draw_with_a_finger(browser, base):
    context = browser.new_context(base_url=base, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    try:
        tab = context.new_page()
        tab.goto("/live.html")
        place = awake(tab, "digit", "[data-t='400']")
        place.get_by_text("Clear", exact=True).tap()
        box = place.locator("canvas[tabindex]").bounding_box()
        tab.touchscreen.tap(box["x"]+box["width"]*.45, box["y"]+box["height"]*.45)
        assert image(place, "your digit").view(8, 8)[3, 3] > .5
    finally: context.close()


@in_browser
def test_bits_are_those_of_the_package(live, ddpm):
    place = awake(live, "bits")
    live.wait_for_selector(".live[data-part=bits][data-total]", timeout=60_000)
    x0, total = to_model_range(load_dataset("digits").test[3:4], 17), 0
    for _, _, w, nats, _ in ddpm.bound_terms(x0, subseed(0, 2), torch.tensor([0])): total += (w*nats).sum().item()
    total = (total + prior_kl(ddpm.sched, x0).item())/math.log(2)
    assert float(place.get_attribute("data-total")) == pytest.approx(total, rel=1e-4)
    assert f"{total:.2f} bits a pixel" in place.inner_text() and f"{math.ceil(total*8)} bytes" in place.inner_text()


@in_browser
def test_between_two_digits(live, ddpm):
    "At lambda = 0 and 1/2, with 100 steps from t = 250."
    place = awake(live, "mix")
    live.wait_for_function("() => document.querySelector('.live[data-part=mix]').innerText.includes('decoded by the same chain')")
    data, d = load_dataset("digits"), stride(replace(ddpm, variance="beta_tilde"), even_steps(1000, 100))
    labels = data.test_labels.tolist()
    ends = [to_model_range(data.test[labels.index(i)][None], 17) for i in (4, 9)]
    noise = lambda i: lambda t, x: indexed_noise(subseed(0, 2), torch.tensor([i]), torch.full((1,), t), x)
    a = d.sched.alpha_bar[25]
    xa, xb = (a.sqrt()*x + (1-a).sqrt()*noise(i)(0, x) for i, x in enumerate(ends))
    for lam, name in ((0, "between the two digits, lambda 0"), (.5, "between the two digits, lambda 0.5")):
        for _, x, _ in d.chain(xT=((1-lam)*xa + lam*xb).float(), start=25, noise=noise(0)): pass
        found = place.locator(f"canvas[aria-label='{name}']").evaluate(PIXELS)
        assert near(torch.tensor(found).double()/127.5 - 1, x), lam


@in_browser
def test_a_cloud_finds_the_points(live):
    place = awake(live, "plane")
    place.get_by_role("button", name="Run", exact=True).click()
    live.wait_for_selector(".live[data-part=plane][data-t='0']", timeout=60_000)
    far = re.search(r"the farthest is ([\d.]+) away", place.inner_text())[1]
    assert float(far) < .12                                                       # six standard deviations of a point
    place.get_by_text("Clear the points").click()
    canvas = place.locator("canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for x, y in ((.3, .3), (.7, .6)): live.mouse.click(box["x"]+box["width"]*x, box["y"]+box["height"]*y)
    place.get_by_role("button", name="Run", exact=True).click()
    live.wait_for_selector(".live[data-part=plane][data-t='0']", timeout=60_000)


@in_browser
def test_one_pixel_by_hand(live):
    "Every number of the strip, worked out again for other inputs."
    place = awake(live, "pixel")
    place.get_by_label("x₀").fill("0.5")
    place.get_by_label("β₂").fill("0.4")
    place.get_by_label("which step").select_option("2")
    x0, b, eps, guess = .5, (.1, .4, .6), .8, .5
    a1, a2 = 1-b[0], (1-b[0])*(1-b[1])
    xt = a2**.5*x0 + (1-a2)**.5*eps
    mean = a1**.5*b[1]/(1-a2)*x0 + (1-b[1])**.5*(1-a1)/(1-a2)*xt
    small = b[1]*(1-a1)/(1-a2)
    mu = (xt - b[1]/(1-a2)**.5*guess)/(1-b[1])**.5                                # eq. 11 as printed
    numbers = place.locator("table").inner_text()
    for v in (a2, xt, mean, small, mu, (mean-mu)**2/(2*small), (eps-guess)**2): assert f"{v:.4f}" in numbers, v
    place.get_by_label("which step").select_option("1")
    assert "Eq. 13" in place.inner_text()


@in_browser
def test_without_scripts_there_is_a_picture(browser, base):
    context = browser.new_context(base_url=base, java_script_enabled=False)
    try:
        tab = context.new_page()
        tab.goto("/live.html")
        assert tab.locator("main .cell img").first.is_visible() and "alive on the site" in tab.locator(".live").first.inner_text()
    finally: context.close()


@in_browser
def test_weights_that_do_not_come(tab):
    "The picture comes back, with one line that says why."
    tab.route("**/model.safetensors", lambda route: route.fulfill(status=404))
    tab.goto("/live.html")
    tab.wait_for_selector(".live[data-part=digit] [role=alert]")
    assert "model.safetensors could not be read (404)" in tab.locator(".live").first.inner_text()
    assert tab.locator("main .cell img").first.is_visible()


@in_browser
def test_one_file_opens_by_a_double_click(tab, site):
    asked = []
    tab.on("request", lambda r: asked.append(r.url))
    tab.goto((site/"live/one-file.html").resolve().as_uri())
    place = awake(tab, "digit", "[data-t='400']")
    place.get_by_role("button", name="Run", exact=True).click()
    tab.wait_for_selector(".live[data-part=digit][data-t='0']", timeout=60_000)
    assert not [u for u in asked if not u.startswith(("file:", "blob:", "data:"))]
