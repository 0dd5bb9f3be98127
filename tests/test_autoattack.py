"""evaluate.py's AutoAttack is the authors': the same verdict for every image as one call of
theirs with the same seed."""
import torch
from pyautoattack import AutoAttack

import data, models
from test_smoke import run

def test_image_by_image(tmp_path):
    run('train_teacher.py', '--dataset', 'synthetic', '--width', '4', '--epochs', '4', '--out', tmp_path)
    script = run('evaluate.py', tmp_path / 'best.pt', '--n', 24, '--eps', 4, '--batch-size', 10,
                 '--attacks', 'autoattack', '--individual', '--seed', 3)
    results = script['results']
    model, _ = models.load_checkpoint(tmp_path / 'best.pt')
    d = data.load('synthetic')
    x, y = data.to_float(d.x_test[:24]), d.y_test[:24]
    for i, part in enumerate(script['PARTS']):    # after one, two, three and all four of the authors' attacks
        theirs = AutoAttack(model, norm='Linf', eps=4 / 255, seed=3, version='standard')
        theirs.attacks_to_run = script['PARTS'][:i + 1]
        x_adv, _ = theirs.run_standard_evaluation(x, y, batch_size=10)
        robust = model(x_adv).argmax(1) == y
        assert results[f'autoattack, after {part}']['correct'] == robust.sum()
    assert torch.equal(robust, script['robust'])
    # eps was chosen so
    assert 0 < results['autoattack (worst case)']['accuracy'] < results['clean']['accuracy']
    assert results['apgd-ce alone']['correct'] == results['autoattack, after apgd-ce']['correct']
