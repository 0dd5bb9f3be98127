"""
Clean and robust accuracy of a checkpoint on the test set: a table, and one JSON beside the checkpoint.

$ python evaluate.py runs/cifar10-resnet18-logit_mse-beta0.2-s0/best.pt     # all, AutoAttack included
$ python evaluate.py runs/x/best.pt --n 100 --attacks fgsm pgd cw           # the first 100 images
$ python evaluate.py runs/x/best.pt --dry-run                               # what it would do, how long
$ python evaluate.py runs/x/best.pt --shard 0/4                             # one of four processes
$ python evaluate.py other.pt --model resnet18 --dataset cifar10            # or net.py:make: any network
$ python evaluate.py runs/x/best.pt --attacks pgd --sweep-eps 0 2 4 8 16 --save-adv adv.pt
$ python evaluate.py runs/x/best.pt --verify adv.pt                         # ... judged again

An image counts as robust if it is classified correctly as it is and after every attack of the row; those
misclassified as they are are not attacked. AutoAttack is its authors' (support/autoattack.py), version
standard: its four attacks in turn, each on the images that are left, which is the published number. Every
verdict is the eager network's, in fp32 without TF32, BN in eval mode. Killed, the same command continues,
with the same result, on a CPU with as many threads bit for bit.
"""
import argparse
import functools
import os
import sys
import time

import torch
import torch.nn.functional as F

import data
import models
from attacks import attack_mode, cw_margin, farthest, pgd
from models import bn_branch
from support import audit, autoattack, checkpoint, evaluation, files, refusals, shards, summary
from support.autoattack import FAST, PARTS
from support.checkpoint import fingerprint
from support.describe import environment
from support.estimate import estimate
from support.evaluation import DEFAULT

# -----------------------------------------------------------------------------
# flags
parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
refusals.one_line(parser)
files.plain_output()
parser.add_argument('checkpoint')

arg = parser.add_argument_group('data and attack, pixels (0..255)').add_argument
arg('--dataset', help=f'{" ".join(data.DATASETS)}, or the NAME of DIR/NAME.npz')
arg('--data-dir', metavar='DIR')
arg('--eps', type=float, help="default: the training's or the dataset's, CIFAR's 8; of L2 128, the usual 0.5")
arg('--step-size', type=float, help='default: eps / 4')
arg('--norm', choices=['Linf', 'L2'])
arg('--n', type=int, help='the first N test images (default: all)')
arg('--draw', action='store_true', help='N test images drawn with --seed instead')

arg = parser.add_argument_group('third-party weights').add_argument
arg('--model', help=f'{models.NAMES}, or FILE.py:FUNCTION that returns the network')
arg('--width', type=int, help="channels of the first layer (default: the paper's)")
arg('--mean', type=float, nargs='+', metavar='M',
    help='of the normalisation it was trained with, one a channel, in [0, 1] (default: none)')
arg('--std', type=float, nargs='+', metavar='S')
arg('--activation', choices=models.ACTIVATIONS,
    help="default: relu. Or another than the checkpoint's: relu attacks a hybrid with ReLU's own gradients")

arg = parser.add_argument_group('attacks').add_argument
arg('--attacks', nargs='+', metavar='NAME',
    choices=[*DEFAULT, 'aa-fast', *PARTS, 'pgd-trades', 'weak', 'strong'],
    help=f'{" ".join(DEFAULT)} (the default); aa-fast: its first two parts; a part alone: {" ".join(PARTS)}; '
         "pgd-trades: PGD-20 with TRADES' step, 0.003 of the range; weak, strong: of Dallaire & David, PGD "
         'of 2 steps from x, eps 0.1 and step 2/255, eps 0.5 and step 0.5, in units of [0, 1]')
arg('--steps', type=int, default=20, help='of pgd, cw')
arg('--restarts', type=int, default=1, help='of pgd, cw: starts per image')
arg('--transfer-from', metavar='PT', help='also PGD, on CE and on the margin, crafted on this network')
arg('--transfer-model', help='its architecture, where the file holds weights only (default: --model)')
arg('--transfer-width', type=int, help='its first layer (default: --width)')
arg('--sweep-eps', nargs='+', type=float, default=[], metavar='EPS',
    help='also PGD at each of these, in pixels, the step in proportion')
arg('--sweep-steps', nargs='+', type=int, default=[], metavar='K',
    help='also PGD of each of these numbers of steps')
arg('--individual', action='store_true', help='also the accuracy under each part of AutoAttack alone')
arg('--branch', choices=['main', 'aux'], help='of dual BN (default: as validated in training)')
arg('--no-audit', dest='audit', action='store_false', help='skip the masking audit, of 100 images')

arg = parser.add_argument_group('machine and report').add_argument
arg('--dry-run', action='store_true', help='say what would be evaluated, and how long it takes')
arg('--seed', type=int, default=0)
arg('--batch-size', type=int,
    help='default: 250, on a CPU 50, fewer if the images are large; AutoAttack draws its noise per batch')
arg('--compile', action='store_true', help='attack the compiled network: faster after a minute')
arg('--fast', action='store_true', help='--compile, BN folded, AutoAttack in bf16 first where that is native')
arg('--shard', default='0/1', metavar='I/N', help='process I, from 0, of N that share the work and a folder')
arg('--save-adv', metavar='PT',
    help="keep every image's worst x_adv within eps, float32; on the way, as much disk per attack")
arg('--verify', metavar='PT', help='what --save-adv kept, judged again; alone: no attack')
arg('--figures', action='store_true', help='draw the report (tools/figures.py)')
arg('--out', metavar='JSON', help='default: beside the checkpoint')
args = parser.parse_args()

# -----------------------------------------------------------------------------
# device, network, images; wrong input is refused
device = evaluation.exact_device()
run, shard = evaluation.resolve(args, checkpoint.read(args.checkpoint))
d = data.load(args.dataset, args.data_dir, device=device, training=False)
model, meta, source = evaluation.networks(args, run, d, device)
adv = checkpoint.read(args.verify) if args.verify else None
x_test, y_test, which, digest = evaluation.images(args, d, device)
refusals.radius(args.norm, [args.eps, *args.sweep_eps], x_test)
notes = evaluation.remarks(args, meta, d, y_test)       # what a reader of the number should know
args.batch_size = args.batch_size or data.at_once(50 if device.type == 'cpu' else 250, d.x_test)
args.out = args.out or evaluation.report_path(args, model.build_args['dual_bn'])
if args.save_adv and os.path.realpath(args.save_adv) == os.path.realpath(args.out):
    refusals.refuse(f'--save-adv {args.save_adv}: the report goes there, name another file')
shards.unfinished(args.out, 'out')
shards.unfinished(args.save_adv, 'save-adv', args.out)

# the network that the attacks search on; with --compile and --fast it is not the eager one
net, half, search = evaluation.searched(args, model, device)
weights = fingerprint(model)
x_first, y_first = x_test[:args.batch_size], y_test[:args.batch_size].to(device)
with attack_mode(model), bn_branch(model, args.branch):
    inspected = summary.inspect(model, x_first, y_first, d.classes)
inspected['moves'] = fingerprint(model) != weights

# what the number depends on
evaluated = dict(images=f'{args.n}: {digest}', norm=args.norm, eps=args.eps, step_size=args.step_size,
                 steps=args.steps, restarts=args.restarts, batch_size=args.batch_size, seed=args.seed,
                 branch=args.branch, weights=weights, code=model.build_args.get('code'),
                 transfer_from=source and fingerprint(source),
                 transfer_code=source and source.build_args.get('code'), search=search, precision='float32',
                 save_adv=bool(args.save_adv), **dict(environment(device), device=device.type))
x_adv = adv and evaluation.load_adv(args.verify, adv, evaluated, x_test)

# -----------------------------------------------------------------------------
# attacks. Each takes x (B,C,H,W) and y (B,), all classified correctly, and returns x_adv;
# a part of AutoAttack also how many of them it says it broke, and its warnings
eps, step_size = args.eps / 255, args.step_size / 255       # in units of [0, 1]
RADIUS = {'weak': 0.1, 'strong': 0.5}                       # of the others: eps

def attack_pgd(x, y, net=net, eps=eps, step_size=step_size, steps=args.steps, init='uniform'):
    def objective(x_adv):
        return F.cross_entropy(net(x_adv), y, reduction='none')

    return pgd(objective, x, eps=eps, step_size=step_size, steps=steps, init=init, norm=args.norm)

def attack_cw(x, y, net=net):
    def objective(x_adv):
        return cw_margin(net(x_adv), y)

    return pgd(objective, x, eps=eps, step_size=step_size, steps=args.steps, norm=args.norm)

def attack_part(x, y, part, half=False):
    def logits(x):              # x stays in fp32: a bf16 pixel is too coarse for eps
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return net(x).float()

    if args.compile:
        logits(x)               # AutoAttack would take a compilation during its run for a dynamic defense
    return autoattack.one_part(part, logits, x, y, eps=eps, norm=args.norm, seed=args.seed, classes=d.classes)

ATTACKS = {
    'fgsm': functools.partial(attack_pgd, step_size=eps, steps=1, init='zero'),
    'pgd': attack_pgd,
    'cw': attack_cw,
    'pgd-trades': functools.partial(attack_pgd, step_size=0.003, steps=20),
    'weak': functools.partial(attack_pgd, eps=RADIUS['weak'], step_size=2 / 255, steps=2, init='zero'),
    'strong': functools.partial(attack_pgd, eps=RADIUS['strong'], step_size=0.5, steps=2, init='zero'),
    'transfer': functools.partial(attack_pgd, net=source),
    'transfer-cw': functools.partial(attack_cw, net=source),
}
for part in PARTS:
    ATTACKS[part] = functools.partial(attack_part, part=part, half=half)
    ATTACKS[f'{part} again'] = functools.partial(attack_part, part=part)        # in fp32

LABELS = {'pgd': f'pgd-{args.steps}', 'cw': f'cw-{args.steps}'}     # of their rows
todo = list(dict.fromkeys(args.attacks))
if source:
    todo += ['transfer', 'transfer-cw']
# after the last attack a row combines all those within eps; the sweeps are no part of it
attacks = set(todo) - {'clean'}
within = [name for name in attacks if RADIUS.get(name, eps) == eps]
last = todo[-1] if within and len(attacks) > 1 else None
for e in args.sweep_eps:
    todo.append(f'pgd-{args.steps} at eps {e:g}')
    RADIUS[todo[-1]] = e / 255
    in_proportion = min(step_size * e / args.eps, farthest(x_test, args.norm))
    ATTACKS[todo[-1]] = functools.partial(attack_pgd, eps=e / 255, step_size=in_proportion)
for k in args.sweep_steps:
    todo.append(f'pgd-{k}')
    ATTACKS[todo[-1]] = functools.partial(attack_pgd, steps=k)

# -----------------------------------------------------------------------------
# for each attack, for each batch of those still right:
# from the disk or computed now, then judged

@torch.no_grad()
def classify(x):
    """(B,) the class of every image: the verdict."""
    logits = model(x)
    if not logits.isfinite().all():
        sys.exit(f'{args.checkpoint} returns non-finite logits under attack: nothing to evaluate')
    return logits.argmax(1).cpu()

def classify_all(x, what):
    return torch.cat([classify(xb) for _, xb in shards.progress(x.split(args.batch_size), what)])

def attacked(name, restart, k, i):
    """The k-th batch, images i (B,) -> what they are taken for, how far they went, what the attack says."""
    x, y = x_test[i], y_test[i].to(device)
    broken, warned = None, []
    torch.manual_seed(args.seed + 1000 * restart + k)
    x_adv = ATTACKS[name](x, y)
    if isinstance(x_adv, tuple):
        x_adv, broken, warned = x_adv

    radius = RADIUS.get(name, eps)
    moved = evaluation.distance(x_adv, x, args.norm).max().item()
    if not (moved <= radius * (1 + 1e-4) and 0 <= x_adv.min() and x_adv.max() <= 1):
        sys.exit(f'{name} left the ball or [0, 1] (moved by {255 * moved:.3f}/255): its result is invalid')
    kept = x_adv.cpu() if args.save_adv and radius == eps else None
    return dict(predicted=classify(x_adv), moved=moved, broken=broken, warned=warned, x_adv=kept)

def survivors(name, predicted, left):
    """Attacks the images left, (n,) bool -> what all are taken for then, (n,), and the largest step taken. Of
    all attacks together it keeps taken, x_worst, recount and aa_warnings, which begin below."""
    predicted, left = predicted.clone(), left.clone()
    moved = 0.0
    counts = recount.setdefault(name, dict(attack=0, here=0))
    for restart in range(args.restarts if name in ('pgd', 'cw') else 1):
        attack = functools.partial(attacked, name, restart)
        for i, batch in saved.batches(name, restart, left, args.batch_size, attack):
            predicted[i] = batch['predicted']
            left[i] = predicted[i] == y_test[i]
            moved = max(moved, batch['moved'])

            # the worst of all attacks within eps
            if RADIUS.get(name, eps) == eps:
                stood = taken[i] == y_test[i]
                taken[i[stood]] = predicted[i[stood]]
                if args.save_adv:
                    x_worst[i[stood]] = batch['x_adv'][stood]

            # does AutoAttack say what is found here?
            if batch['broken'] is not None:
                counts['attack'] += batch['broken']
                counts['here'] += (~left[i]).sum().item()
            aa_warnings.extend(w for w in batch['warned'] if w not in aa_warnings)
    return predicted, moved

def run_autoattack(parts, label):
    """The standard version, part by part on the images left; with --individual also each part on all."""
    predicted, before, after = clean, {}, {}
    begun = time.perf_counter()
    for name in parts:
        t0 = time.perf_counter()
        before[name] = predicted == y_test
        predicted, moved = survivors(name, predicted, before[name])
        after[name] = predicted
        row(f'  autoattack, after {name}', predicted, t0, moved)
    row(label, predicted, begun)
    for name in parts if args.individual else ():
        t0 = time.perf_counter()
        rest, moved = survivors(name, clean, (clean == y_test) & ~before[name])
        row(f'  {name} alone', torch.where(before[name], after[name], rest), t0, moved)

# -----------------------------------------------------------------------------
# report

def save(complete):
    trained = {k: v for k, v in meta.items() if k not in ('config', 'weights')}
    report = dict(checkpoint=args.checkpoint, fingerprint=weights, evaluated=evaluated,
                  model=model.build_args, weights=meta['weights'], trained=trained, dataset=args.dataset,
                  images=which, norm=args.norm, eps=eps, eps_pixels=args.eps, results=results, notes=notes,
                  flags=flags, audit=audited, complete=complete, args=vars(args), precision='float32',
                  search=search, **environment(device))
    if saved.mine(0):                                   # of several processes, one reports
        summary.write(args.out, report)

def row(name, predicted, begun, moved=None):
    """A line on the screen, and one more in the file."""
    accuracy = summary.accuracy(predicted, y_test, d.classes)
    accuracy.update(seconds=time.perf_counter() - begun, max_perturbation=moved and 255 * moved)
    results[name.strip()] = accuracy
    files.say(summary.line(name, **accuracy))
    save(complete=False)

def run_audit():
    checks = audit.checks(model, x_test[:100], y_test[:100].to(device), eps=eps, step_size=step_size,
                          norm=args.norm, seed=args.seed, transfer=source)
    shown = shards.progress(checks, 'masking audit', 'checks', len(audit.NAMES))
    return [check._asdict() for _, check in shown]

audits = args.audit and todo != ['clean'] and (eps < 1 or args.norm == 'L2')
shown = [LABELS.get(name, name) for name in (['masking audit'] if audits else []) + todo]
heading = summary.heading(args, model, weights, meta, inspected, which, device)
files.say(*heading, f'{", ".join(shown)}; search: {search}')
if args.dry_run:
    with attack_mode(model), bn_branch(model, args.branch):
        files.say(f'report: {args.out}', *estimate(args, audits, attack_pgd, net, x_first, y_first))
    sys.exit()

saved = shards.Saved(f'{args.out}.state', evaluated, shard)
if saved.mine(0):
    shards.reserve(args.save_adv, 'save-adv', args.out)
    shards.reserve(args.out, 'out')

training = dict(run, **meta)            # what is known of the network's
results, recount, flags = {}, {}, {}
aa_warnings, audited = [], []
with shards.guarded(args.out, args.batch_size), attack_mode(model), bn_branch(model, args.branch):
    if audits and saved.mine(0):
        checks = [audit.Check(**check) for check in saved.once('audit', run_audit)]
        files.say(audit.overall(checks), *audit.suspicious(checks))
        audited = audit.as_json(checks)

    files.say(summary.HEADER)
    started = time.perf_counter()
    clean = classify_all(x_test, 'clean')
    taken, x_worst = clean.clone(), x_test.cpu().clone() if args.save_adv else None
    row('clean', clean, started)
    doubt = summary.doubtful(results['clean'], training, evaluated)
    if doubt:                                   # the attacks may take hours
        files.say(f'note: {doubt}')
    if adv:
        begun = time.perf_counter()
        verified = torch.where(clean == y_test, classify_all(x_adv, 'verified'), clean)
        row('verified', verified, begun)
        if args.save_adv:
            x_worst[clean == y_test] = x_adv.cpu()[clean == y_test]
        taken = torch.where(taken == y_test, verified, taken)
    again = [f'{part} again' for part in FAST] if half else []      # on what the search in bf16 has left
    for name in todo:
        begun = time.perf_counter()
        label = LABELS.get(name, name)
        if name == 'autoattack':
            run_autoattack(PARTS + again, 'autoattack (worst case)')
        elif name == 'aa-fast':
            run_autoattack(FAST + again, 'aa-fast (two of the four attacks)')
        elif label not in results:
            predicted, moved = survivors(name, clean, clean == y_test)
            row(label, predicted, begun, moved)
        if name == last:
            row('all of the above' if len(within) == len(attacks) else f'all within eps {args.eps:g}',
                taken, started)

    flags = summary.flags(inspected, results, recount, aa_warnings, training, evaluated, adv, args.n)
    notes += [flag['text'] for flag in flags.values() if flag['text']]
    if half and 'autoattack' in todo:
        notes.append('searched in bf16 first: what withstands it met FAB and Square in bf16 only')
    files.say(*[f'note: {note}' for note in notes if note != doubt])
    if args.save_adv and saved.mine(0):
        files.save(args.save_adv, dict(x_adv=x_worst, robust=taken == y_test, evaluated=evaluated))
        files.say(args.save_adv)
    save(complete=True)

saved.leave()
if saved.mine(0):
    files.say(args.out)
if args.figures and saved.mine(0):
    try:
        from tools import figures                       # matplotlib, where it is asked for
        figures.draw(args.out, args.checkpoint, model=args.model)
    except (files.Refused, ValueError, OSError, ImportError) as e:
        sys.exit(f'no figures: {e}')                    # the report is there
