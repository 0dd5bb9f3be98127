"""
What evaluate.py needs beside its attacks: what the checkpoint says where the flags say nothing, which flags do not go
together, and what a report says of its own figures.
"""
import json
import math
import os
import re

import torch
import torch.nn.functional as F

import data
from support import refusals
from support.autoattack import PARTS
from support.checkpoint import is_ours
from support.files import Refused, atomic
from support.refusals import refuse

DEFAULT = ['clean', 'fgsm', 'pgd', 'cw', 'autoattack']      # the attacks of an evaluation that names none

# -----------------------------------------------------------------------------
# flags

def threat(args, ckpt):
    """Fills in --dataset, --data-dir, --norm, --eps and --step-size from ckpt, the content of args.checkpoint, if it is
    one of ours. -> the run that it was trained in, {} if unknown. Raises Refused for what cannot be attacked."""
    run = ckpt.get('run', {}) if is_ours(ckpt) else {}
    args.dataset = args.dataset or run.get('dataset', 'cifar10')
    if args.data_dir is None:
        args.data_dir = run.get('data_dir', 'data')
        needs_files = args.dataset not in ('digits', 'synthetic')
        if needs_files and args.data_dir != 'data' and not os.path.isdir(args.data_dir):
            refuse(f'{args.checkpoint} was trained on data in {args.data_dir}, which is not here: '
                   'name their folder with --data-dir')
    trained = run.get('norm', 'Linf')
    args.norm = args.norm or trained
    if args.eps is None and args.norm == trained:       # 8 of Linf would be nothing in L2
        args.eps = run.get('eps')
    if args.eps is None:
        args.eps = 128.0 if args.norm == 'L2' else data.row(args.dataset, args.data_dir)['eps']
    refusals.attack(args)
    return run

def resolve(args, ckpt):
    """Fills in what args leaves open from ckpt, the content of args.checkpoint, if it is one of ours. -> the run that
    it was trained in, {} if unknown, and --shard as two numbers. Raises Refused for what cannot be evaluated."""
    args.attacks = args.attacks or (['clean'] if args.verify else DEFAULT)
    args.compile = args.compile or args.fast
    refusals.seed(args)
    for name in ('steps', 'restarts', 'batch_size', 'n'):
        value = getattr(args, name)
        if value is not None and value < 1:
            refuse(f'--{name.replace("_", "-")} {value}: at least 1')
    if min(args.sweep_steps, default=1) < 1:
        refuse(f'--sweep-steps {min(args.sweep_steps)}: at least 1')
    shard = re.fullmatch(r'(\d+)/(\d+)', args.shard)
    shard = shard and (int(shard[1]), int(shard[2]))
    if not shard or shard[0] >= shard[1]:
        refuse(f'--shard {args.shard}: I/N with I from 0 to N-1')

    ours = is_ours(ckpt)
    own_code = ours and '.py:' in ckpt['config']['name']        # --model says that it may be run
    if ours and (args.model and not own_code or args.width or args.mean):
        refuse(f'{args.checkpoint} says itself what it is: drop --model, --width, --mean and --std')
    if (args.mean is None) != (args.std is None):
        refuse('--mean and --std go together')
    if args.model and '.py:' in args.model and (args.width or args.mean or args.activation):
        refuse(f'{args.model} makes the whole network: drop --width, --mean, --std and --activation')
    if not ours and args.model is None:
        refuse(f'{args.checkpoint} holds weights only: name their architecture with --model (and --width)')
    if args.model and '.py:' not in args.model:
        refusals.model(args.model, width=args.width)
    if (args.transfer_model or args.transfer_width) and not args.transfer_from:
        refuse('--transfer-model and --transfer-width are of --transfer-from')

    run = threat(args, ckpt)
    for value in args.sweep_eps:
        if value and (value < 1 or args.norm == 'Linf' and value > 255):
            refuse(f'--sweep-eps {value:g}: eps is in pixels, 0 or 1 to 255 (L2: 255 times the usual radius)')
    if args.norm == 'L2' and {'weak', 'strong', 'pgd-trades'} & set(args.attacks):
        refuse('weak and strong are Linf attacks, and so is pgd-trades')
    if args.fast and (args.individual or set(PARTS) & set(args.attacks)):
        refuse('--fast is for autoattack as a whole: what a part alone leaves has no second search')
    return run, shard

def check_normalisation(args, channels):
    """Raises Refused unless --mean and --std have a number a channel, if they are there."""
    for flag in ('mean', 'std'):
        values = getattr(args, flag)
        if values and len(values) != channels:
            refuse(f'--{flag} has {len(values)} numbers, the images have {channels} channels')
    if args.std and min(args.std) <= 0:
        refuse(f'--std {min(args.std):g}: above 0')

# -----------------------------------------------------------------------------
# the report: accuracy with intervals, classes and confusions; what is refused, and what is flagged

def wilson(k, n):
    """[low, high] in percent: Wilson's 95 % interval of k out of n."""
    z = 1.96
    centre, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return [100 * (centre - half), 100 * (centre + half)]

def summary(predicted, y, classes):
    """Accuracy in percent with its interval; per class with mean, standard deviation and worst; confusion: of
    the images of class i, confusion[i][j] are taken for j, if there are at most 100; robust: '1' for every
    image classified as y."""
    right = predicted == y
    k, n = right.sum().item(), len(y)
    counts = torch.bincount(y * classes + predicted, minlength=classes ** 2).view(classes, classes).tolist()
    present = {c: row for c, row in enumerate(counts) if sum(row)}
    per_class = {c: 100 * row[c] / sum(row) for c, row in present.items()}
    values = torch.tensor(list(per_class.values()), dtype=torch.float64)
    return dict(accuracy=100 * k / n, correct=k, n=n, interval=wilson(k, n), per_class=per_class,
                class_interval={c: wilson(row[c], sum(row)) for c, row in present.items()},
                class_mean=values.mean().item(), class_std=values.std(correction=0).item(),
                class_worst=min(per_class, key=per_class.get), confusion=counts if classes <= 100 else None,
                robust=''.join('01'[b] for b in right.tolist()))

HEADER = (f"{'accuracy in percent':<28}{'all':>8}   {'95 % interval':>15}{'classes':>10}{'std':>8}"
          f"{'worst':>12}{'seconds':>10}")

def line(name, *, accuracy, interval, per_class, class_mean, class_std, class_worst, seconds, **rest):
    """A summary under HEADER."""
    return (f'{name:<28}{accuracy:8.2f}   {interval[0]:6.2f} - {interval[1]:6.2f}{class_mean:10.2f}'
            f'{class_std:8.2f}{per_class[class_worst]:8.2f} ({class_worst}){seconds:10.0f}')

def check_images(x, y, classes):
    """Raises Refused for anything but images in [0, 1] and labels of theirs."""
    if x.dtype != torch.float32 or not (x.min() >= 0 and x.max() <= 1):
        raise Refused(f'images are {x.dtype}, {x.min():.3f} to {x.max():.3f}, not float32 in [0, 1]: '
                         'the normalisation belongs into the model')
    if y.dtype != torch.int64 or y.min() < 0 or y.max() >= classes:
        raise Refused(f'labels are {y.dtype}, {y.min()} to {y.max()}, '
                         f'not int64 of the classes 0 to {classes - 1}')

@torch.enable_grad()
def inspect(model, x, y, classes):
    """
    One batch through the model as it will be attacked. Raises Refused for what cannot be evaluated.
    Returns figures: precision of logits and weights; how far the logits depend on the rest of the batch, and
    change from call to call (share of their largest entry); share of the gradient's entries that are exactly
    zero, and of the images without any gradient; logit norm, margin and confidence.
    """
    x = x.clone().requires_grad_()
    try:
        logits = model(x)
    except Refused:
        raise
    except Exception as e:                          # it may be somebody else's code
        raise Refused(f'the network fails on images {tuple(x.shape)}: {type(e).__name__}: {e}'
                         .splitlines()[0]) from e
    if logits.shape != (len(x), classes):
        raise Refused(f'the network returns {tuple(logits.shape)}, not {classes} logits per image')
    if not logits.isfinite().all():
        raise Refused('the network returns non-finite logits on clean images: nothing to evaluate')
    training = [name or 'the network' for name, m in model.named_modules() if m.training]
    if training:
        raise Refused(f'{training[0]} is in training mode and model.eval() does not change that: '
                         'its answers depend on the batch')
    if not logits.requires_grad:
        raise Refused('the logits have no gradient at the images: the attacks could only fail')
    grad, = torch.autograd.grad(F.cross_entropy(logits.float(), y, reduction='sum'), x)
    weights = [p for p in model.parameters() if p.is_floating_point()]
    rounded = [t for t in (torch.float16, torch.bfloat16)
               if weights and all(torch.equal(p, p.to(t).to(p.dtype)) for p in weights)]
    with torch.no_grad():
        z, scale = logits.detach(), logits.abs().max().clamp_min(1e-12)
        alone = torch.cat([model(image[None]) for image in x[:8]])
        again = model(x)
        top = z.topk(2).values
        off = lambda a, b: ((a - b).abs().max() / scale).item()
        return dict(logits=str(z.dtype), weights=sorted({str(p.dtype) for p in weights}
                                                        | {f'rounded to {t}' for t in rounded}),
                    tf32=x.is_cuda and (torch.backends.cudnn.allow_tf32
                                       or torch.get_float32_matmul_precision() != 'highest'),
                    batch_dependence=off(alone, z[:8]), change=off(again, z),
                    zero_gradient=(grad == 0).float().mean().item(),
                    no_gradient=(grad.flatten(1) == 0).all(1).float().mean().item(),
                    logit_norm=z.norm(dim=1).mean().item(), margin=(top[:, 0] - top[:, 1]).median().item(),
                    confidence=z.softmax(1).amax(1).median().item())

def distance(x_adv, x, norm):
    """(n,) how far every image went."""
    delta = (x_adv - x).flatten(1)
    return delta.abs().amax(1) if norm == 'Linf' else delta.norm(dim=1)

def write(path, report):
    """As JSON, numbers of one list on one line. Atomic."""
    text = json.dumps(report, indent=1)
    with atomic(path) as tmp, open(tmp, 'w') as f:
        f.write(re.sub(r'\[[\d\s,.eE+-]+\]', lambda m: ' '.join(m[0].split()), text))

def load_adv(path, content, evaluated, x):
    """x_adv, on x's device, of what --save-adv wrote to path. Raises Refused unless these are adversarial
    images of x, float32, in [0, 1] and in the ball that evaluated (images, norm, eps in pixels) describes."""
    if not isinstance(content, dict) or not {'x_adv', 'robust', 'evaluated'} <= set(content):
        raise Refused(f'{path} was not written by evaluate.py --save-adv')
    for k in ('images', 'norm', 'eps'):
        if content['evaluated'][k] != evaluated[k]:
            raise Refused(f'{path} holds the adversarial images of another evaluation '
                             f'({k} was {content["evaluated"][k]}, is {evaluated[k]})')
    x_adv = content['x_adv']
    if x_adv.dtype != torch.float32 or x_adv.shape != x.shape or not (x_adv.min() >= 0 and x_adv.max() <= 1):
        raise Refused(f'{path}: x_adv is {x_adv.dtype} {tuple(x_adv.shape)}, {x_adv.min():.3f} to '
                         f'{x_adv.max():.3f}, not float32 {tuple(x.shape)} in [0, 1]')
    moved = 255 * distance(x_adv, x.cpu(), evaluated['norm'])
    outside = (~(moved <= evaluated['eps'] * (1 + 1e-4))).sum().item()
    if outside:
        raise Refused(f'{path}: {outside} of {len(x)} images are outside the {evaluated["norm"]} ball of '
                         f'{evaluated["eps"]:g}/255, the farthest {moved.max():.3f}/255 away')
    return x_adv.to(x.device)

def find_flags(first, results, recount, warnings, trained, evaluated, adv, n):
    """
    name -> raised, text (empty unless raised) and the figures it was judged by. first: inspect's. recount:
    attack -> how many images it says it broke, and how many are. warnings: AutoAttack's. trained: norm, eps
    and val_clean of the training, as far as known. adv: what load_adv was given, if anything.
    """
    flags, clean = {}, results['clean']['accuracy']
    def flag(name, raised, text, **figures):
        flags[name] = dict(raised=bool(raised), text=text if raised else '', **figures)

    reduced = {first['logits'], *first['weights'], *['TF32'] * first['tf32']} - {'torch.float32'}
    flag('precision', reduced, f'not all in fp32: {", ".join(sorted(reduced))}',
         logits=first['logits'], weights=first['weights'], tf32=first['tf32'])
    off = first['batch_dependence']
    flag('batch_size', off > 1e-3, 'the logits of an image depend on the rest of the batch '
         f'(by {off:.1g} of the largest): batch statistics?', figure=off)
    off = first['change']
    flag('randomised', off > 1e-4, f'the logits change from call to call (by {off:.1g} of the largest): '
         'the attacks here do not average over that', figure=off)
    entries, images = first['zero_gradient'], first['no_gradient']
    flag('zero_gradient', entries > 0.05 or images, f'{entries:.1%} of the gradient is exactly zero, '
         f'all of it for {images:.1%} of the images: the attacks may be blind',
         entries=entries, images=images)
    flag('logits', False, '', **{k: first[k] for k in ('logit_norm', 'margin', 'confidence')})
    more = [f'{name} {c["attack"]}, here {c["here"]}' for name, c in recount.items()
            if c['attack'] > c['here']]
    flag('recount', more, 'not every image that an attack says it broke is broken here: ' + '; '.join(more),
         attacks=recount)
    flag('autoattack', warnings, 'AutoAttack warns: ' + ' | '.join(warnings), warnings=warnings)
    if 'autoattack, after square' in results:       # the authors' check, which needs all parts in one call
        before, after = [results[f'autoattack, after {part}']['correct'] for part in ('fab-t', 'square')]
        flag('square', before - after > 0.002 * n, f'Square broke {before - after} images that had withstood '
             'the gradients: is something masked?', broken=before - after)
    pgd = [row for row in results if re.fullmatch(r'pgd-\d+', row)]
    if pgd and 'autoattack (worst case)' in results:
        gap = results[pgd[0]]['accuracy'] - results['autoattack (worst case)']['accuracy']
        flags['gap'] = dict(raised=gap > 8, points=gap,         # said in any case
                            text=f'{pgd[0].upper()} is {gap:.2f} points above AutoAttack')
    if adv:
        same, saved = adv['evaluated']['weights'] == evaluated['weights'], adv['robust'].sum().item()
        changed = ''.join('01'[b] for b in adv['robust'].tolist()) != results['verified']['robust']
        flag('verified', same and changed, f'{saved} images were robust when these were saved, '
             f'{results["verified"]["correct"]} are now', saved=saved, same_weights=same)
    before = trained.get('val_clean', clean)
    flag('hold_out', abs(before - clean) > max(10, 300 / math.sqrt(n)), f'clean accuracy is {clean:.1f} here '
         f'and was {before:.1f} on the hold-out in training', trained=before)
    attack = evaluated['norm'], evaluated['eps']
    before = trained.get('norm', attack[0]), trained.get('eps', attack[1])
    flag('threat_model', before != attack, f'trained against {before[0]} {before[1]:g}/255, '
         f'attacked with {attack[0]} {attack[1]:g}/255', trained=before)
    enough = 5000 if trained.get('dataset') == 'imagenet' else 10000
    flag('n', n < enough, f'{n} images: not comparable with a leaderboard, mind the interval', n=n)
    return flags
