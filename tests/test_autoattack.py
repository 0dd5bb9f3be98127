"""
evaluate.py's AutoAttack is the authors': the same verdict for every image as one call of theirs.

$ python tests/test_autoattack.py REPORT.json data          # evaluate.py's AutoAttack again, by one call
"""
import importlib.metadata, json, os, subprocess, sys, time

import pytest
import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack

import attacks, data, models
from support import checkpoint
from tools.reading import load_network
from support.imagenet import in_memory
from models import bn_branch
from test_smoke import HERE, run

def test_image_by_image(tmp_path):
    run('train_adv.py', '--loss', 'pgd_at', '--dataset', 'synthetic', '--width', '4', '--steps', '2',
        '--out', tmp_path)
    model, _ = checkpoint.load_checkpoint(tmp_path / 'best.pt')
    d = data.load('synthetic')
    x, y = data.to_float(d.x_test[:5]), d.y_test[:5]
    ce = lambda x: F.cross_entropy(model(x), y, reduction='none')
    for eps in (4, 8, 16, 24, 32, 48):              # the first eps at which some images fall
        x_adv = attacks.pgd(ce, x, eps=eps / 255, step_size=eps / 4 / 255, steps=20)
        if (model(x_adv).argmax(1) != y).sum() > (model(x).argmax(1) != y).sum():
            break
    script = run('evaluate.py', tmp_path / 'best.pt', '--n', 5, '--eps', eps, '--batch-size', 3,
                 '--attacks', 'autoattack', '--seed', 3)
    theirs = AutoAttack(model, norm='Linf', eps=eps / 255, seed=3, version='standard')
    x_adv, _ = theirs.run_standard_evaluation(x, y, batch_size=3)
    assert torch.equal(model(x_adv).argmax(1) == y, script['taken'] == y)
    results = script['results']
    assert results['autoattack (worst case)']['correct'] < results['clean']['correct']

# -----------------------------------------------------------------------------
# packages of those names, as they are where the authors' are installed

AUTOATTACK = """
class Part:
    n_target_classes = 9

class AutoAttack:
    def __init__(self, model, norm='Linf', eps=.3, seed=None, version='standard', device='cpu'):
        self.model, self.apgd_targeted, self.fab = model, Part(), Part()

    def run_standard_evaluation(self, x, y, bs=250, batch_size=None):
        print('the stand-in attacks', *self.attacks_to_run)
        return x, self.model(x).argmax(1)
"""

def stand_in(folder, name, files, version=None):
    """A package in folder, as pip would have left it there."""
    for path, text in files.items():
        path = folder / name / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if version:
        info = folder / f'{name}-{version}.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')

@pytest.fixture
def python(tmp_path):
    """Runs python in the root of the repository with tmp_path / 'site' on its path -> what it printed."""
    def python(*argv, site=tmp_path / 'site'):
        done = subprocess.run([sys.executable, *map(str, argv)], cwd=HERE, text=True, capture_output=True,
                              env=dict(os.environ, PYTHONPATH=str(site)))
        assert done.returncode == 0, done.stderr
        return done.stdout

    return python

def test_no_file_of_ours_shadows_a_package(tmp_path, python):
    """From the root, which Python puts in front of everything installed."""
    stand_in(tmp_path / 'site', 'autoattack', {'__init__.py': AUTOATTACK})
    stand_in(tmp_path / 'site', 'robustbench', {'__init__.py': '', 'eval.py': 'benchmark = 7'})
    site = tmp_path / 'site'
    found = python('-c', 'import sys; from robustbench.eval import benchmark; '
                   'from autoattack import AutoAttack; '
                   'print(benchmark, *[sys.modules[k].__file__ for k in ("autoattack", "robustbench")])')
    assert found.split() == ['7', f'{site}/autoattack/__init__.py', f'{site}/robustbench/__init__.py']

@pytest.mark.parametrize('installed, version', [
    (None, None), ('0.1.standin', '0.1.standin'), ('', 'unknown')])
def test_autoattack_is_taken_before_pyautoattack_and_named(installed, version, tmp_path, python):
    torch.manual_seed(0)
    checkpoint.save_checkpoint(tmp_path / 'm.pt', models.build('resnet18', 10, width=4), dataset='synthetic',
                               run=dict(dataset='synthetic', eps=8.0))
    if installed is not None:
        stand_in(tmp_path / 'site', 'autoattack', {'__init__.py': AUTOATTACK}, installed)
    said = python('evaluate.py', tmp_path / 'm.pt', '--n', 12, '--eps', 1,
                  '--attacks', 'apgd-ce', '--no-audit')
    report = json.loads(next(tmp_path.glob('*.json')).read_text())
    name = 'pyautoattack' if installed is None else 'autoattack'
    assert ('the stand-in attacks apgd-ce' in said) is (name == 'autoattack')
    version = version or importlib.metadata.version('pyautoattack')
    assert report[name] == report['evaluated'][name] == version
    assert ({'autoattack', 'pyautoattack'} & set(report)) == {name}

def by_one_call(report, folder):
    """-> n booleans, what evaluate.py says and what pyautoattack says; the seconds that each took."""
    args, name = report['args'], 'autoattack (worst case)'
    d = data.load(report['dataset'], folder, training=False)
    model = load_network(report['checkpoint'], report).requires_grad_(False)    # of this fingerprint
    n = report['results'][name]['n']
    x, y = data.to_float(in_memory(d.x_test[:n], torch.device('cpu'))), d.y_test[:n]
    aa = AutoAttack(model, norm=report['norm'], eps=report['eps'], seed=args['seed'], version='standard')
    begun = time.perf_counter()
    with bn_branch(model, args.get('branch')):
        x_adv, _ = aa.run_standard_evaluation(x, y, batch_size=args['batch_size'])
        seconds = time.perf_counter() - begun
        with torch.no_grad():
            right = torch.cat([model(xb) for xb in x_adv.split(args['batch_size'])]).argmax(1) == y
    ours = torch.tensor([c == '1' for c in report['results'][name]['robust']])
    return ours, right, report['results'][name]['seconds'], seconds

if __name__ == '__main__':
    with open(sys.argv[1]) as f:
        report = json.load(f)
    ours, theirs, t_ours, t_theirs = by_one_call(report, sys.argv[2])
    print(json.dumps(dict(
        checkpoint=report['checkpoint'], fingerprint=report['fingerprint'], n=len(ours),
        search=report.get('search'),
        robust_evaluate=ours.sum().item(), robust_pyautoattack=theirs.sum().item(),
        images_that_differ=(ours != theirs).nonzero()[:, 0].tolist(),
        seconds_evaluate=t_ours, seconds_pyautoattack=t_theirs), indent=1))
