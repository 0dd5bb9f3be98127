"""
Pictures of what evaluate.py measured, as PNG and PDF, readable in grey and in print.

$ python -m tools.figures runs/x/best.eval-Linf-8-n10000.json       # into a folder beside the report
$ python -m tools.figures a.json b.json --out pictures              # side by side
$ python -m tools.figures a.json --checkpoint none                  # of the report alone: seconds

Of the report: accuracy after every stage and per class, confusion under attack, and against eps if it was
evaluated with --sweep-eps. Of the checkpoint it names, on the images of the report: accuracy against eps,
images with their perturbation, t-SNE of the logits; minutes on a CPU. Of a log.jsonl beside the checkpoint:
the training. Each is a function of support/drawing.py, of arrays or dicts; draw() makes them all.
"""
import argparse
import os
import re
import sys

import matplotlib
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import models
from attacks import attack_mode, pgd
from support import drawing, evaluation, refusals
from support.drawing import STYLE
from support.files import Refused, cannot_write, plain_output, say
from support.summary import wilson
from tools import reading

# of other datasets: numbers
NAMES = {'cifar10': 'airplane automobile bird cat deer dog frog horse ship truck'.split()}

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
    """The points of against_eps at the radii, in pixels, ascending. An image that fell is not attacked again:
    what made it fall lies in the larger balls, too."""
    n, points = len(y), []
    for eps in radii:
        if len(y):
            right = under_pgd(net, x, y, eps, norm)[1].argmax(1) == y
            x, y = x[right], y[right]
        points.append((eps, 100 * len(y) / n, *wilson(len(y), n)))
    return points

def of_network(net, report, x, y, names, per_class, label):
    """name -> Figure of what a network does to the images x (B,3,H,W) and y, at most per_class of each
    class."""
    norm, eps = report['norm'], report['eps_pixels']
    by_classes = [(y == c).nonzero()[:per_class, 0] for c in range(len(names))]
    pick = torch.cat(by_classes)
    x, y = x[pick], y[pick]

    _, logits = under_pgd(net, x, y, 0)
    x_adv, logits_adv = under_pgd(net, x, y, eps, norm)
    right, right_adv = logits.argmax(1) == y, logits_adv.argmax(1) == y
    where = f'{label}; {report["dataset"]}, {norm} {eps:g}/255'
    title = (f'{where}\n{len(y)} images: '
             f'{100 * right.float().mean():.1f} % right, {100 * right_adv.float().mean():.1f} % under PGD-20')

    drawn = {'tsne': drawing.tsne(logits, logits_adv, y, names, title)}
    firsts = [(right & (y == c)).nonzero()[:1, 0] for c in range(len(names))]
    some = torch.cat(firsts)[:8]
    if len(some):
        tensors = [t[some] for t in (x, x_adv, logits, logits_adv, y)]
        title = f'{where}, PGD-20; of each class the first that is right'
        drawn['images'] = drawing.images(*tensors, names, title)
    return drawn

def draw(paths, checkpoints=None, out=None, *, data_dir=None, n=None, per_class=300, model=None):
    """
    Every picture that there is material for, saved into the folder out (None: beside the report); returns
    name -> Figure. paths: of a report, or a list of them, of one dataset and eps. checkpoints: theirs;
    'none'; None for those that they name. n: images of the pictures that need a checkpoint (None: those of
    the report); of them the curve over eps takes at most 1,000, and t-SNE at most per_class of a class.
    model: FILE.py:FUNCTION, if they are of a network of one's own. Raises Refused before any work, and
    OSError.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    reports = reading.comparable(paths)
    first = next(iter(reports.values()))
    dataset, norm, eps = first['dataset'], first['norm'], first['eps_pixels']
    classes = first['model']['num_classes']
    names = NAMES.get(dataset, [str(c) for c in range(classes)])

    nets, logs = reading.networks(paths, checkpoints, reports, model)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if nets:
        folder = data_dir or evaluation.here(first['args']['data_dir'], dataset, paths[0])
        d = data.load(dataset, folder, device=device, training=False)
        if d.classes != classes:
            raise Refused(f'{paths[0]} knows {classes} classes, {dataset} has {d.classes}')

    out = out or f'{os.path.splitext(paths[0])[0]}-figures'
    os.makedirs(out, exist_ok=True)
    figures = {}

    def keep(name, figure, label=None):
        if label and len(reports) > 1:
            name += re.sub(r'[^\w.-]+', '-', f'-{label}')[:100]
        if name in figures:                     # two long labels that begin alike
            name += f'-{len(figures)}'
        figures[name] = figure
        drawing.save(figure, os.path.join(out, name))
        say(os.path.join(out, f'{name}.png'))

    # the reports and the logs alone
    with matplotlib.rc_context(STYLE), torch.random.fork_rng():
        which = ' and '.join(dict.fromkeys(report['images'] for report in reports.values()))
        title = f'{dataset}, {norm} {eps:g}/255; {which}'
        alone = f'{next(iter(reports))}; ' if len(reports) == 1 else ''
        keep('stages', drawing.stages(reports, alone + title))
        keep('per_class', drawing.by_class(reports, names, f'accuracy per class in percent; {title}'))
        if logs:
            keep('training', drawing.training(logs, alone + dataset))
        for label, report in reports.items():
            worst = reading.row_of(report, r'autoattack \(.*', r'aa-fast \(.*', r'pgd-\d+', 'clean')
            counts = report['results'][worst].get('confusion')              # early reports have none
            if counts:
                heading = f'{label}; {title}\nunder {worst}'
                keep('confusion', drawing.confusion(counts, names, heading), label)

        # against eps: the report's own sweep, if it has one
        curves = {label: reading.swept(report) for label, report in reports.items()}
        of = {label: reports[label]['images'] for label, points in curves.items() if points}
        for label, net in nets.items():
            report = reports[label]
            net.to(device)
            x, y = reading.images_of(report, d, n, device)
            torch.manual_seed(0)
            with attack_mode(net), models.bn_branch(net, report['args'].get('branch')):
                if not curves[label]:
                    radii = [eps * k / 8 for k in (0, 1, 2, 3, 4, 6, 8, 10, 12, 16)]
                    some = slice(1000)
                    curves[label] = eps_curve(net, x[some], y[some], radii, norm)
                    of[label] = f'{len(y[some])} test images'
                drawn = of_network(net, report, x, y, names, per_class, label)
            for name, figure in drawn.items():
                keep(name, figure, label)
        curves = {label: points for label, points in curves.items() if points}
        if curves:
            which = ' and '.join(dict.fromkeys(of.values()))
            keep('eps', drawing.against_eps(curves, eps, f'{alone}{dataset}, {norm}, PGD; {which}'))
    return figures

if __name__ == '__main__':
    parser = argparse.ArgumentParser(prog='python -m tools.figures', description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    refusals.one_line(parser)
    plain_output()
    parser.add_argument('report', nargs='+')
    parser.add_argument('--checkpoint', nargs='+', metavar='PT',
                        help='of the reports, in their order (default: those they name); or none')
    parser.add_argument('--model', metavar='FILE.py:FUNCTION', help="of reports of a network of one's own")
    parser.add_argument('--data-dir', metavar='DIR', help="default: the report's")
    parser.add_argument('--n', type=int, metavar='N',
                        help="the first N test images (default: the report's); against eps at most 1,000")
    parser.add_argument('--per-class', type=int, default=300, help='images of t-SNE, at most')
    parser.add_argument('--out', metavar='DIR', help='default: beside the first report')
    args = parser.parse_args()

    torch.backends.cudnn.allow_tf32 = False
    if args.per_class < 1 or args.n is not None and args.n < 1:
        parser.error(f'--n {args.n} --per-class {args.per_class}: at least 1')
    try:
        drawn = draw(args.report, args.checkpoint, args.out, data_dir=args.data_dir, n=args.n,
                     per_class=args.per_class, model=args.model)
    except OSError as e:
        parser.error(cannot_write(e.filename, e))
    except KeyboardInterrupt:
        sys.exit('\nstopped; the pictures named above are whole')
