"""
Are a network's gradients to be trusted? The symptoms of masking (Athalye et al. 2018, "Obfuscated Gradients
Give a False Sense of Security"; Carlini et al. 2019, "On Evaluating Adversarial Robustness") as named checks.

A part of every evaluation; alone: python -m tools.audit runs/x/best.pt

    checks = audit(net, x, y, eps=8/255)            # about 100 images as they come; net: [0, 1] -> logits
    for check in checks: print(*check)
    print(overall(checks))

Under suspicion is the accuracy under PGD-20 on the cross-entropy. Every other attack is compared with it on
the same images, those classified correctly, so that only those count on which two attacks disagree. No check
proves anything: 'suspicious' asks for a look, and a network that passes has passed these attacks. Per image
it costs some 100 gradients, and 200 more and 200 queries where PGD-20 fails. fp32 as x and net are; TF32 is
the caller's to switch off.
"""
import math
from contextlib import ExitStack
from typing import NamedTuple

import torch

from attacks import attack_mode, farthest, fgsm, norms, start
from support.probes import StraightThrough, Subject, gradient, random_search

# -----------------------------------------------------------------------------
# thresholds, and why

MIN_IMAGES = 10     # below, the three images of LIMIT would be a third of the evidence
ALPHA = 0.01        # attacks that must not win: exact one-sided McNemar test. Of a sound network nearly all
                    # discordant images are on the other side, far from this level
LIMIT = 0.03        # of the images, and at least three: a few borderline ones may fall to any further attack.
                    # Of 200 images on each of four networks Square broke none that had withstood the
                    # gradients: at 95 % a rate below 1.5 %, and twice that is too many
GAP = 0.06          # CE may be weaker by this share and two standard deviations of the count: 100 images show
                    # 14 %, 400 show 9 %. Measured (40-90 images of CIFAR-10, 100 digits), the margin gains
                    # -6 to 9 % on PGD-AT, TRADES, logit-MSE, AdaAD; on LTD 5-8 % at tau 5, 14-18 % at 15
NOISE = 1e-4        # a second forward against the first, in stds of the logits: kernels reorder sums by 1e-6
BATCH = 1e-3        # the same in other batches, for which a GPU may take other kernels
DEAD = 1e-6         # CE's gradient over the margin's is about 1 - p_y, which fp32 resolves to 6e-8: below
                    # this the direction is rounding
WRONG = 0.25        # of the images: gradient wrong by a factor of two. Kinks within the step spoil a few; a
                    # gradient of something else is wrong nearly everywhere
UNIFORM = 1.5       # largest probability over chance. Near 1 CE climbs towards the mean of all classes, not
                    # towards the nearest, and divergences between outputs are of second order
STEPS, MANY, RESTARTS, QUERIES = 20, 100, 4, 200

NAMES = ['deterministic', 'batch', 'finite', 'gradients', 'differences', 'loss', 'one-step', 'noise',
         'larger-eps', 'unbounded', 'steps', 'restarts', 'margin', 'temperature', 'softmax',
         'straight-through', 'search', 'transfer']              # of the checks, in their order

class Check(NamedTuple):
    name: str
    figure: float
    verdict: str        # 'ok', 'suspicious' or 'skipped'
    text: str           # one line: what was measured, and what it means

def checks(model, x, y, *, eps, step_size=None, norm='Linf', seed=0, transfer=None):
    """
    Yields a Check per name in NAMES, in their order. x fp32 (B,3,H,W) in [0, 1], y (B,); misclassified
    images are left out. eps, step_size (default: a quarter of eps): in units of [0, 1]. transfer: another
    network of the same classes, to craft on. Modes, requires_grad, .grad and torch's RNG are as before once
    it is exhausted. Raises ValueError.
    """
    if not (x.dtype == torch.float32 and len(x) and 0 <= x.min() and x.max() <= 1):
        raise ValueError('images are fp32 in [0, 1]')
    if not 0 < eps < (1 if norm == 'Linf' else math.inf):
        raise ValueError(f'eps {eps:g}: in units of [0, 1], as in 8/255')
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))        # its tensors take no part in autograd
        x, y = [t.clone() if t.is_inference() else t.detach() for t in (x, y)]
        stack.enter_context(torch.random.fork_rng([x.device] if x.is_cuda else []))
        stack.enter_context(torch.autocast(x.device.type, enabled=False))
        for net in (model, transfer) if transfer is not None else (model,):
            stack.enter_context(attack_mode(net))
        torch.manual_seed(seed)
        yield from _checks(model, x, y, eps, step_size or eps / 4, norm, transfer)

def audit(model, x, y, **settings):
    """-> list of Check; settings as of checks()."""
    return list(checks(model, x, y, **settings))

def overall(checks):
    """One line."""
    names = [c.name for c in checks if c.verdict == 'suspicious']
    skipped = [c.name for c in checks if c.verdict == 'skipped']
    ran = len(checks) - len(skipped)
    without = f'; skipped: {", ".join(skipped)}' if skipped else ''
    if names:
        return f'masking audit: SUSPICIOUS: {", ".join(names)} (of {ran} checks{without})'
    if ran <= NAMES.index('gradients'):                 # those before it say nothing about masking
        return f'masking audit: not enough images{without}'
    return f'masking audit: nothing suspicious in {ran} checks{without}'

def suspicious(checks):
    """A line for each check that is."""
    return [f'  {c.name}: {c.text}' for c in checks if c.verdict == 'suspicious']

def as_json(checks):
    """JSON knows no infinity and no NaN."""
    return [dict(c._asdict(), figure=c.figure if math.isfinite(c.figure) else None) for c in checks]

# -----------------------------------------------------------------------------
# the checks

def _check(name, figure, suspicious, text):
    return Check(name, float(figure), 'suspicious' if suspicious else 'ok', text)

def _few(name, mask, text):
    """mask (n,) bool: the images of which there may be only a few."""
    limit = max(3, math.ceil(LIMIT * len(mask)))
    return _check(name, mask.sum() / len(mask), mask.sum() >= limit,
                  f'{mask.sum()} of {len(mask)} images {text}; {limit} are too many')

def _loses(name, weak, strong, text):
    """weak, strong (n,) bool: the images that an attack breaks, and one that should break more. McNemar's
    test."""
    b, c = int((weak & ~strong).sum()), int((strong & ~weak).sum())
    p = sum(math.comb(b + c, k) for k in range(b, b + c + 1)) / 2 ** (b + c)
    return _check(name, (b - c) / len(weak), p < ALPHA,
                  f'of {len(weak)} images {b} fall only to {text}, {c} only to the other, '
                  f'which should be the stronger (p = {p:.1g})')

def _of_the_network(net, x, y):
    """On all images: is it a function, of one image, with numbers for answers?"""
    z = net.logits(x)
    finite = z.isfinite().all(1)
    scale = z[finite].std().nan_to_num(1).clamp_min(1e-30)

    off = (net.logits(x) - z).nan_to_num(0, 0, 0).abs().max() / scale
    yield _check('deterministic', off, off > NOISE, f'a second forward differs by {off:.1e} stds of the '
                 'logits; above rounding, a gradient is one draw of many: attack their mean')

    halves = torch.cat([net.logits(part) for part in x.split((len(x) + 1) // 2)])
    off = (halves - z).nan_to_num(0, 0, 0).abs().max() / scale
    yield _check('batch', off, off > BATCH, f'in half the batch logits differ by {off:.1e} of their '
                 'stds; above rounding, an image is judged by its neighbours')

    bad = ~finite | ~gradient(net.ce, x, y).flatten(1).isfinite().all(1)
    yield _check('finite', bad.float().mean(), bad.any(), f'{bad.sum()} of {len(x)} images have NaN or Inf '
                 'in logits or gradient, which stops any gradient attack')

def _of_the_gradient(net, x, y, x_pgd, stand, eps):
    """Does the attack under suspicion move, and where its gradient points?"""
    n = len(y)
    ce, margin = [gradient(objective, x_pgd, y).nan_to_num(0, 0, 0).flatten(1).abs().sum(1)
                  for objective in (net.ce, net.margin)]
    yield _few('gradients', stand & (ce <= DEAD * margin), f'withstand PGD-{STEPS} where the '
               "gradient of CE is zero, or rounding beside the margin's")

    h = eps / 20                        # small against the ball, large against rounding
    x0 = start(x, eps=eps, init='uniform', norm=net.norm).clamp(h, 1 - h)
    g = gradient(net.right, x0, y).nan_to_num(0, 0, 0)
    somewhere = torch.where(g.flatten(1).any(1)[:, None, None, None], g, torch.randn_like(g))
    if net.norm == 'Linf':
        step = h * somewhere.sign()
    else:
        step = h * somewhere / norms(somewhere)
    told = (g * step).flatten(1).sum(1)
    seen = (net.right(x0 + step, y) - net.right(x0 - step, y)) / 2
    wrong = ~((seen - told).abs() <= 0.5 * torch.maximum(seen.abs(), told.abs()))
    yield _check('differences', wrong.sum() / n, wrong.sum() > WRONG * n, f'on {wrong.sum()} of {n} images '
                 'a step along the gradient moves the logits less than half, or over twice, as far as it '
                 'says')

    still = ~(net.ce(x_pgd, y) > net.ce(x, y))
    yield _few('loss', still, f'have no higher loss after PGD-{STEPS} than before')

def _weaker(net, x, y, fell, eps, step_size):
    """Attacks that must not break what PGD does not."""
    stand = ~fell
    one = net.broken(fgsm(lambda x_adv: net.ce(x_adv, y), x, eps=eps, norm=net.norm), y)
    yield _loses('one-step', one, fell, f'FGSM, not to PGD-{STEPS}')

    noise = torch.zeros_like(fell)
    for _ in range(STEPS):
        noise |= net.broken(start(x, eps=eps, init='uniform', norm=net.norm), y)
    yield _loses('noise', noise, fell, f'{STEPS} draws of noise, not to PGD-{STEPS}')

    less = net.broken(net.attack(net.ce, x, y, eps=eps / 2, step_size=step_size / 2), y)
    most = farthest(x, net.norm)
    more = net.broken(net.attack(net.ce, x, y, eps=min(2 * eps, most), step_size=min(2 * step_size, most)), y)
    only_smaller = (less & stand) | (fell & ~more)
    only_larger = (fell & ~less) | (more & stand)
    yield _loses('larger-eps', only_smaller, only_larger, 'the smaller of two eps (half, one, twice)')

    radius = 0.5 if net.norm == 'Linf' else 0.5 * math.sqrt(x[0].numel())
    grey = net.further(stand, x, y, lambda x, y: net.attack(net.ce, x, y, eps=radius, step_size=radius / 4))
    yield _few('unbounded', stand & ~grey, f'withstand PGD-{STEPS} at eps {radius:.3g}: all can be grey')

def _stronger(net, x, y, z, fell, transfer, eps):
    """Attacks that may break a little more than PGD."""
    n, K, stand = len(y), z.shape[1], ~fell
    longer = net.further(stand, x, y, lambda x, y: net.attack(net.ce, x, y, steps=MANY))
    yield _few('steps', longer, f'withstand {STEPS} steps and fall to {MANY}')
    again = net.further(stand, x, y, lambda x, y: net.attack(net.ce, x, y, restarts=RESTARTS))
    yield _few('restarts', again, f'withstand one start and fall to {RESTARTS} others')

    left = stand & ~longer & ~again
    for name, objective, text in (('margin', net.margin, 'margin of the logits'),
                                  ('temperature', net.standardised, 'CE of logits of unit std')):
        other = net.broken(net.attack(objective, x, y), y)
        left &= ~other
        b, c = int((other & stand).sum()), int((fell & ~other).sum())
        allowed = GAP * n + 2 * math.sqrt(b + c)
        yield _check(name, (b - c) / n, b - c > allowed, f'of {n} images {b} fall only to PGD on the {text}, '
                     f'{c} only on CE; over {allowed:.0f} apart, the scale of the logits hides much from CE')

    top = math.inf
    if stand.sum() >= max(3, math.ceil(LIMIT * n)):
        top = K * z[stand].softmax(1).amax(1).median()
    yield _check('softmax', top, top < UNIFORM, f'where PGD-{STEPS} fails the largest probability is '
                 f'{top:.2f} times chance (median); below {UNIFORM} CE does not see which class is near')

    mode = StraightThrough()

    def through(x_adv, y):
        with mode:
            return net.ce(x_adv, y)

    gradient(through, x, y)             # is there anything to pass?
    bpda = net.further(stand & mode.seen, x, y, lambda x, y: net.attack(through, x, y))
    seen = '' if mode.seen else ' (none was seen)'
    yield _few('straight-through', bpda,
               f'withstand PGD-{STEPS} and fall if rounding passes gradients on{seen}')

    # without a gradient of the network, on what plain gradients have left
    def search(x, y):
        return random_search(lambda x_adv: net.margin(x_adv, y), x, eps=eps, norm=net.norm, queries=QUERIES)

    found = net.further(left, x, y, search)
    yield _few('search', found, f'withstand the gradients and fall to {QUERIES} random queries')
    if transfer is None:
        yield Check('transfer', math.nan, 'skipped', 'no other network was given to craft on')
    else:
        there = Subject(transfer, **net.settings)
        found = net.further(left, x, y, lambda x, y: net.attack(there.margin, x, y))
        yield _few('transfer', found, 'withstand the gradients and fall to examples of another network')

@torch.no_grad()
def _checks(model, x, y, eps, step_size, norm, transfer):
    net = Subject(model, eps=eps, step_size=step_size, steps=STEPS, norm=norm)
    yield from _of_the_network(net, x, y)

    z = net.logits(x)
    keep = z.isfinite().all(1) & (z.argmax(1) == y)
    total, x, y, z = len(x), x[keep], y[keep], z[keep]
    if len(y) < MIN_IMAGES:
        for name in NAMES[3:]:
            yield Check(name, math.nan, 'skipped', f'not enough images: {len(y)} of {total} are classified '
                        f'correctly, {MIN_IMAGES} are needed')
        return

    x_pgd = net.attack(net.ce, x, y)                # the attack under suspicion
    fell = net.broken(x_pgd, y)
    yield from _of_the_gradient(net, x, y, x_pgd, ~fell, eps)
    yield from _weaker(net, x, y, fell, eps, step_size)
    yield from _stronger(net, x, y, z, fell, transfer, eps)
