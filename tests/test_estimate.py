"""evaluate.py --dry-run: what it says would be done, and how long that takes."""
import argparse, re

import pytest
import torch

import data
from support import autoattack, estimate
from test_evaluate import FLAGS, logits, net, tmp                   # tmp: a fixture
from test_smoke import run

def dry_run(capsys, *argv):
    """-> the lines on the screen, and the minutes that they name."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run('evaluate.py', *argv, '--dry-run')
    assert not e.value.code
    lines = [line for line in capsys.readouterr().out.splitlines() if 'weights: the whole file' not in line]
    return lines, float(re.search(r'about ([\d.]+) minutes', lines[-1])[1])

def test_dry_run_says_what_would_be_done_and_writes_nothing(tmp, tmp_path, capsys):
    weights = tmp_path / 'w.pt'
    weights.write_bytes((tmp / 'plain.pt').read_bytes())
    argv = [*net(tmp)[1:], *FLAGS, '--save-adv', tmp_path / 'adv.pt', '--figures']
    lines, _ = dry_run(capsys, weights, *argv, '--attacks', 'pgd', 'autoattack')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['w.pt'] and len(lines) <= 7
    text = '\n'.join(lines)
    for said in (str(weights), 'nets.py:plain', 'synthetic, the first 30 of 256', 'Linf eps 2.5/255',
                 'steps of 0.625/255', 'batches of 12', 'masking audit, pgd-5, autoattack',
                 f'report: {tmp_path}/w.eval-Linf-2.5-n30-pgd+autoattack-steps5.json', 'Nothing was written'):
        assert said in text, text
    argv += ['--n', 256]                # of so small a network's 30 images the minutes are 0.0
    less = dry_run(capsys, weights, *argv, '--attacks', 'pgd', '--no-audit')[1]
    assert less < dry_run(capsys, weights, *argv, '--attacks', 'pgd', 'autoattack')[1]

def test_the_estimate_adds_up(monkeypatch):
    """Of 600 images 300 are right and 60 withstand; a gradient takes 0.1 s, an answer 0.01 s."""
    args = argparse.Namespace(n=600, attacks=['clean', 'pgd', 'autoattack'], steps=20, restarts=2,
                              individual=False, transfer_from='t.pt', sweep_eps=[4.0], sweep_steps=[50],
                              shard='0/1')
    monkeypatch.setattr(estimate, 'measured', lambda *batch: (60, 0.1, 0.01, 0.5, 0.1))
    says = estimate.estimate(args, False, None, None, [0], [0])[1]
    aa = 300 * (101 * 0.1 + 10 * 0.01) / 60 + 60 * (1809 * 0.1 + 5968 * 0.01) / 60
    shown = (f'clean 0.1, pgd 20.0, autoattack {aa:.1f}, transfer 10.0, transfer-cw 10.0, eps 4 10.0, '
             'pgd-50 25.0')
    assert shown in says and f'about {1 + 0.1 + 20 + aa + 20 + 10 + 25:.1f} minutes' in says

    args.shard = '0/5'                  # the audit is the first process's alone
    says = estimate.estimate(args, True, None, None, [0], [0])[1]
    audited = 100 * (107 * 0.1 + 35 * 0.01) / 60 + 10 * (203 * 0.1 + 210 * 0.01) / 60
    assert f'about {1 + 0.1 + audited + (20 + aa + 20 + 10 + 25) / 5:.1f} minutes with 5 processes' in says

def test_the_estimate_knows_what_autoattack_costs(tmp):
    """Gradients and answers per image that no part breaks, counted."""
    d = data.load('synthetic')
    x, y = data.to_float(d.x_test[:2]), d.y_test[:2]
    counts = dict(gradient=0, answer=0)

    def counted(x):
        counts['gradient' if x.requires_grad and torch.is_grad_enabled() else 'answer'] += len(x)
        return logits(tmp, x)

    for part, costs in estimate.PART_COSTS.items():
        counts.update(gradient=0, answer=0)
        autoattack.one_part(part, counted, x, y, eps=0.1 / 255)
        assert (counts['gradient'] / 2, counts['answer'] / 2) == pytest.approx(costs, rel=0.1, abs=1), part
