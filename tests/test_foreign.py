"""Anybody's network: its code finds what it would in its own folder, its weights are found and fitted, or
one line says why not; and nothing runs because a file names it."""
import argparse
import contextlib
import copy
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
import torchvision

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
    with pytest.raises(Refused, match='its output is') as e:
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

# -----------------------------------------------------------------------------
# weights

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    net = models.build('resnet18', 10, width=4)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
    return net.eval()

def load(path, content, name='resnet18', width=4, **options):
    """-> the fingerprint of what is loaded from content, written to path; and what is said of it."""
    torch.save(content, path)
    loaded, meta = checkpoint.load_checkpoint(path, name, 10, width=width, **options)
    assert not loaded.training and all(p.dtype == torch.float32 for p in loaded.parameters())
    return checkpoint.fingerprint(loaded), meta['weights']

def prefixed(weights, prefix):
    return {prefix + k: v for k, v in weights.items()}

def torchvisions(weights, head='fc'):
    return {k.replace('linear.', f'{head}.').replace('shortcut', 'downsample'): v for k, v in weights.items()}

CHANGES = {
    'as it is': (lambda w: w, 'the whole file'),
    'no counters': (lambda w: {k: v for k, v in w.items() if 'num_batches' not in k}, 'the whole file'),
    'Lightning': (lambda w: {'state_dict': prefixed(w, 'model.')},
                  'weights: state_dict; prefix model. dropped'),
    'wrapped': (lambda w: {'model': prefixed(w, 'module.model.')},
                'weights: model; prefix module.model. dropped'),
    'compiled': (lambda w: {'net': prefixed(w, 'module._orig_mod.')}, 'prefix module._orig_mod. dropped'),
    'Sequential': (lambda w: prefixed(w, '1.'), 'prefix 1. dropped'),
    'torchvision': (torchvisions,
                    'keys renamed, such as layer2.0.downsample.0.weight to layer2.0.shortcut.0.weight'),
    'timm': (lambda w: {'model': prefixed(torchvisions(w, 'head.fc'), 'module.')}, 'without max pooling'),
    'sub_block1': (lambda w: dict(w, **{'sub_block1.w': torch.ones(2)}), 'sub_block1 left out'),
    'thop': (lambda w: dict(w, total_ops=torch.ones(1), **{'conv1.total_params': torch.ones(1)}),
             'total_ops left out'),
    'half': (lambda w: {k: v.bfloat16() if v.is_floating_point() else v for k, v in w.items()},
             'the whole file'),
    'EMA': (lambda w: {'state_dict_ema': w}, 'weights: state_dict_ema'),
    'EMA of timm': (lambda w: {'model_ema': prefixed(w, 'module.')},
                    'weights: model_ema; prefix module. dropped'),
    'EMA alone': (lambda w: {'ema': w, 'epoch': 3}, 'weights: ema'),
    'nested': (lambda w: {'ema': {'state_dict': w, 'decay': 0.9}}, 'weights: ema.state_dict'),
    'both': (lambda w: {'state_dict_ema': {k: 0 * v for k, v in w.items()}, 'state_dict': w, 'optimizer': {}},
             'weights: state_dict; the file also holds state_dict_ema'),
    'beside numbers': (lambda w: {'model': w, 'acc': np.float64(9), 'epoch': np.int64(3),
                                  'args': argparse.Namespace(lr=1)}, 'weights: model'),
}

@pytest.mark.parametrize('name', CHANGES)
def test_keys_and_containers(name, net, tmp_path, capsys):
    change, says = CHANGES[name]
    fingerprint, text = load(tmp_path / 'w.pt', change(net.state_dict()))
    if name == 'half':
        assert fingerprint == checkpoint.fingerprint(copy.deepcopy(net).bfloat16().float())
    else:
        assert fingerprint == checkpoint.fingerprint(net)
    assert says in text and text in capsys.readouterr().out
    assert ('without max pooling' in text) == (name in ('torchvision', 'timm'))
    assert 'not standardised' in text

def test_double_weights_and_networks_are_evaluated_in_fp32(nets):
    w = torch.load(nets / 'w.pt', weights_only=True)
    torch.save({k: v.double() for k, v in w.items()}, nets / 'double.pt')
    for function in ('Net', 'in_double', 'in_half'):
        out = of(nets, function, 'double.pt')[0](X)
        assert out.dtype == torch.float32
        assert torch.equal(out, of(nets, 'Net')[0](X))

def test_averaged_model_and_unknown_containers(net, tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(net)
    fingerprint, text = load(tmp_path / 'w.pt', averaged.state_dict())
    assert fingerprint == checkpoint.fingerprint(net)
    assert 'n_averaged left out; prefix module. dropped' in text
    two = prefixed(net.state_dict(), 'student.') | {'teacher.w': X}
    for content, says in (({'weights': net.state_dict()}, 'no state dict'),
                          ({'state_dict': {}}, 'no state dict'),
                          (two, 'found there: student.conv1.weight'),
                          ({'fc.weight': X}, 'found there: fc.weight'),
                          (dict(net.state_dict(), mu=X), 'unknown mu')):
        with pytest.raises(Refused, match=says):
            load(tmp_path / 'w.pt', content)

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

def test_pickle_protocols(net, tmp_path):
    for options in (dict(pickle_protocol=2), dict(_use_new_zipfile_serialization=False)):
        torch.save(net.state_dict(), tmp_path / 'w.pt', **options)
        loaded = checkpoint.load_checkpoint(tmp_path / 'w.pt', 'resnet18', 10, width=4)[0]
        assert checkpoint.fingerprint(loaded) == checkpoint.fingerprint(net)
    for protocol in (3, 4, 5):
        torch.save(net.state_dict(), tmp_path / 'w.pt', pickle_protocol=protocol)
        try:
            loaded = checkpoint.load_checkpoint(tmp_path / 'w.pt', 'resnet18', 10, width=4)[0]
        except Refused as e:
            assert f'pickle_protocol={protocol}' in str(e) and '\n' not in str(e)
        else:                                           # of a torch that can
            assert checkpoint.fingerprint(loaded) == checkpoint.fingerprint(net)

def test_what_stands_beside_the_weights_is_not_run(net, tmp_path):
    """Numbers of numpy and flags are read; the rest of what pickle could do is not."""
    for thing in (types.SimpleNamespace(), torch.nn.Linear(2, 2), np.zeros(3), np.array(['a', None])):
        with pytest.raises(Refused, match='save its state dict alone'):
            load(tmp_path / 'w.pt', {'model': net.state_dict(), 'thing': thing})

@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('protocol', [2, 4])
def test_a_malicious_pickle_is_called_one_and_not_run(zipped, protocol, net, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/ran',)
    torch.save({'state_dict': net.state_dict(), 'epoch': Payload()}, tmp_path / 'w.pt',
               pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(Refused, match=f'would run {os.system.__module__}.system .*malicious') as e:
        checkpoint.read(tmp_path / 'w.pt')
    assert '\n' not in str(e.value) and not (tmp_path / 'ran').exists()

def test_files_that_are_something_else_are_named(net, tmp_path):
    path = tmp_path / 'w.pt'
    torch.save(net.state_dict(), path)
    with zipfile.ZipFile(path, 'a') as z:
        z.writestr('w/constants.pkl', b'')              # what torch.jit.save writes, and torch.load looks for
    with pytest.raises(Refused, match='TorchScript archive'):
        checkpoint.read(path)
    for content, says in ((b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'git lfs pull'),
                          (b'', 'truncated'), (b'\n <html>', 'web page')):
        path.write_bytes(content)
        with pytest.raises(Refused, match=says):
            checkpoint.read(path)

def test_safetensors(net, tmp_path, monkeypatch):
    torch_side = pytest.importorskip('safetensors.torch')
    for name in ('w.safetensors', 'without_the_extension'):
        torch_side.save_file(prefixed(net.state_dict(), 'module.'), tmp_path / name)
        loaded, meta = checkpoint.load_checkpoint(tmp_path / name, 'resnet18', 10, width=4)
        assert checkpoint.fingerprint(loaded) == checkpoint.fingerprint(net)
        assert 'the whole file; prefix module. dropped' in meta['weights']
    whole = (tmp_path / 'w.safetensors').read_bytes()
    (tmp_path / 'w.safetensors').write_bytes(whole[:len(whole) // 2])
    with pytest.raises(Refused, match='damaged safetensors'):
        checkpoint.read(tmp_path / 'w.safetensors')

def test_without_safetensors_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    head = json.dumps({'fc.weight': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}}).encode()
    (tmp_path / 'w.pt').write_bytes(struct.pack('<Q', len(head)) + head + bytes(4))
    with pytest.raises(Refused, match='pip install safetensors'):
        checkpoint.read(tmp_path / 'w.pt')

def test_torchvisions_own_resnet_with_a_small_stem_is_our_resnet18(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    theirs(X), theirs.eval()                            # statistics that are not the initial ones
    torch.save(theirs.state_dict(), tmp_path / 'w.pt')
    ours, meta = checkpoint.load_checkpoint(tmp_path / 'w.pt', 'resnet18', 10)
    with torch.no_grad():
        torch.testing.assert_close(ours(X), theirs(X))
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), tmp_path / 'w.pt')
    with pytest.raises(Refused, match=r'conv1.weight is \(64, 3, 7, 7\)'):
        checkpoint.load_checkpoint(tmp_path / 'w.pt', 'resnet18', 10)

def test_the_same_keys_two_networks(tmp_path):
    torch.manual_seed(0)
    weights = models.build('preactresnet18', 10, width=4).state_dict()
    first, rice = load(tmp_path / 'w.pt', weights, 'preactresnet18')
    second, wong = load(tmp_path / 'w.pt', weights, 'preactresnet18-fast')
    assert 'Rice et al.' in rice and 'preactresnet18-fast' in rice and 'Rice' not in wong
    a, b = [checkpoint.load_checkpoint(tmp_path / 'w.pt', name, 10, width=4)[0](X)
            for name in ('preactresnet18', 'preactresnet18-fast')]
    assert (a - b).abs().max() > 0.01
    assert first != second                              # or one evaluation would continue the other's

def test_grey_weights_by_name(tmp_path, capsys):
    x, y, u, v = data.synthetic()
    np.savez(tmp_path / 'grey.npz', x_train=x[..., 0], y_train=y, x_test=u[..., 0], y_test=v)
    torch.manual_seed(0)
    grey = models.build('resnet18', 10, width=4, channels=1)
    torch.save(grey.state_dict(), tmp_path / 'grey.pt')
    torch.save(models.build('resnet18', 10, width=4).state_dict(), tmp_path / 'colour.pt')
    flags = ['--model', 'resnet18', '--width', 4, '--dataset', 'grey', '--data-dir', tmp_path, '--n', 9,
             '--attacks', 'clean']
    script = run('evaluate.py', tmp_path / 'grey.pt', *flags, '--transfer-from', tmp_path / 'grey.pt')
    assert checkpoint.fingerprint(script['model']) == checkpoint.fingerprint(grey)
    assert script['x_test'].shape == (9, 1, 32, 32)
    standardised = [*flags, '--mean', 0.5, '--std', 0.2, '--out', tmp_path / 'e.json']
    script = run('evaluate.py', tmp_path / 'grey.pt', *standardised)
    assert script['model'].config['mean'] == [0.5]
    for flags in (flags, [*flags, '--mean', 0.5, 0.5, 0.5, '--std', 0.2, 0.2, 0.2]):
        weights = tmp_path / ('grey.pt' if '--mean' in flags else 'colour.pt')
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            run('evaluate.py', weights, *flags)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count('\n') == 1 and ('(4, 3, 3, 3)' in err or '--mean' in err)

def test_the_report_says_which_weights_were_taken(net, tmp_path):
    both = {'state_dict': torchvisions(net.state_dict()), 'model_ema': net.state_dict()}
    torch.save(both, tmp_path / 'both.pt')
    run('evaluate.py', tmp_path / 'both.pt', '--model', 'resnet18', '--width', 4, *SYNTHETIC,
        '--out', tmp_path / 'e.json')
    report = json.loads((tmp_path / 'e.json').read_text())
    for text in ('weights: state_dict;', 'also holds model_ema', 'keys renamed', 'not standardised'):
        assert text in report['weights']
    assert report['trained'] == {} and report['weights'] in report['notes']

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
    assert command == ['python', 'evaluate.py', f'{out}/best.pt', '--model', f'{theirs}/net.py:make']
    script = run(*command[1:], *SYNTHETIC[2:])
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
def test_nor_does_any_other_way_to_a_file(script, flags, flag, hostile, net, tmp_path, capsys):
    with contextlib.suppress(FileNotFoundError):
        os.remove(hostile / 'ran')
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

def test_a_config_that_is_damaged_or_of_another_version_is_one_line(net, tmp_path):
    for change, says in (({'name': 'resnet999'}, 'unknown model'), ({'width': 'x'}, 'w.pt: resnet18'),
                         ({"heads": 3}, "heads")):
        content = dict(state_dict=net.state_dict(), config=dict(net.config, **change))
        torch.save(content, tmp_path / 'w.pt')
        with pytest.raises(Refused, match=says) as e:
            checkpoint.load_checkpoint(tmp_path / 'w.pt')
        assert '\n' not in str(e.value)
