"""The README as it is pasted: its before/after diff, and every command in it."""
import re
import shlex

import numpy as np
import torch
from PIL import Image

import data
import models
from support import checkpoint, imagenet
from test_smoke import HERE, README, X, Y, run

def test_readme_example_runs():
    """Both sides of the before/after diff, on a toy network."""
    diff = re.search(r'```diff\n(.*?)```', README, re.S)[1].splitlines()
    torch.manual_seed(0)
    for drop in '+-':
        code = '\n'.join(line[1:] for line in diff if line[:1] != drop)
        net = models.build('resnet18', 10, width=4)
        teacher = models.build('resnet18', 10, width=4).eval().requires_grad_(False)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        before = checkpoint.fingerprint(net)
        exec(code, dict(model=net, teacher=teacher, optimizer=optimizer, loader=[(X, Y)]))
        assert checkpoint.fingerprint(net) != before and all(p.grad is None for p in teacher.parameters())

def test_readme_commands_run(tmp_path, monkeypatch):
    """Every python command of the README's sh blocks, in their order, on a handful of images under the same
    names and a narrow network."""
    monkeypatch.chdir(tmp_path)
    d = data.load('synthetic')
    (tmp_path / 'data').mkdir()
    for name in ('digits', 'cifar10'):
        np.savez(tmp_path / f'data/{name}.npz', x_train=d.x_train[:20], y_train=d.y_train[:20],
                 x_test=d.x_test[:8], y_test=d.y_test[:8])
    monkeypatch.setattr(imagenet, 'SIZE', 32)
    # the runs keep their names: it is the datasets' defaults that are small
    small = dict(epochs=1, steps=1, teacher_epochs=1)
    for name, flags in (('digits', dict(width=8)), ('cifar10', dict(width=4)), ('cifar100', dict(width=4))):
        monkeypatch.setitem(data.DATASETS, name, dict(data.DATASETS[name], flags=flags, **small))
    monkeypatch.setitem(data.DATASETS, 'imagenet', dict(data.DATASETS['imagenet'], **small))
    for k in range(40):
        path = tmp_path / f'imagenet/{"val" if k < 8 else "train"}/n{k % 4}/{k}.JPEG'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(d.x_train[k].numpy()).save(path)
    torch.save(models.build('resnet18', 10, width=4).state_dict(), tmp_path / 'model_test.pt')
    (tmp_path / 'results').symlink_to(HERE / 'results')
    commands = [re.sub(r'^torchrun .*?(?=train_)', 'python ', line) # its processes: tests/test_survival.py
                for block in re.findall(r'```sh\n(.*?)```', README, re.S)
                for line in block.splitlines() if line.startswith(('python ', 'torchrun '))]
    assert len(commands) >= 14
    for command in commands:
        smaller = command.replace('cifar10-resnet18', 'cifar10-resnet18-w4').replace('resnet50', 'resnet18')
        script, *argv = shlex.split(smaller, comments=True)[1:]
        if script == 'test_smoke.py':
            continue
        if script == 'evaluate.py':
            argv += ['--n', '4', '--attacks', 'fgsm', '--out', f'report-{commands.index(command)}.json']
        if script.startswith('train') and 'imagenet' in command:
            argv += ['--model', 'torchvision-resnet18']
        if 'model_test.pt' in command:
            argv += ['--width', '4']
        try:
            run(script, *argv)
        except SystemExit as e:
            assert not e.code, command
