"""
tools/bench.py as a user runs it; what it times computes the same as the plain implementation and as
train_adv.py.
"""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import losses
import models
from support import checkpoint, speed
from test_smoke import HERE, TINY, X, Y, run
from tools import scaling, steps
from tools.steps import Tricks

SMALL = '--model wrn-10-1 --width 8 --batch-size 6 --steps 3 --amp off'.split()         # compiled in seconds
X = 0.1 + 0.8 * X

# what the repository of TRADES has under this name, in short: it asks for a GPU
AUTHORS = '''
import torch
import torch.nn.functional as F

def trades_loss(model, x_natural, y, optimizer, step_size, epsilon, perturb_steps, beta):
    noise = 0.001 * torch.randn(x_natural.shape).cuda()
    optimizer.zero_grad()
    return F.cross_entropy(model((x_natural + noise).clamp(0, 1)), y)
'''

def test_as_a_user_runs_it(tmp_path):
    (tmp_path / 'trades.py').write_text(AUTHORS)
    command = [sys.executable, '-m', 'tools.bench', '--loss', 'trades', *SMALL, '--seconds', '0.5',
               '--profile', '--authors', tmp_path / 'trades.py', '--add', 'folded', 'fused',
               '--json', tmp_path / 'b.json']
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / 'b.json').read_text())
    rows = report['rows']
    assert {'plain', 'fast', "TRADES' authors", 'fast + folded + fused', 'evaluation, compiled'} < set(rows)
    assert all(row[k] > 0 for row in rows.values() for k in
               ('images_per_s', 'ratio', 'mflop_per_image', 'gflop_per_s', 'share_of_peak'))
    pairs = zip(rows['fast']['rounds'], rows['plain']['rounds'])
    assert report['ratio'] == rows['fast']['ratio'] == sorted(a / b for a, b in pairs)[2]
    assert rows['plain']['ratio'] == 1 and report['peak_rss_mib'] > 0 and not report['failed']
    assert f"fast is {report['ratio']:.2f} times plain" in done.stdout
    assert 'one fast step:' in done.stdout and report['profile']['kinds']['aten::mkldnn_convolution'] > 0
    # a line per row as it goes: warm, and in each of five rounds
    assert all(done.stdout.count(f'\n{name:<28} r') == 6 for name in rows)

def test_a_trick_that_fails_is_a_line_and_not_the_end(monkeypatch, capsys):
    def ours(setting, tricks):
        def broken(x, y):
            raise RuntimeError('no such kernel\nand more')
        return None, None, broken if tricks.fused else fine
    fine = lambda x, y: None
    monkeypatch.setattr(steps, 'ours', ours)
    monkeypatch.setattr(steps, 'plain', lambda setting: (None, None, fine))
    monkeypatch.setattr(steps, 'evaluation', lambda setting, tricks: fine)
    script = run('tools/bench.py', '--loss', 'trades', *SMALL, '--seconds', 0.001, '--add', 'fused')
    assert 'fast + fused' not in script['found']['rows'] and 'fast' in script['found']['rows']
    assert f'{"fast + fused":<28} FAILED: RuntimeError: no such kernel\n' in capsys.readouterr().out

def test_tricks_are_each_alone_and_each_left_out(monkeypatch):
    asked = []
    def ours(setting, tricks):
        asked.append(tricks)
        return None, None, lambda x, y: None
    monkeypatch.setattr(steps, 'ours', ours)
    monkeypatch.setattr(steps, 'plain', lambda setting: ours(setting, Tricks()))
    monkeypatch.setattr(steps, 'evaluation', lambda setting, tricks: lambda x, y: None)
    rows = run('tools/bench.py', '--loss', 'trades', *SMALL, '--seconds', 0.001, '--tricks')['rows']
    fast = rows['fast'].tricks
    for trick in ('loader', 'once', 'frozen', 'compile_attack', 'compile_update', 'fused', 'channels_last'):
        assert rows[f'plain + {trick}'].tricks == Tricks(**{trick: True})
        name = f'fast {"-" if getattr(fast, trick) else "+"} {trick}'
        assert rows[name].tricks == fast._replace(**{trick: not getattr(fast, trick)})
    # nothing to measure here
    assert not any('graphs' in name or 'amp' in name or 'folded' in name for name in rows)

# A gradient next to zero may have either sign, and its pixel then goes the other way: fast and plain may
# differ at one pixel in a thousand, and elsewhere not at all
def agree(a, b):
    return ((a - b).abs() > 1e-6).float().mean() < 1e-3

def setting(loss, init='uniform'):
    """init: 0.001 beside x the gradient of KL and MSE is rounding, in part."""
    method = losses.METHODS[loss]._replace(settings=dict(init=init))
    return steps.Setting(method, losses.hparams(method.loss), torch.device('cpu'), None, 3,
                         dict(name='wrn-10-1', width=8))

def stepped(side):
    """x_adv, loss and the weights after one update, from the same start."""
    net, craft, update = side
    torch.manual_seed(3)
    x_adv = craft(X, Y)
    torch.manual_seed(3)
    return x_adv, update(X, Y), torch.cat([p.detach().flatten() for p in net.parameters()])

@pytest.mark.parametrize('loss', ['trades', 'logit_mse'])
def test_fast_equals_plain(loss):
    s = setting(loss)
    x_adv, value, weights = stepped(steps.plain(s))
    assert 0.5 < ((x_adv - X).abs() * 255).mean() <= 8.001
    # not channels_last, which draws in another order
    for tricks in Tricks(), steps.of_train_adv(s), Tricks(once=True, fused=True):
        x_adv2, value2, weights2 = stepped(steps.ours(s, tricks))
        assert agree(x_adv, x_adv2), tricks
        assert torch.allclose(value, value2, rtol=1e-3), tricks
        assert torch.allclose(weights, weights2, rtol=1e-3, atol=1e-4), tricks

def test_the_eager_step_is_that_of_train_adv(tmp_path):
    train = run('train_adv.py', '--loss', 'trades', *TINY, *SMALL, '--epochs', 1, '--batch-size', 32,
                '--out', tmp_path)
    s = setting('trades', init=train['args'].init)
    net, craft, _ = steps.ours(s, Tricks(once=True, frozen=True))
    train['student'].load_state_dict(net.state_dict())
    train['student'].train()
    torch.manual_seed(3)
    x_adv = craft(X, Y)
    torch.manual_seed(3)
    assert torch.equal(x_adv, train['craft'](X, Y))
    inputs = steps.inputs(losses.needs(s.method.loss), net, None, X, x_adv, Y)
    assert torch.equal(s.method.loss(**inputs), train['loss_on'](X, x_adv, Y))

def test_folded_is_folded_anew_before_every_attack():
    s = setting('logit_mse')._replace(network=dict(name='resnet18', width=8))
    net, craft, _ = steps.ours(s, Tricks(once=True))
    folded_net, craft_folded, update_folded = steps.ours(s, Tricks(once=True, folded=True))
    for _ in range(2):                              # moves weights and statistics
        update_folded(X, Y)
    torch.manual_seed(3)
    stale = craft(X, Y)
    net.load_state_dict(folded_net.state_dict())
    torch.manual_seed(3)
    x_adv = craft(X, Y)
    torch.manual_seed(3)
    differ = ((craft_folded(X, Y) - x_adv).abs() > 1e-6).float().mean()
    assert differ < 0.01 < ((stale - x_adv).abs() > 1e-6).float().mean()

def test_scaling_varies_one_thing_at_a_time_and_starts_trainings(tmp_path, monkeypatch):
    base = dict(batch_size=64, width=8, steps=10, processes=1)
    found = scaling.points(base, dict(batch_size=[16, 64], width=[8, 16], steps=[1], processes=[1]))
    assert found == [base, dict(base, batch_size=16), dict(base, width=16), dict(base, steps=1)]
    monkeypatch.setattr(scaling, 'IMAGES', 64)
    monkeypatch.setattr(scaling, 'EPOCHS', 2)
    run_of = scaling.subprocess.run
    def eager(command, **options):                  # seconds
        return run_of([part for part in command if part != '--compile'], **options)
    monkeypatch.setattr(scaling.subprocess, 'run', eager)
    with pytest.raises(SystemExit) as stop:
        run('tools/bench.py', '--scaling', '--width', 8, '--batch-sizes', 32, '--widths', 8,
            '--attack-steps', 1, '--batch-size', 32, '--steps', 1, '--json', tmp_path / 's.json')
    assert stop.value.code is None
    report = json.loads((tmp_path / 's.json').read_text())
    assert [row['point'] for row in report['rows']] == [dict(base, batch_size=32, steps=1)]
    assert len(report['rows'][0]['epochs']) == scaling.EPOCHS - 1 and (tmp_path / 's.png').exists()

def test_a_signal_ends_the_training_that_scaling_has_started(tmp_path, monkeypatch):
    def signalled(command, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)
    monkeypatch.setattr(scaling.subprocess, 'run', signalled)
    with pytest.raises(SystemExit, match='stopped'):
        run('tools/bench.py', '--scaling', '--json', tmp_path / 's.json')
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and not list(tmp_path.iterdir())

@pytest.mark.parametrize('flags, message', [
    ('--loss hat', 'also needs logits_helper t_logits_adv'), ('--loss standard', 'attacks nothing'),
    ('--loss advprop', 'second BN'), ('--loss trades --gamma 1', 'of --loss trades: --beta'),
    ('--loss trades --batch-size 1', '--batch-size 1: a number, at least 2'),
    ('--seconds 0', '--seconds 0.0: a number'),
    ('--model resnet7', "unknown model 'resnet7'"), ('--json /proc/x/y.json', '/proc/x'),
    ('--authors nowhere.py', 'there is no nowhere.py'), ('--json /proc', 'it is a folder'),
    ('--scaling --batch-sizes 16 1024', 'a batch of 1024: of the 576 images'),
    ('--scaling --batch-size 1000', 'a batch of 1000'), ('--scaling --widths 8 0', '--widths 0: at least 1'),
    ('--scaling --attack-steps 0', '--attack-steps 0'), ('--scaling --processes 1 0', '--processes 0'),
    ('--scaling --processes 1 3', 'is no multiple of it'), ('--scaling --loss ltd', 'not ltd'),
    ('--scaling --tricks', 'drop --tricks'), ('--scaling --loss trades --beta 3', 'drop --beta'),
    ('--scaling --activation softplus', 'drop --activation')])
def test_wrong_flags_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run('tools/bench.py', *flags.split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count('\n') == 1 and message in err and not out

def test_an_older_table_stays_until_there_is_a_row_of_the_new_one(tmp_path, monkeypatch, capsys):
    (tmp_path / 'old.json').write_text('{"rows": 1}')
    def interrupted(*args, **options):
        raise KeyboardInterrupt
    monkeypatch.setattr(steps, 'from_device', lambda *args: iter(interrupted, 1))
    with pytest.raises(SystemExit, match='stopped$'):
        run('tools/bench.py', '--width', 4, '--batch-size', 4, '--steps', 1, '--json', tmp_path / 'old.json')
    monkeypatch.setattr(scaling, 'run_of', interrupted)
    with pytest.raises(SystemExit, match='stopped$'):
        run('tools/bench.py', '--scaling', '--json', tmp_path / 'old.json')
    assert (tmp_path / 'old.json').read_text() == '{"rows": 1}' and list(tmp_path.iterdir()) == [
        tmp_path / 'old.json']

def test_the_rule_of_folding():
    cpu, bf16 = torch.device('cpu'), torch.bfloat16
    assert speed.folding_pays(models.build('resnet18', 10, width=4), bf16, cpu)
    assert not speed.folding_pays(models.build('resnet18', 10, width=4), None, cpu)
    assert not speed.folding_pays(models.build('resnet18', 10, width=4), bf16, torch.device('cuda'))
    for name, dual_bn in (('resnet18', True), ('preactresnet18', False), ('wrn-10-1', False)):
        assert not speed.folding_pays(models.build(name, 10, width=4, dual_bn=dual_bn), bf16, cpu)

def test_train_adv_attacks_the_folded_network_as_it_is_now(tmp_path, monkeypatch):
    """The rule made to say yes, and without the minute that compiling takes."""
    monkeypatch.setattr(speed, 'folding_pays', lambda *args: True)
    monkeypatch.setattr(torch, 'compile', lambda net, **options: net)
    train = run('train_adv.py', '--loss', 'logit_mse', *TINY[:2], '--width', 8, '--subset', 32,
                '--batch-size', 16, '--epochs', 1, '--steps', 3, '--init', 'uniform', '--amp', 'off',
                '--compile', '--out', tmp_path, '--teacher', made(tmp_path / 'teacher.pt'))
    live = train['craft'].__globals__
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in live['attacked_net'].copy.modules())
    live['scheduler'] = torch.optim.lr_scheduler.ConstantLR(live['optimizer'], factor=1.0)
    for lr in 0.0, 0.1:                             # before an update that moves the weights, and after it
        live['optimizer'].param_groups[0]['lr'] = lr
        live['student'].train()
        live['update'](X, Y)
        torch.manual_seed(3)
        x_adv = live['craft'](X, Y)
        folded, live['attacked_net'] = live['attacked_net'], live['student']
        torch.manual_seed(3)
        assert ((live['craft'](X, Y) - x_adv).abs() > 1e-6).float().mean() < 0.01
        live['attacked_net'] = folded

def made(path):
    torch.manual_seed(1)
    checkpoint.save_checkpoint(path, models.build('resnet18', 10, width=8), dataset='synthetic')
    return path
