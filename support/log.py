"""
What a run leaves behind: a folder, a table on the screen, the same figures as JSON lines,
files that are whole or absent.
"""
import contextlib, importlib.metadata, json, math, os, platform

import torch

from support import autoattack
from support.files import Refused, atomic

try:
    import fcntl
except ImportError:             # Windows: nobody warns of two runs in one folder
    fcntl = None

def new_run(folder, resume=False, epochs=0):
    """Make folder and prove that it can be written. Returns a lock on it, which lasts as long as the process,
    or None if the run in it, of so many epochs, is to be continued and is finished. Raises Refused if
    another one is at work in it, or has been and is not to be continued."""
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(f'{folder}/.lock', 'w')
        if fcntl:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)        # until the process ends, however
            except (BlockingIOError, PermissionError):
                raise Refused(f'another run is at work in {folder}: choose another --out') from None
        begun = os.path.exists(f'{folder}/state.pt')
        if begun and not resume:
            raise Refused(f'{folder} holds an unfinished run: continue it with --resume, '
                             'choose another --out, or delete it')
        if not begun and os.path.exists(f'{folder}/last.pt'):
            if not resume:
                raise Refused(f'{folder} holds a trained model already: choose another --out, '
                                 'or delete it')
            with contextlib.suppress(FileNotFoundError), open(f'{folder}/log.jsonl') as f:
                lines = f.readlines()                           # the configuration, a line per epoch
                wanted = json.loads(lines[0])['epochs'] if lines else 0
                if 0 < wanted < len(lines):
                    if wanted != epochs:
                        raise Refused(f'{folder} holds a finished run of {wanted} epochs, not {epochs}: '
                                         'choose another --out')
                    print(f'{folder} is finished: nothing to resume')
                    return None
        if not begun:
            with atomic(f'{folder}/log.jsonl') as tmp:
                open(tmp, 'w').close()
    except OSError as e:
        raise Refused(f'cannot write {folder}: {e.strerror}') from e
    return lock

def environment(device):
    """Versions and hardware: what a number depends on and a command line does not say."""
    cuda = device.type == 'cuda'
    versions = {name: importlib.metadata.version(name) for name in ('torchvision', 'numpy')}
    with contextlib.suppress(ImportError):                  # training needs none
        name, version = autoattack.package()
        versions[name] = version
    return dict(versions, torch=str(torch.__version__), python=platform.python_version(),
                tf32=cuda and torch.backends.cudnn.allow_tf32,
                device=torch.cuda.get_device_name(device) if cuda else
                       f'CPU, {torch.get_num_threads()} threads')

class Table:
    """One row per epoch on the screen and in folder/log.jsonl, under the configuration. columns: name ->
    format. first: the first epoch to come; of a run that is continued, the log keeps the ones before."""
    def __init__(self, folder, config, first=1, **columns):
        self.path, self.columns = f'{folder}/log.jsonl', columns
        self.header = ' '.join(name.rjust(9) for name in columns)
        print(json.dumps(config), flush=True)
        with open(self.path) as f:
            kept = f.readlines()[:first] if first > 1 else []
        with atomic(self.path) as tmp, open(tmp, 'w') as f:
            f.writelines(kept or [json.dumps(config) + '\n'])

    def row(self, **values):
        if self.header:
            print(self.header)
            self.header = None
        print(' '.join(format(values[name], spec).rjust(9) for name, spec in self.columns.items()),
              flush=True)
        self._append(values)

    def curves(self, *names):
        """folder/curves.png: these columns against the epoch, distinguishable in grey."""
        from matplotlib.figure import Figure        # no pyplot: no window, no backend, no global state
        rows = [json.loads(line) for line in open(self.path)][1:]
        figure = Figure(figsize=(6, 3.5), layout='constrained')
        axes = figure.subplots()
        for name, style in zip(names, ('o-', 's--', '^:')):
            axes.plot([r['epoch'] for r in rows], [r[name] for r in rows], style,
                      color='black', markersize=3, label=name)
        axes.set(xlabel='epoch', ylabel='accuracy on the hold-out, %', ylim=(0, 100))
        axes.legend()
        with atomic(os.path.join(os.path.dirname(self.path), 'curves.png')) as tmp:
            figure.savefig(tmp, format='png', dpi=150)

    def _append(self, values):
        with open(self.path, 'a') as f:
            f.write(json.dumps(values) + '\n')

def check_finite(losses, val_loss, epoch):
    """losses: one per batch of the epoch. Raises FloatingPointError that names epoch and batch."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad) or not math.isfinite(val_loss):  # a last update that broke the weights shows in val_loss only
        batch = int(bad[0]) + 1 if len(bad) else len(losses)
        raise FloatingPointError(f'non-finite loss in epoch {epoch}, batch {batch}')
