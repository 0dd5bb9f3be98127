"""evaluate.py's AutoAttack is the authors': the same verdict for every image as one call of theirs."""
import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack

import attacks, checkpoint, data
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
