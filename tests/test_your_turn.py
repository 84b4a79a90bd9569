"The cells that wait for the reader: blanks, the same lines filled in, and a check that lets no wrong answer pass."
import ast
import json
import re

import pytest
from conftest import NOTEBOOKS

PAGES = [stem for stem in NOTEBOOKS if re.match(r"(before$|0[1-9]_|1[0134]_)", stem)]
LATER = [stem for stem in NOTEBOOKS if re.match(r"1[5-9]_", stem)]
BLANK, FILLED = "#| eval: false\n# Your turn: replace each ____\n", '#| code-fold: true\n#| code-summary: "Solution: the blanks filled in"\n'
ASSERTS = re.compile(r"\bassert\b|\bassert_close\(")
WAITS = re.compile(r"\b____\b")


def cells(stem): return json.loads(NOTEBOOKS[stem].read_text(encoding="utf-8"))["cells"]


def source(cell): return "".join(cell["source"])


def turns(stem):
    "(lead, lines with blanks, what follows) of each cell with blanks."
    found = cells(stem)
    for i, c in enumerate(found):
        if c["cell_type"] == "code" and WAITS.search(source(c)): yield found[i-1], source(c), source(found[i+1])


TURNS = [(stem, i, *turn) for stem in NOTEBOOKS for i, turn in enumerate(turns(stem), 1)]
EACH = pytest.mark.parametrize("stem, i, lead, blank, filled", TURNS, ids=[f"{t[0]}-{t[1]}" for t in TURNS])


def fields(node): return [(k, v) for k, v in ast.iter_fields(node) if k not in ("kind", "type_comment")]


def same(a, b, answers):
    "Whether two trees are equal where each ____ of the first stands for any expression, which is put into `answers`."
    if isinstance(a, ast.Name) and a.id == "____":
        answers.append(b)
        return isinstance(b, ast.expr)
    if isinstance(a, list): return isinstance(b, list) and len(a) == len(b) and all(same(x, y, answers) for x, y in zip(a, b))
    if not isinstance(a, ast.AST): return a == b
    return type(a) is type(b) and all(same(v, getattr(b, k), answers) for k, v in fields(a))


def put(code, values):
    "The lines with these expressions in the places of the blanks, in brackets, so that they stay whole."
    values = iter(values)
    return WAITS.sub(lambda m: f"({next(values)})", code)


def parts(blank, filled):
    "The lines with blanks, the filled ones, and the answers as text."
    code, answers = blank.removeprefix(BLANK), []
    assert same(ast.parse(code), ast.parse(filled.removeprefix(FILLED)), answers), "not the same lines but for the blanks"
    return code, filled.removeprefix(FILLED), [ast.unparse(a) for a in answers]


@pytest.mark.parametrize("stem", [*PAGES, *LATER])
def test_run_all_goes_on(stem):
    "Jupyter stops at an open cell only if it does not know that an error is expected there."
    for c in cells(stem):
        if c["cell_type"] == "code": assert c["metadata"].get("tags", []) == (["raises-exception"] if WAITS.search(source(c)) else [])


@pytest.mark.parametrize("stem", PAGES)
def test_a_page_has_two(stem): assert sum(t[0] == stem for t in TURNS) >= 2


def test_later_pages_have_one(): assert len(PAGES) == 14 and len(LATER) == 5 and {t[0] for t in TURNS} == {*PAGES, *LATER}


@EACH
def test_blanks_and_answers(stem, i, lead, blank, filled):
    "A sentence before; the flags; short; the same lines filled in; and the check is in both, with no blank of one inside a comment."
    assert lead["cell_type"] == "markdown" and source(lead).strip()
    assert blank.startswith(BLANK) and filled.startswith(FILLED)
    code, whole, answers = parts(blank, filled)
    assert 1 <= len(answers) <= 3 and len(answers) == len(WAITS.findall(code)), "one to three blanks"
    assert len(code.splitlines()) <= 10 and ASSERTS.search(code) and ASSERTS.search(whole) and not WAITS.search(whole)
    assert ast.dump(ast.parse(put(code, ["0."]*len(answers)))) != ast.dump(ast.parse(whole))


def namespace(stem, cell_source):
    "What the page has defined up to a cell; what is flagged, and the fillings themselves, do not count."
    import matplotlib
    matplotlib.use("Agg")
    names = {"__name__": "__main__"}
    for c in cells(stem):
        if source(c) == cell_source: return names
        if c["cell_type"] != "code" or re.search(r"^#\|\s*(slow|gpu|data|eval: false)", source(c), re.M): continue
        exec(compile(source(c), f"{stem} {c['id']}", "exec"), names)


@pytest.mark.parametrize("stem, i, lead, blank, filled", [t for t in TURNS if t[0] in ("before", "02_forward", "03_posterior")],
                         ids=[f"{t[0]}-{t[1]}" for t in TURNS if t[0] in ("before", "02_forward", "03_posterior")])
def test_no_wrong_answer_passes(stem, i, lead, blank, filled):
    "Left open it says which name is missing; filled in it passes; twice the right thing, or nothing, in one of the blanks does not."
    code, whole, answers = parts(blank, filled)
    names = namespace(stem, blank)
    with pytest.raises(NameError, match="____"): exec(code, dict(names))
    exec(whole, dict(names))
    exec(put(code, answers), dict(names))
    for k in range(len(answers)):
        for wrong in (f"2*({answers[k]})", "0."):
            with pytest.raises(AssertionError): exec(put(code, [*answers[:k], wrong, *answers[k+1:]]), dict(names))


@pytest.mark.parametrize("stem", [*PAGES, *LATER])
def test_on_the_site_it_stands_open(site, stem):
    "Outside every fold, as plain code, while the lines filled in are folded away."
    text = (site/f"{stem.partition('_')[2] or stem}.html").read_text(encoding="utf-8")
    main = re.sub(r"<details.*?</details>", "", text, flags=re.S)
    count = sum(t[0] == stem for t in TURNS)
    assert len(re.findall(r"# Your turn: replace each ____", main)) == count
    assert len(re.findall(r"<summary>Solution: the blanks filled in", text)) == count
