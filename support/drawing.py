"""
The pictures: functions of reports, arrays or logs that return a Figure, as wide as a page, with letters of 8
points and series that differ also in grey. Imports matplotlib.
"""
import math
import re
import textwrap

import numpy as np
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.figure import Figure        # no pyplot: no window, no backend, no global state
from matplotlib.ticker import MaxNLocator

from support.files import atomic

WIDTH = 6.5             # inches, a page's text: 8 points here are 8 points in print
STYLE = {'font.size': 8, 'axes.titlesize': 8, 'figure.titlesize': 8, 'lines.markersize': 4,
         'hatch.linewidth': 0.6, 'legend.frameon': False, 'pdf.fonttype': 42,
         'axes.spines.top': False, 'axes.spines.right': False}

# safe for colour-blind readers: Okabe's and Ito's for up to eight series, Paul Tol's for ten classes
EIGHT = ['#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#AAAAAA', '#F0E442']
TEN = ['#332288', '#88CCEE', '#44AA99', '#117733', '#999933',
       '#DDCC77', '#CC6677', '#882255', '#AA4499', '#777777']
# the same in grey; the ninth series begins again, in a colour of its own
HATCHES = ['', '////', '....', 'xxxx', '\\\\\\\\', '---', 'ooo', '+++']
LINES = ['-', '--', '-.', ':', (0, (7, 1)), (0, (1, 3)), (0, (4, 1, 1, 1)), (0, (3, 4))]
MARKERS = 'os^DvPX*<>'

def colours(n):
    """n colours, no two the same."""
    for palette in (EIGHT, TEN):
        if n <= len(palette):
            return palette[:n]
    return [to_hex(hsv_to_rgb((i / n, 1, (0.6, 0.8, 1)[i % 3]))) for i in range(n)]

def sheet(title, height, rows=1, columns=1, *, width=WIDTH, **options):
    """A figure, and its axes as (rows, columns)."""
    figure = Figure(figsize=(width, height), layout='constrained')
    if title:
        figure.suptitle(wrapped(title, 15 * width))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)

def wrapped(text, letters=60):
    """In lines of at most so many letters: the name of a run may be longer than the page is wide."""
    lines = [textwrap.fill(line, int(letters)) for line in text.split('\n')]
    return '\n'.join(lines)

def with_legend(figure, **options):
    """One for all axes, below them, in as many columns as fit."""
    entries = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            entries[wrapped(label)] = handle
    if not entries:
        return figure
    longest = max(len(line) for label in entries for line in label.split('\n'))
    columns = int(figure.get_figwidth() * 15 / (8 + longest))
    figure.legend(entries.values(), entries, loc='outside lower center', ncols=max(1, columns), **options)
    return figure

def save(figure, path, kinds=('png', 'pdf')):
    """path.png and path.pdf, each whole or absent."""
    for kind in kinds:
        with atomic(f'{path}.{kind}') as tmp:
            figure.savefig(tmp, format=kind, dpi=200)

# -----------------------------------------------------------------------------
# of reports: label -> report

def rows_of(reports, but):
    """Names of the rows of the reports, but for those that match."""
    names = [row for report in reports.values() for row in report['results']]
    return [row for row in dict.fromkeys(names) if not re.search(but, row)]

def stages(reports, title=''):
    """Accuracy with its 95 % interval, clean and after every attack, AutoAttack's four in their order. The
    numbers stand in a column of their own, where no whisker crosses them."""
    rows = rows_of(reports, r'\(|all of| at eps ')         # in brackets: what an other row says, too
    thick = 0.8 / len(reports)
    height = 1 + len(rows) * max(0.3, 0.16 * len(reports))
    figure, [[axes]] = sheet(title, height)
    top = 0

    for i, (label, report) in enumerate(reports.items()):
        results = [report['results'].get(row) for row in rows]
        accuracy = np.array([r['accuracy'] if r else math.nan for r in results])
        interval = np.array([r['interval'] if r else [math.nan] * 2 for r in results])
        at = np.arange(len(rows)) - 0.4 + (i + 0.5) * thick

        axes.barh(at, accuracy, thick, label=label, color=colours(len(reports))[i], hatch=HATCHES[i % 8],
                  edgecolor='black', linewidth=0.6)
        span = np.abs(interval.T - accuracy)
        for colour, width in (('white', 2), ('black', 0.8)):          # black is lost on a dark bar
            axes.errorbar(accuracy, at, xerr=span, fmt='none', ecolor=colour, elinewidth=width, capsize=2,
                          capthick=width)
        for y, value in zip(at, accuracy):
            if math.isfinite(value):
                axes.annotate(f'{value:.1f}', (1, y), (4, 0), xycoords=('axes fraction', 'data'),
                              textcoords='offset points', va='center')
        top = max(top, np.nanmax(interval))

    axes.set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.4, -0.6),
             xlim=(0, min(100, top + 2)), xlabel='accuracy, %')
    axes.tick_params(axis='y', length=0)
    return with_legend(figure) if len(reports) > 1 else figure

def shaded(axes, percent, rows, columns, numbers=True):
    """A table of numbers from 0 to 100 in cells that are the darker the larger they are; NaN: an empty
    one."""
    shades = axes.imshow(percent, cmap='Greys', vmin=0, vmax=130, aspect='auto')     # 100 is not yet black
    axes.set(xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows)
    if max(map(len, columns)) > 3:
        axes.tick_params('x', rotation=45)
        for label in axes.get_xticklabels():
            label.set(ha='right', rotation_mode='anchor')
    axes.tick_params(length=0)
    for (i, j), value in np.ndenumerate(percent):
        if numbers and math.isfinite(value):
            colour = '0.6' if value < 0.5 else 'black' if value < 70 else 'white'
            axes.text(j, i, f'{value:.0f}', ha='center', va='center', color=colour)
    return shades

def by_class(reports, names, title=''):
    """Accuracy of every class in percent, clean and under each attack: a table per report and twenty classes.
    Of more than 100 classes the 20 that are worst in the last row."""
    tables = []
    for label, report in reports.items():
        rows = rows_of({label: report}, r'after| alone|all of| at eps ')
        percent = np.full((len(rows), len(names)), math.nan)
        for i, row in enumerate(rows):
            for c, value in report['results'][row]['per_class'].items():
                percent[i, int(c)] = value
        classes, note = np.arange(len(names)), ''
        if len(names) > 100:
            classes = np.argsort(percent[-1], kind='stable')[:20]           # NaN, no image of it, comes last
            note = f'; the 20 worst of {len(names)} classes under {rows[-1]}'
        for k in range(0, len(classes), 20):
            tables.append(('' if k else label + note, rows, percent, classes[k:k + 20]))

    rows_of_each = [len(rows) for _, rows, _, _ in tables]
    height = 0.8 + 0.45 * len(tables) + 0.19 * sum(rows_of_each)
    figure, grid = sheet(title, height, len(tables), height_ratios=rows_of_each)
    for axes, (label, rows, percent, classes) in zip(grid[:, 0], tables):
        shaded(axes, percent[:, classes], rows, [names[c] for c in classes])
        axes.set_title(wrapped(label, 90))
        if axes is not grid[-1, 0] and len(names) <= 20:        # the same as in the last table
            axes.set_xticklabels([])
    return figure

def confusion(counts, names, title=''):
    """In percent of every true class (row), what it is taken for (column). counts: images, (true,
    predicted)."""
    counts = np.asarray(counts, dtype=float)
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)

    figure, [[axes]] = sheet(title, 0.8 * WIDTH, width=0.85 * WIDTH)
    # there is room for 25 names, and for the numbers of 14 classes
    some = 1 + (len(names) - 1) // 25
    shown = ['' if c % some else name for c, name in enumerate(names)]
    shades = shaded(axes, percent, shown, shown, numbers=len(names) <= 14)
    if len(names) > 14:
        bar = figure.colorbar(shades, shrink=0.8, label='% of the true class')
        bar.ax.set_ylim(0, 100)
    axes.set(xlabel='predicted', ylabel='true')
    return figure

def against_eps(curves, eps, title=''):
    """Accuracy against the radius of the attack, with its 95 % band; dotted: the report's eps. curves: label
    -> its points (radius in pixels, accuracy, low, high), all in percent."""
    figure, [[axes]] = sheet(title, 3.2, width=0.8 * WIDTH)
    for i, (label, points) in enumerate(curves.items()):
        radii, accuracy, low, high = np.transpose(sorted(points))
        colour = colours(len(curves))[i]
        axes.fill_between(radii, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(radii, accuracy, color=colour, marker=MARKERS[i % 8], linestyle=LINES[i % 8], label=label,
                  clip_on=False)
    axes.axvline(eps, color='black', linestyle=':', linewidth=0.8)
    axes.set(xlabel='eps, pixels', ylabel='accuracy, %', ylim=(0, 100), xlim=(0, None))
    axes.margins(x=0)
    return with_legend(figure) if len(curves) > 1 else figure

# -----------------------------------------------------------------------------
# of images and logits

def images(x, x_adv, logits, logits_adv, y, names, title=''):
    """Clean, adversarial, and their difference, magnified until its largest value spans the range; below,
    what the network takes it for and how surely. x, x_adv (B,3,H,W): a column each."""
    delta = x_adv - x
    magnified = 0.5 / max(delta.abs().max().item(), 1e-9)
    figure, grid = sheet(title, 3 * WIDTH / max(len(x), 6) + 0.9, 3, len(x))
    shown = [('clean', x, logits), ('adversarial', x_adv, logits_adv),
             (f'difference\n× {magnified:.3g}', 0.5 + magnified * delta, None)]
    for row, (name, pictures, answers) in zip(grid, shown):
        row[0].set_ylabel(name)
        for b, axes in enumerate(row):
            axes.imshow(pictures[b].clamp(0, 1).permute(1, 2, 0).cpu().numpy())
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if answers is not None:
                p, k = answers[b].softmax(0).max(0)
                mark = '✓' if k == y[b] else '✗'
                axes.set_xlabel(f'{names[k]}\n{mark} {100 * p:.0f} %')
    return figure

def tsne(logits, logits_adv, y, names, title='', seed=0):
    """As figure 1 of Al-Najjar et al., "Adversarial Training without Hard Labels": the logits (B,K) in the
    plane, a symbol and colour per class, of up to twenty its number near the point in its middle. One map for
    both panels: what moved has moved."""
    from sklearn.manifold import TSNE
    z, y = np.concatenate([logits.double().cpu(), logits_adv.double().cpu()]), y.cpu().numpy()
    points = TSNE(perplexity=min(30, (len(z) - 1) / 3), init='pca', random_state=seed).fit_transform(z)
    points = (points - points.min(0)) / np.ptp(points, axis=0)

    few, palette = len(names) <= 20, colours(max(10, len(names)))
    figure, [panels] = sheet(title, 4.1, 1, 2, sharex=True, sharey=True)
    for axes, part, name in zip(panels, np.split(points, 2), ('clean', 'adversarial')):
        # places for the numbers: the nearest one, rather one that hides no point
        places = np.array([(i / 16, j / 14) for i in range(17) for j in range(15)])
        cost = np.array([0.06 * (np.abs(part - place) < (0.03, 0.036)).all(1).any() for place in places])
        for c in np.unique(y):
            own = part[y == c]
            label = f'{c} {names[c]}' if names[c] != str(c) else names[c]
            marker = MARKERS[(c + c // 10) % 10]
            axes.scatter(*own.T, s=7, marker=marker, color=palette[c], linewidths=0, alpha=0.7, label=label)
            if few:
                middle = own[np.linalg.norm(own - np.median(own, axis=0), axis=1).argmin()]
                chosen = (np.linalg.norm(places - middle, axis=1) + cost).argmin()
                axes.text(*places[chosen], c, ha='center', va='center', weight='bold',
                          bbox=dict(boxstyle='round,pad=0.15', facecolor='white', linewidth=0.4, alpha=0.85))
                cost[chosen] = math.inf
        axes.spines[:].set_visible(True)
        axes.set(xticks=[], yticks=[], title=name)
    return with_legend(figure, markerscale=2.2) if few else figure

# -----------------------------------------------------------------------------
# of logs

def training(logs, title=''):
    """Accuracy on the hold-out, and the loss, in the method's own scale. logs: label -> a dict per epoch."""
    figure, [[accuracy, loss]] = sheet(title, 2.9, 1, 2)
    for i, (label, rows) in enumerate(logs.items()):
        look = dict(color=colours(len(logs))[i], marker=MARKERS[i % 8], linewidth=1)
        epochs = [row['epoch'] for row in rows]
        measured = [('val_clean', 'clean', '-', 'full'), ('val_pgd20', 'PGD-20', '--', 'none')]
        for column, name, line, fill in measured:
            if any(column in row for row in rows):
                values = [row.get(column, math.nan) for row in rows]
                name = f'{label}, {name}' if len(logs) > 1 else name
                accuracy.plot(epochs, values, line, fillstyle=fill, label=name, **look)
        loss.plot(epochs, [row['loss'] for row in rows], linestyle=LINES[i % 8], **look)
    accuracy.set(xlabel='epoch', ylabel='accuracy on the hold-out, %', ylim=(0, 100))
    loss.set(xlabel='epoch', ylabel='training loss')
    for axes in (accuracy, loss):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis='y', color='0.9', linewidth=0.6)
    return with_legend(figure)
