#!/usr/bin/env python
"""Check that the library is what the notebooks export, the notebooks are clean, and README.md is what index.ipynb gives.

Exports and cleans in a temporary copy and compares bytes; changes nothing and needs no git. Exit status 1 on any difference.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

import make_readme

EXPORT_AND_CLEAN = """
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export
nbdev_clean(fname="nbs")
nbdev_export(path="nbs")
"""


def files(folder, glob):
    "Bytes of the files in `folder` by relative path."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob(glob) if ".ipynb_checkpoints" not in p.parts}


def compare(have, want, missing, extra, differs):
    "One line for each file that is not the same in both."
    return [f"{name}: " + (missing if name not in have else extra if name not in want else differs)
            for name in sorted(have.keys() | want.keys()) if have.get(name) != want.get(name)]


def problems(root):
    "Lists of differences by kind: 'library', 'notebooks', 'readme'."
    config = ConfigParser(delimiters=["="])
    config.read(root/"settings.ini", encoding="utf-8")
    lib = config["DEFAULT"]["lib_name"]
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/root.name
        shutil.copytree(root/"nbs", copy/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "_*.ipynb"))
        shutil.copy(root/"settings.ini", copy)
        env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # under IN_TEST nbdev exports nothing
        subprocess.run([sys.executable, "-c", EXPORT_AND_CLEAN], cwd=copy, env=env, check=True)
        library = compare(files(root/lib, "*.py"), files(copy/lib, "*.py"), "not exported yet", "no notebook exports it",
                          "differs from what its notebook exports; run nbdev_export")
        notebooks = compare(files(root/"nbs", "[!_]*.ipynb"), files(copy/"nbs", "*.ipynb"), "missing", "not cleaned",
                            "not clean; run nbdev_clean")
    has_index = (root/"nbs"/"index.ipynb").exists() or (root/"README.md").exists()
    return {"library": library, "notebooks": notebooks, "readme": make_readme.problems(root) if has_index else []}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1], help="project (default: this one)")
    found = problems(parser.parse_args().root.resolve())
    for kind, lines in found.items(): print(f"{kind}: " + ("in sync" if not lines else "".join(f"\n  {o}" for o in lines)))
    sys.exit(any(found.values()))


if __name__ == "__main__": main()
