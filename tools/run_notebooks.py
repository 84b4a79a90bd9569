#!/usr/bin/env python
"""Run notebooks in place and clean them, each in a fresh process.

Cells with `#| eval: false`, and cells whose flag (`#| slow`, `#| gpu`, `#| data`, `#| notest`) is not in --flags, are not run and
keep their stored outputs. A notebook in which a cell fails is left as it was, and the exit status is 1.
"""
import argparse
import os
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


def execute(path, flags):
    "Run `path` in this process and write it back, cleaned; returns how many cells were skipped, or -1 for the whole notebook."
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from fastcore.utils import str2bool
    from nbdev.clean import nbdev_clean
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor, extract_directives
    root = project_root(path)
    os.chdir(root)
    skip_flags, n_skipped = set(get_config().tst_flags.split()) - flags, 0
    front = getattr(NBProcessor(path, procs=FrontmatterProc, process=True).nb, "frontmatter_", {})
    if str2bool(front.get("skip_exec", False)): return -1

    def skip(cell):
        nonlocal n_skipped
        if cell.cell_type != "code": return True
        found = extract_directives(cell, remove=False)
        if skip_flags & found.keys() or found.get("eval:", [""])[0].lower() == "false" or "nbdev_export(" in cell.source:
            n_skipped += 1
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
        write_nb(nb, new)
        nbdev_clean(fname=str(new))
        os.replace(new, path)
    return n_skipped


def run_one(path, flags):
    "Run `path` in a process of its own; returns whether it worked."
    # One thread and a fixed hash seed: sums and set orders, so stored outputs, do not depend on the machine.
    env = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **os.environ}
    env.pop("IN_TEST", None)  # set by nbdev_test to shrink cells; stored outputs are of the full ones
    start = time.time()
    res = subprocess.run([sys.executable, __file__, "--worker", "--flags", flags, str(path)], env=env, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    ok = res.returncode == 0
    last = (res.stdout.strip().splitlines() or [""])[-1] if ok else "FAILED"
    print(f"{path.name:28} {time.time()-start:6.1f} s  {last}", flush=True)
    if not ok: print(res.stdout, file=sys.stderr, flush=True)
    return ok


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
    if args.worker:
        n = execute(Path(args.paths[0]), set(args.flags.split()))
        return print("not run (skip_exec)" if n < 0 else f"{n} cells kept as stored" if n else "ok")
    paths = find_notebooks(args.paths or [Path(__file__).resolve().parents[1]/"nbs"])
    with ThreadPoolExecutor(args.workers) as pool: ok = list(pool.map(lambda p: run_one(p, args.flags), paths))
    failed = [p.name for p, good in zip(paths, ok) if not good]
    if failed: sys.exit("failed: " + " ".join(failed))


if __name__ == "__main__": main()
