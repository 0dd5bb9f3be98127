"""Evaluations that meet: one report started twice, shards that wait; and images, folders and names that
are odd."""
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import models
from attacks import attack_mode, pgd
from support import checkpoint, shards, sources
from support.files import Refused
from test_smoke import HERE, run

FLAGS = '--n 20 --attacks pgd --steps 2 --no-audit'.split()

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp('model') / 'm.pt'
    torch.manual_seed(0)
    checkpoint.save_checkpoint(path, models.build('resnet18', 10, width=4), dataset='synthetic',
                               run=dict(dataset='synthetic', eps=8.0))
    return path

def command(*argv):
    return [sys.executable, str(HERE / 'evaluate.py'), *map(str, argv)]

def refused(capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run('evaluate.py', *argv)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1, err
    return err

def test_one_report_started_twice(model, tmp_path):
    """Whichever comes first ends; the other is refused, at once, and never waits."""
    both = [subprocess.Popen(command(model, *FLAGS, '--out', tmp_path / 'e.json'), stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=100)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    says = next(err for err in errors if err)
    assert says.count('\n') == 1 and ('at work on' in says or 'is there already' in says)
    assert json.loads((tmp_path / 'e.json').read_text())['complete']

HOLD = '''
import sys
from support.shards import Saved
saved = Saved(sys.argv[1], {}, (int(sys.argv[2]), int(sys.argv[3])))
print('held', flush=True)
sys.stdin.read()
'''

@pytest.mark.parametrize('held, second, refused', [
    ((0, 1), (0, 1), True), ((0, 2), (0, 2), True), ((0, 2), (0, 1), True), ((0, 1), (1, 2), True),
    ((0, 2), (1, 2), False), ((0, 2), (1, 3), True)])
def test_who_may_share_a_folder(held, second, refused, tmp_path):
    holder = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path / 's'), *map(str, held)], cwd=HERE,
                              text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == 'held\n'
    if refused:
        with pytest.raises(Refused, match='at work on'):
            shards.Saved(str(tmp_path / 's'), {}, second)
    else:
        shards.Saved(str(tmp_path / 's'), {}, second)
    holder.kill()                                   # however it ends, its locks go with it
    holder.communicate()
    shards.Saved(str(tmp_path / 's'), {}, second)

def test_a_shard_says_what_it_waits_for_and_gives_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, 'TELL', 0.3)
    monkeypatch.setattr(shards, 'GIVE_UP', 1.5)
    saved, t0 = shards.Saved(str(tmp_path / 's'), {}, (0, 2)), time.monotonic()
    with pytest.raises(Refused, match='pgd-1 is missing, and for .* minutes shard 1 of 2 was not at work'):
        saved.wait('pgd-1', 1)
    assert 1.4 < time.monotonic() - t0 < 10
    assert 'waiting for pgd-1, and shard 1 of 2 is not at work: start it' in capsys.readouterr().out

def test_without_locks_new_files_are_a_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, 'TELL', 0.2)
    monkeypatch.setattr(shards, 'GIVE_UP', 1.5)
    saved, t0 = shards.Saved(str(tmp_path / 's'), {}, (0, 2)), time.monotonic()
    for seconds in 1, 2:
        threading.Timer(seconds, (tmp_path / f's/pgd-{seconds}.pt').touch).start()
    with pytest.raises(Refused, match='pgd-9 is missing'):
        saved.wait('pgd-9', 1)
    assert time.monotonic() - t0 > 3

def test_a_shard_waits_for_one_that_is_at_work_however_long(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, 'TELL', 0.3)
    monkeypatch.setattr(shards, 'GIVE_UP', 0.5)
    holder = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path / 's'), '1', '2'], cwd=HERE,
                              text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == 'held\n'
    saved = shards.Saved(str(tmp_path / 's'), {}, (0, 2))
    threading.Timer(2, (tmp_path / 's/pgd-1.pt').touch).start()
    saved.wait('pgd-1', 1)
    assert 'waiting for pgd-1, which shard 1 of 2 computes' in capsys.readouterr().out

    saved.leave()                                   # the other is there
    assert (tmp_path / 's').exists()
    (tmp_path / 's/pgd-1.pt').unlink()
    holder.communicate('')                          # it ends, and nothing has been computed
    assert not (tmp_path / 's').exists()

def test_a_long_batch_shows_on_a_screen_that_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(shards, 'TELL', 0.1)
    for k, thing in shards.progress([7, 8], 'square'):
        assert thing == 7 + k
        time.sleep(0.25)
    out = capsys.readouterr().out
    assert 'square: 0 of 2 batches after 0.0 minutes' in out and 'square: 1 of 2' in out

def test_sorted_labels_are_noted_and_drawn(model, tmp_path):
    x, y, u, v = sources.synthetic()
    order = v.argsort(kind='stable')
    np.savez(tmp_path / 'sorted.npz', x_train=x, y_train=y, x_test=u[order], y_test=v[order])
    flags = ['--dataset', 'sorted', '--data-dir', tmp_path, '--no-audit', '--attacks', 'clean', '--n', 25]
    script = run('evaluate.py', model, *flags, '--out', tmp_path / 'a.json')
    assert 'these 25 images hold 1 of 10 classes (0): --draw takes them at random' in script['notes']
    drawn = [run('evaluate.py', model, *flags, '--draw', '--seed', seed, '--out', tmp_path / f'{k}.json')
             for k, seed in enumerate((0, 0, 1))]
    assert len(drawn[0]['y_test'].unique()) > 5
    assert (torch.equal(drawn[0]['x_test'], drawn[1]['x_test'])
            and not torch.equal(drawn[0]['x_test'], drawn[2]['x_test']))
    assert drawn[0]['evaluated']['images'] == drawn[1]['evaluated']['images'] != script['evaluated']['images']
    assert 'drawn with seed 1' in json.loads((tmp_path / '2.json').read_text())['images']

def test_a_folder_that_only_the_checkpoint_names_is_not_created(tmp_path, capsys):
    folder = tmp_path / 'home' / 'else'
    checkpoint.save_checkpoint(tmp_path / 'w.pt', models.build('resnet18', 10, width=4), dataset='cifar10',
                               run=dict(dataset='cifar10', data_dir=str(folder)))
    err = refused(capsys, tmp_path / 'w.pt', '--n', 5, '--attacks', 'clean')
    assert '--data-dir' in err and str(folder) in err and not (tmp_path / 'home').exists()

def test_a_terminal_that_does_not_know_the_name(model, tmp_path):
    folder = tmp_path / '数据 b'
    folder.mkdir()
    (folder / 'm.pt').write_bytes(model.read_bytes())
    done = subprocess.run(command(folder / 'm.pt', *FLAGS), capture_output=True,
                          env=dict(os.environ, PYTHONIOENCODING='cp1252'))
    assert done.returncode == 0 and not done.stderr and b'\\u6570\\u636e b' in done.stdout

def test_transfer_from_another_architecture_and_trades_step(model, tmp_path, capsys):
    torch.manual_seed(1)
    torch.save(models.build('resnet18', 10, width=6).state_dict(), tmp_path / 'source.pt')
    bare = ['--transfer-from', tmp_path / 'source.pt', '--transfer-model', 'resnet18']
    script = run('evaluate.py', model, '--n', 20, '--no-audit', '--attacks', 'pgd-trades', *bare,
                 '--transfer-width', 6, '--out', tmp_path / 'e.json')
    assert {'pgd-trades', 'transfer', 'transfer-cw'} <= set(script['results'])
    x, y = script['x_test'], script['y_test']
    with attack_mode(script['model']):
        torch.manual_seed(0)
        expected = pgd(lambda z: torch.nn.functional.cross_entropy(script['model'](z), y, reduction='none'),
                       x, eps=8 / 255, step_size=0.003, steps=20)
        torch.manual_seed(0)
        assert torch.equal(script['ATTACKS']['pgd-trades'](x, y), expected)
    assert 'does not fit' in refused(capsys, model, *FLAGS, *bare)          # its width is another
    assert 'are of --transfer-from' in refused(capsys, model, *FLAGS, '--transfer-width', 6)

def test_the_audit_alone(model):
    def audit(*argv):
        return subprocess.run([sys.executable, '-m', 'tools.audit', *map(str, argv)], cwd=HERE,
                              capture_output=True, text=True)
    from support.audit import NAMES
    done = audit(model, '--n', 40)
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == NAMES and lines[-1].startswith('masking audit: ')
    assert done.returncode == int('SUSPICIOUS' in lines[-1]) and not done.stderr
    wrong = audit(model, '--eps', 0.03)
    assert wrong.returncode == 2 and wrong.stderr.count('\n') == 1 and 'write --eps 8' in wrong.stderr
