"""
Batches that survive: each is computed once and then lies on the disk. Killed at any moment, the same
command goes on where it was; started several times over, as other shards, it shares the work.

    saved = Saved('eval.state', dict(weights=..., images=..., eps=..., seed=...), shard=(0, 4))
    for i, result in saved.batches('pgd', 0, todo, 50, attack):
        ...         # i: the images of the k-th batch; attack(k, i) -> a dict of tensors, numbers, strings

What is computed must depend on the fingerprint, the name and the batch alone: every batch has its own seed.
"""
import atexit
import contextlib
import glob
import hashlib
import json
import os
import shutil
import sys
import threading
import time

from tqdm import tqdm

from support import checkpoint, files
from support.files import Refused, atomic, cannot_write, out_of_memory, say
from support.refusals import refuse

UNFINISHED = '"complete": false'
RESERVED = '{%s}' % UNFINISHED              # a report of which no row is finished
TELL, GIVE_UP = 30, 3600        # seconds: between two lines on the screen; of waiting for an absent shard

# -----------------------------------------------------------------------------
# the screen

def progress(things, what, unit='batches', total=None):
    """things, numbered, with a bar on a terminal that also moves while one of them takes long; elsewhere a
    line every 30 seconds."""
    total = len(things) if total is None else total
    bar = tqdm(total=total, desc=what, disable=None, leave=False, unit=unit,
               bar_format='{desc}: {n_fmt} of {total_fmt} {unit} |{bar:30}| {elapsed} gone, {remaining} left')
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

# -----------------------------------------------------------------------------
# what ends it early

@contextlib.contextmanager
def guarded(report, batch_size):
    """The work of an evaluation: what ends it early is one line, and the next command goes on from there."""
    def intact():
        if glob.glob(f'{glob.escape(report)}.state/*.pt'):
            return f'what is finished lies in {report}.state, and the same command continues'
        return 'nothing was finished'
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f'\nstopped: {intact()}')
    except OSError as e:
        sys.exit(f'{cannot_write(e.filename or report, e)}. Stopped: {intact()}')
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        sys.exit(f'out of memory with --batch-size {batch_size}: try {max(1, batch_size // 2)}, '
                 'with another --out')

def is_of(path, report):
    """Has the evaluation whose batches still lie beside the report, unfinished, saved its x_adv to path?"""
    try:
        with open(f'{report}.state/fingerprint.json') as f:
            return json.load(f) == checkpoint.read(path)['evaluated']
    except (OSError, ValueError, TypeError, KeyError, Refused):
        return False

def unfinished(path, flag, report=None):
    """Raises Refused if path is there and neither the beginning of a report, which the next one may replace,
    nor x_adv of the evaluation that report is the beginning of."""
    if not path or not os.path.exists(path):
        return
    try:
        with open(path, 'rb') as f:
            content = f.read()
    except OSError as e:
        raise Refused(cannot_write(path, e)) from e
    if UNFINISHED.encode() in content:
        return
    try:
        json.loads(content)
    except ValueError:                              # torn, or something else
        if os.path.isdir(f'{path}.state') and content[:1] in (b'', b'{', b'\0'):
            say(f'note: {path} is torn, and is written again from {path}.state')
            return
    if report and is_of(path, report):
        return
    refuse(f'{path} is there already: choose another --{flag}, or delete it')

def reserve(path, flag, report=None):
    """Hours of AutoAttack end in this file: it has to be writable. What a killed evaluation left beside it
    goes."""
    unfinished(path, flag, report)                  # another evaluation may have ended while this one started
    if not path:
        return
    folder, name = os.path.split(path)
    try:
        for left_over in glob.glob(os.path.join(glob.escape(folder), f'.{glob.escape(name)}.*.tmp')):
            os.remove(left_over)
        with atomic(path) as tmp, open(tmp, 'w') as f:
            f.write(RESERVED)
    except OSError as e:
        raise Refused(cannot_write(path, e)) from e

# -----------------------------------------------------------------------------

class Saved:
    """
    A folder of finished batches of one evaluation. fingerprint: everything that the results depend on, as
    JSON. shard: (i, n). Raises Refused, naming the difference, for a folder with another fingerprint, and
    where this shard, or the whole evaluation, is at work already.
    """
    def __init__(self, folder, fingerprint, shard=(0, 1)):
        self.folder, self.shard, self.locks = folder, shard, []
        path = f'{folder}/fingerprint.json'
        try:
            os.makedirs(folder, exist_ok=True)
            self._lock()
            if not os.path.exists(path):
                with atomic(path) as tmp, open(tmp, 'w') as f:
                    json.dump(fingerprint, f, indent=1)
            with open(path) as f:
                old = json.load(f)
            if not isinstance(old, dict):
                raise ValueError
        except OSError as e:
            raise Refused(cannot_write(folder, e)) from e
        except ValueError as e:
            raise Refused(f'{path} is damaged, so nothing says whose batches these are: delete {folder}, '
                          'and the evaluation begins again') from e
        for k in sorted(old.keys() | fingerprint.keys()):
            if old.get(k) != fingerprint.get(k):
                refuse(f'{folder} holds a part of another evaluation ({k} was {old.get(k)}, '
                       f'is {fingerprint.get(k)}): delete it, or choose another --out')

    def _lock_of(self, i):
        return f'{self.folder}/.lock-{i}-of-{self.shard[1]}'

    def _lock(self):
        """Shards share the folder, each of them once; an evaluation that is no shard has it alone. Held until
        the process ends, however it does."""
        i, n = self.shard
        for path in glob.glob(f'{glob.escape(self.folder)}/.lock-*-of-*'):
            other = int(path.rpartition('-')[2])
            if n > 1 and other != n and files.is_locked(path):
                refuse(f'--shard {i}/{n}: a shard of {other} is at work on {self.folder}')
        self.locks = [open(f'{self.folder}/.lock', 'a+'), open(self._lock_of(i), 'a+')]
        if not (files.lock(self.locks[0], shared=n > 1) and files.lock(self.locks[1])):
            report = self.folder.removesuffix('.state')
            what = 'another evaluation' if n == 1 else f'shard {i}, or the whole evaluation,'
            raise Refused(f'{what} is at work on {report}: wait for it, choose another --out, '
                          'or share the work from the start with --shard')
        atexit.register(self.leave)
        if n == 1:                                  # nobody else writes here: these are of a killed one
            for left_over in glob.glob(f'{glob.escape(self.folder)}/.*.tmp'):
                os.remove(left_over)

    def mine(self, k):
        """Is the k-th batch this process's?"""
        return k % self.shard[1] == self.shard[0]

    def once(self, key, fn, *args):
        """fn(*args), or what it was when it was called for this key before."""
        path = f'{self.folder}/{key}.pt'
        if os.path.exists(path):
            try:
                content = checkpoint.read(path)
                if isinstance(content, dict) and content.get('key') == key:
                    return content['result']
                say(f'note: {path} is no batch of this evaluation: computed again')
            except Refused:                 # it says to fetch the file again, which nobody has to
                say(f'note: {path} is damaged: computed again')
        result = fn(*args)
        if not os.path.exists(self.folder):
            refuse(f'{self.folder} was deleted while this evaluation worked in it: start it again')
        files.save(path, dict(key=key, result=result))
        return result

    def batches(self, name, restart, todo, batch_size, fn):
        """Yields the images of a batch, (B,) indices, and fn(k, indices), the k-th batch's result, for all
        batches of todo, (n,) bool: this process's are computed, or were before; for those of the other shards
        it waits."""
        index = todo.nonzero()[:, 0]
        batches = index.split(batch_size) if len(index) else []
        keys = [f'{name}-{restart}-{k}-{hashlib.sha256(i.numpy().tobytes()).hexdigest()[:12]}'
                for k, i in enumerate(batches)]
        for k, i in progress(batches, f'{name}, restart {restart}' if restart else name):
            if self.mine(k):
                self.once(keys[k], fn, k, i)
        for k, i in enumerate(batches):
            if not self.mine(k):
                self.wait(keys[k], k % self.shard[1])
            yield i, self.once(keys[k], fn, k, i)

    def wait(self, key, owner):
        """Until shard owner has stored it. Ends the script if that is not at work for an hour."""
        seen, told, known = time.monotonic(), time.monotonic(), os.listdir(self.folder)
        while not os.path.exists(f'{self.folder}/{key}.pt'):
            if not os.path.exists(self.folder):
                refuse(f'{self.folder} was deleted while this evaluation worked in it: start it again')
            time.sleep(0.2)
            now = time.monotonic()
            if now - told < TELL:
                continue
            told, before, known = now, known, os.listdir(self.folder)
            at_work = files.is_locked(self._lock_of(owner))
            if at_work or known != before:      # some file systems of a network keep no locks
                seen = now
            if at_work:
                say(f'waiting for {key}, which shard {owner} of {self.shard[1]} computes')
            elif now - seen < GIVE_UP:
                say(f'waiting for {key}, and shard {owner} of {self.shard[1]} is not at work: start it')
            else:
                refuse(f'{key} is missing, and for {GIVE_UP / 60:g} minutes shard {owner} of {self.shard[1]} '
                       'was not at work: start it, and this command again')

    def leave(self):
        """At the end, at the latest the process's: the last in the folder takes it along, if the report is
        whole or nothing has been computed."""
        atexit.unregister(self.leave)
        for file in self.locks:
            file.close()
        report, content = self.folder.removesuffix('.state'), UNFINISHED
        with contextlib.suppress(OSError), open(f'{self.folder}/.lock', 'r+') as last:
            if not files.lock(last):
                return
            if os.path.isfile(report):
                with open(report) as f:
                    content = f.read()
            if UNFINISHED not in content or not glob.glob(f'{glob.escape(self.folder)}/*.pt'):
                shutil.rmtree(self.folder)
            if content == RESERVED:
                os.remove(report)
