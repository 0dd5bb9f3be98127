"""
Images per second of a training step and of PGD evaluation, beside a plain implementation; each trick's share.

$ python -m tools.bench --loss logit_mse --beta 0.2 --width 16               # the ratio
$ python -m tools.bench --loss trades --width 8 --batch-size 64 --tricks     # each trick alone, and left out
$ python -m tools.bench --loss trades --width 16 --authors trades.py         # beside the authors' own function
$ python -m tools.bench --scaling --width 8 --batch-size 64 --json scaling.json     # a quarter of an hour

plain is what public code does, fast is train_adv.py --compile; both are in tools/steps.py. The rows take turns, in
rounds: a row shows the median of its rounds, and of its ratios to plain in the same round. Random images of CIFAR's
size. FLOPs are what convolutions and matrix products need (a multiply-add is two), also as a share of what a large
product reaches in the same rounds. On a GPU fp32 is TF32, as in PyTorch's convolutions; evaluation not. --scaling
starts train_adv.py itself for each batch size, width, number of attack steps and of processes, one varied at a time.
"""
import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Callable, NamedTuple

import torch

import models
from losses import METHODS, hparams, needs
from support.files import atomic
from support.describe import environment
from tools import steps
from tools.steps import Setting, Tricks

ROUNDS = 5

# -----------------------------------------------------------------------------
# flags
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 allow_abbrev=False, add_help=False)
parser.error = lambda message: parser.exit(2, f'{parser.prog}: error: {message}\n')     # one line
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
arg('--add', nargs='+', default=[], choices=Tricks._fields, metavar='TRICK', help='also fast with all of these')
arg('--authors', metavar='PY', help="trades.py of the TRADES repository: also its trades_loss, in its own loop")
arg('--profile', action='store_true', help='at the end, where the time of a fast step goes')
arg('--json', metavar='FILE', help='the table, every round of it')
arg('--scaling', action='store_true', help='of train_adv.py --loss trades; a figure is drawn beside --json')
arg('--batch-sizes', type=int, nargs='+', default=[16, 32, 64, 128, 256], help='of --scaling; so too:')
arg('--widths', type=int, nargs='+', default=[8, 16, 32])
arg('--attack-steps', type=int, nargs='+', default=[1, 2, 5, 10, 20])
arg('--processes', type=int, nargs='+', default=[1])
first, _ = parser.parse_known_args()
method = METHODS[first.loss]
for name, default in hparams(method.loss).items():
    if default is False:
        arg(f'--{name}', action='store_true')
    else:
        arg(f'--{name}', type=type(default), default=default, help=f'of {first.loss}')
arg('-h', '--help', action='help')
args, unknown = parser.parse_known_args()
hp = {name: getattr(args, name) for name in hparams(method.loss)}

foreign = {*needs(method.loss), *needs(method.inner)} - {'y', 'logits', 'logits_adv', 't_logits'}
if unknown:
    takes = ' '.join(f'--{name}' for name in hp) or 'no hyper-parameter'
    parser.error(f'unknown argument {unknown[0]}; --loss {args.loss} takes {takes}')
if method.inner is None:
    parser.error(f'--loss {args.loss} attacks nothing')
if foreign:
    parser.error(f'--loss {args.loss} also needs {" ".join(sorted(foreign))}: not measured here')
if method.settings.get('dual_bn'):
    parser.error(f'--loss {args.loss} has a second BN: not measured here')
if not 2 <= args.batch_size <= steps.N:
    parser.error(f'--batch-size {args.batch_size}: from 2 to {steps.N}')
if args.steps < 1 or args.threads < 1:
    parser.error('--steps and --threads: at least 1')
if not 0 < args.seconds < 1e6:
    parser.error(f'--seconds {args.seconds}: more than 0')
if args.authors and not os.path.exists(args.authors):
    parser.error(f'--authors: there is no {args.authors}')
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
cuda = device.type == 'cuda'
network = dict(name=args.model, width=args.width, activation=args.activation)
if args.normalize:
    network.update(mean=[0.5] * 3, std=[0.25] * 3)
try:
    dtype = models.autocast_dtype(args.amp, device)                  # None: fp32
    with torch.device('meta'):
        models.build(num_classes=10, **network)
    if args.json:                                               # proves now that it can be written
        with atomic(args.json) as tmp, open(tmp, 'w') as f:
            f.write('{}')
except (ValueError, OSError) as e:
    parser.error(e)
setting = Setting(method, hp, device, dtype, args.steps, network)

def write(report):
    if args.json:
        with atomic(args.json) as tmp, open(tmp, 'w') as f:
            json.dump(report, f, indent=1)

# -----------------------------------------------------------------------------
# --scaling: every point is a run as a user starts it, on the images of `synthetic`
EPOCHS, IMAGES = 4, 576                         # synthetic's, those held out aside

def run_of(point, folder):
    """Images per second of every epoch but the first, in which it compiles."""
    launcher = [sys.executable]
    if point['processes'] > 1:
        launcher += ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={point["processes"]}']
    images = min(IMAGES, max(256, 2 * point['batch_size']))
    command = [*launcher, 'train_adv.py', '--loss=trades', '--dataset=synthetic', '--compile', f'--amp={args.amp}',
               f'--model={args.model}', f'--width={point["width"]}', f'--steps={point["steps"]}',
               f'--batch-size={point["batch_size"]}', f'--subset={images}', f'--epochs={EPOCHS}', f'--out={folder}']
    done = subprocess.run(command, capture_output=True, text=True,
                          cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                          env=dict(os.environ, OMP_NUM_THREADS=str(args.threads)))
    if done.returncode:
        sys.exit(f'{point}: {done.stderr[-2000:]}')
    with open(f'{folder}/log.jsonl') as f:
        return [json.loads(line)['img_per_s'] for line in f.readlines()[2:]]

def scaling():
    base = dict(batch_size=args.batch_size, width=args.width or 8, steps=args.steps, processes=1)
    grid = dict(batch_size=args.batch_sizes, width=args.widths, steps=args.attack_steps, processes=args.processes)
    rows = []
    for name, values in grid.items():
        for value in sorted({*values, base[name]}):
            point = {**base, name: value}
            if point not in [row['point'] for row in rows]:
                with tempfile.TemporaryDirectory() as folder:
                    rates = run_of(point, f'{folder}/run')
                rows.append(dict(point=point, images_per_s=statistics.median(rates), epochs=rates))
                shown = '  '.join(f'{k} {v:>4}' for k, v in point.items())
                print(f'{shown}{rows[-1]["images_per_s"]:10.1f} images/s', flush=True)
                write(dict(environment(device), threads=args.threads, base=base, rows=rows))
    if not args.json:
        return
    from tools.figures import save, sheet           # matplotlib, where it is asked for
    figure, ((*panels,),) = sheet(f'TRADES training step, {device.type}', 2.2, 1, len(grid), sharey=True)
    for axes, name in zip(panels, grid):
        points = [(row['point'][name], row['images_per_s']) for row in rows
                  if {**row['point'], name: base[name]} == base]
        values, rates = zip(*sorted(points))
        axes.plot(values, rates, 'o-', color='black')
        axes.set(xlabel=name.replace('_', ' '), xscale='log', yscale='log')
        axes.set_xticks(values, values)
        axes.minorticks_off()
    panels[0].set_ylabel('images per second')
    save(figure, os.path.splitext(args.json)[0])

if args.scaling:
    scaling()
    sys.exit()

# -----------------------------------------------------------------------------
# the rows
torch.backends.cudnn.benchmark = True
torch._dynamo.config.recompile_limit = 256                      # every row has its own networks
torch.set_num_threads(args.threads)

class Row(NamedTuple):
    work: Callable                  # of a batch x, y
    tricks: Tricks
    flops: float                    # per image
    peak: str                       # the product whose FLOP/s are its limit
    against: str | None = 'plain'   # the row that it is compared with

def training(tricks):
    cost = steps.flops(setting)['once' if tricks.once else 'again']
    peak = f'product, {dtype if tricks.amp else torch.float32}'
    return Row(steps.ours(setting, tricks)[2], tricks, cost, peak)

def evaluating(tricks):
    peak = 'evaluation, product' if cuda else f'product, {torch.float32}'           # without TF32
    return Row(steps.evaluation(setting, tricks), tricks, steps.flops(setting)['evaluation'], peak, 'evaluation, plain')

def product(name, precision):
    n = 8192 if cuda else 1024
    a = torch.randn(n, n, device=device).to(precision)
    def work(x, y):
        for _ in range(10):
            a @ a
    return Row(work, Tricks(loader=True), 20 * n ** 3 / args.batch_size, name, None)

nothing = Tricks()
eager = Tricks(loader=True, once=True, frozen=True)
fast = eager._replace(compile_attack=True, compile_update=True, amp=dtype is not None,
                      channels_last=models.layout(device) is torch.channels_last)
rows = {}
for precision in {torch.float32, dtype or torch.float32}:
    rows[f'product, {precision}'] = product(f'product, {precision}', precision)
if cuda:
    rows['evaluation, product'] = product('evaluation, product', torch.float32)
rows['plain'] = training(nothing)._replace(work=steps.plain(setting)[2])
if args.authors:
    rows["TRADES' authors"] = training(nothing)._replace(work=steps.authors(setting, args.authors)[2])
rows['fast'] = training(fast)
if args.tricks:
    rows['no trick'] = training(nothing)
    for name in Tricks._fields:
        other = not getattr(fast, name)
        if (name == 'graphs' and not cuda or name == 'amp' and dtype is None
                or name == 'folded' and re.match('wrn|preact', args.model)
                or name == 'channels_last' and not cuda and (args.width or 64) < 8):     # oneDNN crashes
            continue
        if name != 'graphs':
            rows[f'plain + {name}'] = training(nothing._replace(**{name: True}))
        rows[f'fast {"+" if other else "-"} {name}'] = training(fast._replace(**{name: other}))
if args.add:
    rows[f'fast + {" + ".join(args.add)}'] = training(fast._replace(**dict.fromkeys(args.add, True)))
rows['evaluation, plain'] = evaluating(nothing)
rows['evaluation, eager'] = evaluating(eager)
rows['evaluation, compiled'] = evaluating(eager._replace(compile_attack=True))

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

config = dict(vars(args), fast=fast._asdict(), **environment(device))
print(json.dumps(config), flush=True)
rates, memory = {name: [] for name in rows}, {}
for name in rows:
    t0 = time.perf_counter()
    for _ in range(3 if cuda else 1):               # CUDA graphs: warm-up, recording, replay
        turn(name, 0)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        turn(name, 0)
        memory[name] = dict(peak_mib=torch.cuda.max_memory_allocated() / 2 ** 20)
    print(f'{name:<28} ready after {time.perf_counter() - t0:6.1f} s', flush=True)
for k in range(ROUNDS):
    for name in list(rows)[::1 if k % 2 else -1]:
        rates[name].append(turn(name, args.seconds / ROUNDS))
        print(f'{name:<28} round {k + 1} of {ROUNDS}: {rates[name][-1]:10.1f} images/s', flush=True)

# -----------------------------------------------------------------------------
# the table

def ratio(name, other):
    """Median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(rates[name], rates[other]))

table = {}
print(f'{"":<28}{"images/s":>10}{"ratio":>8}{"MFLOP/image":>13}{"GFLOP/s":>10}{"of peak":>9}')
for name, row in rows.items():
    rate = statistics.median(rates[name])
    r = table[name] = dict(tricks=[trick for trick, on in row.tricks._asdict().items() if on], images_per_s=rate,
                           ratio=ratio(name, row.against or name), rounds=rates[name],
                           mflop_per_image=row.flops / 1e6, gflop_per_s=rate * row.flops / 1e9,
                           share_of_peak=ratio(name, row.peak) * row.flops / rows[row.peak].flops,
                           **memory.get(name, {}))
    shown = f'{rate:10.1f}{r["ratio"]:8.2f}{r["mflop_per_image"]:13.1f}' if row.against else ' ' * 31
    print(f'{name:<28}{shown}{r["gflop_per_s"]:10.1f}{r["share_of_peak"]:9.2f}')
report = dict(config, ratio=table['fast']['ratio'], evaluation_ratio=table['evaluation, compiled']['ratio'],
              peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, rows=table)
print(f'fast is {report["ratio"]:.2f} times plain, evaluation {report["evaluation_ratio"]:.2f} times; '
      f'{report["peak_rss_mib"]:.0f} MiB of memory, all rows in one process')

if args.profile:
    kinds, seconds, launches = steps.profile(rows['fast'].work, next(on_device), device)
    busy = sum(kinds.values())
    print(f'one fast step: {1000 * seconds:.1f} ms under the profiler, {launches} kernels launched, '
          f'{device.type} busy for {100 * busy / seconds:.0f} % of it')
    for name, spent in sorted(kinds.items(), key=lambda item: -item[1])[:15]:
        print(f'  {100 * spent / seconds:5.1f} %  {name[:90]}')
    report.update(profile=dict(seconds=seconds, launches=launches, busy_seconds=busy, kinds=kinds))
write(report)
