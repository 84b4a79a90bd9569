"The installed package: what it needs, what it brings, what importing it costs."
import ast
import builtins
import dis
import email
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

import ddpm_nbdev

ROOT = Path(__file__).parents[1]
LIB = ROOT/"ddpm_nbdev"
CFG = ConfigParser(delimiters=["="])
CFG.read(ROOT/"settings.ini", encoding="utf-8")
CFG = CFG["DEFAULT"]
MODULES = sorted(m.name for m in pkgutil.iter_modules(ddpm_nbdev.__path__) if not m.name.startswith("_"))
RUN_TIME = "torch numpy einops matplotlib fastprogress>=1.0.3,<1.1 fastcore>=1.13 pillow>=10.1 safetensors pooch>=1.8 filelock>=3.24.3".split()
IMPORT_NAMES = {"pillow": "PIL", "torch-fidelity": "torch_fidelity"}   # where they differ from the distribution's
BY_PEOPLE = {"dev_requirements", "notebooks_requirements"}   # not by the package
EXTRAS = [k.removesuffix("_requirements") for k in CFG if k.endswith("_requirements") and k not in BY_PEOPLE]   # imported inside functions
ONLY_IN_NOTEBOOKS = {"IPython"}                 # imported inside functions that a notebook calls
DEVELOPERS_ONLY = "nbdev execnb IPython ipykernel ipywidgets jupyter jupyter_client jupyter_core nbformat nbconvert nbclient ghapi".split()


def fresh(code):
    "What a fresh interpreter prints for `code`."
    res = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert res.returncode == 0, res.stderr
    return res.stdout


def names(requirements): return {re.match(r"[\w.-]+", r)[0] for r in requirements}


def optional(): return {r for extra in EXTRAS for r in names(CFG[f"{extra}_requirements"].split())}


def test_there_are_modules(): assert MODULES


def test_version(): assert ddpm_nbdev.__version__ == CFG["version"]


def test_how_to_cite():
    "CITATION.cff is of this version and address, and names the paper."
    text = (ROOT/"CITATION.cff").read_text(encoding="utf-8")
    said = dict(re.findall(r"^([\w-]+): (.+)$", text, re.M))
    assert said["cff-version"] == "1.2.0" and said["version"] == f'"{CFG["version"]}"' and said["license"] == "Apache-2.0"
    assert said["repository-code"] == f'"{CFG["git_url"]}"' and said["url"] == f'"{CFG["doc_host"]}{CFG["doc_baseurl"]}"'
    assert "preferred-citation:" in text and "arxiv.org/abs/2006.11239" in text and all(n in text for n in ("Ho,", "Jain,", "Abbeel,"))


def test_requirements():
    assert CFG["requirements"].split() == RUN_TIME
    assert not names(CFG["dev_requirements"].split()) & (names(RUN_TIME) - {"fastcore"})
    assert names(DEVELOPERS_ONLY[:1]) | {"lmdb"} <= names(CFG["dev_requirements"].split())


@pytest.mark.parametrize("name", MODULES)
def test_imports_are_required(name):
    "Whatever a module imports, also inside functions, is Python's own or in `requirements`."
    tree = ast.parse((LIB/f"{name}.py").read_text(encoding="utf-8"), feature_version=(3, 10))
    roots = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    roots |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0}
    known = {IMPORT_NAMES.get(r, r) for r in names(RUN_TIME) | optional()} | set(sys.stdlib_module_names) | {"ddpm_nbdev"}
    unknown = roots - known - ONLY_IN_NOTEBOOKS
    assert not unknown


def test_imports_without_the_developers_tools():
    "Every module, also nbdev's index, in an interpreter that has none of them."
    out = fresh(f"""
import sys, importlib
for name in {DEVELOPERS_ONLY + sorted(IMPORT_NAMES.get(r, r) for r in optional())}: sys.modules[name] = None   # importing it raises ImportError
for name in {["ddpm_nbdev", "ddpm_nbdev._modidx"] + [f"ddpm_nbdev.{m}" for m in MODULES]}: importlib.import_module(name)
print('all imported')
""")
    assert out == "all imported\n"


def test_importing_the_method_costs_little_more_than_torch():
    "Processor time, not wall time, and the best of three: a busy machine must not fail this."
    code = """
import time, torch
from sys import modules
start = time.process_time()
import ddpm_nbdev.ddpm
print(time.process_time() - start)
print([m for m in ("matplotlib", "IPython", "PIL", "ddpm_nbdev.unet", "ddpm_nbdev.plot") if m in modules])
"""
    for _ in range(3):
        seconds, unwanted = fresh(code).splitlines()
        assert unwanted == "[]"
        if float(seconds) < .3: break
    assert float(seconds) < .3


# Rooms behind the commands, which nobody calls from Python: all that they hold begins with an underscore.
BEHIND = {"restart", "runs", "sheets", "start", "watch"}


@pytest.mark.parametrize("name", MODULES)
def test_exports_are_documented(name):
    module = importlib.import_module(f"ddpm_nbdev.{name}")
    assert bool(module.__all__) != (name in BEHIND)
    public = {n: getattr(module, n) for n in module.__all__}
    bare = [n for n, o in public.items() if (inspect.isfunction(o) or inspect.isclass(o)) and not (o.__doc__ or "").strip()]
    methods = [f"{c}.{n}" for c, o in public.items() if inspect.isclass(o) for n, f in vars(o).items()
               if inspect.isfunction(f) and f.__module__ == module.__name__ and not n.startswith("_")
               and n != "forward" and not f.__doc__]  # a torch module's forward is described by its class
    assert not bare + methods


@pytest.mark.parametrize("name", MODULES)
def test_no_notebook_globals(name):
    "A name that exported code looks up is defined in its module: a cell that is not exported may have defined it in the notebook."
    def used(code):
        for i in dis.get_instructions(code):
            if i.opname == "LOAD_GLOBAL": yield i.argval
        for const in code.co_consts:
            if isinstance(const, types.CodeType): yield from used(const)
    known = set(vars(importlib.import_module(f"ddpm_nbdev.{name}"))) | set(dir(builtins))
    path = LIB/f"{name}.py"
    undefined = set(used(compile(path.read_text(encoding="utf-8"), path, "exec"))) - known
    assert not undefined


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The sdist, and the wheel built from nothing but the sdist."
    pytest.importorskip("setuptools")
    tmp = tmp_path_factory.mktemp("build")
    build = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_'+sys.argv[1])(sys.argv[2]))"
    def make(kind, source):
        res = subprocess.run([sys.executable, "-c", build, kind, str(tmp)], cwd=source, text=True, capture_output=True)
        assert res.returncode == 0, res.stderr
        return tmp/res.stdout.splitlines()[-1]
    source = tmp/"source"
    copy_project(source)
    sdist = make("sdist", source)
    with tarfile.open(sdist) as tar: tar.extractall(tmp/"unpacked")
    return sdist, make("wheel", next((tmp/"unpacked").iterdir()))


def copy_project(target):
    "What packaging reads; building in the checkout would leave files there."
    shutil.copytree(LIB, target/LIB.name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."): shutil.copy(path, target)


def shipped(): return {p.relative_to(ROOT).as_posix() for p in LIB.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def test_sdist(built):
    with tarfile.open(built[0]) as tar: inside = {n.partition("/")[2] for n in tar.getnames()}
    files = {"settings.ini", "setup.py", "LICENSE", "CHANGELOG.md"} | ({"README.md"} if (ROOT/"README.md").exists() else set())
    assert files | shipped() <= inside


def test_wheel(built):
    "Every file of the package and nothing else; the licence, the requirements, the commands; under 12 MB."
    with zipfile.ZipFile(built[1]) as wheel:
        inside = {n for n in wheel.namelist() if ".dist-info/" not in n}
        info = {n.split(".dist-info/")[1]: wheel.read(n).decode() for n in wheel.namelist() if ".dist-info/" in n}
    assert inside == shipped()
    assert any(n.endswith("LICENSE") for n in info)
    required = re.findall(r"^Requires-Dist: ([^;\n]+)$", info["METADATA"], re.M)
    assert names(required) == names(RUN_TIME)
    for extra in EXTRAS: assert f"Provides-Extra: {extra}\n" in info["METADATA"]
    for command in CFG["console_scripts"].split(): assert command.replace("=", " = ") in info["entry_points.txt"]
    assert built[1].stat().st_size < 12e6                       # with a color network


def metadata(wheel):
    "The fields of a wheel, and the text below them."
    with zipfile.ZipFile(wheel) as z: text = z.read(next(n for n in z.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    return email.message_from_string(text)


def test_an_index_shows_where_to_go(built):
    "Project URLs that follow settings.ini; what people search for; all five kinds of link that PyPI knows by name."
    said = metadata(built[1])
    urls = dict(u.split(", ") for u in said.get_all("Project-URL"))
    site, repo = CFG["doc_host"] + CFG["doc_baseurl"], CFG["git_url"]
    assert urls == {"Homepage": site, "Documentation": site, "Source": repo, "Changelog": f"{repo}/blob/{CFG['branch']}/CHANGELOG.md", "Issues": f"{repo}/issues"}
    assert said["Home-page"] is None and said["Summary"] == CFG["description"] and len(said["Summary"]) <= 512
    assert {"ddpm", "diffusion-models", "pytorch", "tutorial"} <= set(re.split(r"[ ,]+", said["Keywords"])) and "Diffusion" in said["Summary"]


def test_the_readme_on_an_index_leads_to_the_repository(built):
    "Relative links and pictures would lead nowhere there; code, anchors and absolute links stay."
    shown, text = metadata(built[1]).get_payload(), (ROOT/"README.md").read_text(encoding="utf-8")
    link = re.compile(r"""(?:\]\(|\b(?:src|href)=")([^)\s"]+)""")
    strip = lambda t: re.sub(r"^```.*?^```$|`[^`\n]+`", "", t, flags=re.M | re.S)
    old, new = (link.findall(strip(t)) for t in (text, shown))
    relative = [o for o in old if not re.match(r"[a-z]+:|#", o)]
    assert len(old) == len(new) and len(relative) > 50 and any(o.endswith(".png") for o in relative)
    for before, after in zip(old, new):
        kind = "raw" if before.endswith(".png") else "blob"
        assert after == (f"{CFG['git_url']}/{kind}/{CFG['branch']}/{before}" if before in relative else before)
    code = lambda t: re.findall(r"^```.*?^```$", t, flags=re.M | re.S)
    assert code(text) == code(shown) and code(text)


def test_commands_exist():
    "Each console script names a function that is there."
    for command in CFG["console_scripts"].split():
        module, function = command.split("=")[1].split(":")
        if importlib.util.find_spec(module) is None: pytest.skip(f"no {module} yet")
        assert callable(getattr(importlib.import_module(module), function))
