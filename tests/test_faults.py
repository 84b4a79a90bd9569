"Runs that are killed, disks that are full, runs that meet: what is left is what an undisturbed run leaves. benchmarks/faults.py counts more cases."
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

if not hasattr(os, "fork"): pytest.skip("its processes are forked", allow_module_level=True)
sys.path.insert(0, str(ROOT/"benchmarks"))
import faults  # noqa: E402

SAME = "same as undisturbed"


@pytest.fixture(scope="module")
def runs(tmp_path_factory): return faults.Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def tried(runs, tmp_path):
    "`tried(do, cases)`: what becomes of them, where that is not what it should be."
    def get(do, cases, good=SAME):
        found = {k: do(runs, tmp_path/str(k), k) for k in cases}
        return {k: v for k, v in found.items() if v != good}
    return get


def test_a_kill_at_any_call_that_writes(runs, tried):
    "Between a checkpoint and its pictures, say: when the run goes on, it makes up for what is missing."
    assert runs.writes > 50 and not tried(faults.killed_new, range(1, runs.writes+1))


def test_a_kill_of_a_run_that_replaces_another(runs, tried):
    "Until its first checkpoint has taken the place of the old one, and the new log that of the old."
    assert not tried(faults.killed_overwriting, range(10, 6+runs.overwrites//2))


def test_a_full_disk_loses_nothing(runs, tried):
    assert runs.takes > 30 and not tried(faults.full_disk, range(1, runs.takes+1, 6))


def test_two_at_once(tried):
    assert not tried(faults.two_at_once, range(2), "one run, whole")


@pytest.mark.parametrize("lockless", [None, *faults.LOCKLESS.values()])
def test_beside_a_run(lockless, tried):
    "A resume is refused while the holder of the lock lives, and goes on when it has been killed; also where the disk has no locks."
    assert not tried(lambda r, o, s: faults.beside(r, o, s, lockless=lockless), [1], "refused in one line")
    assert not tried(lambda r, o, s: faults.beside(r, o, s, lockless=lockless, kill=True), [2])


def test_differences_are_seen(runs, tmp_path):
    "The comparison itself: each file that is missing, left over or changed."
    for name in faults.contents(runs.new):
        shutil.copytree(runs.new, out := tmp_path/"out")
        if name.endswith(".png"): (out/name).write_bytes(b"")
        else: (out/name).unlink()
        assert faults.difference(out, runs.new).startswith(name) and faults.difference(runs.new, out).startswith(name)
        shutil.rmtree(out)


def test_the_program_goes_on_where_it_was(tmp_path):
    "Outcomes that are in the file are not tried again; a bad one is named, and is the status."
    file, command = tmp_path/"f.json", [sys.executable, ROOT/"benchmarks/faults.py", "--tiny", "--only", "disks", "files", "--json"]
    first = subprocess.run([*command, file], text=True, capture_output=True)
    assert first.returncode == 0 and "disk full from each call" in first.stdout, first.stderr
    saved = json.loads(file.read_text())
    saved["outcomes"]["damaged log.jsonl"]["0"] = "a traceback"
    file.write_text(json.dumps(saved))
    again = subprocess.run([*command, file], text=True, capture_output=True)
    assert again.returncode == 1 and "damaged log.jsonl, case 0: a traceback" in again.stderr


def test_the_stored_counts():
    "The campaign that page 13a shows: every group, no bad outcome."
    saved = json.loads((ROOT/"benchmarks/results/faults.json").read_text())
    assert not faults.bad(saved) and len(saved["outcomes"]) == 17
    assert all(len(o) >= 5 for o in saved["outcomes"].values())
