"""
What a stranger finds: eight Python files, three of which can be taken alone, and names that shadow nobody's.
"""
import ast
import inspect
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import losses

HERE = pathlib.Path(__file__).parent.parent

def imported(path):
    """Names of the top-level packages that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split('.')[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split('.')[0])
    return names

def test_eight_files():
    assert sorted(path.stem for path in HERE.glob('*.py')) == [
        'attacks', 'data', 'evaluate', 'losses', 'models', 'test_smoke', 'train_adv', 'train_teacher']

@pytest.mark.parametrize('name', ['losses', 'attacks', 'models'])
def test_can_be_taken_alone(name, tmp_path):
    used = imported(HERE / f'{name}.py')
    assert 'argparse' not in used and used <= sys.stdlib_module_names | {'torch', 'torchvision', 'numpy'}
    shutil.copy(HERE / f'{name}.py', tmp_path)
    done = subprocess.run([sys.executable, '-c', f'import {name}; print({name}.__file__)'], cwd=tmp_path,
                          text=True, capture_output=True,
                          env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'})
    assert pathlib.Path(done.stdout.strip()).parent == tmp_path, done.stderr

@pytest.mark.parametrize('names', ['kl mse logit_mse', 'kl softmax_kl', 'kl ce trades', 'kl ce hard mart',
                                   'ce hard climb_ce'])
def test_a_loss_can_be_pasted(names):
    """With what it calls, into a file that has torch and F."""
    there = dict(torch=torch, F=F)
    for name in names.split():
        exec(inspect.getsource(getattr(losses, name)), there)
    loss = there[names.split()[-1]]
    given = {k: torch.arange(4) if k == 'y' else torch.randn(4, 10) for k in losses.needs(loss)}
    assert loss(**given).shape == (4,) and torch.equal(loss(**given), getattr(losses, loss.__name__)(**given))

def test_lines_are_read_beside_each_other():
    ours = [path for folder in ('.', 'support', 'tools', 'tests') for path in (HERE / folder).glob('*.py')]
    wide = [f'{path}:{k}' for path in ours
            for k, line in enumerate(path.read_text().split('\n'), 1) if len(line) > 110]
    assert not wide

def test_one_step_is_three_files():
    """What happens in a step of training stands in train_adv.py, losses.py and attacks.py: of ours the step
    calls nothing else but the average over processes and the two BN of a dual one."""
    tree = ast.parse((HERE / 'train_adv.py').read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    modules = {'data', 'models', 'checkpoint', 'ddp', 'describe', 'files', 'refusals', 'runs', 'validation',
               'run'}
    called = {f'{node.value.id}.{node.attr}' for name in
              ('logits_of', 'craft', 'student_logits', 'loss_on', 'awp', 'update', 'move_average')
              for node in ast.walk(functions[name])
              if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
              and node.value.id in modules}
    assert called == {'ddp.average'}
