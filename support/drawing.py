"""
How every picture looks: as wide as a page, letters of 8 points, series that differ also in grey. Imports matplotlib.
"""
import math
import textwrap

from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.figure import Figure        # no pyplot: no window, no backend, no global state
from matplotlib.ticker import MaxNLocator

from support.files import atomic

WIDTH = 6.5             # inches, a page's text: 8 points here are 8 points in print
STYLE = {'font.size': 8, 'axes.titlesize': 8, 'figure.titlesize': 8, 'lines.markersize': 4, 'hatch.linewidth': 0.6,
         'legend.frameon': False, 'pdf.fonttype': 42, 'axes.spines.top': False, 'axes.spines.right': False}

# no eye confuses them: of eight series Okabe's and Ito's, of ten classes Paul Tol's
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

def training(logs, title=''):
    """Accuracy on the hold-out, and the loss, in the method's own scale. logs: label -> a dict per epoch."""
    figure, [[accuracy, loss]] = sheet(title, 2.9, 1, 2)
    for i, (label, rows) in enumerate(logs.items()):
        look = dict(color=colours(len(logs))[i], marker=MARKERS[i % 8], linewidth=1)
        epochs = [row['epoch'] for row in rows]
        for column, name, line, fill in (('val_clean', 'clean', '-', 'full'), ('val_pgd20', 'PGD-20', '--', 'none')):
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

def save(figure, path, kinds=('png', 'pdf')):
    """path.png and path.pdf, each whole or absent."""
    for kind in kinds:
        with atomic(f'{path}.{kind}') as tmp:
            figure.savefig(tmp, format=kind, dpi=200)
