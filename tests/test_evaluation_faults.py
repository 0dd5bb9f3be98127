"""
Bit rot, full disks and deleted folders under an evaluation that is half done: one line each, and the same
command again ends in the report that an undisturbed evaluation has, or says what to do.
"""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import data
from support import files, shards, summary
from test_smoke import HERE, run

FLAGS = '--n 24 --batch-size 8 --eps 2.5 --attacks fgsm pgd --steps 2 --no-audit'.split()       # six batches

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """Right on clean images, half broken at eps 2.5: a filter for every class mean, and noise."""
    d = data.load('synthetic')
    x = data.to_float(d.x_train).flatten(1)
    weight = torch.stack([x[d.y_train == c].mean(0) - x.mean(0) for c in range(10)])
    weight += 8 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp('model')
    (folder / 'net.py').write_text('from torch import nn\n\ndef make():\n'
                                   '    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))\n')
    torch.save({'1.weight': 0.2 * weight, '1.bias': -0.2 * weight @ x.mean(0)}, folder / 'm.pt')
    return folder / 'm.pt'

def command(model, out):
    return [model, '--model', f'{model.parent}/net.py:make', '--dataset', 'synthetic', *FLAGS, '--out', out]

def report(path):
    r = json.loads(path.read_text())
    assert r['complete']
    for row in r['results'].values():
        del row['seconds']
    return r['results'], r['notes'], r['flags']

@pytest.fixture(scope='module')
def expected(model):
    out = model.parent / 'whole.json'
    run('evaluate.py', *command(model, out))
    return report(out)

def ends(status, capsys, *argv):
    """The evaluation ends early, with this status and one line, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run('evaluate.py', *argv)
    err = capsys.readouterr().err
    if isinstance(e.value.code, str):               # what Python prints for it, with status 1
        err, code = err + e.value.code + '\n', 1
    else:
        code = e.value.code
    assert code == status and err.strip().count('\n') == 0, err
    return err.strip()

def goes_on(model, out, expected):
    run('evaluate.py', *command(model, out))
    assert report(out) == expected
    left = {path.name for path in out.parent.iterdir()}
    assert left == {out.name}                       # neither state nor a half-written file

def stop_after(batches, monkeypatch):
    """Ctrl-C when so many batches are saved."""
    save, saved = files.save, []

    def stopping(path, content):
        save(path, content)
        saved.append(path)
        if len(saved) == batches:
            raise KeyboardInterrupt

    monkeypatch.setattr(files, 'save', stopping)

def test_what_is_stopped_before_its_first_batch_leaves_nothing(model, tmp_path):
    """Here, in its audit."""
    argv = ['evaluate.py', str(model), '--model', f'{model.parent}/net.py:make', '--dataset', 'synthetic',
            '--n', '20', '--attacks', 'pgd', '--out', f'{tmp_path}/e.json']
    code = ('import runpy, sys; from support import audit\n'
            'def stop(*args, **options):\n    raise KeyboardInterrupt\n    yield\n'
            f'audit.checks, sys.argv = stop, {argv}\n'
            'runpy.run_path("evaluate.py", run_name="__main__")')
    done = subprocess.run([sys.executable, '-c', code], cwd=HERE, capture_output=True, text=True)
    assert done.stderr == '\nstopped: nothing was finished\n' and not list(tmp_path.iterdir())

@pytest.fixture
def half(model, expected, tmp_path, monkeypatch, capsys):
    """A report, and beside it the state of an evaluation that was stopped after five of six batches."""
    out = tmp_path / 'e' / 'e.json'
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        said = ends(1, capsys, *command(model, out))
    assert said.startswith('stopped') and 'the same command continues' in said
    assert len(list(out.parent.glob('e.json.state/*.pt'))) == 5
    return out

def cut(content):
    return content[:len(content) // 2]

def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1:]

@pytest.mark.parametrize('damage', [cut, flip, lambda content: b'', lambda content: b'<html>404</html>'])
def test_a_damaged_batch_is_computed_again(damage, model, expected, half, capsys):
    batch = sorted(half.parent.glob('e.json.state/*.pt'))[1]
    batch.write_bytes(damage(batch.read_bytes()))
    goes_on(model, half, expected)
    lines = [line for line in capsys.readouterr().out.splitlines() if 'computed again' in line]
    assert len(lines) == 1 and str(batch) in lines[0]

def test_another_torch_file_in_the_place_of_a_batch(model, expected, half, capsys):
    first, second, *_ = sorted(half.parent.glob('e.json.state/*.pt'))
    first.write_bytes(second.read_bytes())          # whole, and of other images
    second.write_bytes(model.read_bytes())
    goes_on(model, half, expected)
    assert capsys.readouterr().out.count('is no batch of this evaluation: computed again') == 2

@pytest.mark.parametrize('damage', [cut, lambda content: b'', lambda content: b'[1]'])
def test_a_damaged_fingerprint_says_what_to_delete(damage, model, expected, half, capsys):
    path = half.parent / 'e.json.state/fingerprint.json'
    path.write_bytes(damage(path.read_bytes()))
    said = ends(2, capsys, *command(model, half))
    assert f'delete {half}.state' in said
    shutil.rmtree(f'{half}.state')
    goes_on(model, half, expected)

@pytest.mark.parametrize('damage', [cut, lambda content: b'', lambda content: bytes(len(content))])
def test_a_torn_report_of_an_unfinished_evaluation_is_written_again(damage, model, expected, half, capsys):
    half.write_bytes(damage(half.read_bytes()))
    goes_on(model, half, expected)
    assert f'{half} is torn, and is written again' in capsys.readouterr().out

def test_a_torn_report_without_its_state_is_not_overwritten(model, half, capsys):
    shutil.rmtree(f'{half}.state')
    half.write_bytes(cut(half.read_bytes()))
    before = half.read_bytes()
    assert 'choose another --out, or delete it' in ends(2, capsys, *command(model, half))
    assert half.read_bytes() == before

def test_what_a_killed_save_leaves_is_removed(model, expected, half):
    (half.parent / '.e.json.0123abcd.tmp').write_text('{"che')
    (half.parent / 'e.json.state/.pgd-0-0.pt.0123abcd.tmp').write_text('PK')
    goes_on(model, half, expected)

@pytest.mark.parametrize('which', ['.state', ''])
def test_a_folder_that_is_deleted_meanwhile(which, model, expected, half, monkeypatch, capsys):
    save, gone = files.save, f'{half}.state' if which else half.parent

    def deleting(path, content):
        save(path, content)
        shutil.rmtree(gone)

    with monkeypatch.context() as patch:
        patch.setattr(files, 'save', deleting)
        said = ends(2, capsys, *command(model, half))
    assert f'{half}.state was deleted while this evaluation worked in it: start it again' in said
    goes_on(model, half, expected)

def test_what_save_adv_wrote_before_the_end_is_written_again(model, expected, tmp_path, monkeypatch, capsys):
    """The disk was full when the report came; another evaluation's images stay."""
    out, adv = tmp_path / 'e.json', tmp_path / 'adv.pt'
    write = summary.write
    def full(path, report):
        if report['complete']:
            raise OSError(28, 'No space left on device', path)
        write(path, report)
    argv = [*command(model, out), '--save-adv', adv]
    with monkeypatch.context() as patch:
        patch.setattr(summary, 'write', full)
        assert 'the same command continues' in ends(1, capsys, *argv)
    other = tmp_path / 'other.pt'
    saved = torch.load(adv, weights_only=True)
    torch.save(dict(saved, evaluated=dict(saved['evaluated'], eps=8.0)), other)
    assert 'is there already' in ends(2, capsys, *argv[:-1], other)
    run('evaluate.py', *argv)
    assert report(out)[0] == expected[0]
    assert torch.equal(torch.load(adv, weights_only=True)['x_adv'], saved['x_adv'])

@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no device that is full')
@pytest.mark.parametrize('where, status', [(files, 1), (summary, 1), (shards, 2)])
def test_a_full_disk(where, status, model, expected, half, monkeypatch, capsys):
    """Full when a batch, the report or the place for it is written; the kernel says so."""
    def on_a_full_disk(path, mode='r', **options):
        return open('/dev/full' if 'w' in mode else path, mode, **options)

    before = half.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(where, 'open', on_a_full_disk, raising=False)
        said = ends(status, capsys, *command(model, half))
    assert 'the disk is full: cannot write' in said and str(half.parent) in said
    if where is files:
        assert 'the same command continues' in said
    if where is not shards:                         # the rows so far, or the place that was reserved: whole
        assert '"complete": false' in half.read_text() and half.read_bytes()
    else:
        assert half.read_bytes() == before
    goes_on(model, half, expected)
