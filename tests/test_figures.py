"""The pictures show the numbers that they were given, also in grey, and nothing is cut off."""
import json, pathlib

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from tools import figures
from test_smoke import HERE, run

STAGES = ['clean', 'fgsm', 'pgd-20', 'autoattack, after apgd-ce', 'autoattack, after apgd-t',
          'autoattack, after fab-t', 'autoattack, after square', 'autoattack (worst case)',
          'all of the above']
CIFAR = figures.NAMES['cifar10']

def report(seed=0, K=10, **changes):
    """A report as evaluate.py writes it: accuracies that fall from row to row, class 3 without an image."""
    g, results = np.random.default_rng(seed), {}
    for i, row in enumerate(STAGES):
        accuracy = 95.5 - 10 * i - g.integers(5)
        results[row] = dict(accuracy=accuracy, interval=[accuracy - 4.0, accuracy + 3.0], n=200,
                            per_class={str(c): float(g.integers(101)) for c in range(K) if c != 3})
    return dict(dict(checkpoint='runs/nowhere/best.pt', fingerprint='0' * 16, dataset='cifar10', norm='Linf',
                     eps_pixels=8.0, images='first 200 of 10000 test images', args=dict(data_dir='data'),
                     model=dict(name='resnet18', num_classes=K), results=results, complete=True,
                     trained=dict(loss='trades', hparams=dict(beta=seed))), **changes)

def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)

def heights(axes):
    """label -> heights of its bars."""
    return {c.get_label(): c.datavalues for c in axes.containers if hasattr(c, 'datavalues')}

# -----------------------------------------------------------------------------
# what they show

def test_bars_are_the_accuracies_of_the_reports():
    reports = {'a': report(0), 'b': report(1)}
    del reports['b']['results']['fgsm']
    axes, = figures.stages(reports).axes
    drawn = heights(axes)
    assert list(drawn) == ['a', 'b']
    for label, values in drawn.items():
        rows = [reports[label]['results'].get(row, {}) for row in STAGES[:7]]
        expected = [row.get('accuracy', np.nan) for row in rows]
        assert np.array_equal(values, expected, equal_nan=True)
    whiskers = next(c for c in axes.containers if not hasattr(c, 'datavalues')).lines[2][0].get_segments()
    assert np.allclose(whiskers[2][:, 1], reports['a']['results']['pgd-20']['interval'])
    written = {t.get_text() for t in axes.texts}
    assert {f'{v:.1f}' for values in drawn.values() for v in values if v == v} == written

def test_bars_per_class():
    reports = {'a': report(0), 'b': report(1)}
    figure = figures.by_class(reports, CIFAR)
    assert [axes.get_title() for axes in figure.axes] == ['a', 'b']
    for axes, r in zip(figure.axes, reports.values()):
        assert [t.get_text() for t in axes.get_xticklabels()] == CIFAR
        assert list(heights(axes)) == ['clean', 'fgsm', 'pgd-20', 'autoattack (worst case)']
        for row, values in heights(axes).items():
            assert np.isnan(values[3]) and values[9] == r['results'][row]['per_class']['9']

def test_confusion_counts_rows_in_percent():
    axes = figures.confusion([0, 0, 0, 0, 1, 2], [0, 0, 0, 2, 1, 1], ['a', 'b', 'c']).axes[0]
    assert np.array_equal(axes.images[0].get_array(), [[75, 0, 25], [0, 100, 0], [0, 100, 0]])
    assert [t.get_text() for t in axes.texts][:3] == ['75', '0', '25']

def test_images_show_the_difference_magnified():
    x = torch.rand(3, 3, 8, 8) * 0.5 + 0.25
    x_adv = x + 0.1 * torch.tensor([1, -1, 0.5])[:, None, None, None]
    logits, logits_adv = 5 * torch.eye(3), 5 * torch.eye(3)[[1, 1, 2]]
    figure = figures.images(x, x_adv, logits, logits_adv, torch.arange(3), ['a', 'b', 'c'])
    shown = np.array([axes.images[0].get_array() for axes in figure.axes]).reshape(3, 3, 8, 8, 3)
    assert np.allclose(shown[1, 2].transpose(2, 0, 1), x_adv[2]) and '× 5' in figure.axes[6].get_ylabel()
    assert np.allclose(shown[2, 0], 1, atol=1e-4) and np.allclose(shown[2, 1], 0, atol=1e-4)
    assert np.allclose(shown[2, 2], 0.75, atol=1e-4)
    below = [axes.get_xlabel() for axes in figure.axes]
    assert [text[:4] for text in below] == ['a\n✓ ', 'b\n✓ ', 'c\n✓ ', 'b\n✗ ', 'b\n✓ ', 'c\n✓ ', '', '', '']

def test_tsne_puts_like_to_like():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    logits = 20 * torch.eye(3)[y] + torch.randn(60, 3, generator=g)
    logits_adv = 20 * torch.eye(3)[(y + 1) % 3] + torch.randn(60, 3, generator=g)  # each class like the next
    clean, adversarial = figures.tsne(logits, logits_adv, y, ['a', 'b', 'c']).axes
    middle = lambda axes: np.array([c.get_offsets().mean(0) for c in axes.collections])
    assert [len(c.get_offsets()) for c in clean.collections + adversarial.collections] == [20] * 6
    assert clean.get_xlim() == adversarial.get_xlim()
    distance = np.linalg.norm(middle(adversarial)[:, None] - middle(clean)[None], axis=2)
    assert distance.argmin(1).tolist() == [1, 2, 0]

def test_training_shows_the_log():
    rows = [dict(epoch=e, loss=3.0 / e, val_clean=10.0 * e, val_pgd20=5.0 * e) for e in (1, 2, 3)]
    left, right = figures.training({'a': rows, 'teacher': [dict(epoch=1, loss=1.0, val_clean=9.0)]}).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    assert lines == {'a, clean': [10, 20, 30], 'a, PGD-20': [5, 10, 15], 'teacher, clean': [9]}
    assert list(right.lines[0].get_ydata()) == [3, 1.5, 1]

def test_eps_curve(monkeypatch):
    """A linear network, of which everything is known: image i falls exactly where eps passes its margin."""
    net = lambda x: torch.stack([x.mean((1, 2, 3)), torch.full((len(x),), 0.5)], 1)
    x = torch.stack([torch.full((3, 4, 4), 0.5 + m / 255) for m in (-1, 1, 3, 5, 7)])
    y = torch.zeros(5, dtype=torch.int64)
    assert figures.eps_curve(net, x, y, [0, 2, 4, 6, 8, 10]) == [4, 3, 2, 1, 0, 0]
    x_adv, logits = figures.under_pgd(net, x, y, 4)
    assert (x_adv - x).abs().max() <= 4.001 / 255 and torch.equal(logits, net(x_adv))
    axes, = figures.against_eps({'a': [4, 2, 0]}, 5, [0, 8, 16], 8).axes
    assert np.allclose(axes.lines[0].get_ydata(), [80, 40, 0])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert np.allclose(figures.wilson(2, 5), [11.76, 76.93], atol=0.01) and band.min() >= -1e-9
    assert np.isclose(band, figures.wilson(2, 5)[1]).any() and np.isclose(band, figures.wilson(2, 5)[0]).any()

# -----------------------------------------------------------------------------
# in print

def every_figure(K, names):
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randn(max(K, 40), K, generator=g), torch.arange(max(K, 40)) % K
    x = torch.rand(8, 3, 8, 8, generator=g)
    reports = {f'logit_mse beta 0.2, number {i}': report(i, K) for i in range(2)}
    log = [dict(epoch=e, loss=1.0, val_clean=5.0, val_pgd20=1.0) for e in (1, 2)]
    title = 'logit_mse beta 0.2; cifar10, Linf 8/255\n3000 images: 43.5 % right, 20.5 % under PGD-20'
    yield figures.stages(reports, title)
    yield figures.by_class(reports, names, title)
    yield figures.against_eps({label: [9, 5, 0] for label in reports}, 10, [0, 8, 16], 8, title)
    yield figures.images(x, x, logits[:8], logits[:8], y[:8], names, title)
    yield figures.tsne(logits, logits, y, names, title)
    yield figures.confusion(y, y, names, title)
    yield figures.training({label: log for label in reports})

@pytest.mark.parametrize('K, names', [(10, CIFAR), (100, [str(c) for c in range(100)])])
def test_every_letter_is_large_enough_and_within_the_page(K, names):
    with matplotlib.rc_context(figures.STYLE):
        for figure in every_figure(K, names):
            figure.draw_without_rendering()
            drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
            assert drawn.x0 > -0.01 and drawn.x1 < width + 0.01, figure.axes[0].get_ylabel()
            assert drawn.y0 > -0.01 and drawn.y1 < height + 0.01, figure.axes[0].get_ylabel()
            assert width <= 7 and all(text.get_size() >= 8 for text in figure.findobj(Text))

def test_series_differ_without_colour():
    for marks in (figures.HATCHES, figures.LINES, figures.MARKERS[:8]):
        assert len(set(marks)) == 8 == len(figures.COLOURS)
    reports = {str(i): report(i) for i in range(8)}
    bars = figures.stages(reports).axes[0]
    lines = figures.against_eps({k: [1, 0] for k in reports}, 2, [0, 8], 8)
    assert len({c[0].get_hatch() for c in bars.containers if hasattr(c, 'datavalues')}) == 8
    assert len({(line.get_marker(), str(line._dash_pattern)) for line in lines.axes[0].lines[:8]}) == 8
    logits = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    points = figures.tsne(logits, logits, torch.arange(20) % 10, CIFAR).axes[0]
    assert len({c.get_paths()[0].vertices.tobytes() for c in points.collections}) == 10

def test_a_picture_is_whole_or_absent(tmp_path, monkeypatch):
    figures.save(Figure(), tmp_path / 'a')
    before = (tmp_path / 'a.png').read_bytes()
    def half(self, path, **options):
        pathlib.Path(path).write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Figure, 'savefig', half)
    with pytest.raises(OSError):
        figures.save(Figure(), tmp_path / 'a')
    assert (tmp_path / 'a.png').read_bytes() == before and len(list(tmp_path.iterdir())) == 2

# -----------------------------------------------------------------------------
# the script

@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
    """The report of a network on synthetic data, and its checkpoint, whose log lies beside it."""
    out = tmp_path_factory.mktemp('evaluated')
    run('train_teacher.py', '--dataset', 'synthetic', '--width', 4, '--epochs', 2, '--out', out)
    run('evaluate.py', out / 'best.pt', '--n', 20, '--attacks', 'pgd', '--out', out / 'a.json')
    return out / 'a.json', out / 'best.pt'

def test_the_script_draws_everything(evaluated, tmp_path, capsys):
    path, _ = evaluated
    drawn = run('tools/figures.py', path, '--n', 20, '--per-class', 2, '--out', tmp_path)['drawn']
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
    assert heights(drawn['stages'].axes[0])['standard'].tolist() == [r['accuracy'] for r in results.values()]
    assert sum(len(c.get_offsets()) for c in drawn['tsne'].axes[0].collections) == 20

def test_two_reports_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, 'save', lambda figure, path: None)
    a, b = (write(tmp_path / f'{k}.json', report(k)) for k in (1, 2))
    drawn = figures.draw([a, b], 'none', tmp_path)
    assert list(drawn) == ['stages', 'per_class']
    assert list(heights(drawn['stages'].axes[0])) == ['trades beta 1', 'trades beta 2']
    again = [report(1), report(2), report(1)]
    assert figures.labels_of(['x', 'y', 'z'], again) == ['x', 'y', 'z']
    again[2]['images'] = 'all'
    assert figures.labels_of(['x', 'y', 'z'], again)[2] == 'trades beta 1, all'

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
    (report(), '--out {tmp}/bad.json', 'cannot write'),
    (report(), '--out /proc/nowhere', 'cannot write /proc/nowhere'),
]

@pytest.mark.parametrize('content, argv, says', BAD, ids=range(len(BAD)))
def test_bad_input_is_one_clear_line(content, argv, says, evaluated, tmp_path, capsys):
    good, pt = evaluated
    if content is not None:
        write(tmp_path / 'bad.json', content)
    argv = argv.format(tmp=tmp_path, good=good, pt=pt).split()
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

def test_the_reports_of_this_repository_can_be_drawn():
    paths = sorted((HERE / 'results').glob('*/*.json'))
    paths = [path for path in paths if 'results' in json.loads(path.read_text())]       # not those of speed
    assert len(paths) > 10
    for path in paths:
        figures.load_report(path)
