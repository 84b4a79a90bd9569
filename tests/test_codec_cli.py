"ddpm_compress and ddpm_decompress: images that come back to the last bit in another process, and whatever goes wrong is one line and writes nothing."
import os
import re
import shutil
import struct
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from conftest import Python, contents, failed
from PIL import Image
from safetensors.torch import load_file, save_file

from ddpm_nbdev import formats, models, saved
from ddpm_nbdev.calibration import calibrate, save_calibration
from ddpm_nbdev.cli import ddpm_evaluate, ddpm_sample, ddpm_train
from ddpm_nbdev.codec_cli import _grays, _model_name, _sheet, ddpm_compress, ddpm_decompress
from ddpm_nbdev.commands import _make_parser
from ddpm_nbdev.container import _head, unpack
from ddpm_nbdev.data import load_dataset
from ddpm_nbdev.ddpm import DDPM
from ddpm_nbdev.formats import _Progress
from ddpm_nbdev.interpolate_cli import ddpm_interpolate
from ddpm_nbdev.progressive import compress, fingerprints, send
from ddpm_nbdev.saved import _shipped
from ddpm_nbdev.train import TrainState, preset

torch.set_num_threads(1)
N, SHOW = 24, _Progress.show
IMAGES = load_dataset("digits").test[:N]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    "An empty current folder, a quick look at a network's errors, and no line of progress, which a busy machine would show."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_Progress, "show", lambda self: None)
    monkeypatch.setattr(models, "calibrate", partial(calibrate, points=12, pixels=15_000))
    return tmp_path


def deep_png(path, h, w):
    "A PNG of 16 bits a channel, which Pillow cannot write, by hand."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind+data))
    rows = (b"\0" + bytes(range(6*w)))*h
    with open(path, "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def pictures(folder, levels=17):
    "The levels in a folder of images, by a table of our own."
    level = {round(255*k/(levels-1)): k for k in range(levels)}
    files = sorted(p for p in folder.iterdir() if p.name != "sheet.png")
    assert [p.name for p in files] == [f"{i:03}.png" for i in range(len(files))] and (folder/"sheet.png").exists()
    return torch.tensor([[[level[v] for v in row] for row in np.asarray(Image.open(p)).tolist()] for p in files], dtype=torch.uint8)[:, None]


@pytest.fixture(scope="module")
def coded(once):
    "The same images in files of both kinds, each written by a process of its own."
    def make(folder):
        todo = [Python("-m", "ddpm_nbdev.codec_cli", "compress", "digits", "--images", N, "--quiet", *args, cwd=folder)
                for args in (["-o", "one.ddpm"], ["-o", "lanes.ddpm", "--lanes", N, "--seed", "5"], ["-o", "slow.ddpm", "--progressive", "--steps", "8"])]
        for p in todo:
            out, err = p.communicate()
            assert (p.returncode, out, err) == (0, "", ""), err
        return folder
    return once("coded", make)


@pytest.fixture(scope="module")
def run(once):
    "A finished tiny run, which has no tables yet."
    def make(folder):
        ddpm_train("digits", T=4, steps=4, batch_size=4, samples=0, out=str(folder/"run"), quiet=True)
        return folder/"run"
    return once("codec-run", make)


# ---- from one process to another

DECODERS = {   # what the reader's process does otherwise than the writer's, and what it reads
    "another process": ("", ["one", "slow"]),
    "other threads": ("torch.set_num_threads(2)", ["lanes"]),
    "other kernels and batches": ("""torch._C._set_mkldnn_enabled(False)
import ddpm_nbdev.progressive as p
p._few = lambda n, places: torch.arange(n).split(5)""", ["lanes", "slow"])}


@pytest.mark.parametrize("otherwise", DECODERS)
def test_another_process_gets_the_images_back(otherwise, coded, here):
    change, names = DECODERS[otherwise]
    code = f"""import torch
torch.set_num_threads(1)
{change}
from ddpm_nbdev.codec_cli import ddpm_decompress
for name in {names}: ddpm_decompress(f"{coded}/{{name}}.ddpm", out=name, quiet=True)"""
    p = Python("-c", code, cwd=here, env=dict(os.environ))
    out, err = p.communicate()
    assert (p.returncode, out, err) == (0, "", ""), err
    for name in names: assert torch.equal(pictures(here/name), IMAGES)
    assert unpack((coded/"lanes.ddpm").read_bytes())[0].lanes == N


def test_the_command_writes_what_the_function_returns(coded):
    "From Python the same file; and the sizes are those of a codec, not of a container."
    ddpm = models._tables_of("digits", models._load("digits", "cpu"))
    assert compress(ddpm, IMAGES, lanes=N, seed=5) == (coded/"lanes.ddpm").read_bytes()
    assert send(ddpm, IMAGES, steps=8) == (coded/"slow.ddpm").read_bytes()
    assert 8*(coded/"one.ddpm").stat().st_size/IMAGES.numel() < 2.6


def test_what_is_printed(call, here):
    status, out, err = call(ddpm_compress, "digits", "--images", 3, "--steps", 4)
    size = (here/"digits.ddpm").stat().st_size
    assert (status, err) == (0, "") and "3 images of 1x8x8, 17 levels, in " in out and "wrote digits.ddpm" in out
    rows = {name: [n, bits] for name, n, bits in re.findall(r"^(\S.+?)  +([\d,]+) +([\d.]+)$", out, re.M)}
    assert rows["this file"] == [str(size), f"{8*size/192:.3f}"] and {"PNG: one sheet", "PNG: 3 files"} <= rows.keys()
    assert "not counted: the weights and tables of digits, 1.1 MB" in out
    status, out, err = call(ddpm_decompress, "digits.ddpm")
    assert (status, err) == (0, "") and f"3 images from {size} bytes" in out and "wrote 3 PNG files and sheet.png into digits" in out
    assert call(ddpm_compress, "digits", "--images", 3, "--steps", 4, "--split", "train", "--quiet")[0] == 0       # a free name
    assert call(ddpm_decompress, "digits_2.ddpm", "--quiet") == (0, "", "")
    assert torch.equal(pictures(here/"digits_2"), load_dataset("digits").train[:3])


def test_progress(call, here, monkeypatch):
    "Images or steps, and bytes so far; nothing with --quiet."
    clock = iter(range(0, 10**6, 60))
    monkeypatch.setattr(formats.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(_Progress, "show", SHOW)
    def said(command, *args): return call(command, *args)[2].replace("\r", "\n").split("\n")
    lines = said(ddpm_compress, "digits", "--images", 3, "--steps", 2, "-o", "a.ddpm")
    assert [line.partition(": ")[2] for line in lines if line] == ["1 of 3 images", "2 of 3 images", "3 of 3 images", "3 of 3 images"]
    assert re.fullmatch(r"compressing, \d+ bytes so far: 3 of 3 images", lines[-2])
    assert said(ddpm_decompress, "a.ddpm")[-2] == "decompressing: 3 of 3 images"
    assert re.fullmatch(r"compressing, \d+ bytes so far: \d of \d steps", said(ddpm_compress, "digits", "--images", 3, "--steps", 4, "--progressive", "-o", "b.ddpm")[-2])
    assert re.fullmatch(r"decompressing: \d+ of \d+ bytes", said(ddpm_decompress, "b.ddpm")[-2])
    assert call(ddpm_compress, "digits", "--images", 1, "--steps", 2, "--quiet") == (0, "", "")


def test_info(call, coded, here):
    (here/"cut.ddpm").write_bytes((coded/"slow.ddpm").read_bytes()[:200])
    status, out, err = call(ddpm_compress, "--info", coded/"one.ddpm", "cut.ddpm")
    whole = (coded/"slow.ddpm").stat().st_size
    assert (status, err) == (0, "") and "24 images of 1 x 8 x 8, 17 levels" in out and f"of {whole:,} bytes are there" in out
    assert contents(here).keys() == {"cut.ddpm"}


@pytest.mark.parametrize("how", ["cut", "bytes"])
def test_a_part_of_a_progressive_file_is_a_preview(how, call, coded, here):
    data, args = (coded/"slow.ddpm").read_bytes(), []
    if how == "cut": (here/"slow.ddpm").write_bytes(data[:300])
    else:
        (here/"slow.ddpm").write_bytes(data)
        args = ["--bytes", 300]
    status, out, err = call(ddpm_decompress, "slow.ddpm", "-o", "preview", *args)
    assert (status, err) == (0, "") and f"300 of {len(data)} bytes are there ({30000//len(data)}%): these are previews, not the images" in out
    error = (pictures(here/"preview").float()-IMAGES).pow(2).mean().sqrt()
    assert .1 < error < 3                              # of 16; gray for all has 6
    assert call(ddpm_decompress, coded/"slow.ddpm", "-o", "whole", "--bytes", 10**6)[1].startswith("24 images")


# ---- image files

def save(path, pixels, **kw):
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **kw)
    return path


def test_files_of_gray_images(call, here):
    "Gray, gray in color, black and white; what comes out goes in again."
    x = _grays(17)[IMAGES[0, 0].numpy()]
    save("a.png", x)
    save("b.png", np.stack([x]*3, 2))
    Image.fromarray((x > 99)).save("c.bmp")
    assert call(ddpm_compress, "a.png", "b.png", "c.bmp", "--model", "digits", "--steps", 4, "--quiet") == (0, "", "")
    assert call(ddpm_decompress, "images.ddpm", "--quiet") == (0, "", "")
    a, b, c = pictures(here/"images")
    assert torch.equal(a, IMAGES[0]) and torch.equal(b, a) and torch.equal(c, 16*torch.from_numpy(x > 99).byte()[None])
    again = [f"images/00{i}.png" for i in range(3)]
    assert call(ddpm_compress, *again, "--model", "digits", "--steps", 4, "--quiet", "-o", "again.ddpm")[0] == 0
    assert (here/"again.ddpm").read_bytes() == (here/"images.ddpm").read_bytes()
    assert call(ddpm_compress, "a.png", "--model", "digits", "--steps", 4, "--quiet")[0] == 0 and (here/"a.ddpm").exists()


def test_a_run_on_color_pictures(call, here):
    "Its data are cut and scaled, and that is said; its files are not."
    (here/"pics").mkdir()
    g = np.random.default_rng(0)
    for i in range(12): save(here/f"pics/{i}.png", g.integers(0, 256, (8, 9, 3)))
    ddpm_train("folder:pics", T=4, steps=2, batch_size=4, samples=0, quiet=True)
    status, out, err = call(ddpm_compress, "folder:pics", "--lanes", 9, "--split", "train", "--images", 2)
    assert (status, err) == (0, "") and "cut and scaled to 3x8x8" in out and "measuring them on images of folder:" in out and "pics, once" in out
    assert call(ddpm_decompress, "pics.ddpm", "--model", "runs/pics", "-o", "back")[0] == 0
    back = np.stack([np.asarray(Image.open(here/f"back/00{i}.png")) for i in range(2)]).transpose(0, 3, 1, 2)
    assert (back == load_dataset("folder:pics", 8, 3).train[:2].numpy()).all()
    assert call(ddpm_compress, "back/000.png", "--model", "runs/pics", "--quiet") == (0, "", "")
    failed(call(ddpm_compress, "pics/3.png", "--model", "runs/pics"), 1, "pics/3.png is 3x8x9, and the model is for images of 3x8x8")
    save("gray.png", np.zeros((8, 8)))
    failed(call(ddpm_compress, "gray.png", "--model", "runs/pics"), 1, "gray.png is 1x8x8, and the model is for images of 3x8x8")


def test_tables_of_a_run(call, here, run):
    "Measured when they are first needed, again when the run has trained on; a file then says that it is of other weights."
    shutil.copytree(run, "runs/digits")
    before = contents(here/"runs/digits")
    def one(name): return call(ddpm_compress, "digits", "--model", "runs/digits", "--images", 2, "-o", name)
    assert "measuring them on images of digits, once" in one("a.ddpm")[1] and "measuring" not in one("b.ddpm")[1]
    assert (here/"a.ddpm").read_bytes() == (here/"b.ddpm").read_bytes()
    after = contents(here/"runs/digits")
    assert after.pop("calibration.safetensors") and after == before
    failed(call(ddpm_decompress, "a.ddpm"), 1, "a.ddpm: made with a model whose weights have hash", "none that ships (cifar10_small, digits, fashion_mnist): say with --model")
    assert call(ddpm_decompress, "a.ddpm", "--model", "runs/digits", "--quiet") == (0, "", "") and torch.equal(pictures(here/"a"), IMAGES[:2])
    ddpm_train("digits", steps=6, samples=0, out="runs/digits", resume=True, quiet=True)
    failed(call(ddpm_decompress, "a.ddpm", "--model", "runs/digits", "-o", "c"), 1, "has no tables of its present weights")
    assert "measuring" in one("d.ddpm")[1]
    failed(call(ddpm_decompress, "a.ddpm", "--model", "runs/digits", "-o", "c"), 1, "made with another model")


def test_a_stopped_run_is_called_one(call, here):
    "Its weights will be others when it goes on, and nobody can open the file then: said before it is written, by every command."
    state = TrainState(preset("digits", steps=9, T=4), load_dataset("digits"), "cpu")
    state.step = 3
    (here/"run").mkdir()
    state.save(here/"run/checkpoint.safetensors")
    made = "note: run has made 3 of 9 updates"
    status, out, err = call(ddpm_compress, "digits", "--model", "run", "--images", 2)
    assert (status, err) == (0, "") and f"{made}; if it goes on, the file can no longer be opened: keep a copy of its folder\n" in out
    assert call(ddpm_decompress, "digits.ddpm", "--model", "run", "--quiet") == (0, "", "") and torch.equal(pictures(here/"digits"), IMAGES[:2])
    for command, *args in ((ddpm_sample, "run", "--n", 1), (ddpm_interpolate, "digits", "1", "2", "--model", "run", "--n", 2, "--t", 2),
                           (ddpm_evaluate, "run", "--images", 2, "--curve-images", 1)):
        status, out, err = call(command, *args)
        assert (status, err) == (0, "") and f"{made}\n" in out, (command, out, err)
    assert "note" not in call(ddpm_sample, "digits", "--n", 1, "--steps-used", 2)[1]


def test_a_folder_of_that_name_does_not_hide_the_model_that_ships(call, here):
    "A file names its model by a hash; what happens to be called so where we are has another."
    assert call(ddpm_compress, "digits", "--images", 2, "-o", "a.ddpm", "--quiet") == (0, "", "")
    for name in ("digits", "cifar10_small"):
        (here/name).mkdir()
        (here/name/"model.safetensors").write_bytes(b"junk")
    assert call(ddpm_decompress, "a.ddpm", "--quiet") == (0, "", "") and torch.equal(pictures(here/"a"), IMAGES[:2])


def test_a_second_process_takes_the_tables_of_the_first(call, here, run, monkeypatch):
    "Both measure, which gives other numbers with another number of threads; who comes second uses what is there, so that both files can be read."
    measured = models.calibrate
    def slow(ddpm, x0, **kw):
        found = measured(ddpm, x0, **kw)
        if not (run/"calibration.safetensors").exists():      # another process was faster
            other = measured(ddpm, x0.flip(0), **kw)
            save_calibration(other.calibration, run, weights=fingerprints(ddpm)[0].hex())
        return found
    monkeypatch.setattr(models, "calibrate", slow)
    assert call(ddpm_compress, "digits", "--model", run, "--images", 2, "--quiet") == (0, "", "")
    assert call(ddpm_decompress, "digits.ddpm", "--model", run, "--quiet") == (0, "", "") and torch.equal(pictures(here/"digits"), IMAGES[:2])


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_damaged_package_is_called_one(damage, call, here, monkeypatch):
    "A shipped model never gets tables of its own making: files would be readable here alone. Files of other models open."
    home = shutil.copytree(_shipped("digits").parent, here/"package/weights")
    for module in (models, saved): monkeypatch.setattr(module, "files", lambda name: here/"package")
    assert call(ddpm_compress, "digits", "--images", 1, "--quiet", "-o", "a.ddpm") == (0, "", "")
    if damage == "missing": (home/"fashion_mnist/calibration.safetensors").unlink()
    else:
        file = home/"fashion_mnist/model.safetensors"
        file.write_bytes(flipped(file.read_bytes(), -9))
    save("x.png", np.zeros((28, 28)))
    failed(call(ddpm_compress, "x.png", "--model", "fashion_mnist"), 1, "fashion_mnist: its tables (calibration.safetensors) are missing, or not of these weights: install the package again")
    (home/"cifar10_small/model.safetensors").write_bytes(b"")
    assert call(ddpm_decompress, "a.ddpm", "--quiet") == (0, "", "") and torch.equal(pictures(here/"a"), IMAGES[:1])


def test_what_is_said_of_more(call, here):
    "Steps that nobody measured, pictures of before, and the name of an input as that of the output."
    status, out, _ = call(ddpm_compress, "digits", "--images", 2, "--steps", 1000, "-o", "a.ddpm")
    assert status == 0 and "note: 59 steps, all that were measured for digits" in out
    assert call(ddpm_compress, "digits", "--images", 1, "-o", "b.ddpm", "--quiet")[0] == 0
    assert "before" not in call(ddpm_decompress, "a.ddpm", "-o", "pile")[1]
    assert "note: 1 more that was there before" in call(ddpm_decompress, "b.ddpm", "-o", "pile", "--overwrite")[1]
    before = contents(here)
    failed(call(ddpm_compress, "pile/000.png", "--model", "digits", "-o", "pile/000.png", "--overwrite"), 2, "pile/000.png is one of the images: choose another --out")
    assert contents(here) == before
    assert ddpm_compress(here/"pile/000.png", model=_shipped("digits"), quiet=True).exists()         # paths are names, too


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a Unix")
@pytest.mark.parametrize("args", [("--info", "pipe"), ("--info", "/dev/zero")])
def test_what_has_no_end_is_not_read(args, call, here):
    os.mkfifo("pipe")
    failed(call(ddpm_compress, *args), 1, f"{args[1]}: not a regular file")
    failed(call(ddpm_decompress, args[1], "-o", "there"), 1, f"{args[1]}: not a regular file")


def test_no_more_is_read_than_the_header_says(call, here):
    "A file of a hundred gigabytes, nearly all of it a hole: refused by its length; and one whose header says as much."
    call(ddpm_compress, "digits", "--images", 1, "-o", "a.ddpm", "--quiet")
    data = (here/"a.ddpm").read_bytes()
    for head, said in ((data, "bytes more than its header says"), (b"junk", "not a compressed file"), (_head(unpack(data)[0], 2**35-1, 0), "34.4 GB, and")):
        with open("big.ddpm", "wb") as f:
            f.write(head)
            f.truncate(len(head) + (2**35-1 if "GB" in said else 10**11))
        failed(call(ddpm_decompress, "big.ddpm", "-o", "there"), 1, "big.ddpm: ", said)
        failed(call(ddpm_compress, "--info", "big.ddpm"), 1, "big.ddpm: ", said)
    assert call(ddpm_decompress, "a.ddpm", "--quiet")[0] == 0


# ---- what goes wrong

def flipped(data, i): return data[:i] + bytes([data[i] ^ 1]) + data[i+1:]


BAD = {"other magic": (lambda d: b"\x89PNG" + d, "not a compressed file of ddpm_nbdev, but a PNG image"),
       "newer version": (lambda d: d[:4] + b"\x02" + d[5:], "format 2, of a newer ddpm_nbdev: this one reads format 1"),
       "empty": (lambda d: b"", "an empty file"),
       "cut header": (lambda d: d[:20], "cut off inside its header"),
       "damaged header": (lambda d: flipped(d, 8), "damaged header"),
       "damaged body": (lambda d: flipped(d, 200), "damaged body"),
       "longer": (lambda d: d + b"!", "1 byte more than its header says")}


@pytest.mark.parametrize("kind", ["one", "slow"])
@pytest.mark.parametrize("bad", BAD)
def test_damaged_files(bad, kind, call, coded, here):
    damage, said = BAD[bad]
    (here/"x.ddpm").write_bytes(damage((coded/f"{kind}.ddpm").read_bytes()))
    before = contents(here)
    failed(call(ddpm_decompress, "x.ddpm"), 1, "ddpm_decompress: x.ddpm: ", said)
    failed(call(ddpm_compress, "--info", "x.ddpm"), 1, "ddpm_compress: x.ddpm: ", said)
    assert contents(here) == before


def test_cut_lossless_file(call, coded, here):
    (here/"x.ddpm").write_bytes((coded/"one.ddpm").read_bytes()[:300])
    failed(call(ddpm_decompress, "x.ddpm"), 1, "x.ddpm: cut off: ", "a lossless file needs all")
    failed(call(ddpm_decompress, coded/"one.ddpm", "--bytes", 300), 1, "one.ddpm: cut off: ")
    assert contents(here).keys() == {"x.ddpm"}


def test_another_model_or_other_tables(call, coded, here):
    file = coded/"one.ddpm"
    failed(call(ddpm_decompress, file, "--model", "fashion_mnist"), 1, "one.ddpm: made with another model: its weights have hash 71afbf3a")
    failed(call(ddpm_decompress, file, "--model", "nobody"), 1, "no trained model 'nobody'")
    shutil.copytree(_shipped("digits"), "mine")
    assert call(ddpm_decompress, file, "--model", "mine", "-o", "same", "--quiet") == (0, "", "")          # the same model, elsewhere
    tables = load_file("mine/calibration.safetensors")
    save_file(tables | {"mse": tables["mse"]*1.5}, "mine/calibration.safetensors", {"format": "ddpm_nbdev calibration 1"})
    failed(call(ddpm_decompress, file, "--model", "mine"), 1, "one.ddpm: made with other tables")
    (here/"mine/calibration.safetensors").unlink()
    failed(call(ddpm_decompress, file, "--model", "mine"), 1, "has no tables of its present weights")
    assert not (here/"one").exists()


@pytest.mark.parametrize("make, said", [
    (lambda: save("x.png", np.zeros((8, 9))), "x.png is 1x8x9, and the model is for images of 1x8x8"),
    (lambda: save("x.png", np.arange(192).reshape(8, 8, 3)), "x.png is 3x8x8, and the model is for images of 1x8x8"),
    (lambda: save("x.png", np.full((8, 8), 100)), "x.png has a pixel of 100; the model knows 17 gray levels: 0, 16, 32, ..., 255"),
    (lambda: save("x.png", np.zeros((8, 8, 4))), "x.png: an image of mode RGBA"),
    (lambda: Image.fromarray(np.zeros((8, 8), np.uint16)).save("x.png"), "x.png: an image of mode I"),
    (lambda: deep_png("x.png", 8, 8), "x.png: an image of mode RGB with 16 bits, which is neither 8-bit gray nor 8-bit color"),
    (lambda: open("x.png", "wb").write(b"P6 8 8 65535\n" + bytes(6*64)), "x.png: an image of mode RGB with 16 bits"),
    (lambda: save("x.png", np.zeros((8, 8)), transparency=0), "x.png has transparency"),
    (lambda: save("x.png", np.zeros((8, 8)), save_all=True, append_images=[Image.fromarray(np.ones((8, 8), np.uint8))]), "x.png holds several images"),
    (lambda: open("x.png", "w").write("no image"), "x.png: not an image that can be read"),
    (lambda: open("x.png", "wb").close(), "x.png: not an image that can be read"),
    (lambda: os.mkdir("x.png"), "x.png is a folder; for the pictures in it: folder:x.png"),
    (lambda: None, "x.png: no such file, and no data set of that name; known: digits")])
def test_images_that_do_not_fit(make, said, call, here):
    make()
    before = contents(here)
    failed(call(ddpm_compress, "x.png", "--model", "digits"), 1, "ddpm_compress: ", said)
    assert contents(here) == before


def test_cut_images(call, here):
    save("x.png", np.random.default_rng(0).integers(0, 2, (8, 8))*255)
    data = (here/"x.png").read_bytes()
    for n in (40, len(data)//2+20):
        (here/"x.png").write_bytes(data[:n])
        failed(call(ddpm_compress, "x.png", "--model", "digits"), 1, "x.png")
    assert contents(here).keys() == {"x.png"}


@pytest.mark.parametrize("args, status, said", [
    ([], 2, "WHAT"), (["digits", "--images", 0], 2, "images must be at least 1"), (["digits", "--steps", 0], 2, "steps must be"), (["digits", "--lanes", 0], 2, "lanes must be"),
    (["digits", "--seed", -1], 2, "seed must be"), (["digits", "--split", "all"], 2, "split must be test or train, got all"),
    (["digits", "--progressive", "--lanes", 4], 2, "lanes are for files of the other kind"), (["digits", "--device", "cpu"], 2, "unrecognized arguments"),
    (["digits", "--model", "fashion_mnist"], 1, "digits are 8x8"),
    (["digits", "digits"], 1, "digits is a data set: it cannot be mixed"), (["cifar10_small"], 1, "cifar10_small is a model: name images, or the data set cifar10, and --model cifar10_small"), (["folder:nowhere", "--model", "digits"], 1, "no such folder: nowhere"),
    (["folder:nowhere"], 1, "which model?", ), (["lsun:cats"], 1, "with --model; there is none in runs/cats"),
    (["digits", "--model", "nobody"], 1, "no trained model 'nobody'"), (["digits", "-o", "there"], 1, "there exists: choose another --out, or --overwrite it"),
    (["digits", "-o", "folder"], 1, "folder is a folder"), (["digits", "-o", "there/x.ddpm", "--images", 1, "--steps", 2], 1, "there"),
    (["--info", "nothing"], 1, "nothing: No such file or directory"), (["--info", "folder"], 1, "folder: Is a directory")])
def test_compress_refuses(args, status, said, call, here):
    (here/"there").write_text("mine")
    (here/"folder").mkdir()
    before = contents(here)
    failed(call(ddpm_compress, *args), status, said)
    assert contents(here) == before


def test_nothing_to_compress_from_python():
    with pytest.raises(ValueError, match="no image to compress"): ddpm_compress([])
    with pytest.raises(ValueError, match="no such file"): ddpm_compress("mnist")


@pytest.mark.parametrize("args, status, said", [
    ([], 2, "FILE"), (["one.ddpm", "--bytes", 0], 2, "bytes must be at least 1"), (["nothing"], 1, "nothing: No such file or directory"), (["full"], 1, "full: Is a directory"),
    (["one.ddpm", "-o", "full"], 1, "full is not empty: choose another --out, or --overwrite it"), (["one.ddpm", "-o", "there"], 1, "there is a file: choose a folder")])
def test_decompress_refuses(args, status, said, call, coded, here):
    shutil.copy(coded/"one.ddpm", here)
    (here/"there").write_text("mine")
    (here/"full").mkdir()
    (here/"full/000.png").write_text("mine")
    before = contents(here)
    failed(call(ddpm_decompress, *args), status, said)
    assert contents(here) == before


def test_overwrite(call, here):
    "What was asked for is replaced, and nothing else."
    (here/"out").mkdir()
    (here/"out/000.png").write_text("old")
    (here/"out/mine").write_text("mine")
    (here/"x.ddpm").write_text("old")
    assert call(ddpm_compress, "digits", "--images", 2, "--steps", 2, "-o", "x.ddpm", "--overwrite", "--quiet") == (0, "", "")
    assert call(ddpm_decompress, "x.ddpm", "-o", "out", "--overwrite", "--quiet") == (0, "", "")
    assert (here/"out/mine").read_text() == "mine" and contents(here).keys() == {"x.ddpm", "out", *(f"out/{n}" for n in ("000.png", "001.png", "mine", "sheet.png"))}


def test_a_full_disk_leaves_nothing(call, here, monkeypatch):
    assert call(ddpm_compress, "digits", "--images", 2, "--steps", 2, "-o", "x.ddpm", "--quiet")[0] == 0
    before, real = contents(here), Image.Image.save
    def full(self, path, *args, **kw):
        if "001" in str(path): raise OSError(28, "No space left on device", str(path))
        return real(self, path, *args, **kw)
    monkeypatch.setattr(Image.Image, "save", full)
    failed(call(ddpm_decompress, "x.ddpm", "-o", "out"), 1, "No space left on device")
    assert contents(here) == before


@pytest.mark.parametrize("command", [ddpm_compress, ddpm_decompress])
def test_help(command, call):
    for action in _make_parser(command.__wrapped__)._actions:
        assert action.help and not any("_" in s for s in action.option_strings)
    status, out, _ = call(command, "--help")
    assert status == 0 and "-o" in out and "Always on the CPU" in " ".join(out.split())


def test_sheet_by_hand():
    for n in (1, 2, 3, 4, 5, 9, 10):
        x = np.random.default_rng(n).integers(0, 256, (n, 2, 3)).astype(np.uint8)
        ncol = next(c for c in range(1, 9) if c*c >= n)
        want = np.zeros((-(-n//ncol)*2, ncol*3), np.uint8)
        for i in range(n): want[i//ncol*2:i//ncol*2+2, i % ncol*3:i % ncol*3+3] = x[i]
        assert (_sheet(x) == want).all()


def test_a_data_set_has_its_model(tmp_path, monkeypatch):
    "The one of its name that ships; else a run of one's own; else the one that ships and was trained on it."
    monkeypatch.chdir(tmp_path)
    assert [_model_name(None, d) for d in ("digits", "fashion_mnist", "cifar10")] == ["digits", "fashion_mnist", "cifar10_small"]
    DDPM.from_pretrained("cifar10_small").save("runs/cifar10")
    assert _model_name(None, "cifar10") == "runs/cifar10" and _model_name("digits", "cifar10") == "digits"
