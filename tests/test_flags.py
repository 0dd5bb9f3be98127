"""What the flags are when nobody gives them, what a hyper-parameter of one's own becomes, and what is said
before the training: --dry-run, and a teacher that is not what the method learns from."""
import argparse
import inspect
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import losses
import models
from losses import METHODS
from support import checkpoint, describe, validation
from support.files import Refused
from test_options import train
from test_smoke import HERE, run, teacher   # teacher: a fixture
from tools import methods

class Parsed(Exception):
    pass

def flags_of(script, monkeypatch):
    """name -> action of argparse, of all flags of a script."""
    parse, calls = argparse.ArgumentParser.parse_known_args, 1 if script == 'evaluate.py' else 2
    def stop(parser, *args, **kwargs):
        nonlocal calls
        calls -= 1
        if not calls:                               # the last: the others ask for the dataset and the loss
            raise Parsed(parser)
        return parse(parser, *args, **kwargs)
    with monkeypatch.context() as patched, pytest.raises(Parsed) as e:
        patched.setattr(argparse.ArgumentParser, 'parse_known_args', stop)
        run(script)
    return {action.option_strings[0]: action for action in e.value.args[0]._actions if action.option_strings}

def test_the_same_flag_means_the_same_in_every_script(monkeypatch):
    adv, teacher, evaluate = [flags_of(script, monkeypatch)
                              for script in ('train_adv.py', 'train_teacher.py', 'evaluate.py')]
    def meaning(action):
        return type(action), action.type, action.nargs, action.choices and list(action.choices)
    shared = (adv.keys() & teacher.keys()) - {'-h'}
    assert {'--dataset', '--model', '--lr', '--amp', '--resume'} <= shared
    for name in shared:
        assert meaning(adv[name]) == meaning(teacher[name]), name
        assert adv[name].default == teacher[name].default, name
        assert name == '--out' or adv[name].help == teacher[name].help, name
    shared = (adv.keys() & evaluate.keys()) - {'-h'}        # there the defaults are those of the training
    assert {'--dataset', '--eps', '--step-size', '--norm', '--seed'} <= shared
    for name in shared:
        assert meaning(adv[name]) == meaning(evaluate[name]), name

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

def test_dry_run_of_a_warm_start_from_a_teacher_that_is_not_trained_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        train(tmp_path / 'out', '--warm-start', 'teacher', '--dry-run', loss='logit_mse')
    assert not e.value.code and 'it would be trained first' in capsys.readouterr().out

def test_a_new_input_of_a_teacher_is_enough_for_its_teacher(teacher, tmp_path):
    script = train(tmp_path)
    teachers = dict(teacher=str(teacher), standard_teacher=str(teacher))
    args = argparse.Namespace(**dict(vars(script['args']), **teachers))
    for name, role in [('t_logits_flip', 'teacher'), ('s_logits', 'standard_teacher')]:
        networks, _ = checkpoint.load_teachers(args, {'logits', name}, script['d'], script['device'])
        assert list(networks) == [role]

def test_a_switch_that_is_on_by_default_can_be_turned_off(tmp_path, monkeypatch, capsys):
    def switched(logits_adv, y, *, soft=True, mode='a'):
        """Somebody, "Something".
        CE(p', y)"""
        return losses.ce(logits_adv, y)
    monkeypatch.setitem(METHODS, 'pgd_at', METHODS['pgd_at']._replace(loss=switched))
    script = train(tmp_path, '--no-soft', '--mode', 'b', loss='pgd_at')
    assert script['hp'] == dict(soft=False, mode='b')
    assert 'pgd_at --no-soft --mode b;' in capsys.readouterr().out
    assert '`--no-soft` `--mode a`' in methods.table()

@pytest.mark.parametrize('default, typed, value', [
    (6, '5', 5), (6, '0.5', 0.5), (-1.0, '-2', -2.0), ('a', 'b', 'b')])
def test_a_hyper_parameter_is_typed_as_a_number_or_as_a_word(default, typed, value):
    parser = argparse.ArgumentParser()
    parser.add_argument('--k', **describe.flag_of(default))
    given = parser.parse_args([f'--k={typed}']).k
    assert given == value and type(given) is type(value)

@pytest.mark.parametrize('default', [None, (1.0, 2.0), inspect.Parameter.empty])
def test_a_hyper_parameter_without_such_a_default_is_refused(default):
    with pytest.raises(Refused, match='needs a number, True, False or a word'):
        describe.flag_of(default)

def test_a_hyper_parameter_may_be_below_zero(tmp_path, monkeypatch):
    def below(logits_adv, y, *, offset=-0.5):
        return losses.ce(logits_adv, y) + offset
    monkeypatch.setitem(METHODS, 'pgd_at', METHODS['pgd_at']._replace(loss=below))
    assert train(tmp_path, loss='pgd_at')['hp'] == dict(offset=-0.5)

def test_a_hyper_parameter_with_the_name_of_a_flag_is_one_line():
    script = """if True:
        import losses, runpy
        def clash(logits_adv, y, *, eps=1.0): pass
        losses.METHODS['logit_mse'] = losses.METHODS['logit_mse']._replace(loss=clash)
        runpy.run_path('train_adv.py', run_name='__main__')"""
    done = subprocess.run([sys.executable, '-c', script], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert '--eps' in done.stderr and 'rename the hyper-parameter' in done.stderr

@pytest.mark.parametrize('loss, flags, scale', [
    ('ard', (), 0.01), ('adaad', (), 1.0), ('rslad', (), 0.1), ('ard', ('--scale', 0.5), 0.5)])
def test_the_scale_of_a_hundred_classes_is_the_authors(loss, flags, scale, tmp_path):
    """Goldblum et al. average over the classes, Huang et al. only over ten."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8), np.arange(200) % 100
    np.savez(tmp_path / 'cifar100.npz', x_train=images, y_train=labels, x_test=images, y_test=labels)
    torch.save(models.build('resnet18', 100, width=4).state_dict(), tmp_path / 'w.pt')
    script = run('train_adv.py', '--loss', loss, '--dataset', 'cifar100', '--data-dir', tmp_path, *flags,
                 '--width', 4, '--epochs', 1, '--steps', 1, '--amp', 'off', '--teacher', tmp_path / 'w.pt',
                 '--out', tmp_path / 'out')
    assert script['hp']['scale'] == scale

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
    (tmp_path / 'net.py').write_text('from torch.nn import *\nmake = lambda: Sequential('
                                     'BatchNorm2d(3), Flatten(), Linear(3072, 10)).eval()')
    script = run('train_adv.py', '--dataset', 'synthetic', '--subset', 32, '--epochs', 1, '--steps', 1,
                 '--amp', 'off', '--loss', 'lbgat', '--guide-model', f'{tmp_path}/net.py:make',
                 '--out', tmp_path / 'out')
    guide = script['guide']
    assert script['args'].width == 8 and sum(p.numel() for p in guide.parameters()) == 30736
    assert guide.training and guide[0].num_batches_tracked > 0      # however make() returns it

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

def test_without_a_backend_for_curves_a_training_ends_all_the_same(tmp_path):
    flags = '--loss standard --dataset synthetic --subset 32 --width 4 --epochs 1 --amp off'.split()
    done = subprocess.run([sys.executable, 'train_adv.py', *flags, '--out', tmp_path], cwd=HERE, text=True,
                          capture_output=True, env=dict(os.environ, MPLBACKEND='nothing'))
    assert done.returncode == 0 and 'note: no curves' in done.stdout and 'done in' in done.stdout, done.stderr
    assert not (tmp_path / 'state.pt').exists()
