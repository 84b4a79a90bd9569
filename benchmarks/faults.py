#!/usr/bin/env python
"""What is lost when a run is killed, a disk is full, a file is damaged, or two come at once?

    python benchmarks/faults.py                          # all of it; some ten minutes
    python benchmarks/faults.py --tiny                   # that it runs, in half a minute
    python benchmarks/faults.py --only kills disks       # some of it
    python benchmarks/faults.py --show benchmarks/results/faults.json     # print the counts again

Nothing is timed, everything is counted. Each fault is a case with a seed; its outcome is a word, and all but the words
of `GOOD` are faults of the package. Cases that are in the JSON file are not tried again, so a campaign that was stopped
goes on. A run is `ddpm_train` with a network of a few thousand weights, in a process of its own, which is forked:
POSIX only. benchmarks/README.md says more.
"""
import argparse
import collections
import contextlib
import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from functools import cached_property
from pathlib import Path
from unittest.mock import patch as mock

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT/'tests')]

import numpy as np
import torch

from ddpm_nbdev import cli
from ddpm_nbdev.ddpm import DDPM
from ddpm_nbdev.files import read_log, write_whole
from ddpm_nbdev.saved import read_checkpoint

GOOD = {'same as undisturbed', 'one line', 'read', 'refused in one line', 'one run, whole'}
MODEL = dict(ch=8, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[4], groups=4)
SETTINGS = dict(T=10, model_args=MODEL, dropout=.2, steps=6, batch_size=8, lr=2e-3, warmup=5, ema_decay=.9, log_every=1,
                checkpoint_every=2, keep_last=2, keep_every=4, sample_every=2, sample_n=2)

# ---- runs and what they leave

def quick_report(ddpm, data, samples):
    "In place of the measurements at the end of a run, which take seconds."
    bits = dict(total=1., L_T=.1, L_mid=.8, L_0=.1, standard_error=None, images=1)
    return {'bits_per_dim': {'test': bits}}

def quick_curve(out, dataset):
    "In place of the picture of the log, which takes most of a second: what it shows."
    write_whole(out/'curve.png', json.dumps([without_times(row) for row in read_log(out)]).encode())

def run(out, resume=False, **changes):
    "The command, as from Python."
    settings = {} if resume else SETTINGS | changes
    quick = mock.multiple(cli, report=quick_report, _save_curve=quick_curve)
    with quick, tempfile.TemporaryDirectory() as folder:
        file = Path(folder)/'settings.json'
        file.write_text(json.dumps({k: v for k, v in settings.items() if k != 'overwrite'}))
        more = dict(resume=True) if resume else dict(config=file, overwrite=settings.get('overwrite', False))
        cli.ddpm_train('digits', out=out, samples=2, quiet=True, **more)

def go_on(out, **changes):
    "What a user does after a fault: resume, or begin again where no checkpoint is of this run."
    done = out/'checkpoint.safetensors'
    own = done.exists() and read_checkpoint(done)[1]['config']['seed'] == changes.get('seed', 0)
    for p in out.glob('**/*.tmp'): os.utime(p, (1, 1))       # it is the next day
    if own: run(out, resume=True)
    else: run(out, **changes)

def without_times(obj):
    "JSON without the seconds."
    return {k: v for k, v in obj.items() if not k.startswith('seconds')}

def contents(out):
    "name -> what must be equal in two runs: everything but times."
    found = {}
    for p in sorted(out.rglob('*')):
        name = str(p.relative_to(out))
        if p.is_dir(): continue
        elif name == 'log.jsonl': found[name] = [without_times(row) for row in read_log(out)]
        elif name == 'metrics.json': found[name] = without_times(json.loads(p.read_text()))
        elif 'checkpoint' in name and p.suffix == '.safetensors':
            tensors, header = read_checkpoint(p)
            found[name] = {k: v.numpy().tobytes() for k, v in tensors.items()} | without_times(header)
        else: found[name] = p.read_bytes()
    return found

def difference(out, whole):
    "'same as undisturbed', or the first file that is not."
    a, b = contents(out), contents(whole)
    for name in sorted(a.keys() | b.keys()):
        if name not in a: return f"{name} is missing"
        if name not in b: return f"{name} is left over"
        if a[name] != b[name]: return f"{name} differs"
    return 'same as undisturbed'

# ---- a process that something happens to

def in_fork(do, wait=lambda pid: None, log=None):
    "Do it in a child process; its status: a number, or minus a signal."
    pid = os.fork()
    if pid:
        wait(pid)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 70
    try:
        os.setsid()
        with open(log or os.devnull, 'w') as f:
            for fd in (1, 2): os.dup2(f.fileno(), fd)
        status = do() or 0
    except BaseException as e:                      # what the command would end with: its line, or a traceback
        known = isinstance(e, (ValueError, OSError, KeyboardInterrupt)) and '\n' not in str(e)
        os.write(2, f"{type(e).__name__} {e}\n".encode())      # whatever Python's stderr is
        status = 1 if known else 70
    finally: os._exit(status)

WRITES = {'os.rename', 'os.remove', 'os.link', 'os.mkdir', 'os.rmdir', 'os.truncate', 'os.chmod', 'shutil.copyfile'}
TAKES = {'os.rename', 'os.link', 'os.mkdir', 'shutil.copyfile'}         # space, or an entry of a folder

def on_write(out, happens, needs_space=False):
    "From now on, in this process: call `happens(n)` before the n-th call that writes in the folder, and before each fsync."
    out, n = str(out), 0
    def count(event, args):
        nonlocal n
        if event == 'open':
            flags = args[2] if isinstance(args[2], int) else 0
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else: writes = event in (TAKES if needs_space else WRITES)
        if writes and any(isinstance(a, (str, os.PathLike)) and os.fspath(a).startswith(out) for a in args):
            n += 1
            happens(n)
    real = os.fsync
    def fsync(fd):
        count('os.rename', (out,))
        return real(fd)
    os.fsync = fsync
    sys.addaudithook(count)

def count_writes(do, out, needs_space=False):
    "How many calls that write it makes."
    r, w = os.pipe()
    def child():
        last = [0]
        on_write(out, lambda n: last.__setitem__(0, n), needs_space)
        do()
        os.write(w, str(last[0]).encode())
    assert in_fork(child) == 0
    os.close(w)
    with os.fdopen(r) as f: return int(f.read())

def die_at(do, out, k):
    "In a process of its own, which ends as by `kill -9` before its k-th call that writes."
    def child():
        on_write(out, lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == k else None)
        do()
    return in_fork(child)

def full_from(do, out, k, log):
    "In a process of its own, whose disk is full from its k-th call on that needs space."
    def full(n):
        if n >= k: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))
    def child():
        on_write(out, full, needs_space=True)
        do()
    return in_fork(child, log=log)

# ---- the campaigns: name -> (cases, what happens in one), made when they are asked for

OVERWRITE = dict(seed=1, steps=4, keep_last=1, overwrite=True)

class Runs:
    "Runs that nobody disturbed, and how often they write; made when they are asked for."
    def __init__(self, folder): self.folder = folder

    def made(self, name, *args, **kw):
        run(self.folder/name, *args, **kw)
        return self.folder/name

    @cached_property
    def new(self): return self.made('new')

    @cached_property
    def older(self): return self.made('older')

    @cached_property
    def replaced(self): return self.made('replaced', **OVERWRITE | dict(overwrite=False))

    @cached_property
    def seconds(self):
        start = time.monotonic()
        self.made('timed')
        return time.monotonic()-start

    @cached_property
    def writes(self): return count_writes(lambda: self.made('writes'), self.folder/'writes')

    @cached_property
    def takes(self): return count_writes(lambda: self.made('takes'), self.folder/'takes', needs_space=True)

    @cached_property
    def overwrites(self):
        shutil.copytree(self.older, self.folder/'over')
        return count_writes(lambda: self.made('over', **OVERWRITE), self.folder/'over')

def killed_new(runs, out, k):
    "A new run that dies before its k-th call that writes, and goes on."
    die_at(lambda: run(out), out, k)
    go_on(out)
    return difference(out, runs.new)

def killed_overwriting(runs, out, k):
    "The same of a run that replaces another."
    shutil.copytree(runs.older, out)
    die_at(lambda: run(out, **OVERWRITE), out, k)
    go_on(out, **OVERWRITE)
    return difference(out, runs.replaced)

def killed_at_random(runs, out, seed):
    "Killed three times, whenever that is; each time it goes on."
    rng = np.random.default_rng([seed, 20261127])
    def blow(pid):
        time.sleep(rng.uniform(0, 1.2*runs.seconds))
        with contextlib.suppress(ProcessLookupError): os.killpg(pid, signal.SIGKILL)
    for _ in range(3): in_fork(lambda: go_on(out), blow)
    go_on(out)
    return difference(out, runs.new)

def full_disk(runs, out, k):
    "The disk is full from the k-th call on: one line, no half file; with space again it goes on."
    log = out.with_suffix('.txt')
    status, said = full_from(lambda: run(out), out, k, log), log.read_text().strip()
    if status != 1 or 'No space left' not in said or '\n' in said: return f"status {status}: {said[-100:]}"
    if list(out.rglob('*.tmp')): return 'half a file'
    go_on(out)
    return difference(out, runs.new)

def two_at_once(runs, out, seed):
    "Two start at the same moment; one trains, the other is told so."
    log, r, w = out.with_suffix('.txt'), *os.pipe()
    def child():
        os.close(w)
        os.read(r, 1)                                        # until the parent lets go
        run(out)
    first = {}
    def second(pid): first['status'] = in_fork(child, lambda pid: (time.sleep(.1), os.close(w)), log)
    statuses = [in_fork(child, second, out.with_suffix('.log')), first['status']]
    os.close(r)
    said = log.read_text() + out.with_suffix('.log').read_text()
    told = 'another run writes there' in said or 'already holds a run' in said
    if sorted(statuses) != [0, 1] or not told: return f"statuses {statuses}: {said[-200:]}"
    same = difference(out, runs.new)
    return 'one run, whole' if same == 'same as undisturbed' else same

def beside(runs, out, seed, how='resume', lockless=None, kill=False):
    "A run is halted in the middle; another comes. It is refused, or goes on where the first has been killed."
    import fcntl
    def no_lock(*a): raise OSError(lockless, os.strerror(lockless))
    locks = mock.object(fcntl, 'flock', no_lock) if lockless else contextlib.nullcontext()
    k, log = int(np.random.default_rng(seed).integers(20, 40)), out.with_suffix('.txt')
    def child():
        on_write(out, lambda n: os.kill(os.getpid(), signal.SIGSTOP) if n == k else None)
        run(out)
    def come(pid):
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        before, said = contents(out) if how else None, None
        if not kill:
            status = in_fork(lambda: go_on(out), log=log)
            text = log.read_text().strip()
            refused = status == 1 and 'another run writes there' in text and '\n' not in text
            said = None if refused and contents(out) == before else f"status {status}: {text[-200:]}"
        come.said = said
        os.kill(pid, signal.SIGKILL if kill else signal.SIGCONT)
    with locks:
        in_fork(child, come)
        if kill: go_on(out)
    if come.said: return come.said
    same = difference(out, runs.new)
    return 'refused in one line' if same == 'same as undisturbed' and not kill else same

def damaged(runs, out, kind, seed):
    "A file with an error at random is read."
    import test_outside as outside
    shutil.copytree(runs.new, out)
    data, settings = outside.load_dataset('digits'), read_checkpoint(out/'checkpoint.safetensors')[1]['config']
    def line(data, rng):
        lines = data.split(b'\n')
        i = rng.integers(len(lines)-1)
        return b'\n'.join([*lines[:i], outside.mutated_json(lines[i].decode(), rng), *lines[i+1:]])
    def load(): outside.TrainState(outside.TrainConfig(**settings), data, 'cpu').load(out/'checkpoint.safetensors')
    text = outside.json_bytes(outside.mutated_json)
    mutate, read = {'config.json': (text, lambda: DDPM.load(out)), 'log.jsonl': (line, lambda: read_log(out)),
                    'model.safetensors': (outside.mutated_header, lambda: DDPM.load(out)),
                    'checkpoint.safetensors': (outside.mutated_header, load)}[kind]
    file = out/kind
    file.write_bytes(mutate(file.read_bytes(), np.random.default_rng([seed, 20260714])))
    return outside.outcome(read)

LOCKLESS = {'ENOSYS': errno.ENOSYS, 'ENOTSUP': errno.EOPNOTSUPP, 'ENOLCK': errno.ENOLCK}

def campaigns(runs, tiny):
    "name -> (group, function that gives the cases, function of (runs, folder, case))."
    def some(which, few):
        n = getattr(runs, which)
        return sorted({1+(n-1)*i//(few-1) for i in range(few)}) if tiny else range(1, n+1)
    def seeds(n): return range(1 if tiny else n)
    found = {'killed at each call that writes: new run': ('kills', lambda: some('writes', 4), killed_new),
             'killed at each call that writes: overwriting': ('kills', lambda: some('overwrites', 3), killed_overwriting),
             'killed three times, at random': ('kills', lambda: seeds(40), killed_at_random),
             'disk full from each call that writes on': ('disks', lambda: some('takes', 4), full_disk)}
    for kind in ('config.json', 'log.jsonl', 'model.safetensors', 'checkpoint.safetensors'):
        found[f'damaged {kind}'] = 'files', lambda: range(5 if tiny else 250), lambda r, o, s, kind=kind: damaged(r, o, kind, s)
    found |= {'two runs at once': ('at once', lambda: seeds(10), two_at_once),
              'a resume beside a running run': ('at once', lambda: seeds(10), beside),
              'a killed holder of the lock': ('at once', lambda: seeds(10), lambda r, o, s: beside(r, o, s, kill=True))}
    for name, code in LOCKLESS.items():
        found[f'no locks on the disk ({name}): beside a run'] = 'at once', lambda: seeds(5), \
            lambda r, o, s, code=code: beside(r, o, s, lockless=code)
        found[f'no locks on the disk ({name}): a killed holder'] = 'at once', lambda: seeds(5), \
            lambda r, o, s, code=code: beside(r, o, s, lockless=code, kill=True)
    return found

# ---- the command line

def table(saved, markdown=False):
    "The counts: how many cases, how many went well, and every other outcome."
    lines = [('fault', 'cases', 'outcomes')]
    for name, outcomes in saved['outcomes'].items():
        counts = collections.Counter(outcomes.values())
        said = ', '.join(f"{n} {word}" for word, n in sorted(counts.items(), key=lambda kv: (kv[0] not in GOOD, -kv[1])))
        lines.append((name, str(sum(counts.values())), said))
    if markdown: return '\n'.join('| ' + ' | '.join(c) + ' |' for c in (lines[0], ['---']*3, *lines[1:]))
    wide = max(len(a) for a, *_ in lines)
    return '\n'.join(f"{a:{wide}}  {b:>5}  {c}" for a, b, c in lines)

def bad(saved): return [(n, c, w) for n, o in saved['outcomes'].items() for c, w in o.items() if w not in GOOD]

def main():
    "Try what has not been tried, write after each campaign, print the counts."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=['kills', 'disks', 'files', 'at once'], help='groups (default: all)')
    parser.add_argument('--json', type=Path, help='outcomes of single cases; what it holds is not tried again')
    parser.add_argument('--tiny', action='store_true', help='a few cases of each')
    parser.add_argument('--show', type=Path, help='print the counts of this file, try nothing')
    parser.add_argument('--markdown', action='store_true', help='print a table for Markdown')
    args = parser.parse_args()
    torch.set_num_threads(1)
    saved = {'torch': torch.__version__, 'outcomes': {}}
    known = args.show or args.json
    if known and known.exists(): saved = json.loads(known.read_text())
    if not args.show:
        with tempfile.TemporaryDirectory() as folder:
            runs = Runs(Path(folder))
            for name, (group, cases, do) in campaigns(runs, args.tiny).items():
                if args.only and group not in args.only: continue
                done = saved['outcomes'].setdefault(name, {})
                for case in cases():
                    if str(case) in done: continue
                    out = runs.folder/'case'/'run'
                    shutil.rmtree(out.parent, ignore_errors=True)
                    out.parent.mkdir()
                    done[str(case)] = do(runs, out, case)
                if args.json: args.json.write_text(json.dumps(saved, indent=0) + '\n')
    print(table(saved, args.markdown))
    for name, case, word in bad(saved): print(f"{name}, case {case}: {word}", file=sys.stderr)
    sys.exit(bool(bad(saved)))

if __name__ == '__main__': main()
