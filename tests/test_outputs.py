"What the notebooks store, and so what the site shows, is what their code gives."
import base64
import copy
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/"tools"))
import check_outputs  # noqa: E402
from check_outputs import differences, is_close, picture_difference, text_difference  # noqa: E402
from run_notebooks import Runner, smaller  # noqa: E402

# Seconds that these take; `tools/check_outputs.py` without names runs them too. A new notebook is run here if it is not listed.
SLOW = {"13_train.ipynb": 27, "14_likelihood.ipynb": 52, "16_progressive.ipynb": 46, "17_interpolate.ipynb": 42, "18_connections.ipynb": 45,
        "20_cli.ipynb": 56}
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").glob("[!_.]*.ipynb"))


def run(*args, **env):
    return subprocess.run([sys.executable, ROOT/"tools"/"check_outputs.py", *map(str, args)], text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def test_slow_notebooks_exist(): assert SLOW.keys() <= {p.name for p in NOTEBOOKS}


@pytest.fixture(scope="module")
def runner():
    runner = Runner()
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A copy of the project in which notebooks are run."
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("outputs")/ROOT.name, ignore=check_outputs.JUNK)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.name not in SLOW], ids=lambda p: p.stem)
def test_stored_outputs_are_what_the_code_gives(path, runner, project):
    "Each in a test of its own, so that all cores share them."
    before = [p.read_bytes() for p in NOTEBOOKS]
    found = [d for d in check_outputs.check(runner, path, project) if not d.endswith(check_outputs.UNLIKE)]
    assert not found, "\n".join(found)
    assert [p.read_bytes() for p in NOTEBOOKS] == before


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_error_is_stored(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    assert differences(nb, nb) == []


def test_cells_that_draw_rounding_exist():
    ids = {c["id"] for p in NOTEBOOKS for c in json.loads(p.read_text(encoding="utf-8"))["cells"]}
    assert check_outputs.ROUNDING <= ids


def plot(slope=1., format="png", **kw):
    "A plot as a notebook stores it."
    fig, ax = plt.subplots(figsize=(6, 2.8), dpi=80)
    x = np.linspace(0, 1, 50)
    ax.plot(x, slope*x**2, lw=.8)
    ax.set_ylim(0, 1)
    with io.BytesIO() as f:
        fig.savefig(f, format=format, **kw)
        plt.close(fig)
        return base64.b64encode(f.getvalue()).decode()


def shown(mime, value): return {"output_type": "display_data", "metadata": {}, "data": {mime: value, "text/plain": ["<Figure size 480x224 with 1 Axes>"]}}


def printed(text): return {"output_type": "stream", "name": "stdout", "text": text.splitlines(True)}


def frames(*pictures):   # as Matplotlib writes them
    return shown("text/html", "<script>\n"+"".join(f'frames[{i}] = "data:image/png;base64,{p[:76]}\\\n{p[76:]}"\n' for i, p in enumerate(pictures)))


ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}
STORED = [[printed("8 images\nbound: 2.9834 bits/dim, not 3.01e-02\n")], [shown("image/png", plot())],
          [frames(plot(.2), plot(.5))], [{"output_type": "execute_result", "metadata": {}, "data": {"text/plain": ["tensor([0.1000, 0.2500])"]}}]]


def notebook(outputs):
    cells = [{"cell_type": "code", "id": f"{i:08}", "source": [], "metadata": {}, "outputs": o} for i, o in enumerate(outputs)]
    return {"cells": [{"cell_type": "markdown", "source": ["words"]}, *cells]}


@pytest.mark.parametrize("cell,new,said", [
    (0, [printed("8 images\nbound: 2.9934 bits/dim, not 3.01e-02\n")], "cell #2: stored: 8 images bound: 2.9834 bits/dim"),
    (0, [printed("9 images\nbound: 2.9834 bits/dim, not 3.01e-02\n")], "stored: 8 images"),
    (0, [printed("8 images\nbound: 2.9834 bits/dim, not 3.01e-03\n")], "2.9834 bits/dim, not 3.01e-03"),
    (0, [printed("8 pictures\nbound: 2.9834 bits/dim, not 3.01e-02\n")], "now:    8 pictures"),
    (0, [printed("8 images\nbound: 2.9834 bits/dim\n")], "stored: "),
    (0, [], "stores 1 outputs, gives 0"),
    (0, [printed("8 images\nbound: 2.9834 bits/dim, not 3.01e-02\n"), printed("more")], "stores 1 outputs, gives 2"),
    (0, [{**printed("8 images\nbound: 2.9834 bits/dim, not 3.01e-02\n"), "name": "stderr"}], "stream stderr"),
    (1, [shown("image/png", plot(.97))], "cell #3: a picture that differs"),
    (1, [shown("image/png", plot(dpi=90))], "a picture of 540x252 pixels instead of 480x224"),
    (1, [printed("no picture")], "now:    stream stdout"),
    (2, [frames(plot(.2), plot(.52))], "cell #4: frame 2 of 2: a picture that differs"),
    (2, [frames(plot(.2))], "instead of 2"),
    (3, [{"output_type": "execute_result", "metadata": {}, "data": {"text/plain": ["tensor([0.1000, 0.2600])"]}}], "cell #5: "),
    (3, [ERROR], "now:    error"),
])
def test_a_change_is_found(cell, new, said):
    changed = copy.deepcopy(STORED)
    changed[cell] = new
    found = differences(notebook(STORED), notebook(changed))
    assert len(found) >= 1 and said in "\n".join(found)


def test_no_change_is_none(): assert differences(notebook(STORED), notebook(copy.deepcopy(STORED))) == []


def test_a_stored_error_is_found_where_nothing_is_run():
    stored = notebook([[printed("fine\n"), ERROR]])
    assert differences(stored, stored) == ["cell #2: stores an error, ValueError"]


@pytest.mark.parametrize("a,b", [("2.983", "2.984"), ("0.07", "0.08"), ("0.21347798407", "0.21347796916"), ("3.6e-06", "3.7e-06"), ("-0.000", "0.000"),
                                 ("6.7e-15", "7.5e-15"), ("8", "8"), ("1e3", "1000.")])
def test_rounding_is_no_difference(a, b): assert is_close(a, b)


@pytest.mark.parametrize("a,b", [("2.983", "2.985"), ("8", "9"), ("1001", "1002"), ("45.1", "45.7"), ("3.01e-02", "3.03e-02"), ("0.5", "-0.5"), ("2.1e-05", "3.1e-05"), ("0.07", "0.09")])
def test_more_than_rounding_is(a, b): assert not is_close(a, b)


def test_numbers_in_names_are_words():
    assert text_difference("x0 is 8x8 float32", "x1 is 8x8 float32") and text_difference("8x8", "8x9")
    assert text_difference("a  1.0\nb 2.00", "a 1.0\nb  2.00") is None           # columns may become wider
    assert text_difference("", "word") and text_difference("1.5", "1.5 2.5") and text_difference("nan", "1.0")


def test_pictures():
    old, other = (base64.b64decode(plot(metadata={"Software": s})) for s in ("Matplotlib version3.11.2, https://matplotlib.org/", "Matplotlib version3.12.0, https://matplotlib.org/"))
    assert picture_difference(old, other) == check_outputs.UNLIKE
    pixels = np.asarray(Image.open(io.BytesIO(old)).convert("RGB")).copy()
    def png(pixels, name="3.11.2"):
        from PIL.PngImagePlugin import PngInfo
        info, f = PngInfo(), io.BytesIO()
        info.add_text("Software", f"Matplotlib version{name}, https://matplotlib.org/")
        Image.fromarray(pixels).save(f, format="PNG", pnginfo=info)
        return f.getvalue()
    assert picture_difference(old, png(pixels)) is None                          # other bytes, same pixels
    pixels[100, 200] ^= 1
    assert picture_difference(old, png(pixels, "3.11.9")) is None                # one gray level in one pixel
    pixels[100:110, 200:210] = 0
    assert picture_difference(old, png(pixels))                                  # a spot


def png(pixels, **kw):
    Image.fromarray(pixels).save(out := io.BytesIO(), "PNG", **kw)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["gray", "few colors", "many colors", "hidden", "half hidden"])
def test_pictures_are_stored_in_few_bytes(kind):
    "Every pixel stays; what hides nothing and repeats itself goes."
    draw = np.random.default_rng(0)
    pixels = np.full((60, 80, 4), 255, np.uint8)
    if kind == "gray": pixels[..., :3] = draw.integers(0, 256, (60, 80, 1))
    elif kind == "few colors": pixels[..., :3] = draw.integers(0, 256, (40, 3))[draw.integers(0, 40, (60, 80))]
    else: pixels[..., :3] = draw.integers(0, 256, (60, 80, 3))
    if "hidden" in kind: pixels[:30, :, 3] = 0 if kind == "hidden" else 128
    said = PngInfo()
    said.add_text("Software", "Matplotlib version 3.9.0")
    old = png(pixels, pnginfo=said, dpi=(90, 90))
    new = smaller(old)
    a, b = (Image.open(io.BytesIO(f)) for f in (old, new))
    assert (np.asarray(b.convert("RGBA")) == pixels).all() and len(new) <= len(old)
    assert b.info["Software"] == a.info["Software"] and b.info["dpi"] == a.info["dpi"]
    most = {"gray": .45, "few colors": .4, "many colors": .95}
    assert new == old if "hidden" in kind else len(new) < most[kind]*len(old)


def test_tool(tmp_path):
    "It names notebook and cell, changes nothing, and fails."
    nbs = tmp_path/"toy"/"nbs"
    nbs.mkdir(parents=True)
    (tmp_path/"toy"/"settings.ini").write_text((ROOT/"settings.ini").read_text().replace("ddpm_nbdev", "toy"))
    def write(name, *cells):
        cells = [{"cell_type": "code", "id": f"{i:08}", "source": [s], "metadata": {}, "execution_count": None, "outputs": o} for i, (s, o) in enumerate(cells)]
        meta = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
        (nbs/name).write_text(json.dumps({"cells": cells, "metadata": meta, "nbformat": 4, "nbformat_minor": 5}))
    write("good.ipynb", ("print(6*7)", [printed("42\n")]), ("#| slow\nprint(1)", [printed("2\n")]))
    write("stale.ipynb", ("x = 6", []), ("print(x*7.5)", [printed("45.7\n")]))
    write("fails.ipynb", ("1/0", []))
    before = {p: p.read_bytes() for p in nbs.iterdir()}
    good = run(nbs/"good.ipynb")
    assert good.returncode == 0, good.stdout+good.stderr
    bad = run("--flags", "slow", nbs)
    assert bad.returncode == 1
    for words in ("good.ipynb, cell #2: stored: 2", "stale.ipynb, cell #2: stored: 45.7\n    now:    45.0", "fails.ipynb, a cell fails"): assert words in bad.stdout
    assert "3 of 3 notebooks" in bad.stderr
    assert {p: p.read_bytes() for p in nbs.iterdir()} == before
