"The address of repository and site, the author and the version stand in settings.ini alone: all else follows."
import re
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from test_tools import tool

ROOT = Path(__file__).parents[1]
CFG = ConfigParser(delimiters=["="])
CFG.read(ROOT/"settings.ini", encoding="utf-8")
CFG = CFG["DEFAULT"]
sys.path.insert(0, str(ROOT/"tools"))
import check_outputs  # noqa: E402
import set_address  # noqa: E402


def copy(tmp_path, **values):
    "A copy of the project whose settings have these values."
    root = tmp_path/"fork"
    shutil.copytree(ROOT, root, ignore=check_outputs.JUNK, dirs_exist_ok=True)
    if (ROOT/".github").exists(): shutil.copytree(ROOT/".github", root/".github")   # junk are hidden folders
    text = (root/"settings.ini").read_text(encoding="utf-8")
    for key, value in values.items():
        assert re.search(rf"^{key} = ", text, re.M)
        text = re.sub(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.M)
    (root/"settings.ini").write_text(text, encoding="utf-8")
    return root


def where(root, word):
    return [p.relative_to(root).as_posix() for p in sorted(root.rglob("*")) if p.is_file() and word.encode() in p.read_bytes()]


def test_everything_follows_settings(): assert not set_address.changes(ROOT)


HOST = {"git_url": "https://github.com/%(user)s/%(repo)s", "doc_host": "https://%(user)s.github.io", "doc_baseurl": "/%(repo)s"}   # of a fork of a fork
FORKS = [({"user": "some-one", "repo": "ddpm_nbdev", **HOST}, "https://github.com/some-one/ddpm_nbdev", "https://some-one.github.io/ddpm_nbdev"),
         ({**HOST, "user": "me", "repo": "noise", "branch": "trunk", "author": "I, myself"}, "https://github.com/me/noise", "https://me.github.io/noise"),
         ({"user": "me", "git_url": "https://git.example.org/a/b", "doc_host": "https://noise.example.org", "doc_baseurl": ""},
          "https://git.example.org/a/b", "https://noise.example.org")]


@pytest.mark.parametrize("values, repo, site", FORKS, ids=["owner", "name", "host"])
def test_a_fork_changes_one_file(tmp_path, values, repo, site):
    "The old owner is named nowhere; links keep their paths; the site's configuration, the citation and nbdev's settings are new."
    root, old = copy(tmp_path, **values), f"{CFG['git_url']}/blob/{CFG['branch']}/"
    assert where(root, CFG["git_url"]) and where(root, CFG["doc_host"])
    before = {p: p.read_text(encoding="utf-8").count(old) for p in root.glob("nbs/*.ipynb")}
    bad = tool("set_address", "--check", root)
    assert bad.returncode == 1 and "_quarto.yml: not what settings.ini says; run tools/set_address.py" in bad.stdout
    done = tool("set_address", root)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert not where(root, CFG["git_url"]) and not where(root, CFG["doc_host"])       # a bare name may be a word
    assert tool("set_address", "--check", root).returncode == 0
    branch = values.get("branch", CFG["branch"])
    assert sum(before.values()) > 20
    assert {p: p.read_text(encoding="utf-8").count(f"{repo}/blob/{branch}/") for p in before} == before
    web = yaml.safe_load((root/"_quarto.yml").read_text(encoding="utf-8"))["website"]
    assert (web["repo-url"], web["site-url"], web["repo-branch"]) == (repo, site, branch)
    assert web["navbar"]["tools"][0]["href"] == repo
    cited = yaml.safe_load((root/"CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["repository-code"], cited["url"], cited["authors"]) == (repo, site, [{"name": values.get("author", CFG["author"])}])
    assert cited["preferred-citation"]["url"] == "https://arxiv.org/abs/2006.11239"
    nbdev = {}
    exec((root/"ddpm_nbdev/_modidx.py").read_text(encoding="utf-8"), nbdev)
    said = nbdev["d"]["settings"]
    assert said["git_url"] == repo and said["doc_host"] + said["doc_baseurl"] == site and said["branch"] == branch


def test_what_the_tool_writes_is_what_nbdev_makes(tmp_path, monkeypatch):
    "The README and the index of names, exported again with the new settings."
    root = copy(tmp_path, user="some-one", branch="trunk")
    assert tool("set_address", root).returncode == 0
    monkeypatch.setenv("PYTHONPATH", str(root))
    sync = tool("check_sync", root)
    assert sync.returncode == 0, sync.stdout


def test_links_that_come_from_elsewhere_follow():
    "As after a merge from the project that was forked; the paper's code, and names that only begin alike, stay."
    new = {"lib_name": "toylib", "git_url": "https://github.com/me/toys", "site": "https://me.github.io/toys", "branch": "trunk"}
    old = {"repo": "https://github.com/me/toys", "site": "https://me.github.io/toys", "branch": "trunk"}
    def moved(text): return set_address.readdress(text, old, new)
    assert moved("[a](https://github.com/them/toylib/blob/trunk/a.py)") == "[a](https://github.com/me/toys/blob/trunk/a.py)"
    assert moved("https://them.github.io/toylib/a.html#b") == "https://me.github.io/toys/a.html#b"
    for same in ("https://github.com/them/toylib_more", "https://github.com/hojonathanho/diffusion", "https://github.com/me/toys/blob/v1/a.py"):
        assert moved(same) == same


@pytest.mark.parametrize("key, value", [("git_url", "https://github.com/me/noise/"), ("git_url", "me/noise"), ("doc_host", "me.github.io"), ("doc_baseurl", "noise"),
                                        ("branch", ""), ("branch", "a b"), ("branch", "a: b"), ("branch", "it's"), ("branch", "fix#12"), ("author", 'the "one"'), ("version", "")])
def test_an_address_that_is_none_is_refused(tmp_path, key, value):
    (tmp_path/"settings.ini").write_text(re.sub(rf"^{key} = .*$", lambda m: f"{key} = {value}", (ROOT/"settings.ini").read_text(), flags=re.M))
    res = tool("set_address", tmp_path)
    assert res.returncode == 1 and len(res.stderr.splitlines()) == 1 and f"settings.ini: {key} = {value} must be like " in res.stderr


def test_a_new_version_is_cited(tmp_path):
    root = copy(tmp_path, version="7.7")
    assert tool("set_address", root).returncode == 0
    assert yaml.safe_load((root/"CITATION.cff").read_text(encoding="utf-8"))["version"] == "7.7"


def test_a_branch_like_a_number_stays_a_name_and_pictures_are_no_text(tmp_path):
    root = copy(tmp_path, branch="1.10")
    (root/".github").mkdir(exist_ok=True)
    (root/".github/logo.png").write_bytes(b"\x89PNG\xff\xfe")
    assert tool("set_address", root).returncode == 0 and tool("set_address", "--check", root).returncode == 0
    assert yaml.safe_load((root/"_quarto.yml").read_text(encoding="utf-8"))["website"]["repo-branch"] == "1.10"


def test_what_is_no_project_is_said_in_a_line(tmp_path):
    res = tool("set_address", tmp_path)
    assert res.returncode == 1 and len(res.stderr.splitlines()) == 1 and "is no project" in res.stderr
