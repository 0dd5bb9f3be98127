"""
What an evaluation says: the network as it is found, accuracy with its interval, per class, the
confusions, and what makes a reader doubt the figures.
"""
import json
import math
import re

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.files import Refused, atomic
from support.refusals import refuse

# -----------------------------------------------------------------------------
# before the attacks

class Reduced(TorchDispatchMode):
    """Notes what is computed in half precision, wherever in the network, and whatever it returns."""
    def __init__(self):
        super().__init__()
        self.kinds = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.dtype in (torch.float16, torch.bfloat16):
                self.kinds.add(str(t.dtype))
        return out

@torch.enable_grad()
def inspect(model, x, y, classes):
    """
    One batch through the model as it will be attacked. Raises Refused for what cannot be evaluated.
    Returns figures: precision of logits and weights, and any half precision within; how far the logits depend
    on the rest of the batch, and change from call to call (share of their largest entry); whether they are
    probabilities; share of the gradient's entries that are exactly zero, and of the images without any
    gradient; logit norm, margin and confidence.
    """
    x, untouched = x.clone().requires_grad_(), x.clone()
    try:
        logits = model(x)
    except Refused:
        raise
    except Exception as e:                          # it may be somebody else's code
        line = f'the network fails on images {tuple(x.shape)}: {type(e).__name__}: {e}'.splitlines()[0]
        raise Refused(line) from e
    if not torch.equal(x, untouched):
        refuse('the network writes into the images that it is given: let it work on x.clone()')
    if logits.shape != (len(x), classes):
        refuse(f'the network returns {tuple(logits.shape)}, not {classes} logits per image')
    if not logits.isfinite().all():
        refuse('the network returns non-finite logits on clean images: nothing to evaluate')
    training = [name or 'the network' for name, m in model.named_modules() if m.training]
    if training:
        refuse(f'{training[0]} is in training mode and model.eval() does not change that: '
               'its answers depend on the batch')
    if not logits.requires_grad:
        refuse('the logits have no gradient at the images: the attacks could only fail')

    gradient, = torch.autograd.grad(F.cross_entropy(logits.float(), y, reduction='sum'), x)
    zero = gradient == 0
    weights = [p for p in model.parameters() if p.is_floating_point()]
    kinds = {str(p.dtype) for p in weights}
    matrices = [p for p in weights if p.dim() > 1]              # norm layers are often kept in fp32
    for reduced in (torch.float16, torch.bfloat16):
        if matrices and all(torch.equal(p, p.to(reduced).to(p.dtype)) for p in matrices):
            kinds.add(f'rounded to {reduced}')
    with torch.no_grad(), Reduced() as computed:
        model(x)
    tf32 = torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != 'highest'

    with torch.no_grad():
        z = logits.detach()
        largest = z.abs().max().clamp_min(1e-12)
        alone = torch.cat([model(image[None]) for image in x[:8]])
        top = z.topk(2).values
        sums_to_one = (z.sum(1) - 1).abs().max() < 1e-3
        return dict(logits=str(z.dtype), weights=sorted(kinds), computed=sorted(computed.kinds),
                    tf32=x.is_cuda and tf32,
                    batch_dependence=((alone - z[:8]).abs().max() / largest).item(),
                    change=((model(x) - z).abs().max() / largest).item(),
                    probabilities=bool(sums_to_one and z.min() >= 0),
                    zero_gradient=zero.float().mean().item(),
                    no_gradient=zero.flatten(1).all(1).float().mean().item(),
                    logit_norm=z.norm(dim=1).mean().item(), margin=(top[:, 0] - top[:, 1]).median().item(),
                    confidence=z.softmax(1).amax(1).median().item())

def heading(args, model, weights, meta, first, which, device):
    """The first thing on the screen: the network, and how it will be attacked. weights: its fingerprint.
    first: inspect's."""
    where = 'weights only, provenance unknown'
    if 'epoch' in meta:
        where = f'epoch {meta["epoch"]}, selected by {meta.get("selected_by")}'
    if model.build_args['dual_bn']:
        where += f'; {args.branch} BN'
    return (f'{args.checkpoint} ({weights}): {model.build_args["name"]}, {where}',
            f'logits: norm {first["logit_norm"]:.2f}, margin {first["margin"]:.2f}, confidence '
            f'{first["confidence"]:.3f}; {first["zero_gradient"]:.1%} of the gradient is exactly zero',
            f'{args.dataset}, {"" if args.draw else "the "}{which}; {args.norm} eps {args.eps:g}/255 = '
            f'{args.eps / 255:.5f}, steps of {args.step_size:g}/255; batches of {args.batch_size}, fp32 on '
            f'{device.type}')

# -----------------------------------------------------------------------------
# accuracy

def wilson(k, n):
    """[low, high] in percent: Wilson's 95 % interval of k out of n."""
    z = 1.96
    centre = (k + z * z / 2) / (n + z * z)
    half = z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return [100 * (centre - half), 100 * (centre + half)]

def accuracy(predicted, y, classes):
    """
    Accuracy in percent with its interval; per class with mean, standard deviation and worst; confusion:
    of the images of class i, confusion[i][j] are taken for j, if there are at most 100 classes; robust: '1'
    for every image classified as y.
    """
    right = predicted == y
    k, n = right.sum().item(), len(y)
    counts = torch.bincount(y * classes + predicted, minlength=classes ** 2).view(classes, classes).tolist()
    present = {c: row for c, row in enumerate(counts) if sum(row)}
    per_class = {c: 100 * row[c] / sum(row) for c, row in present.items()}
    values = torch.tensor(list(per_class.values()), dtype=torch.float64)
    return dict(accuracy=100 * k / n, correct=k, n=n, interval=wilson(k, n), per_class=per_class,
                class_interval={c: wilson(row[c], sum(row)) for c, row in present.items()},
                class_mean=values.mean().item(), class_std=values.std(correction=0).item(),
                class_worst=min(per_class, key=per_class.get),
                confusion=counts if classes <= 100 else None,
                robust=''.join('1' if r else '0' for r in right.tolist()))

HEADER = (f"{'accuracy in percent':<33}{'all':>8}   {'95 % interval':>15}{'classes':>10}{'std':>8}"
          f"{'worst':>12}{'seconds':>10}")

def line(name, *, accuracy, interval, per_class, class_mean, class_std, class_worst, seconds, **rest):
    """A summary under HEADER."""
    return (f'{name:<33}{accuracy:8.2f}   {interval[0]:6.2f} - {interval[1]:6.2f}{class_mean:10.2f}'
            f'{class_std:8.2f}{per_class[class_worst]:8.2f} ({class_worst}){seconds:10.0f}')

def write(path, report):
    """As JSON, numbers of one list on one line. Whole or not at all."""
    text = json.dumps(report, indent=1)
    text = re.sub(r'\[[\d\s,.eE+-]+\]', lambda numbers: ' '.join(numbers[0].split()), text)
    with atomic(path) as tmp, open(tmp, 'w') as f:
        f.write(text)

# -----------------------------------------------------------------------------
# doubts

def doubtful(clean, trained, evaluated):
    """Is the clean accuracy what it should be? Asked before hours of attacks. -> a line, '' if it may be."""
    accuracy, n, classes = clean['accuracy'], clean['n'], len(clean['per_class'])
    same_branch = trained.get('eval_branch', evaluated['branch']) == evaluated['branch']
    before = trained.get('val_clean') if same_branch else None
    if before is not None and abs(before - accuracy) > max(10, 300 / math.sqrt(n)):
        return f'clean accuracy is {accuracy:.1f} here and was {before:.1f} on the hold-out in training'
    if before is None and accuracy <= min(50, 200 / classes):
        return (f'clean accuracy is {accuracy:.1f} %, little more than chance: have these weights seen '
                'standardised images (--mean, --std), or the classes in another order?')
    return ''

def flags(first, results, recount, warnings, trained, evaluated, adv, n):
    """
    name -> raised, text (empty unless raised) and the figures it was judged by. first: inspect's.
    recount: attack -> how many images it says it broke, and how many are. warnings: AutoAttack's. trained:
    norm, eps and val_clean of the training, as far as known. adv: what evaluation.load_adv was given, if
    anything.
    """
    found = {}

    def flag(name, raised, text, **figures):
        found[name] = dict(raised=bool(raised), text=text if raised else '', **figures)

    # the network, on one batch
    reduced = {first['logits'], *first['weights'], *first['computed']} - {'torch.float32'}
    if first['tf32']:
        reduced.add('TF32')
    flag('precision', reduced, f'not all in fp32: {", ".join(sorted(reduced))}',
         logits=first['logits'], weights=first['weights'], computed=first['computed'], tf32=first['tf32'])

    off = first['batch_dependence']
    flag('batch_size', off > 1e-3, 'the logits of an image depend on the rest of the batch '
         f'(by {off:.1g} of the largest): batch statistics?', figure=off)

    off = first['change']
    flag('randomised', off > 1e-4, f'the logits change from call to call (by {off:.1g} of the largest): '
         'the attacks here do not average over that', figure=off)

    entries, images = first['zero_gradient'], first['no_gradient']
    flag('zero_gradient', entries > 0.05 or images, f'{entries:.1%} of the gradient is exactly zero, '
         f'all of it for {images:.1%} of the images: attacks by the gradient may be blind',
         entries=entries, images=images)

    flag('probabilities', first['probabilities'], 'the network ends in a softmax: cross-entropy takes '
         'another, and its gradient is weak; let it return logits')
    flag('moving', first['moves'], "the network's state moves as it answers: the fingerprint is that before")
    flag('logits', False, '', **{k: first[k] for k in ('logit_norm', 'margin', 'confidence')})

    # the attacks
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
        found['gap'] = dict(raised=gap > 8, points=gap,         # said in any case
                            text=f'{pgd[0].upper()} is {gap:.2f} points above AutoAttack')

    if adv:
        same, saved = adv['evaluated']['weights'] == evaluated['weights'], adv['robust'].sum().item()
        before = ''.join('1' if r else '0' for r in adv['robust'].tolist())
        flag('verified', same and before != results['verified']['robust'],
             f'{saved} images were robust when these were saved, {results["verified"]["correct"]} are now',
             saved=saved, same_weights=same)

    # against the training
    doubt = doubtful(results['clean'], trained, evaluated)
    flag('hold_out', doubt, doubt, trained=trained.get('val_clean'))

    attack = evaluated['norm'], evaluated['eps']
    before = trained.get('norm', attack[0]), trained.get('eps', attack[1])
    within = set(results) - {'clean', 'verified', 'weak', 'strong'}         # the other rows have this radius
    flag('threat_model', within and before != attack, f'trained against {before[0]} {before[1]:g}/255, '
         f'attacked with {attack[0]} {attack[1]:g}/255', trained=before)

    flag('eps', abs(evaluated['eps'] / 255 - 0.031) < 1e-4, f'eps {evaluated["eps"]:g}/255 is 0.031, and a '
         "leaderboard's is 8/255: up to 0.8 points")

    enough = 5000 if trained.get('dataset') == 'imagenet' else 10000
    flag('n', n < enough, f'{n} images: not comparable with a leaderboard, mind the interval', n=n)
    return found
