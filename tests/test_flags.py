"""What the flags are when nobody gives them, what a hyper-parameter of one's own becomes, and what is said
before the training: --dry-run, and a teacher that is not what the method learns from."""
import signal

import pytest

import losses
from losses import METHODS
from support import validation
from test_options import train
from test_smoke import run, teacher         # teacher: a fixture

def test_dry_run_times_one_batch_of_the_validation_and_can_be_stopped(tmp_path, monkeypatch, capsys):
    seen, attack = [], validation.pgd
    def spy(*args, **kwargs):
        seen.append(signal.getsignal(signal.SIGTERM))
        return attack(*args, **kwargs)
    monkeypatch.setattr(validation, 'pgd', spy)
    with pytest.raises(SystemExit) as e:
        train(tmp_path / 'out', '--dry-run')
    assert not e.value.code and 'Nothing was written' in capsys.readouterr().out
    assert seen == [signal.SIG_DFL]                 # for one batch of the two

def test_a_switch_that_is_on_by_default_can_be_turned_off(tmp_path, monkeypatch, capsys):
    def switched(logits_adv, y, *, soft=True, mode='a'):
        """Somebody, "Something".
        CE(p', y)"""
        return losses.ce(logits_adv, y)
    monkeypatch.setitem(METHODS, 'pgd_at', METHODS['pgd_at']._replace(loss=switched))
    script = train(tmp_path, '--no-soft', '--mode', 'b', loss='pgd_at')
    assert script['hp'] == dict(soft=False, mode='b')
    assert 'pgd_at --no-soft --mode b;' in capsys.readouterr().out
    assert '`--no-soft` `--mode a`' in losses.table()

@pytest.mark.parametrize('flags, width, activation', [
    ([], 8, 'softplus'), (['--guide-width', 4], 4, 'softplus'), (['--guide-model', 'wrn-10-1'], 16, 'relu'),
    (['--guide-model', 'wrn-10-1', '--guide-width', 8], 8, 'relu')])
def test_the_guide_of_another_architecture_is_not_shaped_by_the_student_s_flags(flags, width, activation,
                                                                                tmp_path):
    script = run('train_adv.py', '--dataset', 'synthetic', '--subset', 32, '--epochs', 1, '--steps', 1,
                 '--amp', 'off', '--activation', 'softplus', '--loss', 'lbgat', *flags, '--out', tmp_path)
    config = script['guide'].build_args
    assert (config['width'] or 16, config['activation']) == (width, activation)

def test_a_guide_of_one_s_own_code_goes_with_a_dataset_s_width(tmp_path):
    (tmp_path / 'net.py').write_text('import torch\nmake = lambda: torch.nn.Sequential(torch.nn.Flatten(), '
                                     'torch.nn.Linear(3072, 10))')
    script = run('train_adv.py', '--dataset', 'synthetic', '--subset', 32, '--epochs', 1, '--steps', 1,
                 '--amp', 'off', '--loss', 'lbgat', '--guide-model', f'{tmp_path}/net.py:make',
                 '--out', tmp_path / 'out')
    assert script['args'].width == 8 and sum(p.numel() for p in script['guide'].parameters()) == 30730

@pytest.mark.parametrize('script', ['train_adv.py', 'train_teacher.py'])
def test_a_dataset_s_width_is_of_the_default_network(script, tmp_path):
    flags = ['--dataset', 'synthetic', '--subset', 32, '--epochs', 1, '--amp', 'off']
    flags += ['--loss', 'pgd_at', '--steps', 1] if script == 'train_adv.py' else []
    live = run(script, *flags, '--model', 'wrn-10-1', '--out', tmp_path)
    assert live['args'].width is None
    live = run(script, *flags, '--out', tmp_path / 'default')
    assert live['args'].width == 8

def test_a_robust_teacher_that_is_none_is_named(teacher, tmp_path, capsys):
    for loss, named in ('rslad', True), ('logit_mse', False):
        train(tmp_path / loss, '--teacher', teacher, '--eps', 64, loss=loss)
        assert ('learns from a robust teacher, and this one is not' in capsys.readouterr().out) == named

@pytest.mark.parametrize('flags, init', [
    ('--loss mart', 'normal'), ('--loss mart --inner ce', 'normal'), ('--loss mart --inner kl', 'normal'),
    ('--loss trades --inner ce', 'uniform'), ('--loss nat_adv --recipe paper --inner ce', 'zero')])
def test_an_inner_attack_that_is_the_method_s_own_changes_nothing(flags, init, tmp_path):
    script = run('train_adv.py', '--dataset', 'synthetic', '--subset', 32, '--epochs', 1, '--steps', 1,
                 '--batch-size', 32, '--width', 4, '--amp', 'off', *flags.split(), '--out', tmp_path)
    assert script['args'].init == init
