"""Bad input is one clear line that says what to do, before any work starts; never a traceback."""
import argparse
import importlib.util
import types

import numpy as np
import pytest
import torch

import models
from support import checkpoint, refusals
from test_smoke import TINY, run, teacher                       # teacher: a fixture

def test_half_a_teacher_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = 'runs/synthetic-resnet18-w4-n64-teacher'
    checkpoint.save_checkpoint(f'{folder}/last.pt', models.build('resnet18', 10, width=4),
                           dataset='synthetic', epoch=3, run=dict(epochs=9))
    asked = []
    monkeypatch.setattr(checkpoint.child, 'run', lambda command: asked.append(command) or 2)
    with pytest.raises(SystemExit, match='no teacher, no student'):
        run('train_adv.py', *TINY, '--out', tmp_path / 'out')
    assert len(asked) == 1 and {f'--out={folder}', '--resume'} <= set(asked[0])     # it is to be finished

BAD = [     # script, arguments, what the one line has to say
    ('train_adv.py', '--loss trade', "invalid choice: 'trade'"),
    ('train_adv.py', '--loss pgd_at --beta 2',
     'unknown argument --beta: see --help; hyper-parameters of --loss pgd_at: none'),
    ('train_adv.py', '--loss trades --tau 2', 'of --loss trades: --beta'),
    ('train_adv.py', '--loss trades --bet 2', 'of --loss trades: --beta'),
    ('train_adv.py', '--model resnet19', "unknown model 'resnet19'; known: resnet18"),
    ('train_adv.py', '--model net.py', 'returns the network, net.py:FUNCTION'),
    ('evaluate.py', '{tmp}/bare.pt --dataset synthetic --model {tmp}/net.py', 'net.py:FUNCTION'),
    ('train_adv.py', '--dataset cifar11', "unknown dataset 'cifar11'"),
    ('train_adv.py', '--eps 0.031', '0.031 is 7.9/255, not 8/255; for 8/255 write --eps 8'),
    ('train_adv.py', '--eps 0.5', 'eps is in pixels'),
    ('train_adv.py', '--norm L2 --eps 3', 'for 3 write --eps 765'),
    ('train_adv.py', '--norm L2 --eps 0.5', 'for 0.5 write --eps 127.5'),
    ('train_adv.py', '--eps 765', 'pixels, 0 to 255'),
    ('train_adv.py', '--norm L2 --eps nan', 'positive number'),
    ('evaluate.py', '{tmp}/ten.pt --dataset synthetic --norm L2 --eps 1', 'for 1 write --eps 255'),
    ('evaluate.py', '{tmp}/ten.pt --dataset synthetic --norm L2 --sweep-eps 0.5', '--sweep-eps 0.5: eps is'),
    ('evaluate.py', '{tmp}/ten.pt --dataset synthetic --sweep-eps 300', '--sweep-eps 300: eps is in pixels'),
    ('train_adv.py', '--teacher {tmp}/none.pt', 'No such file'),
    ('train_adv.py', '--teacher {tmp}/html.pt', 'web page'),
    ('train_adv.py', '--teacher {tmp}/truncated.pt', 'not a PyTorch checkpoint, or is truncated'),
    ('train_adv.py', '--teacher {tmp}/classes.pt', 'knows 7 classes'),
    ('train_adv.py', '--teacher {tmp}/list.pt', 'holds a list, not a state dict'),
    ('train_adv.py', '--loss trades --out /proc/nowhere', 'cannot write /proc/nowhere'),
    ('train_adv.py', '--subset 999999', 'has 576 training images'),
    ('train_adv.py', '--step-size 0.007', 'in pixels'),
    ('train_adv.py', '--beta nan', '--beta nan: a number'),
    ('train_adv.py', '--lr inf', '--lr inf: a number'),
    ('train_adv.py', '--loss trades --teacher {tmp}/bare.pt', '--loss trades takes no --teacher'),
    ('train_adv.py', '--teacher {tmp}/object.pt', 'save its state dict alone'),
    ('train_adv.py', '--loss ard', '--loss ard learns from a robust teacher: pass --teacher'),
    ('train_adv.py', '--loss alp --recipe paper', 'none is recorded for alp'),
    ('train_adv.py', '--loss standard --inner kl', '--loss standard attacks nothing'),
    ('train_adv.py', '--inner l2', "invalid choice: 'l2'"),
    ('train_adv.py', '--init zero', 'at x itself this attack has no gradient'),
    ('train_adv.py', '--loss pgd_at --inner kl --init zero', 'at x itself this attack has no gradient'),
    ('train_adv.py', '--loss dkl --recipe paper --eps 4', "dkl's steps are for --eps 8 in Linf"),
    ('train_adv.py', '--targets als', '--loss logit_mse takes no cross-entropy'),
    ('train_adv.py', '--loss pgd_at --bn-order nat', 'does not put both x and x_adv'),
    ('train_adv.py', '--loss pgd_at --inner kl --bn-order nat', 'does not put both x and x_adv'),
    ('train_adv.py', '--loss pgd_at --dual-bn', 'does not put both x and x_adv'),
    ('train_adv.py', '--loss trades --dual-bn --bn-order adv', 'without statistics'),
    ('train_adv.py', '--loss trades --free 2 --inner ce', '--free has no attack'),
    ('train_adv.py', '--loss pgd_at --free 2 --steps 50', '--steps does nothing with --free'),
    ('train_adv.py', '--loss pgd_at --smoothing 0.3', '--smoothing does nothing without --targets'),
    ('train_adv.py', '--loss pgd_at --milestones 0.1 0.2',
     '--milestones does nothing with --schedule onecycle'),
    ('train_teacher.py', '--milestones 0.1 0.2', '--milestones does nothing with --schedule onecycle'),
    ('train_adv.py', '--norm L2 --eps 20000', 'no L2 radius is larger'),
    ('evaluate.py', '{tmp}/ten.pt --dataset synthetic --norm L2 --sweep-eps 20000', 'no L2 radius is larger'),
    ('train_adv.py', '--loss pgd_at --awp-warmup 0.5', '--awp-warmup does nothing without --awp'),
    ('train_adv.py', '--loss pgd_at --extra-fraction 0.9', '--extra-fraction does nothing without --extra'),
    ('train_adv.py', '--loss pgd_at --teacher-model resnet34', 'which has no teacher: leave it out'),
    ('train_adv.py', '--loss logit_mse --teacher-model resnet34', 'that --teacher names: give both'),
    ('train_adv.py', '--loss trades --sync-bn', '--sync-bn does nothing in one process'),
    ('train_teacher.py', '--sync-bn', '--sync-bn does nothing in one process'),
    ('train_teacher.py', '--dataset imagenet --model resnet18 --augment crop', 'flipped, or none'),
    ('train_adv.py', '--loss lbgat --guide-model resnet99', "--guide-model: unknown model 'resnet99'"),
    ('train_adv.py', '--loss lbgat --guide-model net.py:make --guide-width 77',
     '--guide-model net.py:make makes the whole network'),
    ('train_adv.py', '--loss lbgat --guide-model net.py:make --normalize',
     '--guide-model net.py:make makes the whole network'),
    ('train_adv.py', '--loss pgd_at --model net.py:make --normalize', 'net.py:make makes the whole network'),
    ('train_teacher.py', '--model net.py:make --normalize', 'net.py:make makes the whole network'),
    ('train_adv.py', '--loss trades --dual-bn --craft-branch main --init zero', 'has no gradient'),
    ('train_adv.py', '--loss als --targets als', 'no cross-entropy to a label'),
    ('train_adv.py', '--loss als --alpha 3', 'at most 1'),
    ('train_adv.py', '--loss ltd --tau 0', '--tau 0.0: a number, at least 0.001'),
    ('train_adv.py', '--loss trades --swa 1', 'no epoch is left'),
    ('train_adv.py', '--loss trades --normalize --warm-start {tmp}/ten.pt', 'normalises its images'),
    ('train_adv.py', '--loss pgd_at --warm-start teacher', 'name a file'),
    ('train_adv.py', '--loss pgd_at --warm-start {tmp}/none.pt', 'No such file'),
    ('train_adv.py', '--loss pgd_at --warm-start {tmp}/classes.pt', 'knows 7 classes'),
    ('train_adv.py', '--loss pgd_at --ema 0.9 --swa 0.5', 'one average of the weights at a time'),
    ('train_adv.py', '--loss pgd_at --ema 1.5', 'at least 0 and at most 1'),
    ('train_adv.py', '--loss pgd_at --craft-branch main', 'are of --dual-bn'),
    ('train_adv.py', '--loss pgd_at --free 2 --norm L2', 'steps in Linf'),
    ('train_adv.py', '--loss pgd_at --inner teacher', 'needs a --teacher'),
    ('train_adv.py', '--loss pgd_at --activation gelu', "invalid choice: 'gelu'"),
    ('train_adv.py', '--loss pgd_at --extra {tmp}/html.pt', 'is not an npz or npy file of images'),
    ('train_adv.py', '--loss pgd_at --extra {tmp}/none.npz', 'is not an npz or npy file of images'),
    ('train_adv.py', '--loss pgd_at --extra {tmp}/labels.npz', 'no array x, x_train, image or images'),
    ('train_adv.py', '--loss pgd_at --extra {tmp}/floats.npz', 'holds float64 (3, 32, 32, 3)'),
    ('train_adv.py', '--loss pgd_at --extra {tmp}/small.npy', 'holds uint8 (3, 8, 8, 3)'),
    ('train_adv.py', '--loss pgd_at --extra {tmp}/small.npy --extra-fraction 1', 'a batch needs both kinds'),
    ('train_adv.py', '--dataset imagenet --model resnet18 --data-dir {tmp}', 'should be a folder'),
    ('train_adv.py', '--loss ltd --dataset imagenet --recipe paper --model resnet18', 'are for CIFAR'),
    ('train_teacher.py', '--model torchvision-resnet18 --width 8', 'has one width'),
    ('evaluate.py', '{tmp}/ten.pt --dataset imagenet --data-dir {tmp}', 'should be a folder'),
    ('train_teacher.py', '--epochs 0', '--epochs 0: a number, at least 1'),
    ('train_teacher.py', '--lr nan', '--lr nan: a number, at least 0'),
    ('train_adv.py', f'--loss trades --subset 9 --subset-seed {2 ** 64}', 'from 0 to 2^63 - 1'),
    ('evaluate.py', '{tmp}/ten.pt --sweep-eps 2 nan', '--sweep-eps nan'),
    ('evaluate.py', '{tmp}/none.pt', 'No such file'),
    ('evaluate.py', '{tmp}/bare.pt', 'name their architecture with --model'),
    ('evaluate.py', '{tmp}/bare.pt --dataset synthetic --model resnet18', 'does not fit resnet18'),
    ('evaluate.py', '{tmp}/classes.pt --dataset synthetic', 'knows 7 classes'),
    ('evaluate.py', '{tmp}/html.pt', 'web page'),
    ('evaluate.py', '{tmp}/nothing.pt --model resnet18', 'No such file'),
    ('evaluate.py', '{tmp}/classes.pt --model resnet18', 'says itself what it is'),
    ('evaluate.py', '{tmp}/bare.pt --dataset synthetic --model resnet18 --width 4 --out {tmp}',
     'Is a directory'),
    ('evaluate.py', '{tmp}/bare.pt --dataset synthetic --model {tmp}/none.py:make', 'there is no file'),
    ('evaluate.py', '{tmp}/bare.pt --dataset synthetic --model {tmp}/net.py:nothing', "attribute 'nothing'"),
    ('evaluate.py', '{tmp}/bare.pt --dataset synthetic --model {tmp}/net.py:text', 'returns a str, not a'),
    ('evaluate.py', '{tmp}/bare.pt --dataset synthetic --model {tmp}/net.py:make', 'entries differ'),
    ('evaluate.py', '{tmp}/bare.pt --dataset synthetic --model {tmp}/net.py:make --width 4', 'drop --width'),
    ('evaluate.py', '{tmp}/ten.pt --dataset synthetic --shard 2/2', 'I from 0 to N-1'),
    ('evaluate.py', '{tmp}/ten.pt --dataset synthetic --branch aux', 'has no dual BN'),
    ('evaluate.py', '{tmp}/ten.pt --dataset synthetic --transfer-from {tmp}/ten.pt --transfer-model resnet34',
     'says itself what it is: drop --transfer-model'),
    ('evaluate.py', '{tmp}/classes.pt --attacks pdg', "invalid choice: 'pdg'"),
]

@pytest.fixture(scope='module')
def broken(tmp_path_factory, teacher):
    tmp = tmp_path_factory.mktemp('broken')
    (tmp / 'html.pt').write_text('<!DOCTYPE html><html>404</html>')
    (tmp / 'truncated.pt').write_bytes(teacher.read_bytes()[:5000])
    torch.save([1, 2], tmp / 'list.pt')
    torch.save(dict(state_dict={}, args=types.SimpleNamespace()), tmp / 'object.pt')
    torch.save(checkpoint.load_checkpoint(teacher)[0].state_dict(), tmp / 'bare.pt')
    (tmp / 'net.py').write_text('import torch\ntext = str\nmake = lambda: torch.nn.Linear(3, 4)\n')
    np.savez(tmp / 'labels.npz', y=np.zeros(3))
    np.savez(tmp / 'floats.npz', x=np.zeros((3, 32, 32, 3)))
    np.save(tmp / 'small.npy', np.zeros((3, 8, 8, 3), np.uint8))
    checkpoint.save_checkpoint(tmp / 'ten.pt', models.build('resnet18', 10, width=4), dataset='synthetic')
    checkpoint.save_checkpoint(tmp / 'classes.pt', models.build('resnet18', 7, width=4), dataset='synthetic')
    return tmp

@pytest.mark.parametrize('script, argv, says', BAD, ids=lambda v: v[:40])
def test_bad_input_is_one_clear_line(script, argv, says, broken, tmp_path, capsys):
    argv = argv.format(tmp=broken).split()
    if script != 'evaluate.py':             # the last of two equal flags wins
        argv = [*TINY, '--out', tmp_path, *argv]
    with pytest.raises(SystemExit) as e:
        run(script, *argv)
    out = capsys.readouterr()
    assert e.value.code == 2 and says in out.err and out.err.count('\n') == 1 and len(out.err) < 400, out
    assert 'epoch' not in out.out           # before any work

def test_a_seed_for_a_subset_that_nobody_asked_for(tmp_path, capsys):
    for script in ('train_adv.py', 'train_teacher.py'):
        with pytest.raises(SystemExit):
            run(script, '--dataset', 'synthetic', '--width', 4, '--subset-seed', 3, '--out', tmp_path)
        assert '--subset-seed draws the images of --subset: give both' in capsys.readouterr().err

def test_graphs_are_refused_where_they_would_overwrite_what_is_read_later(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('TORCHINDUCTOR_CUDAGRAPHS', '1')
    for flags in ['--amp', 'off'], ['--accumulate', 2]:
        with pytest.raises(SystemExit) as e:
            run('train_adv.py', '--loss', 'trades', *TINY, '--width', 8, '--compile', *flags,
                '--out', tmp_path)
        err = capsys.readouterr().err
        assert e.value.code == 2 and 'TORCHINDUCTOR_CUDAGRAPHS=1' in err and err.count('\n') == 1

def test_without_autoattack_an_evaluation_says_so_before_it_begins(broken, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, package=None: None)
    command = ['evaluate.py', broken / 'ten.pt', '--dataset', 'synthetic', '--n', 4, '--no-audit']
    with pytest.raises(SystemExit) as e:
        run(*command, '--out', tmp_path / 'e.json')
    out = capsys.readouterr()
    assert e.value.code == 2 and 'pip install pyautoattack' in out.err and out.err.count('\n') == 1
    assert 'clean' not in out.out
    run(*command, '--attacks', 'clean', '--out', tmp_path / 'e.json')       # the rest does not need it

@pytest.mark.parametrize('model, size, says', [
    ('torchvision-resnet18', 32, 'is made for 224 pixels'), ('resnet18', 224, 'is made for 32 pixels'),
    ('resnet18', 64, None), ('torchvision-resnet18', 64, None), ('net.py:make', 224, None)])
def test_a_network_for_images_of_another_size_is_said(model, size, says):
    notes = refusals.images(argparse.Namespace(model=model, batch_size=4, accumulate=1),
                            torch.zeros(8, size, size, 3, dtype=torch.uint8))
    assert len(notes) == bool(says) and all(says in note for note in notes)

def test_images_of_one_colour_cannot_be_standardised(tmp_path, capsys):
    np.savez(tmp_path / 'mine.npz', x_train=np.full((20, 32, 32, 3), 7, np.uint8), y_train=np.arange(20) % 4,
             x_test=np.full((8, 32, 32, 3), 7, np.uint8), y_test=np.arange(8) % 4)
    with pytest.raises(SystemExit) as e:
        run('train_adv.py', '--loss', 'pgd_at', '--dataset', 'mine', '--data-dir', tmp_path, '--width', 4,
            '--normalize', '--out', tmp_path / 'out')
    assert e.value.code == 2 and '--normalize: a channel is the same' in capsys.readouterr().err

def test_radii_of_imagenet_in_l2(broken, tmp_path):
    """3.0, of the range: 765 pixels."""
    script = run('evaluate.py', broken / 'ten.pt', '--dataset', 'synthetic', '--norm', 'L2', '--eps', 765,
                 '--sweep-eps', 510, '--steps', 2, '--n', 4, '--attacks', 'pgd', '--no-audit',
                 '--out', tmp_path / 'e.json')
    moved = {name: r['max_perturbation'] for name, r in script['results'].items()}
    assert 255 < moved['pgd-2'] <= 765.1 and moved['pgd-2 at eps 510'] <= 510.1
    script = run('train_adv.py', '--loss', 'pgd_at', *TINY, '--norm', 'L2', '--eps', 382.5, '--steps', 1,
                 '--epochs', 1, '--out', tmp_path / 'm')
    assert script['args'].step_size == 382.5 / 4

def test_a_teacher_that_has_lost_its_accuracy_is_refused(tmp_path, capsys):
    """Other labels, another order of classes, another normalisation: it classifies at random now."""
    torch.manual_seed(0)
    net = models.build('resnet18', 10, width=4)
    for stored, refused in ((95.0, True), (12.0, False), (None, False)):
        known = {} if stored is None else dict(val_clean=stored)
        checkpoint.save_checkpoint(tmp_path / 't.pt', net, dataset='synthetic', **known)
        flags = ['--loss', 'logit_mse', *TINY, '--teacher', tmp_path / 't.pt', '--epochs', 1, '--steps', 1]
        capsys.readouterr()
        if refused:
            with pytest.raises(SystemExit) as e:
                run('train_adv.py', *flags, '--out', tmp_path / f'{stored}')
            err = capsys.readouterr().err
            assert e.value.code == 2 and err.count('\n') == 1
            assert 'had 95.0 % in its own training: other labels' in err and 't.pt' in err
        else:
            run('train_adv.py', *flags, '--out', tmp_path / f'{stored}')

def test_a_teacher_s_weights_alone_take_the_student_s_width_and_are_doubted(tmp_path, capsys):
    torch.save(models.build('resnet18', 10, width=4).state_dict(), tmp_path / 'w.pt')
    run('train_adv.py', '--loss', 'logit_mse', *TINY, '--epochs', 1, '--steps', 1,
        '--teacher', tmp_path / 'w.pt', '--out', tmp_path / 'out')
    assert 'note: that is little for a teacher' in capsys.readouterr().out

def test_a_teacher_that_gives_no_numbers_is_refused(tmp_path, capsys):
    net = models.build('resnet18', 10, width=4)
    torch.nn.init.constant_(net.linear.bias, float('nan'))
    checkpoint.save_checkpoint(tmp_path / 't.pt', net, dataset='synthetic')
    with pytest.raises(SystemExit) as e:
        run('train_adv.py', *TINY, '--teacher', tmp_path / 't.pt', '--out', tmp_path / 'm')
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1
    assert 'non-finite logits' in err and 'learning rate' not in err and not list(tmp_path.glob('m/*.pt'))

BAD_NPZ = [
    (lambda a: a.pop('y_test'), 'has no array y_test'),
    (lambda a: a.update(x_train=a['x_train'] / 255), 'x_train is float64'),
    (lambda a: a.update(x_test=a['x_test'].transpose(0, 3, 1, 2)), 'images are uint8 (N, H, W, 3)'),
    (lambda a: a.update(y_train=a['y_train'] * 1.0), 'labels are integers'),
    (lambda a: a.update(y_train=a['y_train'][:-1]), 'one per image'),
    (lambda a: a.update(y_test=a['y_test'] + 1), 'outside the classes 0 to 3'),
    (lambda a: a.update(y_train=a['y_train'] - 1), 'outside the classes'),
    (lambda a: a.update(y_train=a['y_train'] * 10 ** 6), 'labels up to 3000000 on 20 training images'),
    (lambda a: a.update(y_train=a['y_train'] * 0 + 3, y_test=a['y_test'] * 0 + 3), 'are of one class'),
    (lambda a: a.update(x_train=a['x_train'][:, :0], x_test=a['x_test'][:, :0]), 'images of 0 x 32 pixels'),
    (lambda a: a.update(y_train=a['y_train'].astype(object)), 'not an npz file of plain arrays'),
]

@pytest.mark.parametrize('damage, says', BAD_NPZ, ids=[says for _, says in BAD_NPZ])
def test_a_bad_npz_is_one_clear_line(damage, says, tmp_path, capsys):
    arrays = dict(x_train=np.zeros((20, 32, 32, 3), np.uint8), y_train=np.arange(20) % 4,
                  x_test=np.zeros((8, 32, 32, 3), np.uint8), y_test=np.arange(8) % 4)
    damage(arrays)
    np.savez(tmp_path / 'mine.npz', **arrays)
    with pytest.raises(SystemExit) as e:
        run('train_adv.py', '--loss', 'trades', '--dataset', 'mine', '--data-dir', tmp_path,
            '--out', tmp_path / 'out')
    err = capsys.readouterr().err
    assert e.value.code == 2 and says in err and err.count('\n') == 1
