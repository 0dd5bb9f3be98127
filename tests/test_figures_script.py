"""tools/figures.py as it is run: what it draws of reports and checkpoints, and what it refuses."""
import json

import matplotlib
import numpy as np
import pytest
import torch

import models
from support import checkpoint, drawing, files
from test_figures import report, widths, write
from test_smoke import HERE, run
from tools import figures, reading

@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
    """The report of a network on synthetic data, and its checkpoint, whose log lies beside it."""
    out = tmp_path_factory.mktemp('evaluated')
    run('train_teacher.py', '--dataset', 'synthetic', '--width', 4, '--epochs', 2, '--out', out)
    run('evaluate.py', out / 'best.pt', '--n', 20, '--attacks', 'pgd', '--out', out / 'a.json')
    return out / 'a.json', out / 'best.pt'

def test_the_script_draws_everything(evaluated, tmp_path, capsys):
    path, _ = evaluated
    drawn = run('tools/figures.py', path, '--per-class', 2, '--out', tmp_path)['drawn']
    names = ['confusion', 'eps', 'images', 'per_class', 'stages', 'training', 'tsne']
    assert sorted(p.name for p in tmp_path.iterdir()) == [f'{n}.{e}' for n in names for e in ('pdf', 'png')]
    for name in names:
        assert (tmp_path / f'{name}.pdf').read_bytes().startswith(b'%PDF')
        picture = matplotlib.image.imread(tmp_path / f'{name}.png')
        assert picture.shape[1] >= 1000 and 0.01 < (picture[..., :3].min(2) < 0.9).mean() < 0.9
    assert capsys.readouterr().out.count('.png') == 7
    results = json.loads(path.read_text())['results']
    radii, accuracy = drawn['eps'].axes[0].lines[0].get_data()          # it starts at the clean accuracy
    assert radii[0] == 0 and accuracy[0] == results['clean']['accuracy'] > 15
    assert radii[6] == 8 and abs(accuracy[6] - results['pgd-20']['accuracy']) <= 5
    assert (np.diff(accuracy) <= 0).all()
    assert widths(drawn['stages'].axes[0])['standard'].tolist() == [r['accuracy'] for r in results.values()]
    assert sum(len(c.get_offsets()) for c in drawn['tsne'].axes[0].collections) == 20

def test_two_reports_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, 'save', lambda figure, path: None)
    a, b = (write(tmp_path / f'{k}.json', report(k)) for k in (1, 2))
    drawn = figures.draw([a, b], 'none', tmp_path)
    assert list(drawn) == ['stages', 'per_class', 'confusion-trades-beta-1', 'confusion-trades-beta-2']
    assert list(widths(drawn['stages'].axes[0])) == ['trades beta 1', 'trades beta 2']

def test_pictures_of_labels_that_begin_alike_are_all_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, 'save', lambda figure, path: None)
    monkeypatch.setattr(reading, 'labels', lambda paths, reports: ['t' * 200 + path for path in paths])
    paths = [write(tmp_path / f'{k}.json', report(k)) for k in range(3)]
    drawn = figures.draw(paths, 'none', tmp_path)
    assert len(drawn) == 5 and all(name.startswith('confusion-ttt') for name in list(drawn)[2:])

@pytest.mark.parametrize('draw, n, expected', [
    (False, None, range(5)), (False, 3, range(3)), (True, 3, range(3)), (False, 50, range(9)),
    (True, None, None)])
def test_the_images_are_those_of_the_report(draw, n, expected):
    """Or the first n. Drawn: as evaluate.py --draw --seed 7 takes them."""
    class d:
        x_test = torch.zeros(9, 8, 8, 3, dtype=torch.uint8)
        y_test = torch.arange(9)
    evaluated = dict(results=dict(clean=dict(n=5)), args=dict(draw=draw, seed=7))
    if expected is None:
        expected = sorted(torch.randperm(9, generator=torch.Generator().manual_seed(7))[:5].tolist())
    x, y = reading.images_of(evaluated, d, n, torch.device('cpu'))
    assert y.tolist() == list(expected) and x.shape == (len(y), 3, 8, 8)

def test_reports_of_one_method_are_told_apart_by_what_differs():
    def of(seed, **run):
        hparams = dict(beta=6.0, reverse=False)
        return report(1, trained=dict(loss='trades', hparams=hparams, run=dict(run, seed=seed)))
    paths = ['runs/x/best.json', 'runs/y/best.json', 'z.json']
    named = ['trades beta 6; seed 0', 'trades beta 6; seed 1', 'trades beta 2']
    assert reading.labels(paths, [of(0), of(1), report(2)]) == named
    assert reading.labels(paths, [of(0), of(0, awp=0.005), of(0)]) == ['x/best', 'y/best', 'z']
    first, *_ = reading.labels(paths, [dict(of(0), images='all'), of(0), report(2)])
    assert first == 'trades beta 6; images all'
    with pytest.raises(figures.Refused, match='the same report twice'):
        reading.labels(['x.json', './x.json'], [of(0), of(0)])

BAD = [     # report, more arguments, what the one line has to say
    (None, '', 'No such file'),
    ('{"complete": true, "resul', '', 'is not a report of evaluate.py'),
    ([1, 2], '', 'is not a report of evaluate.py'),
    ({'complete': True}, '', 'is not a report of evaluate.py'),
    ({'complete': False}, '', 'is not complete'),
    (report(complete=False), '', 'is not complete'),
    (report(results={}), '', 'is not a report of evaluate.py'),
    (report(results={'clean': {'accuracy': 'high'}}), '', 'is not a report of evaluate.py'),
    (report(model=None), '', 'is not a report of evaluate.py'),
    (report(), '{good}', 'not comparable: dataset is cifar10'),
    (report(), '--checkpoint {tmp}/none.pt', 'No such file'),
    (report(), '--checkpoint {pt} {pt}', '2 checkpoints for 1 reports'),
    (report(dataset='synthetic', model=dict(name='resnet18', num_classes=10, width=4)), '--checkpoint {pt}',
     'is not what was evaluated (fingerprint'),
    (report(), '--n 0', '--n 0'),
    (report(), '{bad}', 'the same report twice'),
    (report(), '--out {tmp}/bad.json', 'cannot write'),
    (report(), '--out /proc/nowhere', 'cannot write /proc/nowhere'),
]

@pytest.mark.parametrize('content, argv, says', BAD, ids=range(len(BAD)))
def test_bad_input_is_one_clear_line(content, argv, says, evaluated, tmp_path, capsys):
    good, pt = evaluated
    if content is not None:
        write(tmp_path / 'bad.json', content)
    argv = argv.format(tmp=tmp_path, good=good, pt=pt, bad=tmp_path / 'bad.json').split()
    with pytest.raises(SystemExit) as e:
        run('tools/figures.py', tmp_path / 'bad.json', *argv)
    out = capsys.readouterr()
    assert e.value.code == 2 and says in out.err and out.err.count('\n') == 1 and len(out.err) < 400, out
    assert not out.out and len(list(tmp_path.iterdir())) <= 1

def test_a_damaged_log_is_one_clear_line(evaluated, tmp_path, capsys):
    path, pt = evaluated
    (tmp_path / 'best.pt').write_bytes(pt.read_bytes())
    write(tmp_path / 'log.jsonl', '{"loss": 1}\n{"epoch": 1, "lo')
    with pytest.raises(SystemExit) as e:
        run('tools/figures.py', path, '--checkpoint', tmp_path / 'best.pt', '--out', tmp_path / 'out')
    err = capsys.readouterr().err
    assert e.value.code == 2 and 'is not the log of a training' in err and err.count('\n') == 1

def test_the_reports_of_this_repository_can_be_drawn(tmp_path):
    paths = sorted((HERE / 'results').glob('*/*.json'))
    paths = [path for path in paths if 'results' in json.loads(path.read_text())]       # not those of speed
    assert len(paths) > 10
    for path in paths:
        reading.load(path)
    for path in {path.parent: path for path in paths}.values():
        figures.draw(path, 'none', tmp_path / path.parent.name)

def test_code_that_a_report_names_runs_only_if_the_user_names_it(tmp_path):
    """The report of a network of one's own, and beside it the checkpoint and the code that it names."""
    code = tmp_path / 'net.py'
    code.write_text(f'open({str(tmp_path / "ran")!r}, "w").close()\n'
                    'import torch\n'
                    'def make():\n'
                    '    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))\n')
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    torch.save(net.state_dict(), tmp_path / 'best.pt')
    named = report(checkpoint='best.pt', model=dict(name=f'{code}:make', num_classes=10))
    path = write(tmp_path / 'r.json', named)
    with pytest.raises(files.Refused, match='only if you name it: --model'):
        figures.draw(path)
    assert not (tmp_path / 'ran').exists()
    with pytest.raises(files.Refused, match='is not what was evaluated'):   # it is run now, and another one
        figures.draw(path, model=f'{code}:make')
    assert (tmp_path / 'ran').exists()

def test_nothing_is_downloaded_into_a_folder_that_only_a_file_names(tmp_path, capsys):
    folder, weights = str(tmp_path / 'home/of/somebody'), tmp_path / 'best.pt'
    net = models.build('resnet18', 10, width=4)
    checkpoint.save_checkpoint(weights, net, dataset='cifar10', run=dict(dataset='cifar10', data_dir=folder))
    made = report(checkpoint='best.pt', fingerprint=checkpoint.fingerprint(net), args=dict(data_dir=folder))
    for script, file in ('evaluate.py', weights), ('tools/figures.py', write(tmp_path / 'a.json', made)):
        with pytest.raises(SystemExit) as e:
            run(script, file, '--n', 4)
        assert e.value.code == 2 and 'name their folder with --data-dir' in capsys.readouterr().err
    assert not (tmp_path / 'home').exists()
