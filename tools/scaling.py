"""
`python -m tools.bench --scaling`: how the cost of training grows. train_adv.py is started for every batch
size, width, number of attack steps and of processes, one of them varied at a time, as a user starts it, on
the images of `synthetic`.
"""
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile

import torch

from losses import METHODS, hparams
from support.describe import environment
from support.files import atomic, cannot_write
from support.refusals import refuse

EPOCHS, IMAGES = 4, 576                         # synthetic's, those held out aside
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

def check(args, default):
    """Refuses what train_adv.py would refuse halfway through, and what is not measured. default(name): of a
    flag."""
    if args.loss not in (default('loss'), 'trades'):
        refuse(f'--scaling measures --loss trades, not {args.loss}')
    for flag in ('activation', 'normalize', 'seconds', 'tricks', 'add', 'authors', 'profile',
                 *hparams(METHODS[args.loss].loss)):
        if getattr(args, flag) != default(flag):
            refuse(f'--scaling measures --loss trades as it is: drop --{flag}')
    for flag in ('widths', 'attack_steps', 'processes'):
        if min(getattr(args, flag)) < 1:
            refuse(f'--{flag.replace("_", "-")} {min(getattr(args, flag))}: at least 1')
    for size in (args.batch_size, *args.batch_sizes):
        if not 2 <= size <= IMAGES:
            refuse(f'a batch of {size}: of the {IMAGES} images that --scaling trains on, 2 at least')
    for processes in args.processes:
        if args.batch_size % processes:
            refuse(f'--processes {processes}: --batch-size {args.batch_size} is no multiple of it')

def run_of(point, args, folder):
    """Images per second of every epoch but the first, in which it compiles. Ends the script if it fails."""
    launcher = [sys.executable]
    if point['processes'] > 1:
        launcher += ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={point["processes"]}']
    images = min(IMAGES, max(256, 2 * point['batch_size']))
    command = [*launcher, 'train_adv.py', '--loss=trades', '--dataset=synthetic', '--compile',
               f'--amp={args.amp}', f'--model={args.model}', f'--width={point["width"]}',
               f'--steps={point["steps"]}', f'--batch-size={point["batch_size"]}', f'--subset={images}',
               f'--epochs={EPOCHS}', f'--out={folder}']
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)      # ends the training as Ctrl-C does
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                              env=dict(os.environ, OMP_NUM_THREADS=str(args.threads)))
    finally:
        signal.signal(signal.SIGTERM, before)
    if done.returncode:
        sys.exit(f'{point}: {done.stderr[-2000:]}')
    with open(f'{folder}/log.jsonl') as f:
        return [json.loads(line)['img_per_s'] for line in f.readlines()[2:]]

def points(base, grid):
    """base, and base with one value of the grid in the place of its own; none twice."""
    found = [base]
    for name, values in grid.items():
        for value in values:
            point = {**base, name: value}
            if point not in found:
                found.append(point)
    return found

def measure(args):
    """args: of tools/bench.py. A line per point; with --json the report after each, a figure at the end."""
    base = dict(batch_size=args.batch_size, width=args.width or 8, steps=args.steps, processes=1)
    grid = dict(batch_size=args.batch_sizes, width=args.widths, steps=args.attack_steps,
                processes=args.processes)
    rows, device = [], torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        for point in points(base, grid):
            with tempfile.TemporaryDirectory() as folder:
                rates = run_of(point, args, f'{folder}/run')
            rows.append(dict(point=point, images_per_s=statistics.median(rates), epochs=rates))
            shown = '  '.join(f'{k} {v:>4}' for k, v in point.items())
            print(f'{shown}{rows[-1]["images_per_s"]:10.1f} images/s', flush=True)
            if args.json:
                found = dict(environment(device), threads=args.threads, base=base, rows=rows)
                with atomic(args.json) as tmp, open(tmp, 'w') as f:
                    json.dump(found, f, indent=1)
    except KeyboardInterrupt:
        sys.exit(f'\nstopped; {args.json} holds the rows above' if args.json and rows else '\nstopped')
    except OSError as e:
        sys.exit(f'{cannot_write(e.filename or args.json, e)}. Stopped')
    if args.json:
        draw(rows, base, list(grid), os.path.splitext(args.json)[0])

def draw(rows, base, names, path):
    """Images per second against each of the names, the others as in base."""
    from support.drawing import save, sheet           # matplotlib, where it is asked for
    figure, ((*panels,),) = sheet('TRADES training step', 2.2, 1, len(names), sharey=True)
    for axes, name in zip(panels, names):
        of_name = [row for row in rows if {**row['point'], name: base[name]} == base]
        of_name.sort(key=lambda row: row['point'][name])
        values = [row['point'][name] for row in of_name]
        axes.plot(values, [row['images_per_s'] for row in of_name], 'o-', color='black')
        axes.set(xlabel=name.replace('_', ' '), xscale='log', yscale='log')
        axes.set_xticks(values, values)
        axes.minorticks_off()
    panels[0].set_ylabel('images per second')
    save(figure, path)
