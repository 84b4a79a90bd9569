#!/usr/bin/env python
"""Write README.md (and its pictures, in index_files/) from nbs/index.ipynb, without Quarto.

With --check nothing is written; the exit status is 1 if what is there is not what the notebook gives.
"""
import posixpath
import re

import derived

PICTURES = "index_files"


def from_root(text, nbs):
    "Links that are relative to the notebook's folder `nbs`, rewritten relative to the project's root; fenced code is kept."
    def move(m):
        if re.match(r"[a-z][a-z0-9+.-]*:|[#/]", m[2], re.I) or m[2].startswith(PICTURES): return m[0]
        return m[1] + posixpath.normpath(posixpath.join(nbs, m[2]))
    parts = re.split(r"(^```.*?^```$|`[^`\n]+`)", text, flags=re.M | re.S)
    parts[::2] = [re.sub(r"""(\]\(|\b(?:src|href)=")([^)\s"]+)""", move, p) for p in parts[::2]]
    return "".join(parts)


def render(root):
    "The README's text and its pictures (a dict from path to bytes)."
    import nbformat
    from execnb.nbio import nb2str, read_nb
    from fastcore.utils import working_directory
    from nbconvert import MarkdownExporter
    from nbdev.config import get_config
    from nbdev.process import extract_directives
    from nbdev.processors import FilterDefaults
    with working_directory(root):
        get_config.cache_clear()
        cfg = get_config()
        nb = read_nb(cfg.nbs_path/cfg.readme_nb)
        FilterDefaults()(nb)  # front matter, links to the documentation, hidden cells
        nbs = cfg.nbs_path.relative_to(cfg.config_path).as_posix()
        front = getattr(nb, "frontmatter_", {})
        cells, captions = [], {}
        for cell in nb.cells:
            if not cell.get("source") or cell.cell_type == "raw": continue
            if cell.cell_type == "code":
                options = {k.rstrip(":"): " ".join(v) for k, v in extract_directives(cell, remove=False).items()}
                caption = re.search(r"""^#\|\s*fig-cap:\s*["']?(.*?)["']?\s*$""", cell.source, re.M)
                if options.get("include") == "false": continue
                if options.get("output") == "false": cell.outputs = []
                cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
                if options.get("echo") == "false" or options.get("code-fold") == "true":
                    cell.metadata["transient"] = {"remove_source": True}  # a folded cell has no place in plain Markdown
                captions[len(cells)] = caption[1] if caption else "picture"
            cells.append(cell)
        nb.cells = cells
        doc = nbformat.reads(nb2str(nb), as_version=4)
        doc.metadata["language_info"] = {"name": "python"}  # without it the fences lose their language
        body, res = MarkdownExporter().from_notebook_node(
            doc, resources={"output_files_dir": PICTURES, "unique_key": "index"})
    body = re.sub(rf"!\[\w+\]\(({PICTURES}/index_(\d+)_)", lambda m: f"![{captions[int(m[2])]}]({m[1]}", body)
    head = f"# {front.get('title', cfg.title)}\n\n" + (f"> {front['description']}\n\n" if "description" in front else "")
    body = re.sub(r"\n{3,}", "\n\n", head + from_root(body, nbs).strip() + "\n")
    return "\n".join(line.rstrip() for line in body.split("\n")), res["outputs"]


def problems(root):
    "What differs between README.md with its pictures and the notebook, as a list of lines."
    text, pictures = render(root)
    want = {"README.md": text.encode(), **pictures}
    have = [root/"README.md", *sorted((root/PICTURES).glob("*"))]
    have = {p.relative_to(root).as_posix(): p.read_bytes() for p in have if p.exists()}
    return [f"{name}: " + ("missing" if name not in have else "left over" if name not in want else "differs from index.ipynb")
            for name in sorted(want.keys() | have.keys()) if want.get(name) != have.get(name)]


def write(root):
    "Write README.md and its pictures; pictures that are no longer shown are removed."
    text, pictures = render(root)
    (root/"README.md").write_text(text, encoding="utf-8")
    for old in (root/PICTURES).glob("*"):
        if old.relative_to(root).as_posix() not in pictures: old.unlink()
    for name, data in pictures.items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(data)


if __name__ == "__main__": derived.main(__doc__, write, problems, "README.md is what index.ipynb gives")
