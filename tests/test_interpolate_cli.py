"ddpm_interpolate: the picture is what plain functions give, in another process too, and whatever goes wrong is one line and writes nothing."
import os
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import Python, contents, failed
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddpm_nbdev import interpolate_cli
from ddpm_nbdev.cli import ddpm_train
from ddpm_nbdev.commands import _make_parser
from ddpm_nbdev.data import load_dataset
from ddpm_nbdev.ddpm import DDPM
from ddpm_nbdev.interpolate import interpolate
from ddpm_nbdev.interpolate_cli import _rows, ddpm_interpolate
from ddpm_nbdev.likelihood import even_steps, stride

torch.set_num_threads(1)
IMAGES = load_dataset("digits").test
FAST = ["--steps-used", 4, "--n", 3, "--device", "cpu"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def run(once):
    "A tiny run on color pictures, and its pictures."
    def make(folder):
        (folder/"pics").mkdir()
        g = np.random.default_rng(0)
        for i in range(12): Image.fromarray(g.integers(0, 256, (8, 8, 3), np.uint8)).save(folder/f"pics/{i:02}.png")
        ddpm_train(f"folder:{folder}/pics", T=4, steps=2, batch_size=4, samples=0, out=str(folder/"run"), quiet=True)
        return folder
    return once("interpolate-run", make)


def tiles(path, rows, columns, side, scale):
    "The tiles of a grid as `(rows, columns, side, side, 3)`; each pixel is a block, white lines between."
    x = np.asarray(Image.open(path).convert("RGB"))
    assert x.shape == (scale*(rows*(side+1)-1), scale*(columns*(side+1)-1), 3)
    small = x[::scale, ::scale]
    assert (small.repeat(scale, 0).repeat(scale, 1) == x).all()
    for k in range(1, rows): assert (small[k*(side+1)-1] == 255).all()
    return np.array([[small[r*(side+1):, c*(side+1):][:side, :side] for c in range(columns)] for r in range(rows)])


def as_gray(levels): return np.rint(np.asarray(levels)*(255/16)).astype(np.uint8)   # of the digits


def by_functions(i, j, ts, n, kept, seed=0, **choices):
    "The same from plain functions: levels `(rows, n+2, 8, 8)`."
    ddpm, choices = DDPM.from_pretrained("digits"), dict(noise="fixed", mix="linear") | choices
    if len(kept) < 1000: ddpm.variance = "beta_tilde"
    ddpm, x, rows = stride(ddpm, kept), IMAGES[[i, j]].float()/8 - 1, []
    for t in ts:
        found = interpolate(ddpm, x[:1], x[1:], kept.index(t)+1, [k/(n-1) for k in range(n)], torch.Generator().manual_seed(seed), **choices)
        levels = ((found[:, 0, 0].clamp(-1, 1)+1)*8).round().byte()
        rows.append(torch.cat([IMAGES[i], levels, IMAGES[j]]))
    return torch.stack(rows).numpy()


# ---- the picture

@pytest.mark.parametrize("how", ["module", "script"])
def test_another_process_draws_what_the_functions_give(how, here):
    args = ["digits", 13, 20, "--t", 300, 700, "--n", 4, "--steps-used", 5, "--seed", 7, "--noise", "fresh", "--mix", "spherical", "--out", "a/b/line.png", "--device", "cpu"]
    start = ["-m", "ddpm_nbdev.interpolate_cli"] if how == "module" else \
        ["-c", "import sys; from ddpm_nbdev.interpolate_cli import ddpm_interpolate; sys.exit(ddpm_interpolate())"]
    out, err = (p := Python(*start, *args, cwd=here, env=dict(os.environ))).communicate()
    assert (p.returncode, err) == (0, ""), err
    assert out.startswith("digits: 13 to 20, 4 lambdas, t = 300 700, 7 of 1000 steps of digits, in ") and out.endswith("; wrote a/b/line.png\n") and out.count("\n") == 1
    found = tiles(here/"a/b/line.png", 2, 6, 8, 8)
    assert (found == found[..., :1]).all()
    want = by_functions(13, 20, [300, 700], 4, [200, 300, 400, 600, 700, 800, 1000], 7, noise="fresh", mix="spherical")
    assert (abs(found[..., 0].astype(int) - as_gray(want).astype(int)) <= 16).all() and (found[..., 0] == as_gray(want)).mean() > .99   # but for rounding
    assert [p.name for p in (here/"a/b").iterdir()] == ["line.png"]


def test_defaults(call, here):
    "T/20, T/4, T/2 and T, the model's variance, nine lambdas, a free name; the same seed, the same bytes."
    assert call(ddpm_interpolate, "digits", 0, 1, "--steps-used", 8, "--device", "cpu", "--quiet") == (0, "", "")
    assert call(ddpm_interpolate, "digits", 0, 1, "--steps-used", 8, "--device", "cpu", "--quiet") == (0, "", "")
    assert contents(here).keys() == {"digits_interpolation.png", "digits_interpolation_2.png"} and len(set(contents(here).values())) == 1
    found = tiles(here/"digits_interpolation.png", 4, 11, 8, 8)
    want = by_functions(0, 1, [50, 250, 500, 1000], 9, sorted({50, *even_steps(1000, 8)}))
    assert (found[..., 0] == as_gray(want)).mean() > .99
    assert call(ddpm_interpolate, "digits", 0, 1, *FAST, "--seed", 1, "--out", "other.png")[0] == 0
    assert not (tiles("other.png", 4, 5, 8, 8)[:, 1:4] == found[:, [1, 5, 9]]).all()


def test_the_whole_chain(call, here):
    "Without --steps-used it is the model itself: its own variance, and t counts as in the paper."
    assert call(ddpm_interpolate, "digits", 5, 9, "--t", 30, 2, "--n", 2, "--device", "cpu", "--scale", 1, "--quiet") == (0, "", "")
    want = by_functions(5, 9, [30, 2], 2, list(range(1, 1001)))
    assert (abs(tiles("digits_interpolation.png", 2, 4, 8, 1)[..., 0].astype(int) - as_gray(want)) <= 16).all()


def test_no_noise_mixes_pixels(call, here):
    "t = 0 is a row to compare with: no call of the network, arithmetic alone."
    assert call(ddpm_interpolate, "digits", 13, 20, "--t", 0, 300, "--n", 5, "--steps-used", 4, "--device", "cpu", "--quiet") == (0, "", "")
    found = tiles("digits_interpolation.png", 2, 7, 8, 8)[..., 0].astype(int)
    a, b = (IMAGES[i, 0].numpy().astype(float) for i in (13, 20))
    mixed = np.array([a + (b-a)*k/4 for k in range(5)])*(255/16)
    assert (abs(found[0, 1:-1] - mixed) <= 8.5).all() and (found[0, [0, -1]] == found[1, [0, -1]]).all()   # half a level
    assert (abs(found[1, 1:-1] - mixed) > 30).any()
    assert call(ddpm_interpolate, "digits", 13, 20, "--t", 0, "--n", 5, "--device", "cpu", "--quiet", "--out", "all.png") == (0, "", "")
    assert (tiles("all.png", 1, 7, 8, 8)[0, ..., 0] == found[0]).all()


def test_files_are_read_as_data_are(call, here):
    "Files give the picture that their numbers give; a file with itself; t is asked for once or twice."
    for i in (13, 20): Image.fromarray(as_gray(IMAGES[i, 0])).save(f"{i}.png")
    assert call(ddpm_interpolate, "13.png", "20.png", "--model", "digits", *FAST, "--t", 600, 600)[1].startswith("13.png to 20.png, 3 lambdas, t = 600, 5 of 1000 steps of digits, ")
    assert call(ddpm_interpolate, "digits", 13, 20, *FAST, "--t", 600, "--quiet")[0] == 0
    assert (here/"13_interpolation.png").read_bytes() == (here/"digits_interpolation.png").read_bytes()
    assert call(ddpm_interpolate, "13.png", "13.png", "--model", "digits", *FAST, "--noise", "shared", "--out", "same.png", "--quiet")[0] == 0
    found = tiles("same.png", 4, 5, 8, 8)
    assert (found[:, 1:4] == found[:, 1:2]).all() and (found[:, [0, 4], :, :, 0] == as_gray(IMAGES[13, 0])).all()


def test_a_run_on_color_pictures(call, run):
    files = [str(run/"pics"/f"{i:02}.png") for i in (4, 7)]
    assert call(ddpm_interpolate, *files, "--model", run/"run", "--n", 2, "--scale", 3, "--out", "x.png", "--quiet", "--device", "cpu") == (0, "", "")
    found = tiles("x.png", 3, 4, 8, 3)                                  # of T = 4: t = 1, 2, 4
    for column, file in ((0, files[0]), (3, files[1])): assert (found[:, column] == np.asarray(Image.open(file))).all()
    status, out, err = call(ddpm_interpolate, f"folder:{run}/pics", 0, 1, "--model", run/"run", "--split", "train", "--t", 4, "--device", "cpu")
    assert (status, err) == (0, "") and "4 steps of" in out and os.path.exists("pics_interpolation.png")
    train = load_dataset(f"folder:{run}/pics", 8, 3).train
    assert (tiles("pics_interpolation.png", 1, 11, 8, 8)[0, 0] == train[0].permute(1, 2, 0).numpy()).all()
    failed(call(ddpm_interpolate, *files, "--model", "digits"), 1, "04.png is 3x8x8, and the model is for images of 1x8x8")
    failed(call(ddpm_interpolate, *files, "--model", run/"run", "--t", 5), 1, "t must be from 0 to 4")
    failed(call(ddpm_interpolate, *files, "--model", run/"run", "--variance", "optimal"), 1, "nobody has measured yet")


def test_progress(call, here, monkeypatch):
    "A bar where somebody sees it, and none with --quiet or elsewhere."
    seen = []
    def bar(places, leave):
        seen.append(len(places))
        yield from places
    monkeypatch.setattr(interpolate_cli, "progress_bar", bar)
    def go(*args): assert call(ddpm_interpolate, "digits", 13, 20, *FAST, "--t", 250, 1000, *args)[0] == 0
    go()
    monkeypatch.setattr(sys.stdout.__class__, "isatty", lambda self: True, raising=False)
    go("--quiet")
    assert not seen
    monkeypatch.setattr(interpolate_cli, "_can_show_progress", lambda: True)
    go()
    assert seen == [1 + 4 + 1]                                          # calls of both rows, and the end of the line


# ---- what goes wrong

WRONG = [
    ([], 2, "WHAT"), (["digits"], 2, "the numbers of two of its images, such as digits 13 20, got none"), (["digits", 3], 2, "got 3"),
    (["digits", 13, 20, 9], 2, "got 13 20 9"), (["digits", 3, "x"], 2, "got 3 x"), (["digits", 3, 1.5], 2, "got 3 1.5"), (["a.png"], 2, "two image files are needed"),
    (["a.png", "a.png", "a.png"], 2, "two image files are needed"), (["digits", 3, 360], 1, "the test part of digits has images 0..359, no image 360"),
    (["digits", -1, 3], 1, "no image -1"), (["digits", 3, 1437, "--split", "train"], 1, "the train part of digits has images 0..1436, no image 1437"),
    (["a.png", "digits"], 1, "digits is a data set: it cannot be mixed"), (["3", "8"], 1, "3: no such file, and no data set of that name"),
    (["a.png", "nothing.png"], 1, "nothing.png: no such file"), (["a.png", "pics"], 1, "pics is a folder; for the pictures in it"), (["a.png", "a.png"], 1, "which model?"),
    (["a.png", "wide.png", "--model", "digits"], 1, "wide.png is 1x8x9, and the model is for images of 1x8x8"), (["a.png", "color.png", "--model", "digits"], 1, "color.png is 3x8x8"),
    (["fine.png", "a.png", "--model", "digits"], 1, "fine.png has a pixel of 7; the model knows 17 gray levels"), (["a.png", "there", "--model", "digits"], 1, "there: not an image that can be read"),
    (["digits", 13, 20, "--model", "nobody"], 1, "no trained model 'nobody'"), (["digits", 13, 20, "--model", "fashion_mnist"], 1, "digits are 8x8 with 1 channel, and fashion_mnist draws images of 28x28 with 1 channel"),
    (["folder:nowhere", 3, 8], 1, "which model?"), (["folder:nowhere", 3, 8, "--model", "digits"], 1, "no such folder: nowhere"),
    (["digits", 13, 20, "--t", -1], 2, "t must be at least 0, got -1"), (["digits", 13, 20, "--t", 500, -2], 2, "t must be at least 0, got -2"), (["digits", 13, 20, "--t"], 2, "--t"),
    (["digits", 13, 20, "--t", 1.5], 2, "'1.5' is not a whole number (see"), (["digits", 13, 20, "--t", "250,500"], 2, "separate the values by spaces, 250 500 (see"),
    (["--t", 100, 200, "digits", 13, 20], 2, "'digits' is not a whole number; WHAT comes before --t"), (["--t", 100, "a.png", "a.png"], 2, "'a.png' is not a whole number; WHAT comes before --t"),
    (["digits", 13, 20, "--t", 9, 1001], 1, "t must be from 0 to 1000, the length of this model's chain, got 1001"),
    (["digits", 13, 20, "--n", 1], 2, "n must be at least 2"), (["digits", 13, 20, "--scale", 0], 2, "scale must be at least 1"), (["digits", 13, 20, "--seed", -1], 2, "seed must be"),
    (["digits", 13, 20, "--steps-used", 0], 2, "steps-used must be at least 1"), (["digits", 13, 20, "--steps-used", 1001], 1, "from 1 to 1000 steps can be kept, got 1001"),
    (["digits", 13, 20, "--noise", "loud"], 2, "unknown noise 'loud'; known: fixed, shared, fresh"), (["digits", 13, 20, "--mix", "round"], 2, "known: linear, preserving, spherical"),
    (["digits", 13, 20, "--variance", "learned"], 2, "unknown variance 'learned'; known: beta, beta_tilde, optimal"), (["digits", 13, 20, "--split", "all"], 2, "known: test, train"),
    (["digits", 13, 20, "-o", "pics"], 1, "pics is a folder: choose another --out"), (["digits", 13, 20, "-o", "a.png"], 1, "a.png exists: choose another --out, or --overwrite it"),
    (["digits", 13, 20, "-o", "line.jpg"], 2, "out must be the name of a .png file"), (["digits", 13, 20, "-o", "new/there/x.png", "--device", "none"], 1, "device 'none' cannot be used"),
    (["digits", 13, 20, "-o", "there/x/y.png"], 1, "there is a file, not a folder"), (["digits", 13, 20, "--steps", 5], 2, "unrecognized arguments")]


@pytest.mark.parametrize("args, status, said", WRONG, ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else None)
def test_refuses(args, status, said, call, here):
    Image.new("L", (8, 8)).save("a.png")
    Image.new("L", (9, 8)).save("wide.png")
    Image.new("L", (8, 8), 7).save("fine.png")
    Image.new("RGB", (8, 8), (1, 2, 3)).save("color.png")
    (here/"there").write_text("mine")
    (here/"pics").mkdir()
    before = contents(here)
    failed(call(ddpm_interpolate, *args), status, "ddpm_interpolate: ", said)
    assert contents(here) == before


def test_a_network_that_gives_nan_writes_nothing(call, here, run):
    shutil.copytree(run/"run", "bad")
    for file in (here/"bad").glob("*.safetensors"):
        if file.name != "model.safetensors": file.unlink()
    weights = load_file("bad/model.safetensors")
    with safe_open("bad/model.safetensors", "pt") as f: header = f.metadata()
    save_file({k: v*float("nan") if v.is_floating_point() else v for k, v in weights.items()}, "bad/model.safetensors", header)
    before = contents(here)
    status, out, err = call(ddpm_interpolate, *(run/"pics"/f"0{i}.png" for i in (1, 2)), "--model", "bad", "--out", "new/x.png", "--device", "cpu")
    assert status == 1 and not out and len(err.splitlines()) == 1 and "finite" in err, err
    assert contents(here) == before


def test_a_full_disk_or_ctrl_c_leaves_nothing(call, here, monkeypatch):
    def full(*args, **kw): raise OSError(28, "No space left on device", "x.png")
    def stopped(*args, **kw): raise KeyboardInterrupt
    (here/"old.png").write_text("old")
    for name, error, status in (("os.fsync", full, 1), ("ddpm_nbdev.interpolate_cli.interpolate", stopped, 130)):
        with monkeypatch.context() as m:
            m.setattr(name, error)
            assert call(ddpm_interpolate, "digits", 13, 20, *FAST, "--out", "old.png", "--overwrite")[0] == status
    assert contents(here) == {"old.png": b"old"}
    assert call(ddpm_interpolate, "digits", 13, 20, *FAST, "--out", "old.png", "--overwrite", "--quiet") == (0, "", "")
    assert Image.open("old.png").format == "PNG" and contents(here).keys() == {"old.png"}


def test_from_python(here):
    "Ordinary exceptions, numbers as numbers."
    go = partial(ddpm_interpolate, ["digits", 13, 20], steps_used=2, n=2, device="cpu", quiet=True)
    assert go(t=500).name == "digits_interpolation.png" and go(t=[500]).name == "digits_interpolation_2.png"
    assert (here/"digits_interpolation.png").read_bytes() == (here/"digits_interpolation_2.png").read_bytes()
    for said, kw in (("at least 0", dict(t=-1)), ("at least 0", dict(t=[500, -1])), ("one whole number", dict(t=[])), ("one whole number", dict(t=[2.5])), ("unknown mix", dict(mix="x"))):
        with pytest.raises(ValueError, match=said): go(**kw)
    with pytest.raises(ValueError, match="such as digits 13 20"): ddpm_interpolate("digits")
    assert len(list(here.iterdir())) == 2


def test_batches_do_not_matter(monkeypatch):
    ddpm = stride(DDPM.from_pretrained("digits"), [300, 1000])
    a, b = (_rows(ddpm, IMAGES[[13, 20]], [1, 2], 5, 0, dict(noise="fixed", mix="linear"), False, n) for n in (64, 2))
    assert a.shape == (14, 1, 8, 8) and (a.int()-b.int()).abs().max() <= 1


def test_help(call):
    for action in _make_parser(ddpm_interpolate.__wrapped__)._actions:
        assert action.help and not any("_" in s for s in action.option_strings)
    status, out, _ = call(ddpm_interpolate, "--help")
    assert status == 0 and "--t T [T ...]" in out and all(said in " ".join(out.split()) for said in (
        "two image files; or a data set and numbers of two images", "test images 13 and 20 (not the digits themselves)", "default: T/20, T/4, T/2 and T", "the images before --t"))


def test_t_given_twice_is_two_rows(call, here):
    "As with one option: the last one does not win."
    assert call(ddpm_interpolate, "digits", 13, 20, *FAST, "--t", 250, "--t", 1000, "--out", "a.png", "--quiet") == (0, "", "")
    assert call(ddpm_interpolate, "digits", 13, 20, *FAST, "--t", 250, 1000, "--out", "b.png", "--quiet") == (0, "", "")
    assert (here/"a.png").read_bytes() == (here/"b.png").read_bytes() and tiles("a.png", 2, 5, 8, 8).shape[0] == 2
