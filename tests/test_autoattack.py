"""
evaluate.py's AutoAttack is the authors': the same verdict for every image as one call of theirs.

$ python tests/test_autoattack.py REPORT.json data          # evaluate.py's AutoAttack again, by one call
"""
import json, sys, time

import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack

import attacks, data
from support import checkpoint
from tools.reading import load_network
from support.imagenet import in_memory
from models import bn_branch
from test_smoke import run

def test_image_by_image(tmp_path):
    run('train_adv.py', '--loss', 'pgd_at', '--dataset', 'synthetic', '--width', '4', '--steps', '2',
        '--out', tmp_path)
    model, _ = checkpoint.load_checkpoint(tmp_path / 'best.pt')
    d = data.load('synthetic')
    x, y = data.to_float(d.x_test[:5]), d.y_test[:5]
    ce = lambda x: F.cross_entropy(model(x), y, reduction='none')
    for eps in (4, 8, 16, 24, 32, 48):              # the first eps at which some images fall
        x_adv = attacks.pgd(ce, x, eps=eps / 255, step_size=eps / 4 / 255, steps=20)
        if (model(x_adv).argmax(1) != y).sum() > (model(x).argmax(1) != y).sum():
            break
    script = run('evaluate.py', tmp_path / 'best.pt', '--n', 5, '--eps', eps, '--batch-size', 3,
                 '--attacks', 'autoattack', '--seed', 3)
    theirs = AutoAttack(model, norm='Linf', eps=eps / 255, seed=3, version='standard')
    x_adv, _ = theirs.run_standard_evaluation(x, y, batch_size=3)
    assert torch.equal(model(x_adv).argmax(1) == y, script['worst'])
    results = script['results']
    assert results['autoattack (worst case)']['correct'] < results['clean']['correct']

def by_one_call(report, folder):
    """-> n booleans, what evaluate.py says and what pyautoattack says; the seconds that each took."""
    args, name = report['args'], 'autoattack (worst case)'
    d = data.load(report['dataset'], folder, training=False)
    model = load_network(report['checkpoint'], report).requires_grad_(False)    # of this fingerprint
    n = report['results'][name]['n']
    x, y = data.to_float(in_memory(d.x_test[:n], torch.device('cpu'))), d.y_test[:n]
    aa = AutoAttack(model, norm=report['norm'], eps=report['eps'], seed=args['seed'], version='standard')
    begun = time.perf_counter()
    with bn_branch(model, args.get('branch')):
        x_adv, _ = aa.run_standard_evaluation(x, y, batch_size=args['batch_size'])
        seconds = time.perf_counter() - begun
        with torch.no_grad():
            right = torch.cat([model(xb) for xb in x_adv.split(args['batch_size'])]).argmax(1) == y
    ours = torch.tensor([c == '1' for c in report['results'][name]['robust']])
    return ours, right, report['results'][name]['seconds'], seconds

if __name__ == '__main__':
    with open(sys.argv[1]) as f:
        report = json.load(f)
    ours, theirs, t_ours, t_theirs = by_one_call(report, sys.argv[2])
    print(json.dumps(dict(
        checkpoint=report['checkpoint'], fingerprint=report['fingerprint'], n=len(ours),
        search=report.get('search'),
        robust_evaluate=ours.sum().item(), robust_pyautoattack=theirs.sum().item(),
        images_that_differ=(ours != theirs).nonzero()[:, 0].tolist(),
        seconds_evaluate=t_ours, seconds_pyautoattack=t_theirs), indent=1))
