"""Anybody's network: its code finds what it would in its own folder, or one line says why not; and nothing
runs because a file names it. Its weights: test_weights.py."""
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import attacks
import data
import losses
import models
from support import autoattack
from support import checkpoint
from support import files as files_of_ours
from support import summary
from support.files import Refused
from support.foreign import Surroundings, from_file
from test_smoke import HERE, run

SYNTHETIC = '--dataset synthetic --n 20 --attacks clean'.split()
LINEAR = '''
import torch
class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
'''
X = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

def as_a_user(script, *argv, cwd, **environment):
    """The script in a process of its own -> status, the lines of its output, and of its errors."""
    done = subprocess.run([sys.executable, str(HERE / script), *map(str, argv)], cwd=cwd, capture_output=True,
                          text=True, env=dict(os.environ, OMP_NUM_THREADS='1', **environment))
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()

def files(folder, **contents):
    """name or package/name (a__b: a/b.py), and what stands in it."""
    for name, text in contents.items():
        path = folder / f'{name.replace("__", "/", 1)}.py'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if '__' in name:
            (path.parent / '__init__.py').touch()
    return folder

def our_modules():
    return {name: module for name, module in sys.modules.items()
            if str(getattr(module, '__file__', '')).startswith(f'{HERE}{os.sep}')}

# -----------------------------------------------------------------------------
# code

@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
    """A repository with the names that everybody has, and ours."""
    folder = tmp_path_factory.mktemp('repo')
    lazy = '''
    def forward(self, x):
        from data import SCALE                  # only now
        import support.late
        return SCALE * super().forward(x) + support.late.SHIFT
'''
    files(folder, net='from models.linear import Net\nimport utils, attacks, data, losses\n'
                      'def make():\n    import sys\n    assert utils.mine and attacks.mine and losses.mine\n'
                      '    assert len(sys.argv) == 1\n    open("data.py").close()\n    return Net()\n',
          models__linear=LINEAR + lazy, support__late='SHIFT = 3', data='SCALE = 2', utils='mine = 1',
          attacks='mine = 1', losses='mine = 1')
    torch.manual_seed(0)
    torch.save({'1.weight': torch.randn(10, 3072) / 50, '1.bias': torch.zeros(10)}, folder / 'w.pt')
    return folder

def expected_of(folder, x):
    w = torch.load(folder / 'w.pt', weights_only=True)
    return 2 * (x.flatten(1) @ w['1.weight'].T) + 3

def test_a_folder_with_names_of_ours_in_it(theirs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before, path, argv = our_modules(), sys.path[:], sys.argv[:]
    net = checkpoint.load_checkpoint(theirs / 'w.pt', f'{theirs}/net.py:make', 10)[0]
    for _ in range(2):
        torch.testing.assert_close(net(X), expected_of(theirs, X))
        assert our_modules() == before
        assert sys.modules['attacks'] is attacks and sys.modules['losses'] is losses
        assert (sys.path, sys.argv, os.getcwd()) == (path, argv, str(tmp_path))

def test_as_a_user_with_our_folder_within_theirs(theirs, tmp_path):
    """As `git clone` leaves it; and net.py uses an installed package that needs the original autoattack."""
    repo, site = tmp_path / 'repo', tmp_path / 'site'
    shutil.copytree(theirs, repo)
    shutil.copytree(HERE, repo / 'robust', ignore=lambda folder, names: [
        name for name in names if folder == str(HERE) and name != 'support' and not name.endswith('.py')])
    files(site, autoattack__state='class EvaluationState: pass\n')
    files(repo, net2='from autoattack.state import EvaluationState\nfrom net import make\n')
    status, out, err = as_a_user(repo / 'robust/evaluate.py', 'w.pt', '--model', 'net2.py:make', *SYNTHETIC,
                                 '--out', 'e.json', cwd=repo, PYTHONPATH=str(site))
    assert (status, err) == (0, []), err
    d = data.load('synthetic')
    right = expected_of(theirs, data.to_float(d.x_test[:20])).argmax(1) == d.y_test[:20]
    assert json.loads((repo / 'e.json').read_text())['results']['clean']['correct'] == right.sum()

def test_their_autoattack_is_not_taken_for_the_authors(tmp_path):
    before = autoattack.package()
    files(tmp_path, net=f'import autoattack\n{LINEAR}', autoattack='')
    from_file(f'{tmp_path}/net.py:Net', 10)(X)
    assert autoattack.package() == before and 'autoattack' not in our_modules()

def test_code_is_known_by_all_the_files_that_it_imports(tmp_path):
    """A continued evaluation or training is one of the same network."""
    codes = []
    for scale in '3', '3', '4':
        files(tmp_path / f'{len(codes)}', inner=f'SCALE = {scale}', net=f'from inner import SCALE\n{LINEAR}')
        codes.append(checkpoint.code_of(None, from_file(f'{tmp_path}/{len(codes)}/net.py:Net', 10)))
    assert codes[0] == codes[1] != codes[2]
    assert checkpoint.code_of(models.build('resnet18', 10, width=4), None) is None

def test_an_evaluation_is_not_continued_with_other_code(tmp_path, capsys):
    files(tmp_path, inner='SCALE = 3', net=f'from inner import SCALE\n{LINEAR}')
    torch.save(from_file(f'{tmp_path}/net.py:Net', 10).state_dict(), tmp_path / 'w.pt')
    def evaluated():
        script = run('evaluate.py', tmp_path / 'w.pt', '--model', f'{tmp_path}/net.py:Net', *SYNTHETIC,
                     '--no-audit', '--transfer-from', tmp_path / 'w.pt', '--transfer-model',
                     f'{tmp_path}/net.py:Net', '--out', tmp_path / 'e.json')
        return script['evaluated']
    before = evaluated()
    (tmp_path / 'e.json').unlink()
    (tmp_path / 'inner.py').write_text('SCALE = 4')
    after = evaluated()
    assert {key for key in before if before[key] != after[key]} == {'code', 'transfer_code'}

def test_a_network_in_our_own_folder_finds_ours():
    around = Surroundings(HERE)
    around.enter()
    import models as found
    around.leave()
    assert found is models

def test_compiled_it_is_the_same(theirs):
    net = checkpoint.load_checkpoint(theirs / 'w.pt', f'{theirs}/net.py:make', 10)[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend='eager')(X), expected_of(theirs, X))
    assert sys.modules['data'] is data

OUTPUTS = dict(
    tuple='(z, z.mean())', a_dict='{"loss": z.mean(), "logits": z}', no_name='{"y": z}',
    features='[x.flatten(1), z]', named='Named(x.flatten(1)[:, :10], z)',
    thing='types.SimpleNamespace(logits=z)', double='z.double()')
REFUSED_OUTPUTS = dict(
    two_heads='(z, 2 * z)', two_of_a_dict='{"aux": z, "out": z + 1}',
    one='z[:, :1]', flat='z[:, 0]', more='torch.cat([z, z], 1)', spatial='z[:, :, None, None]',
    scalar='z.mean()', nothing='None', text='"z"')

@pytest.fixture(scope='module')
def nets(tmp_path_factory):
    """nets.py with a network for each of them, and others that are no network at all."""
    folder = tmp_path_factory.mktemp('nets')
    text = LINEAR + '''
import types, typing
class Named(typing.NamedTuple):
    features: torch.Tensor
    logits: torch.Tensor
class Parallel(torch.nn.DataParallel):
    def __init__(self):
        super().__init__(Net())
class Unused(Net):
    def __init__(self):
        super().__init__()
        self.sub_block1 = torch.nn.Sequential(torch.nn.Linear(2, 2))
    def forward(self, x):
        return self[1](self[0](x))
def in_double():
    return Net().double()
def in_half():
    return Net().bfloat16()
ready = Net()
def needs(depth):
    return Net()
def leaves():
    raise SystemExit(3)
'''
    for name, out in (OUTPUTS | REFUSED_OUTPUTS).items():
        text += (f'class {name}(Net):\n    def forward(self, x):\n'
                 f'        z = super().forward(x)\n        return {out}\n')
    files(folder, nets=text, wrong='def make(:', relative='from .nets import Net')
    net = from_file(f'{folder}/nets.py:Net', 10)
    torch.save(net.state_dict(), folder / 'w.pt')
    return folder

def of(nets, function, weights='w.pt', classes=10):
    return checkpoint.load_checkpoint(nets / weights, f'{nets}/nets.py:{function}', classes)

@pytest.mark.parametrize('name', OUTPUTS)
def test_the_logits_are_found_in_what_a_network_returns(name, nets):
    torch.testing.assert_close(of(nets, name)[0](X).float(), of(nets, 'Net')[0](X))

@pytest.mark.parametrize('name', REFUSED_OUTPUTS)
def test_or_one_line_says_what_it_returns(name, nets):
    net, _ = of(nets, name)
    with pytest.raises(Refused, match='its output') as e:
        summary.inspect(net, X, torch.zeros(4, dtype=torch.int64), 10)
    assert '\n' not in str(e.value) and ('(B, 10)' in str(e.value) or 'without a tensor' in str(e.value))

@pytest.mark.parametrize('spec, says', [
    ('nets.py:needs', 'missing 1 required positional argument'), ('nets.py:leaves', 'SystemExit: 3'),
    ('nets.py:none', "has no attribute 'none'"), ('nets.py:types', 'not callable'),
    ('wrong.py:make', 'SyntaxError'), ('relative.py:Net', 'relative import'),
    ('absent.py:make', 'there is no file')])
def test_code_that_makes_no_network_is_one_line(spec, says, nets):
    before, path = our_modules(), sys.path[:]
    with pytest.raises(Refused, match=says) as e:
        from_file(f'{nets}/{spec}', 10)
    assert '\n' not in str(e.value) and our_modules() == before and sys.path == path

def test_double_weights_and_networks_are_evaluated_in_fp32(nets):
    w = torch.load(nets / 'w.pt', weights_only=True)
    torch.save({k: v.double() for k, v in w.items()}, nets / 'double.pt')
    for function in ('Net', 'in_double', 'in_half'):
        out = of(nets, function, 'double.pt')[0](X)
        assert out.dtype == torch.float32
        assert torch.equal(out, of(nets, 'Net')[0](X))

def test_keys_that_fit_as_they_are_are_left_alone(nets, tmp_path):
    """Names that are dropped elsewhere, where the network itself has them."""
    for function in ('Parallel', 'Unused'):
        torch.save(from_file(f'{nets}/nets.py:{function}', 10).state_dict(), nets / f'{function}.pt')
        net, meta = of(nets, function, f'{function}.pt')
        w = torch.load(nets / f'{function}.pt', weights_only=True)
        assert net.state_dict().keys() == w.keys() and meta['weights'] == 'weights: the whole file'
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), w.values()))
    assert torch.equal(of(nets, 'ready')[0](X), of(nets, 'Net')[0](X))         # made when it is imported
    _, meta = of(nets, 'Parallel', 'w.pt')
    assert meta['weights'] == 'weights: the whole file; prefix module. added'

# -----------------------------------------------------------------------------
# a network of one's own that was trained here, and code that a file names

@pytest.fixture(scope='module')
def own(theirs, tmp_path_factory):
    """A student that train_adv.py trained of the code in theirs, and a teacher of the same; what was said."""
    out, said = tmp_path_factory.mktemp('own'), []
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(files_of_ours, 'say', lambda *lines: said.extend(lines))
    monkeypatch.setattr('support.runs.say', lambda *lines: said.extend(lines))
    tiny = ['--dataset', 'synthetic', '--subset', 64, '--epochs', 1, '--model', f'{theirs}/net.py:make']
    run('train_teacher.py', *tiny, '--out', out / 'teacher')
    run('train_adv.py', *tiny, '--steps', 1, '--ema', 0.9, '--loss', 'logit_mse', '--out', out,
        '--teacher', out / 'teacher/best.pt')
    monkeypatch.undo()
    assert sys.modules['data'] is data and sys.modules['losses'] is losses
    return out, said

def test_the_command_printed_after_training_names_the_code(own, theirs):
    out, said = own
    command = shlex.split(said[-1].partition('Next: ')[2])
    assert os.path.abspath(command[1]) == str(HERE / 'evaluate.py')
    assert command[2:] == [f'{out}/best.pt', '--model', f'{theirs}/net.py:make']
    script = run('evaluate.py', *command[2:], *SYNTHETIC[2:])
    _, meta = checkpoint.load_checkpoint(out / 'best.pt', command[-1])
    assert script['meta']['loss'] == meta['loss'] == 'logit_mse'

@pytest.fixture(scope='module')
def hostile(tmp_path_factory):
    """Weights that somebody sent: they name code on this disk."""
    folder = tmp_path_factory.mktemp('hostile')
    files(folder, net=f'open({str(folder / "ran")!r}, "w").close()\n{LINEAR}')
    net = from_file(f'{folder}/net.py:Net', 10)
    os.remove(folder / 'ran')
    checkpoint.save_checkpoint(folder / 'w.pt', net, dataset='synthetic')
    return folder

def test_code_that_a_file_names_runs_only_if_the_user_names_it(hostile):
    status, out, err = as_a_user('evaluate.py', 'w.pt', *SYNTHETIC, cwd=hostile)
    assert status == 2 and len(err) == 1 and not out and not (hostile / 'ran').exists()
    command = shlex.split(err[0].partition('If you trust that file: ')[2])
    assert command[0] == 'python' and command[-2:] == ['--model', f'{hostile}/net.py:Net']
    status, out, err = as_a_user(*command[1:], cwd=hostile)
    assert status == 0 and not err and (hostile / 'ran').exists()

@pytest.mark.parametrize('script, flags, flag', [
    ('evaluate.py', '{w} --model resnet18', '--model'),
    ('evaluate.py', '{ok} --transfer-from {w}', '--transfer-model'),
    ('train_adv.py', '--loss logit_mse --teacher {w}', '--teacher-model'),
    ('train_adv.py', '--loss pgd_at --warm-start {w}', '--model'), ('tools/audit.py', '{w}', '--model')])
def test_nor_does_any_other_way_to_a_file(script, flags, flag, hostile, tmp_path, capsys):
    with contextlib.suppress(FileNotFoundError):
        os.remove(hostile / 'ran')
    net = models.build('resnet18', 10, width=4)
    checkpoint.save_checkpoint(tmp_path / 'ok.pt', net, dataset='synthetic')
    argv = flags.format(w=hostile / 'w.pt', ok=tmp_path / 'ok.pt').split()
    if script == 'train_adv.py':
        argv += ['--subset', 64, '--width', 4, '--epochs', 1, '--out', tmp_path / 'm']
    else:
        argv += ['--n', 9]
    with pytest.raises(SystemExit) as e:
        run(script, '--dataset', 'synthetic', *argv)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and f'{flag} {hostile}/net.py:Net' in err
    assert not (hostile / 'ran').exists()
