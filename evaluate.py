"""
Clean and robust accuracy of a checkpoint on the test set: a table, and one JSON beside the checkpoint.

$ python evaluate.py runs/cifar10-resnet18-logit_mse-beta0.2-s0/best.pt                       # everything, AutoAttack included
$ python evaluate.py runs/digits-resnet18-w8-logit_mse-beta0.2-s0/best.pt --n 100             # the first 100 test images
$ python evaluate.py model_test.pt --model resnet18 --dataset cifar10 --attacks clean pgd     # somebody else's weights

fp32 without TF32, eager, BN in eval mode. An image counts as robust if it is classified correctly as it is and after every
attack of the row; those misclassified as they are are not attacked. AutoAttack is its authors' (Croce & Hein 2020,
"Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks"), version standard: its
four attacks in turn, each on the images that are left, which is the published number.
"""
import argparse, json, logging, math, os, sys, time

import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from tqdm import tqdm

import attacks, data, models
from attacks import attack_mode, cw_margin, fgsm, pgd
from log import atomic, environment
from models import fingerprint, load_checkpoint

PARTS = ['apgd-ce', 'apgd-t', 'fab-t', 'square']        # of AutoAttack standard, in its order

# -----------------------------------------------------------------------------
# arguments
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
parser.error = lambda message: parser.exit(2, f'{parser.prog}: error: {message}\n')     # one line, without the usage
parser.add_argument('checkpoint')
data.add_args(parser); models.add_args(parser); attacks.add_args(parser)
parser.set_defaults(dataset=None, model=None)           # ours say it themselves
parser.add_argument('--attacks', nargs='+', default=['clean', 'fgsm', 'pgd', 'cw', 'autoattack'],
                    choices=['clean', 'fgsm', 'pgd', 'cw', 'autoattack', *PARTS], metavar='NAME',
                    help='clean fgsm pgd cw autoattack, or one of its parts alone on all images: ' + ' '.join(PARTS))
parser.add_argument('--n', type=int, help='the first N test images (default: all)')
parser.add_argument('--steps', type=int, default=20, help='of pgd and cw')
parser.add_argument('--restarts', type=int, default=1, help='of pgd and cw')
parser.add_argument('--individual', action='store_true',
                    help='run every part of AutoAttack also on the images that the parts before it broke: its accuracy alone')
parser.add_argument('--batch-size', type=int, default=250)
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--out', metavar='JSON', help='default: beside the checkpoint')
args = parser.parse_args()

# -----------------------------------------------------------------------------
# device, model, data: everything that can be wrong with the input is wrong here, before any work
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
torch.set_float32_matmul_precision('highest')
torch.backends.cudnn.allow_tf32 = False
flags = []                                              # what a reader of the number should know
try:
    for flag in ('steps', 'restarts', 'batch_size'):
        if getattr(args, flag) < 1:
            raise ValueError(f'--{flag.replace("_", "-")} {getattr(args, flag)}: at least 1')
    if args.model is None:
        model, meta = load_checkpoint(args.checkpoint)
        args.dataset = args.dataset or meta['dataset']
        d = data.load(args.dataset, args.data_dir, device=device)
    else:
        args.dataset = args.dataset or 'cifar10'
        d = data.load(args.dataset, args.data_dir, device=device)
        mean, std = d.statistics() if args.normalize else (None, None)
        model, meta = load_checkpoint(args.checkpoint, args.model, d.classes, width=args.width, mean=mean, std=std)
        if meta:
            raise ValueError(f'{args.checkpoint} says itself that it is a {model.config["name"]}: drop --model')
    if model.config['num_classes'] != d.classes:
        raise ValueError(f'{args.checkpoint} knows {model.config["num_classes"]} classes, {args.dataset} has {d.classes}')
    if d.classes < 4 and {'autoattack', *PARTS} & set(args.attacks):
        raise ValueError(f'AutoAttack needs four classes (its targeted DLR loss does), {args.dataset} has {d.classes}; '
                         'choose others with --attacks')
    attacks.resolve_args(args, data.row(args.dataset, args.data_dir)['eps'])
    n = args.n if args.n is not None else len(d.y_test)
    if not 1 <= n <= len(d.y_test):
        raise ValueError(f'--n {n}: {args.dataset} has {len(d.y_test)} test images')
    args.out = args.out or f'{os.path.splitext(args.checkpoint)[0]}.eval-{args.norm}-{args.eps:g}-n{n}.json'
    with atomic(args.out + '.probe') as tmp:            # two hours of AutoAttack end in this file
        open(tmp, 'w').close()
    os.remove(args.out + '.probe')
except ValueError as e:
    parser.error(e)
except OSError as e:
    parser.error(f'cannot write {args.out}: {e.strerror}')
model = model.to(device, memory_format=models.layout(device))
x_test, y_test = data.to_float(d.x_test[:n]), d.y_test[:n]
eps, step_size = args.eps / 255, args.step_size / 255

# -----------------------------------------------------------------------------
# attacks: each takes a batch of images that are classified correctly and returns x_adv

def ce(x, y):
    return lambda x_adv: F.cross_entropy(model(x_adv), y, reduction='none')

def margin(x, y):
    return lambda x_adv: cw_margin(model(x_adv), y)

def iterated(objective):
    settings = dict(eps=eps, step_size=step_size, steps=args.steps, norm=args.norm, restarts=args.restarts)
    return lambda x, y: pgd(objective(x, y), x, **settings)

def part(name):
    """One of AutoAttack's four, as its version standard runs it on one batch."""
    # it takes views of x and of its gradient, which channels_last memory refuses: contiguous outside, any layout inside
    predict = lambda x: model(x.flatten(1).view(x.shape).contiguous(memory_format=models.layout(device)))
    def attack(x, y):
        aa = AutoAttack(predict, norm=args.norm, eps=eps, seed=args.seed, version='standard', device=device)
        aa.attacks_to_run = [name]
        aa.apgd_targeted.n_target_classes = aa.fab.n_target_classes = min(9, d.classes - 1)
        return aa.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))[0]
    return attack

ATTACKS = dict(fgsm=lambda x, y: fgsm(ce(x, y), x, eps=eps, norm=args.norm), pgd=iterated(ce), cw=iterated(margin),
               **{name: part(name) for name in PARTS})

class Warnings(logging.Handler):
    """AutoAttack's own warnings (randomised, zero gradients, Square wins) belong in the report."""
    def emit(self, record):
        if record.getMessage() not in flags:
            flags.append(record.getMessage())
logging.getLogger('auto-attack').addHandler(Warnings(logging.WARNING))
logging.getLogger('auto-attack').propagate = False

@torch.no_grad()
def correct(x, y):
    """(n,) bool: x is classified as y."""
    return torch.cat([model(xb).argmax(1) == yb for xb, yb in zip(x.split(args.batch_size), y.split(args.batch_size))])

def survivors(name, alive):
    """(n,) bool: which of the alive images withstand the attack; the others are not attacked. Also the largest step taken."""
    index, still, moved = alive.nonzero()[:, 0], alive.clone(), 0.0
    for i in tqdm(index.split(args.batch_size) if len(index) else [], desc=name, leave=False, disable=None):
        x, y = x_test[i], y_test[i]
        x_adv = ATTACKS[name](x, y)
        d = (x_adv - x).flatten(1)
        moved = max(moved, (d.abs().amax() if args.norm == 'Linf' else d.norm(dim=1).max()).item())
        if not (moved <= eps * (1 + 1e-4) and 0 <= x_adv.min() and x_adv.max() <= 1):
            sys.exit(f'{name} left the ball or [0, 1] (moved by {255 * moved:.3f}/255): its result is worth nothing')
        still[i] = correct(x_adv, y)                    # recounted here, whatever the attack says
    return still, moved

# -----------------------------------------------------------------------------
# report

def summary(mask):
    """Accuracy in percent with a 95 % Wilson interval, and per class with mean, standard deviation and worst."""
    k, z = mask.sum().item(), 1.96
    centre, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    per_class = {int(c): 100 * mask[y_test == c].float().mean().item() for c in y_test.unique()}
    values = torch.tensor(list(per_class.values()), dtype=torch.float64)
    return dict(accuracy=100 * k / n, correct=k, n=n, interval=[100 * (centre - half), 100 * (centre + half)], per_class=per_class,
                class_mean=values.mean().item(), class_std=values.std(correction=0).item(), class_worst=min(per_class, key=per_class.get))

def report(row, mask, seconds, moved=None):
    s = results[row] = dict(summary(mask), seconds=seconds, max_perturbation=moved and 255 * moved)
    low, high = s['interval']
    print(f"{row:<28}{s['accuracy']:8.2f}   {low:6.2f} - {high:6.2f}{s['class_mean']:10.2f}{s['class_std']:8.2f}"
          f"{s['per_class'][s['class_worst']]:8.2f} ({s['class_worst']}){seconds:10.0f}", flush=True)

with torch.no_grad():
    logits = model(x_test[:args.batch_size])
    if not logits.isfinite().all():
        sys.exit(f'{args.checkpoint} returns non-finite logits on clean images: nothing to evaluate')
where = f'epoch {meta["epoch"]}, selected by {meta["selected_by"]}' if meta else 'weights only, provenance unknown'
print(f'{args.checkpoint} ({fingerprint(model)}): {model.config["name"]}, {where}')
print(f'{args.dataset}, the first {n} of {len(d.y_test)} test images; {args.norm} eps {args.eps:g}/255 = {eps:.5f}; fp32 on {device.type}')
print(f"{'accuracy in percent':<28}{'all':>8}   {'95 % interval':>15}{'classes':>10}{'std':>8}{'worst':>12}{'seconds':>10}")
torch.manual_seed(args.seed)
results, started = {}, time.perf_counter()
with attack_mode(model):
    clean = correct(x_test, y_test)
    report('clean', clean, time.perf_counter() - started)
    worst = clean.clone()
    for name in [a for a in args.attacks if a not in ('clean', 'autoattack')]:
        t0 = time.perf_counter()
        mask, moved = survivors(name, clean)
        report(f'{name}-{args.steps}' if name in ('pgd', 'cw') else name, mask, time.perf_counter() - t0, moved)
        worst &= mask
    if 'autoattack' in args.attacks:
        alive, t0, alone = clean, time.perf_counter(), {}
        for name in PARTS:
            t1, before = time.perf_counter(), alive
            alive, moved = survivors(name, before)
            report(f'  autoattack, after {name}', alive, time.perf_counter() - t1, moved)
            if args.individual:
                t1 = time.perf_counter()
                rest, moved = survivors(name, clean & ~before)
                alone[name] = alive | rest, time.perf_counter() - t1, moved
        report('autoattack (worst case)', alive, time.perf_counter() - t0)
        for name, (mask, seconds, moved) in alone.items():
            report(f'  {name} alone', mask, seconds, moved)
        worst &= alive
    if len(results) > 2:
        report('all of the above', worst, time.perf_counter() - started)

if meta and abs(meta['val_clean'] - results['clean']['accuracy']) > max(10, 300 / math.sqrt(n)):
    flags.append(f"clean accuracy is {results['clean']['accuracy']:.1f} here and was {meta['val_clean']:.1f} on the hold-out in training")
if meta.get('eps', args.eps) != args.eps or meta.get('norm', args.norm) != args.norm:
    flags.append(f"trained against {meta['norm']} {meta['eps']:g}/255, attacked with {args.norm} {args.eps:g}/255")
if n < 10000:
    flags.append(f'{n} images: not comparable with a leaderboard, mind the interval')
for flag in flags:
    print(f'note: {flag}')
with atomic(args.out) as tmp, open(tmp, 'w') as f:
    json.dump(dict(checkpoint=args.checkpoint, fingerprint=fingerprint(model), model=model.config, meta={k: v for k, v in meta.items() if k != 'config'},
                   dataset=args.dataset, images=f'first {n} of {len(d.y_test)} test images', norm=args.norm, eps=eps, eps_pixels=args.eps,
                   results=results, flags=flags, args=vars(args), precision='float32', **environment(device)), f, indent=1)
print(f'{args.out}')
