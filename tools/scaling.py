"""
How the cost grows: images per second of train_adv.py by batch size, width, attack steps and processes.

$ python -m tools.scaling --out results/speed/scaling      # .json .png .pdf; a quarter of an hour on two CPU cores
$ python -m tools.scaling --width 64 --batch-size 128 --widths 16 32 64 128 --processes 1 2 4 8          # on GPUs

One of them is varied at a time. Every point is a run as a user starts it, TRADES with --compile on the images
of `synthetic`: the median of its epochs but the first, in which it compiles. Processes share the batch.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile

import torch
from matplotlib import rc_context
from tqdm import tqdm

from tools.figures import STYLE, save, sheet
from support.files import atomic
from support.log import environment

EPOCHS, IMAGES = 4, 576                         # synthetic's, those held out aside
GPUS = torch.cuda.device_count()                # 0: on the CPU

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 allow_abbrev=False)
# one line, without the usage
parser.error = lambda message: parser.exit(2, f'{parser.prog}: error: {message}\n')
parser.add_argument('--batch-size', type=int, default=64, help='where another is varied; so too:')
parser.add_argument('--width', type=int, default=8)
parser.add_argument('--steps', type=int, default=10)
parser.add_argument('--batch-sizes', type=int, nargs='+', default=[16, 32, 64, 128, 256])
parser.add_argument('--widths', type=int, nargs='+', default=[8, 16, 32])
parser.add_argument('--attack-steps', type=int, nargs='+', default=[1, 2, 5, 10, 20])
parser.add_argument('--processes', type=int, nargs='+', default=[1, 2] if GPUS != 1 else [1])
parser.add_argument('--threads', type=int, default=1, help='of each process, on a CPU')
parser.add_argument('--out', default='scaling', metavar='PATH', help='without its ending')
args = parser.parse_args()
base = dict(batch_size=args.batch_size, width=args.width, steps=args.steps, processes=1)
grid = dict(batch_size=args.batch_sizes, width=args.widths, steps=args.attack_steps, processes=args.processes)
limits = dict(batch_size=(2, IMAGES), width=(8, 1024), steps=(1, 1000), processes=(1, args.batch_size // 2))
for name, (low, high) in limits.items():
    for value in [base[name], *grid[name]]:
        if not low <= value <= high:
            parser.error(f'{name.replace("_", " ")} {value}: from {low} to {high}')
if any(args.batch_size % n for n in args.processes):
    parser.error(f'--processes {args.processes}: each has to divide --batch-size {args.batch_size}')
try:
    with atomic(f'{args.out}.json') as tmp, open(tmp, 'w') as f:        # proves now that it can be written
        f.write('{}')
except OSError as e:
    parser.error(f'cannot write {args.out}.json: {e.strerror}')

def images_per_second(folder, *, processes, **flags):
    """Of every epoch but the first."""
    script = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'train_adv.py')
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}']
    done = subprocess.run(
        [sys.executable, *launcher * (processes > 1), script, '--loss=trades', '--dataset=synthetic',
         '--compile', f'--epochs={EPOCHS}', f'--out={folder}',
         f'--subset={min(IMAGES, max(256, 2 * flags["batch_size"]))}',
         *[f'--{name.replace("_", "-")}={value}' for name, value in flags.items()]],
        capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS=str(args.threads)))
    if done.returncode:
        sys.exit(f'{flags}, {processes} processes:\n{done.stderr[-2000:]}')
    with open(f'{folder}/log.jsonl') as f:
        return [json.loads(line)['img_per_s'] for line in f.readlines()[2:]]

points = {tuple({**base, name: value}.items()) for name, values in grid.items() for value in values}
rates = {}
with tempfile.TemporaryDirectory() as folder:
    for k, point in enumerate(tqdm(sorted(points, key=lambda point: point[::-1]), disable=None)):
        rates[point] = images_per_second(f'{folder}/{k}', **dict(point))

# -----------------------------------------------------------------------------
# table and figure
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
rows = [dict(point, images_per_s=statistics.median(rate), epochs=rate)
        for point, rate in sorted(rates.items())]
report = dict(environment(device), threads=args.threads, base=base, rows=rows)
with atomic(f'{args.out}.json') as tmp, open(tmp, 'w') as f:
    json.dump(report, f, indent=1)
for row in rows:
    print('  '.join(f'{name} {row[name]:>4}' for name in base) + f'{row["images_per_s"]:10.1f} images/s')
with rc_context(STYLE):
    figure, ((*panels,),) = sheet(f'TRADES training step, {report["device"]}', 2.2, 1, 4, sharey=True)
    for axes, (name, values) in zip(panels, grid.items()):
        values = sorted(set(values))
        rate = [rates[tuple({**base, name: value}.items())] for value in values]
        axes.plot(values, [statistics.median(r) for r in rate], 'o-', color='black')
        axes.vlines(values, [min(r) for r in rate], [max(r) for r in rate], color='black')
        axes.set(xlabel=name.replace('_', ' '), xscale='log', yscale='log')
        axes.set_xticks(values, values)
        axes.minorticks_off()
    panels[0].set_ylabel('images per second')
    save(figure, args.out)
print(f'{args.out}.json, .png, .pdf')
