#!/usr/bin/env python
"""How many bytes do the model's files need, beside other formats, for the same images?

    python benchmarks/codec.py                                  # the 360 test digits
    python benchmarks/codec.py --data fashion_mnist             # 200 test images of clothes
    python benchmarks/codec.py --json codec.json --markdown     # the tables of benchmarks/README.md
    python benchmarks/codec.py --show codec.json --markdown     # print them again

All that is written is read again and compared. A format is given every advantage: several
settings, the images in several arrangements, their gray levels as they are or scaled to 0..255,
and the smallest counts. benchmarks/README.md says more.
"""
import argparse
import bz2
import importlib
import importlib.metadata
import io
import json
import lzma
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features
from speed import machine

from ddpm_nbdev.calibration import Calibrated
from ddpm_nbdev.container import unpack
from ddpm_nbdev.data import epoch_order, load_dataset
from ddpm_nbdev.likelihood import evaluate_bits_per_dim, stride
from ddpm_nbdev.progressive import compress, decompress, receive, send

STEPS = {'digits': (10, 20, 32, 48), 'fashion_mnist': (20, 48)}
SINGLE = 20        # of our files that hold one image; other formats make one of each image
QUALITIES = 5, 20, 50, 80, 95

# ---- the images, and how they lie

def fixed_images(name, n):
    "uint8 `(n, h, w)` and levels: test digits in order, clothes in one fixed random order."
    data = load_dataset(name)
    x = data.test if name == 'digits' else data.test[epoch_order(len(data.test), 0, 0)[:200]]
    return x[:n], data.levels

def scaled(x, levels):
    "Gray levels as a picture has them: 0..255."
    return np.rint(x.astype(np.float64)*255/(levels-1)).astype(np.uint8)

def sheet(x, columns):
    "Images `(n, h, w)` side by side, as one."
    n, h, w = x.shape
    rows = -(-n//columns)
    out = np.zeros((rows*columns, h, w), np.uint8)
    out[:n] = x
    return out.reshape(rows, columns, h, w).swapaxes(1, 2).reshape(rows*h, columns*w)

def arrangements(x, levels):
    "name -> `(a, b)`: what holds all images and could be written as one picture."
    found = {}
    for gray, v in (('0..255', scaled(x, levels)), (f"0..{levels-1}", x)):
        found |= {f"{gray}, grid": sheet(v, 20), f"{gray}, column": sheet(v, 1),
                  f"{gray}, row": sheet(v, len(v)),
                  f"{gray}, by place": np.ascontiguousarray(v.reshape(len(v), -1).T)}
    return found

# ---- other formats

def pillow(kind, **settings):
    "A format of Pillow, as (write an array, read it)."
    def write(a):
        out = io.BytesIO()
        Image.fromarray(a).save(out, kind, **settings)
        return out.getvalue()
    def read(data, shape): return np.asarray(Image.open(io.BytesIO(data)).convert('L'))
    return write, read

def packed(module, **settings):
    "A packer of bytes, as (write an array, read it)."
    def write(a): return module.compress(a.tobytes(), **settings)
    def read(data, shape): return np.frombuffer(module.decompress(data), np.uint8).reshape(shape)
    return write, read

def lzma_settings():
    "xz, and its older format with a shorter head and three numbers to choose."
    best = dict(preset=9 | lzma.PRESET_EXTREME, dict_size=2**20)      # more than all the images
    how = [dict(id=lzma.FILTER_LZMA2, **best)]
    found = {'xz': packed(lzma, format=lzma.FORMAT_XZ, filters=how)}
    for lc, lp, pb in ((0, 0, 0), (0, 0, 2), (1, 2, 2), (3, 0, 0), (4, 0, 0), (3, 0, 2)):
        how = [dict(id=lzma.FILTER_LZMA1, **best, lc=lc, lp=lp, pb=pb)]
        found[f"lzma {lc}{lp}{pb}"] = packed(lzma, format=lzma.FORMAT_ALONE, filters=how)
    return found

def codecs_jxl(effort):
    "JPEG XL by another package around the same library."
    c = importlib.import_module('imagecodecs')
    def write(a): return c.jpegxl_encode(a, lossless=True, effort=effort, numthreads=1)
    def read(data, shape): return c.jpegxl_decode(data)
    return write, read

def missing(module):
    "Why a package cannot be used, or nothing."
    try: importlib.import_module(module)
    except Exception as e: return f"cannot be imported ({' '.join(str(e).split())})"

def lossless_formats():
    "name -> {setting: (write, read)}, or why it is not there."
    webp = {f"method {m}": pillow('WEBP', lossless=True, quality=100, method=m, exact=True)
            for m in (4, 6)}
    jxl, why = {}, {m: missing(m) for m in ('pillow_jxl', 'imagecodecs')}
    for effort in (9, 10):
        if not why['pillow_jxl']:
            one = pillow('JXL', lossless=True, effort=effort, num_threads=1)
            jxl[f"effort {effort}"] = one
        if not why['imagecodecs']: jxl[f"effort {effort}, imagecodecs"] = codecs_jxl(effort)
    return {'PNG': {'': pillow('PNG', optimize=True)},
            'WebP': webp if features.check('webp') else 'Pillow was built without it',
            'JPEG XL': jxl or why['pillow_jxl'],
            'xz': lzma_settings(), 'bz2': {'': packed(bz2)}}

def lossy_formats():
    "name -> quality -> (write, read), or why it is not there."
    def with_quality(kind, **k): return {q: pillow(kind, quality=q, **k) for q in QUALITIES}
    webp = features.check('webp')
    return {'JPEG': with_quality('JPEG', optimize=True),
            'WebP': with_quality('WEBP', method=6) if webp else 'Pillow was built without it',
            'JPEG XL': missing('pillow_jxl') or with_quality('JXL', effort=9, num_threads=1)}

# ---- measuring

def timed(f, *args):
    "What f gives, and the processor's seconds."
    start = time.process_time()
    out = f(*args)
    return out, time.process_time()-start

def round_trip(write, read, a):
    "A file and the seconds to write and to read it; the array must come back."
    data, writing = timed(write, a)
    back, reading = timed(read, data, a.shape)
    assert np.array_equal(back, a), "what was read is not what was written"
    return data, writing, reading

def row(what, note, size, x, writing, reading, **more):
    "A row of numbers: bytes of all images, seconds of one."
    n = len(x)
    return {'what': what, 'note': note, 'bytes': size, 'bits_per_dim': 8*size/x.size,
            'write': writing/n, 'read': reading/n, **more}

def measure_format(name, settings, x, levels):
    "Its smallest file of all images, and its smallest files of one image."
    if isinstance(settings, str): return [{'what': name, 'skipped': settings}]
    rows = []
    for how, (write, read) in settings.items():
        for place, a in arrangements(x, levels).items():
            data, *seconds = round_trip(write, read, a)
            rows.append(row(name, ', '.join(filter(None, (how, place))), len(data), x, *seconds))
    single = []
    for how, (write, read) in settings.items():
        for gray, v in (('0..255', scaled(x, levels)), (f"0..{levels-1}", x)):
            trips = [round_trip(write, read, image) for image in v]
            size, writing, reading = (sum(t) for t in zip(*((len(d), w, r) for d, w, r in trips)))
            note = ', '.join(filter(None, (how, gray)))
            single.append(row(name, note, size, x, writing, reading, files=len(x)))
    def smallest(rows): return min(rows, key=lambda r: r['bytes'])
    return [smallest(rows), smallest(single)]

def bound(model, x, steps, seeds):
    "Eq. 5 of the short chain for these images, with new noise for each seed."
    model = stride(model, steps)
    found = [evaluate_bits_per_dim(model, x, torch.Generator().manual_seed(seed))
             for seed in range(seeds)]
    totals = [f.total for f in found]
    spread = statistics.stdev(totals) if seeds > 1 else None
    return {'bound': statistics.mean(totals), 'bound_of_one_draw': spread,
            'bound_error': spread and spread/seeds**.5, 'bound_over_images': found[0].total_error}

def measure_lossless(model, x, k, seeds):
    "Bits-back: the file, what of it is start-up, and what eq. 5 says."
    said, flat = [], x.flatten(1).numpy()
    steps = model.calibration.best_steps(model.sched, k)[0]
    data, writing = timed(lambda: compress(model, x, steps, watch=lambda *v: said.append(v[1])))
    back, reading = timed(decompress, model, data)
    assert torch.equal(back, x)
    header, body, _ = unpack(data)
    seed_words = 2*x[0].numel() + 16
    return row('ours, lossless', f"{k} steps", len(data), flat, writing, reading,
               header=len(data)-len(body), start_up_bits=32*(seed_words-header.below),
               net=said[-1]/x.numel(), **bound(model, x, steps, seeds))

def measure_progressive(model, x):
    "The progressive file, and what a prefix of it shows: [(bytes, mean squared error)]."
    curve, flat = [], x.flatten(1).numpy()
    data, writing = timed(send, model, x)
    x0 = x.double()/((model.levels-1)/2) - 1
    header = len(data)-len(unpack(data)[1])
    def watch(size, preview):
        curve.append((header+size, (127.5*(preview-x0)).square().mean().item()))
    (preview, back), reading = timed(receive, model, data, watch)
    assert torch.equal(back, x)
    return row('ours, progressive', '', len(data), flat, writing, reading, header=header,
               curve=curve)

def ours_single(model, x, k):
    "Files of one image each."
    flat = x.flatten(1).numpy()
    def ours(write, what, note):
        files, writing = timed(lambda: [write(image[None]) for image in x])
        back, reading = timed(lambda: [decompress(model, f) for f in files])
        assert torch.equal(torch.cat(back), x)
        return row(what, note, sum(map(len, files)), flat, writing, reading, files=len(x))
    return [ours(lambda v: compress(model, v, k), 'ours, lossless', f"{k} steps"),
            ours(lambda v: send(model, v), 'ours, progressive', '')]

def measure_lossy(x, levels, progressive):
    "Sheets of lossy formats, and our preview from as many bytes: between two steps by a line."
    rows, curve = [], np.array(progressive['curve'])
    grays = scaled(x, levels)
    exact, a = x.astype(np.float64)*255/(levels-1), sheet(grays, 20)
    for name, settings in lossy_formats().items():
        if isinstance(settings, str):
            rows.append({'what': name, 'skipped': settings})
            continue
        for quality, (write, read) in settings.items():
            data = write(a)
            size, off = len(data), read(data, a.shape) - sheet_of(exact, a.shape)
            inside = sheet(np.ones_like(grays), 20) > 0
            ours = np.interp(size, *curve.T)**.5 if size < progressive['bytes'] else 0.
            rows.append({'what': name, 'quality': quality, 'bytes': size,
                         'bits_per_dim': 8*size/x.size,
                         'rmse': float(np.square(off[inside]).mean()**.5), 'ours': float(ours)})
    return rows

def sheet_of(x, shape):
    "The same grid for floats."
    n, h, w = x.shape
    out = np.zeros((shape[0]//h*20, h, w))
    out[:n] = x
    return out.reshape(-1, 20, h, w).swapaxes(1, 2).reshape(shape)

# ---- printing

def number(r, key, fmt): return '' if r.get(key) is None else fmt.format(r[key])

def seconds(r, key):
    "Three digits are more than a shared machine can say."
    return '' if r.get(key) is None else f"{r[key]:.2g}" if r[key] >= .001 else '< .001'

def tables(saved):
    "The three tables, as lists of rows of text; heads first."
    def whole(r): return [number(r, 'bytes', '{:,}'), number(r, 'bits_per_dim', '{:.2f}'),
                          seconds(r, 'write'), seconds(r, 'read')]
    n, lossless = saved['images'], saved['lossless']
    one = [['all in one file', '', 'bytes', 'bits/dim', 's/image to write', 'to read']]
    each = [['a file for each image', '', 'bytes/image', 'bits/dim', 's/image to write', 'to read']]
    for r in lossless:
        if 'skipped' in r: one.append([r['what'], f"skipped: {r['skipped']}", *['']*4])
        elif 'files' not in r: one.append([r['what'], r['note'], *whole(r)])
        else:
            one_file = r | {'bytes': round(r['bytes']/r['files'])}
            each.append([r['what'], r['note'], *whole(one_file)])
    bits = [['lossless', 'file', 'net', 'eq. 5 of this chain', 'of one draw', 'over images',
             'start-up, bits', 'header, bytes']]
    for r in lossless:
        if 'net' not in r: continue
        eq5 = number(r, 'bound', '{:.3f}') + number(r, 'bound_error', ' ± {:.3f}')
        bits.append([r['note'], f"{r['bits_per_dim']:.3f}", f"{r['net']:.3f}", eq5,
                     number(r, 'bound_of_one_draw', '± {:.3f}'),
                     number(r, 'bound_over_images', '± {:.3f}'),
                     f"{r['start_up_bits']:,}", str(r['header'])])
    lossy = [['lossy sheet', 'quality', 'bytes', 'bits/dim', 'RMSE', 'ours, from as many bytes']]
    for r in saved['lossy']:
        if 'skipped' in r: lossy.append([r['what'], f"skipped: {r['skipped']}", *['']*4])
        else: lossy.append([r['what'], str(r['quality']), f"{r['bytes']:,}",
                            f"{r['bits_per_dim']:.2f}", f"{r['rmse']:.1f}", f"{r['ours']:.1f}"])
    return {f"{saved['data']}, {n} images": one, 'one': each, 'bits': bits, 'lossy': lossy}

def print_tables(saved, markdown):
    "As text or as Markdown."
    for table in tables(saved).values():
        width = [max(map(len, column)) for column in zip(*table)]
        for i, cells in enumerate(table):
            if markdown: print('| ' + ' | '.join(cells) + ' |')
            else: print('  '.join(c.ljust(w) for c, w in zip(cells, width)).rstrip())
            if markdown and i == 0: print('|' + ' --- |'*len(cells))
        print(flush=True)

# ---- what is asked

def parser():
    "The command line."
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', choices=list(STEPS), default='digits', help="default: digits")
    p.add_argument('--images', type=int, help="the first N only (default: 360 digits, 200 clothes)")
    p.add_argument('--steps', type=int, nargs='+', help="steps of our lossless files")
    p.add_argument('--seeds', type=int, help="draws of eq. 5's noise (default: 8, or 4)")
    p.add_argument('--json', help="also write everything here")
    p.add_argument('--show', metavar='JSON', help="print what was measured before")
    p.add_argument('--markdown', action='store_true', help="print the tables as Markdown")
    return p

def measure(a, say):
    "Everything, as a dict that JSON can hold."
    x, levels = fixed_images(a.data, a.images)
    model, gray = Calibrated.from_pretrained(a.data), x[:, 0].numpy()
    facts, lossless = machine(torch.device('cpu')), []
    modules = {'pillow': 'PIL', 'pillow-jxl-plugin': 'pillow_jxl', 'imagecodecs': 'imagecodecs'}
    versions = {m: importlib.metadata.version(m) for m, name in modules.items() if not missing(name)}
    for name, settings in lossless_formats().items():
        say(name)
        lossless += measure_format(name, settings, gray, levels)
    for k in a.steps or STEPS[a.data]:
        say(f"ours, {k} steps")
        seeds = a.seeds or (8 if a.data == 'digits' else 4)
        lossless.append(measure_lossless(model, x, k, seeds))
    say("ours, progressive")
    lossless.append(measure_progressive(model, x))
    lossless += ours_single(model, x[:SINGLE], (a.steps or (20,))[0])
    lossy = measure_lossy(gray, levels, lossless[-3])
    return {'machine': facts | {'packages': versions}, 'data': a.data, 'images': len(x),
            'lossless': lossless, 'lossy': lossy}

def main(argv=None):
    "Measure, write, print."
    a = parser().parse_args(argv)
    torch.set_num_threads(1)
    def say(what): print(f"# {what}", file=sys.stderr, flush=True)
    saved = json.loads(Path(a.show).read_text()) if a.show else measure(a, say)
    if a.json: Path(a.json).write_text(json.dumps(saved, indent=1) + '\n')
    print_tables(saved, a.markdown)

if __name__ == '__main__': main()
