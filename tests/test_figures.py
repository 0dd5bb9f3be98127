"""The pictures show the numbers that they were given, also in grey, and nothing is cut off."""
import itertools
import json
import pathlib

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from support import describe, drawing
from tools import figures

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
                            per_class={str(c): float(g.integers(101)) for c in range(K) if c != 3},
                            confusion=g.integers(10, size=(K, K)).tolist() if K <= 100 else None)
    return dict(dict(checkpoint='runs/nowhere/best.pt', fingerprint='0' * 16, dataset='cifar10', norm='Linf',
                     eps_pixels=8.0, images='first 200 of 10000 test images', args=dict(data_dir='data'),
                     model=dict(name='resnet18', num_classes=K), results=results, complete=True,
                     trained=dict(loss='trades', hparams=dict(beta=seed))), **changes)

def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)

def widths(axes):
    """label -> lengths of its bars."""
    return {c.get_label(): c.datavalues for c in axes.containers if hasattr(c, 'datavalues')}

# -----------------------------------------------------------------------------
# what they show

def test_bars_are_the_accuracies_of_the_reports():
    reports = {'a': report(0), 'b': report(1)}
    del reports['b']['results']['fgsm']
    axes, = drawing.stages(reports).axes
    drawn = widths(axes)
    assert list(drawn) == ['a', 'b']
    for label, values in drawn.items():
        rows = [reports[label]['results'].get(row, {}) for row in STAGES[:7]]
        expected = [row.get('accuracy', np.nan) for row in rows]
        assert np.array_equal(values, expected, equal_nan=True)
    whiskers = next(c for c in axes.containers if not hasattr(c, 'datavalues')).lines[2][0].get_segments()
    assert np.allclose(whiskers[2][:, 0], reports['a']['results']['pgd-20']['interval'])
    written = [t.get_text() for t in axes.texts]
    assert written == [f'{v:.1f}' for values in drawn.values() for v in values if v == v]

def test_the_table_of_classes():
    reports = {'a': report(0), 'b': report(1)}
    figure = drawing.by_class(reports, CIFAR)
    assert [axes.get_title() for axes in figure.axes] == ['a', 'b']
    assert [t.get_text() for t in figure.axes[1].get_xticklabels()] == CIFAR
    for axes, r in zip(figure.axes, reports.values()):
        rows = [t.get_text() for t in axes.get_yticklabels()]
        assert rows == ['clean', 'fgsm', 'pgd-20', 'autoattack (worst case)']
        for row, values in zip(rows, axes.images[0].get_array().filled(np.nan)):
            assert np.isnan(values[3]) and values[9] == r['results'][row]['per_class']['9']
        first, second = axes.images[0].get_array()[0][:2]
        assert [t.get_text() for t in axes.texts[:2]] == [f'{first:.0f}', f'{second:.0f}']

def test_of_a_thousand_classes_the_worst_twenty():
    r = report(K=1000)
    axes, = drawing.by_class({'a': r}, [str(c) for c in range(1000)]).axes
    per_class = r['results']['autoattack (worst case)']['per_class']
    shown = [t.get_text() for t in axes.get_xticklabels()]
    assert len(shown) == 20 and '20 worst' in axes.get_title()
    assert max(per_class[c] for c in shown) <= min(v for c, v in per_class.items() if c not in shown)

def test_confusion_counts_rows_in_percent():
    axes = drawing.confusion([[3, 0, 1], [0, 1, 0], [0, 1, 0]], ['a', 'b', 'c']).axes[0]
    assert np.array_equal(axes.images[0].get_array(), [[75, 0, 25], [0, 100, 0], [0, 100, 0]])
    assert [t.get_text() for t in axes.texts][:3] == ['75', '0', '25']

def test_images_show_the_difference_magnified():
    x = torch.rand(3, 3, 8, 8) * 0.5 + 0.25
    x_adv = x + 0.1 * torch.tensor([1, -1, 0.5])[:, None, None, None]
    logits, logits_adv = 5 * torch.eye(3), 5 * torch.eye(3)[[1, 1, 2]]
    figure = drawing.images(x, x_adv, logits, logits_adv, torch.arange(3), ['a', 'b', 'c'])
    shown = np.array([axes.images[0].get_array() for axes in figure.axes]).reshape(3, 3, 8, 8, 3)
    assert np.allclose(shown[1, 2].transpose(2, 0, 1), x_adv[2]) and '× 5' in figure.axes[6].get_ylabel()
    assert np.allclose(shown[2, 0], 1, atol=1e-4) and np.allclose(shown[2, 1], 0, atol=1e-4)
    assert np.allclose(shown[2, 2], 0.75, atol=1e-4)
    below = [axes.get_xlabel() for axes in figure.axes]
    right = ['a\n✓ ', 'b\n✓ ', 'c\n✓ ', 'b\n✗ ', 'b\n✓ ', 'c\n✓ ', '', '', '']
    assert [text[:4] for text in below] == right

def test_tsne_puts_like_to_like():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    logits = 20 * torch.eye(3)[y] + torch.randn(60, 3, generator=g)
    logits_adv = 20 * torch.eye(3)[(y + 1) % 3] + torch.randn(60, 3, generator=g)  # each class like the next
    clean, adversarial = drawing.tsne(logits, logits_adv, y, ['a', 'b', 'c']).axes
    middle = lambda axes: np.array([c.get_offsets().mean(0) for c in axes.collections])
    assert [len(c.get_offsets()) for c in clean.collections + adversarial.collections] == [20] * 6
    assert clean.get_xlim() == adversarial.get_xlim()
    distance = np.linalg.norm(middle(adversarial)[:, None] - middle(clean)[None], axis=2)
    assert distance.argmin(1).tolist() == [1, 2, 0]

def test_training_shows_the_log():
    rows = [dict(epoch=e, loss=3.0 / e, val_clean=10.0 * e, val_pgd20=5.0 * e) for e in (1, 2, 3)]
    left, right = drawing.training({'a': rows, 'teacher': [dict(epoch=1, loss=1.0, val_clean=9.0)]}).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    assert lines == {'a, clean': [10, 20, 30], 'a, PGD-20': [5, 10, 15], 'teacher, clean': [9]}
    assert list(right.lines[0].get_ydata()) == [3, 1.5, 1]

def test_eps_curve(monkeypatch):
    """A linear network, of which everything is known: image i falls exactly where eps passes its margin."""
    net = lambda x: torch.stack([x.mean((1, 2, 3)), torch.full((len(x),), 0.5)], 1)
    x = torch.stack([torch.full((3, 4, 4), 0.5 + m / 255) for m in (-1, 1, 3, 5, 7)])
    y = torch.zeros(5, dtype=torch.int64)
    points = figures.eps_curve(net, x, y, [0, 2, 4, 6, 8, 10])
    assert [point[:2] for point in points] == [(0, 80), (2, 60), (4, 40), (6, 20), (8, 0), (10, 0)]
    assert np.allclose(points[2][2:], [11.76, 76.93], atol=0.01)
    x_adv, logits = figures.under_pgd(net, x, y, 4)
    assert (x_adv - x).abs().max() <= 4.001 / 255 and torch.equal(logits, net(x_adv))
    axes, = drawing.against_eps({'a': points}, 8).axes
    assert np.allclose(axes.lines[0].get_ydata(), [80, 60, 40, 20, 0, 0])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(band, points[2][2]).any() and np.isclose(band, points[2][3]).any()
    assert band.min() >= -1e-9

def test_a_sweep_of_ones_own_is_what_is_drawn(tmp_path, monkeypatch):
    """With its own radii and number of images, and nothing is measured for it; of the attack's other rows,
    none."""
    monkeypatch.setattr(drawing, 'save', lambda figure, path: None)
    r = report()
    for eps in (12, 4, 3.5):
        result = dict(r['results']['fgsm'], accuracy=50.0 - eps, interval=[10.0, 60.0])
        r['results'][f'pgd-20 at eps {eps:g}'] = result
    drawn = figures.draw(write(tmp_path / 'a.json', r), 'none', tmp_path / 'out')
    results, axes = r['results'], drawn['eps'].axes[0]
    assert axes.lines[0].get_xdata().tolist() == [0, 3.5, 4, 8, 12]
    assert axes.lines[0].get_ydata().tolist() == [results['clean']['accuracy'], 46.5, 46,
                                                  results['pgd-20']['accuracy'], 38]
    assert 'first 200 of 10000' in drawn['eps'].get_suptitle()
    assert [t.get_text() for t in drawn['stages'].axes[0].get_yticklabels()] == STAGES[:7]

def test_training_png_is_one_picture(tmp_path, monkeypatch):
    """What a run leaves in its folder is what the figures show."""
    shown = []
    monkeypatch.setattr(drawing, 'training', lambda logs, title='': shown.append(logs) or Figure())
    describe.draw_curves([dict(epoch=1, loss=1.0)], str(tmp_path / 'training.png'))
    assert [p.name for p in tmp_path.iterdir()] == ['training.png'] and len(shown) == 1

# -----------------------------------------------------------------------------
# in print

def every_figure(K, names):
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randn(max(K, 40), K, generator=g), torch.arange(max(K, 40)) % K
    x = torch.rand(8, 3, 8, 8, generator=g)
    reports = {f'logit_mse beta 0.2, number {i}': report(i, K) for i in range(2)}
    log = [dict(epoch=e, loss=1.0, val_clean=5.0, val_pgd20=1.0) for e in (1, 2)]
    title = 'logit_mse beta 0.2; cifar10, Linf 8/255\n3000 images: 43.5 % right, 20.5 % under PGD-20'
    points = [(0, 90, 80, 95), (8, 50, 40, 60), (16, 0, 0, 20)]
    yield drawing.stages(reports, title)
    yield drawing.by_class(reports, names, title)
    yield drawing.against_eps({label: points for label in reports}, 8, title)
    yield drawing.images(x, x, logits[:8], logits[:8], y[:8], names, title)
    yield drawing.tsne(logits, logits, y, names, title)
    yield drawing.confusion(report(0, K)['results']['clean']['confusion'], names, title)
    yield drawing.training({label: log for label in reports})

def boxes(figure):
    """Of every text that is to be seen: itself, its angle, its box on the page and the one in its own
    direction."""
    figure.draw_without_rendering()
    for text in figure.findobj(Text):
        angle, page = text.get_rotation(), text.get_window_extent()
        if not (text.get_visible() and text.get_text().strip() and page.width and page.height):
            continue
        anchor = np.array(text.get_transform().transform(text.get_position()))
        text.set_rotation(0)
        flat = text.get_window_extent()
        text.set_rotation(angle)
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        turned = np.array([[c, s], [-s, c]]) @ anchor
        yield text.get_text(), angle, page.padded(-1), flat.translated(*(turned - anchor)).padded(-1)

def overlapping(figure):
    """Pairs of its texts of which one lies on the other, by the renderer's word. Side by side, turned texts
    overlap on the page as boxes, but not in their own direction."""
    pairs = []
    for (a, angle, *a_boxes), (b, other, *b_boxes) in itertools.combinations(boxes(figure), 2):
        own = angle == other
        if a_boxes[own].overlaps(b_boxes[own]):
            pairs.append((a, b))
    return pairs

def in_style(function, *args):
    with matplotlib.rc_context(drawing.STYLE):
        return function(*args)

@pytest.mark.parametrize('K, names', [(10, CIFAR), (100, [str(c) for c in range(100)])])
def test_every_letter_is_large_enough_on_the_page_and_on_no_other(K, names):
    with matplotlib.rc_context(drawing.STYLE):
        for figure in every_figure(K, names):
            assert not overlapping(figure)
            drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
            assert drawn.x0 > -0.01 and drawn.x1 < width + 0.01, figure.axes[0].get_ylabel()
            assert drawn.y0 > -0.01 and drawn.y1 < height + 0.01, figure.axes[0].get_ylabel()
            assert width <= 7 and all(text.get_size() >= 8 for text in figure.findobj(Text))

def many_rows(seed=0):
    rows = [*STAGES, 'apgd-ce alone', 'apgd-t alone', 'fab-t alone', 'square alone', 'transfer',
            'transfer-cw', 'pgd-10', 'pgd-50', 'pgd-100', 'cw-20', 'pgd-trades', 'weak', 'strong',
            'aa-fast (two of the four attacks)']
    r = report(seed)
    for row in rows:
        r['results'].setdefault(row, r['results']['fgsm'])
    return r

@pytest.mark.parametrize('n', [1, 3, 9])
def test_labels_of_many_rows_and_reports_never_overlap(n):
    name = 'logit_mse beta 0.2, teacher runs/some-long/folder/best.pt, seed'
    reports = {f'{name} {i}': many_rows(i) for i in range(n)}
    stages = in_style(drawing.stages, reports, 'title')
    for figure in (stages, in_style(drawing.by_class, reports, CIFAR, 'title')):
        assert not overlapping(figure)
        drawn, width = figure.get_tightbbox(), figure.get_figwidth()
        assert drawn.x0 > -0.01 and drawn.x1 < width + 0.01 and width <= 7

@pytest.mark.parametrize('angle', [0, 45])
def test_overlapping_labels_are_found(angle):
    for distance, expected in ((0.001, [('aaaaaaaa', 'bbbbbbbb')]), (0.5, [])):
        axes = Figure().subplots()
        axes.set(xticks=[0, distance], xticklabels=['aaaaaaaa', 'bbbbbbbb'], xlim=(0, 1))
        for label in axes.get_xticklabels():
            label.set(rotation=angle, ha='right', rotation_mode='anchor')
        assert overlapping(axes.figure) == expected

def test_numbers_of_classes_in_one_place_do_not_overlap():
    logits = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))
    figure = in_style(drawing.tsne, logits, logits, torch.arange(60) % 20, [str(c) for c in range(20)])
    assert not overlapping(figure)

@pytest.mark.parametrize('n', [1, 8, 10, 11, 100, 1000])
def test_no_two_colours_are_the_same(n):
    assert len(set(drawing.colours(n))) == n

@pytest.mark.parametrize('n', [3, 12])
def test_colours_never_repeat_within_a_picture(n):
    labels = [str(i) for i in range(n)]
    bars = drawing.stages({label: report(i) for i, label in enumerate(labels)}).axes[0]
    shown = [to_hex(c[0].get_facecolor()) for c in bars.containers if hasattr(c, 'datavalues')]
    assert len(set(shown)) == n
    points = [(0, 9, 8, 10), (8, 5, 4, 6)]
    lines = drawing.against_eps({label: points for label in labels}, 8).axes[0].lines[:n]
    assert len({to_hex(line.get_color()) for line in lines}) == n
    log = [dict(epoch=1, loss=1.0, val_clean=5.0)]
    lines = drawing.training({label: log for label in labels}).axes[1].lines
    assert len({to_hex(line.get_color()) for line in lines}) == n
    y = torch.arange(10 * n)
    logits = torch.randn(10 * n, 10 * n, generator=torch.Generator().manual_seed(0))
    points = drawing.tsne(logits, logits, y, [str(c) for c in range(10 * n)]).axes[0].collections
    assert len({to_hex(c.get_facecolor()[0], keep_alpha=False) for c in points}) == 10 * n

def test_series_differ_without_colour():
    for marks in (drawing.HATCHES, drawing.LINES, drawing.MARKERS[:8]):
        assert len(set(marks)) == 8 == len(drawing.EIGHT)
    reports = {str(i): report(i) for i in range(8)}
    bars = drawing.stages(reports).axes[0]
    lines = drawing.against_eps({k: [(0, 9, 8, 10), (8, 5, 4, 6)] for k in reports}, 8)
    assert len({c[0].get_hatch() for c in bars.containers if hasattr(c, 'datavalues')}) == 8
    assert len({(line.get_marker(), str(line._dash_pattern)) for line in lines.axes[0].lines[:8]}) == 8
    logits = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    points = drawing.tsne(logits, logits, torch.arange(20) % 10, CIFAR).axes[0]
    assert len({c.get_paths()[0].vertices.tobytes() for c in points.collections}) == 10

def test_a_picture_is_whole_or_absent(tmp_path, monkeypatch):
    drawing.save(Figure(), tmp_path / 'a')
    before = (tmp_path / 'a.png').read_bytes()
    def half(self, path, **options):
        pathlib.Path(path).write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Figure, 'savefig', half)
    with pytest.raises(OSError):
        drawing.save(Figure(), tmp_path / 'a')
    assert (tmp_path / 'a.png').read_bytes() == before and len(list(tmp_path.iterdir())) == 2
