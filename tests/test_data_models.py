"""Data are split, cut and drawn as the README says; networks are the published ones, and checkpoints load."""
import pathlib

import numpy as np
import pytest
import torch

import data, models
from support import checkpoint, sources, speed
from test_smoke import X, net, run

def test_crop_and_flip_equal_loops():
    x = torch.randint(256, (16, 32, 32, 3), dtype=torch.uint8)
    out = data.augmented(x, 'crop+flip', torch.Generator().manual_seed(0))
    padded = np.pad(x.numpy(), ((0, 0), (4, 4), (4, 4), (0, 0)))
    for image, frame in zip(out.numpy(), padded):
        views = [v for i in range(9) for j in range(9)
                 for v in (frame[i:i + 32, j:j + 32], frame[i:i + 32, j:j + 32][:, ::-1])]
        assert any((image == v).all() for v in views)
    assert not torch.equal(out, x)

def numbered(folder, n):
    """An npz of n training images whose first two bytes are their number."""
    x = np.zeros((n, 8, 8, 3), np.uint8)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = np.arange(n) % 256, np.arange(n) // 256
    np.savez(folder / 'numbered.npz', x_train=x, y_train=np.arange(n) % 10,
             x_test=x[:10], y_test=np.arange(10))

@pytest.mark.parametrize('n, held_out', [(300, 30), (12000, 1000)])
def test_holdout_is_disjoint_and_the_same_for_every_subset(n, held_out, tmp_path):
    numbered(tmp_path, n)
    number = lambda x: set((x[:, 0, 0, 0].long() + 256 * x[:, 0, 0, 1].long()).tolist())
    whole, part = data.load('numbered', tmp_path), data.load('numbered', tmp_path, subset=50)
    assert number(whole.x_val) == number(part.x_val) and len(number(whole.x_val)) == held_out
    assert number(whole.x_train) | number(whole.x_val) == set(range(n))
    assert not number(whole.x_train) & number(whole.x_val)
    assert sorted(number(whole.x_train))[:50] == sorted(number(part.x_train))

def test_digits_are_the_real_ones():
    d = data.load('digits')
    assert len(d.x_train) + len(d.x_val) + len(d.x_test) == 1797
    assert d.x_test.shape == (449, 32, 32, 3) and d.x_test.dtype == torch.uint8
    assert d.x_test.max() == 255 and torch.equal(d.x_test[:, ::4, ::4], d.x_test[:, 3::4, 3::4])  # 4x4 blocks

def test_batches_are_seeded_and_in_range():
    d = data.load('synthetic', subset=100)
    epochs = [list(data.batches(d.x_train, d.y_train, 32, 'crop+flip', torch.Generator().manual_seed(5)))
              for _ in range(2)]
    assert [len(y) for _, y in epochs[0]] == [32, 32, 32]       # whole batches only
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*epochs))
    x = epochs[0][0][0]
    assert x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
    assert sum(len(y) for _, y in data.batches(d.x_val, d.y_val, 50)) == len(d.y_val)

# -----------------------------------------------------------------------------
# grey images, few classes and many, sorted files

def mine(folder, name='mine', x=lambda x: x, y=lambda y: y):
    """synthetic, its images and labels changed, as folder/name.npz -> the flags that name it."""
    x_train, y_train, x_test, y_test = sources.synthetic()
    np.savez(folder / f'{name}.npz', x_train=x(x_train), y_train=y(y_train), x_test=x(x_test),
             y_test=y(y_test))
    return ['--dataset', name, '--data-dir', folder]

SHORT = '--loss dkl --width 4 --subset 64 --batch-size 32 --epochs 1 --steps 1'.split()
ATTACKS = '--n 20 --attacks pgd cw --steps 2 --no-audit'.split()

def test_mean_and_std_are_those_of_the_images():
    d = data.load('digits')
    x = d.x_train.double() / 255
    mean, std = d.statistics()
    assert mean == pytest.approx(x.mean((0, 1, 2)).tolist())
    assert std == pytest.approx(x.flatten(0, 2).std(0).tolist())

def test_grey_images_with_and_without_a_channel(tmp_path):
    weights = []
    for name, grey in (('hw', lambda x: x[..., 0]), ('hw1', lambda x: x[..., :1])):
        run('train_adv.py', *SHORT, *mine(tmp_path, name, grey), '--out', tmp_path / name)
        script = run('evaluate.py', tmp_path / name / 'best.pt', *ATTACKS)
        assert script['x_test'].shape == (20, 1, 32, 32) and script['results']['cw-2']['n'] == 20
        weights.append(checkpoint.fingerprint(script['model']))
    assert weights[0] == weights[1]

def test_grey_batches_have_the_strides_of_any_other():
    """Of one channel channels_last is the same memory: oneDNN would take it for that, and crash."""
    grey, colour = [data.to_float(torch.zeros(5, 8, 6, c, dtype=torch.uint8)) for c in (1, 3)]
    assert grey.stride() == (48, 48, 6, 1) and colour.stride() == (144, 48, 6, 1)

@pytest.mark.parametrize('classes', [2, 3, 100, 1000])
def test_any_number_of_classes_trains_and_is_attacked(classes, tmp_path, capsys):
    flags = mine(tmp_path, y=lambda y: np.concatenate([np.arange(len(y) - 1) % classes, [classes - 1]]))
    run('train_adv.py', *SHORT, *flags, '--out', tmp_path)
    r = run('evaluate.py', tmp_path / 'best.pt', *ATTACKS)['results']['pgd-2']
    assert len(r['per_class']) == min(classes, 20) and (r['confusion'] is None) == (classes == 1000)
    capsys.readouterr()
    if classes < 4:                             # AutoAttack's targeted loss does not exist there
        with pytest.raises(SystemExit):
            run('evaluate.py', tmp_path / 'best.pt', '--n', 20)
        err = capsys.readouterr().err
        assert 'AutoAttack needs four classes' in err and err.count('\n') == 1

@pytest.mark.parametrize('script', ['train_adv.py', 'train_teacher.py'])
def test_one_class_is_refused(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(script, *mine(tmp_path, y=lambda y: 0 * y), '--width', 4, '--out', tmp_path / 'm')
    err = capsys.readouterr().err
    assert 'of one class' in err and err.count('\n') == 1

def test_an_evaluation_asks_nothing_of_the_training_images(tmp_path):
    images = np.zeros((2, 32, 32, 3), np.uint8)
    np.savez(tmp_path / 'mine.npz', x_train=images, y_train=[9, 9], x_test=images, y_test=[0, 3])
    assert data.load('mine', tmp_path, training=False).classes == 10

def test_a_class_without_test_images(tmp_path, net):
    x_train, y_train, x_test, y_test = sources.synthetic()
    kept = y_test != 3
    np.savez(tmp_path / 'mine.npz', x_train=x_train, y_train=y_train, x_test=x_test[kept],
             y_test=y_test[kept])
    checkpoint.save_checkpoint(tmp_path / 'm.pt', net, dataset='mine')
    script = run('evaluate.py', tmp_path / 'm.pt', '--dataset', 'mine', '--data-dir', tmp_path,
                 '--attacks', 'clean')
    r = script['results']['clean']
    assert sorted(r['per_class']) == [0, 1, 2, 4, 5, 6, 7, 8, 9] and sum(r['confusion'][3]) == 0
    right = sum(r['confusion'][c][c] for c in range(10))
    assert r['correct'] == right and r['class_mean'] == pytest.approx(sum(r['per_class'].values()) / 9)
    note, = [note for note in script['notes'] if 'hold 9 of 10 classes' in note]
    assert '--draw' not in note                 # they are all the test images there are

def test_a_sorted_file_is_said_and_drawn_from(tmp_path, capsys):
    x, y, u, v = sources.synthetic()
    order = y.argsort(kind='stable')
    np.savez(tmp_path / 'mine.npz', x_train=x[order], y_train=y[order], x_test=u, y_test=v)
    first, drawn, again, other = [data.load('mine', tmp_path, subset=100, subset_seed=seed)
                                  for seed in (None, 0, 0, 1)]
    note = data.missing_classes(first, 100)
    assert '2 of 10 classes (0 1)' in note and '--subset-seed' in note
    other_note = data.missing_classes(first, None)          # nothing was cut: to draw would not help
    assert '2 of 10 classes (0 1): do the labels count from 0 without gaps?' in other_note
    assert data.missing_classes(drawn, 100) is None
    assert torch.equal(drawn.x_train, again.x_train) and not torch.equal(drawn.x_train, other.x_train)
    run('train_adv.py', '--loss', 'standard', '--dataset', 'mine', '--data-dir', tmp_path, '--subset', 100,
        '--width', 4, '--batch-size', 50, '--epochs', 1, '--out', tmp_path / 'm')
    assert note in capsys.readouterr().out

# -----------------------------------------------------------------------------
# networks and checkpoints

@pytest.mark.parametrize('name, millions', [
    ('resnet18', 11.174), ('resnet34', 21.282), ('resnet50', 23.521), ('preactresnet18', 11.172),
    ('wrn-28-10', 36.479), ('wrn-34-10', 46.160), ('mobilenetv2', 2.297)])
def test_models_have_the_published_size(name, millions):
    with torch.device('meta'):
        net = models.build(name, 10)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(millions * 1e6, abs=600)

@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'preactresnet18', 'wrn-10-2', 'mobilenetv2'])
def test_narrow_models_run_with_a_small_image_stem(name):
    net = models.build(name, 7, width=4, mean=[.5] * 3, std=[.2] * 3).eval()
    sizes = []
    last = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    last.register_forward_hook(lambda module, args, out: sizes.append(out.shape[2:]))
    assert net(X).shape == (6, 7) and sizes[0] in ((4, 4), (8, 8))          # an ImageNet stem would leave 1x1

@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'preactresnet18', 'wrn-10-2', 'mobilenetv2',
                                  'torchvision-resnet18'])
def test_folded_is_the_same_function(name):
    net = models.build(name, 7, width=None if 'torch' in name else 4)
    for m in net.modules():                         # statistics and an affine map that are no identity
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(m.weight, 1, 0.2), torch.nn.init.normal_(m.bias)
    net.double().eval()
    folded = speed.folded(net)
    layers = lambda net: sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    torch.testing.assert_close(folded(X.double()), net(X.double()))
    assert layers(folded) < layers(net) or name in ('preactresnet18', 'wrn-10-2')

def test_autoattacks_example_checkpoint_loads_unchanged():
    import pyautoattack
    path = pathlib.Path(pyautoattack.__file__).parent / 'examples/model_test.pt'
    net, meta = checkpoint.load_checkpoint(path, 'resnet18', 10)
    assert 'epoch' not in meta and not net.training

def test_checkpoint_round_trip_and_prefixes(tmp_path, net):
    checkpoint.save_checkpoint(tmp_path / 'a.pt', net, dataset='synthetic')
    again, meta = checkpoint.load_checkpoint(tmp_path / 'a.pt')
    assert checkpoint.fingerprint(again) == checkpoint.fingerprint(net) and meta['dataset'] == 'synthetic'
    torch.save({'model_state_dict': {f'module._orig_mod.{k}': v for k, v in net.state_dict().items()}},
               tmp_path / 'b.pt')
    again, meta = checkpoint.load_checkpoint(tmp_path / 'b.pt', 'resnet18', 10, width=4)
    assert checkpoint.fingerprint(again) == checkpoint.fingerprint(net) and 'epoch' not in meta
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith('.tmp')] == []
