"""
What keeps a training alive, and what it leaves behind: a folder with a lock, a log, a state to resume from;
signals, full disks and closed terminals.

    run = Run(args)                                 # locks args.out
    with run.guarded():
        saved = run.begin(config, state)            # the same run as in the folder, or it is refused
        for x, y in run.progress(batches, 'epoch 1', total):
            ...
            run.save_if_due(state)
        run.save_state(state)                       # before a validation that may take long
        run.row(epoch=1, lr=0.1, ...)
        run.save_model('last.pt', net, epoch=1, ...)
        run.finish()
"""
import atexit
import contextlib
import errno
import glob
import json
import math
import os
import shlex
import signal
import sys
import threading
import time

import torch
from tqdm import tqdm

from support import checkpoint, ddp, describe, files
from support.files import Refused, atomic, save, say

# -----------------------------------------------------------------------------
# a run and its folder

class Stopped(Exception):
    """A signal asked for the end, and the state is saved."""

def comparable(config):
    """Of a configuration, what makes the run. A teacher is its weights, wherever the file lies."""
    beside = describe.NOT_THE_RUN | {'teacher', 'standard_teacher', 'teachers'}
    kept = {k: v for k, v in config.items() if k not in beside}
    for role, about in config.get('teachers', {}).items():
        kept[role], kept[f'{role}_code'] = about['fingerprint'], about.get('code')
    return kept

class Run:
    """args: of a training script; out, resume, save_minutes, dry_run, epochs, batch_size and accumulate are
    read. Raises Refused if another run is at work in the folder, or has been and is not to be continued."""
    def __init__(self, args):
        self.args, self.folder, self.rank = args, args.out, ddp.rank()
        self.stop_asked, self.stop_told, self.header, self.timed_share = False, False, True, 1.0
        self.rows, self.seconds_before, self.begun = [], 0.0, time.perf_counter()
        self.saved_at = self.row_at = self.begun
        self.at = self.at_next = 'before the first epoch'
        self._open()

    def _open(self):
        """Rank 0's work; what it refuses, all refuse."""
        refused = None
        if self.rank == 0 and not self.args.dry_run:
            try:
                self._take_folder()
            except Refused as e:
                refused = str(e)
        refused = ddp.gather(refused)[0]
        if refused:
            raise Refused(refused)

    def _take_folder(self):
        if not os.path.exists(self.folder):
            atexit.register(self._remove_if_empty)
        try:
            os.makedirs(self.folder, exist_ok=True)
            self.lock = open(f'{self.folder}/.lock', 'w')           # held until the process ends, however
            if not files.lock(self.lock):
                raise Refused(f'another run is at work in {self.folder}: choose another --out')
            for left_over in glob.glob(f'{glob.escape(self.folder)}/.*.tmp'):       # of a killed save
                os.remove(left_over)
            if not self.args.resume:
                if os.path.exists(f'{self.folder}/state.pt'):
                    raise Refused(f'{self.folder} holds an unfinished run: continue it with --resume, '
                                  'choose another --out, or delete it')
                if os.path.exists(f'{self.folder}/last.pt'):
                    raise Refused(f'{self.folder} holds a trained model already: choose another --out, '
                                  'or delete it')
            files.check_writable(f'{self.folder}/log.jsonl')
        except OSError as e:
            raise Refused(files.cannot_write(self.folder, e)) from e

    def _remove_if_empty(self):
        """A run that was refused after its folder was made leaves none."""
        with contextlib.suppress(OSError):
            if os.listdir(self.folder) == ['.lock']:
                os.remove(f'{self.folder}/.lock')
                os.rmdir(self.folder)

    def begin(self, config, state):
        """config: the flags, the data's and teachers' fingerprints, versions: the first line of the log.
        state(): the dict that save_state is given; what the folder holds is loaded into its modules and
        optimisers, and the rest is returned, or None. Raises Refused if the folder holds a run of another
        config; ends the script if it holds this one, finished."""
        self.config = config
        if self.args.dry_run:
            return None
        path = f'{self.folder}/state.pt'
        here = os.path.exists(path)
        somewhere, finished = ddp.any_rank(here, self.rank == 0 and not here and self._is_finished())
        if finished:
            say(f'{self.folder} is finished: nothing to resume')
            ddp.end()
            sys.exit()
        saved = None
        if somewhere:
            if not here:
                raise Refused(f'--resume: {path} is not on this machine: --out has to be where all see it')
            saved = self._load(checkpoint.read(path), state())
        if self.rank == 0:
            with atomic(f'{self.folder}/log.jsonl') as tmp, open(tmp, 'w') as f:
                f.writelines(json.dumps(row) + '\n' for row in [config, *self.rows])
        return saved

    def _compare(self, old, what):
        old, new = comparable(old), comparable(self.config)
        for k in sorted(old.keys() | new.keys()):
            if old.get(k) != new.get(k):
                raise Refused(f'--resume: {self.folder} {what} {k.replace("_", "-")} {old.get(k)}, '
                              f'not {new.get(k)}: choose another --out')

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
            raise Refused(f'{self.folder}/state.pt is no state of this script: delete it, start again') from e
        torch.set_rng_state(mine['noise'])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(mine['cuda_noise'])
        self.rows, self.seconds_before = saved['rows'], saved['seconds']
        say(f'continuing in epoch {mine["values"]["epoch"]}, after batch {mine["values"]["batch"]}')
        return mine['values']

    def save_state(self, state):
        """Everything the next step depends on, to state.pt. state(): a dict of modules, optimisers, None, and
        values; called in every process, each of which has noise, BN statistics and values of its own."""
        state = state()
        modules = {k: v for k, v in state.items() if isinstance(v, torch.nn.Module)}
        shared = {k: v.state_dict() for k, v in state.items() if hasattr(v, 'state_dict')}
        values = {k: v.cpu() if isinstance(v, torch.Tensor) else v
                  for k, v in state.items() if k not in shared and v is not None}
        if values['step_losses']:               # one wait for a GPU, not one per step
            values['step_losses'] = torch.stack(values['step_losses']).tolist()
        where = None
        if not all(p.isfinite().all() for module in modules.values() for p in module.parameters()):
            where = f'non-finite weights {self.at}'
        for step, loss in reversed(list(enumerate(values['step_losses'], 1))):
            if not math.isfinite(loss):
                where = f'non-finite loss in epoch {values["epoch"]}, step {step}'
        broken, = ddp.any_rank(where is not None)
        if broken:                              # the state before this one is still good
            raise FloatingPointError(where or 'non-finite loss or weights in another process')
        mine = dict(values=values, noise=torch.get_rng_state(),
                    cuda_noise=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
                    # without --sync-bn each process has BN statistics of its own until the end of the epoch
                    buffers={k: [b.cpu() for b in module.buffers()] for k, module in modules.items()})
        ranks = ddp.gather(mine)
        if self.rank == 0:
            whole = dict(config=self.config, shared=shared, ranks=ranks, rows=self.rows,
                         seconds=self.seconds())
            save(f'{self.folder}/state.pt', whole)
        self.saved_at = time.perf_counter()

    def save_if_due(self, state):
        """After every step: a state every --save-minutes, and when the run is asked to stop, which then
        raises Stopped."""
        self.at = self.at_next
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
        if self.header:
            say(' '.join(k.rjust(9) for k in values))
        self.header = False
        say(' '.join(format(v, describe.COLUMNS[k][0]).rjust(9) for k, v in values.items()))
        self.rows.append(values)
        if self.rank == 0:
            with open(f'{self.folder}/log.jsonl', 'a') as f:
                f.write(json.dumps(values) + '\n')

    def progress(self, things, what, total, initial=0):
        """things, one by one, with a bar on a terminal; without one, a line at least every 30 seconds."""
        self.at = f'in {what}'
        bar = tqdm(things, desc=what, total=total, initial=initial, leave=False,
                   disable=True if self.rank else None)
        told = time.perf_counter()
        for k, thing in enumerate(bar, initial):
            self.at, self.at_next = f'in {what}, after {k} of {total}', f'in {what}, after {k + 1} of {total}'
            if self.stop_asked and not self.stop_told:
                self.stop_told = True
                say('stopping as soon as all can be saved; a second Ctrl-C stops at once')
            if bar.disable and time.perf_counter() - told > 30:
                told = time.perf_counter()
                say(f'{what}: {k} of {total}')
            yield thing
            if self.args.dry_run:           # one of them is enough to be timed
                self.timed_share = 1 / total
                break
        self.at = f'after {what}'
        if torch.cuda.is_available():       # the clock is for what is computed, not for what is asked for
            torch.cuda.synchronize()

    def estimate(self, update, batches, validate, net, steps, validations):
        """--dry-run: times a few steps and a batch of validate(net), says how long all of it takes, and ends
        the script. steps, validations: how many there are in the whole training."""
        net.train()
        x, y = next(batches)
        update(x, y)                                # compilation, and what is done once
        t0 = time.perf_counter()
        for _ in range(3):
            update(x, y).item()
        step = (time.perf_counter() - t0) / 3
        t0 = time.perf_counter()
        validate(net)
        validation = (time.perf_counter() - t0) / self.timed_share
        minutes = (steps * step + validations * validation) / 60
        say(f'{steps} steps of {step:.2f} s, and validation: about {minutes:.0f} minutes '
            f'({minutes / 60:.1f} hours). Nothing was written')
        ddp.end()
        sys.exit()

    # --- the models

    def save_model(self, name, net, **meta):
        """net and what is known of it; of the configuration, what others ask for by name stands beside it."""
        if self.rank == 0:
            asked = ('loss', 'hparams', 'dataset', 'eps', 'norm')
            shown = {k: self.config[k] for k in asked if k in self.config}
            checkpoint.save_checkpoint(f'{self.folder}/{name}', net, run=self.config, **shown, **meta)

    def finish(self, best, last, rule):
        """The curves; a finished run needs no state. best, last: the scores of best.pt and last.pt by the
        rule, in percent."""
        if self.rank == 0:
            describe.draw_curves(self.rows, f'{self.folder}/training.png')
            with contextlib.suppress(FileNotFoundError):
                os.remove(f'{self.folder}/state.pt')
        say(f'best.pt {best:.2f} %, last.pt {last:.2f} %: {rule}')
        script = os.path.relpath(os.path.join(os.path.dirname(sys.argv[0]), 'evaluate.py'))
        command = ['python', script, f'{self.folder}/best.pt']
        if '.py:' in self.config['model']:          # code of one's own is run where it is asked for
            command += ['--model', self.config['model']]
        say(f'done in {self.seconds() / 60:.1f} min. Next: {shlex.join(command)}')
        ddp.end()

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
        # in another thread Python takes no handlers, and a dry run has nothing to save
        if threading.current_thread() is threading.main_thread() and not self.args.dry_run:
            for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGHUP', None),
                           getattr(signal, 'SIGUSR1', None)):
                if number is None or signal.getsignal(number) is signal.SIG_IGN:        # nohup ignores SIGHUP
                    continue
                before[number] = signal.signal(number, self._signal)
        try:
            yield
        except Stopped:
            if self.rank == 0:
                sys.exit(f'\nstopped {self.at}. Continue with: {self._command()}')
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(f'\nstopped {self.at}; {self._intact()}')
        except FloatingPointError as e:
            kept = ' best.pt is that of the best epoch before.' if self.rows else ''
            sys.exit(f'{e}. Stopped.{kept} Begin anew, with a lower --lr or --amp off, and another --out')
        except OSError as e:
            unwritten = e.strerror and e.errno not in (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)
            what = files.cannot_write(e.filename or self.folder, e) if unwritten else str(e)
            sys.exit(f'{what}. Stopped {self.at}; {self._intact()}')
        except RuntimeError as e:
            if 'DataLoader worker' in str(e):
                sys.exit(f'{e}. A process that decodes images has died: too little memory, or shared memory '
                         f'(/dev/shm; docker run --shm-size)? Stopped {self.at}; {self._intact()}')
            if 'file too short' in str(e):
                sys.exit(f"a compilation that was killed has left half a file in PyTorch's cache: delete "
                         f'{torch._inductor.runtime.cache_dir_utils.cache_dir()} and start again')
            if ddp.world_size() > 1 and ('gloo' in str(e) or 'NCCL' in str(e)):
                sys.exit(f'another process has ended or is out of reach. Stopped {self.at}; {self._intact()}')
            if not files.out_of_memory(e):
                raise
            size, parts = self.args.batch_size, self.args.accumulate
            sys.exit(f'out of memory with --batch-size {size}: try {size // 2}, or --accumulate {2 * parts}')
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _intact(self):
        if self.args.dry_run:
            return 'nothing was written'
        if not os.path.exists(f'{self.folder}/state.pt'):
            return 'nothing had been saved to continue from'
        return f'{self.folder} holds what was saved before, and --resume continues'

    def _command(self):
        launcher = 'python'
        if ddp.world_size() > 1:
            launcher = f'torchrun --nproc-per-node {os.environ["LOCAL_WORLD_SIZE"]}'
        argv = sys.argv if self.args.resume else [*sys.argv, '--resume']
        return f'{launcher} {shlex.join(argv)}'

def check_finite(val_loss, epoch):
    """Raises FloatingPointError: weights that are finite may come with BN statistics that are not."""
    if not math.isfinite(val_loss):
        raise FloatingPointError(f'non-finite loss on the held-out images after epoch {epoch}')
