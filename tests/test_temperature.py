"""
The search for the temperature: its two steps, that a masked student is never chosen, that nothing is done
twice, and that the test set takes no part.
"""
import json
import os
import pathlib
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

from support import checkpoint
from support.files import Refused
from tools import plan as plans
from tools import temperature

ROOT = pathlib.Path(plans.ROOT)

def test_the_highest_above_the_threshold_from_the_top():
    clean, asked = {1: 93, 5: 94, 15: 91, 20: 92, 50: 86}, []
    def accuracy(tau):
        asked.append(tau)
        return clean[tau]
    assert temperature.tau_max([1, 5, 15, 20, 50], accuracy, 91.5) == 20 and asked == [50, 20]
    assert temperature.tau_max([1, 5, 15, 20, 50], accuracy, 95) is None

def test_a_suspected_point_is_not_chosen():
    points = {1: dict(robust=40.0, suspicious=[]), 5: dict(robust=45.0, suspicious=[]),
              8: dict(robust=45.0, suspicious=[]), 15: dict(robust=94.0, suspicious=['margin'])}
    assert temperature.choose(points) == 5              # of a tie the lower
    assert temperature.choose({15: points[15]}) is None
    robust = {tau: point['robust'] for tau, point in points.items()}
    assert temperature.better_neighbour(robust, 5) == 8 and temperature.better_neighbour({5: 1.0}, 5) is None

def test_step_one_sees_clean_images_only():
    """Equation 28 without its second term: the loss does not depend on x_adv, nor does BN."""
    job = temperature.job_of('--width 8', 5, clean_only=True)
    names = plans.head(job.command)
    g = torch.Generator().manual_seed(0)
    z, one, other, v = (torch.randn(4, 10, generator=g) for _ in range(4))
    loss = names['method'].loss
    assert torch.equal(loss(z, one, v, **names['hp']), loss(z, other, v, **names['hp']))
    assert names['args'].bn_order == 'nat' and names['hp']['tau'] == 5
    both = plans.head(temperature.job_of('--width 8', 5, clean_only=False).command)
    assert not torch.equal(loss(z, one, v, **both['hp']), loss(z, other, v, **both['hp']))

class Blind(nn.Module):
    """A good classifier of bright images, whose gradient is rounded away."""
    def __init__(self, rounded):
        super().__init__()
        self.rounded = rounded
        self.weight = nn.Parameter(torch.tensor([-40.0, 0.0, 40.0]))

    def forward(self, x):
        bright = x.flatten(1).mean(1) - 0.5
        if self.rounded:
            bright = (200 * bright).round() / 200
        return bright[:, None] * self.weight - torch.tensor([0.0, -2.0, 0.0])

def test_a_masked_student_is_suspected_and_a_sound_one_is_not():
    torch.manual_seed(0)
    y = torch.arange(3).repeat(10)
    x = (0.5 + 0.1 * (y - 1))[:, None, None, None] + 0.01 * torch.randn(30, 3, 8, 8)
    points = {}
    for tau, rounded in ((5, False), (15, True)):
        points[tau] = temperature.judge(Blind(rounded).eval(), x, y, eps=0.06, norm='Linf', audited=30)
        assert points[tau]['clean'] == 100 and points[tau]['n'] == 30
    assert points[15]['robust'] > points[5]['robust'] and 'gradients' in points[15]['suspicious']
    assert not points[5]['suspicious'] and temperature.choose(points) == 5

# -----------------------------------------------------------------------------
# end to end, on a file of 8x8 images

def write_data(path, seed):
    """seed: of the test set alone."""
    train, test = np.random.default_rng(0), np.random.default_rng(seed)
    y = np.arange(240) % 4
    x = (60 * y[:, None, None, None] + train.integers(0, 60, (240, 8, 8, 3))).astype('uint8')
    np.savez(path, x_train=x, y_train=y, x_test=test.integers(0, 255, (40, 8, 8, 3)).astype('uint8'),
             y_test=test.permutation(np.arange(40) % 4))

def start(folder, script, flags):
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    ended = subprocess.run([sys.executable, *script, *shlex.split(flags)], cwd=folder, env=env, text=True,
                           capture_output=True)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    return ended.stdout

def test_both_steps_once_and_without_the_test_set(tmp_path):
    (tmp_path / 'data').mkdir()
    write_data(tmp_path / 'data/tiny.npz', seed=1)
    small = '--dataset tiny --width 4 --batch-size 16 --epochs 2'
    start(tmp_path, [ROOT / 'train_teacher.py'], f'{small} --out runs/t')
    search = ('--grid 1 5 --threshold 10 --audited 20 --out r/t.json '
              f'{small} --steps 2 --teacher runs/t/best.pt')
    output = start(tmp_path, ['-m', 'tools.temperature'], search)
    assert output.count('$ python') == 3                # 5 on clean images, which is enough; then 1 and 5
    found = json.loads((tmp_path / 'r/t.json').read_text())
    assert found['tau_max'] == 5 and set(found['points']) == {'1', '5'} and list(found['step1']) == ['5']
    assert all('masking audit' in point['audit'] for point in found['points'].values())
    text = (tmp_path / 'r/t.md').read_text()
    assert 'tau_max = 5' in text and '| 1 | ' in text

    # another test set, the same training images: nothing is trained, and what is judged again comes out the
    # same
    write_data(tmp_path / 'data/tiny.npz', seed=2)
    (tmp_path / 'r/t.json').unlink()
    assert start(tmp_path, ['-m', 'tools.temperature'], search).count('$ python') == 0
    assert json.loads((tmp_path / 'r/t.json').read_text()) == found
    assert (tmp_path / 'r/t.md').read_text() == text

    # without a threshold: that of its teacher, less what distillation may cost
    search = search.replace('--threshold 10', '').replace('1 5', '5').replace('r/t.json', 'r/u.json')
    start(tmp_path, ['-m', 'tools.temperature'], search)
    stored = torch.load(tmp_path / 'runs/t/best.pt', weights_only=True)['val_clean']
    assert json.loads((tmp_path / 'r/u.json').read_text())['threshold'] == pytest.approx(
        stored - temperature.DROP)

@pytest.mark.parametrize('content, says', [
    ('{"flags": "--width 8", "points": {"1": {}}}', 'holds a search with other flags'),
    ('{"complete": true, "results": {}}', 'and no search'), ('[]', 'and no search'),
    ('{"flags": "--width 4", "points": {"1": {}}}', 'and damaged'),
    ('{"flags": "--width 4", "points": [1]}', 'and no search'),
    ('a text', 'and no search')])
def test_what_lies_in_out_stays_what_it_is(content, says, tmp_path):
    (tmp_path / 't.json').write_text(content)
    with pytest.raises(Refused, match=says):
        temperature.main(['--out', str(tmp_path / 't.json'), '--width', '4'])
    assert (tmp_path / 't.json').read_text() == content

def test_a_place_that_cannot_be_written_is_refused_before_the_trainings(tmp_path):
    for path in '/proc/nowhere/t.json', str(tmp_path):
        with pytest.raises(Refused, match='cannot'):
            temperature.main(['--out', path, '--width', '4'])

def test_ctrl_c_says_that_the_search_goes_on(tmp_path, monkeypatch):
    def interrupted(place, job):
        raise KeyboardInterrupt
    monkeypatch.setattr(temperature, 'trained', interrupted)
    with pytest.raises(SystemExit, match='the same command continues'):
        temperature.main(['--out', str(tmp_path / 't.json'), '--threshold', '9', '--width', '4'])

def test_a_network_of_ones_own_is_judged(tmp_path, monkeypatch):
    """The user has named its code for train_adv.py."""
    (tmp_path / 'net.py').write_text(
        'from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))\n')
    model = f'{tmp_path}/net.py:make'
    net = checkpoint.from_file(model, 10)
    checkpoint.save_checkpoint(tmp_path / 'best.pt', net, dataset='synthetic', eps=8.0, norm='Linf', epoch=1)
    monkeypatch.setattr(temperature, 'trained', lambda place, job: str(tmp_path))
    args = SimpleNamespace(out=str(tmp_path / 't.json'), audited=5)
    search = temperature.Search(args, f'--dataset synthetic --model {model}', plans.Place('', '', 'data'))
    search.point(5.0)
    assert search.points[5.0]['n'] == 64

def test_what_does_not_go_together(capsys):
    for argv, message in ((['--grid', '0.5'], 'at least 1'),
                          (['--loss', 'trades'], '--loss is set by this tool'),
                          (['--tau=3'], '--tau is set by this tool'),
                          (['--runs', 'elsewhere'], 'a folder called runs'),
                          (['--threshold', 'nan'], 'finite'), (['--grid', 'inf'], 'finite'),
                          (['--out', 't.md'], 'ends in .json')):
        with pytest.raises(SystemExit) as ended:
            temperature.main(argv)
        assert ended.value.code == 2 and message in capsys.readouterr().err
