"""Two machines under torchrun: two hosts with names, addresses and a cable of their own, made of network namespaces.

Where the system makes none (only root may, on Linux), two addresses of this machine stand for them; a cable that can be cut is then missing.
"""
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_distributed import STEPS, TRAIN, alone, same, workers  # noqa: F401, alone is a fixture

from ddpm_nbdev.files import read_log

ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
NSENTER = ["nsenter", "--net", "--uts", "--mount", "--target"]
NAMES = "host-a", "host-b"


def command_of_the_page():
    "The line of page 20 for several machines: its variables, and what stands between torchrun and the program."
    cells = json.loads((ROOT/"nbs/20_cli.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells).replace("\\\n", " ")
    line = next(line for line in text.splitlines() if "torchrun --nnodes" in line)
    words = shlex.split(line)
    start, end = words.index("torchrun"), words.index("-m")
    return dict(w.split("=") for w in words[:start]), words[start+1:end]


class Hosts:
    "Two hosts; `with` ends what still runs there, and with it the namespaces."
    def __init__(self, folder):
        self.folder, self.holders, self.running = folder, [], []
        self.why_one_machine = "not root" if not hasattr(os, "geteuid") or os.geteuid() else ""
        missing = [c for c in ("ip", "unshare", "nsenter") if not shutil.which(c)]
        if missing: self.why_one_machine = f"no {' and no '.join(missing)}"
        if not self.why_one_machine:
            try: self.connect()
            except (subprocess.CalledProcessError, OSError) as e: self.why_one_machine = f"no namespaces ({e})"
        if self.why_one_machine: self.end()

    def connect(self):
        (self.folder/"hosts").write_text("127.0.0.1 localhost\n" + "".join(f"10.77.0.{i} {name}\n" for i, name in enumerate(NAMES, 1)))
        for name in NAMES:
            made = f"hostname {name}; mount --bind hosts /etc/hosts && echo; exec sleep 600"
            p = subprocess.Popen(["unshare", "--net", "--uts", "--mount", "sh", "-c", made], cwd=self.folder, stdout=subprocess.PIPE)
            self.holders.append(p)
            if p.stdout.readline() != b"\n": raise OSError("unshare failed")
        a, b = (str(p.pid) for p in self.holders)
        self.on(0, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", b)
        for i in range(2):
            for words in (f"address add 10.77.0.{i+1}/24 dev eth0", "link set lo up", "link set eth0 up"): self.on(i, "ip", *words.split())

    def on(self, i, *command):
        subprocess.run([*NSENTER, str(self.holders[i].pid), *command], check=True, capture_output=True)

    def torchrun(self, i, options, *args, env=None):
        "Start torchrun on a host, as page 20 says; what it says goes to a file."
        where = [*NSENTER, str(self.holders[i].pid)] if self.holders else []
        address = [] if self.holders else ["--local-addr", f"127.0.0.{i+2}"]
        if not self.holders: env = {"GLOO_SOCKET_IFNAME": "lo"} | (env or {})
        with open(self.folder/f"{i}.txt", "w") as said:
            command = [*where, sys.executable, "-m", "torch.distributed.run", *options, *address, "-m", *args]
            p = subprocess.Popen(command, cwd=self.folder, env=ENV | (env or {}), stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        self.running.append(p)
        return p

    def said(self): return [(self.folder/f"{i}.txt").read_text() for i in range(2)]

    def train(self, out, *more, restarts=3):
        "The line of page 20, with two machines of one process each, on both."
        env, words = command_of_the_page()
        first = NAMES[0] if self.holders else "127.0.0.2"
        value = {"--nnodes": "2", "--nproc-per-node": "1", "--max-restarts": str(restarts), "--rdzv-endpoint": f"{first}:{free_port()}"}
        words = [value.get(before, word) for before, word in zip(["", *words], words)]
        return [self.torchrun(i, words, *TRAIN[1:], "--out", self.folder/out, "--samples", "0", *more, env=env) for i in range(2)]

    def cable(self, state): self.on(1, "ip", "link", "set", "eth0", state)

    def end(self):
        for p in self.running + self.holders:
            try: os.killpg(p.pid, signal.SIGKILL) if p in self.running else p.kill()
            except ProcessLookupError: pass
            p.wait()
        self.running, self.holders = [], []


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def hosts(tmp_path):
    two = Hosts(tmp_path)
    yield two
    two.end()


def finish(hosts, processes, seconds=120):
    "The statuses, when both have ended."
    end = time.monotonic()+seconds
    try: return [p.wait(max(1, end-time.monotonic())) for p in processes]
    except subprocess.TimeoutExpired: raise AssertionError(hosts.said()) from None


def wait_for(condition, hosts, seconds=60):
    for _ in range(seconds*20):
        if condition(): return
        if any(p.poll() is not None for p in hosts.running): break
        time.sleep(.05)
    raise AssertionError(hosts.said())


def step(out): return max((r["step"] for r in read_log(out)), default=0)


def test_two_hosts_are_one_process(hosts, tmp_path, alone):
    status = finish(hosts, hosts.train("run", "--steps", str(STEPS)))
    assert status == [0, 0] and same(tmp_path/"run", alone, 0), hosts.said()
    assert sorted(said.count("steps on cpu and 1 more") for said in hosts.said()) == [0, 1]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers through /proc, which is not there")
def test_workers_of_both_hosts_are_killed(hosts, tmp_path, alone):
    "kill -9 on one host, then on the other: both begin again, from the checkpoint, and end with the weights of a run that nobody disturbed."
    ps = hosts.train("run", "--steps", str(STEPS))
    for host, after in ((1, 20), (0, 60)):
        wait_for(lambda: step(tmp_path/"run") >= after and workers(ps[host]), hosts)
        os.kill(*workers(ps[host]).values(), signal.SIGKILL)
    status = finish(hosts, ps)
    assert status == [0, 0] and same(tmp_path/"run", alone, 0), hosts.said()
    assert "".join(hosts.said()).count("steps on cpu and 1 more") == 3
    assert [r["step"] for r in read_log(tmp_path/"run")] == list(range(10, STEPS+1, 10))


def test_the_cable_is_cut(hosts, tmp_path, alone):
    "For 20 seconds: both wait, and go on as if nothing had happened."
    if hosts.why_one_machine: pytest.skip(f"no cable to cut: {hosts.why_one_machine}")
    ps = hosts.train("run", "--steps", str(STEPS))
    wait_for(lambda: step(tmp_path/"run") >= 20, hosts)
    hosts.cable("down")
    time.sleep(2)
    before = step(tmp_path/"run")
    time.sleep(18)
    assert before == step(tmp_path/"run") < STEPS and [p.poll() for p in ps] == [None, None], hosts.said()
    hosts.cable("up")
    status = finish(hosts, ps)
    assert status == [0, 0] and same(tmp_path/"run", alone, 0), hosts.said()
    assert "".join(hosts.said()).count("steps on cpu and 1 more") == 1


def test_a_folder_that_only_one_host_sees(hosts, tmp_path):
    "The first process writes, so a run can end; one that goes on is read by all, which is said."
    if hosts.why_one_machine: pytest.skip(f"one machine has one disk: {hosts.why_one_machine}")
    (tmp_path/"disk").mkdir()
    hosts.on(1, "mount", "-t", "tmpfs", "tmpfs", tmp_path/"disk")
    status = finish(hosts, hosts.train("disk/run", "--steps", "20"))
    assert status == [0, 0] and step(tmp_path/"disk/run") == 20 and (tmp_path/"disk/run/metrics.json").exists(), hosts.said()
    status = finish(hosts, hosts.train("disk/run", "--steps", "40", "--resume", restarts=0))
    assert 0 not in status and step(tmp_path/"disk/run") == 20, hosts.said()
    assert re.search(r"\(process 1\): nothing to resume: .* on this machine, and all must see the folder of a run\n", "".join(hosts.said())), hosts.said()
