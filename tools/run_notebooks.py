#!/usr/bin/env python
"""Run notebooks in place and clean them, each in a process of its own.

Cells with `#| eval: false`, and cells whose flag (`#| slow`, `#| gpu`, `#| data`, `#| notest`) is not in --flags, are not run and
keep their stored outputs. A notebook in which a cell fails is left as it was, and the exit status is 1.
"""
import argparse
import base64
import io
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def project_root(path):
    "The folder with settings.ini that `path` lies in."
    for p in path.parents:
        if (p/"settings.ini").exists(): return p
    raise SystemExit(f"{path}: no settings.ini in any folder above it")


def find_notebooks(paths):
    "Notebooks in `paths` (files or folders), in reading order; names that begin with `_` or `.` are ignored as nbdev does."
    res = []
    for p in map(Path, paths):
        if not p.exists(): raise SystemExit(f"{p}: no such file or folder")
        found = [p] if p.is_file() else [f for f in sorted(p.rglob("*.ipynb"))
                                         if not any(part[0] in "_." for part in f.relative_to(p).parts)]
        if not found: raise SystemExit(f"{p}: no notebooks")
        res += [f.resolve() for f in found]
    return list(dict.fromkeys(res))


def smaller(png):
    "A PNG file with the same pixels in fewer bytes: no alpha channel that hides nothing, gray or a palette where that says it all."
    from PIL import Image, ImageChops
    from PIL.PngImagePlugin import PngInfo
    file = Image.open(io.BytesIO(png))
    old, said, dpi = file.convert("RGBA"), PngInfo(), file.info.get("dpi")
    if old.getextrema()[3] != (255, 255) or "I" in file.mode or getattr(file, "n_frames", 1) > 1: return png
    if "Software" in file.info: said.add_text("Software", file.info["Software"])  # which tools/check_outputs.py asks for
    plain, n = old.convert("RGB"), len(old.getcolors(257) or [None]*257)
    files = [png]
    for new in (plain, plain.convert("L"), plain.quantize(n, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE) if n <= 256 else plain):
        if ImageChops.difference(new.convert("RGB"), plain).getbbox(): continue  # not the same
        new.save(out := io.BytesIO(), "PNG", optimize=True, pnginfo=said, dpi=dpi)
        files.append(out.getvalue())
    return min(files, key=len)


def shrink_pictures(nb):
    "Store the pictures that cells show in fewer bytes: a notebook has a limit."
    for cell in nb.cells:
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if "image/png" in data: data["image/png"] = base64.b64encode(smaller(base64.b64decode("".join(data["image/png"])))).decode()


def execute(path, flags):
    "Run `path` in this process and write it back, cleaned; returns how many cells kept what they had stored, or -1 for the whole notebook."
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from fastcore.utils import str2bool
    from nbdev.clean import nbdev_clean
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor, extract_directives
    root = project_root(path)
    os.chdir(root)
    skip_flags, n_kept = set(get_config().tst_flags.split()) - flags, 0
    front = getattr(NBProcessor(path, procs=FrontmatterProc, process=True).nb, "frontmatter_", {})
    if str2bool(front.get("skip_exec", False)): return -1

    def skip(cell):
        nonlocal n_kept
        if cell.cell_type != "code": return True
        found = extract_directives(cell, remove=False)
        if skip_flags & found.keys() or found.get("eval:", [""])[0].lower() == "false" or "nbdev_export(" in cell.source:
            n_kept += bool(cell.outputs)
            return True
        cell.outputs = []  # execnb leaves the old outputs where a cell now has none
        return False

    sys.path[0] = str(root)  # was tools/
    os.chdir(path.parent)
    shell, nb = CaptureShell(path, mpl_format="png"), read_nb(path)
    try: shell.run_all(nb, exc_stop=True, preproc=skip)
    except BaseException:
        if shell.exc is None: raise
        source = nb.cells[shell._cell_idx - 1].source
        sys.exit(f"{shell.prettytb(fname=path.name)}\nCell #{shell._cell_idx} of {path.name} is\n{source}")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".run") as tmp:  # the notebook is replaced whole or not at all
        new = Path(tmp)/path.name
        shrink_pictures(nb)
        write_nb(nb, new)
        nbdev_clean(fname=str(new))
        os.replace(new, path)
    return n_kept


def serve():
    "Import what takes seconds once, then run each notebook that a line of stdin names in a fork, and answer with how it ended."
    import execnb.shell, nbdev.clean, nbdev.process  # noqa: E401, F401
    try: import matplotlib.pyplot, torch  # noqa: E401, F401
    except ImportError: pass
    for line in sys.stdin:
        path, flags = json.loads(line)
        with tempfile.TemporaryFile("w+") as out:
            pid = os.fork()
            if not pid:  # ends as any program does
                with open(os.devnull) as null: os.dup2(null.fileno(), 0)
                for fd in (1, 2): os.dup2(out.fileno(), fd)
                n = execute(Path(path), set(flags.split()))
                return print("not run (skip_exec)" if n < 0 else f"{n} cells kept as stored" if n else "ok")
            status = os.waitpid(pid, 0)[1]
            out.seek(0)
            print(json.dumps([status, out.read()]), flush=True)


class Runner:
    "Runs notebooks one after the other, each in a process of its own, which begins with torch and Matplotlib imported and nothing else done."
    def __init__(self):
        # One thread and a fixed hash seed: sums and set orders, so stored outputs, do not depend on the machine.
        env = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **os.environ}
        env.pop("IN_TEST", None)  # set by nbdev_test to shrink cells; stored outputs are of the full ones
        self.process = subprocess.Popen([sys.executable, __file__, "--worker"], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, path, flags):
        "Run `path`; returns whether it worked."
        start = time.time()
        self.process.stdin.write(json.dumps([str(path), flags]) + "\n")
        self.process.stdin.flush()
        status, said = json.loads(self.process.stdout.readline())
        last = "FAILED" if status else (said.strip().splitlines() or [""])[-1]
        print(f"{path.name:28} {time.time()-start:6.1f} s  {last}", flush=True)
        if status: print(said, file=sys.stderr, flush=True)
        return not status

    def close(self): self.process.communicate()


def run_all(paths, run, workers):
    "The results of `run(runner, path)` for each path, by `workers` at the same time, each with a runner of its own."
    free = queue.SimpleQueue()
    def one(path):
        runner = free.get()
        try: return run(runner, path)
        finally: free.put(runner)
    runners = [Runner() for _ in range(min(workers, len(paths)))]
    for r in runners: free.put(r)
    try:
        with ThreadPoolExecutor(len(runners)) as pool: return list(pool.map(one, paths))
    finally:
        for r in runners: r.close()


def read_arguments(doc):
    "What the command line says, for a tool that `doc` describes: notebooks, flags, workers."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="notebooks or folders (default: nbs/ of this project)")
    parser.add_argument("--flags", default="", help="flags to run as well, separated by spaces: --flags 'slow gpu'")
    parser.add_argument("-j", "--workers", type=int, default=1, help="notebooks to run at the same time (default 1)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # for the processes that this file starts
    args = parser.parse_args()
    if args.workers < 1: parser.error("--workers must be at least 1")
    return args


def main():
    args = read_arguments(__doc__)
    if args.worker: return serve()
    paths = find_notebooks(args.paths or [Path(__file__).resolve().parents[1]/"nbs"])
    ok = run_all(paths, lambda runner, p: runner.run(p, args.flags), args.workers)
    failed = [p.name for p, good in zip(paths, ok) if not good]
    if failed: sys.exit("failed: " + " ".join(failed))


if __name__ == "__main__": main()
