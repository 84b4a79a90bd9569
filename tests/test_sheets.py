"What ddpm_sample and its siblings write: every pixel in its place, by plain NumPy; and all of it or nothing, whatever happens meanwhile."
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import contents, failed
from PIL import Image, ImageSequence
from safetensors.torch import load_file

from ddpm_nbdev import cli, codec_cli, interpolate_cli, sheets
from ddpm_nbdev.cli import ddpm_sample
from ddpm_nbdev.codec_cli import ddpm_compress, ddpm_decompress
from ddpm_nbdev.ddpm import draw_samples
from ddpm_nbdev.interpolate_cli import ddpm_interpolate
from ddpm_nbdev.plot import save_images
from ddpm_nbdev.run import _save_samples

torch.set_num_threads(1)
FAST = ["digits", "--steps-used", 4, "--device", "cpu"]
NUMBERS = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sampling(monkeypatch):
    "Says whether anything was drawn."
    drawn = []
    def watched(*args, **kw):
        drawn.append(1)
        return draw_samples(*args, **kw)
    monkeypatch.setattr(cli, "draw_samples", watched)
    return drawn


def by_hand(images, ncol, scale):
    "Gray values `(n, h, w, 3)` put into one picture, pixel by pixel."
    n, h, w, _ = images.shape
    rows = (n+ncol-1)//ncol
    picture = np.full((scale*(rows*(h+1)-1), scale*(ncol*(w+1)-1), 3), 255, np.uint8)
    for i in range(n):
        for y in range(h*scale):
            for x in range(w*scale): picture[i//ncol*(h+1)*scale+y, i % ncol*(w+1)*scale+x] = images[i, y//scale, x//scale]
    return picture


def as_colors(levels): return np.rint(np.asarray(levels).transpose(0, 2, 3, 1)*(255/16)).astype(np.uint8).repeat(3, -1)   # of the digits


def read(file): return np.asarray(Image.open(file).convert("RGB"))


# ---- pixels

def test_columns_and_scale(call, here):
    assert call(ddpm_sample, *FAST, "--n", 7, "--out", "x.safetensors")[0] == 0
    x = as_colors(load_file("x.safetensors")["images"])
    for name, ncol, scale, args in (("a.png", 3, 4, []), ("b.png", 5, 2, ["--ncol", 5, "--scale", 2]), ("c.png", 7, 1, ["--ncol", 99, "--scale", 1]), ("d.png", 1, 9, ["--ncol", 1, "--scale", 9])):
        assert call(ddpm_sample, *FAST, "--n", 7, "--out", name, *args)[0] == 0
        assert (read(name) == by_hand(x, ncol, scale)).all()


@pytest.mark.parametrize("n, digits", [(1, 1), (10, 1), (11, 2)])
def test_each(n, digits, call, here):
    status, out, err = call(ddpm_sample, *FAST, "--n", n, "--each", "--scale", 3)
    assert (status, err) == (0, "") and f"wrote {n} PNG file{'s'*(n > 1)} into digits_samples\n" in out
    assert call(ddpm_sample, *FAST, "--n", n, "--out", "x.safetensors")[0] == 0
    x = as_colors(load_file("x.safetensors")["images"])
    assert sorted(os.listdir("digits_samples")) == sorted(f"{i:0{digits}}.png" for i in range(n))
    for i in range(n):
        with Image.open(f"digits_samples/{i:0{digits}}.png") as im: assert im.mode == "L"
        assert (read(f"digits_samples/{i:0{digits}}.png") == by_hand(x[i:i+1], 1, 3)).all()
    assert call(ddpm_sample, *FAST, "--n", n, "--each", "--out", "a/b.c")[0] == 0
    assert Image.open(f"a/b.c/{'0'*digits}.png").size == (8, 8)
    assert call(ddpm_sample, *FAST, "--n", n, "--each")[0] == 0 and len(os.listdir("digits_samples_2")) == n


@pytest.mark.parametrize("c", [1, 2, 3, 4])
def test_any_channels(c, here):
    "Two or four stand side by side, in the picture, the film and the single files."
    levels, moved = (torch.from_numpy(NUMBERS.integers(0, 256, (3, c, 5, 6), np.uint8)) for _ in range(2))
    shown = np.concatenate(list(levels.numpy().swapaxes(0, 1)), -1)[..., None].repeat(3, -1) if c in (2, 4) else levels.numpy().transpose(0, 2, 3, 1)
    shown = shown.repeat(3, -1) if c == 1 else shown
    def write(**kw):
        plan = sheets._fit(sheets._ask("x", **kw), 3, (c, 5, 6), 2)
        return sheets._write_samples(plan, levels, [moved, levels.flip(0), levels], 256)
    assert (read(write(ncol=2, gif=True)) == by_hand(shown, 2, 4)).all()
    film = Image.open("x_samples_chain.gif")
    film.seek(2)
    off = np.abs(np.asarray(film.convert("RGB")).astype(int) - by_hand(shown, 2, 4))
    assert off.max() <= (0 if c != 3 else 24)                                # a GIF has 256 colors a frame
    folder = write(each=True, scale=2)
    for i in range(3): assert (read(folder/f"{i}.png") == by_hand(shown[i:i+1], 1, 2)).all()


def test_training_enlarges_the_same(here):
    "samples.png of a run, and the sheet of unpacked files."
    for side, scale in ((8, 4), (28, 3), (32, 2), (64, 1)):
        x = torch.from_numpy(NUMBERS.integers(0, 256, (4, 1, side, side), np.uint8))
        _save_samples(x, here/"samples.png", 256)
        assert (read("samples.png") == by_hand(x.numpy().transpose(0, 2, 3, 1).repeat(3, -1), 2, scale)).all()
        assert sheets._fit(sheets._ask("x"), 4, (1, side, side), 9).scale == scale


# ---- films

def test_film(call, here, sampling):
    "Frames, their order and how long they stay; the last one is the picture; the strip shows the same moments."
    status, out, err = call(ddpm_sample, *FAST, "--n", 5, "--gif", "--ncol", 2, "--scale", 3, "--out", "a.png")
    assert (status, err) == (0, "") and out.endswith("wrote a.png\nwrote a_chain.gif, 5 frames\n") and contents(here).keys() == {"a.png", "a_chain.gif"}
    film = Image.open("a_chain.gif")
    frames = [(np.asarray(f.convert("RGB")), f.info["duration"]) for f in ImageSequence.Iterator(film)]
    assert film.info["loop"] == 0 and [w for _, w in frames] == [100]*4 + [2000]
    assert (frames[-1][0] == read("a.png")).all() and not (frames[-2][0] == read("a.png")).all()
    status, out, err = call(ddpm_sample, *FAST, "--n", 5, "--gif", "--steps-shown", 3, "--scale", 3, "--out", "b.png")
    assert (status, err) == (0, "") and out.endswith("wrote b_chain.png, t = 1000 500 0\nwrote b_chain.gif, 3 frames\n")
    three = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(Image.open("b_chain.gif"))]
    strip = read("b_chain.png")
    for k, (mine, other) in enumerate(zip(three[:2], (frames[0][0], frames[2][0]))):
        for i in range(5):
            def tile(x, ncol, j): return x[j//ncol*27:][:24, j % ncol*27:][:, :24]
            assert (tile(mine, 3, i) == tile(other, 2, i)).all() and (tile(mine, 3, i) == tile(strip, 3, 3*i+k)).all()
    assert call(ddpm_sample, *FAST, "--n", 2, "--each", "--gif", "--out", "c")[0] == 0 and Path("c_chain.gif").exists()
    failed(call(ddpm_sample, *FAST, "--gif", "--out", "d.png", "--steps-shown", 6), 1, "has 5 moments")
    for film in ("gif", "mp4"):                                              # its name is kept as well
        Path(f"e_chain.{film}").touch()
        if film == "mp4" and not shutil.which("ffmpeg"): continue
        failed(call(ddpm_sample, *FAST, f"--{film}", "--out", "e.png"), 1, f"e_chain.{film} exists")
    assert len(sampling) == 3


def test_default_film_has_fifty_frames(call, here):
    assert call(ddpm_sample, "digits", "--n", 1, "--gif", "--steps-used", 60, "--device", "cpu")[1].endswith("wrote digits_samples_chain.gif, 50 frames\n")


@pytest.fixture
def ffmpeg(here, monkeypatch):
    "An encoder that keeps the raw frames, and what it was told."
    (here/"bin").mkdir()
    (here/"bin/ffmpeg").write_text(f'#!/bin/sh\nprintf "%s " "$@" > {here}/said\nfor last; do :; done\nif [ -e {here}/broken ]; then echo "no encoder here" >&2; exit 1; fi\ncat > "$last"\n')
    (here/"bin/ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here/'bin'}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_mp4_by_a_program_that_keeps_what_it_gets(call, here, ffmpeg):
    status, out, err = call(ddpm_sample, *FAST, "--n", 4, "--mp4", "--gif", "--scale", 1, "--out", "a.png")
    assert (status, err) == (0, "") and out.endswith("a_chain.gif, 5 frames\nwrote a_chain.mp4, 5 frames\n")
    raw = np.frombuffer(Path("a_chain.mp4").read_bytes(), np.uint8).reshape(-1, 18, 18, 3)   # 17 is no size for an encoder
    assert len(raw) == 4 + 20 and (raw[:, 17:] == 255).all() and (raw[:, :, 17:] == 255).all()   # two seconds at ten frames each
    gif = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(Image.open("a_chain.gif"))]
    for i, frame in enumerate(raw): assert (frame[:17, :17] == gif[min(i, 4)]).all()
    assert "-s 18x18 -r 10" in Path("said").read_text()
    Path("broken").touch()
    failed(call(ddpm_sample, *FAST, "--n", 4, "--mp4", "--out", "b.png"), 1, "ffmpeg made no film (no encoder here); --gif needs no ffmpeg")
    assert not list(here.glob("b*g"))


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg")
def test_mp4_by_ffmpeg(call, here):
    assert call(ddpm_sample, *FAST, "--n", 4, "--mp4", "--out", "a.png")[0] == 0
    raw = subprocess.run(["ffmpeg", "-loglevel", "error", "-i", "a_chain.mp4", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True).stdout
    frames = np.frombuffer(raw, np.uint8).reshape(24, 68, 68, 3)
    assert np.abs(frames[-1].astype(int) - read("a.png")).mean() < 12


def test_mp4_without_an_encoder(call, here, sampling, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    failed(call(ddpm_sample, *FAST, "--mp4"), 1, "--mp4 needs ffmpeg, which is not installed: pip install imageio-ffmpeg, or take --gif")
    assert not sampling and not contents(here)


# ---- refused, before anything is drawn

@pytest.mark.parametrize("args, status, said", [
    (["--each", "--out", "a.png"], 2, "--each writes many files: out must be the name of a folder, got a.png"), (["--each", "--ncol", 3], 2, "--ncol is for one picture of all images, and --each is none"),
    (["--out", "a.safetensors", "--ncol", 3], 2, "a .safetensors file is none"), (["--out", "a.safetensors", "--scale", 3], 2, "--scale is for pictures"),
    (["--scale", 0], 2, "scale must be at least 1, got 0"), (["--ncol", -1], 2, "ncol must be at least 1, got -1"), (["--n", 4, "--scale", 10_000], 2, "4 images in one picture, each image of 80000x80000 pixels, would have more than 100 million pixels: --scale 588 would fit"),
    (["--each", "--scale", 10_000], 2, "one file, each image of 80000x80000 pixels, would have more than 100 million pixels: --scale 1250 would fit"), (["--n", 10**9], 2, "--n 1234321 (or all of them with --each, or in a .safetensors file) would fit"),
    (["--n", 10**400], 2, "--n 1234321 (or"), (["--n", 10**9, "--scale", 5], 2, "--scale 1 and --n 1234321 (or"), (["--each", "--gif", "--n", 1, "--scale", 600], 2, "5 frames of a film, each image of 4800x4800 pixels, would have more than 100 million pixels: --scale 559 would fit"), (["--out", "new"], 2, "(or, with --each, of a folder), got new"),
    (["--n", 10**15, "--out", "a.safetensors"], 1, "GB are free there: --n"), (["--each", "--out", "file"], 1, "file is a file"), (["--out", "file/a.png"], 1, "file is a file, not a folder"),
    (["--each", "--out", "full"], 1, "full is not empty"), (["--each", "--out", "full", "--overwrite"], 1, "full holds more than numbered pictures, such as mine.txt"),
    (["--each", "--out", ".", "--overwrite"], 1, "holds the current folder"), (["--out", "dir.png", "--overwrite"], 1, "dir.png is a folder"), (["--out", "x"*250 + ".png"], 1, "cannot be written (File name too long)"),
    (["--out", "dangling.png"], 1, "dangling.png exists")], ids=lambda v: " ".join(map(str, v))[:40] if isinstance(v, list) else None)
def test_refused(args, status, said, call, here, sampling):
    Path("file").touch()
    Path("full").mkdir()
    Path("full/mine.txt").touch()
    Path("full/0.png").touch()
    Path("dir.png").mkdir()
    os.symlink("nowhere", "dangling.png")
    before, tree = contents(here), sorted(map(str, here.rglob("*")))
    failed(call(ddpm_sample, *FAST, *args), status, "ddpm_sample: ", said)
    assert contents(here) == before and sorted(map(str, here.rglob("*"))) == tree and not sampling


@pytest.mark.parametrize("command, module, args", [(ddpm_sample, cli, FAST), (ddpm_sample, cli, [*FAST, "--each"]), (ddpm_interpolate, interpolate_cli, ["digits", 1, 2]), (ddpm_compress, codec_cli, ["digits", "--images", 2])])
def test_a_place_where_nothing_can_be_written_is_noticed_first(command, module, args, call, here, monkeypatch):
    "By trying, since root may write where the rights say no, and a disk may be read-only."
    import tempfile
    def read_only(*args, **kw): raise OSError(30, "Read-only file system")
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", read_only)
    monkeypatch.setattr(module, "find_model" if hasattr(module, "find_model") else "_load", lambda *a, **kw: pytest.fail("began"))
    failed(call(command, *args, "--out", "new/a" + ".png"*("--each" not in args)), 1, "cannot be written (Read-only file system)")
    assert not list(here.iterdir())


# ---- whole, or nothing

JOBS = {"picture": ["--out", "a.png"], "all": ["--out", "a.png", "--gif", "--steps-shown", 3], "tensor": ["--out", "a.safetensors", "--gif"], "each": ["--out", "a", "--each", "--gif"]}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("error, status", [(OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130)], ids=["full disk", "Ctrl-C"])
def test_nothing_is_lost_and_no_half_is_left(job, error, status, call, here, monkeypatch):
    "At every write, into an empty folder and over what an earlier command left."
    writes = ("fsync", os, "fsync"), ("save", Image.Image, "save"), ("link", os, "link"), ("rename", os, "rename"), ("replace", os, "replace")
    for args, old in (([], False), (["--overwrite"], True)):
        for name, module, function in writes:
            k = 0
            while True:
                real, calls = getattr(module, function), []
                def failing(*a, **kw):
                    calls.append(a)
                    if len(calls) == k+1: raise error
                    return real(*a, **kw)
                before = contents(here)
                with monkeypatch.context() as m:
                    m.setattr(module, function, failing)
                    result = call(ddpm_sample, *FAST, "--n", 2, "--seed", k, *JOBS[job], *args, "--quiet")
                if result[0] == 0: break
                failed((result[0], result[1], result[2].strip()), status)
                assert contents(here) == before and not [p for p in here.rglob("*") if p.name.endswith(".tmp")], (name, k)
                k += 1
            assert k == len(calls) or (name == "link" and status == 1)              # without a second name, a file is renamed
            if not old:
                for p in list(here.iterdir()): shutil.rmtree(p) if p.is_dir() else p.unlink()
        if not old: assert call(ddpm_sample, *FAST, "--n", 3, *JOBS[job], "--quiet")[0] == 0   # what is there the second time


def test_each_replaces_a_folder_of_pictures(call, here):
    assert call(ddpm_sample, *FAST, "--n", 12, "--each", "--out", "a")[0] == 0
    assert call(ddpm_sample, *FAST, "--n", 3, "--each", "--out", "a", "--overwrite")[0] == 0
    assert contents(here).keys() == {"a", *(f"a/{i}.png" for i in range(3))}
    assert stat.S_IMODE(os.stat("a").st_mode) == 0o777 & ~umask() and stat.S_IMODE(os.stat("a/0.png").st_mode) == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---- two at a time

def meanwhile(monkeypatch, module, function, path):
    "While that function works, another program writes there."
    real = getattr(module, function)
    def slow(*args, **kw):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"theirs")
        return real(*args, **kw)
    monkeypatch.setattr(module, function, slow)


@pytest.mark.parametrize("command, module, function, args, name, end", [
    (ddpm_sample, cli, "draw_samples", [*FAST, "--n", 2], "digits_samples", ".png"), (ddpm_sample, cli, "draw_samples", [*FAST, "--n", 2], "digits_samples", ".safetensors"),
    (ddpm_interpolate, interpolate_cli, "_rows", ["digits", 1, 2, "--n", 2, "--steps-used", 2, "--device", "cpu"], "digits_interpolation", ".png"),
    (ddpm_compress, codec_cli, "_encode", ["digits", "--images", 1, "--steps", 2], "digits", ".ddpm")])
def test_two_commands_on_one_name_lose_nothing(command, module, function, args, name, end, call, here, monkeypatch):
    "The second one's work goes to the next name; that is an error if the user chose the first."
    file = here/f"{name}{end}"
    meanwhile(monkeypatch, module, function, file)
    if end != ".safetensors":
        status, out, err = call(command, *args)
        assert (status, err) == (0, "") and f"{name}_2{end}" in out
        assert contents(here).keys() == {file.name, f"{name}_2{end}"} and file.read_bytes() == b"theirs"
    file.unlink(missing_ok=True)
    status, out, err = call(command, *args, "--out", file.name)
    assert status == 1 and err.count("\n") == 1 and f"{file.name} is there by now, from another program, and stays; what was made here is in {name}_" in err
    assert file.read_bytes() == b"theirs" and len(contents(here)) == (2 if end == ".safetensors" else 3)
    assert call(command, *args, "--out", file.name, "--overwrite")[0] == 0 and file.read_bytes() != b"theirs"


def test_a_folder_that_appears_meanwhile_stays(call, here, monkeypatch):
    "Of unpacked files, too."
    assert call(ddpm_compress, "digits", "--images", 2, "--steps", 2, "--out", "x.ddpm", "--quiet")[0] == 0
    meanwhile(monkeypatch, codec_cli, "_decode", here/"x/000.png")
    status, out, err = call(ddpm_decompress, "x.ddpm")
    assert (status, err) == (0, "") and out.endswith("sheet.png into x_2\n") and sorted(os.listdir("x_2")) == ["000.png", "001.png", "sheet.png"]
    shutil.rmtree("x")
    failed(call(ddpm_decompress, "x.ddpm", "--out", "x", "--quiet"), 1, "x is there by now, from another program, and stays; what was made here is in x_3")
    assert os.listdir("x") == ["000.png"] and len(os.listdir("x_3")) == 3
    failed(call(ddpm_decompress, "x.ddpm", "--out", "x.ddpm/y"), 1, "x.ddpm/y: cannot be written (", "is a file, not a folder")


def test_files_of_one_command_keep_one_name(call, here, monkeypatch):
    "Where only the film's name was taken, all go to the next."
    meanwhile(monkeypatch, cli, "draw_samples", here/"digits_samples_chain.gif")
    status, out, err = call(ddpm_sample, *FAST, "--n", 2, "--gif", "--steps-shown", 2)
    assert (status, err) == (0, "")
    assert contents(here).keys() == {"digits_samples_chain.gif", *(f"digits_samples_2{end}" for end in (".png", "_chain.png", "_chain.gif"))}
    meanwhile(monkeypatch, cli, "draw_samples", here/"one/0.png")
    failed(call(ddpm_sample, *FAST, "--n", 2, "--each", "--out", "one", "--quiet"), 1, "what was made here is in one_2")
    assert sorted(os.listdir("one_2")) == ["0.png", "1.png"] and contents(here)["one/0.png"] == b"theirs"


def test_a_picture_is_the_one_that_save_images_writes(call, here):
    assert call(ddpm_sample, *FAST, "--n", 5, "--out", "a.png")[0] == call(ddpm_sample, *FAST, "--n", 5, "--out", "a.safetensors")[0] == 0
    save_images(load_file("a.safetensors")["images"], "b.png", scale=4, levels=17)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
