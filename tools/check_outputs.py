#!/usr/bin/env python
"""Are the stored outputs the ones that the code gives? Run notebooks in a copy of the project and compare, cell by cell.

Nothing is written in place. Words must be equal, numbers and pictures nearly so: another processor rounds differently.
Cells that are not run (`#| eval: false`, and the flags not in --flags) count as equal, unless they store an error.
"""
import base64
import io
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from run_notebooks import find_notebooks, project_root, read_arguments, run_all

# How much is rounding? Measured with other instructions (ATEN_CPU_CAPABILITY=default, DNNL_MAX_CPU_ISA=SSE41, MKL_CBWR=COMPATIBLE):
# most notebooks came out byte for byte. Elsewhere numbers changed by 1e-7 of their size; in a network trained for seconds by
# one step of the last digit printed; differences that are themselves rounding by up to 1e-6; pictures by less than 1e-5 a
# pixel. A curve that is another changes a plot by 1e-3.
RTOL, ATOL, PIXELS = 1e-4, 5e-6, 2e-4
ROUNDING = {"5d33b147", "b05e4791"}   # cells that draw rounding errors: another processor's are others (up to .009 a pixel)
JUNK = shutil.ignore_patterns(".*", "_docs", "_proc", "__pycache__", "*.egg-info", "build", "dist", "runs", "ddpm_*_run")
UNLIKE = "not compared, drawn by another Matplotlib"   # which sets its letters elsewhere
NUMBER = re.compile(r"((?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?(?!\w))", re.I)
IMAGE = re.compile(r"data:image/\w+;base64,([A-Za-z0-9+/=\s\\]+)")   # Matplotlib breaks its lines with backslashes


def text_of(value): return value if isinstance(value, str) else "".join(value)


def last_place(number):
    "What one step of the last printed digit is worth; nothing for a whole number, which is a count."
    mantissa, _, power = number.lower().partition("e")
    if "." not in mantissa and not power: return 0
    return 10.**(int(power or 0) - len(mantissa.partition(".")[2]))


def is_close(a, b):
    "Whether two printed numbers differ by rounding only, a step of the last digit included."
    x, y = float(a), float(b)
    step, size = max(last_place(a), last_place(b)), max(abs(x), abs(y))
    return abs(x-y) <= 1.001*step + RTOL*size + ATOL*bool(step)


def text_difference(old, new):
    "The first place where two texts differ in a word, or in a number by more than rounding does; None if there is none."
    a, b = (NUMBER.split(re.sub(r"\x1b\[[\d;]*m", "", t)) for t in (old, new))   # words at even places, numbers at odd ones
    for i in range(max(len(a), len(b))):
        if i >= min(len(a), len(b)): break
        if i % 2 and not is_close(a[i], b[i]) or not i % 2 and a[i].split() != b[i].split(): break
    else: return None
    here = [" ".join("".join(t[max(0, i-3):i+4]).split())[:100] or "(nothing)" for t in (a, b)]
    return f"stored: {here[0]}\n    now:    {here[1]}"


def picture_difference(old, new, limit=PIXELS):
    "How the pictures in two image files differ; None if they look the same."
    if old == new: return None
    a, b = (Image.open(io.BytesIO(x)) for x in (old, new))
    if len({p.info.get("Software", "").split(",")[0].rpartition(".")[0] for p in (a, b)}) > 1: return UNLIKE
    a, b = (np.asarray(p.convert("RGBA"), dtype=float)/255 for p in (a, b))
    if a.shape != b.shape: return f"a picture of {b.shape[1]}x{b.shape[0]} pixels instead of {a.shape[1]}x{a.shape[0]}"
    mean = abs(a-b).mean()
    return f"a picture that differs by {mean:.5f} a pixel on average, more than {limit}" if mean > limit else None


def output_differences(old, new, limit=PIXELS):
    "How two outputs of a cell differ, each difference in words."
    kinds = [(o["output_type"], o.get("name"), *sorted(o.get("data", {}))) for o in (old, new)]
    if kinds[0] != kinds[1]: return ["\n    ".join(f"{when} {' '.join(filter(None, k))}" for when, k in zip(("stored:", "now:   "), kinds))]
    if old["output_type"] == "stream": return list(filter(None, [text_difference(text_of(old["text"]), text_of(new["text"]))]))
    res = []
    for mime, value in old["data"].items():
        a, b = text_of(value), text_of(new["data"][mime])
        if mime in ("image/png", "image/jpeg"): pictures = [[a], [b]]
        else:
            pictures = [IMAGE.findall(t) for t in (a, b)]   # the frames of an animation
            res.append(text_difference(*(IMAGE.sub("(picture)", t) for t in (a, b))))
        if len(pictures[0]) != len(pictures[1]): res.append(f"{len(pictures[1])} pictures instead of {len(pictures[0])}")
        for i, (x, y) in enumerate(zip(*pictures), 1):
            found = picture_difference(*(base64.b64decode(re.sub(r"[\s\\]", "", p)) for p in (x, y)), limit)
            if found: res.append(found if len(pictures[0]) == 1 else f"frame {i} of {len(pictures[0])}: {found}")
    return list(filter(None, res))


def differences(old, new):
    "Where a stored notebook and the same one run again differ: a line or a few for each place."
    if len(old["cells"]) != len(new["cells"]): return [f"{len(old['cells'])} cells became {len(new['cells'])}"]
    res = []
    for i, (x, y) in enumerate(zip(old["cells"], new["cells"]), 1):
        a, b = x.get("outputs", []), y.get("outputs", [])
        limit = .02 if x.get("id") in ROUNDING else PIXELS
        if errors := [o["ename"] for o in a if o["output_type"] == "error"]: found = [f"stores an error, {errors[0]}"]
        elif len(a) != len(b): found = [f"stores {len(a)} outputs, gives {len(b)}"]
        else: found = [d for o, p in zip(a, b) for d in output_differences(o, p, limit)]
        res += [f"cell #{i}: {d}" for d in found]
    return res


def check(runner, path, copy, flags=""):
    "Run a notebook where it stands in `copy`, a copy of the project: where the result differs from what is stored at `path`."
    new = copy/path.relative_to(project_root(path))
    if not runner.run(new, flags): return ["a cell fails"]
    return differences(*(json.loads(p.read_text(encoding="utf-8")) for p in (path, new)))


def main():
    args = read_arguments(__doc__)
    paths = find_notebooks(args.paths or [Path(__file__).resolve().parents[1]/"nbs"])
    root = project_root(paths[0])
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/root.name
        shutil.copytree(root, copy, ignore=JUNK)
        results = run_all(paths, lambda runner, path: check(runner, path, copy, args.flags), args.workers)
    unlike = sum(d.endswith(UNLIKE) for found in results for d in found)
    if unlike: print(f"{unlike} pictures {UNLIKE}")
    results = [[d for d in found if not d.endswith(UNLIKE)] for found in results]
    for path, found in zip(paths, results):
        for d in found: print(f"{path.name}, {d}")
    if bad := sum(map(bool, results)): sys.exit(f"{bad} of {len(paths)} notebooks store something else than their code gives")


if __name__ == "__main__": main()
