"""Reduced precision against fp32, on fixed inputs; other networks and norms
through the command line."""
import pytest
import torch

import checkpoint, models
from test_smoke import TINY, X, Y, run

@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp('teacher')
    run('train_teacher.py', *TINY, '--epochs', 2, '--out', out)
    return out / 'best.pt'

def gradients(teacher, out, *flags):
    """x_adv, loss and gradient of the trained script's own craft and loss_on, weights after
    training replaced by fixed ones."""
    script = run('train_adv.py', '--loss', 'logit_mse', '--teacher', teacher, *TINY, '--epochs', 1,
                 '--steps', 2, '--out', out, *flags)
    torch.manual_seed(7)
    script['student'].load_state_dict(models.build('resnet18', 10, width=4).state_dict())
    script['student'].train()
    torch.manual_seed(8)
    x_adv = script['craft'](X, Y)
    loss = script['loss_on'](X, X + 0.01 * X.sign(), Y).mean()
    loss.backward()
    return x_adv, loss.detach(), torch.cat([p.grad.flatten() for p in script['student'].parameters()])

def test_bf16_points_the_same_way(teacher, tmp_path):
    x_adv, loss, grad = gradients(teacher, tmp_path / 'fp32', '--amp', 'off')
    x_adv2, loss2, grad2 = gradients(teacher, tmp_path / 'bf16', '--amp', 'bf16')
    assert 0 < abs(loss - loss2) <= 0.05 * loss
    assert torch.cosine_similarity(grad, grad2, dim=0) > 0.9          # BN over six images amplifies rounding
    assert x_adv.dtype == x_adv2.dtype == torch.float32
    assert (x_adv2 - X).abs().max() <= 8.001 / 255      # the two differ: 0.001 randn is below bf16's spacing

@pytest.mark.parametrize('flags', ['--model mobilenetv2', '--model preactresnet18 --normalize',
                                   '--model wrn-10-1', '--norm L2', '--attack-bn train', '--init uniform'])
def test_other_settings_train_and_evaluate(flags, teacher, tmp_path):
    run('train_adv.py', '--loss', 'logit_mse', '--teacher', teacher, *TINY, *flags.split(), '--epochs', 1,
        '--steps', 2, '--out', tmp_path)
    script = run('evaluate.py', tmp_path / 'best.pt', '--n', 4, '--attacks', 'pgd')
    net, meta = checkpoint.load_checkpoint(tmp_path / 'last.pt')
    assert meta['norm'] == ('L2' if 'L2' in flags else 'Linf')
    assert (net.config['mean'] is not None) == ('--normalize' in flags)
    assert script['args'].norm == meta['norm'] and script['args'].eps == (128 if 'L2' in flags else 8)
    assert not any('trained against' in note for note in script['notes'])

def test_seeded_runs_are_equal_and_seeds_differ(teacher, tmp_path):
    weights = []
    for i, seed in enumerate((0, 0, 1)):
        run('train_adv.py', '--loss', 'trades', *TINY, '--epochs', 1, '--steps', 2, '--seed', seed,
            '--out', tmp_path / str(i))
        weights.append(checkpoint.fingerprint(checkpoint.load_checkpoint(tmp_path / str(i) / 'last.pt')[0]))
    assert weights[0] == weights[1] != weights[2]
