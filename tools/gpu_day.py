"""
Half an hour on a GPU, as one command: test the CUDA paths, measure the speed, train and evaluate the paper's rows.

$ python -m tools.gpu_day --minutes 25 --out runs/gpu_day            # with CIFAR-10 as data/cifar10.npz: no internet
$ python -m tools.gpu_day --minutes 25 --out runs/gpu_day --now 9    # nine of them now; the same line continues
$ python -m tools.gpu_day --rehearse --out /tmp/rehearsal            # all of it on a CPU, tiny, in under 3 minutes
$ python -m tools.gpu_day --join runs/gpu_day/back/logit_mse         # the weights that came back, as one checkpoint

The steps are data: see steps_of. Each gets its share of the time that is left, and what one leaves over goes to the
next. A training is planned before it starts: a short one has shown how long an epoch takes, and as many of 100 are asked
for as fit, so that the schedule is annealed to its end. Whatever is stopped is continued, and whatever fails is
reported, the steps that need it are left out, and the next time they are tried again. DIR/back is what to bring home:
logs, JSON, figures, weights in half precision in pieces of at most 15 MB.
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
EPOCHS = 100                        # the paper's
WAYS = 'rate-eager', 'rate-compile', 'rate-graphs'          # to take the same step

class Step(NamedTuple):
    name: str
    command: str                    # of python; {epochs} and {fast} are planned
    minutes: float                  # its share of the time is as this number to the sum of those of all that are left
    product: str                    # the file in DIR that it makes, beside NAME.log
    needs: tuple = ()               # steps that have to be done before
    rate: str = ''                  # the step whose log says how long an epoch takes, if this is a training
    statuses: tuple = (0,)          # with which it counts as done: of tests that fail the log is the result
    env: dict = {}

def steps_of(args):
    """In their order. The minutes are for an H100, together about 25."""
    if args.rehearse:
        bench = '--model wrn-10-1 --width 8 --steps 2 --seconds 0.05'
        net = '--dataset synthetic --model wrn-10-1 --width 8 --subset 64 --batch-size 16 --amp off'
        attack, some, few, tests = '--steps 2', '--n 16', '--n 8', '-k "logits or folded"'
        batches, tricks = (4, 8), '--add fused'
    else:
        bench = '--seconds 4'
        net, attack, tests = f'--dataset cifar10 --data-dir {shlex.quote(os.path.abspath(args.data_dir))}', '', ''
        some, few, batches, tricks = '--n 10000', '--n 1000', (128, 512), '--tricks'
    out = '--out {dir}/runs'
    teacher = f'train_teacher.py {net} --save-minutes 1'
    student = f'train_adv.py {net} {attack} --teacher {{dir}}/runs/teacher/best.pt --save-minutes 1'
    logit_mse = f'{student} --loss logit_mse --beta 0.2'
    trades = f'train_adv.py {net} {attack} --save-minutes 1 --loss trades --beta 5'
    graphs = dict(TORCHINDUCTOR_CUDAGRAPHS='1')

    def evaluations(name):
        best = f'{{dir}}/runs/{name}/best.pt'
        return [
            Step(f'{name}-fast', f'evaluate.py {best} {some} --fast --attacks clean pgd autoattack --out {{dir}}/{name}-fast.json',
                 3, f'{name}-fast.json', (name,)),
            Step(f'{name}-eager', f'evaluate.py {best} {few} --attacks clean autoattack --no-audit '
                 f'--out {{dir}}/{name}-eager.json', 1.5, f'{name}-eager.json', (name,))]

    found = [
        Step('versions', '-m torch.utils.collect_env', 0.5, 'versions.log'),
        Step('tests', f'-m pytest -q -p no:cacheprovider tests/test_cuda.py {tests}', 5, 'tests.log', statuses=(0, 1),
             env=dict(REHEARSE='1') if args.rehearse else {}),
        *[Step(f'bench-{batch}', f'-m tools.bench --loss logit_mse {bench} --profile --batch-size {batch} '
               f'--json {{dir}}/bench-{batch}.json', 1, f'bench-{batch}.json') for batch in batches],
        Step('tricks', f'-m tools.bench --loss logit_mse {bench} {tricks} --batch-size {batches[0]} --json {{dir}}/tricks.json',
             3, 'tricks.json'),
        Step('rate-teacher', f'{teacher} --epochs 3 --compile {out}/rate-teacher', 0.7, 'runs/rate-teacher/last.pt'),
        Step('teacher', f'{teacher} --epochs {{epochs}} --compile {out}/teacher --resume', 2, 'runs/teacher/last.pt',
             rate='rate-teacher'),
        # the same three epochs eager, compiled, and with CUDA graphs: the fastest is what the trainings take
        Step('rate-eager', f'{logit_mse} --epochs 3 {out}/rate-eager', 0.7, 'runs/rate-eager/last.pt', ('teacher',)),
        Step('rate-compile', f'{logit_mse} --epochs 3 --compile {out}/rate-compile', 1, 'runs/rate-compile/last.pt',
             ('teacher',)),
        Step('rate-graphs', f'{logit_mse} --epochs 3 --compile {out}/rate-graphs', 1, 'runs/rate-graphs/last.pt',
             ('teacher',), env=graphs),
        Step('logit_mse', f'{logit_mse} --epochs {{epochs}} {{fast}} {out}/logit_mse --resume', 7, 'runs/logit_mse/last.pt',
             ('teacher',), rate='rate'),
        *evaluations('logit_mse'),
        Step('trades', f'{trades} --epochs {{epochs}} {{fast}} {out}/trades --resume', 6, 'runs/trades/last.pt', rate='rate'),
        *evaluations('trades'),
        Step('figures', '-m tools.figures {dir}/logit_mse-fast.json {dir}/trades-fast.json --checkpoint none '
             '--out {dir}/back/figures', 0.5, 'back/figures', ('logit_mse-fast', 'trades-fast'))]
    if args.rehearse:                   # on a CPU there are no graphs, and one measured rate will do
        found = [step for step in found if step.name not in ('rate-graphs', 'rate-eager')]
    return found

# -----------------------------------------------------------------------------
# the plan

def seconds_per_epoch(folder):
    """Of a run that has ended: its last epoch but one, from the log, validation and all. None if there is none."""
    try:
        with open(f'{folder}/log.jsonl') as f:
            rows = [json.loads(line) for line in f.readlines()[1:]]
        row = rows[-2]
        return 60 * row['min_left'] / (rows[-1]['epoch'] - row['epoch'])
    except (OSError, LookupError):
        return None

def planned(step, folder, done, minutes, most):
    """What {epochs}, at most so many, and {fast} stand for in its command, and what is set in its environment: decided
    once, by the rates of those that ended well."""
    names = WAYS if step.rate == 'rate' else [step.rate]
    rates = {name: seconds_per_epoch(f'{folder}/runs/{name}') for name in names if name in done}
    rates = {name: seconds for name, seconds in rates.items() if seconds}
    if not rates:
        return dict(epochs=min(10, most), fast='', env={}, why='no rate was measured')
    name = min(rates, key=rates.get)
    seconds = rates[name]
    epochs = max(2, min(most, int(0.85 * 60 * minutes / seconds)))          # the rest: start, compilation, noise
    return dict(epochs=epochs, fast='' if name == 'rate-eager' else '--compile',
                env=dict(TORCHINDUCTOR_CUDAGRAPHS='1') if name == 'rate-graphs' else {},
                why=f'{seconds:.2f} s an epoch ({name}), {minutes:.1f} minutes')

# -----------------------------------------------------------------------------
# a step

def last_line(path):
    with open(path, errors='replace') as f:
        lines = f.read().replace('\r', '\n').split('\n')
    return next((line.strip() for line in reversed(lines) if line.strip()), '')[:100]

def run(step, command, env, log, seconds):
    """-> its exit status, or None if it was stopped after so many seconds. What it prints goes to the log, and its
    last line to the screen every 30 seconds."""
    with open(log, 'a') as f:
        f.write(f'$ python {command}\n')
        f.flush()
        child = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=ROOT, stdout=f, stderr=subprocess.STDOUT,
                                 env=dict(os.environ, **env), start_new_session=True)
        begun = told = time.monotonic()
        try:
            while child.poll() is None and time.monotonic() - begun < seconds:
                time.sleep(0.1)
                if time.monotonic() - told > 30:
                    told = time.monotonic()
                    say(f'  {step.name}: {last_line(log)}')
        finally:
            stopped = child.poll() is None
            for number, patience in (signal.SIGINT, 45), (signal.SIGKILL, 10):      # the first saves
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
        files.save(f'{start}-{k}.pt', dict(known if k == 1 else {}, state_dict=piece, piece=k, pieces=len(pieces)))

def join(start):
    """start-1.pt and so on -> start.pt, a checkpoint in fp32. Raises Refused."""
    first = checkpoint.read(f'{start}-1.pt')
    for k in range(2, first.pop('pieces') + 1):
        first['state_dict'].update(checkpoint.read(f'{start}-{k}.pt')['state_dict'])
    del first['piece']
    first['state_dict'] = {k: v.float() if v.is_floating_point() else v for k, v in first['state_dict'].items()}
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
    os.makedirs(f'{folder}/runs', exist_ok=True)
    record = dict(seconds=0.0, done={}, failed={}, plans={})
    if os.path.exists(f'{folder}/day.json'):
        with open(f'{folder}/day.json') as f:
            record = json.load(f)
    before, record['failed'] = record['seconds'], {}
    steps, cache = steps_of(args), f'{folder}/inductor'
    now = args.now if args.now is not None else args.minutes

    def write():
        record['seconds'] = before + time.monotonic() - begun
        with atomic(f'{folder}/day.json') as tmp, open(tmp, 'w') as f:
            json.dump(record, f, indent=1)
        bring_back(folder)

    for k, step in enumerate(steps):
        if step.name in record['done']:
            continue
        missing = [name for name in step.needs if name not in record['done']]
        if missing:
            record['failed'][step.name] = f'needs {" ".join(missing)}'
            say(f'{step.name:<16} left out: needs {" ".join(missing)}')
            continue
        rest = [s for s in steps[k:] if s.name not in record['done']]
        left = args.minutes - (before + time.monotonic() - begun) / 60
        minutes = max(0.0, left) * step.minutes / sum(s.minutes for s in rest)
        if step.rate:
            plan = record['plans'].setdefault(step.name, planned(step, folder, record['done'], minutes,
                                                                2 if args.rehearse else EPOCHS))
            say(f'{step.name:<16} {plan["epochs"]} epochs {plan["fast"]}: {plan["why"]}')
            minutes *= 1.3                          # it is better annealed than punctual
        else:
            plan = dict(epochs='', fast='', env={})
        write()
        limit = min(60 * minutes, 60 * now - (time.monotonic() - begun))
        if limit < 5:
            say(f'{step.name:<16} no time is left: the same command continues')
            return False
        if step.name.startswith('rate-'):           # measured in one piece
            shutil.rmtree(f'{folder}/runs/{step.name}', ignore_errors=True)
        t0 = time.monotonic()
        status = run(step, step.command.format(dir=shlex.quote(folder), epochs=plan['epochs'], fast=plan['fast']),
                     dict(step.env, TORCHINDUCTOR_CACHE_DIR=cache, **plan['env']), f'{folder}/{step.name}.log', limit)
        seconds = time.monotonic() - t0
        if status in step.statuses and os.path.exists(f'{folder}/{step.product}'):
            record['done'][step.name] = dict(seconds=seconds, status=status)
            say(f'{step.name:<16} {seconds:6.0f} s  {last_line(f"{folder}/{step.name}.log")}')
        else:
            shutil.rmtree(cache, ignore_errors=True)        # a compilation that is killed may leave half a file there
            why = f'stopped after {limit:.0f} s' if status is None else f'ended with status {status}'
            record['failed'][step.name] = why
            say(f'{step.name:<16} {seconds:6.0f} s  {why}: {last_line(f"{folder}/{step.name}.log")}')
        write()
    return not record['failed']

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
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
    try:
        sys.exit(0 if day(args) else 1)
    except KeyboardInterrupt:
        sys.exit('\nstopped; the same command continues')
