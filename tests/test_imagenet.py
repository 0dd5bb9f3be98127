"""Class folders of image files: what is read, cropped, held out, skipped, refused, trained, evaluated."""
import json, os, pathlib, signal, subprocess, sys, time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

import data, models
from support import checkpoint, imagenet
from support.files import Refused
from test_smoke import run

HERE = pathlib.Path(__file__).parent.parent
CLASSES = ['n01', 'n02', 'n03', 'n04']

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four classes, each a grey: 10 training and 6 validation images of every size and colour space."""
    monkeypatch.setattr(imagenet, 'SIZE', 32)
    monkeypatch.setattr(imagenet, 'reported', set())
    return tree(tmp_path / 'images')

def tree(folder, train=10, val=6):
    rng = np.random.default_rng(0)
    for split, n in ('train', train), ('val', val):
        for c, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for k in range(n):
                h, w = rng.integers(40, 90, 2)
                pixels = np.full((h, w, 3), 40 * c + 60) + rng.integers(-20, 20, (h, w, 3))
                image = Image.fromarray(pixels.astype(np.uint8))
                image = [image, image.convert('L'), image.convert('CMYK')][k % 3]
                image.save(folder / split / name / f'{name}_{k}.JPEG')
    return folder

def test_hidden_files_and_folders_are_no_images(folder):
    before = data.load('imagenet', folder)
    for path in 'train/n01/._n01_0.JPEG', 'val/n01/._n01_0.JPEG', 'train/.ipynb_checkpoints/a.txt':
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text('')
    after = data.load('imagenet', folder)
    assert after.classes == 4 and sorted(after.x_test.paths) == sorted(before.x_test.paths)
    assert len(after.y_train) + len(after.y_val) == 40

def test_crops_are_torchvisions_and_of_the_right_image(folder):
    d = data.load('imagenet', folder)
    assert (d.classes, len(d.y_train), len(d.y_val), len(d.y_test)) == (4, 36, 4, 24)
    assert len({*d.x_train.paths, *d.x_val.paths}) == 40            # disjoint
    for path, label in zip(d.x_test.paths, d.y_test):
        assert CLASSES[label] in path.decode()
    x = imagenet.in_memory(d.x_test, torch.device('cpu'))
    for path, ours in zip(d.x_test.paths, x):
        image = Image.open(path.decode()).convert('RGB')
        theirs = TF.center_crop(TF.resize(image, 36), 32)
        assert np.array_equal(ours, np.array(theirs))
    in_order = torch.cat([x for x, _ in data.batches(d.x_test, d.y_test, 5)])
    assert torch.equal(in_order, data.to_float(x))

def test_training_crops_repeat_with_the_seed_and_differ_by_epoch(folder):
    d = data.load('imagenet', folder)
    def epoch(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.get_rng_state()
        out = list(data.batches(d.x_train, d.y_train, 8, 'crop+flip', generator, **options))
        assert torch.equal(noise, torch.get_rng_state())            # that of the attack is not touched
        return out
    a, b, c = epoch(0), epoch(0), epoch(1)
    assert [x.shape for x, _ in a] == [(8, 3, 32, 32)] * 4          # whole batches only
    assert all(torch.equal(u, v) for s, t in zip(a, b) for u, v in zip(s, t))
    assert not torch.equal(a[0][0], c[0][0])
    rest = epoch(0, first=2)                                        # resumed after two batches
    assert len(rest) == 2 and torch.equal(rest[0][0], a[2][0])
    halves = [epoch(0, share=slice(k, None, 2)) for k in range(2)]  # by two processes
    assert all(torch.equal(half[0][0], a[0][0][k::2]) for k, half in enumerate(halves))
    for x, y in a:                                                  # the label is that of the image: its grey
        assert ((x.mean((1, 2, 3)) * 255 - 60) / 40).round().long().tolist() == y.tolist()

def test_a_damaged_file_is_named_and_replaced_in_training_and_refused_in_evaluation(folder, capsys):
    d = data.load('imagenet', folder)
    bad = [pathlib.Path(p.decode()) for p in d.x_train.paths[[1, 2]]]
    bad[0].write_bytes(bad[0].read_bytes()[:300])                   # truncated
    bad[1].write_bytes(b'')
    out = [torch.cat(part) for part in zip(*data.batches(
        d.x_train, d.y_train, 8, 'crop+flip', torch.Generator().manual_seed(0)))]
    assert len(out[1]) == 32
    assert ((out[0].mean((1, 2, 3)) * 255 - 60) / 40).round().long().tolist() == out[1].tolist()
    said = capsys.readouterr().err
    assert all(said.count(str(path)) == 1 for path in bad)
    with pytest.raises(Refused, match=f'cannot read .*{bad[0].name}'):
        imagenet.in_memory(d.x_train, torch.device('cpu'))
    for path in d.x_train.paths:
        pathlib.Path(path.decode()).write_bytes(b'<html>')
    with pytest.raises(OSError, match='cannot read .*, .*, '):
        next(data.batches(d.x_train, d.y_train, 8, 'crop+flip', torch.Generator()))

def test_robustbenchs_5000_are_taken_in_their_order(tmp_path):
    numbers = (HERE / 'support/imagenet5000.txt').read_text().split()
    assert len(set(numbers)) == 5000 and all(1 <= int(n) <= 50000 for n in numbers)
    for k in range(1000):
        (tmp_path / f'val/n{k:03}').mkdir(parents=True)
    for k, n in enumerate([*numbers, '50000']):                     # which is not among them
        (tmp_path / f'val/n{k % 1000:03}/ILSVRC2012_val_{int(n):08}.JPEG').touch()
    d = data.load('imagenet', tmp_path, training=False)
    assert [int(p[-13:-5]) for p in d.x_test.paths] == list(map(int, numbers))
    assert d.y_test.tolist() == [k % 1000 for k in range(5000)] and (len(d.y_train), d.classes) == (0, 1000)
    (tmp_path / f'val/n007/ILSVRC2012_val_{int(numbers[7]):08}.JPEG').unlink()
    with pytest.raises(Refused, match=f'1 of .* missing.*{int(numbers[7]):08}'):
        data.load('imagenet', tmp_path, training=False)

@pytest.mark.parametrize('name, millions', [('torchvision-resnet50', 25.557),
                                            ('torchvision-wide_resnet50_2', 68.883)])
def test_torchvisions_networks_have_its_keys(name, millions):
    import torchvision
    with torch.device('meta'):
        net = models.build(name, 1000)
        theirs = torchvision.models.get_model(name.split('-')[1])
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(millions * 1e6, abs=600)
    assert net.state_dict().keys() == theirs.state_dict().keys()

def test_torchvisions_networks_take_what_the_others_take():
    torch.manual_seed(0)
    x = torch.rand(4, 3, 64, 64)
    plain = models.build('torchvision-resnet18', 10).eval()
    other = models.build('torchvision-resnet18', 10, mean=imagenet.MEAN, std=imagenet.STD).eval()
    other.load_state_dict(plain.state_dict())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (imagenet.MEAN, imagenet.STD))
    torch.testing.assert_close(other(x), plain((x - mean) / std))
    silu = models.build('torchvision-resnet18', 10, activation='silu', dual_bn=True)
    assert not any(type(m) is torch.nn.ReLU for m in silu.modules())
    with models.bn_branch(silu, 'aux'):
        silu(x)
    assert silu.bn1.num_batches_tracked == 0 and silu.bn1.aux.num_batches_tracked == 1

@pytest.mark.parametrize('break_it, message', [
    (lambda f: (f / 'val').rename(f / 'test'), 'val should be a folder'),
    (lambda f: (f / 'val/n04').rename(f / 'val/n05'), 'different class folders, for instance n04'),
    (lambda f: [p.unlink() for p in (f / 'val/n04').iterdir()], 'n04')])
def test_wrong_folders_are_one_line(folder, break_it, message):
    break_it(folder)
    with pytest.raises(Refused, match=message) as e:
        data.load('imagenet', folder)
    assert '\n' not in str(e.value)

def test_as_a_user_runs_it(tmp_path):
    """At full size; a damaged training image is named, one that is to be evaluated refuses the evaluation."""
    images = tree(tmp_path / 'images', train=6, val=3)
    common = ['--dataset', 'imagenet', '--data-dir', images, '--model', 'torchvision-resnet18', '--lr', 0.01,
              '--batch-size', 6, '--epochs', 1]
    run('train_teacher.py', *common, '--out', tmp_path / 'teacher')
    bad = pathlib.Path(data.load('imagenet', images).x_train.paths[0].decode())
    bad.write_bytes(bad.read_bytes()[:200])
    def python(script, *flags):
        return subprocess.run([sys.executable, HERE / script, *map(str, flags)], capture_output=True,
                              text=True)
    done = python('train_adv.py', '--loss', 'logit_mse', *common, '--steps', 1, '--teacher',
                  tmp_path / 'teacher/best.pt', '--out', tmp_path / 'student')
    assert done.returncode == 0 and done.stderr.count(f'cannot read {bad}') == 1, done.stderr
    config = json.loads((tmp_path / 'student/log.jsonl').read_text().splitlines()[0])
    assert (config['eps'], config['step_size'], config['weight_decay']) == (4.0, 1.0, 1e-4)
    evaluate = ['evaluate.py', tmp_path / 'student/last.pt', '--n', 6, '--attacks', 'fgsm', '--no-audit']
    assert python(*evaluate).returncode == 0
    _, meta = checkpoint.load_checkpoint(tmp_path / 'student/last.pt')
    assert meta['config']['name'] == 'torchvision-resnet18' and meta['eps'] == 4.0
    report, = (tmp_path / 'student').glob('*.json')
    assert json.loads(report.read_text())['eps_pixels'] == 4.0
    first = pathlib.Path(data.load('imagenet', images).x_test.paths[0].decode())
    first.write_bytes(b'')
    done = python(*evaluate, '--out', tmp_path / 'again.json')
    assert done.returncode == 2 and first.name in done.stderr and 'Traceback' not in done.stderr

@pytest.mark.parametrize('script', ['train_teacher.py', 'train_adv.py'])
def test_a_signal_to_everyone_saves_and_ends(script, tmp_path):
    """As Ctrl-C and clusters do: also to the processes that decode, which must not outlive the training."""
    images = tree(tmp_path / 'images', train=12, val=3)
    flags = ['--dataset', 'imagenet', '--data-dir', images, '--model', 'torchvision-resnet18', '--lr', 0.01,
             '--batch-size', 2, '--epochs', 3, '--save-minutes', 0, '--out', tmp_path / 'run']
    flags += ['--loss', 'pgd_at', '--steps', 1] if script == 'train_adv.py' else []
    process = subprocess.Popen([sys.executable, HERE / script, *map(str, flags)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / 'run/state.pt').exists() and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and 'Continue with' in err and 'Traceback' not in err, err
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)                                   # nobody is left
