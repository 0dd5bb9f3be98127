"""
`python -m tools.bench --scaling`: how the cost of training grows. train_adv.py is started for every batch
size, width, number of attack steps and of processes, one of them varied at a time, as a user starts it, on
the images of `synthetic`.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile

import torch

from support.describe import environment
from support.files import atomic

EPOCHS, IMAGES = 4, 576                         # synthetic's, those held out aside
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

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
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                          env=dict(os.environ, OMP_NUM_THREADS=str(args.threads)))
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
    rows = []
    for point in points(base, grid):
        with tempfile.TemporaryDirectory() as folder:
            rates = run_of(point, args, f'{folder}/run')
        rows.append(dict(point=point, images_per_s=statistics.median(rates), epochs=rates))
        shown = '  '.join(f'{k} {v:>4}' for k, v in point.items())
        print(f'{shown}{rows[-1]["images_per_s"]:10.1f} images/s', flush=True)
        if args.json:
            device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
            with atomic(args.json) as tmp, open(tmp, 'w') as f:
                json.dump(dict(environment(device), threads=args.threads, base=base, rows=rows), f, indent=1)
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
