"The developer tools, tried on a project of three small notebooks."
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ROOT/"tools"


def tool(name, *args):
    return subprocess.run([sys.executable, TOOLS/f"{name}.py", *map(str, args)], text=True, capture_output=True)


def cell(source, kind="code", outputs=()):
    res = {"cell_type": kind, "id": hashlib.sha1(source.encode()).hexdigest()[:8], "metadata": {}, "source": source.splitlines(True)}
    return {**res, "execution_count": None, "outputs": list(outputs)} if kind == "code" else res


def printed(text): return {"name": "stdout", "output_type": "stream", "text": [text]}


def write(path, *cells):
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nb = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False)+"\n", encoding="utf-8")


def outputs(path): return [c["outputs"] for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A project with a good notebook, a failing one and an index, exported, and run once by the tool."
    root = tmp_path_factory.mktemp("toylib")
    nbs = root/"nbs"
    nbs.mkdir()
    (root/"settings.ini").write_text((ROOT/"settings.ini").read_text().replace("ddpm_nbdev", "toylib"))
    write(nbs/"00_toy.ipynb", cell("# Toy\n> A toy.", "markdown"), cell("#| default_exp toy"),
          cell('#| exports\ndef double(x): return 2*x'),
          cell("from toylib.toy import double\nprint(double(21), object())"),                     # imports from the root
          cell("#| fig-cap: \"A line\"\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()"),
          cell("#| eval: false\nnever()", outputs=[printed("kept\n")]),
          cell("#| slow\nprint('new')", outputs=[printed("old\n")]),
          cell("x = 1", outputs=[printed("out of date\n")]))
    write(nbs/"01_bad.ipynb", cell("# Bad", "markdown"), cell("print('fine')"), cell("broken = 1/0"))
    write(nbs/"index.ipynb", cell("# Title\n> Promise.", "markdown"), cell("See [toy](00_toy.ipynb).", "markdown"),
          cell("#| echo: false\n#| fig-cap: \"A dot\"\nimport matplotlib.pyplot as plt\nplt.plot([1], 'o'); plt.show()"),
          cell("#| hide\nsecret = 1"), cell("print(6*7)"))
    export = "from nbdev.doclinks import nbdev_export; nbdev_export(path='nbs')"
    subprocess.run([sys.executable, "-c", export], cwd=root, check=True)
    bad = (nbs/"01_bad.ipynb").read_bytes()
    run = tool("run_notebooks", "-j", 2, nbs)
    readme = tool("make_readme", root)
    assert readme.returncode == 0, readme.stderr
    return root, run, bad


def test_run_notebooks(project):
    root, run, bad = project
    toy = root/"nbs"/"00_toy.ipynb"
    got = outputs(toy)
    assert got[2][0]["text"] == ["42 <object object>\n"]                       # cleaned: no address
    assert "image/png" in got[3][0]["data"]
    assert [o[0]["text"] for o in got[4:6]] == [["kept\n"], ["old\n"]]         # skipped cells keep what they had
    assert got[6] == []                                                        # a cell that ran and printed nothing does not
    assert (run.returncode, bad) == (1, (root/"nbs"/"01_bad.ipynb").read_bytes())
    assert "failed: 01_bad.ipynb" in run.stderr and "broken = 1/0" in run.stderr and "Cell #3 of 01_bad.ipynb" in run.stderr


def test_run_again(project):
    root, *_ = project
    toy = root/"nbs"/"00_toy.ipynb"
    before = outputs(toy)
    again = tool("run_notebooks", "--flags", "slow", toy)
    assert again.returncode == 0, again.stderr
    after = outputs(toy)
    assert (after[4][0]["text"], after[5][0]["text"]) == (["kept\n"], ["new\n"])
    assert before[:5] + before[6:] == after[:5] + after[6:]                    # the plot's bytes too


def test_make_readme(project):
    root, *_ = project
    text = (root/"README.md").read_text()
    assert text.startswith("# Title\n\n> Promise.\n")
    assert "[toy](nbs/00_toy.ipynb)" in text and "```python\nprint(6*7)\n```" in text and "    42" in text
    assert "secret" not in text and "plt.plot" not in text
    picture, = (root/"index_files").iterdir()
    assert f"![A dot](index_files/{picture.name})" in text and picture.read_bytes().startswith(b"\x89PNG")


def test_check_sync(project):
    root, *_ = project
    (root/"nbs"/"01_bad.ipynb").write_bytes(project[2])
    good = tool("check_sync", root)
    assert (good.returncode, good.stdout) == (0, "library: in sync\nnotebooks: in sync\nreadme: in sync\n"), good.stderr
    assert tool("make_readme", "--check", root).returncode == 0
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    module, notebook = root/"toylib"/"toy.py", root/"nbs"/"00_toy.ipynb"
    module.write_text(module.read_text()+"x = 1\n")
    (root/"toylib"/"gone.py").write_text("")
    notebook.write_text(notebook.read_text().replace('"execution_count": null', '"execution_count": 7', 1))
    (root/"README.md").write_text("edited by hand")
    (root/"index_files"/"old.png").write_bytes(b"")
    bad = tool("check_sync", root)
    for path, content in before.items(): path.write_bytes(content)
    assert bad.returncode == 1
    for line in ("toy.py: differs", "gone.py: no notebook exports it", "00_toy.ipynb: not clean",
                 "README.md: differs from index.ipynb", "index_files/old.png: left over"):
        assert line in bad.stdout


@pytest.mark.parametrize("name", sorted(p.stem for p in TOOLS.glob("*.py") if "__main__" in p.read_text(encoding="utf-8")))   # the others are parts
def test_help(name): assert "usage:" in tool(name, "--help").stdout


def test_ship(tmp_path):
    "A model as those that ship: the weights rounded once, errors and tables measured with the rounded ones."
    import torch

    from ddpm_nbdev.calibration import Calibrated
    from ddpm_nbdev.data import epoch_order, load_dataset
    from ddpm_nbdev.ddpm import DDPM
    from ddpm_nbdev.decoder import to_model_range
    from ddpm_nbdev.noise import indexed_noise
    run, out = tmp_path/"run", tmp_path/"small"
    ours = DDPM.from_pretrained("digits")
    ours.save(run)
    (run/"log.jsonl").write_text('{"step": 1}\n')
    small = "--dataset", "digits", "--images", 3, "--pixels", 400, "--first", 2
    said = tool("ship", run, out, *small)
    assert said.returncode == 0 and said.stdout.startswith(f"{out}: 0."), said.stderr
    assert (out/"log.jsonl").read_text() == '{"step": 1}\n'
    assert (out/"model.safetensors").stat().st_size < .55*(run/"model.safetensors").stat().st_size
    found = DDPM.load(out)
    for (k, v), w in zip(ours.model.state_dict().items(), found.model.state_dict().values(), strict=True):
        assert w.dtype == torch.float32 and torch.equal(w, v.half().float()), k
    assert Calibrated.load(out).calibration.steps.tolist()[0] == 2
    train, t = load_dataset("digits").train, 1000
    some = epoch_order(len(train), 0, 0)[:3]               # the error at T, by hand
    x, tt = to_model_range(train[some], 17), torch.full((3,), t)
    eps, signal = indexed_noise(0, some, tt, x), found.sched.alpha_bar[t].sqrt().item()
    with torch.no_grad(): guess = found.model(signal*x + (1-signal**2)**.5*eps, tt)
    by_hand = ((x + (1-signal**2)**.5/signal*(eps-guess)).clamp(-1, 1) - x).square().mean().item()
    assert found.mse[t].item() == pytest.approx(by_hand, rel=1e-3)
    for folder, why in ((out, "not empty"), (run/"config.json", "not empty"), (tmp_path/"other", None)):
        again = tool("ship", tmp_path/"no run" if why is None else run, folder, *small)
        assert again.returncode == 1 and (why or "no run") in again.stderr and again.stderr.count("\n") == 1
    assert not (tmp_path/"other").exists()
