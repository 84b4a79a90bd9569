"GitHub's workflows, as far as files can be checked without GitHub: a schema, and what this project asks of them."
import re
import shlex
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from ruamel.yaml import YAML   # YAML 1.2, in which `on` is a word

ROOT = Path(__file__).parents[1]
FOLDER = ROOT/".github"/"workflows"
FILES = {p.name: p.read_text(encoding="utf-8") for p in sorted(FOLDER.glob("*.y*ml"))}
CFG = ConfigParser(delimiters=["="])
CFG.read(ROOT/"settings.ini", encoding="utf-8")
CFG = CFG["DEFAULT"]
CI = (ROOT/".ci"/"run").read_text(encoding="utf-8")
READ = {"contents": "read"}
MORE = {("site.yml", "publish"): {"pages": "write", "id-token": "write"}, ("release.yml", "publish"): {"id-token": "write"}}
SHELL = {"cd", "ls", "test", "python", "pip"}
ACTION = re.compile(r"[\w-]+/[\w./-]+@(v\d+(\.\d+)*|release/v\d+|[0-9a-f]{40})")


def load(text): return YAML(typ="safe", pure=True).load(text)


def schema(*paths):
    "check-jsonschema's verdict by the schema that it brings along."
    return subprocess.run([sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, paths)],
                          text=True, capture_output=True)


def supported():
    "Python versions from min_python to the newest that setup.py names; to the newest one tested where it names none."
    first = int(CFG["min_python"].split(".")[1])
    named = re.findall(r"Programming Language :: Python :: 3\.(\d+)", (ROOT/"setup.py").read_text(encoding="utf-8"))
    tested = re.findall(r"3\.(\d+)", str(load(FILES["test.yml"])["jobs"]["test"]["strategy"]["matrix"]["python"]))
    return [f"3.{minor}" for minor in range(first, max(map(int, named or tested))+1)]


def command_problem(line):
    "Why a line of a script cannot run; None if it can."
    words = shlex.split(line)
    missing = [w for w in words if re.match(r"(\.ci|tools|tests|nbs)/", w) and not (ROOT/w).exists()]
    if missing: return f"no file {missing[0]}"
    name = words[0]
    ours = [s.split("=")[0] for s in CFG["console_scripts"].split()]
    if (ROOT/name).is_file(): return None if (ROOT/name).stat().st_mode & 0o100 else f"{name} is not executable"
    if "/bin/" in name: return None if name.split("/bin/")[1] in ["pip", *ours] else f"no command {name}"
    return None if name in SHELL or (Path(sys.executable).parent/name).exists() else f"no command {name}"


def problems(name, text):
    "What is wrong with a workflow, in words."
    flow, res = load(text), []
    if found := re.search(r"pull_request_target|workflow_run|\bsecrets\b", text): res.append(f"uses {found[0]}")
    if flow.get("permissions") != READ: res.append("permissions are more than to read")
    if "concurrency" not in flow: res.append("no concurrency")
    if "download.pytorch.org/whl/cpu" not in flow.get("env", {}).get("PIP_EXTRA_INDEX_URL", ""): res.append("installs CUDA")
    for job, spec in flow["jobs"].items():
        if spec.get("permissions", {}) != MORE.get((name, job), {}): res.append(f"{job}: permissions")
        if "uses" in spec:
            if not (ROOT/spec["uses"]).is_file(): res.append(f"{job}: no file {spec['uses']}")
            continue
        if not spec.get("timeout-minutes", 999) <= 60: res.append(f"{job}: may run for hours")
        if "environment" in spec and "pull_request" in flow["on"] and "github.event_name != 'pull_request'" not in spec.get("if", ""):
            res.append(f"{job}: publishes from a pull request")
        if "environment" in spec and not spec.get("needs"): res.append(f"{job}: publishes what was not tested")
        for step in spec["steps"]:
            action, script = step.get("uses", ""), step.get("run", "")
            if action and not ACTION.fullmatch(action): res.append(f"{job}: {action} names no version")
            if action.startswith("actions/checkout@") and step.get("with", {}).get("persist-credentials") is not False:
                res.append(f"{job}: leaves a token in the checkout")
            if action.startswith("quarto-dev/") and not re.fullmatch(r"\d+\.\d+\.\d+", str(step.get("with", {}).get("version"))):
                res.append(f"{job}: any Quarto")
            if "${{" in script: res.append(f"{job}: pastes an expression into a script")
            if ".ci/run" in script and "PYTHON" not in step.get("env", {}): res.append(f"{job}: .ci/run takes any Python")
            if "pip install" in script and script.strip() != "pip install build" and "-c .ci/constraints.txt" not in script:
                res.append(f"{job}: installs without .ci/constraints.txt")
            res += [f"{job}: {p}" for p in map(command_problem, script.splitlines()) if p]
    return res


def test_files(): assert list(FILES) == ["release.yml", "site.yml", "test.yml"]


def test_schema():
    res = schema(*FOLDER.iterdir())
    assert res.returncode == 0, res.stdout+res.stderr


@pytest.mark.parametrize("name", FILES)
def test_rules(name): assert problems(name, FILES[name]) == []


def test_pythons():
    assert load(FILES["test.yml"])["jobs"]["test"]["strategy"]["matrix"]["python"] == supported()
    assert supported()[0] == CFG["min_python"]


def scripts(name): return [s["run"] for job in load(FILES[name])["jobs"].values() for s in job.get("steps", []) if "run" in s]


def test_same_commands_as_ci():
    assert scripts("test.yml") == [".ci/run"]
    def plain(command): return re.sub(r"--outdir \S+", "--outdir DIR", command.replace("pip install -q", "pip install"))
    commands = [plain(line.split(" > ")[0].strip()) for line in CI.splitlines()]
    for name, start in ("release.yml", "python -m build"), ("site.yml", "pip install"):
        command, = [plain(s) for s in scripts(name) if s.startswith(start)]
        assert command in commands


def test_publishes_only_releases():
    flow = load(FILES["release.yml"])
    assert flow["on"] == {"release": {"types": ["published"]}}
    assert flow["jobs"]["publish"]["needs"] == ["test", "build"]
    assert flow["jobs"]["publish"]["environment"]["name"] == "pypi"


@pytest.mark.parametrize("name,old,new,said", [
    ("test.yml", "pull_request:", "pull_request_target:", "uses pull_request_target"),
    ("test.yml", "PYTHON: python", "TOKEN: ${{ secrets.TOKEN }}", "uses secrets"),
    ("test.yml", "PYTHON: python", "OTHER: python", ".ci/run takes any Python"),
    ("test.yml", "contents: read", "contents: write", "permissions are more than to read"),
    ("test.yml", "permissions:\n  contents: read\n", "", "permissions are more than to read"),
    ("test.yml", "checkout@v6", "checkout@main", "names no version"),
    ("test.yml", "persist-credentials: false", "fetch-depth: 1", "leaves a token"),
    ("test.yml", "    timeout-minutes: 45\n", "", "may run for hours"),
    ("test.yml", ".ci/run\n", ".ci/runs\n", "no file .ci/runs"),
    ("test.yml", ".ci/run\n", "pytests -q\n", "no command pytests"),
    ("test.yml", "whl/cpu", "whl/cu130", "installs CUDA"),
    ("site.yml", "nbdev_docs", "nbdev_sites", "no command nbdev_sites"),
    ("site.yml", "install -c .ci/constraints.txt", "install", "without .ci/constraints.txt"),
    ("site.yml", "version: 1.9.38", "version: release", "any Quarto"),
    ("site.yml", "pages: write", "contents: write", "publish: permissions"),
    ("site.yml", "    if: github.event_name != 'pull_request' &&", "    if:", "publishes from a pull request"),
    ("site.yml", "    needs: build\n", "", "publishes what was not tested"),
    ("release.yml", '"${TAG#v}".tar.gz', "${{ github.event.release.tag_name }}.tar.gz", "pastes an expression"),
    ("release.yml", "workflows/test.yml", "workflows/tests.yml", "no file ./.github/workflows/tests.yml"),
    ("release.yml", "bin/ddpm_sample", "bin/ddpm_samples", "no command user/bin/ddpm_samples"),
])
def test_rules_can_fail(name, old, new, said):
    assert old in FILES[name]
    found = problems(name, FILES[name].replace(old, new))
    assert any(said in f for f in found), found


def test_schema_can_fail(tmp_path):
    changes = [("test.yml", "runs-on", "runs_on"), ("test.yml", "pull_request:", "pull_requests:"), ("site.yml", "needs:", "need:"),
               ("release.yml", "id-token: write", "id-token: wrote")]
    for i, (name, old, new) in enumerate(changes):
        assert old in FILES[name]
        (tmp_path/f"{i}.yml").write_text(FILES[name].replace(old, new))
    res = schema(*tmp_path.iterdir())
    assert res.returncode == 1
    assert [i for i in range(len(changes)) if f"{i}.yml::" not in res.stdout] == []
