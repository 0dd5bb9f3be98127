"""
The masking audit of support/audit.py by itself: a line for each check, and status 1 if one is suspicious.

$ python -m tools.audit runs/x/best.pt                                      # 100 images: a minute or two
$ python -m tools.audit other.pt --model net.py:make --dataset cifar10 --n 200     # somebody else's
"""
import argparse
import math
import sys

import data
from models import ACTIVATIONS, NAMES, bn_branch
from support import audit, checkpoint, evaluation, files, refusals, shards, summary

parser = argparse.ArgumentParser(prog='python -m tools.audit', description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
refusals.one_line(parser)
files.plain_output()
arg = parser.add_argument
arg('checkpoint')
arg('--dataset', help=f'{" ".join(data.DATASETS)}, or the NAME of DIR/NAME.npz')
arg('--data-dir', metavar='DIR')
arg('--eps', type=float, help='radius in pixels (0..255); this and --norm: as it was trained')
arg('--step-size', type=float, help='default: eps / 4')
arg('--norm', choices=['Linf', 'L2'])
arg('--n', type=int, default=100, help='the first N test images')
arg('--draw', action='store_true', help='N test images drawn with --seed instead')
arg('--model', help=f"of somebody else's weights: {NAMES}, or FILE.py:FUNCTION that returns the network")
arg('--width', type=int, help="channels of its first layer (default: the paper's)")
arg('--mean', type=float, nargs='+', metavar='M', help='of its normalisation, one a channel (default: none)')
arg('--std', type=float, nargs='+', metavar='S')
arg('--activation', choices=ACTIVATIONS, help="default: relu, or the checkpoint's")
arg('--branch', choices=['main', 'aux'], help='of dual BN (default: as validated in training)')
arg('--transfer-from', metavar='PT', help='another network to craft on')
arg('--transfer-model', help='its architecture (default: --model)')
arg('--transfer-width', type=int, help='channels of its first layer (default: --width)')
arg('--seed', type=int, default=0)
args = parser.parse_args()

refusals.seed(args)
refusals.numbers(args, 1, math.inf, 'n')
content = checkpoint.read(args.checkpoint)
evaluation.architecture(args, content)
run = evaluation.threat(args, content)
if args.norm == 'Linf' and args.eps >= 255:
    refusals.refuse(f'--eps {args.eps:g}: below 255, or there is nothing left to attack')
device = evaluation.exact_device()
d = data.load(args.dataset, args.data_dir, device=device, training=False)
args.n = min(args.n, len(d.y_test)) if args.n == parser.get_default('n') else args.n
model, _, source = evaluation.networks(args, run, d, device)
x, y, _, _ = evaluation.images(args, d, device)
y = y.to(device)
with bn_branch(model, args.branch):
    summary.inspect(model, x[:10], y[:10], d.classes)
    steps = audit.checks(model, x, y, eps=args.eps / 255, step_size=args.step_size / 255,
                         norm=args.norm, seed=args.seed, transfer=source)
    found = []
    for _, check in shards.progress(steps, 'masking audit', 'checks', len(audit.NAMES)):
        found.append(check)
        files.say(f'{check.verdict:<11}{check.name:<17}{check.text}')
files.say(audit.overall(found))
sys.exit(1 if any(check.verdict == 'suspicious' for check in found) else 0)
