"Data: what is in the files comes out as it is, and every choice is fixed for all time."
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import socket
import struct
import sys
import tarfile
import threading
import time
import tracemalloc
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Python
from PIL import Image

import ddpm_nbdev
from ddpm_nbdev import formats, machines
from ddpm_nbdev.data import DATASETS, Batches, Dataset, _coins, _mirror, batch_indices, epoch_order, load_dataset
from ddpm_nbdev.formats import SOURCES, _Progress, fetch
from ddpm_nbdev.images import read_image
from ddpm_nbdev.machines import _free_memory
from ddpm_nbdev.pictures import _split_images, read_folder
from ddpm_nbdev.plot import save_images
from ddpm_nbdev.train import _small_unet_args

HOME = Path(ddpm_nbdev.__file__).parent


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    "Nothing that lies on this machine is read: no DDPM_DATA, no package of Debian's, an empty cache."
    for name in ("DDPM_DATA", "RANK", "LOCAL_WORLD_SIZE"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(formats, "_DEBIAN", tmp_path/"none")
    monkeypatch.setattr(formats.pooch, "os_cache", lambda name: tmp_path/"cache"/name)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def load_folder(path, **kw): return load_dataset(f"folder:{path}", **kw)


def save(folder, name, array, **kw):
    path = folder/name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **kw)
    return path


# ---- digits

def test_digits_are_scikit_learns():
    sklearn = pytest.importorskip("sklearn.datasets")
    theirs, ours = sklearn.load_digits(), load_dataset("digits")
    test = np.array([1111*i % 1797 < 360 for i in range(1797)])
    for part, chosen in (("train", ~test), ("test", test)):
        np.testing.assert_array_equal(getattr(ours, part)[:, 0].numpy(), theirs.images[chosen])
        np.testing.assert_array_equal(getattr(ours, part+"_labels").numpy(), theirs.target[chosen])


def test_digits_and_split_never_change():
    d = load_dataset("digits")
    digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in (d.train, d.test, d.train_labels, d.test_labels))).hexdigest()
    assert digest[:16] == "52b08632753975fe"
    assert (len(d.train), len(d.test), d.levels, d.flip, d.shape, d.train.dtype) == (1437, 360, 17, False, (1, 8, 8), torch.uint8)


def test_source_and_license_ship_with_the_file():
    text = (HOME/"data/README.md").read_text()
    for word in ("10.24432/C50P49", "CC BY 4.0", "Alpaydin", "Kaynak", "scikit-learn", "1111*i mod 1797 < 360"): assert word in text
    assert (HOME/"data/digits.safetensors").stat().st_size < 150_000


@pytest.mark.parametrize("name, kw, said", [("mnist", {}, "unknown dataset 'mnist'; known: digits, folder:PATH"), ("", {}, "unknown dataset ''"), ("digits:x", {}, "takes no path"),
    ("digits", dict(size=16), "8x8"), ("digits", dict(channels=3), "8x8"), ("folder", {}, "needs a path"), ("folder:", {}, "needs a path"), ("folder:/none/here", {}, "no such folder")])
def test_what_cannot_be_loaded(name, kw, said):
    with pytest.raises(ValueError, match=said): load_dataset(name, **kw)


def test_a_folder_without_the_word_is_pointed_out(tmp_path):
    with pytest.raises(ValueError, match=f"unknown dataset .* for the pictures in that folder: 'folder:{re.escape(str(tmp_path))}'"):
        load_dataset(str(tmp_path))


def test_a_new_dataset_is_one_entry(monkeypatch):
    one = Dataset("one", torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
    monkeypatch.setitem(DATASETS, "one", lambda path, size, channels, data_dir: one)
    assert load_dataset("one") is one
    with pytest.raises(ValueError, match="known: digits, folder:PATH, .*one"): load_dataset("two")


U8 = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize("kw, said", [(dict(train=U8.numpy()), "train must be a uint8 tensor (n, c, h, w) of levels 0..255, got a ndarray: torch.from_numpy(x)"), (dict(test=[1]), "test must be a uint8 tensor (n, c, h, w) of levels 0..255, got a list"),
    (dict(train=U8[:, 0]), "got the shape (4, 8, 8): x[:, None] adds the channel"), (dict(test=U8[:, :, :0]), "got the shape (4, 1, 0, 8)"), (dict(train=U8/255), "got torch.float32; of floats in [-1, 1]: to_uint8(x, levels)"),
    (dict(train=U8.long()), "got torch.int64; of whole numbers: x.to(torch.uint8)"), (dict(train=U8+17, levels=17), "of levels 0..16, got 17"), (dict(levels=300), "levels must be a whole number from 2 to 256"),
    (dict(test=U8[..., :4]), "train and test must hold images of one shape, got (1, 8, 8) and (1, 8, 4)"), (dict(train=U8[:0]), "no image to train on"), (dict(train_labels=torch.zeros(3)), "train_labels must be one for each of 4 images, got 3")])
def test_a_dataset_says_what_is_wrong_with_it(kw, said): one_line(lambda: Dataset(**dict(name="x", train=U8, test=U8) | kw), said)


# ---- folders: one image

@pytest.mark.parametrize("mode, shape, gray", [("L", (10, 10), True), ("RGB", (10, 10, 3), False), ("RGBA", (10, 10, 4), False), ("LA", (10, 10, 2), True)])
def test_modes_come_back_exactly(mode, shape, gray, tmp_path):
    x = pixels(*shape)
    for i in range(3): save(tmp_path, f"{i}.png", x)
    d = load_folder(tmp_path, size=10)
    want = on_white(x) if mode in ("RGBA", "LA") else x[None] if gray else x.transpose(2, 0, 1)
    assert d.shape == ((1 if gray else 3), 10, 10)
    assert abs(d.train[0].numpy().astype(int) - want).max() <= (mode in ("RGBA", "LA"))


def on_white(x):
    "What a viewer shows of `(h, w, c + 1)` bytes with a last channel of opacity."
    a = x[..., -1:]/255
    return np.round(x[..., :-1]*a + 255*(1-a)).transpose(2, 0, 1)


def test_what_is_transparent_is_white(tmp_path):
    "Drawings in black on nothing, and hidden colors, whichever way a file says what is transparent."
    shape = np.zeros((8, 8), bool)
    shape[2:6, 3:5] = True
    want = np.where(shape, 0, 255)
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 3] = 255*shape
    save(tmp_path, "black.png", rgba)
    rgba[..., :3] = np.where(shape, 0, pixels(8, 8))[..., None]
    save(tmp_path, "hidden.png", rgba)
    save(tmp_path, "la.png", rgba[..., 2:])
    index = Image.fromarray(shape.astype(np.uint8)).convert("P")
    index.putpalette([255, 0, 0, 0, 0, 0])
    index.save(tmp_path/"palette.png", transparency=0)
    Image.fromarray(np.where(shape, 0, 77).astype(np.uint8)).save(tmp_path/"gray key.png", transparency=77)
    Image.fromarray(np.where(shape, 0, 7777).astype(np.uint16)).save(tmp_path/"16 bits.png", transparency=7777)
    Image.fromarray(np.stack([np.where(shape, 0, v).astype(np.uint8) for v in (9, 8, 7)], -1)).save(tmp_path/"color key.png", transparency=(9, 8, 7))
    for path in tmp_path.iterdir():
        for c in (1, 3): np.testing.assert_array_equal(read_image(path, 8, c), np.stack([want]*c), err_msg=path.name)


def test_no_hidden_color_seeps_through_the_resizing(tmp_path):
    x = np.zeros((64, 64, 4), np.uint8)
    x[..., 0], x[::2, ::2, 3] = 255*(np.indices((64, 64)).sum(0) % 2), 255          # red only where nothing is seen
    save(tmp_path, "a.png", x)
    y = read_image(tmp_path/"a.png", 8, 3).astype(int)
    assert abs(y - 255*3/4).max() <= 6 and np.ptp(y, axis=0).max() == 0


def test_sixteen_bits_one_bit_and_palette(tmp_path):
    x = pixels(8, 8)
    save(tmp_path, "16.png", x.astype(np.uint16)*256 + 200)
    np.testing.assert_array_equal(read_image(tmp_path/"16.png", 8, 1)[0], x)
    save(tmp_path, "1.png", x > 127)
    np.testing.assert_array_equal(read_image(tmp_path/"1.png", 8, 1)[0], (x > 127)*255)
    assert load_folder(tmp_path).shape == (1, 8, 8)
    rgb = np.stack([x//64*64]*2 + [x*0], -1)
    Image.fromarray(rgb).quantize(16).save(tmp_path/"p.png")
    np.testing.assert_array_equal(read_image(tmp_path/"p.png", 8, 3), rgb.transpose(2, 0, 1))


def test_jpeg_and_its_rotation_tag(tmp_path):
    x = np.zeros((16, 16), np.uint8)
    x[:8] = 255                                  # bright above
    exif = Image.Exif()
    exif[0x0112] = 3                             # "turn by 180 degrees"
    Image.fromarray(x).save(tmp_path/"a.JPG", exif=exif, format="JPEG")
    y = read_image(tmp_path/"a.JPG", 16, 1)[0]
    assert y[12:].min() > 240 and y[:4].max() < 15


@pytest.mark.parametrize("h, w", [(30, 30), (30, 50), (51, 30)])
def test_crop_is_the_middle(h, w, tmp_path):
    x = pixels(h, w)
    save(tmp_path, "a.png", x)
    top, left = (h-30)//2, (w-30)//2
    np.testing.assert_array_equal(read_image(tmp_path/"a.png", 30, 1)[0], x[top:top+30, left:left+30])


def test_resize_averages(tmp_path):
    "A constant stays what it is, and a fine pattern becomes gray (no aliasing)."
    save(tmp_path, "flat.png", np.full((64, 64), 77, np.uint8))
    assert (read_image(tmp_path/"flat.png", 8, 1) == 77).all()
    save(tmp_path, "board.png", np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255)
    assert abs(read_image(tmp_path/"board.png", 8, 1).astype(int) - 127).max() <= 3


# ---- folders: all images

@pytest.mark.parametrize("sides, size", [([8], 8), ([28], 28), ([30, 40], 28), ([11], 8), ([500, 64], 32), ([33], 32)])
def test_size_is_inferred(sides, size, tmp_path):
    for i, s in enumerate(sides*2): save(tmp_path, f"{i}.png", pixels(s, s+3))
    assert load_folder(tmp_path).shape == (1, size, size)
    assert load_folder(tmp_path, size=20, channels=3).shape == (3, 20, 20)


def test_too_small_to_infer(tmp_path):
    for i in range(2): save(tmp_path, f"{i}.png", pixels(9, 9))
    save(tmp_path, "tiny.png", pixels(9, 3))
    with pytest.raises(ValueError, match="tiny.png is only 3 pixels"): load_folder(tmp_path)
    assert load_folder(tmp_path, size=8).shape == (1, 8, 8)


@pytest.mark.parametrize("kw, said", [(dict(size=3), "size must be at least 4"), (dict(channels=2), "channels must be 1 or 3"), (dict(size=0), "size must be at least 4")])
def test_bad_arguments(kw, said, tmp_path):
    for i in range(2): save(tmp_path, f"{i}.png", pixels(8, 8))
    with pytest.raises(ValueError, match=said): load_folder(tmp_path, **kw)


def test_only_images_and_nothing_hidden(tmp_path):
    for name in ("a.png", "b.JPeG", "sub/deep/c.jpg"): save(tmp_path, name, pixels(8, 8))
    save(tmp_path, ".hidden/d.png", pixels(8, 8))
    (tmp_path/"._a.png").write_bytes(b"a Mac wrote this")
    (tmp_path/"readme.txt").write_text("")
    (tmp_path/"folder.png").mkdir()
    train, test, *_ = _split_images(tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in train+test) == ["a.png", "b.JPeG", "sub/deep/c.jpg"]


def test_other_formats_are_named(tmp_path, capsys, monkeypatch):
    for i in range(4): save(tmp_path, f"{i}.png", pixels(8, 8))
    load_folder(tmp_path)
    assert capsys.readouterr().err == ""
    for name in ("a.HEIC", "b.heic", "sub/c.avif", ".hidden/d.gif", "notes.txt"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_bytes(b"")
    d = load_folder(tmp_path)
    assert len(d.train) + len(d.test) == 4
    assert capsys.readouterr().err == f"note: not read in {tmp_path}: 1 .avif, 2 .heic (convert them to PNG or JPEG first)\n"
    monkeypatch.setenv("RANK", "1")                                # of several processes one speaks
    load_folder(tmp_path)
    assert capsys.readouterr().err == ""
    for i in range(4): (tmp_path/f"{i}.png").unlink()
    with pytest.raises(ValueError, match="no pictures in .*; not read: 1 .avif, 2 .heic .convert"): load_folder(tmp_path)


def test_train_and_test_folders_are_respected(tmp_path):
    for i in range(5): save(tmp_path, f"train/x/{i}.png", np.full((8, 8), i, np.uint8))
    for i in range(2): save(tmp_path, f"test/{i}.png", np.full((8, 8), 100+i, np.uint8))
    d = load_folder(tmp_path)
    assert (d.train[:, 0, 0, 0].tolist(), d.test[:, 0, 0, 0].tolist()) == ([0, 1, 2, 3, 4], [100, 101])
    for p in (tmp_path/"test").iterdir(): p.unlink()
    with pytest.raises(ValueError, match="no pictures in .*test"): load_folder(tmp_path)


@pytest.mark.parametrize("names, used, unused", [(("train", "val"), "val", ""), (("train", "valid"), "valid", ""), (("Train", "Test"), "Test", ""), (("TRAIN", "Validation"), "Validation", ""),
    (("train", "val", "test"), "test", "val (2 pictures)"), (("train", "valid", "val"), "val", "valid (2 pictures)"), (("train", "test", "extra"), "test", "extra (2 pictures)")])
def test_splits_by_any_name(names, used, unused, tmp_path, capsys):
    for k, name in enumerate(names):
        for i in range(2): save(tmp_path, f"{name}/{i}.png", np.full((8, 8), 10*k+i, np.uint8))
    d, k = load_folder(tmp_path), names.index(used)
    assert (d.train[:, 0, 0, 0].tolist(), d.test[:, 0, 0, 0].tolist()) == ([0, 1], [10*k, 10*k+1])
    said = [l for l in capsys.readouterr().err.splitlines() if "not used" in l]
    assert said == ([f"note: not used in {tmp_path}: {unused}, beside {names[0]} and {used}"] if unused else [])


def test_what_is_no_split(tmp_path):
    for name in ("val", "test", "cats"): save(tmp_path, f"{name}/0.png", pixels(8, 8))
    assert len(load_folder(tmp_path).train) == 2                             # nothing says train
    save(tmp_path, "Train/0.png", pixels(8, 8))
    (tmp_path/"train").mkdir(exist_ok=True)
    if len({p.name for p in tmp_path.iterdir()}) == 5: one_line(lambda: load_folder(tmp_path), "Train and train in ", "which is train?")


@pytest.mark.parametrize("file", ["checkpoint.safetensors", "model.safetensors", "log.jsonl"])
def test_own_output_is_no_data(file, tmp_path, capsys, monkeypatch):
    for i in range(3): save(tmp_path, f"{i}.png", pixels(8, 8, seed=i))
    save(tmp_path, "runs/mine/samples.png", pixels(40, 40))
    save(tmp_path, "runs/mine/deeper/more.png", pixels(40, 40))
    (tmp_path/"runs/mine"/file).touch()
    monkeypatch.chdir(tmp_path)
    d = load_folder(".")
    assert len(d.train) + len(d.test) == 3
    assert capsys.readouterr().err == "note: not read in .: runs/mine (a run: its pictures are samples)\n"
    one_line(lambda: load_folder("runs/mine"), "no pictures in runs/mine; not read: a run's own pictures")


def test_links(tmp_path):
    "A linked class is read like one that is there, a circle ends, and what is reached twice counts once."
    for k, d in enumerate(("pics/cats", "far")):
        for i in range(2): save(tmp_path, f"{d}/{i}.png", np.full((8, 8), 100*k + 50*i, np.uint8))
    for link, to in (("pics/dogs", "far"), ("pics/a", "pics/cats"), ("far/up", "pics"), ("pics/self", "pics/self")): (tmp_path/link).symlink_to(tmp_path/to)
    one_line(lambda: load_folder(tmp_path/"pics"), f"cannot be opened: {tmp_path}/pics/self (a link to nothing)")
    (tmp_path/"pics/self").unlink()
    d = load_folder(tmp_path/"pics")
    assert sorted(torch.cat([d.train, d.test])[:, 0, 0, 0].tolist()) == [0, 50, 100, 150]
    (tmp_path/"pics/x.jpg").symlink_to(tmp_path/"none.jpg")
    one_line(lambda: load_folder(tmp_path/"pics"), "pics/x.jpg (a link to nothing)")


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    for i in range(3): save(tmp_path, f"a/{i}.png", pixels(8, 8))
    (tmp_path/"shut").mkdir()
    scandir = os.scandir
    def refuse(path):
        if Path(path).name == "shut": raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    one_line(lambda: load_folder(tmp_path), f"cannot be opened: {tmp_path}/shut (Permission denied)")


def test_names_that_are_no_text(tmp_path, capsys):
    "Bytes that are not UTF-8 (of an old archive), and a line break, in the name of a picture: it is read, and an error is one line that can be printed."
    for name in (b"gr\xfcn.png", b"two\nlines.png", "grün.png".encode(), b"plain.png"):
        try: save(tmp_path, os.fsdecode(name), pixels(8, 8))
        except OSError: pytest.skip("this file system takes no such names")
    d = load_folder(tmp_path)
    assert len(d.train) + len(d.test) == 4
    for p in tmp_path.iterdir(): p.write_bytes(b"")
    with pytest.raises(ValueError) as e: load_folder(tmp_path)
    assert "\n" not in str(e.value) and str(e.value).encode().count("\ufffd".encode()) == 2 and "grün.png" in str(e.value)


def test_held_out_tenth(tmp_path):
    for i in range(40): (tmp_path/f"{i:02}.png").touch()
    train, test, *_ = _split_images(tmp_path)
    assert (len(train), len(test)) == (36, 4) and not set(train) & set(test) and train == sorted(train)
    by_hash = sorted(range(40), key=lambda i: hashlib.sha256(f"{i:02}.png".encode()).hexdigest())
    assert {p.name for p in test} == {f"{i:02}.png" for i in by_hash[:4]}
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    assert [p.name for p in _split_images(moved)[1]] == [p.name for p in test]     # wherever the folder is


def test_one_image_is_not_enough(tmp_path):
    save(tmp_path, "a.png", pixels(8, 8))
    with pytest.raises(ValueError, match="only one image"): load_folder(tmp_path)


def test_corrupt_files_are_named(tmp_path):
    good = [save(tmp_path, f"{i}.png", pixels(64, 64)) for i in range(3)]
    (tmp_path/"cut.png").write_bytes(good[0].read_bytes()[:2000])            # a sound head
    (tmp_path/"text.jpg").write_text("no image")
    (tmp_path/"empty.png").touch()
    (tmp_path/"script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")   # would start Ghostscript
    with pytest.raises(ValueError) as e: load_folder(tmp_path)
    assert str(e.value).startswith("4 of 7 images cannot be read: ") and "\n" not in str(e.value)
    for name in ("cut.png", "text.jpg", "empty.png", "script.png"): assert name in str(e.value)
    for i in range(9): (tmp_path/f"bad{i}.png").touch()
    with pytest.raises(ValueError, match="13 of 16 images") as e: load_folder(tmp_path)
    for path in tmp_path.iterdir(): assert (path in good) != (str(path) in str(e.value))                # all of them
    for said in ("empty.png (an empty file)", "text.jpg (in an unknown format)", "script.png (PostScript in spite of its name)"): assert said in str(e.value)
    for i in range(9, 30): (tmp_path/f"bad{i}.png").touch()
    with pytest.raises(ValueError, match="34 of 37 images.* and 14 more .all are listed in .*.txt.; mend or remove them, or let --skip-bad train without them$") as e: load_folder(tmp_path)
    listed = Path(re.search(r"listed in (.*?)\)", str(e.value))[1])
    lines = [line.split("\t") for line in listed.read_text().splitlines()]
    listed.unlink()
    assert {name for name, _ in lines} == {str(p) for p in tmp_path.iterdir() if p not in good} and len(lines) == 34
    assert [str(tmp_path/"text.jpg"), "in an unknown format"] in lines


def test_a_list_that_cannot_be_written_hides_no_error(tmp_path, monkeypatch):
    for i in range(30): (tmp_path/f"bad{i}.png").touch()
    def full(*a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr(formats.tempfile, "NamedTemporaryFile", full)
    one_line(lambda: load_folder(tmp_path), "30 of 30 images cannot be read: ", "and 10 more; mend or remove them")
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "1")                                          # of several processes one writes it
    with pytest.raises(ValueError, match="and 10 more; mend"): load_folder(tmp_path)


@pytest.mark.parametrize("split", [False, True])
def test_skip_bad_is_as_if_they_were_not_there(split, tmp_path, capsys):
    "Also for the split, and a file whose head is sound; a link to nothing is left out, too."
    places = [tmp_path/"a"/d for d in (("train", "test") if split else ("",))]
    for d in places:
        good = [save(d, f"{i}.png", pixels(64, 64, seed=i)) for i in range(12)]
        (d/"cut.png").write_bytes(good[0].read_bytes()[:2000])
        (d/"text.jpg").write_text("no image")
        (d/"gone.png").symlink_to(tmp_path/"nowhere.png")
    one_line(lambda: load_folder(tmp_path/"a"), "gone.png (a link to nothing)", "; mend or remove them, or let --skip-bad train without them")
    d = load_folder(tmp_path/"a", skip_bad=True)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("note: left out, since they cannot be read: ") and all(said.count(n) == len(places) for n in ("cut.png", "text.jpg", "gone.png")) and "text.jpg (in an unknown format)" in said
    assert f"; {3*len(places)} that cannot be read, left out; " in d.about
    for p in places:
        for name in ("cut.png", "text.jpg", "gone.png"): (p/name).unlink()
    e = load_folder(tmp_path/"a")
    assert torch.equal(d.train, e.train) and torch.equal(d.test, e.test) and "left out" not in e.about and not capsys.readouterr().err
    assert load_folder(tmp_path/"a", skip_bad=True).about == e.about
    with pytest.raises(ValueError, match="'digits' is none"): load_dataset("digits", skip_bad=True)


def test_grids_of_samples_are_pointed_out(tmp_path, capsys):
    from ddpm_nbdev.plot import save_images
    for i in range(12): save(tmp_path, f"{i}.png", pixels(40, 40, seed=i))
    save(tmp_path, "wood_samples.png", pixels(63, 63))                       # its name only
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 17, (7, 1, 8, 8), generator=g, dtype=torch.uint8)
    save_images(x, tmp_path/"other.png", scale=4, levels=17)                 # its lines only
    load_folder(tmp_path)
    assert not capsys.readouterr().err
    for k, (name, ncol, scale) in enumerate((("samples.png", None, 4), ("digits_samples_2.png", 2, 1), ("x_samples_chain.png", 7, 3), ("13_interpolation.png", 3, 8))):
        save_images(x, tmp_path/name, ncol, scale, levels=17)
        load_folder(tmp_path)
        assert re.fullmatch(r"note: .*\.png( and \d more)?, among the pictures, looks like a grid that a command of this package drew: if so, put it elsewhere\n", said := capsys.readouterr().err), said
        assert (f" and {k} more" in said) == bool(k)


HEADS = [(b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer: run git lfs pull"), (b"\n<!DOCTYPE HTML><html>", "a web page in spite of its name"),
         (b"\0\0\0\x1cftypheic\0\0", "a HEIC in spite of its name"), (b"\0\0\0 ftypavif", "an AVIF in spite of its name"), (b"\0\0\0 ftypisom", "a video in spite of its name"),
         (b"%PDF-1.7", "a PDF in spite of its name"), (b"PK\3\4", "a ZIP archive in spite of its name"), (b"\x89PNG\r\n\x1a\nxx", "a PNG with a damaged head"), (b"", "an empty file")]


@pytest.mark.parametrize("head, said", HEADS)
def test_it_says_what_a_file_really_is(head, said, tmp_path):
    for i in range(2): save(tmp_path, f"{i}.png", pixels(8, 8))
    (tmp_path/"x.jpg").write_bytes(head)
    one_line(lambda: load_folder(tmp_path), f"1 of 3 images cannot be read: {tmp_path}/x.jpg ({said})")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("wrong", [False, True])
def test_formats_by_content(kind, wrong, tmp_path):
    "Under its own name and under one that is wrong, the picture comes back; of those that move, the first."
    x, path = pixels(8, 8)//2, tmp_path/("x.jpg" if wrong else f"x.{kind.lower()}")
    more = dict(append_images=[Image.new("L", (8, 8))], save_all=True) if kind in ("GIF", "WEBP") else {}
    Image.fromarray(x).save(path, kind, **more, **(dict(lossless=True) if kind == "WEBP" else {}))
    np.testing.assert_array_equal(read_image(path, 8, 1)[0], x)


def test_bombs_are_not_decoded(tmp_path):
    "By the head alone, so six of them take no memory; Pillow's own limit lies higher, and its message is another."
    for i in range(2): Image.new("1", (8001, 10000)).save(tmp_path/f"{i}.png")
    for i in range(2): Image.new("1", (9500, 9500)).save(tmp_path/f"warned {i}.png")
    big = (tmp_path/"0.png").read_bytes()
    (tmp_path/"huge.png").write_bytes(big[:16] + struct.pack(">II", 60000, 60000) + big[24:29] + struct.pack(">I", zlib.crc32(big[12:16] + struct.pack(">II", 60000, 60000) + big[24:29])) + big[33:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_line(lambda: load_folder(tmp_path), "5 of 5 images", "8001x10000 pixels, more than the 80 million that are read", "3600000000 pixels, more than the 80 million")


def test_a_broken_tag_does_not_hide_the_turn(tmp_path):
    "A resolution that is no rational, and one that is cut off, which Pillow cannot write back."
    x = np.zeros((16, 16), np.uint8)
    x[:8] = 255
    turn, broken = struct.pack("<HHIHH", 0x0112, 3, 1, 3, 0), struct.pack("<HHII", 0x011A, 7, 8, 38)
    good = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + turn + broken + struct.pack("<I", 0) + bytes(8)
    for name, tags in (("a", good), ("b", good[:-8])): save(tmp_path, f"turned/{name}.jpg", x, exif=tags)
    for name in "ab": save(tmp_path, f"nonsense/{name}.jpg", x, exif=b"Exif\0\0II*\0\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        turned, plain = (load_folder(tmp_path/name) for name in ("turned", "nonsense"))
    for y in (turned.train[0, 0], turned.test[0, 0]): assert y[12:].min() > 240 and y[:4].max() < 15
    for y in (plain.train[0, 0], plain.test[0, 0]): assert y[:4].min() > 240          # no turn that can be read: none


def test_pixels_of_more_than_16_bits_are_refused(tmp_path):
    for i, a in enumerate((np.full((8, 8), 2**20, np.int32), np.full((8, 8), .5, np.float32))): save(tmp_path, f"{i}.tiff", a)
    one_line(lambda: load_folder(tmp_path, size=8), "0.tiff (more than 16 bits per pixel: save it with 8 or 16)", "1.tiff (pixels that are fractions: save it with 8 bits)")


def test_any_error_names_its_file(tmp_path, monkeypatch):
    for i in range(2): save(tmp_path, f"{i}.png", pixels(8, 8))
    monkeypatch.setattr(Image.Image, "resize", lambda *a, **k: 1/0)
    one_line(lambda: load_folder(tmp_path, size=4), "0.png", "1.png", "(division by zero)")


def about(tmp_path, **kw): return load_folder(tmp_path, **kw).about


def test_gray_by_what_is_seen(tmp_path):
    "Stored as color, as a palette or gray, it is gray; one picture in color makes three channels of all, and is named; what is asked for goes before."
    for i in range(4): save(tmp_path, f"{i}.png", np.stack([pixels(8, 8, seed=i)]*3, -1))
    Image.fromarray(pixels(8, 8)//16*16).convert("P").save(tmp_path/"p.png")
    save(tmp_path, "l.jpg", pixels(8, 8))
    d = load_folder(tmp_path)
    assert d.shape == (1, 8, 8) and "8x8, gray;" in d.about and d.train.is_contiguous()
    assert {bytes(pixels(8, 8, seed=i)) for i in range(4)} < {bytes(x.numpy()) for x in torch.cat([d.train, d.test])}
    save(tmp_path, "red.png", pixels(8, 8, 3))
    d = load_folder(tmp_path)
    assert d.shape == (3, 8, 8) and "in color (1 of 7 are, the first red.png)" in d.about
    assert load_folder(tmp_path, channels=1).shape == (1, 8, 8) and "8x8, gray;" in about(tmp_path, channels=1)
    (tmp_path/"red.png").unlink()
    assert load_folder(tmp_path, channels=3).shape == (3, 8, 8) and "8x8, in color;" in about(tmp_path, channels=3)


def test_the_file_that_decided_the_size(tmp_path):
    for i in range(5): save(tmp_path, f"{i}.png", pixels(64, 64, seed=i))
    assert about(tmp_path).startswith("32x32, gray;")
    save(tmp_path, "strip.png", pixels(9, 64))
    assert about(tmp_path).startswith("8x8 (the smallest, strip.png, is 64x9; 32x32 without the 1 below that), gray;")
    assert about(tmp_path, size=64).startswith("64x64, gray;")


@pytest.mark.parametrize("size, better", [(97, 96), (100, 96), (34, 32), (60, 0), (64, 0), (30, 0), (28, 0), (36, 0), (8, 0), (9, 0), (256, 0), (257, 256)])
def test_a_size_that_cannot_be_halved(size, better, tmp_path):
    "As the U-Net of a folder halves it: the one that is named has a lowest level of at most 16 pixels."
    for i in range(2): save(tmp_path, f"{i}.png", pixels(8, 8))
    said = re.search(r"\((\d+)x\1 would be faster", about(tmp_path, size=size))
    assert (int(said[1]) if said else 0) == better
    lowest = lambda n: n//2**(len(_small_unet_args(n)["ch_mult"])-1)
    assert (lowest(size) > 16) == (better > 0) and (not better or lowest(better) <= 16)


def test_values_of_12_bits_are_pointed_out(tmp_path, capsys):
    for i in range(3): save(tmp_path, f"{i}.png", pixels(8, 8, seed=i).astype(np.uint16)*16)
    load_folder(tmp_path)
    assert capsys.readouterr().err == f"note: all pixels in {tmp_path} are below 16 of 255, nearly black (of 16 bits the upper 8 are kept: stretch values of 12 bits first)\n"
    save(tmp_path, "full.png", pixels(8, 8).astype(np.uint16)*256)
    load_folder(tmp_path)
    assert capsys.readouterr().err == ""


def test_what_a_look_would_tell(tmp_path):
    for i in range(4): save(tmp_path, f"train/{i}.png", pixels(8, 8, seed=i))
    assert about(tmp_path/"train") == "8x8, gray; a tenth, by name, is for testing"
    save(tmp_path, "val/copy.png", pixels(8, 8, seed=2))
    save(tmp_path, "val/new.png", pixels(8, 8, seed=8))
    save(tmp_path, "train/black.png", np.zeros((8, 8), np.uint8))
    save(tmp_path, "train/nothing.png", np.zeros((8, 8, 4), np.uint8))
    assert about(tmp_path) == ("8x8, gray; 1 transparent, shown on white; 2 of one color; 1 the same as another; 1 both to train on and to test on; val is for testing")


# ---- batches

@pytest.mark.parametrize("n, batch_size", [(10, 10), (10, 3), (7, 5), (1437, 128), (1, 1)])
def test_every_image_once_per_epoch(n, batch_size):
    tape = torch.cat([batch_indices(n, batch_size, 4, k) for k in range(3*n)])
    for e in range(3*batch_size):
        assert sorted(tape[e*n:(e+1)*n].tolist()) == list(range(n))
        assert torch.equal(tape[e*n:(e+1)*n], epoch_order(n, 4, e))


def test_order_is_uniform():
    "Each of the 6 orders of 3 images comes 1000 times in 6000 epochs, give or take 4.5 standard deviations."
    counts = Counter(tuple(epoch_order(3, 0, e).tolist()) for e in range(6000))
    assert len(counts) == 6 and all(abs(c-1000) < 4.5*(6000*5/36)**.5 for c in counts.values())


def test_order_never_changes():
    assert epoch_order(8, 0, 0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]
    assert epoch_order(8, 1, 2).tolist() == [6, 0, 7, 5, 1, 4, 3, 2]


def test_seeds_and_epochs_do_not_collide():
    assert len({tuple(epoch_order(50, s, e).tolist()) for s in (0, 1, 2, 2**31, 2**32-1) for e in range(5)}) == 25


@pytest.mark.parametrize("size", [0, -1, 11])
def test_batch_size_is_checked(size):
    with pytest.raises(ValueError, match=f"batch size {size} does not fit 10 training images"): Batches(torch.zeros(10, 1, 4, 4, dtype=torch.uint8), size)


def test_flips_are_a_function_of_seed_and_place():
    d = load_dataset("digits")
    x, place = Batches(d.train, 64, seed=2, flip=True, levels=17)(5)
    plain = Batches(d.train, 64, seed=2, levels=17)(5)[0]
    assert torch.equal(x + x.flip(-1), plain + plain.flip(-1)) and not torch.equal(x, plain)
    assert x.min() == -1 and x.max() == 1 and x.dtype == torch.float32
    assert place.tolist() == list(range(320, 384))
    assert torch.equal(x, _mirror(_coins(2, place), plain)) and not torch.equal(x, _mirror(_coins(3, place), plain))


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_are_the_batch(shards):
    b = Batches(load_dataset("digits").train, 64, seed=2, flip=True, levels=17)
    parts = [b(30, k, shards) for k in range(shards)]
    for part, whole in zip(zip(*parts), b(30)): assert torch.equal(torch.cat(part), whole)


def test_coins_are_fair_and_independent():
    "Of 40,000 coins half fall on each side, and two seeds or neighboring places agree in half of them: within 4.5 standard deviations."
    n = 40_000
    a, b = (_coins(seed, torch.arange(n)) for seed in (0, 1))
    for share in (a, a == b, a[1:] == a[:-1]): assert abs(share.sum()-n/2) < 4.5*n**.5/2 + 1


def test_flip_keeps_the_other_axes():
    x = torch.arange(2*3*4*5).view(2, 3, 4, 5)
    y = _mirror(torch.tensor([False, True]), x)
    assert torch.equal(y[0], x[0]) and y[1].tolist() == x[1].numpy()[..., ::-1].tolist()


# ---- downloads

class Server(http.server.ThreadingHTTPServer):
    "Serves `files` (path -> bytes, or a function of the handler) from this machine and counts what it is asked for."
    def __init__(self):
        self.files, self.asked = {}, Counter()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def base(self): return f"http://127.0.0.1:{self.server_port}/"

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def do_GET(self):
        name = self.path[1:]
        self.server.asked[name] += 1
        content = self.server.files.get(name)
        if content is None: self.send_error(404)
        elif callable(content): content(self)
        else: self.answer(content, len(content))

    def answer(self, content, length):
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()


GOOD = bytes(range(256))*1000


@pytest.fixture
def server(monkeypatch):
    "A server that has the file `f` of the data set `net`, and no proxy before it."
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(name, raising=False)
    server = Server()
    server.files["f"] = GOOD
    monkeypatch.setitem(SOURCES, "net", (server.base, {"f": hashlib.md5(GOOD).hexdigest()}))
    yield server
    server.close()


def left(cache): return sorted(p.name for p in cache.iterdir() if p.name != "lock") if cache.is_dir() else []


def test_downloads_once(server, tmp_path):
    path = fetch("net", "f")
    assert path == tmp_path/"cache/ddpm_nbdev/net/f" and path.read_bytes() == GOOD
    assert fetch("net", "f") == path and server.asked["f"] == 1 and left(path.parent) == ["f"]


def cut(handler): handler.answer(GOOD[:-1000], len(GOOD))


@pytest.mark.parametrize("content, said", [(cut, "ConnectionError|ChunkedEncodingError|IncompleteRead"), (GOOD[:-1000], "the MD5 of what came is not"),
    (GOOD[:-1]+b"x", "the MD5 of what came is not"), (None, "the server says 404"), (lambda h: h.send_error(503), "the server says 503")],
    ids=["truncated", "short", "corrupt", "missing", "overloaded"])
def test_bad_downloads(content, said, server, tmp_path):
    "One line that says which file to put where; nothing is left; the next try gets the good file."
    server.files["f"] = content
    with pytest.raises(ValueError, match=said) as e: fetch("net", "f", tmp_path)
    line = str(e.value)
    assert "\n" not in line and f"{server.base}f" in line and "put f into a folder" in line and "--data-dir" in line and "DDPM_DATA" in line
    assert left(tmp_path/"net") == []
    server.files["f"] = GOOD
    assert fetch("net", "f", tmp_path).read_bytes() == GOOD


def test_no_server(server, tmp_path):
    path = fetch("net", "f", tmp_path/"a")
    server.close()
    with pytest.raises(ValueError, match=r"cannot download .*/f \(ConnectionError\); get it another way, put f into a folder"): fetch("net", "f", tmp_path/"b")
    assert fetch("net", "f", tmp_path/"a") == path


def test_damaged_cache_is_replaced(server, tmp_path):
    path = fetch("net", "f", tmp_path)
    path.write_bytes(GOOD[:-1])
    assert fetch("net", "f", tmp_path).read_bytes() == GOOD and server.asked["f"] == 2


def test_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path/"file").touch()
    with pytest.raises(ValueError, match="Not a directory|File exists|cannot find the path"): fetch("net", "f", tmp_path/"file")


def start(base, cache):
    "Another process that fetches the file as soon as it is told to."
    code = f"""
import hashlib, sys
from pathlib import Path
from ddpm_nbdev.formats import SOURCES, fetch
SOURCES['net'] = ({base!r}, {{'f': {hashlib.md5(GOOD).hexdigest()!r}}})
print('ready', flush=True)
sys.stdin.readline()
print(hashlib.md5(fetch('net', 'f', Path({str(cache)!r})).read_bytes()).hexdigest())
"""
    return Python("-c", code)


def go(process):
    process.stdin.write("go\n")
    process.stdin.flush()


def test_two_processes_at_once(server, tmp_path):
    "Both get the whole file, and only one asks for it."
    both = threading.Event()
    def slowly(handler):
        both.wait(60)
        time.sleep(.3)                                             # the other is at the lock by now
        handler.answer(GOOD, len(GOOD))
    server.files["f"] = slowly
    processes = [start(server.base, tmp_path) for _ in range(2)]
    for p in processes: assert p.stdout.readline() == "ready\n"
    for p in processes: go(p)
    both.set()
    for p in processes:
        out, err = p.communicate(timeout=60)
        assert (p.returncode, out) == (0, hashlib.md5(GOOD).hexdigest()+"\n"), err
    assert server.asked["f"] == 1 and left(tmp_path/"net") == ["f"]


@pytest.mark.parametrize("quiet", [False, True])
def test_who_waits_says_so_and_quiet_is_heeded(quiet, server, tmp_path, capsys, monkeypatch):
    "Also pooch's own line, and the line that says how far a download is."
    monkeypatch.setattr(_Progress, "quiet", quiet)
    (tmp_path/"net").mkdir()
    held = threading.Event()
    def other():
        with formats.FileLock(tmp_path/"net/lock"):
            held.set()
            time.sleep(1.5)
    threading.Thread(target=other).start()
    assert held.wait(60)
    path = fetch("net", "f", tmp_path)
    assert path.read_bytes() == GOOD
    err = capsys.readouterr().err
    assert ("waiting for another process that downloads f\n" in err) == (not quiet) and (not err) == quiet
    umask = os.umask(0o022)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    line = _Progress("file", 4e6)
    line.next = 0
    line.update(3e6)
    line.close()
    assert capsys.readouterr().err == ("" if quiet else "\rfile: 3 of 4 MB\rfile: 3 of 4 MB\n")


def test_killed_while_downloading(server, tmp_path):
    "Half a file has no right name, the lock is free again, and the next download sweeps up."
    half, dead = threading.Event(), threading.Event()
    def stop_half_way(handler):
        handler.answer(GOOD[:100_000], len(GOOD))
        half.set()
        dead.wait(60)
    server.files["f"] = stop_half_way
    p = start(server.base, tmp_path)
    assert p.stdout.readline() == "ready\n"
    go(p)
    assert half.wait(60)
    p.kill()
    p.communicate()
    dead.set()
    assert len(left(tmp_path/"net")) == 1 and not (tmp_path/"net/f").exists()
    server.files["f"] = GOOD
    assert fetch("net", "f", tmp_path).read_bytes() == GOOD and left(tmp_path/"net") == ["f"]


def test_progress(capsys, monkeypatch):
    monkeypatch.setattr(_Progress, "quiet", False)                 # a command may have been told so
    p = _Progress("file", 4_000_000)
    p.update(2_000_000)
    p.close()
    assert capsys.readouterr().err == ""                           # what is quick says nothing
    p.next = 0
    p.update(1_000_000)
    p.update(500_000)
    p.reset()
    p.update(4_000_000)
    p.close()
    assert capsys.readouterr().err == "\rfile: 3 of 4 MB\rfile: 4 of 4 MB\n"


# ---- CIFAR-10

CIFAR_NAMES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
CIFAR_BYTES = 10_000*3073


def cifar_file(k):
    "File k, of the official size and easy to compress: all pixels of a color are the same; record i is of class (i+k) % 10."
    records = np.empty((10_000, 3073), np.uint8)
    i = np.arange(10_000)
    records[:, 0] = (i+k) % 10
    for c in range(3): records[:, 1+1024*c:1+1024*(c+1)] = ((i//100*(c+1)+k) % 256)[:, None]
    return records.tobytes()


def tar_of(path, members, **info):
    "A .tar.gz of (name, bytes)."
    with gzip.open(path, "wb", compresslevel=1) as f, tarfile.open(fileobj=f, mode="w|") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    "A folder with the archive, in another order than the files'."
    folder = tmp_path_factory.mktemp("cifar")
    tar_of(folder/"cifar-10-binary.tar.gz", [("cifar-10-batches-bin/"+n, cifar_file(k)) for k, n in reversed(list(enumerate(CIFAR_NAMES)))]
           + [("cifar-10-batches-bin/readme.html", b"<html>")])
    return folder


@pytest.fixture
def unpacked(tmp_path):
    folder = tmp_path/"cifar-10-batches-bin"
    folder.mkdir()
    for k, n in enumerate(CIFAR_NAMES): (folder/n).write_bytes(cifar_file(k))
    return folder


def check_cifar(d):
    assert (d.name, d.train.shape, d.test.shape, d.levels, d.flip) == ("cifar10", (50_000, 3, 32, 32), (10_000, 3, 32, 32), 256, True)
    assert d.train.dtype == torch.uint8 and d.train_labels.dtype == torch.int64
    i = torch.arange(60_000)
    k, i = i//10_000, i % 10_000
    assert torch.equal(torch.cat([d.train_labels, d.test_labels]), (i+k) % 10)
    x = torch.cat([d.train, d.test])
    for c in range(3): assert torch.equal(x[:, c, 0, 0].long(), (i//100*(c+1)+k) % 256)
    assert (x.flatten(2) == x[:, :, 0, :1]).all()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kw): raise AssertionError("the network was asked")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(formats.pooch, "retrieve", refuse)


def test_cifar_archive(cifar, no_network):
    before = sorted(cifar.iterdir())
    check_cifar(load_dataset("cifar10", data_dir=cifar))
    check_cifar(load_dataset("cifar10", data_dir=str(cifar/"cifar-10-binary.tar.gz")))
    assert sorted(cifar.iterdir()) == before                       # nothing is unpacked


def test_cifar_folder_and_variable(unpacked, no_network, monkeypatch):
    check_cifar(load_dataset("cifar10", data_dir=unpacked))
    monkeypatch.setenv("DDPM_DATA", str(unpacked.parent))
    check_cifar(load_dataset("cifar10", 32, 3))
    (unpacked/"data_batch_3.bin").unlink()
    with pytest.raises(ValueError, match="cifar-10-batches-bin lacks data_batch_3.bin"): load_dataset("cifar10")
    with pytest.raises(ValueError, match="no CIFAR-10 in /none/here: put"): load_dataset("cifar10", data_dir="/none/here")   # goes before the variable
    assert load_dataset("digits").name == "digits"


def test_cifar_download(cifar, server, monkeypatch, tmp_path):
    archive = (cifar/"cifar-10-binary.tar.gz").read_bytes()
    monkeypatch.setitem(SOURCES, "cifar10", (server.base, {"cifar-10-binary.tar.gz": hashlib.md5(archive).hexdigest()}))
    with pytest.raises(ValueError, match="404 .*put cifar-10-binary.tar.gz into a folder"): load_dataset("cifar10")
    server.files["cifar-10-binary.tar.gz"] = archive
    check_cifar(load_dataset("cifar10"))
    assert left(tmp_path/"cache/ddpm_nbdev/cifar10") == ["cifar-10-binary.tar.gz"]


def test_the_official_sources():
    assert SOURCES["cifar10"] == ("https://www.cs.toronto.edu/~kriz/", {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"})
    base, md5 = SOURCES["fashion_mnist"]
    assert base == "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    assert md5 == {"train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
                   "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79", "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310"}


def one_line(call, *said):
    with pytest.raises(ValueError) as e: call()
    assert "\n" not in str(e.value)
    for s in said: assert s in str(e.value)


def test_broken_cifar_folders(unpacked, no_network):
    load = lambda: load_dataset("cifar10", data_dir=unpacked)
    for size in (0, CIFAR_BYTES-3073, CIFAR_BYTES+1):              # cut off between two records, too
        (unpacked/"data_batch_4.bin").write_bytes(bytes(size))
        one_line(load, "data_batch_4.bin", f"has {size} bytes, not 30730000")
    raw = bytearray(CIFAR_BYTES)
    raw[3073*7] = 12
    (unpacked/"data_batch_4.bin").write_bytes(raw)
    one_line(load, "data_batch_4.bin", "record 7 has class 12")


def test_broken_cifar_archives(cifar, no_network, tmp_path):
    path = tmp_path/"cifar-10-binary.tar.gz"
    load, good = lambda: load_dataset("cifar10", data_dir=tmp_path), (cifar/"cifar-10-binary.tar.gz").read_bytes()
    one_line(load, f"no CIFAR-10 in {tmp_path}: put cifar-10-binary.tar.gz there, from https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz")
    wrong_sum = good[:-8] + bytes([good[-8] ^ 1]) + good[-7:]
    for bad in (b"", b"no archive", gzip.compress(b"no archive"*1000), good[:len(good)//2], good[:-4], wrong_sum):
        path.write_bytes(bad)
        one_line(load, str(path))
    path.write_bytes(wrong_sum)
    one_line(load, "is damaged: CRC check failed")
    tar_of(path, [("data_batch_2.bin", bytes(100))])
    one_line(load, f"data_batch_2.bin in {path} has 100 bytes, not 30730000")
    tar_of(path, [("../../data_batch_2.bin", cifar_file(1))])
    one_line(load, "lacks data_batch_1.bin, data_batch_3.bin")
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("data_batch_1.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    one_line(load, "lacks data_batch_1.bin")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name, kw, said", [("cifar10:x", {}, "takes no path"), ("cifar10", dict(size=16), "32x32"), ("cifar10", dict(channels=1), "32x32"),
    ("fashion_mnist:x", {}, "takes no path"), ("fashion_mnist", dict(size=32), "28x28"), ("fashion_mnist", dict(channels=3), "28x28")])
def test_no_choice(name, kw, said, no_network):
    with pytest.raises(ValueError, match=said): load_dataset(name, **kw)


# ---- Fashion-MNIST

def idx(a, kind=8, shape=None): return struct.pack(f">HBB{a.ndim}I", 0, kind, a.ndim, *(shape or a.shape)) + a.tobytes()


def fashion_files():
    res = {}
    for part, n in (("train", 30), ("t10k", 10)):
        res[f"{part}-images-idx3-ubyte"] = pixels(n, 28, 28, seed=n)
        res[f"{part}-labels-idx1-ubyte"] = (np.arange(n) % 10).astype(np.uint8)
    return res


def check_fashion(d):
    want = fashion_files()
    assert (d.name, d.levels, d.flip, d.shape, d.train.dtype) == ("fashion_mnist", 256, False, (1, 28, 28), torch.uint8)
    for part, x, y in (("train", d.train, d.train_labels), ("t10k", d.test, d.test_labels)):
        np.testing.assert_array_equal(x[:, 0].numpy(), want[f"{part}-images-idx3-ubyte"])
        assert y.dtype == torch.int64 and y.tolist() == want[f"{part}-labels-idx1-ubyte"].tolist()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sub", ["", "fashion-mnist", "FashionMNIST/raw"])
def test_fashion_folder(packed, sub, tmp_path, no_network, monkeypatch):
    (tmp_path/sub).mkdir(parents=True, exist_ok=True)
    for name, a in fashion_files().items(): (tmp_path/sub/(name+".gz"*packed)).write_bytes(gzip.compress(idx(a)) if packed else idx(a))
    check_fashion(load_dataset("fashion_mnist", data_dir=tmp_path))
    monkeypatch.setenv("DDPM_DATA", str(tmp_path))
    check_fashion(load_dataset("fashion_mnist", 28, 1))


def test_fashion_from_debian_before_the_network(tmp_path, no_network, monkeypatch):
    monkeypatch.setattr(formats, "_DEBIAN", tmp_path)
    for name, a in fashion_files().items(): (tmp_path/(name+".gz")).write_bytes(gzip.compress(idx(a)))
    check_fashion(load_dataset("fashion_mnist"))
    (tmp_path/"empty").mkdir()
    one_line(lambda: load_dataset("fashion_mnist", data_dir=tmp_path/"empty"), "put train-images-idx3-ubyte.gz, train-labels")   # what is named is what is used


def test_fashion_download(server, monkeypatch):
    packed = {name+".gz": gzip.compress(idx(a)) for name, a in fashion_files().items()}
    monkeypatch.setitem(SOURCES, "fashion_mnist", (server.base, {n: hashlib.md5(b).hexdigest() for n, b in packed.items()}))
    server.files.update(packed)
    check_fashion(load_dataset("fashion_mnist"))
    server.close()
    check_fashion(load_dataset("fashion_mnist"))


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize("name, content, said", [
    (IMAGES, b"", "starts with nothing"), (IMAGES, b"\0\0\x08\x03\0\0", "starts with 00 00 08 03"), (IMAGES, b"\x89PNG"*20, "starts with 89 50 4e 47"),
    (IMAGES, idx(pixels(30, 28, 28), kind=13), "starts with 00 00 0d 03"), (IMAGES, idx(pixels(30)), "no IDX file of bytes with 3 axes"),
    (IMAGES, idx(pixels(30, 28, 28))[:-1], "has 23519 values, not the 30x28x28"), (IMAGES, idx(pixels(30, 28, 28))+b"x", "has 23521 values"),
    (IMAGES, idx(pixels(0, 28, 28)), "has 0 values"), (IMAGES, idx(pixels(1, 1, 1), shape=(2**32-1,)*3), "not the 4294967295x"),
    (IMAGES, idx(pixels(30, 28, 27)), "are 28x27, not 28x28"), (IMAGES, idx(pixels(29, 28, 28)), "has 30 labels for the 29 images"),
    (LABELS, idx(pixels(30)), "has class 2"), (LABELS, idx(np.zeros(31, np.uint8)), "has 31 labels for the 30 images"), (LABELS, None, f"put {LABELS}.gz there")])
def test_broken_idx_files(name, content, said, tmp_path, no_network):
    for n, a in fashion_files().items(): (tmp_path/n).write_bytes(idx(a))
    (tmp_path/name).unlink()
    if content is not None: (tmp_path/name).write_bytes(content)
    one_line(lambda: load_dataset("fashion_mnist", data_dir=tmp_path), said, name)


def test_broken_gzip(tmp_path, no_network):
    for n, a in fashion_files().items(): (tmp_path/(n+".gz")).write_bytes(gzip.compress(idx(a)))
    good = (tmp_path/f"{IMAGES}.gz").read_bytes()
    for bad in (good[:100], good[:-1], b"text", good[:-8]+bytes(8), good[:50]+bytes(50)+good[100:]):
        (tmp_path/f"{IMAGES}.gz").write_bytes(bad)
        one_line(lambda: load_dataset("fashion_mnist", data_dir=tmp_path), f"{IMAGES}.gz is damaged")


def test_a_gzip_bomb_is_not_unpacked(tmp_path, no_network):
    "A quarter of a gigabyte of zeros behind a head that promises 30 images, or more than anyone has."
    for n, a in fashion_files().items(): (tmp_path/(n+".gz")).write_bytes(gzip.compress(idx(a)))
    for shape, said in (((30, 28, 28), "has 23521 values or more, not the 30x28x28"), ((2**31, 28, 28), "not the 2147483648x28x28")):
        packer = zlib.compressobj(9, wbits=31)
        bomb = packer.compress(struct.pack(">HBB3I", 0, 8, 3, *shape)) + b"".join(packer.compress(bytes(2**24)) for _ in range(16)) + packer.flush()
        (tmp_path/f"{IMAGES}.gz").write_bytes(bomb)
        tracemalloc.start()
        one_line(lambda: load_dataset("fashion_mnist", data_dir=tmp_path), said)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < (2**22 if shape[0] == 30 else 2**31)


# ---- LSUN

def lsun(folder, images, names=None, **kw):
    "An lmdb of images, compressed without loss; the keys are `names`."
    lmdb = pytest.importorskip("lmdb")
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**26) as env, env.begin(write=True) as txn:
        for i, x in enumerate(images):
            out = io.BytesIO()
            if isinstance(x, bytes): out.write(x)
            else: Image.fromarray(x).save(out, **(kw or dict(format="WEBP", lossless=True)))
            txn.put((names[i] if names else f"{i:04}").encode(), out.getvalue())
    return folder


def test_lsun_pair(tmp_path):
    photos = pixels(7, 256, 300, 3)
    lsun(tmp_path/"church_outdoor_train_lmdb", photos[:5])
    lsun(tmp_path/"church_outdoor_val_lmdb", photos[5:])
    middle = torch.from_numpy(photos[:, :, 22:278].transpose(0, 3, 1, 2).copy())
    for path in (tmp_path, tmp_path/"church_outdoor"):
        d = load_dataset(f"lsun:{path}")
        assert torch.equal(d.train, middle[:5]) and torch.equal(d.test, middle[5:])
        assert (d.name, d.flip, d.levels) == (f"lsun:{path}", True, 256)
    lsun(tmp_path/"bedroom_train_lmdb", photos)
    one_line(lambda: load_dataset(f"lsun:{tmp_path}"), "2 categories", f"lsun:{tmp_path}/bedroom, lsun:{tmp_path}/church_outdoor")
    bedroom = load_dataset(f"lsun:{tmp_path}/bedroom", size=32, channels=1)     # without _val_lmdb
    assert (bedroom.flip, bedroom.train.shape, bedroom.test.shape) == (False, (6, 1, 32, 32), (1, 1, 32, 32))


def test_lsun_single_holds_out_by_name(tmp_path):
    names = [hashlib.sha1(bytes([i])).hexdigest() for i in range(30)]
    lsun(tmp_path/"cat", [np.full((16, 16, 3), i, np.uint8) for i in range(30)], names, format="PNG")
    d = load_dataset(f"lsun:{tmp_path}/cat", size=16)
    test = sorted(names, key=lambda n: hashlib.sha256(n.encode()).hexdigest())[:3]
    in_order = sorted(range(30), key=lambda i: names[i])
    assert d.test[:, 0, 0, 0].tolist() == [i for i in in_order if names[i] in test]
    assert d.train[:, 0, 0, 0].tolist() == [i for i in in_order if names[i] not in test]


def test_lsun_is_only_read(tmp_path):
    lsun(tmp_path/"cat", pixels(4, 8, 8, 3))
    before = {p.name: p.read_bytes() for p in (tmp_path/"cat").iterdir()}
    load_dataset(f"lsun:{tmp_path}/cat", size=8)
    assert {p.name: p.read_bytes() for p in (tmp_path/"cat").iterdir()} == before


def test_broken_lsun(tmp_path):
    load = lambda: load_dataset(f"lsun:{tmp_path}/cat", size=8)
    one_line(load, "no LSUN in", "no such folder", "cat_train_lmdb/data.mdb", "unpack the zip file")
    one_line(lambda: load_dataset(f"lsun:{tmp_path}"), "no LSUN in", "neither data.mdb", "unpack the zip file")
    folder = lsun(tmp_path/"cat", [*pixels(8, 8, 8, 3), b"no image", b""])
    with pytest.raises(ValueError, match="cannot be read: 000[89] in .*cat"): load()
    raw = (folder/"data.mdb").read_bytes()
    (folder/"data.mdb").write_bytes(raw[:len(raw)//2])
    one_line(load, "cat/data.mdb is cut off")
    for bad in (b"", b"no data base"*1000):
        (folder/"data.mdb").write_bytes(bad)
        one_line(load, "cat/data.mdb")
    one_line(lambda: load_dataset(f"lsun:{lsun(tmp_path/'one', pixels(1, 8, 8, 3))}"), "has 1 images: at least 2 needed")
    lsun(tmp_path/"x_train_lmdb", pixels(1, 8, 8, 3))
    lsun(tmp_path/"x_val_lmdb", [])
    one_line(lambda: load_dataset(f"lsun:{tmp_path}/x"), "x_val_lmdb has 0 images: at least 1 needed")


@pytest.mark.parametrize("name, kw, said", [("lsun", {}, "needs a path"), ("lsun:x", dict(size=2), "at least 4"), ("lsun:x", dict(channels=2), "1 or 3")])
def test_lsun_arguments(name, kw, said):
    with pytest.raises(ValueError, match=said): load_dataset(name, **kw)


def test_lsun_without_lmdb(tmp_path, monkeypatch):
    lsun(tmp_path/"cat", pixels(2, 8, 8, 3))
    monkeypatch.setitem(sys.modules, "lmdb", None)
    one_line(lambda: load_dataset(f"lsun:{tmp_path}/cat"), "pip install lmdb")


# ---- memory

def test_too_large_for_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(machines, "_free_memory", lambda: 10**6)
    for i in range(6): save(tmp_path, f"{i}.png", pixels(256, 256, 3))
    one_line(lambda: load_dataset(f"folder:{tmp_path}", size=256), "6 images of 256x256 in folder:", "take 0.0 GB", "choose a smaller size")
    assert len(load_dataset(f"folder:{tmp_path}", size=128).train) == 5
    lsun(tmp_path/"cat", pixels(6, 8, 8, 3))
    one_line(lambda: load_dataset(f"lsun:{tmp_path}/cat"), "6 images of 256x256 in lsun:")
    monkeypatch.setattr(machines, "_free_memory", lambda: None)          # unknown: try
    assert load_dataset(f"lsun:{tmp_path}/cat").shape == (3, 256, 256)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux only")
def test_free_memory():
    assert 2**20 < _free_memory() < 1024*int(Path("/proc/meminfo").read_text().split()[1])


# ---- no page depends on what lies on a machine

FROM_THE_MACHINE = re.compile(r"DDPM_DATA|_DEBIAN|os_cache|Path\.home|/usr/share|cpu_count"
                              r"|load_dataset\(['\"](?:cifar10|fashion_mnist)['\"](?![^)\n]*data_dir)|read_(?:cifar10|fashion_mnist)\(\)")


@pytest.mark.parametrize("path", sorted((HOME.parent/"nbs").glob("[!_.]*.ipynb")), ids=lambda p: p.stem)
def test_cells_that_need_the_machines_data_are_flagged(path):
    "Cells that are run everywhere say where their data are; the others carry a flag and keep what they stored."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        flags = re.findall(r"^#\|\s*(\w+)", source, re.M)
        if cell["cell_type"] != "code" or {"data", "slow", "gpu", "notest", "export", "exports", "eval"} & set(flags): continue
        assert (found := FROM_THE_MACHINE.search(source)) is None, f"cell {cell['id']}: {found[0]}"


def test_what_the_machines_data_look_like():
    for bad in ("load_dataset('cifar10', 32)", 'load_dataset("fashion_mnist").test', "read_cifar10()", "os.environ['DDPM_DATA']"): assert FROM_THE_MACHINE.search(bad)
    for good in ("load_dataset('cifar10', data_dir=root)", "load_dataset('digits')", "read_fashion_mnist(folder)", "preset('cifar10')"):
        assert not FROM_THE_MACHINE.search(good)


def test_a_folder_for_testing_without_one_for_training_is_pointed_out(tmp_path, capsys):
    g = torch.Generator().manual_seed(0)
    for name in ("1.png", "2.png", "3.png", "Val/4.png"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        save_images(torch.randint(0, 256, (1, 3, 8, 8), generator=g, dtype=torch.uint8), tmp_path/name)
    train, test = read_folder(tmp_path)
    assert len(train) + len(test) == 4
    assert "Val is read like the rest: for testing it would have to lie beside a folder train" in capsys.readouterr().err
