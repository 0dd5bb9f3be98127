"""
How long an evaluation will take, from a few steps on one batch: evaluate.py --dry-run.
"""
import time

import torch

from support.autoattack import FAST, PARTS

# gradients of the network, and answers without one, for an image that a part of AutoAttack does not break
PART_COSTS = {'apgd-ce': (101, 10), 'apgd-t': (909, 19), 'fab-t': (900, 937), 'square': (0, 5012)}
AUDIT_IMAGES, AUDIT_COSTS, WHERE_PGD_FAILS = 100, (107, 35), (203, 210)
STEPS = {'fgsm': 1, 'weak': 2, 'strong': 2, 'pgd-trades': 20}           # the others: --steps

def measured(attack, net, x, y, steps=5):
    """
    attack(x, y, steps=) -> x_adv: PGD on net, for one batch x (B,C,H,W), y (B,). -> seconds of what is
    done once (compilation), of a gradient and of an answer, both per image; the shares of the images that are
    right, and right after a few steps.
    """
    begun = time.perf_counter()
    attack(x, y, steps=1)
    with torch.no_grad():
        net(x).sum().item()                     # .item(): a GPU has finished only then
        once = time.perf_counter() - begun

        begun = time.perf_counter()
        right = net(x).argmax(1) == y
        clean = right.float().mean().item()
        answer = (time.perf_counter() - begun) / len(x)

    begun = time.perf_counter()
    x_adv = attack(x, y, steps=steps)
    with torch.no_grad():
        robust = (right & (net(x_adv).argmax(1) == y)).float().mean().item()
    gradient = (time.perf_counter() - begun) / steps / len(x)
    return once, gradient, answer, clean, robust

def estimate(args, audits, attack, net, x, y):
    """
    -> two lines. audits: is the masking audit a part of it? Images that are misclassified are not
    attacked; of AutoAttack's four parts the first meets all others, the rest those that withstand a few steps
    of PGD.
    """
    once, gradient, answer, clean, robust = measured(attack, net, x, y)
    clean_images, robust_images = args.n * clean, args.n * robust

    def minutes(images, gradients, answers=0):
        return images * (gradients * gradient + answers * answer) / 60

    table = {'clean': minutes(args.n, 0, 1)}
    if audits:
        some = min(args.n, AUDIT_IMAGES)
        table['masking audit'] = minutes(some, *AUDIT_COSTS) + minutes(some * robust, *WHERE_PGD_FAILS)
    for name in args.attacks:
        if name in PARTS:
            table[name] = minutes(clean_images, *PART_COSTS[name])
        elif name in ('autoattack', 'aa-fast'):
            first, *rest = PARTS if name == 'autoattack' else FAST
            after = clean_images if args.individual else robust_images
            table[name] = minutes(clean_images, *PART_COSTS[first])
            table[name] += sum(minutes(after, *PART_COSTS[part]) for part in rest)
        elif name != 'clean':
            restarts = args.restarts if name in ('pgd', 'cw') else 1
            table[name] = minutes(clean_images, restarts * STEPS.get(name, args.steps))
    if args.transfer_from:
        table['transfer'] = table['transfer-cw'] = minutes(clean_images, args.steps)
    for e in args.sweep_eps:
        table[f'eps {e:g}'] = minutes(clean_images, args.steps)
    for k in args.sweep_steps:
        table[f'pgd-{k}'] = minutes(clean_images, k)

    shards = int(args.shard.split('/')[1])
    total = once / 60
    for name, value in table.items():       # one process audits, and the others wait for it in the end
        total += value if name in ('clean', 'masking audit') else value / shards
    shown = ', '.join(f'{name} {value:.1f}' for name, value in table.items())
    return (f'measured on {len(x)} images: {1000 * gradient:.1f} ms a gradient, {1000 * answer:.1f} ms an '
            f'answer; {clean:.0%} are right, {robust:.0%} after 5 steps of PGD',
            f'about {total:.1f} minutes{f" with {shards} processes" if shards > 1 else ""}: {shown}. '
            'Nothing was written')
