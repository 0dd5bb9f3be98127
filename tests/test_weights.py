"""Anybody's weights: found in their file and fitted to the network, or one line says why not."""
import argparse
import copy
import gzip
import json
import os
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
import torchvision

import models
from support import checkpoint, sources
from support.files import Refused
from test_smoke import run

X = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

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
    'both, one deeper': (lambda w: {'model_ema': {'module': {k: 0 * v for k, v in w.items()}}, 'model': w},
                         'weights: model; the file also holds model_ema.module'),
    'both, one by a name of its own': (lambda w: {'unaveraged': {k: 0 * v for k, v in w.items()}, 'model': w},
                                       'weights: model; the file also holds unaveraged'),
    'one name of its own': (lambda w: {'swa': w, 'optimizer': {'state': {0: {'m': w['conv1.weight']}}}},
                            'weights: swa'),
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

def test_averaged_model_and_unknown_containers(net, tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(net)
    fingerprint, text = load(tmp_path / 'w.pt', averaged.state_dict())
    assert fingerprint == checkpoint.fingerprint(net)
    assert 'n_averaged left out; prefix module. dropped' in text
    two = prefixed(net.state_dict(), 'student.') | {'teacher.w': X}
    for content, says in (({'a': net.state_dict(), 'b': net.state_dict()}, 'no state dict .*a, b'),
                          ({'state_dict': {}}, 'no state dict'),
                          (two, 'begins with student., and there is more, such as teacher.w'),
                          ({'fc.weight': X}, 'found there: fc.weight'),
                          (dict(net.state_dict(), mu=X), 'unknown mu')):
        with pytest.raises(Refused, match=says):
            load(tmp_path / 'w.pt', content)

@pytest.mark.filterwarnings('ignore:.*quantized tensor creation')
def test_tensors_that_hold_no_plain_numbers_are_named(net, tmp_path):
    weights = net.state_dict()
    quantized = torch.quantize_per_tensor(weights['linear.weight'], 0.1, 0, torch.qint8)
    for tensor, says in ((weights['linear.weight'].to('meta'), 'without values'),
                         (weights['linear.weight'].to_sparse(), 'sparse'),
                         (quantized, 'quantized')):
        with pytest.raises(Refused, match=f'linear.weight is a tensor {says}'):
            load(tmp_path / 'w.pt', dict(weights, **{'linear.weight': tensor}))

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
            assert 'pickle_protocol' in str(e) and '\n' not in str(e)
        else:                                           # of a torch that can
            assert checkpoint.fingerprint(loaded) == checkpoint.fingerprint(net)

def test_what_stands_beside_the_weights_is_not_run(net, tmp_path):
    """Numbers of numpy and flags are read; the rest of what pickle could do is not."""
    for thing in (types.SimpleNamespace(), torch.nn.Linear(2, 2), np.zeros(3), np.array(['a', None]),
                  types.SimpleNamespace().__init__):
        with pytest.raises(Refused, match='save its state dict alone'):
            load(tmp_path / 'w.pt', {'model': net.state_dict(), 'thing': thing})

@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('protocol, says', [
    (2, f'would run {os.system.__module__}.system .*malicious'), (4, 'may run any code')])
def test_a_malicious_pickle_is_called_one_and_not_run(zipped, protocol, says, net, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/ran',)
    torch.save({'state_dict': net.state_dict(), 'epoch': Payload()}, tmp_path / 'w.pt',
               pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(Refused, match=says) as e:
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
                          (b'', 'truncated'), (b'\n <html>', 'web page'), (b'\xef\xbb\xbf<html>', 'web page'),
                          ('<html>'.encode('utf-16'), 'web page'),
                          (b'404: Not Found', r'a text \("404: Not Found"\)'),
                          (b'{"error":\n "gated"}', 'a text .*did a download fail'),
                          (gzip.compress(path.read_bytes()), 'gunzip'),
                          (b'\x89HDF\r\n\x1a\n' + bytes(90), 'not a PyTorch checkpoint'),
                          (b'\x08\x07\x12\x07pytorch' + bytes(90), 'not a PyTorch checkpoint')):
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
    # of the length of the header, which comes first, the lowest byte may be any: also that of '<'
    for spaces in range(256):
        torch_side.save_file({'w': torch.ones(1)}, tmp_path / 'less', metadata={'x': 'x' * spaces})
        assert set(checkpoint.read(tmp_path / 'less')) == {'w'}
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
    x, y, u, v = sources.synthetic()
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
    assert script['model'].build_args['mean'] == [0.5]
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
    run('evaluate.py', tmp_path / 'both.pt', '--model', 'resnet18', '--width', 4, '--dataset', 'synthetic',
        '--n', 20, '--attacks', 'clean', '--out', tmp_path / 'e.json')
    report = json.loads((tmp_path / 'e.json').read_text())
    for text in ('weights: state_dict;', 'also holds model_ema', 'keys renamed', 'not standardised'):
        assert text in report['weights']
    assert report['trained'] == {} and report['weights'] in report['notes']

def test_a_config_that_is_damaged_or_of_another_version_is_one_line(net, tmp_path):
    for change, says in (({'name': 'resnet999'}, 'unknown model'), ({'width': 'x'}, 'w.pt: resnet18'),
                         ({"heads": 3}, "heads")):
        content = dict(state_dict=net.state_dict(), config=dict(net.build_args, **change))
        torch.save(content, tmp_path / 'w.pt')
        with pytest.raises(Refused, match=says) as e:
            checkpoint.load_checkpoint(tmp_path / 'w.pt')
        assert '\n' not in str(e.value)
