"What is committed agrees with itself: notebooks, library, README, site configuration."
import ast
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT/"nbs").glob("[!_]*.ipynb"))
NAMES = [p.stem for p in NOTEBOOKS]
MODULES = {p.stem: p for p in sorted((ROOT/"ddpm_nbdev").glob("[!_]*.py"))}
SHOWN, HIDDEN, PRINTED = 88, 100, 100   # columns: code on the site, other code, what a cell prints
LONGEST, PUBLIC = 450, 230              # lines of a module; names in all `__all__` together stay below this
sys.path.insert(0, str(ROOT/"tools"))
import check_sync  # noqa: E402


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])


def python_of(path):
    "Code cells without magics, as one text."
    res = "\n\n".join(source(c) for c in cells(path) if c["cell_type"] == "code")
    return re.sub(r"^\s*[%!].*$", "", res, flags=re.M)


def is_hidden(text):
    "Whether the site does not show a cell's code."
    flags = {" ".join(f.split()) for f in re.findall(r"^#\|(.*)$", text, re.M)}
    return bool(flags & {"hide", "export", "exporti", "include: false", "echo: false"})


def markup_lines(text):
    "Lines that lie in a string of HTML, which a browser breaks."
    tree = ast.parse(re.sub(r"^[%!].*$", "", text, flags=re.M))
    strings = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and str(n.value).lstrip().startswith("<")]
    return {j for n in strings if n.end_lineno > n.lineno for j in range(n.lineno, n.end_lineno + 1)}


def used_by(tree):
    "Modules of the package that some code imports, at its top or inside a function, by name or by a string."
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): names = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = ".".join(filter(None, ("ddpm_nbdev" if n.level else "", n.module)))
            names = [base, *(f"{base}.{a.name}" for a in n.names)]
        elif isinstance(n, ast.Call) and ast.unparse(n.func).endswith("import_module"):
            names = [a.value for a in n.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        else: continue
        yield from (m[1] for name in names if (m := re.match(r"ddpm_nbdev\.(\w+)", name)) and m[1] in MODULES)


def homes():
    "The notebook of each module."
    return {m[1]: p.stem for p in NOTEBOOKS if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", python_of(p), re.M))}


def test_there_are_notebooks(): assert NOTEBOOKS and MODULES


def test_the_order_is_number_then_letter():
    "The ladder: 00_files < 00a_plot < 01_schedule < 01a_noise < 02_forward ..., and pages without a number after all of these."
    def place(name):
        m = re.match(r"(\d\d)([a-z]?)_[a-z]", name)
        return (0, m[1], m[2]) if m else (1, name)
    assert not (strange := [n for n in NAMES if n[0].isdigit() and len(place(n)) < 3]), strange
    assert sorted(NAMES, key=place) == NAMES
    assert len({place(n) for n in NAMES}) == len(NAMES), "two notebooks in one place"


@pytest.fixture(scope="module")
def found(): return check_sync.problems(ROOT)


@pytest.mark.parametrize("kind", ["library", "notebooks", "readme"])
def test_in_sync(found, kind): assert not found[kind], "\n".join(found[kind])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_stored_outputs(path):
    "Outputs are there, none is an error or a warning or names a machine's folders, and the file is under 500 KB."
    outputs = [o for c in cells(path) if c["cell_type"] == "code" for o in c["outputs"]]
    assert outputs or re.match(r"00_|\d\d[a-z]_", path.name), "never run"   # a workshop may have nothing to show
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    text = "".join("".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in outputs)
    assert not re.search(r"(?<![\w.])/(home|root|Users|tmp|work)/", text)
    assert path.stat().st_size < 500_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_imports_only_from_above(path):
    "The spine: a notebook uses modules of notebooks before it, and its own."
    home = homes()
    tree = ast.parse(python_of(path), feature_version=(3, 10))  # also: no syntax newer than the oldest Python supported
    below = {m: home[m] for m in used_by(tree) if home[m] > path.stem}  # index sorts after the numbers: it may use all
    assert not below, f"{path.stem} imports from {below}"


def imports(): return {name: set(used_by(ast.parse(p.read_text(encoding="utf-8")))) - {name} for name, p in MODULES.items()}


def test_modules_are_those_of_the_notebooks(): assert set(MODULES) == set(homes())


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_above(name):
    home = homes()
    below = {m: home[m] for m in imports()[name] if home[m] >= home[name]}
    assert not below, f"{name}.py, of {home[name]}, imports from {below}"


def test_modules_import_in_no_circle():
    "Also where an import stands in a function, so that it would only fail when that is called."
    graph, done = imports(), set()
    def visit(name, path):
        assert name not in path, "circle of imports: " + " -> ".join([*path[path.index(name):], name])
        if name in done: return
        for other in sorted(graph[name]): visit(other, [*path, name])
        done.add(name)
    for name in graph: visit(name, [])
    assert done == set(MODULES) and sum(map(len, graph.values())) > len(graph)   # what was looked at is not nothing


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_room_has_one_purpose(path):
    "The first line says what it is for, without an 'and'."
    line = next(l for c in cells(path) for l in source(c).splitlines() if l.startswith("> "))
    assert not re.search(r"\band\b", line, re.I), f"{path.name}: {line}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_lines_fit(path):
    "Code that the site shows fits its column (see styles.css), other code a screen, and what a cell prints does not run out of it."
    wide = []
    for i, cell in enumerate(cells(path), 1):
        if cell["cell_type"] != "code": continue
        hidden = is_hidden(source(cell))
        limit, free = (HIDDEN, markup_lines(source(cell))) if hidden else (SHOWN, set())
        wide += [f"{path.name}, cell #{i} ({cell['id']}), line {j}: {len(l)} columns, more than {limit}: {l}"
                 for j, l in enumerate(source(cell).splitlines(), 1) if len(l) > limit and not l.startswith("#|") and j not in free]
        for o in cell["outputs"]:
            said = o.get("text", "") if o["output_type"] == "stream" else o.get("data", {}).get("text/plain", "")
            wide += [f"{path.name}, cell #{i} ({cell['id']}) prints {len(l)} columns, more than {PRINTED}: {l}"
                     for l in "".join(said).splitlines() if len(l) > PRINTED]
    assert not wide, "\n" + "\n".join(wide)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_not_long(name):
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{name}.py has {lines} lines, more than {LONGEST}: {homes()[name]} holds more than one thing"


def test_public_names_are_few():
    "What no reader calls begins with an underscore; and no name is public in two modules."
    public = {}
    for name, path in MODULES.items():
        for n in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__": public[name] = ast.literal_eval(n.value)
    names = sorted(n for found in public.values() for n in found)
    assert names and not (twice := [n for n, m in zip(names, names[1:]) if n == m]), f"public in two modules: {twice}"
    counts = ", ".join(f"{name} {len(found)}" for name, found in sorted(public.items(), key=lambda i: -len(i[1])))
    assert len(names) < PUBLIC, f"{len(names)} public names, not fewer than {PUBLIC}: {counts}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_import_cells_hold_nothing_else(path):
    "nbdev's documentation runs import cells alone, so other code in them fails there."
    for cell in cells(path):
        text = source(cell)
        if cell["cell_type"] != "code" or text.lstrip()[:1] in "%!" or "eval: false" in text: continue
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(re.sub(r"^\s*[%!].*$", "", text, flags=re.M)).body}
        assert len(kinds) < 2, text


def test_equation_numbers_are_given_once():
    tags = [n for p in NOTEBOOKS for c in cells(p) if c["cell_type"] == "markdown" for n in re.findall(r"\\tag\{(\w+)\}", source(c))]
    assert len(tags) == len(set(tags)), sorted(tags)


def sidebar(entries=None, section=None):
    "What the sidebar lists: (file, text, section)."
    config = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))
    for e in config["website"]["sidebar"]["contents"] if entries is None else entries:
        if "href" in e: yield e["href"], e["text"], section
        else: yield from sidebar(e["contents"], e["section"])


def test_sidebar_lists_every_notebook():
    listed = [href for href, _, _ in sidebar()]
    assert {p.name for p in NOTEBOOKS} == set(listed) and len(listed) == len(set(listed))
    assert yaml.safe_load((ROOT/"nbs"/"_quarto.yml").read_text()) == {"metadata-files": ["../_quarto.yml"]}


def test_the_sidebar_ends_with_the_workshops():
    "Pages with a letter, and 00, stand in the last section, in order, under their own titles; numbered pages in order before them."
    shelf, last = list(sidebar()), list(sidebar())[-1][2]
    assert last == "For implementers"
    workshops = [p for p in NOTEBOOKS if re.match(r"00_|\d\d[a-z]_", p.name)]
    title = {p: re.match(r"# (.+)", source(cells(p)[0]))[1] for p in workshops}
    number = {p: p.name.partition("_")[0].removeprefix("0") for p in workshops}
    assert [(href, text) for href, text, section in shelf if section == last] == [(p.name, f"{number[p]} {title[p]}") for p in workshops]
    lessons = [(href, text) for href, text, section in shelf if section != last and href[0].isdigit()]
    assert lessons == sorted(lessons)
    for href, text in lessons: assert not text[0].isdigit() or text.startswith(f"{int(href[:2])} "), (href, text)


def test_readme_links():
    "Every relative link and picture of README.md exists."
    if not (ROOT/"README.md").exists(): pytest.skip("no README.md yet")
    text = re.sub(r"^```.*?^```$|`[^`\n]+`", "", (ROOT/"README.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"""(?:\]\(|\b(?:src|href)=")([^)\s"#]+)""", text)
    assert not [o for o in links if not re.match(r"[a-z]+:", o) and not (ROOT/o).exists()]
