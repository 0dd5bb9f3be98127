"""
What keeps a training alive, and what it leaves behind: a folder with a lock, a log, a state to resume from; signals,
full disks and closed terminals.

    run = Run(args)                                 # locks args.out
    saved = run.begin(config, state)                # the same run as in the folder, or it is refused
    with run.guarded():
        for x, y in run.progress(batches, 'epoch 1', total):
            ...
            run.save_if_due(state)
        run.row(epoch=1, lr=0.1, ...)
        run.save_model('last.pt', net, epoch=1, ...)
        run.save_state(state)
        run.finish()
"""
import argparse
import contextlib
import errno
import glob
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time

import torch
from tqdm import tqdm

from support import autoattack, checkpoint, ddp
from support.files import Refused, atomic, save, say

try:
    import fcntl
except ImportError:             # Windows: nobody warns of two runs in one folder
    fcntl = None

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# -----------------------------------------------------------------------------
# names, and what a number depends on beside the flags

# may differ when a run is continued: where it lies and how it is watched, and the versions and names of the machine
NOT_THE_RUN = {'out', 'data_dir', 'resume', 'save_minutes', 'dry_run', 'device', 'torch', 'torchvision', 'numpy',
               'python', 'autoattack', 'pyautoattack'}

def name(args, defaults, known=(), but=()):
    """runs/..., with every flag in it that is not at its default. known: text that stands in any case;
    but: flags that it covers."""
    shown = {'loss', 'dataset', 'model', 'width', 'subset', 'seed', *but, *NOT_THE_RUN}
    tags = [args.dataset, os.path.basename(args.model).replace('.py:', '-')]
    if args.width:
        tags.append(f'w{args.width}')
    if args.subset:
        tags.append(f'n{args.subset}')
    tags += known
    for flag, value in vars(args).items():
        if flag in shown or value == defaults(flag):
            continue
        if value is True or value is False:
            tags.append(flag if value else f'no_{flag}')
        elif isinstance(value, str):                # of a path its last two parts
            tags.append(flag + '-'.join(value.split(os.sep)[-2:]))
        elif isinstance(value, list):
            tags.append(flag + '-'.join(map(str, value)))
        else:
            tags.append(f'{flag}{value:.6g}')
    text = '-'.join(tags).replace('/', '-').replace(' ', '_')
    if len(text) > 180:                             # a file system has 255
        text = f'{text[:160]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}'
    return f'runs/{text}' if args.seed is None else f'runs/{text}-s{args.seed}'

def teacher_folder(args, defaults, only=None):
    """Where train_teacher.py with these flags puts its run: a student looks there. only: the flags that count."""
    if only:
        args = argparse.Namespace(dataset=args.dataset, model=args.model, width=args.width, subset=args.subset,
                                  **{flag: getattr(args, flag) or None for flag in only})
    text = name(argparse.Namespace(**dict(vars(args), seed=None)), lambda flag: None if flag == 'seed' else defaults(flag))
    seed = vars(args).get('seed', 0)
    return f'{text}-teacher' + (f'-s{seed}' if seed else '')

def environment(device):
    """Versions and hardware: what a number depends on and a command line does not say."""
    cuda = device.type == 'cuda'
    versions = {name: importlib.metadata.version(name) for name in ('torchvision', 'numpy')}
    with contextlib.suppress(ImportError):                  # training does not need it
        package, version = autoattack.package()
        versions[package] = version
    return dict(versions, torch=str(torch.__version__), python=platform.python_version(),
                tf32=cuda and torch.backends.cudnn.allow_tf32,
                device=torch.cuda.get_device_name(device) if cuda else
                f'CPU, {torch.get_num_threads()} threads')

def peak_gib(device):
    """The most memory held so far: of the GPU, or of this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        import resource
    except ImportError:                     # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == 'darwin' else 20)

def summary(config, what, net, notes=()):
    """The first thing on the screen: what will be trained, in five lines. what: the loss and its attack, in words."""
    say(what,
        f'data: {config["dataset"]}, {config["train_images"]} training images, augmentation {config["augment"]}; '
        f'{config["val_images"]} more held out for selection; {config["classes"]} classes',
        f'model: {config["model"]}, {sum(p.numel() for p in net.parameters()) / 1e6:.2f} million weights'
        + (f', width {config["width"]}' if config['width'] else ''),
        f'optimiser: SGD, lr {config["lr"]:g}, {config["schedule"]}, weight decay {config["weight_decay"]:g}; '
        f'{config["epochs"]} epochs of batches of {config["batch_size"]}, seed {config["seed"]}',
        f'{config["precision"].replace("torch.", "")} on {config["device"]}'
        + (', compiled: the first step takes a minute' if config['compile'] else '') + f'; folder {config["out"]}',
        *[note for note in notes if note])

# -----------------------------------------------------------------------------
# a run and its folder

# the table's columns: how each is shown, and what it is
COLUMNS = {
    'epoch': ('d', 'of --epochs'),
    'lr': ('.4f', 'learning rate at its end'),
    'loss': ('.4f', 'mean training loss'),
    'val_clean': ('.2f', 'accuracy on the held-out training images, %'),
    'val_pgd20': ('.2f', 'the same under PGD-20'),
    'img_per_s': ('.0f', 'training images per second, without validation'),
    'peak_gib': ('.2f', 'most memory held so far, GiB'),
    'min_left': ('.1f', "minutes left, from the last epoch's time with its validation"),
}
TABLE_HELP = 'The table, a row per epoch: ' + '; '.join(f'{name}: {what}' for name, (_, what) in COLUMNS.items()) + '.'

class Stopped(Exception):
    """A signal asked for the end, and the state is saved."""

class Run:
    """args: of a training script; out, resume, save_minutes, dry_run, epochs, batch_size and accumulate are read.
    Raises Refused if another run is at work in the folder, or has been and is not to be continued."""
    def __init__(self, args):
        self.args, self.folder, self.rank = args, args.out, torch.distributed.get_rank() if ddp.world_size() > 1 else 0
        self.stop_asked = False
        self.rows, self.seconds_before, self.begun = [], 0.0, time.perf_counter()
        self.saved_at = self.row_at = self.begun
        self.at = 'before the first epoch'
        if self.rank == 0 and not args.dry_run:
            self._open()

    def _open(self):
        try:
            os.makedirs(self.folder, exist_ok=True)
            self.lock = open(f'{self.folder}/.lock', 'w')           # held until the process ends, however
            if fcntl:
                try:
                    fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    raise Refused(f'another run is at work in {self.folder}: choose another --out') from None
            for left_over in glob.glob(f'{glob.escape(self.folder)}/.*.tmp'):       # of a killed save
                os.remove(left_over)
            if not self.args.resume:
                if os.path.exists(f'{self.folder}/state.pt'):
                    raise Refused(f'{self.folder} holds an unfinished run: continue it with --resume, '
                                  'choose another --out, or delete it')
                if os.path.exists(f'{self.folder}/last.pt'):
                    raise Refused(f'{self.folder} holds a trained model already: choose another --out, or delete it')
            with atomic(f'{self.folder}/.writable') as tmp, open(tmp, 'w') as f:
                f.write('')
            os.remove(f'{self.folder}/.writable')
        except OSError as e:
            raise Refused(f'cannot write {self.folder}: {e.strerror}') from e

    def begin(self, config, state):
        """config: the flags, the data's and teachers' fingerprints, versions: the first line of the log. state(): the
        dict that save_state is given; what the folder holds is loaded into its modules and optimisers, and the rest
        is returned, or None. Raises Refused if the folder holds a run of another config; ends the script if it holds
        this one, finished."""
        self.config = config
        if self.args.dry_run:
            return None
        path = f'{self.folder}/state.pt'
        here = os.path.exists(path)
        somewhere, finished = ddp.any_rank(here, self.rank == 0 and not here and self._is_finished())
        if finished:
            say(f'{self.folder} is finished: nothing to resume')
            sys.exit()
        saved = None
        if somewhere:
            if not here:
                raise Refused(f'--resume: {path} is not on this machine: --out has to be on a disk that all see')
            saved = self._load(checkpoint.read(path), state())
        if self.rank == 0:
            with atomic(f'{self.folder}/log.jsonl') as tmp, open(tmp, 'w') as f:
                f.writelines(json.dumps(row) + '\n' for row in [config, *self.rows])
        return saved

    def _compare(self, old, what):
        for k in sorted((old.keys() | self.config.keys()) - NOT_THE_RUN):
            if old.get(k) != self.config.get(k):
                raise Refused(f'--resume: {self.folder} {what} {k.replace("_", "-")} {old.get(k)}, '
                              f'not {self.config.get(k)}: choose another --out')

    def _is_finished(self):
        """Is the run in the folder this one, and over?"""
        if not os.path.exists(f'{self.folder}/last.pt'):
            return False
        known = checkpoint.read(f'{self.folder}/last.pt')
        old = known.get('run', {}) if isinstance(known, dict) else {}
        if not old or known['epoch'] < old['epochs']:
            return False                            # stopped before its first state: begins again
        self._compare(old, 'holds a finished run with')
        return True

    def _load(self, saved, state):
        try:
            self._compare(saved['config'], 'was started with')
            if len(saved['ranks']) != ddp.world_size():
                raise Refused(f'--resume: {self.folder} was started with {len(saved["ranks"])} processes, '
                              f'not {ddp.world_size()}')
            mine = saved['ranks'][self.rank]
            for k, thing in state.items():
                if hasattr(thing, 'load_state_dict'):
                    thing.load_state_dict(saved['shared'][k])
            for k, buffers in mine['buffers'].items():
                for buffer, value in zip(state[k].buffers(), buffers):
                    buffer.copy_(value)
            if saved['config']['device'] != self.config['device']:
                say(f'note: started on {saved["config"]["device"]}, continued on {self.config["device"]}: '
                    'not bit for bit what it would have been')
        except (KeyError, TypeError, IndexError) as e:
            raise Refused(f'{self.folder}/state.pt is no state of this script: delete it and start again') from e
        torch.set_rng_state(mine['noise'])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(mine['cuda_noise'])
        self.rows, self.seconds_before = saved['rows'], saved['seconds']
        return mine['values']

    def save_state(self, state):
        """Everything the next step depends on, to state.pt. state(): a dict of modules, optimisers, None, and values;
        called in every process, each of which has noise, BN statistics and values of its own."""
        state = state()
        modules = {k: v for k, v in state.items() if isinstance(v, torch.nn.Module)}
        shared = {k: v.state_dict() for k, v in state.items() if hasattr(v, 'state_dict')}
        values = {k: v.cpu() if isinstance(v, torch.Tensor) else v
                  for k, v in state.items() if k not in shared and v is not None}
        sound = all(bool(p.isfinite().all()) for module in modules.values() for p in module.parameters())
        sound = sound and all(math.isfinite(v) for v in values['step_losses'])
        broken, = ddp.any_rank(not sound)
        if broken:                              # the state before this one is still good
            raise FloatingPointError(f'non-finite loss or weights {self.at}')
        mine = dict(values=values, noise=torch.get_rng_state(),
                    cuda_noise=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
                    # without --sync-bn each process has BN statistics of its own until the end of the epoch
                    buffers={k: [b.cpu() for b in module.buffers()] for k, module in modules.items()})
        ranks = ddp.gather(mine)
        if self.rank == 0:
            save(f'{self.folder}/state.pt', dict(config=self.config, shared=shared, ranks=ranks, rows=self.rows,
                                                 seconds=self.seconds()))
        self.saved_at = time.perf_counter()

    def save_if_due(self, state):
        """After every step: a state every --save-minutes, and when the run is asked to stop, which then raises
        Stopped."""
        due = time.perf_counter() - self.saved_at > 60 * self.args.save_minutes
        stopping, due = ddp.any_rank(self.stop_asked, due)
        if stopping or due:
            self.save_state(state)
        if stopping:
            raise Stopped

    def seconds(self):
        """Wall time of the run so far, over all its pieces; validation and compilation included."""
        return self.seconds_before + time.perf_counter() - self.begun

    # --- the log and the screen

    def row(self, **values):
        """A row of the table, on the screen and in log.jsonl."""
        now = time.perf_counter()
        values['min_left'] = (now - self.row_at) * (self.args.epochs - values['epoch']) / 60
        self.row_at = now
        if not self.rows or self.header:
            say(' '.join(k.rjust(9) for k in values))
        self.header = False
        say(' '.join(format(v, COLUMNS[k][0]).rjust(9) for k, v in values.items()))
        self.rows.append(values)
        if self.rank == 0:
            with open(f'{self.folder}/log.jsonl', 'a') as f:
                f.write(json.dumps(values) + '\n')

    header = True

    def progress(self, things, what, total=None, initial=0):
        """things, one by one, with a bar on a terminal; without one, a line at least every 30 seconds."""
        self.at = f'in {what}'
        bar = tqdm(things, desc=what, total=total, initial=initial, leave=False,
                   disable=True if self.rank else None)
        told = time.perf_counter()
        for k, thing in enumerate(bar, initial):
            self.at = f'in {what}, after {k} of {total}'
            if bar.disable and time.perf_counter() - told > 30:
                told = time.perf_counter()
                say(f'{what}: {k} of {total}')
            yield thing

    def estimate(self, update, batches, validate, steps, validations):
        """--dry-run: times a few steps and validate(), says how long all of it takes, and ends the script. steps,
        validations: how many there are in the whole training."""
        x, y = next(batches)
        update(x, y)                                # compilation, and what is done once
        t0 = time.perf_counter()
        for _ in range(3):
            update(x, y).item()
        step = (time.perf_counter() - t0) / 3
        t0 = time.perf_counter()
        validate()
        minutes = (steps * step + validations * (time.perf_counter() - t0)) / 60
        say(f'{steps} steps of {step:.2f} s, and validation: about {minutes:.0f} minutes ({minutes / 60:.1f} hours). '
            'Nothing was written')
        sys.exit()

    # --- the models

    def save_model(self, name, net, **meta):
        if self.rank == 0:
            checkpoint.save_checkpoint(f'{self.folder}/{name}', net, run=self.config, **meta)

    def finish(self):
        """The curves; a finished run needs no state."""
        if self.rank == 0:
            draw_curves(self.rows, f'{self.folder}/training.png')
            with contextlib.suppress(FileNotFoundError):
                os.remove(f'{self.folder}/state.pt')
        command = shlex.join(['python', 'evaluate.py', f'{self.folder}/best.pt'])
        say(f'done in {self.seconds() / 60:.1f} min. Next: {command}')

    # --- what ends it early

    def _signal(self, number, frame):
        if self.stop_asked and number == signal.SIGINT:             # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.stop_asked = True

    @contextlib.contextmanager
    def guarded(self):
        """The training loop, with signals to stop it and one line for what ends it early."""
        self.begun = self.saved_at = self.row_at = time.perf_counter()
        before = {}
        if threading.current_thread() is threading.main_thread():   # elsewhere Python takes no handlers
            for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGHUP', None),
                           getattr(signal, 'SIGUSR1', None)):
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:      # nohup stays nohup
                    before[number] = signal.signal(number, self._signal)
        intact = f'{self.folder} holds what was saved before, and --resume continues'
        try:
            yield
        except Stopped:
            if self.rank == 0:
                sys.exit(f'\nstopped {self.at}. Continue with: {self._command()}')
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(f'\nstopped {self.at}; {intact}')
        except FloatingPointError as e:
            sys.exit(f'{e}. Stopped; {intact}. Try a lower --lr, or --amp off')
        except OSError as e:
            unwritten = e.strerror and e.errno not in (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)
            what = f'cannot write {self.folder}: {e.strerror}' if unwritten else str(e)
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                what = f'the disk is full: {what}'
            sys.exit(f'{what}. Stopped {self.at}; {intact}')
        except RuntimeError as e:
            if 'DataLoader worker' in str(e):
                sys.exit(f'{e}. A process that decodes images has died: too little memory, or shared memory '
                         f'(/dev/shm; docker run --shm-size)? Stopped {self.at}; {intact}')
            if 'out of memory' not in str(e).lower() and "can't allocate memory" not in str(e):
                raise
            sys.exit(f'out of memory with --batch-size {self.args.batch_size}: try {self.args.batch_size // 2}, '
                     f'or --accumulate {2 * self.args.accumulate}')
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _command(self):
        launcher = 'python'
        if ddp.world_size() > 1:
            launcher = f'torchrun --nproc-per-node {os.environ["LOCAL_WORLD_SIZE"]}'
        argv = sys.argv if self.args.resume else [*sys.argv, '--resume']
        return f'{launcher} {shlex.join(argv)}'

def check_finite(losses, val_loss, epoch):
    """losses: of the steps of the epoch (n,). Raises FloatingPointError that names the first bad one."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad) or not math.isfinite(val_loss):     # a last update that broke the weights shows in val_loss only
        batch = int(bad[0]) + 1 if len(bad) else len(losses)
        raise FloatingPointError(f'non-finite loss in epoch {epoch}, batch {batch}')

def draw_curves(rows, path):
    """Accuracy on the hold-out and the loss against the epoch, as PNG, distinguishable in grey."""
    from matplotlib.figure import Figure            # no pyplot: no window, no backend, no global state
    figure = Figure(figsize=(8, 3.5), layout='constrained')
    accuracy, loss = figure.subplots(1, 2)
    epochs = [row['epoch'] for row in rows]
    for column, style in (('val_clean', 'o-'), ('val_pgd20', 's--')):
        if column in rows[0]:
            accuracy.plot(epochs, [row[column] for row in rows], style, color='black', markersize=3, label=column)
    accuracy.set(xlabel='epoch', ylabel='accuracy on the hold-out, %', ylim=(0, 100))
    accuracy.legend()
    loss.plot(epochs, [row['loss'] for row in rows], '^:', color='black', markersize=3)
    loss.set(xlabel='epoch', ylabel='training loss')
    with atomic(path) as tmp:
        figure.savefig(tmp, format='png', dpi=150)

# -----------------------------------------------------------------------------
# the standard teacher of a student that was given none

def is_locked(folder):
    """Is a run at work in it?"""
    if not fcntl or not os.path.exists(f'{folder}/.lock'):
        return False
    with open(f'{folder}/.lock', 'r+') as f:
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
    return False

def standard_teacher(args):
    """Path of this dataset's and model's standard teacher, trained now if need be (Al-Najjar et al., section 3: "it is
    feasible to train our own teacher model"). Where another run is training it, waits. Raises Refused where several
    processes would train it."""
    flags = [f'--{flag.replace("_", "-")}={getattr(args, flag)}' for flag in ('dataset', 'data_dir', 'model', 'amp')]
    for flag in ('width', 'subset', 'subset_seed', 'augment'):
        if getattr(args, flag) is not None:
            flags.append(f'--{flag.replace("_", "-")}={getattr(args, flag)}')
    if args.normalize:
        flags.append('--normalize')
    folder = teacher_folder(args, {}.get, only=('normalize', 'subset_seed', 'augment'))
    path, waiting = f'{folder}/best.pt', False
    while True:
        if is_locked(folder):
            if not waiting:
                say(f'no teacher given: waiting for the one that another run trains in {folder}')
            waiting = True
            time.sleep(2)
            continue
        last = checkpoint.read(f'{folder}/last.pt') if os.path.exists(f'{folder}/last.pt') else None
        if last and last['epoch'] == last['run']['epochs']:
            say(f'no teacher given: taking {path}, trained earlier')
            return path
        if ddp.world_size() > 1:
            raise Refused(f'no teacher given, and none in {folder}: train it first, with train_teacher.py')
        say(f'no teacher given, and none in {folder} that is finished: training it first')
        command = [sys.executable, os.path.join(ROOT, 'train_teacher.py'), *flags, f'--out={folder}', '--resume']
        status = subprocess.run(command).returncode
        if status and not is_locked(folder):        # another run may have been quicker
            sys.exit(f'no teacher, no student: train_teacher.py ended with status {status}')
