"""torchattacks' and foolbox's PGD on the same model, images and steps: the same accuracy, within sampling
error. For this comparison alone, and skipped without:
pip install --no-deps torchattacks foolbox eagerpy GitPython gitdb smmap requests

On your own checkpoint, as a table: python tests/test_tools.py CHECKPOINT DATASET DATA_DIR N
"""
import math
import pathlib
import sys

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import attacks
import data
from support import checkpoint
from support.summary import wilson

def ours(net, x, y, settings):
    objective = lambda x_adv: F.cross_entropy(net(x_adv), y, reduction='none')
    return attacks.pgd(objective, x, **settings)

def theirs_torchattacks(net, x, y, settings):
    from torchattacks import PGD
    attack = PGD(net, eps=settings['eps'], alpha=settings['step_size'], steps=settings['steps'],
                 random_start=True)
    return attack(x, y)

def theirs_foolbox(net, x, y, settings):
    from foolbox import PyTorchModel
    from foolbox.attacks import LinfPGD
    attack = LinfPGD(abs_stepsize=settings['step_size'], steps=settings['steps'], random_start=True)
    return attack(PyTorchModel(net, bounds=(0, 1), device=x.device), x, y, epsilons=settings['eps'])[0]

def verdicts(net, x, y, seeds=(0, 1), batch_size=50, **settings):
    """tool -> one (n,) bool per seed: which images are right under its attack."""
    settings, table = dict(dict(eps=8 / 255, step_size=2 / 255, steps=20), **settings), {}
    with attacks.attack_mode(net):
        for attack in (ours, theirs_torchattacks, theirs_foolbox):
            for seed in seeds:
                torch.manual_seed(seed)
                x_adv = torch.cat([attack(net, xb, yb, settings)
                                   for xb, yb in zip(x.split(batch_size), y.split(batch_size))])
                assert (x_adv - x).abs().max() <= settings['eps'] * (1 + 1e-4)
                with torch.no_grad():
                    right = torch.cat([net(xb).argmax(1) for xb in x_adv.split(batch_size)]) == y
                table.setdefault(attack.__name__.replace('theirs_', ''), []).append(right)
    return table

def disagreement(a, b):
    """Images that only a, and only b, leaves right; how many standard deviations of a fair coin apart."""
    only_a, only_b = (a & ~b).sum().item(), (b & ~a).sum().item()
    return only_a, only_b, abs(only_a - only_b) / math.sqrt(max(1, only_a + only_b))

def test_torchattacks_and_foolbox_agree():
    pytest.importorskip('torchattacks')
    pytest.importorskip('foolbox')
    d = data.load('synthetic')
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 200), torch.nn.ReLU(),
                              torch.nn.Linear(200, 10, bias=False)).requires_grad_(False).eval()
    torch.manual_seed(0)
    net[1].weight.normal_(std=0.1)
    features = net[:3](data.to_float(d.x_train))                # random, the last layer fitted to them
    net[3].weight.copy_(10 * torch.linalg.lstsq(features, F.one_hot(d.y_train, 10).float()).solution.T)
    x, y = data.to_float(d.x_test), d.y_test
    clean = (net(x).argmax(1) == y).sum()
    for eps in (1, 2, 3, 4, 6, 8, 12, 16):                      # the first that breaks a third of the images
        settings = dict(eps=eps / 255, step_size=eps / 255 / 4)
        table = verdicts(net, x, y, seeds=(0,), **settings)
        if table['ours'][0].sum() < 0.67 * clean:
            break
    assert clean > 0.8 * len(y) and 0.1 * clean < table['ours'][0].sum() < 0.67 * clean
    for name in ('torchattacks', 'foolbox'):
        mine, other = table['ours'][0], table[name][0]
        assert disagreement(mine, other)[2] < 3 and (mine != other).float().mean() < 0.05, name
    weak = verdicts(net, x, y, seeds=(0,), **dict(settings, steps=1))['ours'][0]
    assert disagreement(table['foolbox'][0], weak)[2] >= 3, 'the comparison could not fail'

if __name__ == '__main__':
    path, name, folder, n = sys.argv[1:]
    net, d = checkpoint.load_checkpoint(path)[0], data.load(name, folder)
    x, y = data.to_float(d.x_test[:int(n)]), d.y_test[:int(n)]
    with torch.no_grad():
        print(f'clean {(net(x).argmax(1) == y).sum()} of {n}')
    table = verdicts(net, x, y)
    print('| PGD-20, 8/255, step 2/255, random start | right, seed 0 | seed 1 | 95 % interval, seed 0 '
          '| only this one, only ours |\n|---|---|---|---|---|')
    for tool, (a, b) in table.items():
        low, high = wilson(a.sum().item(), int(n))
        only, mine, _ = disagreement(a, table['ours'][0])
        print(f'| {tool} | {a.sum()} ({100 * a.float().mean():.1f} %) | {b.sum()} | {low:.1f}-{high:.1f} '
              f'| {only}, {mine} |')
