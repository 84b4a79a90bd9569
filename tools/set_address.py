#!/usr/bin/env python
"""Let everything that names the repository, its branch, its site, the author or the version follow settings.ini.

What cannot read settings.ini is rewritten: _quarto.yml, CITATION.cff, links in Markdown, notebooks and workflows, the settings that
nbdev exports into _modidx.py, the cells of make_colab.py. With --check nothing is written; the exit status is 1 if a file is behind.
"""
import json
import re
import sys
from configparser import ConfigParser, InterpolationError

import derived
import make_colab

GLOBS = ["*.md", "CITATION.cff", "nbs/*.ipynb", "nbs/live/*", "benchmarks/*.md", ".github/**/*", "_quarto.yml"]
KEYS = {"repo": "repo-url", "site": "site-url", "branch": "repo-branch"}   # where _quarto.yml says what the address has been


def settings(root):
    "settings.ini, with the site's address as `site`; exits where an address could not be one."
    config = ConfigParser(delimiters=["="])
    if not config.read(root/"settings.ini", encoding="utf-8"): sys.exit(f"{root} is no project: no settings.ini")
    try: cfg = {**config["DEFAULT"]}
    except InterpolationError as e: sys.exit(f"settings.ini: {e.option}: a % is written %%")
    like = {"git_url": (r"https://[^/\s]+(/[\w.-]+)+", "https://github.com/USER/REPO, without a slash at its end"), "doc_host": (r"https?://[^/\s]+", "https://USER.github.io, without a slash at its end"),
            "doc_baseurl": (r"(/[\w.-]+)*", "/REPO, or nothing"), "branch": (r"(?!-)[\w.-]+(/[\w.-]+)*", "main"), "version": (r"\d[\w.+]*", "0.1.0"),
            "author": (r"[^\n\\\\\"]+", "A Name, on one line, without quotes")}
    for key, (pattern, example) in like.items():
        if not re.fullmatch(pattern, cfg[key]): sys.exit(f"settings.ini: {key} = {cfg[key]} must be like {example}")
    return {**cfg, "site": cfg["doc_host"] + cfg["doc_baseurl"]}


def set_keys(text, **values):
    "The text of a YAML file whose keys (with what stands before them in their lines) have these values."
    for key, value in values.items(): text = re.sub(rf'^({key}: )("?).*?("?)$', lambda m: m[1] + m[2] + value + m[3], text, flags=re.M)
    return text


def readdress(text, old, cfg):
    "A text whose links lead to the new address: those to the old one, and to any owner's repository or site with the package's name."
    name, end = re.escape(cfg["lib_name"]), r"(?![\w-])"
    repo = rf"(?:{re.escape(old['repo'])}|https://github\.com/[\w-]+/{name}){end}(?:(/(?:blob|tree|raw|edit))/{re.escape(old['branch'])}(?=/))?"
    site = rf"(?:{re.escape(old['site'])}|https://[\w-]+\.github\.io/{name}){end}"
    text = re.sub(repo, lambda m: cfg["git_url"] + (f"{m[1]}/{cfg['branch']}" if m[1] else ""), text)
    return re.sub(site, lambda m: cfg["site"], text)


def changes(root):
    "The files of the project at `root` that are behind settings.ini: {path: text as it should be}; _quarto.yml comes last."
    cfg = settings(root)
    quarto = (root/"_quarto.yml").read_text(encoding="utf-8")
    old = {name: re.search(rf'^\s*{key}: "?(\S*?)"?$', quarto, re.M)[1] for name, key in KEYS.items()}
    index, cell = root/cfg["lib_name"]/"_modidx.py", make_colab.cell(root)
    found = {}
    for path in [index, *(p for glob in GLOBS for p in sorted(root.glob(glob)) if p.is_file())]:
        try: text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError: continue      # a picture
        if path == index:
            new = re.sub(r"'(doc_baseurl|doc_host|git_url|branch)': '[^']*'", lambda m: f"'{m[1]}': '{cfg[m[1]]}'", text)
        else: new = readdress(text, old, cfg)
        if path.suffix == ".ipynb" and any(c.get("id") == make_colab.ID for c in json.loads(new)["cells"]): new = make_colab.with_cell(new, cell)
        if path.name == "CITATION.cff":
            new = set_keys(new, version=cfg["version"], url=cfg["site"], **{"repository-code": cfg["git_url"], "  - name": cfg["author"]})
        if path.name == "_quarto.yml": new = set_keys(new, **{"  " + KEYS["branch"]: cfg["branch"]})
        if new != text: found[path] = new
    return found


def write(root):
    for path, text in changes(root).items(): path.write_text(text, encoding="utf-8")


def problems(root): return [f"{p.relative_to(root)}: not what settings.ini says; run tools/set_address.py" for p in changes(root)]


if __name__ == "__main__": derived.main(__doc__, write, problems, "every file has the address, the author and the version of settings.ini")
