"""
Pictures of what evaluate.py measured, as PNG and PDF, readable in grey and in print.

$ python -m tools.figures runs/x/best.eval-Linf-8-n10000.json                # into a folder beside the report
$ python -m tools.figures a.json b.json --out pictures                       # side by side
$ python -m tools.figures a.json --checkpoint none                           # of the report alone: seconds

Of the report: accuracy after every stage and per class. Of the checkpoint it names: accuracy against eps,
images with their perturbation, t-SNE of the logits, confusion under attack: minutes on a CPU. Of a log.jsonl
beside it: the training. Each is a function of arrays or dicts that returns a Figure; draw() makes them all.
"""
import argparse, json, math, os, re, sys

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure            # no pyplot: no window, no backend, no global state
from tqdm import tqdm

import data, models
from attacks import attack_mode, pgd
from support.checkpoint import fingerprint, load_checkpoint
from support.imagenet import in_memory
from support.files import Refused, atomic

from support.evaluation import wilson

NAMES = {'cifar10': 'airplane automobile bird cat deer dog frog horse ship truck'.split()}  # others: numbers
WIDTH = 6.5                                     # inches, a page's text: what is 8 pt here is 8 pt in print
# draw() sets it; called alone, the functions draw in the style of their caller
STYLE = {'font.size': 8, 'axes.titlesize': 8, 'figure.titlesize': 8, 'lines.markersize': 4,
         'hatch.linewidth': 0.6, 'pdf.fonttype': 42, 'axes.spines.top': False, 'axes.spines.right': False}
# of every series its colour, which no eye confuses (Okabe and Ito), and what is left of it in grey
COLOURS = '#0072B2 #E69F00 #009E73 #CC79A7 #56B4E9 #D55E00 #AAAAAA #F0E442'.split()
HATCHES = ['', '////', '....', 'xxxx', '\\\\\\\\', '---', 'ooo', '+++']
LINES = ['-', '--', '-.', ':', (0, (7, 1)), (0, (1, 3)), (0, (4, 1, 1, 1)), (0, (3, 4))]
MARKERS = 'os^DvPX*<>'
# of classes; with MARKERS a hundred of them, no two the same (the colours are Paul Tol's)
TEN = '#332288 #88CCEE #44AA99 #117733 #999933 #DDCC77 #CC6677 #882255 #AA4499 #777777'.split()

def save(figure, path):
    """path.png and path.pdf, each whole or absent."""
    for kind in ('png', 'pdf'):
        with atomic(f'{path}.{kind}') as tmp:
            figure.savefig(tmp, format=kind, dpi=200)

def sheet(title, height, rows=1, columns=1, *, width=WIDTH, **options):
    """A figure, and its axes as (rows, columns)."""
    figure = Figure(figsize=(width, height), layout='constrained')
    figure.suptitle(title)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)

def with_legend(figure, **options):
    """One for all axes, below them, in as many columns as fit."""
    entries = {text: h for axes in figure.axes for h, text in zip(*axes.get_legend_handles_labels())}
    columns = int(figure.get_figwidth() * 15 / (8 + max(map(len, entries), default=0)))
    figure.legend(entries.values(), entries, loc='outside lower center', ncols=max(1, columns), **options)
    return figure

def bars(axes, ticks, heights, intervals=None):
    """Groups of bars. heights: label -> one per tick, NaN for none. intervals: label -> (low, high) per tick;
    with them every bar has its number over it."""
    width = 0.86 / len(heights)
    for i, (label, height) in enumerate(heights.items()):
        at = np.arange(len(ticks)) + (i + 0.5) * width - 0.43
        axes.bar(at, height, width, color=COLOURS[i % 8], hatch=HATCHES[i % 8], edgecolor='black',
                 linewidth=0.6, label=label)
        if intervals:
            span = np.abs(np.transpose(intervals[label]) - height)
            axes.errorbar(at, height, span, fmt='none', ecolor='black', capsize=2, linewidth=0.8)
            for x, value, up in zip(at, height, span[1]):
                if math.isfinite(value):
                    axes.annotate(f'{value:.1f}', (x, value + up), (0, 3), textcoords='offset points',
                                  ha='center', va='bottom', rotation=90 * (len(heights) > 2))
    axes.set(xticks=range(len(ticks)), xticklabels=ticks, xlim=(-0.6, len(ticks) - 0.4),
             yticks=range(0, 101, 20), ylim=(0, 118 if intervals else 100), ylabel='accuracy, %')

def rows_of(reports, but):
    """Names of the rows of the reports (label -> report), but for those that match."""
    return list(dict.fromkeys(k for r in reports.values() for k in r['results'] if not re.search(but, k)))

def stages(reports, title=''):
    """Accuracy with its 95 % interval, clean and after every attack, AutoAttack's four in their order."""
    rows = rows_of(reports, r'\(|all of')       # those repeat others
    none = dict(accuracy=math.nan, interval=[math.nan] * 2)
    of = lambda key: {label: [r['results'].get(k, none)[key] for k in rows] for label, r in reports.items()}
    figure, [[axes]] = sheet(title, 3.4, width=max(WIDTH, 0.7 * len(rows)))
    bars(axes, [k.replace('autoattack, after ', 'AA, after\n').replace(' alone', '\nalone') for k in rows],
         of('accuracy'), of('interval'))
    return with_legend(figure)

def by_class(reports, names, title=''):
    """Accuracy of every class, clean and under each attack: a row of axes per report and twenty classes."""
    parts = [(label, range(len(names))[k:k + 20]) for label in reports for k in range(0, len(names), 20)]
    figure, grid = sheet(title, 0.6 + 1.7 * len(parts), len(parts))
    for axes, (label, classes) in zip(grid[:, 0], parts):
        of = lambda row: reports[label]['results'].get(row, {}).get('per_class', {})
        bars(axes, [names[c] for c in classes], {row: [of(row).get(str(c), math.nan) for c in classes]
                                                 for row in rows_of(reports, 'after| alone|all of')})
        axes.set_title(label)
    return with_legend(figure)

def against_eps(counts, n, radii, eps, title=''):
    """Accuracy against the radius of the attack, with its 95 % band; dotted: the report's eps. counts: label
    -> how many of n images are right at each of the radii (eps_curve)."""
    figure, [[axes]] = sheet(title, 3.4, width=0.8 * WIDTH)
    for i, (label, k) in enumerate(counts.items()):
        axes.fill_between(radii, *zip(*(wilson(hits, n) for hits in k)), color=COLOURS[i % 8],
                          alpha=0.18, linewidth=0)
        axes.plot(radii, 100 * np.array(k) / n, color=COLOURS[i % 8], marker=MARKERS[i % 8],
                  linestyle=LINES[i % 8], label=label, clip_on=False)
    axes.axvline(eps, color='black', linestyle=':', linewidth=0.8)
    axes.set(xlabel='eps, pixels', ylabel='accuracy, %', ylim=(0, 100), xlim=(0, max(radii)))
    return with_legend(figure)

def images(x, x_adv, logits, logits_adv, y, names, title=''):
    """Clean, adversarial, and their difference, magnified until its largest value spans the range; below,
    what the network takes it for and how surely. x, x_adv (B,3,H,W): a column each."""
    magnified = 0.5 / max((x_adv - x).abs().max().item(), 1e-9)
    figure, grid = sheet(title, 3 * WIDTH / max(len(x), 6) + 0.9, 3, len(x))
    for row, pictures in enumerate((x, x_adv, 0.5 + magnified * (x_adv - x))):
        for axes, picture in zip(grid[row], pictures.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()):
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, z, c in zip(grid[row], (logits, logits_adv, ())[row], y.tolist()):
            p, k = z.softmax(0).max(0)
            axes.set_xlabel(f'{names[k]}\n{"✓" if k == c else "✗"} {100 * p:.0f} %')
        grid[row, 0].set_ylabel(('clean', 'adversarial', f'difference\n× {magnified:.3g}')[row])
    return figure

def tsne(logits, logits_adv, y, names, title='', seed=0):
    """As figure 1 of Al-Najjar et al., "Adversarial Training without Hard Labels": the logits (B,K) in the
    plane, a symbol per class, its number near its median. One map for both panels: what moved has moved."""
    from sklearn.manifold import TSNE
    z, y = torch.cat([logits, logits_adv]).double().cpu().numpy(), y.cpu().numpy()
    points = TSNE(perplexity=min(30, (len(z) - 1) / 3), init='pca', random_state=seed).fit_transform(z)
    figure, [panels] = sheet(title, 4.2, 1, 2, sharex=True, sharey=True)
    for axes, part, name in zip(panels, np.split(points, 2), ('clean', 'adversarial')):
        for c in np.unique(y):
            axes.scatter(*part[y == c].T, s=7, marker=MARKERS[(c + c // 10) % 10], color=TEN[c % 10],
                         linewidths=0, alpha=0.7, label=f'{c} {names[c]}' if names[c] != str(c) else names[c])
        room, placed = np.ptp(points, axis=0) / (18, 14), []            # of a number, which hides no other
        for c in np.unique(y):
            at = np.median(part[y == c], axis=0)
            while len(names) <= 20 and any((np.abs(at - other) < room).all() for other in placed):
                at[1] -= room[1] / 4
            placed.append(at)
            axes.text(*at, c, ha='center', va='center', weight='bold',
                      bbox=dict(boxstyle='round,pad=0.15', facecolor='white', linewidth=0.4, alpha=0.85))
        axes.spines[:].set_visible(True)
        axes.set(xticks=[], yticks=[], title=name)
    return with_legend(figure, markerscale=2.2) if len(names) <= 20 else figure

def confusion(y, predicted, names, title=''):
    """In percent of every true class (row), what it is taken for (column)."""
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (np.asarray(y), np.asarray(predicted)), 1)
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, [[axes]] = sheet(title, 0.8 * WIDTH, width=0.85 * WIDTH)
    shades = axes.imshow(percent, cmap='Greys', vmin=0, vmax=100)
    shown = range(0, len(names), 1 + (len(names) - 1) // 25)
    axes.set(xticks=shown, yticks=shown, xlabel='predicted', ylabel='true')
    axes.set_xticklabels([names[c] for c in shown], rotation=45, ha='right', rotation_mode='anchor')
    axes.set_yticklabels([names[c] for c in shown])
    if len(names) > 14:                                                 # no room for numbers
        figure.colorbar(shades, shrink=0.8, label='% of the true class')
        return figure
    for i, j in np.ndindex(percent.shape):
        axes.text(j, i, f'{percent[i, j]:.0f}', ha='center', va='center',
                  weight='bold' if i == j else 'normal', color='white' if percent[i, j] > 55 else 'black')
    return figure

def training(logs, title=''):
    """Accuracy on the hold-out, and the loss, in the method's own scale. logs: label -> a dict per epoch."""
    figure, [[left, right]] = sheet(title, 3.2, 1, 2)
    for i, (label, rows) in enumerate(logs.items()):
        look = dict(color=COLOURS[i % 8], marker=MARKERS[i % 8], linewidth=1)
        of = lambda key: [row.get(key, math.nan) for row in rows]
        left.plot(of('epoch'), of('val_clean'), '-', label=f'{label}, clean', **look)
        if 'val_pgd20' in rows[0]:
            left.plot(of('epoch'), of('val_pgd20'), '--', fillstyle='none', label=f'{label}, PGD-20', **look)
        right.plot(of('epoch'), of('loss'), linestyle=LINES[i % 8], **look)
    left.set(xlabel='epoch', ylabel='accuracy on the hold-out, %', ylim=(0, 100))
    right.set(xlabel='epoch', ylabel='training loss')
    return with_legend(figure)

# -----------------------------------------------------------------------------
# what they are drawn from

def under_pgd(net, x, y, eps, norm='Linf'):
    """x_adv of PGD-20, also of images misclassified as they are, and its logits. eps in pixels; 0: x."""
    x_adv, logits, size = x.clone(), [], 250 if x.is_cuda else 50
    for i in tqdm(range(0, len(x), size), desc=f'PGD-20, eps {eps:g}', leave=False, disable=None):
        part = slice(i, i + size)
        if eps:
            x_adv[part] = pgd(lambda x: F.cross_entropy(net(x), y[part], reduction='none'), x[part],
                              eps=eps / 255, step_size=eps / 4 / 255, steps=20, norm=norm)
        with torch.no_grad():
            logits.append(net(x_adv[part]))
    return x_adv, torch.cat(logits)

def eps_curve(net, x, y, radii, norm='Linf'):
    """How many images are right at each radius, in pixels, ascending. One that fell is not attacked again:
    what made it fall lies in the larger balls, too."""
    counts = []
    for eps in radii:
        if len(y):
            right = under_pgd(net, x, y, eps, norm)[1].argmax(1) == y
            x, y = x[right], y[right]
        counts.append(len(y))
    return counts

def load_report(path):
    """A finished report of evaluate.py. Raises ValueError, one line."""
    try:
        with open(path) as f:
            r = json.load(f)
        sound = r['complete'] is False or (
            {'checkpoint', 'fingerprint', 'images', 'dataset', 'norm', 'args', 'trained'} <= set(r)
            and r['eps_pixels'] > 0 and r['model']['num_classes'] > 1 and 'clean' in r['results']
            and all(0 <= row['accuracy'] <= 100 and len(row['interval']) == 2 and row['per_class']
                    for row in r['results'].values()))
    except OSError as e:
        raise ValueError(f'cannot read {path}: {e.strerror}') from e
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f'{path} is not a report of evaluate.py')
    if not r['complete']:
        raise ValueError(f'{path} is not complete: evaluate.py was stopped, and the same command continues')
    return r

def load_network(path, report):
    """The network that was evaluated. Raises ValueError, one line, also if path holds another one."""
    config = report['model']
    options = {k: config[k] for k in ('width', 'mean', 'std', 'activation') if k in config}
    net, _ = load_checkpoint(path, config['name'], config['num_classes'], **options)
    if options.get('activation', net.config['activation']) != net.config['activation']:
        weights = net.state_dict()                              # evaluate.py --activation
        net = models.build(**dict(net.config, activation=options['activation'])).eval()
        net.load_state_dict(weights)
    if fingerprint(net) != report['fingerprint']:
        raise ValueError(f'{path} is not what was evaluated (fingerprint {fingerprint(net)}, in the report '
                         f'{report["fingerprint"]}): name another --checkpoint, or none')
    return net

def load_log(path):
    """The epochs of a log.jsonl. Raises ValueError, one line."""
    try:
        with open(path) as f:
            rows = [json.loads(line) for line in f]
        return [row for row in rows if {'epoch', 'loss', 'val_clean'} <= set(row)]   # not the configuration
    except (OSError, ValueError, TypeError) as e:
        raise ValueError(f'{path} is not the log of a training ({type(e).__name__})') from e

def labels_of(paths, reports):
    """A label per report: its method, or with the images, or its file: the first that tells them apart."""
    method = [' '.join([r['trained'].get('loss') or r['checkpoint'], *(
        f'{k} {v}' for k, v in r['trained'].get('hparams', {}).items() if v is not False)]) for r in reports]
    for labels in method, [f'{m}, {r["images"]}' for m, r in zip(method, reports)], paths:
        if len(set(labels)) == len(labels):
            return [label[-60:] for label in labels]
    raise ValueError('the same report twice')

def draw(report, checkpoint=None, out=None, *, data_dir=None, n=200, per_class=300):
    """
    Every picture that there is material for, saved into the folder out (None: beside the report); returns
    name -> Figure. report: a path, or several, of one dataset and eps. checkpoint: theirs; 'none'; None for
    those that they name, where they are or beside the report. n: images of the curve over eps; per_class: of
    t-SNE and confusion. Raises ValueError, one line, before any work, and OSError.
    """
    paths, given = ([v] if v is None or isinstance(v, (str, os.PathLike)) else list(v)
                    for v in (report, checkpoint))
    paths, given = [os.fspath(path) for path in paths], given * (len(paths) if len(given) == 1 else 1)
    if len(given) != len(paths):
        raise ValueError(f'{len(given)} checkpoints for {len(paths)} reports')
    reports = [load_report(path) for path in paths]
    first, nets, logs, figures = reports[0], {}, {}, {}
    for k in ('dataset', 'norm', 'eps_pixels'):
        for path, r in zip(paths, reports):
            if r[k] != first[k]:
                raise ValueError(f'not comparable: {k} is {first[k]} in {paths[0]}, {r[k]} in {path}')
    labels = labels_of(paths, reports)
    for path, file, label, r in zip(paths, given, labels, reports):
        beside = os.path.join(os.path.dirname(path), os.path.basename(r['checkpoint']))
        file = file or next((f for f in (r['checkpoint'], beside) if os.path.exists(f)), 'none')
        log = os.path.join(os.path.dirname(file), 'log.jsonl')
        if file != 'none' and r['fingerprint'] not in (fingerprint(net) for net, _ in nets.values()):
            nets[label] = load_network(file, r), r['args'].get('branch')
            if os.path.exists(log) and (rows := load_log(log)):
                logs[label] = rows
    dataset, norm, eps = (first[k] for k in ('dataset', 'norm', 'eps_pixels'))
    K = first['model']['num_classes']
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    d = nets and data.load(dataset, data_dir or first['args']['data_dir'], device=device, training=False)
    if d and d.classes != K:
        raise ValueError(f'{paths[0]} knows {K} classes, {dataset} has {d.classes}')
    names = NAMES.get(dataset, [str(c) for c in range(K)])
    out = out or f'{os.path.splitext(paths[0])[0]}-figures'
    os.makedirs(out, exist_ok=True)

    def keep(name, figure):
        figures[name] = figure
        save(figure, os.path.join(out, name))
        print(os.path.join(out, f'{name}.png'), flush=True)

    with matplotlib.rc_context(STYLE), torch.random.fork_rng():
        where, counts = f'{dataset}, {norm} {eps:g}/255', {}
        title = '; '.join(dict.fromkeys([where, *(r['images'] for r in reports)]))
        keep('stages', stages(dict(zip(labels, reports)), title))
        keep('per_class', by_class(dict(zip(labels, reports)), names, title))
        if logs:
            keep('training', training(logs, dataset))
        if not nets:
            return figures
        radii, n = [eps * k / 8 for k in (0, 1, 2, 3, 4, 6, 8, 10, 12, 16)], min(n, len(d.y_test))
        order = torch.randperm(len(d.y_test), generator=torch.Generator().manual_seed(0)).to(device)
        pick = torch.cat([order[d.y_test[order] == c][:per_class] for c in range(K)])
        x, y = data.to_float(in_memory(d.x_test[pick], device)).contiguous(), d.y_test[pick]
        first = data.to_float(in_memory(d.x_test[:n], device)).contiguous()
        for name, (net, branch) in nets.items():
            net.to(device)
            torch.manual_seed(0)
            with attack_mode(net), models.bn_branch(net, branch):
                counts[name] = eps_curve(net, first, d.y_test[:n], radii, norm)
                _, logits = under_pgd(net, x, y, 0)
                x_adv, logits_adv = under_pgd(net, x, y, eps, norm)
            right, right_adv = logits.argmax(1) == y, logits_adv.argmax(1) == y
            some = [i[0].item() for c in range(K) if len(i := (right & (y == c)).nonzero()[:, 0])][:8] or [0]
            title = (f'{name}; {where}\n{len(y)} images: {100 * right.float().mean():.1f} % right, '
                     f'{100 * right_adv.float().mean():.1f} % under PGD-20')
            tag = re.sub(r'[^\w.-]+', '-', f'-{name}') if len(nets) > 1 else ''
            keep(f'images{tag}', images(*(v[some] for v in (x, x_adv, logits, logits_adv, y)), names,
                                        f'{name}; {where}, PGD-20; of each class the first that is right'))
            keep(f'confusion{tag}', confusion(y.cpu(), logits_adv.argmax(1).cpu(), names, title))
            keep(f'tsne{tag}', tsne(logits, logits_adv, y, names, title))
        keep('eps', against_eps(counts, n, radii, eps, f'{dataset}, {norm}, PGD-20, {n} images'))
    return figures

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f'{parser.prog}: error: {message}\n')
    parser.add_argument('report', nargs='+')
    parser.add_argument('--checkpoint', nargs='+', metavar='PT',
                        help='of the reports, in their order (default: those they name); or none')
    parser.add_argument('--data-dir', metavar='DIR', help="default: the report's")
    parser.add_argument('--n', type=int, default=200, help='images of the curve over eps')
    parser.add_argument('--per-class', type=int, default=300, help='images of t-SNE and confusion')
    parser.add_argument('--out', metavar='DIR', help='default: beside the first report')
    args = parser.parse_args()
    if min(args.n, args.per_class) < 1:
        parser.error(f'--n {args.n} --per-class {args.per_class}: at least 1')
    torch.backends.cudnn.allow_tf32 = False
    try:
        drawn = draw(args.report, args.checkpoint, args.out, data_dir=args.data_dir, n=args.n,
                     per_class=args.per_class)
    except (Refused, ValueError) as e:
        parser.error(str(e).splitlines()[0])
    except OSError as e:
        parser.error(f'cannot write {e.filename}: {e.strerror}')
    except KeyboardInterrupt:
        sys.exit('\nstopped; the pictures named above are whole')
