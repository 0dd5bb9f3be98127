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
authors' (autoattack.py), version standard: its four attacks in turn, each on the images that are left, which
is the published number. Killed, the same command continues, with the same result (resumable.py).
With --fast the attacks search on the compiled network, its BN folded into its convolutions, AutoAttack in
bf16 where the GPU has it; its first two attacks then go on in fp32 with what is left. Every verdict is the
eager network's, in fp32.
"""
import argparse, hashlib, math, os, sys, time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data, models
from support import audit, checkpoint, evaluate_options, imagenet
from attacks import attack_mode, cw_margin, fgsm, pgd
from support.autoattack import COST, FAST, PARTS, one_part
from support.checkpoint import fingerprint, load_checkpoint
from support.evaluate_options import DEFAULT
from support.files import Refused, atomic
from support.runs import environment
from models import bn_branch
from support.report import HEADER, check_images, distance, find_flags, inspect, line, load_adv, summary, write
from support.resumable import Saved

UNFINISHED = '"complete": false'

# -----------------------------------------------------------------------------
# arguments
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 allow_abbrev=False)
# one line, without the usage
parser.error = lambda message: parser.exit(2, f'{parser.prog}: error: {message}\n')
parser.add_argument('checkpoint')
evaluate_options.add_args(parser)
args = parser.parse_args()

# -----------------------------------------------------------------------------
# device, model, data: everything that can be wrong with the input is wrong here, before any work
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
torch.set_float32_matmul_precision('highest')
torch.backends.cudnn.allow_tf32 = False
notes, flags = [], {}       # what a reader of the number should know, in words and as data
try:
    run, shard = evaluate_options.resolve(args, checkpoint.read(args.checkpoint))
    d = data.load(args.dataset, args.data_dir, device=device, training=False)
    args.batch_size = args.batch_size or data.at_once(250 if device.type == 'cuda' else 50, d.x_test)
    foreign = dict(width=args.width, mean=args.mean, std=args.std, activation=args.activation or 'relu')
    model, meta = load_checkpoint(args.checkpoint, args.model, d.classes, **foreign)
    source = args.transfer_from and load_checkpoint(args.transfer_from, args.model, d.classes, **foreign)[0]
    if args.branch and not model.config['dual_bn']:
        raise ValueError(f'--branch {args.branch}: {args.checkpoint} has no dual BN')
    args.branch = args.branch or run.get('eval_branch', 'main')
    if args.activation and args.activation != model.config['activation']:
        notes.append(f'{model.config["activation"]} in the checkpoint, evaluated with {args.activation}')
        weights = model.state_dict()
        model = models.build(**dict(model.config, activation=args.activation)).eval()
        model.load_state_dict(weights)
    if d.classes < 4 and {'autoattack', 'aa-fast', *PARTS} & set(args.attacks):
        raise ValueError('AutoAttack needs four classes (its targeted DLR loss does), '
                         f'{args.dataset} has {d.classes}; choose others with --attacks')
    adv = checkpoint.read(args.verify) if args.verify else None
    n = args.n if args.n is not None else len(d.y_test)
    if not 1 <= n <= len(d.y_test):
        raise ValueError(f'--n {n}: {args.dataset} has {len(d.y_test)} test images')
    rows = args.attacks + [name for name in ('transfer_from', 'sweep_eps', 'sweep_steps', 'verify', 'fast')
                           if getattr(args, name)]
    tag = '' if rows == DEFAULT else '-' + '+'.join(rows)
    tag += ''.join(f'-{v}' for v in (args.activation, args.branch if model.config['dual_bn'] else None) if v)
    args.out = args.out or (f'{os.path.splitext(args.checkpoint)[0]}.eval-'
                            f'{args.norm}-{args.eps:g}-n{n}{tag}.json')
    for name, path in [('out', args.out), ('save-adv', args.save_adv)]:
        if path and os.path.exists(path) and UNFINISHED.encode() not in open(path, 'rb').read():
            raise ValueError(f'{path} is there already: choose another --{name}, or delete it')
    pixels = imagenet.in_memory(d.x_test[:n], device)
    # contiguous, and so the networks: somebody else's may take views, and fp32 wins nothing by channels_last
    x_test, y_test = data.to_float(pixels).contiguous(), d.y_test[:n].cpu()
    check_images(x_test, y_test, d.classes)
    model = model.to(device)
    with attack_mode(model), bn_branch(model, args.branch):
        first = inspect(model, x_test[:args.batch_size], y_test[:args.batch_size].to(device), d.classes)
    searched = model
    if args.fast and '.py:' not in model.config['name']:        # of another network only its author knows
        with bn_branch(model, args.branch):
            searched = models.folded(model)
    bf16 = args.fast and models.autocast_dtype('auto', device) is torch.bfloat16
    search = f'{"bfloat16" if bf16 else "float32"}, {"compiled" if args.compile else "eager"}'
    layers = lambda net: sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    search += ', BN folded' * (layers(searched) < layers(model))
    search += f'; what is left, {" and ".join(FAST)} again in float32' if bf16 else ''
    images = hashlib.sha256(pixels.cpu().numpy().tobytes() + y_test.numpy().tobytes())
    del pixels
    evaluated = dict(
        {k: getattr(args, k) for k in ('norm', 'eps', 'step_size', 'steps', 'restarts', 'batch_size', 'seed',
                                       'branch')},
        weights=fingerprint(model), transfer_from=source and fingerprint(source), search=search,
        images=f'{n}: {images.hexdigest()[:16]}', precision='float32', save_adv=bool(args.save_adv),
        **dict(environment(device), device=device.type))
    x_adv = adv and load_adv(args.verify, adv, evaluated, x_test)
    saved = Saved(f'{args.out}.state', evaluated, shard)
    for path in filter(None, (args.out, args.save_adv)):        # hours of AutoAttack end in these files: they
        if saved.mine(0):                                       # have to be writable
            with atomic(path) as tmp, open(tmp, 'w') as f:
                f.write('{%s}' % UNFINISHED)
except (Refused, ValueError) as e:
    parser.error(e)
except OSError as e:
    parser.error(f'cannot write {e.filename or args.out}: {e.strerror}')
except KeyboardInterrupt:
    sys.exit('\nstopped before the first attack')
eps, step_size = args.eps / 255, args.step_size / 255
attacked_net = half_net = model
if args.compile:
    torch._dynamo.config.recompile_limit = 64       # with gradient or without, one image, any number
    attacked_net = half_net = torch.compile(searched)
if source:
    source = source.to(device).requires_grad_(False)
if bf16:                                                # x stays in fp32: a bf16 pixel is too coarse for eps
    def half_net(x):
        with torch.autocast(device.type, torch.bfloat16):
            return attacked_net(x).float()

# -----------------------------------------------------------------------------
# attacks: each takes a batch of images that are classified correctly and returns x_adv, how many of them it
# says it broke, if it says so, and its warnings

def ce(net, y):
    return lambda x_adv: F.cross_entropy(net(x_adv), y, reduction='none')

def margin(net, y):
    return lambda x_adv: cw_margin(net(x_adv), y)

def iterated(objective=ce, net=attacked_net, eps=eps, step_size=step_size, steps=args.steps, init='uniform'):
    settings = dict(eps=eps, step_size=step_size, steps=steps, init=init, norm=args.norm)
    return lambda x, y: (pgd(objective(net, y), x, **settings), None, [])

def part(name, net):
    def attack(x, y):
        if args.compile:
            net(x)                              # compiling under its eyes looks to it like a dynamic defense
        return one_part(name, net, x, y, eps=eps, norm=args.norm, seed=args.seed, classes=d.classes)
    return attack

# name -> attack, its eps, forward and backward passes per image as timed (for the time that is left)
SWEEPS = {**{f'pgd-{args.steps} at eps {e:g}': (iterated(eps=e / 255, step_size=step_size * e / args.eps),
                                                e / 255, args.steps) for e in args.sweep_eps},
          **{f'pgd-{k}': (iterated(steps=k), eps, k) for k in args.sweep_steps}}
ATTACKS = {'fgsm': (lambda x, y: (fgsm(ce(attacked_net, y), x, eps=eps, norm=args.norm), None, []), eps, 1),
           'pgd': (iterated(), eps, args.steps), 'cw': (iterated(margin), eps, args.steps),
           'transfer': (iterated(net=source), eps, args.steps),
           'weak': (iterated(eps=0.1, step_size=2 / 255, steps=2, init='zero'), 0.1, 2),
           'strong': (iterated(eps=0.5, step_size=0.5, steps=2, init='zero'), 0.5, 2),
           **{name: (part(name, half_net), eps, COST[name]) for name in PARTS},
           **{f'{name} again': (part(name, attacked_net), eps, COST[name]) for name in FAST},
           **SWEEPS}

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
    attack, radius, _ = ATTACKS[name]
    x_adv, broken, warned = attack(x, y)
    moved = distance(x_adv, x, args.norm).max().item()
    if not (moved <= radius * (1 + 1e-4) and 0 <= x_adv.min() and x_adv.max() <= 1):
        sys.exit(f'{name} left the ball or [0, 1] (moved by {255 * moved:.3f}/255): '
                 'its result is worth nothing')
    return dict(predicted=predict(x_adv).cpu(), moved=moved, broken=broken, warned=warned,
                x_adv=x_adv.cpu() if args.save_adv and radius == eps else None)

def survivors(name, predicted, todo=None):
    """(n,) what the images are taken for after the attack, and the largest step taken. Those not todo
    (default: those still right) are not attacked."""
    predicted, moved, counts = predicted.clone(), 0.0, recount.setdefault(name, dict(attack=0, here=0))
    _, radius, cost = ATTACKS[name]
    todo = predicted == y_test if todo is None else todo.clone()
    plan.remove(name)
    for restart in range(args.restarts if name in ('pgd', 'cw') else 1):
        index = todo.nonzero()[:, 0]
        batches = index.split(args.batch_size) if len(index) else []
        keys = [f'{name}-{restart}-{k}-{hashlib.sha256(i.numpy().tobytes()).hexdigest()[:12]}'
                for k, i in enumerate(batches)]
        standing = (taken == y_test).sum().item()               # the attacks to come get at most these
        to_come = cost * len(index) + sum(ATTACKS[other][2] for other in plan) * standing
        bar.total = bar.n + to_come / shard[1]
        bar.set_description(name)
        for k, i in enumerate(batches):
            seed = args.seed + 1000 * restart + k
            if saved.mine(k):
                new = saved.compute(keys[k], lambda: attacked(name, x_test[i], y_test[i].to(device), seed))
                bar.total -= 0 if new else cost * len(i)
                bar.update(cost * len(i) if new else 0)
        for k, i in enumerate(batches):
            batch = saved.read(keys[k])
            predicted[i], moved = batch['predicted'], max(moved, batch['moved'])
            todo[i] = predicted[i] == y_test[i]
            if radius == eps:
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
                  model=model.config, trained={k: v for k, v in meta.items() if k != 'config'},
                  dataset=args.dataset, images=f'first {n} of {len(d.y_test)} test images', norm=args.norm,
                  eps=eps, eps_pixels=args.eps, results=results, notes=notes, flags=flags, audit=audited,
                  complete=complete, args=vars(args), precision='float32', search=search,
                  **environment(device))
    if saved.mine(0):                                   # of several processes, one reports
        write(args.out, report)

def row(name, predicted, seconds, moved=None):
    """One line on the screen; the file holds everything so far."""
    s = results[name.strip()] = dict(summary(predicted, y_test, d.classes), seconds=seconds,
                                     max_perturbation=moved and 255 * moved)
    bar.clear()
    print(line(name, **s), flush=True)
    save(complete=False)

def autoattack(parts, label):
    """The standard version, part by part on the images left; with --individual also each part on all."""
    alive, before, after, t0 = clean, {}, {}, time.perf_counter()
    for name in parts:
        t1, before[name] = time.perf_counter(), alive == y_test
        alive, moved = survivors(name, alive)
        after[name] = alive
        row(f'  autoattack, after {name}', alive, time.perf_counter() - t1, moved)
    row(label, alive, time.perf_counter() - t0)
    for name in parts if args.individual else ():
        t1 = time.perf_counter()
        plan.append(name)
        rest, moved = survivors(name, clean, (clean == y_test) & ~before[name])
        row(f'  {name} alone', torch.where(before[name], after[name], rest), time.perf_counter() - t1, moved)

where = (f'epoch {meta.get("epoch")}, selected by {meta.get("selected_by")}' if meta else
         'weights only, provenance unknown')
print(f'{args.checkpoint} ({fingerprint(model)}): {model.config["name"]}, {where}')
print(f'{args.dataset}, the first {n} of {len(d.y_test)} test images; '
      f'{args.norm} eps {args.eps:g}/255 = {eps:.5f}; fp32 on {device.type}; search: {search}'
      + f'; {args.branch} BN' * model.config['dual_bn'])
print('logits: norm {logit_norm:.2f}, margin {margin:.2f}, confidence {confidence:.3f}; '
      '{zero_gradient:.1%} of the gradient is exactly zero'.format(**first))
again = [f'{name} again' for name in FAST] if bf16 else []      # in fp32, on what the search in bf16 has left
STAGES = {'autoattack': (PARTS + again, 'autoattack (worst case)'),
          'aa-fast': (FAST + again, 'aa-fast (two of the four attacks)')}
within = args.attacks + ['transfer'] * bool(source)
todo = within + [*SWEEPS]
plan = [part for name in todo if name != 'clean' for part in STAGES.get(name, ([name],))[0]]
results, recount, aa_warnings, audited = {}, {}, [], []
bar = tqdm(total=1, disable=None, leave=False,
           bar_format='{desc} {percentage:.0f}% |{bar:40}| {elapsed} gone, {remaining} left')
try:
    with attack_mode(model), bn_branch(model, args.branch):
        if args.audit and todo != ['clean'] and (eps < 1 or args.norm == 'L2') and saved.mine(0):
            saved.compute('audit', lambda: dict(checks=[list(check) for check in audit.audit(
                model, x_test[:100], y_test[:100].to(device), eps=eps, step_size=step_size, norm=args.norm,
                seed=args.seed, transfer=source)]))
            checks = [audit.Check(*check) for check in saved.read('audit')['checks']]
            audited = [dict(check._asdict(), figure=check.figure if math.isfinite(check.figure) else None)
                       for check in checks]                     # JSON has no NaN
            print(audit.overall(checks), *[f'  {check.name}: {check.text}' for check in checks
                                           if check.verdict == 'suspicious'], sep='\n', flush=True)
        print(HEADER)
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
            if name in STAGES:
                autoattack(*STAGES[name])
            elif name not in ['clean', *results]:
                predicted, moved = survivors(name, clean)
                row(f'{name}-{args.steps}' if name in ('pgd', 'cw') else name, predicted,
                    time.perf_counter() - t0, moved)
            if name == within[-1] and len(within) > 2:
                row('all of the above', taken, time.perf_counter() - started)
        bar.close()
except KeyboardInterrupt:
    sys.exit(f'\nstopped; {args.out} holds the rows above, and the same command continues')

flags = find_flags(first, results, recount, aa_warnings, dict(run, **meta), evaluated, adv, n)
notes += [flag['text'] for flag in flags.values() if flag['text']]
if bf16:
    notes.append('searched in bf16 first: what withstands it met FAB and Square in bf16 only')
for note in notes:
    print(f'note: {note}')
if args.save_adv and saved.mine(0):
    checkpoint.save(args.save_adv, dict(x_adv=x_worst, robust=taken == y_test, evaluated=evaluated))
    print(args.save_adv)
save(complete=True)
if shard[1] == 1:
    saved.delete()
print(args.out)
worst = taken == y_test                                 # for tests
if args.figures and saved.mine(0):
    from tools.figures import draw                            # matplotlib, where it is asked for
    try:
        draw(args.out, args.checkpoint)
    except (Refused, ValueError, OSError) as e:
        sys.exit(f'no figures: {e}')
