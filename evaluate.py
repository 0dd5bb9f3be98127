"""
Clean and robust accuracy of a checkpoint on the test set: a table, and one JSON beside the checkpoint.

$ python evaluate.py runs/cifar10-resnet18-logit_mse-beta0.2-s0/best.pt            # all, AutoAttack included
$ python evaluate.py runs/digits-resnet18-w8-logit_mse-beta0.2-s0/best.pt --n 100  # the first 100 images
$ python evaluate.py model_test.pt --model resnet18 --dataset cifar10              # somebody else's weights
$ python evaluate.py other.pt --model net.py:make --dataset cifar10                # ... and network
$ python evaluate.py runs/x/best.pt --shard 0/4                                    # one of four processes
$ python evaluate.py runs/x/best.pt --attacks pgd --sweep-eps 0 2 4 8 16 --sweep-steps 10 50 --save-adv adv.pt
$ python evaluate.py runs/x/best.pt --verify adv.pt                                # ... checked again

fp32 without TF32, eager, BN in eval mode. An image counts as robust if it is classified correctly as it is
and after every attack of the row; those misclassified as they are are not attacked. AutoAttack is its
authors' (support/autoattack.py), version standard: its four attacks in turn, each on the images that are left, which
is the published number. Killed, the same command continues, with the same result (support/shards.py).
With --fast the attacks search on the compiled network, its BN folded into its convolutions, AutoAttack in
bf16 where the GPU has it; its first two attacks then go on in fp32 with what is left. Every verdict is the
eager network's, in fp32.
"""
import argparse
import functools
import hashlib
import math
import os
import sys
import time
from typing import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
import models
from attacks import attack_mode, cw_margin, fgsm, pgd
from models import bn_branch
from support import audit, autoattack, checkpoint, evaluation, files, imagenet, refusals, shards
from support.autoattack import FAST, PARTS
from support.checkpoint import fingerprint, load_checkpoint
from support.evaluation import DEFAULT
from support.refusals import refuse
from support.describe import environment

# -----------------------------------------------------------------------------
# flags
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 allow_abbrev=False)
refusals.one_line(parser)
files.plain_output()
parser.add_argument('checkpoint')

arg = parser.add_argument_group('data and attack, in pixels (0..255); a checkpoint of ours says it itself').add_argument
arg('--dataset', help=f'{" ".join(data.DATASETS)}, or the NAME of DIR/NAME.npz')
arg('--data-dir', metavar='DIR')
arg('--eps', type=float, help="radius (default: the dataset's, 8 for CIFAR; of --norm L2 128, the usual 0.5)")
arg('--step-size', type=float, help='default: eps / 4')
arg('--norm', choices=['Linf', 'L2'])
arg('--n', type=int, help='the first N test images (default: all)')
arg('--draw', action='store_true', help='N test images drawn with --seed instead of the first N')

arg = parser.add_argument_group("somebody else's weights").add_argument
arg('--model', help=f'{models.NAMES}, or FILE.py:FUNCTION that returns the network')
arg('--width', type=int, help="channels of the first layer (default: the paper's)")
arg('--mean', type=float, nargs='+', metavar='M',
    help='of the normalisation it was trained with, one a channel, in [0, 1] (default: none)')
arg('--std', type=float, nargs='+', metavar='S')
arg('--activation', choices=models.ACTIVATIONS,
    help="of foreign weights (default: relu), or another than the checkpoint's: relu attacks a hybrid with ReLU's own "
         'gradients')

arg = parser.add_argument_group('attacks').add_argument
arg('--attacks', nargs='+', metavar='NAME', choices=[*DEFAULT, 'aa-fast', *PARTS, 'pgd-trades', 'weak', 'strong'],
    help=f'{" ".join(DEFAULT)} (the default); aa-fast: its first two parts; or a part alone: {" ".join(PARTS)}; '
         "pgd-trades: PGD-20 with TRADES' step, 0.003 of the range; weak, strong: Dallaire et al.'s, PGD of 2 steps "
         'from x, eps 0.1 and step 2/255, eps 0.5 and step 0.5, in units of [0, 1]')
arg('--steps', type=int, default=20, help='of pgd and cw')
arg('--restarts', type=int, default=1, help='of pgd and cw')
arg('--transfer-from', metavar='PT', help='also PGD, on CE and on the margin, crafted on this network')
arg('--transfer-model', help='its architecture, where the file holds weights only (default: --model)')
arg('--transfer-width', type=int, help='its first layer (default: --width)')
arg('--sweep-eps', nargs='+', type=float, default=[], metavar='EPS',
    help='also PGD at each of these, in pixels, the step in proportion')
arg('--sweep-steps', nargs='+', type=int, default=[], metavar='K', help='also PGD of so many')
arg('--individual', action='store_true',
    help='run every part of AutoAttack also on the images that the parts before it broke: its accuracy alone')
arg('--branch', choices=['main', 'aux'], help='of dual BN (default: as validated in training)')
arg('--no-audit', dest='audit', action='store_false',
    help='skip the search for masked gradients on the first 100 images')

arg = parser.add_argument_group('machine and report').add_argument
arg('--seed', type=int, default=0)
arg('--batch-size', type=int, help='default: 250, on a CPU 50, which its cache holds, fewer if they are large; '
                                   'AutoAttack draws its noise per batch')
arg('--compile', action='store_true',
    help='faster after a minute: the attacks search on the compiled network, the verdict is eager')
arg('--fast', action='store_true', help='--compile, BN folded, and AutoAttack in bf16 first, on a GPU that has it')
arg('--shard', default='0/1', metavar='I/N',
    help='the I-th of N processes that evaluate together; they have to see one folder')
arg('--save-adv', metavar='PT',
    help="keep every image's worst x_adv within eps, float32; on the way, as much disk per attack")
arg('--verify', metavar='PT', help='what --save-adv kept, judged again; alone: no attack')
arg('--figures', action='store_true', help='draw the report (tools/figures.py)')
arg('--out', metavar='JSON', help='default: beside the checkpoint')
args = parser.parse_args()

# -----------------------------------------------------------------------------
# device, data, models. Everything that can be wrong with the input is wrong here, before any work
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
torch.set_float32_matmul_precision('highest')
torch.backends.cudnn.allow_tf32 = False
notes, flags = [], {}       # what a reader of the number should know, in words and as data
run, shard = evaluation.resolve(args, checkpoint.read(args.checkpoint))
d = data.load(args.dataset, args.data_dir, device=device, training=False)
args.batch_size = args.batch_size or data.at_once(250 if device.type == 'cuda' else 50, d.x_test)

evaluation.check_normalisation(args, d.x_test.shape[-1])
foreign = dict(width=args.width, mean=args.mean, std=args.std, activation=args.activation or 'relu',
               channels=d.x_test.shape[-1])
model, meta = load_checkpoint(args.checkpoint, args.model, d.classes, **foreign)
source = None
if args.transfer_from:
    foreign['width'] = args.transfer_width or (None if args.transfer_model else args.width)
    source, _ = load_checkpoint(args.transfer_from, args.transfer_model or args.model, d.classes,
                                flag='--transfer-model', **foreign)
if args.branch and not model.config['dual_bn']:
    refuse(f'--branch {args.branch}: {args.checkpoint} has no dual BN')
args.branch = args.branch or run.get('eval_branch', 'main')
if args.activation and args.activation != model.config['activation']:
    notes.append(f'{model.config["activation"]} in the checkpoint, evaluated with {args.activation}')
    weights = model.state_dict()
    model = models.build(**dict(model.config, activation=args.activation)).eval()
    model.load_state_dict(weights)
if d.classes < 4 and {'autoattack', 'aa-fast', *PARTS} & set(args.attacks):
    refuse('AutoAttack needs four classes (its targeted DLR loss does), '
           f'{args.dataset} has {d.classes}; choose others with --attacks')
adv = checkpoint.read(args.verify) if args.verify else None

# images. Contiguous, and so the networks: somebody else's may take views, and fp32 wins nothing by channels_last
n = args.n or len(d.y_test)
if n > len(d.y_test):
    refuse(f'--n {n}: {args.dataset} has {len(d.y_test)} test images')
index, which = torch.arange(n), f'first {n} of {len(d.y_test)} test images'
if args.draw:
    generator = torch.Generator().manual_seed(args.seed)
    index = torch.randperm(len(d.y_test), generator=generator)[:n].sort().values
    which = f'{n} of {len(d.y_test)} test images, drawn with seed {args.seed}'
pixels = imagenet.in_memory(d.x_test[index.to(device)] if args.draw else d.x_test[:n], device)
x_test, y_test = data.to_float(pixels).contiguous(), d.y_test.cpu()[index]
evaluation.check_images(x_test, y_test, d.classes)
present = y_test.unique().tolist()
if len(present) < d.classes:
    shown = ' '.join(map(str, present[:20])) + (' ...' if len(present) > 20 else '')
    notes.append(f'these {n} images hold {len(present)} of {d.classes} classes ({shown})'
                 + ('' if args.draw or n == len(d.y_test) else ': --draw takes them at random'))

# where the report goes
rows = args.attacks + [name for name in ('transfer_from', 'sweep_eps', 'sweep_steps', 'verify', 'fast', 'draw')
                       if getattr(args, name)]
if not args.out:
    tag = '' if rows == DEFAULT else '-' + '+'.join(rows)
    tag += f'-{args.activation}' if args.activation else ''
    tag += f'-{args.branch}' if model.config['dual_bn'] else ''
    args.out = f'{os.path.splitext(args.checkpoint)[0]}.eval-{args.norm}-{args.eps:g}-n{n}{tag}.json'
shards.unfinished(args.out, 'out')
shards.unfinished(args.save_adv, 'save-adv')
model = model.to(device)
with attack_mode(model), bn_branch(model, args.branch):
    first = evaluation.inspect(model, x_test[:args.batch_size], y_test[:args.batch_size].to(device), d.classes)

# the network that the attacks search on; delete this block, and they search on the eager one
searched = model
if args.fast and '.py:' not in model.config['name']:        # of another network only its author knows
    with bn_branch(model, args.branch):
        searched = models.folded(model)
bf16 = args.fast and models.autocast_dtype('auto', device) is torch.bfloat16
search = f'{"bfloat16" if bf16 else "float32"}, {"compiled" if args.compile else "eager"}'
if searched is not model and not any(isinstance(m, torch.nn.BatchNorm2d) for m in searched.modules()):
    search += ', BN folded'
if bf16:
    search += f'; what is left, {" and ".join(FAST)} again in float32'
attacked_net = model
if args.compile:
    torch._dynamo.config.recompile_limit = 64       # with gradient or without, one image, any number
    attacked_net = torch.compile(searched)
if source:
    source = source.to(device).requires_grad_(False)

def half_net(x):
    if not bf16:
        return attacked_net(x)
    with torch.autocast(device.type, torch.bfloat16):       # x stays in fp32: a bf16 pixel is too coarse for eps
        return attacked_net(x).float()

# what the number depends on, and the folder of finished batches
images = hashlib.sha256(pixels.cpu().numpy().tobytes() + y_test.numpy().tobytes())
evaluated = {k: getattr(args, k) for k in ('norm', 'eps', 'step_size', 'steps', 'restarts', 'batch_size', 'seed',
                                           'branch')}
evaluated.update(weights=fingerprint(model), transfer_from=source and fingerprint(source), search=search,
                 images=f'{n}: {images.hexdigest()[:16]}', precision='float32', save_adv=bool(args.save_adv),
                 **dict(environment(device), device=device.type))
del pixels
x_adv = adv and evaluation.load_adv(args.verify, adv, evaluated, x_test)
saved = shards.Saved(f'{args.out}.state', evaluated, shard)
for flag, path in (('out', args.out), ('save-adv', args.save_adv)):
    if path and saved.mine(0):
        shards.unfinished(path, flag)           # another evaluation may have ended while this one started
        shards.reserve(path)

# -----------------------------------------------------------------------------
# attacks. Each takes a batch of images that are classified correctly, x (B,C,H,W) and y (B,), and returns x_adv; a
# part of AutoAttack also how many of them it says it broke, and its warnings
eps, step_size = args.eps / 255, args.step_size / 255

def attack_fgsm(x, y):
    return fgsm(lambda x_adv: F.cross_entropy(attacked_net(x_adv), y, reduction='none'), x, eps=eps, norm=args.norm)

def attack_pgd(x, y, net=attacked_net, eps=eps, step_size=step_size, steps=args.steps, init='uniform'):
    objective = lambda x_adv: F.cross_entropy(net(x_adv), y, reduction='none')
    return pgd(objective, x, eps=eps, step_size=step_size, steps=steps, init=init, norm=args.norm)

def attack_cw(x, y, net=attacked_net):
    objective = lambda x_adv: cw_margin(net(x_adv), y)
    return pgd(objective, x, eps=eps, step_size=step_size, steps=args.steps, init='uniform', norm=args.norm)

def attack_pgd_trades(x, y):
    return attack_pgd(x, y, step_size=0.003, steps=20)

def attack_weak(x, y):
    return attack_pgd(x, y, eps=0.1, step_size=2 / 255, steps=2, init='zero')

def attack_strong(x, y):
    return attack_pgd(x, y, eps=0.5, step_size=0.5, steps=2, init='zero')

def attack_transfer(x, y):
    return attack_pgd(x, y, net=source)

def attack_transfer_cw(x, y):
    return attack_cw(x, y, net=source)

def attack_part(x, y, part, net):
    if args.compile:
        net(x)                              # compiling under its eyes looks to it like a dynamic defense
    return autoattack.one_part(part, net, x, y, eps=eps, norm=args.norm, seed=args.seed, classes=d.classes)

class Attack(NamedTuple):
    craft: Callable
    eps: float = eps            # in units of [0, 1]
    restarts: int = 1

ATTACKS = {'fgsm': Attack(attack_fgsm), 'pgd': Attack(attack_pgd, restarts=args.restarts),
           'cw': Attack(attack_cw, restarts=args.restarts), 'pgd-trades': Attack(attack_pgd_trades),
           'weak': Attack(attack_weak, eps=0.1), 'strong': Attack(attack_strong, eps=0.5),
           'transfer': Attack(attack_transfer), 'transfer-cw': Attack(attack_transfer_cw)}
for part in PARTS:
    ATTACKS[part] = Attack(functools.partial(attack_part, part=part, net=half_net))
    ATTACKS[f'{part} again'] = Attack(functools.partial(attack_part, part=part, net=attacked_net))
sweeps = []
for e in args.sweep_eps:
    sweeps.append(f'pgd-{args.steps} at eps {e:g}')
    at_e = functools.partial(attack_pgd, eps=e / 255, step_size=step_size * e / args.eps)
    ATTACKS[sweeps[-1]] = Attack(at_e, eps=e / 255)
for k in args.sweep_steps:
    sweeps.append(f'pgd-{k}')
    ATTACKS[sweeps[-1]] = Attack(functools.partial(attack_pgd, steps=k))

# -----------------------------------------------------------------------------
# the loop: for each attack, for each batch of the images that are still right: from disk or computed, then judged

@torch.no_grad()
def predict(x):
    """(n,) the class of every image; the verdict."""
    logits = torch.cat([model(xb) for xb in x.split(args.batch_size)])
    if not logits.isfinite().all():
        sys.exit(f'{args.checkpoint} returns non-finite logits under attack: nothing to evaluate')
    return logits.argmax(1)

def attacked(name, x, y, seed):
    """One batch -> what it is taken for, how far x went, what the attack says it broke and warned of."""
    torch.manual_seed(seed)
    attack, broken, warned = ATTACKS[name], None, []
    x_adv = attack.craft(x, y)
    if isinstance(x_adv, tuple):
        x_adv, broken, warned = x_adv
    moved = evaluation.distance(x_adv, x, args.norm).max().item()
    if not (moved <= attack.eps * (1 + 1e-4) and 0 <= x_adv.min() and x_adv.max() <= 1):
        sys.exit(f'{name} left the ball or [0, 1] (moved by {255 * moved:.3f}/255): its result is worth nothing')
    return dict(predicted=predict(x_adv).cpu(), moved=moved, broken=broken, warned=warned,
                x_adv=x_adv.cpu() if args.save_adv and attack.eps == eps else None)

def survivors(name, predicted, todo):
    """Attacks the images todo, (n,) bool -> (n,) what all are taken for afterwards, and the largest step taken."""
    attack, predicted, todo, moved = ATTACKS[name], predicted.clone(), todo.clone(), 0.0
    counts = recount.setdefault(name, dict(attack=0, here=0))
    for restart in range(attack.restarts):
        index = todo.nonzero()[:, 0]
        batches = index.split(args.batch_size) if len(index) else []
        keys = [f'{name}-{restart}-{k}-{hashlib.sha256(i.numpy().tobytes()).hexdigest()[:12]}'
                for k, i in enumerate(batches)]
        for k, i in shards.progress(batches, name):
            if saved.mine(k):
                seed = args.seed + 1000 * restart + k
                saved.compute(keys[k], lambda: attacked(name, x_test[i], y_test[i].to(device), seed))
        for key, i in zip(keys, batches):
            batch = saved.read(key)
            predicted[i], moved = batch['predicted'], max(moved, batch['moved'])
            todo[i] = predicted[i] == y_test[i]
            if attack.eps == eps:
                j = taken[i] == y_test[i]
                taken[i[j]] = predicted[i[j]]
                if args.save_adv:
                    x_worst[i[j]] = batch['x_adv'][j]
            if batch['broken'] is not None:
                counts['attack'] += batch['broken']
                counts['here'] += (~todo[i]).sum().item()
            aa_warnings.extend(w for w in batch['warned'] if w not in aa_warnings)
    return predicted, moved

# -----------------------------------------------------------------------------
# report

def save(complete):
    report = dict(checkpoint=args.checkpoint, fingerprint=fingerprint(model), evaluated=evaluated,
                  model=model.config, weights=meta['weights'],
                  trained={k: v for k, v in meta.items() if k not in ('config', 'weights')},
                  dataset=args.dataset, images=which, norm=args.norm,
                  eps=eps, eps_pixels=args.eps, results=results, notes=notes, flags=flags, audit=audited,
                  complete=complete, args=vars(args), precision='float32', search=search,
                  **environment(device))
    if saved.mine(0):                                   # of several processes, one reports
        evaluation.write(args.out, report)

def row(name, predicted, seconds, moved=None):
    """One line on the screen; the file holds everything so far."""
    s = results[name.strip()] = dict(evaluation.summary(predicted, y_test, d.classes), seconds=seconds,
                                     max_perturbation=moved and 255 * moved)
    files.say(evaluation.line(name, **s))
    save(complete=False)

def run_autoattack(parts, label):
    """The standard version, part by part on the images left; with --individual also each part on all."""
    alive, before, after, t0 = clean, {}, {}, time.perf_counter()
    for name in parts:
        t1, before[name] = time.perf_counter(), alive == y_test
        alive, moved = survivors(name, alive, before[name])
        after[name] = alive
        row(f'  autoattack, after {name}', alive, time.perf_counter() - t1, moved)
    row(label, alive, time.perf_counter() - t0)
    for name in parts if args.individual else ():
        t1 = time.perf_counter()
        rest, moved = survivors(name, clean, (clean == y_test) & ~before[name])
        row(f'  {name} alone', torch.where(before[name], after[name], rest), time.perf_counter() - t1, moved)

where = 'weights only, provenance unknown'
if 'epoch' in meta:
    where = f'epoch {meta.get("epoch")}, selected by {meta.get("selected_by")}'
branch = f'; {args.branch} BN' if model.config['dual_bn'] else ''
files.say(f'{args.checkpoint} ({fingerprint(model)}): {model.config["name"]}, {where}',
          f'{args.dataset}, {"" if args.draw else "the "}{which}; {args.norm} eps {args.eps:g}/255 = {eps:.5f}; '
          f'fp32 on {device.type}; search: {search}{branch}',
          'logits: norm {logit_norm:.2f}, margin {margin:.2f}, confidence {confidence:.3f}; '
          '{zero_gradient:.1%} of the gradient is exactly zero'.format(**first))
again = [f'{part} again' for part in FAST] if bf16 else []      # in fp32, on what the search in bf16 has left
stages = {'autoattack': (PARTS + again, 'autoattack (worst case)'),
          'aa-fast': (FAST + again, 'aa-fast (two of the four attacks)')}
within = args.attacks + (['transfer', 'transfer-cw'] if source else [])
todo = within + sweeps
results, recount, aa_warnings, audited = {}, {}, [], []

def run_audit():
    checks = audit.checks(model, x_test[:100], y_test[:100].to(device), eps=eps, step_size=step_size, norm=args.norm,
                          seed=args.seed, transfer=source)
    shown = shards.progress(checks, 'masking audit', 'checks', len(audit.NAMES))
    return dict(checks=[list(check) for _, check in shown])

try:
    with attack_mode(model), bn_branch(model, args.branch):
        if args.audit and todo != ['clean'] and (eps < 1 or args.norm == 'L2') and saved.mine(0):
            saved.compute('audit', run_audit)
            checks = [audit.Check(*check) for check in saved.read('audit')['checks']]
            files.say(audit.overall(checks))
            for check in checks:
                audited.append(dict(check._asdict(), figure=check.figure if math.isfinite(check.figure) else None))
                if check.verdict == 'suspicious':
                    files.say(f'  {check.name}: {check.text}')
        files.say(evaluation.HEADER)
        started = time.perf_counter()
        clean = predict(x_test).cpu()
        taken, x_worst = clean.clone(), x_test.cpu().clone() if args.save_adv else None
        row('clean', clean, time.perf_counter() - started)
        if adv:
            verified = predict(x_adv).cpu()
            row('verified', verified, time.perf_counter() - started)
            taken = torch.where(taken == y_test, verified, taken)
        for name in todo:
            t0 = time.perf_counter()
            if name in stages:
                run_autoattack(*stages[name])
            elif name not in ('clean', *results):
                predicted, moved = survivors(name, clean, clean == y_test)
                row(f'{name}-{args.steps}' if name in ('pgd', 'cw') else name, predicted,
                    time.perf_counter() - t0, moved)
            if name == within[-1] and len(within) > 2:
                row('all of the above', taken, time.perf_counter() - started)
except KeyboardInterrupt:
    sys.exit(f'\nstopped; {args.out} holds the rows above, and the same command continues')

flags = evaluation.find_flags(first, results, recount, aa_warnings, dict(run, **meta), evaluated, adv, n)
notes += [flag['text'] for flag in flags.values() if flag['text']]
if bf16:
    notes.append('searched in bf16 first: what withstands it met FAB and Square in bf16 only')
files.say(*[f'note: {note}' for note in notes])
if args.save_adv and saved.mine(0):
    files.save(args.save_adv, dict(x_adv=x_worst, robust=taken == y_test, evaluated=evaluated))
    files.say(args.save_adv)
save(complete=True)
if shard[1] == 1:
    saved.delete()
files.say(args.out)
worst = taken == y_test                                 # for tests
if args.figures and saved.mine(0):
    from tools.figures import draw          # matplotlib, where it is asked for
    try:
        draw(args.out, args.checkpoint)
    except (files.Refused, ValueError, OSError) as e:
        sys.exit(f'no figures: {e}')
