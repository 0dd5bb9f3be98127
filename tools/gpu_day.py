"""
Half an hour on a GPU, as one command: test the CUDA paths, measure the speed, train and evaluate the paper's
rows.

$ python -m tools.gpu_day --minutes 25 --out runs/gpu_day          # CIFAR-10 is data/cifar10.npz: no internet
$ python -m tools.gpu_day --minutes 25 --out runs/gpu_day --now 9  # nine of them now; the same line continues
$ python -m tools.gpu_day --rehearse --out /tmp/rehearsal          # on a CPU, tiny, in under 3 minutes
$ python -m tools.gpu_day --join runs/gpu_day/back/logit_mse       # the weights that came back, as one file

The steps are data, STEPS. Each gets its share of the time that is left; what one leaves over goes to the
next. A training is planned before it starts: a short one has shown how long an epoch takes, and as many of
100 are asked for as fit, so that the schedule is annealed to its end. What is stopped is continued; what
fails is reported, the steps that need it are left out, and the next time they are tried again. DIR/back is
what to bring home: logs, JSON, figures, weights in half precision in pieces of at most 15 MB.
"""
import argparse
import glob
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import torch

from support import checkpoint, files, refusals
from support.files import Refused, atomic, say

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PIECE = 15_000_000                  # bytes

# -----------------------------------------------------------------------------
# what is done, in this order

class Step(NamedTuple):
    name: str
    command: str                    # of python; {...} is a setting, the folder, or planned
    product: str                    # the file in DIR that it makes, beside NAME.log
    share: float                    # of the time that is left, beside the shares of all that are left
    needs: tuple = ()               # steps that have to be done before
    rates: tuple = ()               # of a training: the steps whose logs say how long an epoch takes
    statuses: tuple = (0,)          # with which it is done: of tests that fail the log is the result
    env: dict = {}

REAL = dict(net='--dataset cifar10 --data-dir {data}', attack='', tests='', tricks='--tricks',
            bench='--seconds 4', small=128, large=512, whole='--n 10000 --batch-size 1000',
            part='--n 1000 --batch-size 500', most=100)
REHEARSAL = dict(net='--dataset synthetic --model wrn-10-1 --width 8 --subset 64 --batch-size 16 --amp off',
                 attack='--steps 2', tests='-k "logits or folded"',
                 bench='--model wrn-10-1 --width 8 --steps 2 --seconds 0.05', small=16,
                 whole='--n 16', part='--n 8', most=2)

BENCH = '-m tools.bench --loss logit_mse {bench}'
TEACHER = 'train_teacher.py {net} --save-minutes 1 --compile'
LOGIT_MSE = ('train_adv.py {net} {attack} --save-minutes 1 --loss logit_mse --beta 0.2 '
             '--teacher {dir}/runs/teacher/best.pt')
TRADES = 'train_adv.py {net} {attack} --save-minutes 1 --loss trades --beta 5'
GRAPHS = dict(TORCHINDUCTOR_CUDAGRAPHS='1')
WAYS = 'rate-eager', 'rate-compile', 'rate-graphs'      # to take the same step: the fastest is taken

STEPS = [
    Step('versions', '-m torch.utils.collect_env', 'versions.log', 0.5),
    Step('tests', '-m pytest -q -p no:cacheprovider tests/test_cuda.py {tests}', 'tests.log', 5,
         statuses=(0, 1)),
    Step('bench-small', f'{BENCH} --batch-size {{small}} --profile --json {{dir}}/bench-small.json',
         'bench-small.json', 1),
    Step('bench-large', f'{BENCH} --batch-size {{large}} --profile --json {{dir}}/bench-large.json',
         'bench-large.json', 1),
    Step('tricks', f'{BENCH} --batch-size {{small}} {{tricks}} --json {{dir}}/tricks.json', 'tricks.json', 3),
    Step('rate-teacher', f'{TEACHER} --epochs 3 --out {{dir}}/runs/rate-teacher',
         'runs/rate-teacher/last.pt', 0.7),
    Step('teacher', f'{TEACHER} --epochs {{epochs}} --out {{dir}}/runs/teacher --resume',
         'runs/teacher/last.pt', 2, rates=('rate-teacher',)),
    Step('rate-eager', f'{LOGIT_MSE} --epochs 3 --out {{dir}}/runs/rate-eager',
         'runs/rate-eager/last.pt', 0.7, needs=('teacher',)),
    Step('rate-compile', f'{LOGIT_MSE} --epochs 3 --compile --out {{dir}}/runs/rate-compile',
         'runs/rate-compile/last.pt', 1, needs=('teacher',)),
    Step('rate-graphs', f'{LOGIT_MSE} --epochs 3 --compile --out {{dir}}/runs/rate-graphs',
         'runs/rate-graphs/last.pt', 1, needs=('teacher',), env=GRAPHS)]
for name, command, needs in ('logit_mse', LOGIT_MSE, ('teacher',)), ('trades', TRADES, ()):
    STEPS += [
        Step(name, f'{command} --epochs {{epochs}} {{fast}} --out {{dir}}/runs/{name} --resume',
             f'runs/{name}/last.pt', 7, needs, WAYS),
        Step(f'{name}-fast', f'evaluate.py {{dir}}/runs/{name}/best.pt {{whole}} --fast '
             f'--attacks clean pgd autoattack --out {{dir}}/{name}-fast.json',
             f'{name}-fast.json', 3, (name,)),
        Step(f'{name}-eager', f'evaluate.py {{dir}}/runs/{name}/best.pt {{part}} --no-audit '
             f'--attacks clean autoattack --out {{dir}}/{name}-eager.json',
             f'{name}-eager.json', 1.5, (name,))]
STEPS.append(Step('figures', '-m tools.figures {dir}/logit_mse-fast.json {dir}/trades-fast.json '
                  '--checkpoint none --out {dir}/back/figures',
                  'back/figures', 0.5, ('logit_mse-fast', 'trades-fast')))

# what a rehearsal leaves out: a CPU has no graphs, and of bench and of measured rates one will do
NOT_REHEARSED = 'bench-large', 'tricks', 'rate-teacher', 'rate-eager', 'rate-graphs'

def steps_of(args):
    return [step for step in STEPS if not (args.rehearse and step.name in NOT_REHEARSED)]

# -----------------------------------------------------------------------------
# the plan

def seconds_per_epoch(folder):
    """Of a run that has ended: its last epoch but one, from the log, validation and all; or None."""
    try:
        with open(f'{folder}/log.jsonl') as f:
            rows = [json.loads(line) for line in f.readlines()[1:]]
        row = rows[-2]
        return 60 * row['min_left'] / (rows[-1]['epoch'] - row['epoch'])
    except (OSError, LookupError):
        return None

def planned(step, folder, done, minutes, most):
    """What {epochs} (at most so many) and {fast} stand for in its command, and what is set in its
    environment: decided once, by the rates of those that ended well."""
    rates = {}
    for name in step.rates:
        seconds = seconds_per_epoch(f'{folder}/runs/{name}') if name in done else None
        if seconds:
            rates[name] = seconds
    if not rates:
        return dict(epochs=min(10, most), fast='', env={}, why='no rate was measured')
    name = min(rates, key=rates.get)
    epochs = int(0.85 * 60 * minutes / rates[name])             # the rest: start, compilation, noise
    return dict(epochs=max(2, min(most, epochs)), fast='' if name == 'rate-eager' else '--compile',
                env=GRAPHS if name == 'rate-graphs' else {},
                why=f'{rates[name]:.2f} s an epoch ({name}), {minutes:.1f} minutes')

# -----------------------------------------------------------------------------
# a step

def last_line(path):
    with open(path, errors='replace') as f:
        lines = f.read().replace('\r', '\n').split('\n')
    return next((line.strip() for line in reversed(lines) if line.strip()), '')[:100]

def run(step, command, env, log, seconds):
    """-> its exit status, or None if it was stopped after so many seconds. What it prints goes to the log,
    and the last line of that to the screen every 30 seconds."""
    with open(log, 'a') as f:
        f.write(f'$ python {command}\n')
        f.flush()
        child = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=ROOT, start_new_session=True,
                                 stdout=f, stderr=subprocess.STDOUT, env=dict(os.environ, **env))
        begun = told = time.monotonic()
        try:
            while child.poll() is None and time.monotonic() - begun < seconds:
                time.sleep(0.1)
                if time.monotonic() - told > 30:
                    told = time.monotonic()
                    say(f'  {step.name}: {last_line(log)}')
        finally:
            stopped = child.poll() is None
            for number, patience in (signal.SIGTERM, 45), (signal.SIGKILL, 10):     # the first saves
                if child.poll() is None:
                    os.killpg(child.pid, number)
                    try:
                        child.wait(patience)
                    except subprocess.TimeoutExpired:
                        pass
    return None if stopped else child.returncode

# -----------------------------------------------------------------------------
# what comes back

def split(path, start):
    """The checkpoint's weights in half precision: start-1.pt, start-2.pt, ..., each at most PIECE bytes."""
    known = checkpoint.read(path)
    weights, pieces, room = known.pop('state_dict'), [{}], PIECE - 200_000
    for name, value in weights.items():
        value = value.half() if value.is_floating_point() else value
        size = value.numel() * value.element_size()
        if size > room:
            pieces.append({})
            room = PIECE - 200_000
        room -= size
        pieces[-1][name] = value
    for k, piece in enumerate(pieces, 1):
        meta = known if k == 1 else {}
        files.save(f'{start}-{k}.pt', dict(meta, state_dict=piece, piece=k, pieces=len(pieces)))

def join(start):
    """start-1.pt and so on -> start.pt, a checkpoint in fp32. Raises Refused."""
    first = checkpoint.read(f'{start}-1.pt')
    for k in range(2, first.pop('pieces') + 1):
        first['state_dict'].update(checkpoint.read(f'{start}-{k}.pt')['state_dict'])
    del first['piece']
    for name, value in first['state_dict'].items():
        if value.is_floating_point():
            first['state_dict'][name] = value.float()
    files.save(f'{start}.pt', first)

def bring_back(folder):
    """Everything small to folder/back; done after every step."""
    back = f'{folder}/back'
    os.makedirs(back, exist_ok=True)
    for path in [*glob.glob(f'{folder}/*.log'), *glob.glob(f'{folder}/*.json')]:
        shutil.copy(path, back)
    for path in [*glob.glob(f'{folder}/runs/*/log.jsonl'), *glob.glob(f'{folder}/runs/*/training.png')]:
        shutil.copy(path, f'{back}/{os.path.basename(os.path.dirname(path))}-{os.path.basename(path)}')
    for name in ('teacher', 'logit_mse', 'trades'):
        path, start = f'{folder}/runs/{name}/best.pt', f'{back}/{name}'
        if os.path.exists(path) and (not os.path.exists(f'{start}-1.pt')
                                     or os.path.getmtime(f'{start}-1.pt') < os.path.getmtime(path)):
            split(path, start)

# -----------------------------------------------------------------------------

def day(args):
    """-> is every step done?"""
    begun, folder = time.monotonic(), os.path.abspath(args.out)
    settings = REHEARSAL if args.rehearse else REAL
    settings = dict(settings, net=settings['net'].format(data=shlex.quote(os.path.abspath(args.data_dir))),
                    dir=shlex.quote(folder))
    always = dict(TORCHINDUCTOR_CACHE_DIR=f'{folder}/inductor')
    if args.rehearse:
        # for tests/test_cuda.py; and networks this small win nothing by threads that wait for each other
        always.update(REHEARSE='1', OMP_NUM_THREADS='1')
    os.makedirs(f'{folder}/runs', exist_ok=True)
    record = dict(seconds=0.0, done={}, failed={}, plans={})
    if os.path.exists(f'{folder}/day.json'):
        with open(f'{folder}/day.json') as f:
            record = json.load(f)
    before, record['failed'] = record['seconds'], {}
    steps = [step for step in steps_of(args) if step.name not in record['done']]

    def spent():
        return time.monotonic() - begun

    def write():
        record['seconds'] = before + spent()
        with atomic(f'{folder}/day.json') as tmp, open(tmp, 'w') as f:
            json.dump(record, f, indent=1)
        bring_back(folder)

    for k, step in enumerate(steps):
        missing = [name for name in step.needs if name not in record['done']]
        if missing:
            record['failed'][step.name] = f'needs {" ".join(missing)}'
            say(f'{step.name:<16} left out: needs {" ".join(missing)}')
            continue
        left = max(0.0, args.minutes - (before + spent()) / 60)
        minutes = left * step.share / sum(s.share for s in steps[k:])
        plan = dict(epochs='', fast='', env={})
        if step.rates:
            if step.name not in record['plans']:
                record['plans'][step.name] = planned(step, folder, record['done'], minutes, settings['most'])
            plan = record['plans'][step.name]
            say(f'{step.name:<16} {plan["epochs"]} epochs {plan["fast"]}: {plan["why"]}')
            minutes *= 1.3                          # it is better annealed than punctual
        write()
        limit = 60 * minutes
        if args.now is not None:
            limit = min(limit, 60 * args.now - spent())
        if limit < 5:
            say(f'{step.name:<16} no time is left: the same command continues')
            return False
        if step.name.startswith('rate-'):           # measured in one piece
            shutil.rmtree(f'{folder}/runs/{step.name}', ignore_errors=True)

        t0, log = spent(), f'{folder}/{step.name}.log'
        command = step.command.format(**settings, epochs=plan['epochs'], fast=plan['fast'])
        status = run(step, command, {**always, **step.env, **plan['env']}, log, limit)
        seconds = spent() - t0
        if status in step.statuses and os.path.exists(f'{folder}/{step.product}'):
            record['done'][step.name] = dict(seconds=seconds, status=status)
            say(f'{step.name:<16} {seconds:6.0f} s  {last_line(log)}')
        else:
            # a compilation that is killed may leave half a file there
            shutil.rmtree(always['TORCHINDUCTOR_CACHE_DIR'], ignore_errors=True)
            why = f'stopped after {limit:.0f} s' if status is None else f'ended with status {status}'
            record['failed'][step.name] = why
            say(f'{step.name:<16} {seconds:6.0f} s  {why}: {last_line(log)}')
        write()
    return not record['failed']

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    refusals.one_line(parser)
    files.plain_output()
    arg = parser.add_argument
    arg('--minutes', type=float, default=25, help='for the whole, over all calls')
    arg('--now', type=float, metavar='MINUTES', help='of them in this call')
    arg('--out', metavar='DIR', default='runs/gpu_day')
    arg('--data-dir', default='data', metavar='DIR')
    arg('--rehearse', action='store_true', help='on a CPU, with tiny settings')
    arg('--join', metavar='START', help='START-1.pt, START-2.pt, ... to START.pt, and nothing else')
    args = parser.parse_args()
    if args.join:
        join(args.join)
        sys.exit()
    if args.rehearse:
        args.minutes = 600                          # nobody knows the machine
    else:
        if not torch.cuda.is_available():
            raise Refused('there is no GPU: --rehearse does all of it on a CPU, with tiny settings')
        if not os.path.exists(f'{args.data_dir}/cifar10.npz'):
            raise Refused(f'{args.data_dir}/cifar10.npz is not there: --data-dir')
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C: the step at work is stopped, too
    try:
        sys.exit(0 if day(args) else 1)
    except KeyboardInterrupt:
        sys.exit('\nstopped; the same command continues')
