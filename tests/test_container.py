"The format of a compressed file: there and back, damaged in every way, and forged by somebody who knows the checksums."
import hashlib
import random
import struct
import time
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from ddpm_nbdev.ans import CodecError
from ddpm_nbdev.container import Header, check_fits, describe, fingerprint, pack, unpack

SMALL = Header("lossless", b"\xab\x12\xcd\x34", b"\x0b\xad\xca\xfe", (3, 20, 300, 1000), (1, 2, 2), 17, 5, 2, 9, 2**31)
BODY = bytes(range(40))


def refusal(function, *args):
    with pytest.raises(CodecError) as e: function(*args)
    words = str(e.value)
    assert words and "\n" not in words and len(words) < 200
    return words


def some_header(rng):
    "Anything that a header may say: small and large numbers, chosen, even and complete steps."
    def number(least, most): return min(most, max(least, rng.getrandbits(rng.randint(0, most.bit_length()))))
    T = number(1, 65535)
    steps = rng.choice([lambda: sorted(rng.sample(range(1, T+1), number(1, min(T, 300)))), lambda: range(1, T+1),
                        lambda: range(rng.randint(1, 7), T+8, 7), lambda: [T]])()
    shape = rng.choice([lambda: (number(1, 2**26),), lambda: (number(1, 2**4), number(1, 2**11), number(1, 2**11))])()
    count = number(1, 2**32-1)
    return Header(rng.choice(["lossless", "progressive"]), rng.randbytes(4), rng.randbytes(4),
                  tuple(t for t in steps if t <= 65535), shape, rng.randint(2, 256), count, number(1, count), number(0, 2**32-1), number(0, 2**32-1))


@pytest.mark.parametrize("seed", range(150))
def test_there_and_back(seed):
    rng = random.Random(seed)
    header, body = some_header(rng), rng.randbytes(rng.choice([0, 1, 127, 128, 3000]))
    data = pack(header, body)
    assert unpack(data) == unpack(bytearray(data)) == unpack(memoryview(data)) == (header, body, 0)
    assert data.endswith(body) and describe(header, len(data)).startswith(f"kind    {header.kind}")
    for cut in {0, len(body)//2, max(0, len(body)-1)} - {len(body)}:
        part = data[:len(data) - len(body) + cut]
        if header.kind == "progressive": assert unpack(part) == (header, body[:cut], len(body) - cut)
        else: assert f"{cut:,} of {len(body):,} byte" in refusal(unpack, part)


def test_the_header_is_short():
    steps = (12, 15, 18, 21, 25, 30, 36, 44, 55, 69, 85, 106, 132, 174, 205, 255, 318, 417, 682, 1000)
    header = replace(SMALL, steps=steps, shape=(1, 8, 8), count=360, lanes=24, below=400, seed=0)
    assert len(pack(header, bytes(5600))) - 5600 <= 60
    assert len(pack(replace(header, steps=tuple(range(1, 1001))), b"")) < 45         # a whole chain is no longer
    assert len(pack(replace(header, steps=tuple(range(50, 1001, 50))), b"")) < 42


@pytest.mark.parametrize("kind", ["lossless", "progressive"])
def test_every_flipped_bit_is_refused(kind):
    data = pack(replace(SMALL, kind=kind), BODY)
    for i in range(8*len(data)):
        bad = bytearray(data)
        bad[i//8] ^= 1 << i % 8
        words = refusal(unpack, bad)
        if i >= 8*(len(data) - len(BODY)): assert words.startswith("damaged body")


def test_every_cut_is_refused():
    data = pack(SMALL, BODY)
    head = len(data) - len(BODY)
    for n in range(len(data)):
        words = refusal(unpack, data[:n])
        assert words.startswith("an empty file" if n == 0 else "cut off inside its header" if n < head else f"cut off: {n-head} of 40 bytes")
    assert "3 bytes more" in refusal(unpack, data + b"abc")
    assert "1 byte more" in refusal(unpack, data + b"a")


def test_every_prefix_of_a_progressive_body_is_read():
    header = replace(SMALL, kind="progressive", below=0)
    data = pack(header, BODY)
    head = len(data) - len(BODY)
    for n in range(head): refusal(unpack, data[:n])
    for n in range(len(BODY)+1):
        assert unpack(data[:head+n]) == (header, BODY[:n], len(BODY)-n)
        lines = describe(header, head+n, len(BODY)-n).splitlines()
        assert any(l.startswith("cut") for l in lines) == (n < len(BODY))


def test_random_damage_is_never_another_error():
    "Bytes at random after the magic, and pieces of a good file put together: CodecError, or a file that is whole."
    rng, data = random.Random(0), pack(replace(SMALL, kind="progressive"), BODY)
    for _ in range(20000):
        bad = bytearray(data)
        for _ in range(rng.randint(1, 6)):
            i = rng.randrange(4, len(bad))
            bad[i:i+rng.randint(0, 4)] = rng.randbytes(rng.randint(0, 4))
        try: header, body, missing = unpack(bad)
        except CodecError: continue
        assert header == replace(SMALL, kind="progressive") and missing == 40 - len(body) and (missing or body == BODY)


def test_other_files_are_named():
    def says(data): return refusal(unpack, data)
    assert says(b"\x89PNG\r\n\x1a\n\0\0") == "not a compressed file of ddpm_nbdev, but a PNG image"
    assert "JPEG" in says(b"\xff\xd8\xff\xe0\0") and "WebP" in says(b"RIFF\x10\0\0\0WEBPVP8 ") and "gzip" in says(b"\x1f\x8b\x08")
    assert "zip" in says(b"PK\x03\x04") and "safetensors" in says(struct.pack("<Q", 80) + b'{"__metadata__":{}}')
    assert says(b"hello") == says(b"x") == says(b"\0"*100) == "not a compressed file of ddpm_nbdev"
    assert says(b"DDP") == "cut off inside its header, or damaged there: only 3 bytes long"


# Forged headers: written here from the table of the notebook, with right checksums, and not by the package.

def leb(n):
    out = b""
    while True:
        n, low = n >> 7, n & 127
        out += bytes([low | (128 if n else 0)])
        if not n: return out


def forge(version=1, kind=b"L", levels=16, shape=(1, 2, 2), sizes=None, numbers=(5, 2, 9, 7), steps=leb(2) + leb(3) + leb(7),
          length=None, body=BODY):
    head = b"DDPM" + bytes([version]) + kind + b"mmmmtttt" + bytes([levels, len(shape) if sizes is None else sizes])
    head += b"".join(map(leb, (*shape, *numbers))) + steps + leb(len(body) if length is None else length)
    head += struct.pack("<I", zlib.crc32(body))
    return head + struct.pack("<I", zlib.crc32(head)) + body


def test_the_table_of_the_notebook():
    header = Header("lossless", b"mmmm", b"tttt", (3, 10), (1, 2, 2), 17, 5, 2, 9, 7)
    assert unpack(forge()) == (header, BODY, 0) and pack(header, BODY) == forge()
    evenly = leb(20) + leb(50) + b"\0" + leb(19)
    assert unpack(forge(steps=evenly))[0].steps == tuple(range(50, 1001, 50))


FORGED = {
    "an unknown kind": (dict(kind=b"X"), "kind '0x58'"),
    "format 0": (dict(version=0), "damaged header: format 0"),
    "a newer format": (dict(version=2), "format 2, of a newer ddpm_nbdev: this one reads format 1"),
    "one level": (dict(levels=0), "1 levels"),
    "no sizes": (dict(shape=()), "0 sizes"),
    "two sizes": (dict(shape=(2, 2)), "2 sizes"),
    "255 sizes": (dict(sizes=255), "255 sizes"),
    "a size of 0": (dict(shape=(1, 0, 2)), "shape 1 x 0 x 2"),
    "a huge size": (dict(shape=(2**34,)), "places"),
    "a huge shape": (dict(shape=(2**13, 2**13, 2)), "places"),
    "no images": (dict(numbers=(0, 1, 0, 0)), "0 images"),
    "too many images": (dict(numbers=(2**32, 1, 0, 0)), "4,294,967,296 images"),
    "no lanes": (dict(numbers=(5, 0, 0, 0)), "0 images side by side"),
    "more lanes than images": (dict(numbers=(5, 6, 0, 0)), "6 images side by side, not 1 to 5"),
    "many seed words": (dict(numbers=(5, 1, 2**32, 0)), "seed words"),
    "a large seed": (dict(numbers=(5, 1, 0, 2**32)), "seed 4,294,967,296"),
    "no steps": (dict(steps=leb(0)), "0 steps"),
    "too many steps": (dict(steps=leb(65536) + b"\1"*65536), "65,536 steps"),
    "2**35 - 1 steps": (dict(steps=leb(2**35-1) + b"\1\0" + leb(2**35-2)), "34,359,738,367 steps"),
    "more repetitions than steps": (dict(steps=leb(9) + b"\1\0" + leb(9)), "do not ascend"),
    "2**35 - 1 repetitions": (dict(steps=leb(9) + b"\1\0" + leb(2**35-1)), "do not ascend"),
    "no repetition": (dict(steps=leb(2) + b"\1\0\0\1"), "do not ascend"),
    "a first step of 0": (dict(steps=leb(3) + b"\0\3"), "do not ascend"),
    "too long a chain": (dict(steps=leb(2) + b"\1" + leb(65535)), "step 65,536"),
    "too long a chain, by repetition": (dict(steps=leb(65535) + leb(2**35-1) + b"\0" + leb(65534)), "of a chain of at most 65,535"),
    "two repetitions, which two bytes say": (dict(steps=leb(3) + b"\1\0\2"), "no writer puts"),
    "a number with a zero in front": (dict(steps=b"\x81\0" + b"\7"), "no writer puts"),
    "a number of six bytes": (dict(steps=b"\x81\x80\x80\x80\x80\0" + b"\7"), "a number of more than 5 bytes"),
    "a body of 32 GiB": (dict(length=2**35-1), "cut off: 40 of 34,359,738,367 bytes"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_headers_cost_nothing(case):
    change, words = FORGED[case]
    data = forge(**change)
    tracemalloc.start()
    begin = time.process_time()
    try: said = refusal(unpack, data)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert words in said and (said.startswith("damaged header") or case in ("a newer format", "a body of 32 GiB"))
    assert peak < 8e6 and time.process_time() - begin < 1       # 65,535 steps are 4 MB of Python's integers


def test_a_huge_progressive_body_is_only_declared():
    tracemalloc.start()
    header, body, missing = unpack(forge(kind=b"P", length=2**35-1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert body == BODY and missing == 2**35 - 41 and peak < 1e5


@pytest.mark.parametrize("change", [dict(kind="lossy"), dict(model=b"abc"), dict(levels=1), dict(levels=257), dict(shape=(2, 2)), dict(shape=()),
                                    dict(steps=()), dict(steps=(2, 2)), dict(steps=(0,)), dict(steps=(70000,)), dict(count=0), dict(lanes=6),
                                    dict(below=-1), dict(seed=-1), dict(seed=2**32)], ids=str)
def test_a_writer_is_told_too(change):
    with pytest.raises(ValueError, match="a file cannot hold"): pack(replace(SMALL, **change), BODY)


def test_numbers_of_numpy_and_lists_are_written_like_others():
    same = replace(SMALL, steps=np.array(SMALL.steps), shape=torch.Size(SMALL.shape), count=np.int64(5), seed=np.uint32(2**31))
    assert pack(same, bytearray(BODY)) == pack(replace(SMALL, steps=list(SMALL.steps)), BODY) == pack(SMALL, BODY)


def test_does_it_fit():
    other = bytes.fromhex("55667788")
    assert check_fits(SMALL, SMALL.model, SMALL.tables, torch.Size((1, 2, 2)), 17) is None
    assert refusal(check_fits, SMALL, other, other, (3,), 2) == "made with another model: its weights have hash ab12cd34, these 55667788"
    assert "1 x 2 x 2" in refusal(check_fits, SMALL, SMALL.model, other, (3, 2, 2), 17)
    assert "17 levels" in refusal(check_fits, SMALL, SMALL.model, other, (1, 2, 2), 256)
    words = refusal(check_fits, SMALL, SMALL.model, other, (1, 2, 2), 17)
    assert "other tables" in words and "calibration.safetensors must be that of the sender, not measured anew" in words


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)], ids=str)
def test_fingerprints(dtype, shape):
    "Tensor and array alike, whatever their layout; another value, type or shape is another fingerprint."
    x = np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape) % 2, dtype)
    same = [torch.from_numpy(np.array(x)), x.astype(x.dtype.newbyteorder(">")), np.array(x, order="F"), torch.tensor(x)]
    if shape: same += [x[::-1].copy()[::-1], torch.from_numpy(np.repeat(x, 2, axis=0))[::2]]
    if not shape: same += [x[()]]
    assert {fingerprint(s) for s in same} == {fingerprint(x)} and len(fingerprint(x)) == 4
    other = [x.reshape(1, *shape), x.astype("complex128" if dtype == "complex64" else "float64" if dtype != "float64" else "float32"), x.tobytes()]
    if x.size: other += [np.logical_not(x).astype(dtype)]
    assert fingerprint(x) not in {fingerprint(o) for o in other}


def test_fingerprints_stay_as_they_are():
    "They stand in files, so they must never change."
    assert fingerprint(torch.tensor([1., -2.]), b"abc").hex() == STORED[0]
    assert fingerprint(torch.tensor([1., -2.], dtype=torch.bfloat16)).hex() == STORED[1]
    assert fingerprint().hex() == "e3b0c442"       # SHA-256 of nothing
    assert fingerprint(b"abc", b"") != fingerprint(b"abc") != fingerprint(b"ab", b"c")
    assert fingerprint(torch.nn.Parameter(torch.ones(2))) == fingerprint(torch.ones(2))
    for x in ("abc", [1., 2.], 3, None, np.array(["a"]), np.array([None])):
        with pytest.raises(TypeError): fingerprint(x)


def hashed(*said):
    return hashlib.sha256(b"".join(said)).hexdigest()[:8]


STORED = (hashed(b"float32 2\n", bytes.fromhex("0000803f000000c0"), b"bytes 3\n", b"abc"), hashed(b"bfloat16 2\n", bytes.fromhex("803f00c0")))
