"Data: what is in the files comes out as it is, and every choice is fixed for all time."
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_nbdev
from ddpm_nbdev.data import (DATASETS, Batches, Dataset, batch_indices, epoch_order, load_dataset, load_folder, random_flip, read_image,
                             split_images)

HOME = Path(ddpm_nbdev.__file__).parent


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


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


def test_a_new_dataset_is_one_entry(monkeypatch):
    one = Dataset("one", torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
    monkeypatch.setitem(DATASETS, "one", lambda path, size, channels, data_dir: one)
    assert load_dataset("one") is one
    with pytest.raises(ValueError, match="known: digits, folder:PATH, .*one"): load_dataset("two")


# ---- folders: one image

@pytest.mark.parametrize("mode, shape, gray", [("L", (10, 10), True), ("RGB", (10, 10, 3), False), ("RGBA", (10, 10, 4), False), ("LA", (10, 10, 2), True)])
def test_modes_come_back_exactly(mode, shape, gray, tmp_path):
    x = pixels(*shape)
    for i in range(3): save(tmp_path, f"{i}.png", x)
    d = load_folder(tmp_path, size=10)
    want = x[None] if mode == "L" else x[..., :1].transpose(2, 0, 1) if mode == "LA" else x[..., :3].transpose(2, 0, 1)
    assert d.shape == ((1 if gray else 3), 10, 10)
    np.testing.assert_array_equal(d.train[0].numpy(), want)


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
    train, test = split_images(tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in train+test) == ["a.png", "b.JPeG", "sub/deep/c.jpg"]


def test_train_and_test_folders_are_respected(tmp_path):
    for i in range(5): save(tmp_path, f"train/x/{i}.png", np.full((8, 8), i, np.uint8))
    for i in range(2): save(tmp_path, f"test/{i}.png", np.full((8, 8), 100+i, np.uint8))
    d = load_folder(tmp_path)
    assert (d.train[:, 0, 0, 0].tolist(), d.test[:, 0, 0, 0].tolist()) == ([0, 1, 2, 3, 4], [100, 101])
    for p in (tmp_path/"test").iterdir(): p.unlink()
    with pytest.raises(ValueError, match="no PNG or JPEG files in .*test"): load_folder(tmp_path)


def test_held_out_tenth(tmp_path):
    for i in range(40): (tmp_path/f"{i:02}.png").touch()
    train, test = split_images(tmp_path)
    assert (len(train), len(test)) == (36, 4) and not set(train) & set(test) and train == sorted(train)
    by_hash = sorted(range(40), key=lambda i: hashlib.sha256(f"{i:02}.png".encode()).hexdigest())
    assert {p.name for p in test} == {f"{i:02}.png" for i in by_hash[:4]}
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    assert [p.name for p in split_images(moved)[1]] == [p.name for p in test]     # wherever the folder is


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
    with pytest.raises(ValueError, match="13 of 16 images.* and 8 more"): load_folder(tmp_path)


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


def test_flips_are_a_function_of_the_generator():
    d = load_dataset("digits")
    b = Batches(d.train, 64, seed=2, flip=True, levels=17)
    x, y, z = (b(5, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    plain = Batches(d.train, 64, seed=2, levels=17)(5)
    assert torch.equal(x, y) and not torch.equal(x, z)
    assert torch.equal(x + x.flip(-1), plain + plain.flip(-1))
    assert x.min() == -1 and x.max() == 1 and x.dtype == torch.float32


def test_flip_keeps_the_other_axes():
    x = torch.arange(2*3*4*5).view(2, 3, 4, 5)
    seen = {tuple(random_flip(x, torch.Generator().manual_seed(s)).flatten().tolist()) for s in range(40)}
    want = {tuple(torch.stack([a, b]).flatten().tolist()) for a in (x[0], torch.from_numpy(x[0].numpy()[..., ::-1].copy()))
            for b in (x[1], torch.from_numpy(x[1].numpy()[..., ::-1].copy()))}
    assert seen == want
