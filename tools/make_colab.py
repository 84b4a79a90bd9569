#!/usr/bin/env python
"""Give each notebook its second cell, which installs the package where it is missing, as on Colab; its words follow settings.ini.

Nothing that this project runs executes the cell, and the site does not show it. With --check nothing is written; the exit status
is 1 if a notebook has no such cell, or another.
"""
import json
from configparser import ConfigParser

import derived
from run_notebooks import find_notebooks

ID = "colab"   # of the cell, in every notebook
# No %pip: what it says of a first try that failed would alarm those whom the second helps, and Python alone reads the cell.
# A version is asked for, so that a notebook gets the package that it belongs to; what the index lacks comes from the repository.
# Before both, in a clone, its own package. A mere folder with the package's name, say a clone beside the notebook, can be
# imported but holds no version: Python must forget it, or it would not look for the package again.
CELL = """\
#| hide
#| eval: false
import os, subprocess, sys
for way in "", "..", "=={version}", " @ git+{git_url}@{branch}":
    pip = [sys.executable, "-m", "pip", "install", "-q", "{lib_name}[notebooks]" + way]
    if way == "..": sys.path.append(os.path.abspath(way))
    elif way: subprocess.run(pip, capture_output=True)
    try: from {lib_name} import __version__ as found; break
    except ImportError: found = sys.modules.pop("{lib_name}", None) and None
if found != "{version}": print("needs {lib_name} {version}, not", found, "- use pip, then restart")
"""


def cell(root):
    "The cell, for the project at `root`."
    config = ConfigParser(delimiters=["="])
    config.read(root/"settings.ini", encoding="utf-8")
    source = CELL.format_map(config["DEFAULT"]).strip()
    return {"cell_type": "code", "execution_count": None, "id": ID, "metadata": {}, "outputs": [], "source": source.splitlines(True)}


def with_cell(text, cell):
    "The text of a notebook with the cell behind its first one, the title, and nowhere else; unchanged where it is so already."
    nb = json.loads(text)
    rest = [c for c in nb["cells"] if c.get("id") != ID]
    new = [*rest[:1], cell, *rest[1:]]
    if new == nb["cells"]: return text
    return json.dumps({**nb, "cells": new}, sort_keys=True, indent=1, ensure_ascii=False) + "\n"   # as nbdev_clean writes it


def changes(root):
    "The notebooks of the project at `root` that lack the cell as it should be: {path: text with it}."
    texts = {p: p.read_text(encoding="utf-8") for p in find_notebooks([root/"nbs"])}
    return {p: new for p, text in texts.items() if (new := with_cell(text, cell(root))) != text}


def write(root):
    for path, text in changes(root).items(): path.write_text(text, encoding="utf-8")


def problems(root): return [f"{p.name}: its second cell is not the one that installs the package; run tools/make_colab.py" for p in changes(root)]


if __name__ == "__main__": derived.main(__doc__, write, problems, "every notebook has the cell that installs the package")
