"""
Are a network's gradients to be trusted? The symptoms of masking (Athalye et al. 2018, "Obfuscated Gradients
Give a False Sense of Security"; Carlini et al. 2019, "On Evaluating Adversarial Robustness") as named checks.

$ python -m support.audit runs/x/best.pt                    # one line per check; status 1 if one is suspicious
$ python -m support.audit other.pt --model net.py:make --dataset cifar10 --n 200

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
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from attacks import attack_mode, cw_margin, fgsm, norms, pgd, start

# -----------------------------------------------------------------------------
# thresholds, and why

MIN_IMAGES = 10     # below, the three images of LIMIT would be a third of the evidence
ALPHA = 0.01        # attacks that must not win: exact one-sided McNemar test. Of a sound network nearly all
                    # discordant images are on the other side, far from this level
LIMIT = 0.03        # of the images, and at least three: what may befall a few borderline ones, like falling
                    # to one more attack. Of 200 images on each of four networks (README) Square broke none
                    # that had withstood the gradients: at 95 % a rate below 1.5 %, and twice that is too many
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
    Yields a Check per name in NAMES, in their order. x fp32 (B,3,H,W) in [0, 1], y (B,); misclassified images are left
    out. eps, step_size (default: a quarter of eps): in units of [0, 1]. transfer: another network of the same
    classes, to craft on. Modes, requires_grad, .grad and torch's RNG are as before once it is exhausted. Raises
    ValueError.
    """
    if not (x.dtype == torch.float32 and len(x) and 0 <= x.min() and x.max() <= 1):
        raise ValueError('images are fp32 in [0, 1]')
    if not 0 < eps < (1 if norm == 'Linf' else math.inf):
        raise ValueError(f'eps {eps:g}: in units of [0, 1], as in 8/255')
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([x.device] if x.is_cuda else []))
        stack.enter_context(torch.autocast(x.device.type, enabled=False))
        for net in (model, transfer) if transfer is not None else (model,):
            stack.enter_context(attack_mode(net))
        torch.manual_seed(seed)
        yield from _checks(model, x.detach(), y, eps, step_size or eps / 4, norm, transfer)

def audit(model, x, y, **settings):
    """-> list of Check; settings as of checks()."""
    return list(checks(model, x, y, **settings))

def overall(checks):
    """One line."""
    names = {v: ', '.join(c.name for c in checks if c.verdict == v) for v in ('suspicious', 'skipped')}
    ran = sum(c.verdict != 'skipped' for c in checks)
    skipped = f'; skipped: {names["skipped"]}' * bool(names['skipped'])
    if names['suspicious']:
        return f'masking audit: SUSPICIOUS: {names["suspicious"]} (of {ran} checks{skipped})'
    if ran <= NAMES.index('gradients'):                 # those before it say nothing about masking
        return f'masking audit: not enough images{skipped}'
    return f'masking audit: nothing suspicious in {ran} checks{skipped}'

# -----------------------------------------------------------------------------

class StraightThrough(TorchFunctionMode):
    """BPDA with the identity (Athalye et al.): forward as it is, backward as if nothing were rounded."""
    OPS = {getattr(owner, name) for name in ('round', 'floor', 'ceil', 'trunc', 'sign')
           for owner in (torch, torch.Tensor)}
    seen = False
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in self.OPS and args[0].requires_grad:
            self.seen, out = True, args[0] + (out - args[0]).detach()
        return out

def random_search(objective, x, *, eps, norm, queries):
    """Patches of +-eps at random, kept where they raise the objective: after Andriushchenko et al. 2020,
    "Square Attack". Reads no gradient."""
    B, C, H, W = x.shape
    sign = lambda *shape: 2.0 * torch.randint(2, shape, device=x.device) - 1
    inside = lambda d: (x + (d if norm == 'Linf' else d * eps / norms(d))).clamp(0, 1)
    delta = eps * sign(B, C, 1, W).expand(B, C, H, W)           # stripes, as theirs
    best = objective(inside(delta))
    for q in range(queries):
        side = max(1, round(0.5 * (1 - q / queries) * min(H, W)))
        def covered(size):                      # (B, size): side neighbours of a random place
            low = torch.randint(size - side + 1, (B, 1), device=x.device)
            return (torch.arange(size, device=x.device) - low).div(side, rounding_mode='floor') == 0
        patch = covered(H)[:, None, :, None] & covered(W)[:, None, None, :]
        trial = torch.where(patch, eps * sign(B, C, 1, 1), delta)
        value = objective(inside(trial))
        delta = torch.where((value > best)[:, None, None, None], trial, delta)
        best = torch.maximum(best, value)
    return inside(delta)

@torch.no_grad()
def _checks(model, x, y, eps, step_size, norm, transfer):
    def net(x, model=model):            # the sum: an output without a gradient has a zero one, and no error
        return model(x) + 0 * x.flatten(1).sum(1, keepdim=True)
    def ce(x_adv, y):
        return F.cross_entropy(net(x_adv), y, reduction='none')
    def standardised(x_adv, y):
        z = net(x_adv)
        return F.cross_entropy(z / z.std(1, keepdim=True).clamp_min(1e-30), y, reduction='none')
    def margin(x_adv, y, net=net):
        return cw_margin(net(x_adv), y)
    def gradient(objective, x, y):
        x = x.clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(objective(x, y).sum(), x)[0]
    def check(name, figure, bad, text):
        return Check(name, float(figure), 'suspicious' if bad else 'ok', text)

    # the network itself, on all images
    z = net(x)
    finite = z.isfinite().all(1)
    def deviation(others):
        return (others - z).nan_to_num(0, 0, 0).abs().max() / z[finite].std().nan_to_num(1).clamp_min(1e-30)
    off = deviation(net(x))
    yield check('deterministic', off, off > NOISE, f'a second forward differs by {off:.1e} stds of the '
                'logits; above rounding, a gradient is one draw of many: attack their mean')
    off = deviation(torch.cat([net(part) for part in x.split((len(x) + 1) // 2)]))
    yield check('batch', off, off > BATCH, f'in half the batch logits differ by {off:.1e} of their '
                'stds; above rounding, an image is judged by its neighbours')
    bad = ~finite | ~gradient(ce, x, y).flatten(1).isfinite().all(1)
    yield check('finite', bad.float().mean(), bad.any(), f'{bad.sum()} of {len(x)} images have NaN or Inf in '
                'logits or gradient, which stops any gradient attack')

    keep = finite & (z.argmax(1) == y)
    total, x, y, z = len(x), x[keep], y[keep], z[keep]
    n, K = len(y), z.shape[1]
    if n < MIN_IMAGES:
        for name in NAMES[3:]:
            yield Check(name, math.nan, 'skipped', f'not enough images: {n} of {total} are classified '
                        f'correctly, {MIN_IMAGES} are needed')
        return
    limit = max(3, math.ceil(LIMIT * n))

    def attack(objective, x, y, **settings):
        """-> x_adv; where the attack derails, x itself."""
        settings = dict(dict(eps=eps, step_size=step_size, steps=STEPS, norm=norm), **settings)
        x_adv = pgd(lambda x_adv: objective(x_adv, y), x, **settings)
        return torch.where(x_adv.isfinite().flatten(1).all(1)[:, None, None, None], x_adv, x)
    def broken(x_adv, y=y):
        return net(x_adv).argmax(1) != y
    def further(on, craft):
        """Of the images on, (n,) bool, those that craft(x, y) -> x_adv breaks; the others are spared."""
        also = torch.zeros_like(on)
        if on.any():
            also[on] = broken(craft(x[on], y[on]), y[on])
        return also
    def loses(name, weak, strong, text):
        b, c = int((weak & ~strong).sum()), int((strong & ~weak).sum())
        p = sum(math.comb(b + c, k) for k in range(b, b + c + 1)) / 2 ** (b + c)        # McNemar
        return check(name, (b - c) / n, p < ALPHA, f'of {n} images {b} fall only to {text}, {c} only to the '
                     f'other, which should be the stronger (p = {p:.1g})')
    def few(name, mask, text):
        return check(name, mask.sum() / n, mask.sum() >= limit, f'{mask.sum()} of {n} images {text}; {limit} '
                     'are too many')

    # the attack under suspicion, and whether it moves
    x_pgd = attack(ce, x, y)
    fell = broken(x_pgd)
    stand = ~fell
    size = lambda objective: gradient(objective, x_pgd, y).nan_to_num(0, 0, 0).flatten(1).abs().sum(1)
    yield few('gradients', stand & (size(ce) <= DEAD * size(margin)), f'withstand PGD-{STEPS} where the '
              "gradient of CE is zero, or rounding beside the margin's")
    h = eps / 20                        # small against the ball, large against rounding
    x0 = start(x, eps=eps, init='uniform', norm=norm).clamp(h, 1 - h)
    right = lambda x, y: net(x).gather(1, y[:, None])[:, 0] - net(x).mean(1)
    g = gradient(right, x0, y).nan_to_num(0, 0, 0)
    g_or_any = torch.where(g.flatten(1).any(1)[:, None, None, None], g, torch.randn_like(g))
    step = h * (g_or_any.sign() if norm == 'Linf' else g_or_any / norms(g_or_any))
    told, seen = (g * step).flatten(1).sum(1), (right(x0 + step, y) - right(x0 - step, y)) / 2
    wrong = ~((seen - told).abs() <= 0.5 * torch.maximum(seen.abs(), told.abs()))
    yield check('differences', wrong.sum() / n, wrong.sum() > WRONG * n, f'on {wrong.sum()} of {n} images '
                'a step along the gradient moves the logits less than half, or over twice, as far as it says')
    yield few('loss', ~(ce(x_pgd, y) > ce(x, y)), f'have no higher loss after PGD-{STEPS} than before')

    # attacks that have to be weaker
    one = broken(fgsm(lambda x_adv: ce(x_adv, y), x, eps=eps, norm=norm))
    yield loses('one-step', one, fell, f'FGSM, not to PGD-{STEPS}')
    noise = sum(broken(start(x, eps=eps, init='uniform', norm=norm)) for _ in range(STEPS)) > 0
    yield loses('noise', noise, fell, f'{STEPS} draws of noise, not to PGD-{STEPS}')
    less = broken(attack(ce, x, y, eps=eps / 2, step_size=step_size / 2))
    twice = min(2 * eps, 1) if norm == 'Linf' else 2 * eps          # 1 is every image there is
    more = broken(attack(ce, x, y, eps=twice, step_size=2 * step_size))
    yield loses('larger-eps', less & stand | fell & ~more, fell & ~less | more & stand,
                'the smaller of two eps (half, one, twice)')
    radius = 0.5 * (1 if norm == 'Linf' else math.sqrt(x[0].numel()))
    grey = further(stand, lambda x, y: attack(ce, x, y, eps=radius, step_size=radius / 4))
    yield few('unbounded', stand & ~grey, f'withstand PGD-{STEPS} at eps {radius:.3g}: all can be grey')

    # attacks that may be stronger, by a little
    longer = further(stand, lambda x, y: attack(ce, x, y, steps=MANY))
    yield few('steps', longer, f'withstand {STEPS} steps and fall to {MANY}')
    again = further(stand, lambda x, y: attack(ce, x, y, restarts=RESTARTS))
    yield few('restarts', again, f'withstand one start and fall to {RESTARTS} others')
    left = stand & ~longer & ~again
    for name, objective, text in (('margin', margin, 'margin of the logits'),
                                  ('temperature', standardised, 'CE of logits of unit std')):
        other = broken(attack(objective, x, y))
        left, b, c = left & ~other, int((other & stand).sum()), int((fell & ~other).sum())
        allowed = GAP * n + 2 * math.sqrt(b + c)
        yield check(name, (b - c) / n, b - c > allowed, f'of {n} images {b} fall only to PGD on the {text}, '
                    f'{c} only on CE; over {allowed:.0f} apart, the scale of the logits hides much from CE')
    top = K * z[stand].softmax(1).amax(1).median() if stand.sum() >= limit else math.inf
    yield check('softmax', top, top < UNIFORM, f'where PGD-{STEPS} fails the largest probability is '
                f'{top:.2f} times chance (median); below {UNIFORM} CE does not see which class is near')
    mode = StraightThrough()
    def through(x_adv, y):
        with mode:
            return ce(x_adv, y)
    gradient(through, x, y)             # is there anything to pass?
    bpda = further(stand & mode.seen, lambda x, y: attack(through, x, y))
    yield few('straight-through', bpda, f'withstand PGD-{STEPS} and fall if rounding passes gradients on'
              + ' (none was seen)' * (not mode.seen))

    # attacks that read no gradient of the network, on what plain gradients have left
    search = dict(eps=eps, norm=norm, queries=QUERIES)
    found = further(left, lambda x, y: random_search(lambda x_adv: margin(x_adv, y), x, **search))
    yield few('search', found, f'withstand the gradients and fall to {QUERIES} random queries')
    if transfer is None:
        yield Check('transfer', math.nan, 'skipped', 'no other network was given to craft on')
    else:
        there = lambda x_adv, y: margin(x_adv, y, net=lambda x: net(x, transfer))
        yield few('transfer', further(left, lambda x, y: attack(there, x, y)),
                  'withstand the gradients and fall to examples of another network')

# -----------------------------------------------------------------------------
# alone, on the first test images

def main():
    import argparse
    import sys
    import data
    from models import NAMES as MODELS, bn_branch
    from support import checkpoint, evaluation, files, imagenet, refusals, shards

    parser = argparse.ArgumentParser(prog='python -m support.audit', description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    refusals.one_line(parser)
    files.plain_output()
    arg = parser.add_argument
    arg('checkpoint')
    arg('--dataset', help=f'{" ".join(data.DATASETS)}, or the NAME of DIR/NAME.npz')
    arg('--data-dir', metavar='DIR')
    arg('--eps', type=float, help='radius in pixels (0..255); this and the next two: as it was trained')
    arg('--step-size', type=float, help='default: eps / 4')
    arg('--norm', choices=['Linf', 'L2'])
    arg('--n', type=int, default=100, help='the first N test images')
    arg('--model', help=f"of somebody else's weights: {MODELS}, or FILE.py:FUNCTION that returns the network")
    arg('--width', type=int, help="its first layer (default: the paper's)")
    arg('--transfer-from', metavar='PT', help='another network to craft on')
    arg('--transfer-model', help='its architecture (default: --model)')
    arg('--transfer-width', type=int, help='its first layer (default: --width)')
    arg('--seed', type=int, default=0)
    args = parser.parse_args()

    refusals.seed(args)
    refusals.numbers(args, 1, math.inf, 'n')
    run = evaluation.threat(args, checkpoint.read(args.checkpoint))
    if args.norm == 'Linf' and args.eps >= 255:
        refusals.refuse(f'--eps {args.eps:g}: below 255, or there is nothing left to attack')
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    d = data.load(args.dataset, args.data_dir, device=device, training=False)
    model, _ = checkpoint.load_checkpoint(args.checkpoint, args.model, d.classes, width=args.width,
                                          channels=d.x_test.shape[-1])
    source = None
    if args.transfer_from:
        width = args.transfer_width or (None if args.transfer_model else args.width)
        source, _ = checkpoint.load_checkpoint(args.transfer_from, args.transfer_model or args.model, d.classes, width=width,
                                               channels=d.x_test.shape[-1], flag='--transfer-model')
        source = source.to(device)
    model = model.to(device)
    x = data.to_float(imagenet.in_memory(d.x_test[:args.n], device)).contiguous()
    y = d.y_test[:args.n].to(device)
    evaluation.check_images(x, y.cpu(), d.classes)
    with bn_branch(model, run.get('eval_branch', 'main')):
        evaluation.inspect(model.eval(), x[:10], y[:10], d.classes)
        steps = checks(model, x, y, eps=args.eps / 255, step_size=args.step_size / 255, norm=args.norm, seed=args.seed,
                       transfer=source)
        found = []
        for _, check in shards.progress(steps, 'masking audit', 'checks', len(NAMES)):
            found.append(check)
            files.say(f'{check.verdict:<11}{check.name:<17}{check.text}')
    files.say(overall(found))
    sys.exit(1 if any(check.verdict == 'suspicious' for check in found) else 0)

if __name__ == '__main__':
    main()
