"""Reduced precision against fp32, on fixed inputs; other networks and norms
through the command line."""
import json

import pytest
import torch

import data, models
from support import checkpoint
from test_smoke import TINY, X, Y, run

@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp('teacher')
    run('train_teacher.py', *TINY, '--epochs', 2, '--out', out)
    return out / 'best.pt'

def gradients(out, *flags):
    """x_adv, loss and gradient of the trained script's own craft and loss_on, weights after
    training replaced by fixed ones."""
    script = run('train_adv.py', *TINY, '--epochs', 1, '--steps', 2, '--out', out, *flags)
    torch.manual_seed(7)
    fixed = models.build(script['args'].model, 10, width=script['args'].width)
    script['student'].load_state_dict(fixed.state_dict())
    script['student'].train()
    torch.manual_seed(8)
    x_adv = script['craft'](X, Y)
    loss = script['loss_on'](X, X + 0.01 * X.sign(), Y).mean()
    loss.backward()
    return x_adv, loss.detach(), torch.cat([p.grad.flatten() for p in script['student'].parameters()])

def test_bf16_points_the_same_way(teacher, tmp_path):
    flags = ['--loss', 'logit_mse', '--teacher', teacher]
    x_adv, loss, grad = gradients(tmp_path / 'fp32', *flags, '--amp', 'off')
    x_adv2, loss2, grad2 = gradients(tmp_path / 'bf16', *flags, '--amp', 'bf16')
    assert 0 < abs(loss - loss2) <= 0.05 * loss
    assert torch.cosine_similarity(grad, grad2, dim=0) > 0.9          # BN over six images amplifies rounding
    assert x_adv.dtype == x_adv2.dtype == torch.float32
    assert (x_adv2 - X).abs().max() <= 8.001 / 255      # the two differ: 0.001 randn is below bf16's spacing

def test_compiled_computes_what_eager_does(tmp_path):
    flags = ['--loss', 'trades', '--model', 'wrn-10-1', '--width', '8', '--init', 'uniform', '--amp', 'off']
    x_adv, loss, grad = gradients(tmp_path / 'eager', *flags)
    x_adv2, loss2, grad2 = gradients(tmp_path / 'compiled', *flags, '--compile')
    # a gradient next to zero may have either sign, and its pixel then goes the other way
    assert ((x_adv - x_adv2).abs() > 1e-6).float().mean() < 1e-3
    assert torch.allclose(loss, loss2, rtol=1e-4) and torch.allclose(grad, grad2, rtol=1e-3, atol=1e-5)

@pytest.mark.parametrize('flags', ['--model mobilenetv2', '--model preactresnet18 --normalize',
                                   '--model wrn-10-1', '--norm L2', '--attack-bn train', '--init uniform'])
def test_other_settings_train_and_evaluate(flags, teacher, tmp_path):
    run('train_adv.py', '--loss', 'logit_mse', '--teacher', teacher, *TINY, *flags.split(), '--epochs', 1,
        '--steps', 2, '--out', tmp_path)
    script = run('evaluate.py', tmp_path / 'best.pt', '--n', 4, '--attacks', 'pgd')
    net, meta = checkpoint.load_checkpoint(tmp_path / 'last.pt')
    assert meta['norm'] == ('L2' if 'L2' in flags else 'Linf')
    assert (net.build_args['mean'] is not None) == ('--normalize' in flags)
    assert script['args'].norm == meta['norm'] and script['args'].eps == (128 if 'L2' in flags else 8)
    assert not any('trained against' in note for note in script['notes'])

def test_another_norm_than_in_training_brings_its_own_eps(teacher):
    script = run('evaluate.py', teacher, '--norm', 'L2', '--n', 4, '--attacks', 'fgsm')
    assert (script['args'].eps, script['args'].step_size) == (128, 32)      # and not Linf's 8

def test_seeded_runs_are_equal_and_seeds_differ(teacher, tmp_path):
    weights = []
    for i, seed in enumerate((0, 0, 1)):
        run('train_adv.py', '--loss', 'trades', *TINY, '--epochs', 1, '--steps', 2, '--seed', seed,
            '--out', tmp_path / str(i))
        weights.append(checkpoint.fingerprint(checkpoint.load_checkpoint(tmp_path / str(i) / 'last.pt')[0]))
    assert weights[0] == weights[1] != weights[2]

def test_somebody_elses_network_is_evaluated(tmp_path, capsys):
    (tmp_path / 'net.py').write_text('import torch\nmake = lambda: torch.nn.Sequential(\n'
                                     '    torch.nn.Flatten(), torch.nn.Linear(3072, 10))\n')
    torch.manual_seed(0)
    weights = {'module.1.weight': torch.randn(10, 3072) / 50, 'module.1.bias': torch.zeros(10)}
    torch.save(weights, tmp_path / 'other.pt')
    script = run('evaluate.py', tmp_path / 'other.pt', '--model', tmp_path / 'net.py:make',
                 '--dataset', 'synthetic', '--n', 50, '--attacks', 'pgd')
    d = data.load('synthetic')
    x, y = data.to_float(d.x_test[:50]), d.y_test[:50]
    w = weights['module.1.weight']
    assert script['results']['clean']['correct'] == (x.flatten(1) @ w.T).argmax(1).eq(y).sum()
    assert not script['model'].training and 'provenance unknown' in capsys.readouterr().out

def test_two_reports_are_compared_by_image(tmp_path, capsys):
    def write(name, eps, **masks):
        rows = {k.replace('_', '-'): dict(robust=m, accuracy=100 * m.count('1') / len(m), interval=[0, 100],
                                          per_class={'0': 50.0}) for k, m in masks.items()}
        (tmp_path / name).write_text(json.dumps(dict(
            dataset='d', images='first 20', norm='Linf', eps_pixels=eps, complete=True, results=rows, args={},
            checkpoint='best.pt', fingerprint='0', trained={}, model=dict(num_classes=10))))
    write('a.json', 8, clean='1' * 20, pgd_20='1' + '0' * 8 + '1' * 11)
    write('b.json', 8, clean='1' * 20, pgd_20='0' + '1' * 8 + '1' * 11)
    write('c.json', 4, clean='1' * 20)
    run('tools/compare.py', tmp_path / 'a.json', tmp_path / 'b.json')
    clean, pgd = capsys.readouterr().out.splitlines()[-2:]
    assert clean.split()[:7] == ['clean', '100.00', '100.00', '0.00', '0', '0', '1.0000']
    # nine images differ, one of them against the trend: 2 (C(9,0) + C(9,1)) / 2^9
    assert pgd.split()[:7] == ['pgd-20', '60.00', '95.00', '35.00', '1', '8', '0.0391'] and 'larger' in pgd
    for other, says in (('c.json', 'eps_pixels is 8'), ('none.json', 'No such file')):
        with pytest.raises(SystemExit) as e:
            run('tools/compare.py', tmp_path / 'a.json', tmp_path / other)
        err = capsys.readouterr().err
        assert e.value.code == 2 and says in err and err.count('\n') == 1

def test_best_is_selected_by_pgd_or_for_standard_training_by_clean_accuracy(tmp_path):
    for loss, figure in (('standard', 'val_clean'), ('pgd_at', 'val_pgd20')):
        run('train_adv.py', '--loss', loss, *TINY, '--epochs', 3, '--steps', 1, '--out', tmp_path / loss)
        rows = [json.loads(line) for line in (tmp_path / loss / 'log.jsonl').read_text().splitlines()][1:]
        _, meta = checkpoint.load_checkpoint(tmp_path / loss / 'best.pt')
        assert meta[figure] == max(row[figure] for row in rows) == rows[meta['epoch'] - 1][figure]
        assert checkpoint.load_checkpoint(tmp_path / loss / 'last.pt')[1]['epoch'] == 3
