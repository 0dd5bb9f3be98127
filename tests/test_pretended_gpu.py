"""
Each loss and flag trains on a pretended GPU (tests/pretended.py), which refuses tensors of two devices in one
operation; no step waits for the device; and an evaluation says there what it says on the CPU.
"""
import json

import numpy as np
import pytest
import torch

import losses
import pretended
from losses import METHODS
from support.summary import HEADER
from test_smoke import run

TINY = ['--dataset', 'squares', '--width', 8, '--batch-size', 16, '--lr', 0.02, '--steps', 2, '--epochs', 1]
# what a step is made of, in train_adv.py and train_teacher.py
STEP = {'update', 'training_batches', 'move_average', 'train_step'}
OPTIONS = ['--awp 0.005 --awp-warmup 0', '--ema 0.9', '--swa 0.5 --epochs 2', '--norm L2', '--accumulate 2',
           '--attack-bn train', '--attack-bn moving', '--eps-ramp 0.5', '--normalize', '--activation hybrid',
           '--augment crop+flip', '--schedule step', '--bn-order adv-nat', '--targets als',
           '--targets smooth', '--warm-start {teacher}', '--extra {extra} --teacher {teacher}',
           '--model preactresnet18', '--model mobilenetv2',
           '--model wrn-10-1 --guide-model resnet18 --guide-width 8 --loss lbgat',
           '--loss pgd_at --free 2 --steps 10', '--loss logit_mse --extra {extra} --teacher {teacher}']

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Squares of four colours, and a network that was trained on them on the CPU."""
    folder, r = tmp_path_factory.mktemp('pretended'), np.random.default_rng(0)

    def squares(n):
        y = np.arange(n) % 4
        x = r.integers(100, 140, (n, 8, 8, 3))
        x[np.arange(n), :, :, y % 3] += np.where(y < 3, 60, -60)[:, None, None]
        return x.astype(np.uint8), y

    (x_train, y_train), (x_test, y_test) = squares(80), squares(24)
    np.savez(folder / 'squares.npz', x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    np.savez(folder / 'extra.npz', x=squares(40)[0])
    run('train_adv.py', '--loss', 'pgd_at', *TINY, '--lr', 0.05, '--epochs', 16, '--data-dir', folder,
        '--out', folder / 'cpu')
    return folder

def train(folder, out, *flags, script='train_adv.py'):
    """-> [who waited for the device within a step]."""
    with pretended.gpu() as waits:
        run(script, '--data-dir', folder, '--out', out, *flags)
    return [who for who in waits if {name.split(':')[1] for name in who} & STEP]

def last_row(folder):
    return json.loads((folder / 'log.jsonl').read_text().splitlines()[-1])

def test_the_pretended_gpu_sees_what_a_cpu_does_not():
    with pretended.gpu() as waits:
        x = torch.rand(4, 3, device='cuda')
        with pytest.raises(RuntimeError, match='one of the CPU'):
            x + torch.zeros(4, 3)
        with pytest.raises(RuntimeError, match='one of the CPU'):
            torch.cat([x, torch.zeros(4, 3)])
        with pytest.raises(RuntimeError, match='generator'):
            torch.rand(4, device='cuda', generator=torch.Generator())
        with pytest.raises(RuntimeError, match='generator'):
            torch.rand(4, generator=torch.Generator('cuda'))
        with pytest.raises(RuntimeError, match='generator'):
            x.uniform_(generator=torch.Generator())
        x = (2 * x - x.mean(0)).relu().float()[torch.arange(4)]         # none of it waits
        x.copy_(torch.zeros(4, 3))
        x[:, 0] = 1
        assert not waits and x.is_cuda and x.device.type == 'cuda'
        for does in (lambda: x.sum().item(), lambda: bool(x.any()), x.tolist, x.cpu, lambda: x[x > 0],
                     lambda: torch.zeros(4, 3).copy_(x), lambda: x.nonzero(), lambda: x.to('cpu'),
                     lambda: f'{x.max():g}', x.unique):
            waits.clear()
            does()
            assert waits, does

def test_a_step_that_waits_is_found(folder, tmp_path, monkeypatch):
    plain = METHODS['trades']
    def waiting(logits, logits_adv, y, *, beta=6.0):
        return plain.loss(logits, logits_adv, y, beta=beta) * (1 if logits.max() > -1e9 else 2)
    monkeypatch.setitem(METHODS, 'trades', plain._replace(loss=waiting))
    assert train(folder, tmp_path / 'run', '--loss', 'trades', *TINY)

@pytest.mark.parametrize('loss', METHODS)
def test_every_loss_on_a_pretended_gpu(loss, folder, tmp_path):
    asked, teacher = losses.asked_for(METHODS[loss]), folder / 'cpu' / 'last.pt'
    flags = ['--teacher', teacher] if any(name.startswith('t_') for name in asked) else []
    flags += ['--standard-teacher', teacher] if any(name.startswith('s_') for name in asked) else []
    assert not train(folder, tmp_path / 'run', '--loss', loss, *TINY, *flags)

@pytest.mark.parametrize('flags', OPTIONS)
def test_every_option_on_a_pretended_gpu(flags, folder, tmp_path):
    flags = flags.format(teacher=folder / 'cpu' / 'last.pt', extra=folder / 'extra.npz').split()
    assert not train(folder, tmp_path / 'run', '--loss', 'trades', *TINY, *flags)

def test_in_half_precision_only_the_scaler_waits(folder, tmp_path):
    """It asks whether a gradient has overflowed: PyTorch's, once a step."""
    waits = train(folder, tmp_path / 'run', '--loss', 'trades', *TINY, '--amp', 'fp16', '--awp', 0.005,
                  '--awp-warmup', 0)
    assert len(waits) == 72 // 16 and all(who[-1] == 'train_adv.py:update' for who in waits)

def test_a_teacher_on_a_pretended_gpu(folder, tmp_path):
    assert not train(folder, tmp_path / 'run', *TINY[:8], '--epochs', 2, script='train_teacher.py')

def test_the_numbers_are_those_of_the_cpu(folder, tmp_path):
    """The same batches. The memory layout is another: so is the rounding, and would be noise."""
    flags = '--loss', 'pgd_at', *TINY, '--init', 'zero', '--augment', 'crop+flip', '--amp', 'off'
    train(folder, tmp_path / 'gpu', *flags)
    run('train_adv.py', '--data-dir', folder, '--out', tmp_path / 'cpu', *flags)
    assert last_row(tmp_path / 'gpu')['loss'] == pytest.approx(last_row(tmp_path / 'cpu')['loss'], rel=1e-3)

def test_a_training_continues_on_a_pretended_gpu(folder, tmp_path, monkeypatch):
    from support import runs
    flags = '--loss', 'trades', *TINY, '--epochs', 2
    train(folder, tmp_path / 'whole', *flags)
    row = runs.Run.row

    def stops(self, **values):
        row(self, **values)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, 'row', stops)
    with pytest.raises(SystemExit):
        train(folder, tmp_path / 'cut', *flags)
    monkeypatch.setattr(runs.Run, 'row', row)
    train(folder, tmp_path / 'cut', *flags, '--resume')
    whole, cut = last_row(tmp_path / 'whole'), last_row(tmp_path / 'cut')
    assert cut['loss'] == whole['loss'] and cut['epoch'] == 2

def test_an_evaluation_on_a_pretended_gpu(folder, tmp_path, monkeypatch, capsys):
    import pyautoattack.autoattack as package
    whole = package.AutoAttack.run_standard_evaluation

    def shorter(self, *args, **kwargs):
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 5
        self.square.n_queries = 20
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(package.AutoAttack, 'run_standard_evaluation', shorter)

    def accuracy(name, *flags):
        out = tmp_path / f'{name}.json'
        run('evaluate.py', folder / 'cpu' / 'last.pt', '--data-dir', folder, '--eps', 4, '--out', out, *flags)
        return {attack: r['accuracy'] for attack, r in json.loads(out.read_text())['results'].items()}

    cpu = accuracy('cpu', '--no-audit')
    assert cpu['autoattack (worst case)'] > 30          # what is broken already is attacked no further
    with pretended.gpu():
        gpu, fast = accuracy('gpu'), accuracy('fast', '--fast', '--no-audit')
    image = 100 / 24 + 0.01                             # more than one would not be rounding
    for attack in 'clean', 'fgsm', 'pgd-20', 'cw-20', 'autoattack (worst case)':
        assert gpu[attack] == pytest.approx(cpu[attack], abs=image), attack
        assert fast[attack] == pytest.approx(cpu[attack], abs=image), attack

    # --fast judges again in fp32 on a GPU alone: its rows have the longest names
    table = [line for line in capsys.readouterr().out.splitlines() if 'autoattack, after' in line]
    assert any('again' in line for line in table) and {len(line) for line in table} == {len(HEADER)}
