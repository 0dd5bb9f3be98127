"""
Half an hour on a GPU, as one command: test the CUDA paths, measure the speed, train and evaluate the paper's
rows.

$ python -m tools.gpu_day --minutes 25 --out runs/gpu_day          # CIFAR-10 is data/cifar10.npz: no internet
$ python -m tools.gpu_day --minutes 25 --out runs/gpu_day --now 9  # nine of them now; the same line continues
$ python -m tools.gpu_day --rehearse --out /tmp/rehearsal          # on a CPU, tiny, in under 3 minutes
$ python -m tools.gpu_day --join runs/gpu_day/back/logit_mse       # the weights that came back, as one file

The steps are data, STEPS, the most important first; extras follow if time is left, or with more --minutes.
Each has so many of the 25 minutes; what one leaves over goes to the next. A training is planned before it
starts: a short one has shown how long an epoch takes, and as many of 100 are asked for as fit, so that the
schedule is annealed to its end. What is cut is continued by the next call, and of a training that was cut
best.pt is evaluated meanwhile. What fails is reported, and the next time it is tried again. DIR/back is
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

from support import files, refusals
from support.evaluation import has_autoattack
from support.files import Refused, atomic, say
from tools import pieces

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# -----------------------------------------------------------------------------
# what is done, in this order

class Step(NamedTuple):
    name: str
    command: str                    # of python; {...} is a setting, the folder, or planned
    product: str                    # the file in DIR that it makes, beside NAME.log
    minutes: float                  # its share of the 25
    needs: tuple = ()               # files in DIR: without them it is left out
    rates: tuple = ()               # of a training: the steps whose logs say how long an epoch takes
    statuses: tuple = (0,)          # with which it is done: of tests that fail the log is the result
    env: dict = {}
    extra: bool = False             # comes after all others, if time is left

CORE = ('"(logits and resnet18 and not preact) or outside '
        'or (every_loss and (trades or logit_mse or dkl or rslad or adaad)) or (eager_does and logit_mse) '
        'or (bit_for_bit and bf16) or without or fast or processes or memory"')
REAL = dict(net='--dataset cifar10 --data-dir {data}', attack='', tests=f'-k {CORE}', bench='--seconds 4',
            small='--batch-size 128 --add graphs', teacher=8, rate='--subset 12800 --epochs 3', images=49_000,
            part='--n 1000 --batch-size 500', fallback=30, most=100)
REHEARSAL = dict(net='--dataset synthetic --model wrn-10-1 --width 8 --subset 64 --batch-size 16 --amp off',
                 attack='--steps 2', tests='-k "logits or folded"',
                 bench='--model wrn-10-1 --width 8 --steps 2 --seconds 0.05',
                 small='--batch-size 16', teacher=2, rate='--epochs 3', images=64, part='--n 16',
                 fallback=1, most=2)

TESTS = '-m pytest -v --tb=short -p no:cacheprovider tests/test_cuda.py'
BENCH = '-m tools.bench --loss logit_mse {bench}'
LOGIT_MSE = ('train_adv.py {net} {attack} --save-minutes 1 --loss logit_mse --beta 0.2 '
             '--teacher {dir}/runs/teacher/best.pt')
TRADES = 'train_adv.py {net} {attack} --save-minutes 1 --loss trades --beta 5'
GRAPHS = dict(TORCHINDUCTOR_CUDAGRAPHS='1')
WAYS = 'rate-compile', 'rate-graphs'                    # to take the same step: the faster is taken
TEACHER = 'runs/teacher/best.pt'

def rated(name, env):
    return Step(name, f'{LOGIT_MSE} {{rate}} --compile --out {{dir}}/runs/{name}', f'runs/{name}/last.pt',
                1.7, (TEACHER,), env=env)

def trained(name, command, minutes, needs):
    return Step(name, f'{command} --epochs {{epochs}} --compile --out {{dir}}/runs/{name} --resume',
                f'runs/{name}/last.pt', minutes, needs, WAYS)

def judged(name, of, flags, minutes, extra=False):
    """Of best.pt, also of a training that was cut."""
    best = f'runs/{of}/best.pt'
    return Step(name, f'evaluate.py {{dir}}/{best} {flags} --out {{dir}}/{name}.json', f'{name}.json',
                minutes, (best,), extra=extra)

FAST = '{part} --fast --attacks clean pgd autoattack'
EAGER = '{part} --no-audit --attacks clean autoattack'
STEPS = [
    Step('versions', '-m torch.utils.collect_env', 'versions.log', 0.5),
    Step('tests', f'{TESTS} {{tests}}', 'tests.log', 3.5, statuses=(0, 1)),
    Step('bench-small', f'{BENCH} {{small}} --profile --json {{dir}}/bench-small.json',
         'bench-small.json', 3),
    Step('teacher', 'train_teacher.py {net} --save-minutes 1 --compile --epochs {teacher} '
         '--out {dir}/runs/teacher --resume', 'runs/teacher/last.pt', 2.3),
    rated('rate-graphs', GRAPHS),
    rated('rate-compile', {}),
    trained('logit_mse', LOGIT_MSE, 5, (TEACHER,)),
    judged('logit_mse-fast', 'logit_mse', FAST, 2),
    trained('trades', TRADES, 4, ()),
    judged('trades-fast', 'trades', FAST, 1.5),
    Step('figures', '-m tools.figures {dir}/logit_mse-fast.json {dir}/trades-fast.json --checkpoint none '
         '--out {dir}/back/figures', 'back/figures', 0.3, ('logit_mse-fast.json', 'trades-fast.json')),
    judged('logit_mse-eager', 'logit_mse', EAGER, 4, extra=True),
    judged('trades-eager', 'trades', EAGER, 4, extra=True),
    Step('bench-large', f'{BENCH} --batch-size 512 --profile --json {{dir}}/bench-large.json',
         'bench-large.json', 3, extra=True),
    Step('tricks', f'{BENCH} --batch-size 128 --tricks --json {{dir}}/tricks.json',
         'tricks.json', 7, extra=True),
    judged('logit_mse-whole', 'logit_mse',
           '--n 10000 --batch-size 1000 --fast --attacks clean pgd autoattack', 13, extra=True),
    Step('tests-all', TESTS, 'tests-all.log', 10, statuses=(0, 1), extra=True)]

# what a rehearsal leaves out: a CPU has no graphs, and of a command with other flags one will do
NOT_REHEARSED = 'rate-graphs', 'bench-large', 'tricks', 'logit_mse-whole', 'tests-all'

def steps_of(args):
    return [step for step in STEPS if not (args.rehearse and step.name in NOT_REHEARSED)]

# -----------------------------------------------------------------------------
# the plan

def seconds_per_epoch(folder, images):
    """Of an epoch of so many images, validation and all, by the last but one of a run that has ended; or
    None."""
    try:
        with open(f'{folder}/log.jsonl') as f:
            config, *rows = [json.loads(line) for line in f]
        row = rows[-2]
        whole = 60 * row['min_left'] / (rows[-1]['epoch'] - row['epoch'])
        return whole + (images - config['train_images']) / row['img_per_s']
    except (OSError, LookupError):
        return None

def planned(step, folder, done, minutes, settings):
    """What {epochs} stands for in its command and what is set in its environment, by the rates of those that
    ended well."""
    rates = {}
    for name in step.rates:
        seconds = seconds_per_epoch(f'{folder}/runs/{name}', settings['images']) if name in done else None
        if seconds:
            rates[name] = seconds
    name = min(rates, key=rates.get, default=None)
    seconds = rates.get(name, settings['fallback'])
    epochs = int(0.85 * 60 * minutes / seconds)                 # the rest: start, compilation, noise
    return dict(epochs=max(2, min(settings['most'], epochs)), env=GRAPHS if name == 'rate-graphs' else {},
                why=f'{seconds:.2f} s an epoch ({name or "not measured"}), {minutes:.1f} minutes')

def minutes_for(step, others, left):
    """Of the minutes that are left: its own share beside those that have to follow; of an extra, what it asks
    for. others: the steps from this one on."""
    if step.extra:
        return min(left, step.minutes)
    return left * step.minutes / sum(s.minutes for s in others if not s.extra)

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
            # at the first all save, or say what they have so far; compilers at work ignore it
            for number, patience in (signal.SIGINT, 45), (signal.SIGTERM, 5), (signal.SIGKILL, 10):
                if child.poll() is None:
                    os.killpg(child.pid, number)
                    try:
                        child.wait(patience)
                    except subprocess.TimeoutExpired:
                        pass
    return None if stopped else child.returncode

# -----------------------------------------------------------------------------
# what comes back

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
            pieces.split(path, start)

# -----------------------------------------------------------------------------

CUT, ENDED = 'stopped', 'ended'

def in_order(args, plans, failed):
    """The steps of this call. failed: those of the call before, and why."""
    steps = steps_of(args)
    if 'logit_mse' in plans:                # a student has begun with this teacher, complete or not
        steps = [step for step in steps if step.name != 'teacher']
    # tests and bench begin from nothing again: what was cut, or ended with an error, comes last
    def begins_again(step):
        return step.command.startswith('-m') and failed.get(step.name, '').startswith((CUT, ENDED))
    return sorted(steps, key=begins_again)

def may_be_eager(step, status, command, made):
    """Is it a training that may have failed because nothing can be compiled here, before its first epoch
    ended? 2 says that it was refused. Those that measure a way to compile are not asked."""
    measures = step.name.startswith('rate-')
    failed = status not in (None, 2, *step.statuses)
    return failed and ' --compile' in command and not measures and not os.path.exists(f'{made}/best.pt')

def is_stale(step, folder):
    """Is it a report or a figure of what has been trained, or judged, further since?"""
    product = f'{folder}/{step.product}'
    if TEACHER in step.needs or not os.path.exists(product):        # the students keep their teacher
        return False
    needed = [f'{folder}/{path}' for path in step.needs]
    return any(os.path.getmtime(path) > os.path.getmtime(product) for path in needed if os.path.exists(path))

def forget(step, done, folder):
    """What a step has made, so that it begins anew."""
    done.pop(step.name, None)
    for path in glob.glob(f'{folder}/{step.product}*'):
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)

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
    lock = open(f'{folder}/day.lock', 'w')          # held until it is closed
    if not files.lock(lock):
        raise Refused(f'another gpu_day is at work in {folder}')
    record = dict(seconds=0.0, done={}, failed={}, plans={}, eager=False)
    if os.path.exists(f'{folder}/day.json'):
        with open(f'{folder}/day.json') as f:
            record.update(json.load(f))
    before, failed = record['seconds'], record['failed']
    record['failed'] = {}
    steps = in_order(args, record['plans'], failed)

    def spent():
        return time.monotonic() - begun

    def write():
        record['seconds'] = before + spent()
        with atomic(f'{folder}/day.json') as tmp, open(tmp, 'w') as f:
            json.dump(record, f, indent=1)
        bring_back(folder)

    for k, step in enumerate(steps):
        if is_stale(step, folder):
            forget(step, record['done'], folder)
        if step.name in record['done']:
            continue
        missing = [path for path in step.needs if not os.path.exists(f'{folder}/{path}')]
        if missing:
            record['failed'][step.name] = f'needs {" ".join(missing)}'
            say(f'{step.name:<16} left out: needs {" ".join(missing)}')
            continue
        others = [s for s in steps[k:] if s.name not in record['done']]
        minutes = minutes_for(step, others, max(0.0, args.minutes - (before + spent()) / 60))
        plan = record['plans'].get(step.name, dict(epochs='', env={}))
        if step.rates and step.name not in record['plans']:
            plan = planned(step, folder, record['done'], minutes, settings)
        if step.rates:
            say(f'{step.name:<16} {plan["epochs"]} epochs: {plan["why"]}')
            minutes *= 1.3                          # it is better annealed than punctual
        limit = 60 * minutes
        now = limit if args.now is None else 60 * args.now - spent()
        if min(limit, now) < 5:
            say(f'{step.name:<16} no time is left: the same command continues'
                + ('' if now < limit else ', with more --minutes'))
            write()
            return False
        if step.rates:
            record['plans'][step.name] = plan       # --resume refuses other epochs
        write()
        t0, log = spent(), f'{folder}/{step.name}.log'
        made = f'{folder}/{os.path.dirname(step.product)}'
        files.wait_for(f'{made}/.lock', f'waiting for the training in {made}, which has outlived its call',
                       min(limit, now))
        if step.name.startswith('rate-'):           # measured in one piece
            shutil.rmtree(made, ignore_errors=True)
        logged = os.path.getsize(log) if os.path.exists(log) else 0
        command = step.command.format(**settings, epochs=plan['epochs'])
        env = {**always, **step.env, **plan['env']}
        if record['eager']:
            command = command.replace(' --compile', '')
        try:
            status = run(step, command, env, log, min(limit, now) - (spent() - t0))
        except KeyboardInterrupt:
            write()                     # its minutes count, and what it has made comes back
            raise
        if may_be_eager(step, status, command, made):
            say(f'{step.name:<16} {ENDED} with status {status}: {last_line(log)}; again without --compile')
            shutil.rmtree(made, ignore_errors=True)
            status = run(step, command.replace(' --compile', ''), env, log, min(limit, now) - (spent() - t0))
            record['eager'] = status in step.statuses
        seconds = spent() - t0
        if status in step.statuses and os.path.exists(f'{folder}/{step.product}'):
            record['done'][step.name] = dict(seconds=seconds, status=status)
            say(f'{step.name:<16} {seconds:6.0f} s  {last_line(log)}')
        else:
            with open(log, errors='replace') as f:
                f.seek(logged)
                if 'file too short' in f.read():    # a compilation that was killed left half a file
                    shutil.rmtree(always['TORCHINDUCTOR_CACHE_DIR'], ignore_errors=True)
            why = f'{ENDED} with status {status}'
            if status is None:
                why = 'the time of this call is over' if now < limit else f'{CUT} after {limit:.0f} s'
            record['failed'][step.name] = why
            say(f'{step.name:<16} {seconds:6.0f} s  {why}: {last_line(log)}')
        write()
    return not record['failed']

def handle_signals():
    """A signal stops the step at work, too. A script's shell has SIGINT ignored in what it puts in the
    background, and in the children of that."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.default_int_handler)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(prog='python -m tools.gpu_day', description=__doc__, allow_abbrev=False,
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
        pieces.join(args.join)
        sys.exit()
    if not args.minutes > 0 or args.now is not None and not args.now > 0:
        raise Refused('--minutes and --now: numbers above 0')
    if args.rehearse:
        args.minutes = 600                          # nobody knows the machine
    else:
        if not torch.cuda.is_available():
            raise Refused('there is no GPU: --rehearse does all of it on a CPU, with tiny settings')
        if not os.path.exists(f'{args.data_dir}/cifar10.npz'):
            raise Refused(f'{args.data_dir}/cifar10.npz is not there: --data-dir')
        has_autoattack()
    handle_signals()
    try:
        sys.exit(0 if day(args) else 1)
    except KeyboardInterrupt:
        sys.exit('\nstopped; the same command continues')
