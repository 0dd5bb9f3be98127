"""
Pictures of what evaluate.py measured, as PNG and PDF, readable in grey and in print.

$ python -m tools.figures runs/x/best.eval-Linf-8-n10000.json       # into a folder beside the report
$ python -m tools.figures a.json b.json --out pictures              # side by side
$ python -m tools.figures a.json --checkpoint none                  # of the report alone: seconds

Of the report: accuracy after every stage and per class, confusion under attack, and against eps if it was evaluated
with --sweep-eps. Of the checkpoint it names, on the images of the report: accuracy against eps, images with their
perturbation, t-SNE of the logits; minutes on a CPU. Of a log.jsonl beside the checkpoint: the training. Each is a
function of arrays or dicts that returns a Figure; draw() makes them all.
"""
import argparse
import math
import os
import re
import sys

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import models
from attacks import attack_mode, pgd
from support import refusals
from support.drawing import HATCHES, LINES, MARKERS, STYLE, WIDTH
from support.drawing import colours, save, sheet, training, with_legend, wrapped
from support.files import Refused, plain_output, say
from support.evaluation import wilson
from tools import reading

# of other datasets: numbers
NAMES = {'cifar10': 'airplane automobile bird cat deer dog frog horse ship truck'.split()}

# -----------------------------------------------------------------------------
# of reports: label -> report

def stages(reports, title=''):
    """Accuracy with its 95 % interval, clean and after every attack, AutoAttack's four in their order. The numbers
    stand in a column of their own, where no whisker crosses them."""
    rows = reading.rows_of(reports, r'\(|all of| at eps ')         # in brackets: what an other row says, too
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
    """A table of numbers from 0 to 100 in cells that are the darker the larger they are; NaN: an empty one."""
    shades = axes.imshow(percent, cmap='Greys', vmin=0, vmax=130, aspect='auto')         # 100 is not black, yet
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
    """Accuracy of every class in percent, clean and under each attack: a table per report and twenty classes. Of more
    than 100 classes the 20 that are worst in the last row."""
    tables = []
    for label, report in reports.items():
        rows = reading.rows_of({label: report}, r'after| alone|all of| at eps ')
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

    heights = [len(rows) for _, rows, _, _ in tables]
    figure, grid = sheet(title, 0.8 + 0.45 * len(tables) + 0.19 * sum(heights), len(tables), height_ratios=heights)
    for axes, (label, rows, percent, classes) in zip(grid[:, 0], tables):
        shaded(axes, percent[:, classes], rows, [names[c] for c in classes])
        axes.set_title(wrapped(label, 90))
        if axes is not grid[-1, 0] and len(names) <= 20:        # the same as in the last table
            axes.set_xticklabels([])
    return figure

def confusion(counts, names, title=''):
    """In percent of every true class (row), what it is taken for (column). counts: images, (true, predicted)."""
    counts = np.asarray(counts, dtype=float)
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, [[axes]] = sheet(title, 0.8 * WIDTH, width=0.85 * WIDTH)
    some = 1 + (len(names) - 1) // 25                   # room for as many names, and for the numbers of 14 classes
    shown = ['' if c % some else name for c, name in enumerate(names)]
    shades = shaded(axes, percent, shown, shown, numbers=len(names) <= 14)
    if len(names) > 14:
        bar = figure.colorbar(shades, shrink=0.8, label='% of the true class')
        bar.ax.set_ylim(0, 100)
    axes.set(xlabel='predicted', ylabel='true')
    return figure

def against_eps(curves, eps, title=''):
    """Accuracy against the radius of the attack, with its 95 % band; dotted: the report's eps. curves: label -> its
    points (radius in pixels, accuracy, low, high), all in percent."""
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
    """Clean, adversarial, and their difference, magnified until its largest value spans the range; below, what the
    network takes it for and how surely. x, x_adv (B,3,H,W): a column each."""
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
    """As figure 1 of Al-Najjar et al., "Adversarial Training without Hard Labels": the logits (B,K) in the plane, a
    symbol and colour per class, of up to twenty its number near its median. One map for both panels: what moved has
    moved."""
    from sklearn.manifold import TSNE
    z, y = torch.cat([logits, logits_adv]).double().cpu().numpy(), y.cpu().numpy()
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
            axes.scatter(*own.T, s=7, marker=MARKERS[(c + c // 10) % 10], color=palette[c], linewidths=0, alpha=0.7,
                         label=label)
            if few:
                chosen = (np.linalg.norm(places - np.median(own, axis=0), axis=1) + cost).argmin()
                axes.text(*places[chosen], c, ha='center', va='center', weight='bold',
                          bbox=dict(boxstyle='round,pad=0.15', facecolor='white', linewidth=0.4, alpha=0.85))
                cost[chosen] = math.inf
        axes.spines[:].set_visible(True)
        axes.set(xticks=[], yticks=[], title=name)
    return with_legend(figure, markerscale=2.2) if few else figure

# -----------------------------------------------------------------------------
# what they are drawn from

def under_pgd(net, x, y, eps, norm='Linf'):
    """x_adv of PGD-20, also of images misclassified as they are, and its logits. eps in pixels; 0: x."""
    x_adv, logits = x.clone(), []
    size = 250 if x.is_cuda else 50
    for i in tqdm(range(0, len(x), size), desc=f'PGD-20, eps {eps:g}', leave=False, disable=None):
        part = slice(i, i + size)
        objective = lambda x: F.cross_entropy(net(x), y[part], reduction='none')
        if eps:
            x_adv[part] = pgd(objective, x[part], eps=eps / 255, step_size=eps / 4 / 255, steps=20, norm=norm)
        with torch.no_grad():
            logits.append(net(x_adv[part]))
    return x_adv, torch.cat(logits)

def eps_curve(net, x, y, radii, norm='Linf'):
    """The points of against_eps at the radii, in pixels, ascending. An image that fell is not attacked again: what made
    it fall lies in the larger balls, too."""
    n, points = len(y), []
    for eps in radii:
        if len(y):
            right = under_pgd(net, x, y, eps, norm)[1].argmax(1) == y
            x, y = x[right], y[right]
        points.append((eps, 100 * len(y) / n, *wilson(len(y), n)))
    return points

def of_network(net, report, x, y, names, per_class, label):
    """name -> Figure of what a network does to the images x (B,3,H,W) and y, at most per_class of each class."""
    norm, eps = report['norm'], report['eps_pixels']
    by_classes = [(y == c).nonzero()[:per_class, 0] for c in range(len(names))]
    pick = torch.cat(by_classes)
    x, y = x[pick], y[pick]

    _, logits = under_pgd(net, x, y, 0)
    x_adv, logits_adv = under_pgd(net, x, y, eps, norm)
    right, right_adv = logits.argmax(1) == y, logits_adv.argmax(1) == y
    title = (f'{label}; {report["dataset"]}, {norm} {eps:g}/255\n{len(y)} images: '
             f'{100 * right.float().mean():.1f} % right, {100 * right_adv.float().mean():.1f} % under PGD-20')

    drawn = {'tsne': tsne(logits, logits_adv, y, names, title)}
    firsts = [(right & (y == c)).nonzero()[:1, 0] for c in range(len(names))]
    some = torch.cat(firsts)[:8]
    if len(some):
        tensors = [t[some] for t in (x, x_adv, logits, logits_adv, y)]
        title = f'{label}; {report["dataset"]}, {norm} {eps:g}/255, PGD-20; of each class the first that is right'
        drawn['images'] = images(*tensors, names, title)
    return drawn

def draw(paths, checkpoints=None, out=None, *, data_dir=None, n=None, per_class=300):
    """
    Every picture that there is material for, saved into the folder out (None: beside the report); returns name ->
    Figure. paths: of a report, or a list of them, of one dataset and eps. checkpoints: theirs; 'none'; None for those
    that they name. n: images of the pictures that need a checkpoint (None: those of the report, of the curve over eps
    at most 1,000); per_class: of t-SNE at most. Raises Refused before any work, and OSError.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    reports = reading.comparable(paths)
    first = next(iter(reports.values()))
    dataset, norm, eps = first['dataset'], first['norm'], first['eps_pixels']
    classes = first['model']['num_classes']
    names = NAMES.get(dataset, [str(c) for c in range(classes)])

    nets, logs = reading.networks(paths, checkpoints, reports)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if nets:
        d = data.load(dataset, data_dir or first['args']['data_dir'], device=device, training=False)
        if d.classes != classes:
            raise Refused(f'{paths[0]} knows {classes} classes, {dataset} has {d.classes}')

    out = out or f'{os.path.splitext(paths[0])[0]}-figures'
    os.makedirs(out, exist_ok=True)
    figures = {}

    def keep(name, figure, label=None):
        if label and len(reports) > 1:
            name += re.sub(r'[^\w.-]+', '-', f'-{label}')[:100]
        figures[name] = figure
        save(figure, os.path.join(out, name))
        say(os.path.join(out, f'{name}.png'))

    # the reports and the logs alone
    with matplotlib.rc_context(STYLE), torch.random.fork_rng():
        which = ' and '.join(dict.fromkeys(report['images'] for report in reports.values()))
        title = f'{dataset}, {norm} {eps:g}/255; {which}'
        alone = f'{next(iter(reports))}; ' if len(reports) == 1 else ''
        keep('stages', stages(reports, alone + title))
        keep('per_class', by_class(reports, names, f'accuracy per class in percent; {title}'))
        if logs:
            keep('training', training(logs, alone + dataset))
        for label, report in reports.items():
            worst = reading.row_of(report, r'autoattack \(.*', r'aa-fast \(.*', r'pgd-\d+', 'clean')
            counts = report['results'][worst].get('confusion')              # early reports have none
            if counts:
                keep('confusion', confusion(counts, names, f'{label}; {title}\nunder {worst}'), label)

        # against eps: the report's own sweep, if it has one
        curves = {label: reading.swept(report) for label, report in reports.items()}
        for label, net in nets.items():
            report = reports[label]
            net.to(device)
            x, y = reading.images_of(report, d, n, device)
            torch.manual_seed(0)
            with attack_mode(net), models.bn_branch(net, report['args'].get('branch')):
                if not curves[label]:
                    radii = [eps * k / 8 for k in (0, 1, 2, 3, 4, 6, 8, 10, 12, 16)]
                    some = slice(n or 1000)
                    curves[label] = eps_curve(net, x[some], y[some], radii, norm)
                    which = f'{len(y[some])} test images'
                drawn = of_network(net, report, x, y, names, per_class, label)
            for name, figure in drawn.items():
                keep(name, figure, label)
        curves = {label: points for label, points in curves.items() if points}
        if curves:
            keep('eps', against_eps(curves, eps, f'{alone}{dataset}, {norm}, PGD; {which}'))
    return figures

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    refusals.one_line(parser)
    plain_output()
    parser.add_argument('report', nargs='+')
    parser.add_argument('--checkpoint', nargs='+', metavar='PT',
                        help='of the reports, in their order (default: those they name); or none')
    parser.add_argument('--data-dir', metavar='DIR', help="default: the report's")
    parser.add_argument('--n', type=int,
                        help="the first N test images (default: the report's; of the curve over eps at most 1,000)")
    parser.add_argument('--per-class', type=int, default=300, help='images of t-SNE, at most')
    parser.add_argument('--out', metavar='DIR', help='default: beside the first report')
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    if args.per_class < 1 or args.n is not None and args.n < 1:
        parser.error(f'--n {args.n} --per-class {args.per_class}: at least 1')
    try:
        drawn = draw(args.report, args.checkpoint, args.out, data_dir=args.data_dir, n=args.n,
                     per_class=args.per_class)
    except OSError as e:
        parser.error(f'cannot write {e.filename}: {e.strerror}')
    except KeyboardInterrupt:
        sys.exit('\nstopped; the pictures named above are whole')
