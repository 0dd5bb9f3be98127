"""
Images per second of a training step and of PGD evaluation, beside a plain implementation; each trick's share.

$ python -m tools.bench --loss logit_mse --beta 0.2 --width 16               # the ratio
$ python -m tools.bench --loss trades --width 8 --batch-size 64 --tricks     # each trick alone, and left out
$ python -m tools.bench --loss trades --width 16 --authors trades.py         # beside the authors' own
$ python -m tools.bench --scaling --width 8 --batch-size 64 --json scaling.json     # a quarter of an hour

plain is what public code does, fast is train_adv.py --compile; both are in tools/steps.py. The rows take
turns, in rounds: a row shows the median of its rounds, and of its ratios to plain in the same round. Random
images of CIFAR's size. FLOPs are what convolutions and matrix products need (a multiply-add is two), also as
a share of what a large product reaches in the same rounds. On a GPU fp32 is TF32, as in PyTorch's
convolutions; evaluation not.
"""
import argparse
import json
import os
import re
import resource
import statistics
import sys
import time
import traceback
from typing import Callable
from typing import NamedTuple

import torch

import models
from losses import METHODS, asked_for, hparams
from support import describe, refusals, speed
from support.files import atomic, cannot_write, check_writable
from support.refusals import refuse
from tools import scaling, steps
from tools.steps import Setting, Tricks

ROUNDS = 5

# -----------------------------------------------------------------------------
# flags
parser = argparse.ArgumentParser(prog='python -m tools.bench', description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
refusals.one_line(parser)
arg = parser.add_argument
arg('--loss', default='logit_mse', choices=METHODS, help='its hyper-parameters are flags, too')
arg('--model', default='resnet18', help=models.NAMES)
arg('--width', type=int, help="channels of the first layer (default: the paper's)")
arg('--normalize', action='store_true', help='standardise images as the first layer of the model')
arg('--activation', default='relu', choices=models.ACTIVATIONS)
arg('--batch-size', type=int, default=128)
arg('--steps', type=int, default=10, help='of the attack; evaluation takes twice as many')
arg('--amp', default='auto', choices=['auto', 'bf16', 'fp16', 'off'], help='of fast')
arg('--threads', type=int, default=torch.get_num_threads(), help='of a CPU')
arg('--seconds', type=float, default=30, help='per row, over all rounds; whole steps, so at least')
arg('--tricks', action='store_true', help='also each trick alone, each left out of fast, and those not in it')
arg('--add', nargs='+', default=[], choices=Tricks._fields, metavar='TRICK', help='also fast with all these')
arg('--authors', metavar='PY', help="TRADES' own trades.py: also its trades_loss, in its own loop")
arg('--profile', action='store_true', help='at the end, where the time of a fast step goes')
arg('--json', metavar='FILE', help='the table, every round of it; written anew after each row')
arg('--scaling', action='store_true', help='of train_adv.py --loss trades; a figure is drawn beside --json')
arg('--batch-sizes', type=int, nargs='+', default=[16, 32, 64, 128, 256], help='of --scaling; so too:')
arg('--widths', type=int, nargs='+', default=[8, 16, 32])
arg('--attack-steps', type=int, nargs='+', default=[1, 2, 5, 10, 20])
arg('--processes', type=int, nargs='+', default=[1])
first, _ = parser.parse_known_args()
method = METHODS[first.loss]
for name, default in hparams(method.loss).items():
    arg(f'--{name}', help=f'of {first.loss}', **describe.flag_of(default))
arg('-h', '--help', action='help')
args, unknown = parser.parse_known_args()
hp = {name: getattr(args, name) for name in hparams(method.loss)}

# what is not measured here is refused
refusals.unknown(unknown, args.loss, hp)
refusals.model(args.model, width=args.width, activation=args.activation)
refusals.numbers(args, 1, 1e9, 'steps', 'threads')
refusals.numbers(args, 1e-6, 1e6, 'seconds')
refusals.numbers(args, 2, steps.N, 'batch_size')
foreign = asked_for(method) - {'y', 'logits', 'logits_adv', 't_logits'}
if method.inner is None:
    refuse(f'--loss {args.loss} attacks nothing')
if foreign:
    refuse(f'--loss {args.loss} also needs {" ".join(sorted(foreign))}: not measured here')
if method.settings.get('dual_bn'):
    refuse(f'--loss {args.loss} has a second BN: not measured here')
if '.py:' in args.model:
    refuse(f'--model {args.model}: one of {models.NAMES}')
if args.authors and not os.path.exists(args.authors):
    refuse(f'--authors: there is no {args.authors}')

def write(report):
    if args.json:
        with atomic(args.json) as tmp, open(tmp, 'w') as f:
            json.dump(report, f, indent=1)

if args.json:
    check_writable(args.json)
if args.scaling:
    scaling.check(args, parser.get_default)
    scaling.measure(args)
    sys.exit()

# -----------------------------------------------------------------------------
# the rows
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
cuda = device.type == 'cuda'
dtype = speed.autocast_dtype(args.amp, device)                 # None: fp32
torch.backends.cudnn.benchmark = True
torch._dynamo.config.recompile_limit = 256                      # every row has its own networks
torch.set_num_threads(args.threads)
network = dict(name=args.model, width=args.width, activation=args.activation)
if args.normalize:
    network.update(mean=[0.5] * 3, std=[0.25] * 3)
setting = Setting(method, hp, device, dtype, args.steps, network)
cost = steps.flops(setting)

class Row(NamedTuple):
    work: Callable                  # of a batch x, y
    tricks: Tricks
    flops: float                    # per image
    peak: str                       # the product whose FLOP/s are its limit
    against: str | None = 'plain'   # the row that it is compared with

def product(name, precision):
    """What a large matrix product reaches."""
    n = 8192 if cuda else 1024
    a = torch.randn(n, n, device=device).to(precision)
    def work(x, y):
        for _ in range(10):
            a @ a
    rows[name] = Row(work, Tricks(loader=True), 20 * n ** 3 / args.batch_size, name, None)

def training(name, tricks, work=None):
    precision = dtype if tricks.amp else torch.float32
    rows[name] = Row(work or steps.ours(setting, tricks)[2], tricks, cost['once' if tricks.once else 'again'],
                     f'product, {precision}')

def evaluating(name, tricks):
    peak = 'evaluation, product' if cuda else f'product, {torch.float32}'           # without TF32
    rows[name] = Row(steps.evaluation(setting, tricks), tricks, cost['evaluation'], peak, 'evaluation, plain')

def measurable(trick):
    """Is there anything to measure on this device, in this precision and with this network?"""
    if trick == 'graphs':
        return cuda
    if trick == 'amp':
        return dtype is not None
    if trick == 'folded':                           # in these BN comes before the convolution
        return not re.match('wrn|preact', args.model)
    if trick == 'channels_last':                    # oneDNN crashes on fewer channels
        return cuda or (args.width or 64) >= 8
    return True

rows = {}
nothing, fast = Tricks(), steps.of_train_adv(setting)
product(f'product, {torch.float32}', torch.float32)
if dtype:
    product(f'product, {dtype}', dtype)
if cuda:
    product('evaluation, product', torch.float32)
training('plain', nothing, steps.plain(setting)[2])
needed = list(rows)                                 # of these none may fail
training('fast', fast)
if args.authors:
    training("TRADES' authors", nothing, steps.authors(setting, args.authors)[2])
if args.tricks:
    training('no trick', nothing)
    for trick in filter(measurable, Tricks._fields):
        if trick != 'graphs':                       # of what is compiled
            training(f'plain + {trick}', nothing._replace(**{trick: True}))
        if getattr(fast, trick):
            training(f'fast - {trick}', fast._replace(**{trick: False}))
        else:
            training(f'fast + {trick}', fast._replace(**{trick: True}))
if args.add:
    training(f'fast + {" + ".join(args.add)}', fast._replace(**dict.fromkeys(args.add, True)))
evaluating('evaluation, plain', nothing)
evaluating('evaluation, eager', Tricks(loader=True, once=True, frozen=True))
evaluating('evaluation, compiled', Tricks(loader=True, once=True, frozen=True, compile_attack=True))

# -----------------------------------------------------------------------------
# and their turns
workers, on_device = steps.from_workers(args.batch_size, device), steps.from_device(args.batch_size, device)

def wait():
    if cuda:
        torch.cuda.synchronize()

def turn(name, seconds):
    """Images per second, over whole steps."""
    row = rows[name]
    if cuda:                                        # training as torch has it by default, or better
        torch.backends.cudnn.allow_tf32 = 'evaluation' not in name
        torch.set_float32_matmul_precision('highest' if 'evaluation' in name else 'high')
    batches = on_device if row.tricks.loader else workers
    if batches is workers:
        for _ in range(2 * steps.WORKERS):
            next(batches)                           # made ready while others had their turn
    wait()
    t0, n = time.perf_counter(), 0
    while n == 0 or time.perf_counter() - t0 < seconds:
        row.work(*next(batches))
        n += args.batch_size
    wait()
    return n / (time.perf_counter() - t0)

def warm_up(name):
    """-> peak memory in MiB on a GPU."""
    for _ in range(3 if cuda else 1):               # CUDA graphs: warm-up, recording, replay
        turn(name, 0)
    if not cuda:
        return {}
    torch.cuda.reset_peak_memory_stats()
    turn(name, 0)
    return dict(peak_mib=torch.cuda.max_memory_allocated() / 2 ** 20)

config = dict(vars(args), fast=fast._asdict(), **describe.environment(device))
print(json.dumps(config), flush=True)

# -----------------------------------------------------------------------------
# the table
rates, memory, failed = {name: [] for name in rows}, {}, {}

def ratio(name, other):
    """Median of the ratios within a round; NaN if one of the two failed, or is still to come."""
    if not (rates[name] and rates[other]):
        return float('nan')
    return statistics.median(a / b for a, b in zip(rates[name], rates[other]))

def report():
    table = {}
    for name, row in rows.items():
        if not rates[name]:
            continue
        rate = statistics.median(rates[name])
        of_peak = ratio(name, row.peak) * row.flops / rows[row.peak].flops
        table[name] = dict(tricks=[trick for trick, on in row.tricks._asdict().items() if on],
                           images_per_s=rate, ratio=ratio(name, row.against or name), rounds=rates[name],
                           mflop_per_image=row.flops / 1e6, gflop_per_s=rate * row.flops / 1e9,
                           share_of_peak=of_peak, **memory[name])
    memory_held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return dict(config, ratio=ratio('fast', 'plain'),
                evaluation_ratio=ratio('evaluation, compiled', 'evaluation, plain'),
                peak_rss_mib=memory_held, rows=table, failed=failed)

def ready(name):
    """Warms it up. -> did it work?"""
    t0 = time.perf_counter()
    try:
        memory[name] = warm_up(name)
    except Exception as e:              # a compiler's or a driver's; the other rows are still worth having
        if name in needed:
            raise
        traceback.print_exc()
        failed[name] = f'{type(e).__name__}: {e}'.splitlines()[0][:200]
        print(f'{name:<28} FAILED: {failed[name]}', flush=True)
        return False
    print(f'{name:<28} ready after {time.perf_counter() - t0:6.1f} s', flush=True)
    return True

try:
    for k in range(ROUNDS):
        for name in list(rows)[::-1 if k % 2 else 1]:
            if name in failed or k == 0 and not ready(name):
                continue
            rates[name].append(turn(name, args.seconds / ROUNDS))
            print(f'{name:<28} round {k + 1} of {ROUNDS}: {rates[name][-1]:10.1f} images/s', flush=True)
            write(report())
except KeyboardInterrupt:
    measured = args.json and any(rates.values())
    sys.exit(f'\nstopped; {args.json} holds the rows above' if measured else '\nstopped')
except OSError as e:
    sys.exit(f'{cannot_write(args.json, e)}. Stopped')

found = report()
print(f'{"":<28}{"images/s":>10}{"ratio":>8}{"MFLOP/image":>13}{"GFLOP/s":>10}{"of peak":>9}')
for name, r in found['rows'].items():
    shown = ' ' * 31
    if rows[name].against:
        shown = f'{r["images_per_s"]:10.1f}{r["ratio"]:8.2f}{r["mflop_per_image"]:13.1f}'
    print(f'{name:<28}{shown}{r["gflop_per_s"]:10.1f}{r["share_of_peak"]:9.2f}')
for name, text in failed.items():
    print(f'{name:<28} FAILED: {text}')
print(f'fast is {found["ratio"]:.2f} times plain, evaluation {found["evaluation_ratio"]:.2f} times; '
      f'{found["peak_rss_mib"]:.0f} MiB of memory, all rows in one process')

if args.profile and 'fast' not in failed:
    kinds, seconds, launches = steps.profile(rows['fast'].work, next(on_device), device)
    busy = sum(kinds.values())
    print(f'one fast step: {1000 * seconds:.1f} ms under the profiler, {launches} '
          f'{"kernels" if cuda else "operations"}, {device.type} busy for {100 * busy / seconds:.0f} % of it')
    for name, spent in sorted(kinds.items(), key=lambda item: -item[1])[:15]:
        print(f'  {100 * spent / seconds:5.1f} %  {name[:90]}')
    found.update(profile=dict(seconds=seconds, launches=launches, busy_seconds=busy, kinds=kinds))
write(found)
if 'fast' in failed:
    sys.exit(1)
