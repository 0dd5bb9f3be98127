"""A disk that fills up, an impatient user, no network: one clear line each, and what was
saved before is intact."""
import os, pathlib, resource, subprocess, sys, tempfile, time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data, losses, models
from support import checkpoint, files
from support.files import Refused
from test_smoke import TINY, run
from tools import compare

HERE = pathlib.Path(__file__).parent.parent
COMMAND = [sys.executable, str(HERE / 'train_teacher.py'), '--dataset', 'synthetic', '--width', '4',
           '--epochs', '200', '--out']

def wait_for(path, process, seconds=60):
    while not path.exists() and process.poll() is None and seconds > 0:
        time.sleep(0.2)
        seconds -= 0.2
    assert path.exists()

def test_a_full_disk(tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))     # a checkpoint is 200 kB
    done = subprocess.run([*COMMAND, str(tmp_path)], preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and f'cannot write {tmp_path}' in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.lock', 'log.jsonl']         # no half of a file

def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    net = models.build('resnet18', 10, width=4)
    checkpoint.save_checkpoint(tmp_path / 'a.pt', net, epoch=1)
    class Unsavable:
        def __reduce__(self):
            raise OSError(28, 'No space left on device')
    with pytest.raises(OSError):
        checkpoint.save_checkpoint(tmp_path / 'a.pt', net, epoch=2, x=Unsavable())
    assert checkpoint.load_checkpoint(tmp_path / 'a.pt')[1]['epoch'] == 1
    assert len(list(tmp_path.iterdir())) == 1

def test_a_full_disk_is_said_of_the_file_that_did_not_fit(tmp_path):
    with pytest.raises(OSError) as e, files.atomic(tmp_path / 'a.pt'):
        raise OSError(28, 'No space left on device')
    assert e.value.filename == tmp_path / 'a.pt'

@pytest.fixture
def of_others():
    """A folder that everyone may read; the test is run as somebody who is not root."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield pathlib.Path(folder)
        if os.getuid() == 0:
            os.seteuid(0)

def become_nobody():
    if os.getuid() == 0:
        os.seteuid(65534)

def test_a_lock_of_somebody_elses_run_can_be_looked_at(of_others):
    path = of_others / '.lock'
    hold = "import sys; from support import files; f = open(sys.argv[1], 'w'); print(files.lock(f)); input()"
    holder = subprocess.Popen([sys.executable, '-uc', hold, path], cwd=HERE, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == 'True\n'
    os.chmod(path, 0o444)
    become_nobody()
    assert files.is_locked(path)
    holder.communicate('\n')
    assert not files.is_locked(path)

def test_what_may_not_be_read_is_said_so(of_others, capsys):
    np.savez(of_others / 'mine.npz', x=np.zeros(3))
    for name in 'a.json', 'mine.npz':
        (of_others / name).touch()
        os.chmod(of_others / name, 0)
    become_nobody()
    with pytest.raises(Refused, match=r'cannot read .*mine\.npz: Permission denied'):
        data.load('mine', of_others)
    compare.found(of_others)
    assert 'a.json: Permission denied' in capsys.readouterr().out

def test_a_second_run_does_not_overwrite_the_first(tmp_path):
    checkpoint.save_checkpoint(tmp_path / 'last.pt', models.build('resnet18', 10, width=4))
    done = subprocess.run([*COMMAND, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and 'holds a trained model already' in done.stderr

def test_no_network_says_where_the_file_goes(tmp_path, monkeypatch):
    import torchvision
    def refuse(*args, **kwargs):
        raise OSError('Network is unreachable')
    monkeypatch.setattr(torchvision.datasets, 'CIFAR10', refuse)
    says = r'Put .*cifar10\.npz there yourself .* or use --dataset digits'
    with pytest.raises(Refused, match=says) as e:
        data.load('cifar10', str(tmp_path))
    assert '\n' not in str(e.value)

def test_a_download_is_kept_as_npz(tmp_path, monkeypatch):
    import torchvision
    class Fake:
        def __init__(self, root, train, download=False):
            self.data = np.full((30, 32, 32, 3), 7 * train, np.uint8)
            self.targets = [i % 10 for i in range(30)]
    monkeypatch.setattr(torchvision.datasets, 'CIFAR10', Fake)
    first = data.load('cifar10', str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, 'CIFAR10', None)      # the second time nothing is downloaded
    again = data.load('cifar10', str(tmp_path))
    assert torch.equal(first.x_train, again.x_train) and torch.equal(first.y_test, again.y_test)
    assert first.x_test.max() == 0

ce = F.cross_entropy

def fails_at(call, fn):
    """fn, whose result turns to NaN in that call."""
    calls = iter(range(1, 1000))
    return lambda *args: fn(*args) * (float('nan') if next(calls) == call else 1)

@pytest.mark.parametrize('script', ['train_adv.py', 'train_teacher.py'])
def test_a_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(script, tmp_path, monkeypatch):
    """64 images in batches of 32 are two batches an epoch: the sixth loss is the last of epoch 3."""
    flags = [*TINY, '--epochs', 4, '--out', tmp_path]
    if script == 'train_adv.py':
        monkeypatch.setattr(losses, 'ce', fails_at(6, losses.ce))               # trades calls it once a batch
        flags += ['--loss', 'trades', '--steps', 1]
    else:
        mean_ce = fails_at(6, F.cross_entropy)
        monkeypatch.setattr(F, 'cross_entropy', lambda x, y, reduction=None:
                            mean_ce(x, y) if reduction is None else ce(x, y, reduction=reduction))
    with pytest.raises(SystemExit) as e:
        run(script, *flags)
    assert 'non-finite loss in epoch 3, step 2' in str(e.value) and '\n' not in str(e.value)
    assert checkpoint.load_checkpoint(tmp_path / 'last.pt')[1]['epoch'] == 2
