"""
Batches that survive: each is computed once and then lies on the disk. Killed at any moment, the same command
goes on where it was; started several times over, with other shards, it shares the work.

    saved = Saved('eval.state', dict(weights=..., data=..., eps=..., seed=...), shard=(0, 4))
    for k, index in enumerate(batches):
        if saved.mine(k):
            saved.compute(f'pgd-{k}', lambda: attack(index))        # a dict of tensors, numbers and strings
    results = [saved.read(f'pgd-{k}') for k in range(len(batches))]         # waits for the other shards

What compute() returns must depend on the fingerprint and on the key alone: seed each batch by itself.
"""
import json, os, shutil, time

import torch

from support.files import Refused, atomic

class Saved:
    """
    A folder of finished batches of one evaluation. fingerprint: everything that the results depend on, as
    JSON; a folder with another one is refused with a Refused that names the difference. shard: (i, n).
    """
    def __init__(self, folder, fingerprint, shard=(0, 1)):
        self.folder, self.shard = folder, shard
        path = f'{folder}/fingerprint.json'
        if os.path.exists(path):
            with open(path) as f:
                old = json.load(f)
            for k in sorted(old.keys() | fingerprint.keys()):
                if old.get(k) != fingerprint.get(k):
                    raise Refused(f'{folder} holds a part of another evaluation ({k} was {old.get(k)}, '
                                     f'is {fingerprint.get(k)}): delete it, or choose another --out')
        else:
            with atomic(path) as tmp, open(tmp, 'w') as f:
                json.dump(fingerprint, f, indent=1)

    def mine(self, k):
        """Is the k-th batch this process's?"""
        return k % self.shard[1] == self.shard[0]

    def compute(self, key, fn):
        """fn(), unless an earlier process has been here. Returns whether there was anything to do."""
        path = f'{self.folder}/{key}.pt'
        if os.path.exists(path):
            return False
        result = fn()
        with atomic(path) as tmp:
            torch.save(result, tmp)
        return True

    def read(self, key):
        """What compute() stored, in this process or in another one."""
        path = f'{self.folder}/{key}.pt'
        while not os.path.exists(path):
            time.sleep(0.2)
        return torch.load(path, map_location='cpu', weights_only=True)

    def delete(self):
        shutil.rmtree(self.folder, ignore_errors=True)
