"""
Clean and robust accuracy of a checkpoint on the test set: a table, and one JSON beside the checkpoint.

$ python evaluate.py runs/cifar10-resnet18-logit_mse-beta0.2-s0/best.pt            # all, AutoAttack included
$ python evaluate.py runs/digits-resnet18-w8-logit_mse-beta0.2-s0/best.pt --n 100  # the first 100 images
$ python evaluate.py model_test.pt --model resnet18 --dataset cifar10              # somebody else's weights
$ python evaluate.py other.pt --model net.py:make --dataset cifar10                # ... and network
$ python evaluate.py runs/x/best.pt --shard 0/4                                    # one of four processes

fp32 without TF32, eager, BN in eval mode. An image counts as robust if it is classified correctly as it is
and after every attack of the row; those misclassified as they are are not attacked. AutoAttack is its
authors' (Croce & Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
Parameter-free Attacks"), version standard: its four attacks in turn, each on the images that are left,
which is the published number. Killed, the same command continues, with the same result (resumable.py).
"""
import argparse, hashlib, json, logging, math, os, re, sys, time

import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from tqdm import tqdm

import attacks, checkpoint, data, models
from attacks import attack_mode, cw_margin, fgsm, pgd
from checkpoint import fingerprint, load_checkpoint
from log import atomic, environment
from models import branch
from resumable import Saved

PARTS = ['apgd-ce', 'apgd-t', 'fab-t', 'square']        # of AutoAttack standard, in its order
FAST = PARTS[:2]                                        # by them nearly every image falls that falls at all
DEFAULT = ['clean', 'fgsm', 'pgd', 'cw', 'autoattack']

# -----------------------------------------------------------------------------
# arguments
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 allow_abbrev=False)
# one line, without the usage
parser.error = lambda message: parser.exit(2, f'{parser.prog}: error: {message}\n')
parser.add_argument('checkpoint')
data.add_args(parser, training=False); attacks.add_args(parser)
parser.set_defaults(dataset=None, data_dir=None, norm=None)         # ours say it themselves
g = parser.add_argument_group("somebody else's weights")
g.add_argument('--model', help=f'{models.NAMES}, or FILE.py:FUNCTION that returns the network')
g.add_argument('--width', type=int, help="channels of the first layer (default: the paper's)")
g.add_argument('--mean', type=float, nargs=3,
               help='of the normalisation it was trained with, in [0, 1] (default: none)')
g.add_argument('--std', type=float, nargs=3)
g = parser.add_argument_group('evaluation')
g.add_argument('--branch', choices=['main', 'aux'], help='of dual BN (default: as validated in training)')
g.add_argument('--activation', choices=models.ACTIVATIONS,
               help="of foreign weights (default: relu), or another than the checkpoint's: relu attacks "
                    "a hybrid with ReLU's own gradients")
g.add_argument('--attacks', nargs='+', default=DEFAULT,
               choices=[*DEFAULT, 'aa-fast', *PARTS], metavar='NAME',
               help=f'{" ".join(DEFAULT)}; aa-fast: its first two parts; or a part alone: {" ".join(PARTS)}')
g.add_argument('--n', type=int, help='the first N test images (default: all)')
g.add_argument('--steps', type=int, default=20, help='of pgd and cw')
g.add_argument('--restarts', type=int, default=1, help='of pgd and cw')
g.add_argument('--individual', action='store_true',
               help='run every part of AutoAttack also on the images that the parts before it broke: '
                    'its accuracy alone')
g.add_argument('--batch-size', type=int, default=250 if torch.cuda.is_available() else 50,
               help='default: 250, on a CPU 50, which its cache holds; AutoAttack draws its noise per batch')
g.add_argument('--compile', action='store_true',
               help='faster after a minute: the attacks search on the compiled network, the verdict is eager')
g.add_argument('--seed', type=int, default=0)
g.add_argument('--shard', default='0/1', metavar='I/N',
               help='the I-th of N processes that evaluate together; they have to see one folder')
g.add_argument('--out', metavar='JSON', help='default: beside the checkpoint')
args = parser.parse_args()

# -----------------------------------------------------------------------------
# device, model, data: everything that can be wrong with the input is wrong here, before any work
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
torch.set_float32_matmul_precision('highest')
torch.backends.cudnn.allow_tf32 = False
notes = []                                              # what a reader of the number should know
try:
    for flag in ('steps', 'restarts', 'batch_size'):
        if getattr(args, flag) < 1:
            raise ValueError(f'--{flag.replace("_", "-")} {getattr(args, flag)}: at least 1')
    shard = re.fullmatch(r'(\d+)/(\d+)', args.shard)
    shard = shard and (int(shard[1]), int(shard[2]))
    if not shard or shard[0] >= shard[1]:
        raise ValueError(f'--shard {args.shard}: I/N with I from 0 to N-1')
    ckpt = checkpoint.read(args.checkpoint)
    ours = checkpoint.is_ours(ckpt)
    if ours and (args.model or args.width or args.mean):
        raise ValueError(f'{args.checkpoint} says itself what it is: drop --model, --width, --mean and --std')
    if (args.mean is None) != (args.std is None):
        raise ValueError('--mean and --std go together')
    run = ckpt.get('run', {}) if ours else {}
    args.dataset = args.dataset or run.get('dataset', 'cifar10')
    args.data_dir = args.data_dir or run.get('data_dir', 'data')
    args.norm = args.norm or run.get('norm', 'Linf')
    args.eps = run.get('eps') if args.eps is None else args.eps
    attacks.resolve_args(args, data.row(args.dataset, args.data_dir)['eps'])
    if args.model and '.py:' in args.model and (args.width or args.mean or args.activation):
        raise ValueError(f'{args.model} makes the whole network: '
                         'drop --width, --mean, --std and --activation')
    if not ours and args.model is None:
        raise ValueError(f'{args.checkpoint} holds weights only: '
                         'name their architecture with --model (and --width)')
    d = data.load(args.dataset, args.data_dir, device=device)
    model, meta = load_checkpoint(args.checkpoint, args.model, d.classes,
                                  width=args.width, mean=args.mean, std=args.std,
                                  activation=args.activation or 'relu')
    if args.branch and not model.config['dual_bn']:
        raise ValueError(f'--branch {args.branch}: {args.checkpoint} has no dual BN')
    args.branch = args.branch or run.get('eval_branch', 'main')
    if args.activation and args.activation != model.config['activation']:
        notes.append(f'{model.config["activation"]} in the checkpoint, evaluated with {args.activation}')
        weights = model.state_dict()
        model = models.build(**dict(model.config, activation=args.activation)).eval()
        model.load_state_dict(weights)
    if model.config['num_classes'] != d.classes:
        raise ValueError(f'{args.checkpoint} knows {model.config["num_classes"]} classes, '
                         f'{args.dataset} has {d.classes}')
    if d.classes < 4 and {'autoattack', *PARTS} & set(args.attacks):
        raise ValueError('AutoAttack needs four classes (its targeted DLR loss does), '
                         f'{args.dataset} has {d.classes}; choose others with --attacks')
    n = args.n if args.n is not None else len(d.y_test)
    if not 1 <= n <= len(d.y_test):
        raise ValueError(f'--n {n}: {args.dataset} has {len(d.y_test)} test images')
    tag = '' if args.attacks == DEFAULT else '-' + '+'.join(args.attacks)
    tag += ''.join(f'-{v}' for v in (args.activation, args.branch if model.config['dual_bn'] else None) if v)
    args.out = args.out or (f'{os.path.splitext(args.checkpoint)[0]}.eval-'
                            f'{args.norm}-{args.eps:g}-n{n}{tag}.json')
    if os.path.exists(args.out) and '"complete": false' not in open(args.out).read():
        raise ValueError(f'{args.out} is there already: choose another --out, or delete it')
    x_test, y_test = data.to_float(d.x_test[:n]), d.y_test[:n]
    images = hashlib.sha256(d.x_test[:n].cpu().numpy().tobytes() + y_test.cpu().numpy().tobytes())
    saved = Saved(f'{args.out}.state', dict(
        {k: getattr(args, k) for k in ('norm', 'eps', 'step_size', 'steps', 'restarts', 'batch_size', 'seed',
                                       'branch', 'compile')},
        weights=fingerprint(model), images=f'{n}: {images.hexdigest()[:16]}', precision='float32',
        **dict(environment(device), device=device.type)), shard)
    if saved.mine(0):           # hours of AutoAttack end in this file: it has to be writable
        with atomic(args.out) as tmp, open(tmp, 'w') as f:
            f.write('{"complete": false}')
except ValueError as e:
    parser.error(e)
except OSError as e:
    parser.error(f'cannot write {args.out}: {e.strerror}')
model = model.to(device, memory_format=models.layout(device))
attacked_net = torch.compile(model) if args.compile else model
eps, step_size = args.eps / 255, args.step_size / 255

# -----------------------------------------------------------------------------
# attacks: each takes a batch of images that are classified correctly and returns x_adv

def ce(x, y):
    return lambda x_adv: F.cross_entropy(attacked_net(x_adv), y, reduction='none')

def margin(x, y):
    return lambda x_adv: cw_margin(attacked_net(x_adv), y)

def iterated(objective):
    settings = dict(eps=eps, step_size=step_size, steps=args.steps, norm=args.norm)
    return lambda x, y: pgd(objective(x, y), x, **settings)

def part(name):
    """One of AutoAttack's four, as its version standard runs it on one batch."""
    # it takes views of x and of its gradient, which channels_last memory refuses: contiguous
    # outside, any layout inside
    predict = lambda x: attacked_net(x.flatten(1).view(x.shape).contiguous(memory_format=models.layout(device)))
    def attack(x, y):
        aa = AutoAttack(predict, norm=args.norm, eps=eps, seed=args.seed, version='standard', device=device)
        aa.attacks_to_run = [name]
        aa.apgd_targeted.n_target_classes = aa.fab.n_target_classes = min(9, d.classes - 1)
        return aa.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))[0]
    return attack

ATTACKS = dict(fgsm=lambda x, y: fgsm(ce(x, y), x, eps=eps, norm=args.norm),
               pgd=iterated(ce), cw=iterated(margin), **{name: part(name) for name in PARTS})

warned = []
class Warnings(logging.Handler):
    """AutoAttack's own warnings (randomised, zero gradients, Square wins) belong in the report."""
    def emit(self, record):
        warned.append(record.getMessage())
logging.getLogger('auto-attack').addHandler(Warnings(logging.WARNING))
logging.getLogger('auto-attack').propagate = False

@torch.no_grad()
def correct(x, y):
    """(n,) bool: x is classified as y."""
    return torch.cat([model(xb).argmax(1) == yb
                      for xb, yb in zip(x.split(args.batch_size), y.split(args.batch_size))])

def attacked(name, x, y, seed):
    """One batch -> which of it are still classified correctly, how far x went, what AutoAttack warned of."""
    torch.manual_seed(seed)
    warned.clear()
    x_adv = ATTACKS[name](x, y)
    delta = (x_adv - x).flatten(1)
    moved = (delta.abs().amax() if args.norm == 'Linf' else delta.norm(dim=1).max()).item()
    if not (moved <= eps * (1 + 1e-4) and 0 <= x_adv.min() and x_adv.max() <= 1):
        sys.exit(f'{name} left the ball or [0, 1] (moved by {255 * moved:.3f}/255): '
                 'its result is worth nothing')
    return dict(robust=correct(x_adv, y), moved=moved, warned=list(warned))     # recounted, whatever it says

def survivors(name, alive):
    """(n,) bool: which of the alive images withstand the attack; the others are not attacked.
    Also the largest step taken."""
    still, moved = alive.clone(), 0.0
    for restart in range(args.restarts if name in ('pgd', 'cw') else 1):
        index = still.nonzero()[:, 0]
        batches = index.split(args.batch_size) if len(index) else []
        keys = [f'{name}-{restart}-{k}-{hashlib.sha256(i.cpu().numpy().tobytes()).hexdigest()[:12]}'
                for k, i in enumerate(batches)]
        for k, i in enumerate(tqdm(batches, desc=name, leave=False, disable=None)):
            if saved.mine(k):
                seed = args.seed + 1000 * restart + k
                saved.compute(keys[k], lambda: attacked(name, x_test[i], y_test[i], seed))
        for k, i in enumerate(batches):
            batch = saved.read(keys[k])
            still[i], moved = batch['robust'].to(device), max(moved, batch['moved'])
            notes.extend(note for note in batch['warned'] if note not in notes)
    return still, moved

# -----------------------------------------------------------------------------
# report

def summary(mask):
    """Accuracy in percent with a 95 % Wilson interval, and per class with mean, standard
    deviation and worst."""
    k, z = mask.sum().item(), 1.96
    centre, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    per_class = {int(c): 100 * mask[y_test == c].float().mean().item() for c in y_test.unique()}
    values = torch.tensor(list(per_class.values()), dtype=torch.float64)
    return dict(accuracy=100 * k / n, correct=k, n=n, interval=[100 * (centre - half), 100 * (centre + half)],
                per_class=per_class, robust=''.join('01'[b] for b in mask.tolist()),
                class_mean=values.mean().item(),
                class_std=values.std(correction=0).item(), class_worst=min(per_class, key=per_class.get))

def save(complete):
    report = dict(checkpoint=args.checkpoint, fingerprint=fingerprint(model), model=model.config,
                  trained={k: v for k, v in meta.items() if k != 'config'}, dataset=args.dataset,
                  images=f'first {n} of {len(d.y_test)} test images', norm=args.norm, eps=eps,
                  eps_pixels=args.eps, results=results, notes=notes, complete=complete, args=vars(args),
                  precision='float32', **environment(device))
    if saved.mine(0):                                   # of several processes, one reports
        with atomic(args.out) as tmp, open(tmp, 'w') as f:
            json.dump(report, f, indent=1)

def report(row, mask, seconds, moved=None):
    """One line on the screen; the file holds everything so far."""
    s = results[row.strip()] = dict(summary(mask), seconds=seconds, max_perturbation=moved and 255 * moved)
    low, high = s['interval']
    print(f"{row:<28}{s['accuracy']:8.2f}   {low:6.2f} - {high:6.2f}{s['class_mean']:10.2f}"
          f"{s['class_std']:8.2f}{s['per_class'][s['class_worst']]:8.2f} ({s['class_worst']}){seconds:10.0f}",
          flush=True)
    save(complete=False)

def autoattack(clean, parts=PARTS, row='autoattack (worst case)'):
    """The standard version, part by part on the images left; with --individual also each
    part on all. (n,) bool."""
    alive, before, after = clean, {}, {}
    t0 = time.perf_counter()
    for name in parts:
        t1, before[name] = time.perf_counter(), alive
        alive, moved = survivors(name, alive)
        after[name] = alive
        report(f'  autoattack, after {name}', alive, time.perf_counter() - t1, moved)
    broken = int((before['square'] & ~alive).sum()) if 'square' in parts else 0
    if broken > 0.002 * n:                      # the authors' own check, which needs all parts in one call
        notes.append(f'Square broke {broken} images that had withstood the gradients: is something masked?')
    report(row, alive, time.perf_counter() - t0)
    for name in parts if args.individual else ():
        t1 = time.perf_counter()
        rest, moved = survivors(name, clean & ~before[name])
        report(f'  {name} alone', rest | after[name], time.perf_counter() - t1, moved)
    return alive

where = (f'epoch {meta.get("epoch")}, selected by {meta.get("selected_by")}' if meta else
         'weights only, provenance unknown')
print(f'{args.checkpoint} ({fingerprint(model)}): {model.config["name"]}, {where}')
print(f'{args.dataset}, the first {n} of {len(d.y_test)} test images; '
      f'{args.norm} eps {args.eps:g}/255 = {eps:.5f}; fp32 on {device.type}'
      + f'; {args.branch} BN' * model.config['dual_bn'])
with torch.no_grad():
    logits = model(x_test[:args.batch_size])
    if logits.shape != (len(x_test[:args.batch_size]), d.classes):
        sys.exit(f'{args.checkpoint} returns {tuple(logits.shape)}, not {d.classes} logits per image')
    if not logits.isfinite().all():
        sys.exit(f'{args.checkpoint} returns non-finite logits on clean images: nothing to evaluate')
print(f"{'accuracy in percent':<28}{'all':>8}   {'95 % interval':>15}{'classes':>10}{'std':>8}"
      f"{'worst':>12}{'seconds':>10}")
torch.manual_seed(args.seed)
results, started = {}, time.perf_counter()
try:
    with attack_mode(model), branch(model, args.branch):
        clean = correct(x_test, y_test)
        report('clean', clean, time.perf_counter() - started)
        worst = clean
        for name in args.attacks:
            t0 = time.perf_counter()
            if name == 'autoattack':
                worst = worst & autoattack(clean)
            elif name == 'aa-fast':
                worst = worst & autoattack(clean, FAST, 'aa-fast (two of the four attacks)')
            elif name != 'clean':
                mask, moved = survivors(name, clean)
                report(f'{name}-{args.steps}' if name in ('pgd', 'cw') else name, mask,
                       time.perf_counter() - t0, moved)
                worst = worst & mask
        if len(args.attacks) > 2:
            report('all of the above', worst, time.perf_counter() - started)
except KeyboardInterrupt:
    sys.exit(f'\nstopped; {args.out} holds the rows above, and the same command continues')

accuracy = {name: r['accuracy'] for name, r in results.items()}
if {f'pgd-{args.steps}', 'autoattack (worst case)'} <= set(results):
    notes.append(f"PGD-{args.steps} is "
                 f"{accuracy[f'pgd-{args.steps}'] - accuracy['autoattack (worst case)']:.2f} "
                 "points above AutoAttack")
if abs(meta.get('val_clean', accuracy['clean']) - accuracy['clean']) > max(10, 300 / math.sqrt(n)):
    notes.append(f"clean accuracy is {accuracy['clean']:.1f} here and was {meta['val_clean']:.1f} "
                 "on the hold-out in training")
if (run.get('norm', args.norm), run.get('eps', args.eps)) != (args.norm, args.eps):
    notes.append(f"trained against {run['norm']} {run['eps']:g}/255, "
                 f"attacked with {args.norm} {args.eps:g}/255")
if n < 10000:
    notes.append(f'{n} images: not comparable with a leaderboard, mind the interval')
for note in notes:
    print(f'note: {note}')
save(complete=True)
if shard[1] == 1:
    saved.delete()
print(args.out)
