"""
Batches that survive: each is computed once and then lies on the disk. Killed at any moment, the same command goes on
where it was; started several times over, as other shards, it shares the work.

    saved = Saved('eval.state', dict(weights=..., images=..., eps=..., seed=...), shard=(0, 4))
    for k, index in progress(batches, 'pgd'):
        if saved.mine(k):
            saved.compute(f'pgd-{k}', lambda: attack(index))            # a dict of tensors, numbers and strings
    results = [saved.read(f'pgd-{k}') for k in range(len(batches))]     # waits for the other shards

What is computed must depend on the fingerprint and on the key alone: each batch is seeded by itself.
"""
import json
import os
import shutil
import threading
import time

import torch
from tqdm import tqdm

from support.files import Refused, atomic, say
from support.refusals import refuse

try:
    import fcntl
except ImportError:             # Windows: nobody warns of two evaluations of one report
    fcntl = None

UNFINISHED = '"complete": false'
TELL, GIVE_UP = 30, 3600        # seconds: between two lines on the screen; of waiting without a new file

def progress(things, what, unit='batches', total=None):
    """things, numbered, with a bar on a terminal that also moves while one of them takes long; elsewhere a line every
    30 seconds."""
    total = len(things) if total is None else total
    bar = tqdm(total=total, desc=what, disable=None, leave=False,
               bar_format='{desc} {percentage:.0f}% |{bar:40}| {elapsed} gone, {remaining} left')
    started, done, over = time.monotonic(), 0, threading.Event()
    def tell():
        while not over.wait(TELL if bar.disable else 1):
            if bar.disable:
                say(f'{what}: {done} of {total} {unit} after {(time.monotonic() - started) / 60:.1f} minutes')
            else:
                bar.refresh()
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        for done, thing in enumerate(things):
            yield done, thing
            bar.update()
    finally:
        over.set()
        teller.join()
        bar.close()

def unfinished(path, flag):
    """Raises Refused if path is there and not the beginning of a report."""
    if path and os.path.exists(path):
        try:
            with open(path, 'rb') as f:
                beginning = UNFINISHED.encode() in f.read()
        except OSError as e:
            raise Refused(f'cannot write {path}: {e.strerror}') from e
        if not beginning:
            refuse(f'{path} is there already: choose another --{flag}, or delete it')

def reserve(path):
    """Hours of AutoAttack end in this file: it has to be writable."""
    try:
        with atomic(path) as tmp, open(tmp, 'w') as f:
            f.write('{%s}' % UNFINISHED)
    except OSError as e:
        raise Refused(f'cannot write {path}: {e.strerror}') from e

class Saved:
    """
    A folder of finished batches of one evaluation. fingerprint: everything that the results depend on, as JSON. shard:
    (i, n). Raises Refused, naming the difference, for a folder with another fingerprint, and where this shard, or
    the whole evaluation, is at work already.
    """
    def __init__(self, folder, fingerprint, shard=(0, 1)):
        self.folder, self.shard = folder, shard
        path = f'{folder}/fingerprint.json'
        try:
            os.makedirs(folder, exist_ok=True)
            self._lock()
            if not os.path.exists(path):
                with atomic(path) as tmp, open(tmp, 'w') as f:
                    json.dump(fingerprint, f, indent=1)
            with open(path) as f:
                old = json.load(f)
        except OSError as e:
            raise Refused(f'cannot write {folder}: {e.strerror}') from e
        for k in sorted(old.keys() | fingerprint.keys()):
            if old.get(k) != fingerprint.get(k):
                refuse(f'{folder} holds a part of another evaluation ({k} was {old.get(k)}, '
                       f'is {fingerprint.get(k)}): delete it, or choose another --out')

    def _lock(self):
        """Shards share the folder, each of them once; an evaluation that is no shard has it alone. Held until the
        process ends, however it does."""
        if not fcntl:
            return
        i, n = self.shard
        kind = fcntl.LOCK_EX if n == 1 else fcntl.LOCK_SH
        self.locks = [open(f'{self.folder}/.lock', 'a+'), open(f'{self.folder}/.lock-{i}', 'a+')]
        try:
            fcntl.lockf(self.locks[0], kind | fcntl.LOCK_NB)
            fcntl.lockf(self.locks[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            report = self.folder.removesuffix('.state')
            what = 'another evaluation' if n == 1 else f'shard {i}, or the whole evaluation,'
            raise Refused(f'{what} is at work on {report}: wait for it, choose another --out, '
                          'or share the work from the start with --shard') from None

    def mine(self, k):
        """Is the k-th batch this process's?"""
        return k % self.shard[1] == self.shard[0]

    def compute(self, key, fn):
        """fn(), unless an earlier process has been here."""
        path = f'{self.folder}/{key}.pt'
        if not os.path.exists(path):
            result = fn()
            with atomic(path) as tmp:
                torch.save(result, tmp)

    def read(self, key):
        """What compute() stored, in this process or in another one, for which it waits: ends the script if nothing new
        appears for an hour."""
        path = f'{self.folder}/{key}.pt'
        known, changed, told = None, time.monotonic(), time.monotonic()
        while not os.path.exists(path):
            time.sleep(0.2)
            now, files = time.monotonic(), len(os.listdir(self.folder))
            if files != known:
                known, changed = files, now
            if now - told > TELL:
                told = now
                say(f'waiting for {key}, which another shard of {self.shard[1]} computes; '
                    f'nothing new for {(now - changed) / 60:.0f} of at most {GIVE_UP / 60:g} minutes')
            if now - changed > GIVE_UP:
                refuse(f'nothing new in {self.folder} for {GIVE_UP / 60:g} minutes, and {key} of another shard is '
                       'missing: start that shard, and this command again')
        return torch.load(path, map_location='cpu', weights_only=True)

    def delete(self):
        shutil.rmtree(self.folder, ignore_errors=True)
