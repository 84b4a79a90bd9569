"The page of notation: each name in its tables exists, each symbol has a home and a shape."
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT/"nbs"/"22_notation.ipynb"
TEXT = "\n".join("".join(c["source"]) for c in json.loads(PAGE.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
SYMBOLS = [[c.strip() for c in line.strip("| ").split("|")] for line in TEXT.split("## The shapes")[0].splitlines() if line.startswith("| $") or line.startswith("| rate")]


def exported():
    "Every public name of the package, and what has it."
    modules = [import_module(f"ddpm_nbdev.{p.stem}") for p in sorted((ROOT/"ddpm_nbdev").glob("[a-z]*.py"))]
    return {name: getattr(m, name) for m in modules for name in getattr(m, "__all__", ())}


def names(code):
    "Names in the column 'In code' that are the package's own."
    for word in re.findall(r"`([A-Za-z_][\w.]*)`", code):
        if not re.match(r"(sched|model|x0|xt|xT|t|noise)\b", word): yield word


def test_there_are_symbols(): assert len(SYMBOLS) >= 28 and all(len(row) == 5 for row in SYMBOLS)


@pytest.mark.parametrize("row", SYMBOLS, ids=[r[0] for r in SYMBOLS])
def test_symbol(row):
    _, meaning, code, _, home = row
    assert meaning and re.search(r"\]\(\d\d\w?_\w+\.ipynb[^)]*\)", home)
    public = exported()
    methods = {m for v in public.values() if isinstance(v, type) for m in dir(v)}
    for name in names(code):
        first, _, rest = name.partition(".")
        assert first in public or first in methods, name
        if rest: assert rest in public[first]._fields, name


def test_tables_of_the_schedule_exist():
    from ddpm_nbdev.schedule import linear_schedule
    sched = linear_schedule()
    found = re.findall(r"`sched\.(\w+)`", TEXT)
    assert set(found) == {"T", "beta", "alpha", "alpha_bar", "snr"} and all(hasattr(sched, name) for name in found)


def test_every_symbol_of_the_equations_is_listed():
    "Symbols that stand in a numbered equation, here or on another page, have a row."
    listed = " ".join(row[0] for row in SYMBOLS)
    for symbol in [r"x_0", r"x_t", r"\beta_t", r"\alpha_t", r"\bar\alpha_t", r"\tilde\mu_t", r"\tilde\beta_t", r"\epsilon_\theta", r"\mu_\theta",
                   r"\sigma_t^2", r"\hat x_0", "L_T", "L_{t-1}", "L_0", r"\delta_+", r"\theta", "w_t"]: assert symbol in listed, symbol
