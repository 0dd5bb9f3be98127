"""
Reports of evaluate.py side by side, paired by image: which difference is larger than the noise?

$ python -m tools.compare a.json b.json c.json                          # the first is what the others are compared with
$ python -m tools.compare runs/*/best.eval-*.json --scatter clean-robust.png

First a table, the most robust on top; then, for every row that all reports have, each against the first. p is
McNemar's exact test: of the images that one of the two withstands and the other does not, how likely is a split at
least as uneven if both were equally robust? It knows the noise of the images, not that of the training seed. Reports
that differ in anything that makes the number are refused.
"""
import argparse
import json
import math
import os
import re
import sys

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 allow_abbrev=False)
parser.error = lambda message: parser.exit(2, f'{parser.prog}: error: {message}\n')
parser.add_argument('reports', nargs='+', metavar='JSON')
parser.add_argument('--scatter', metavar='PNG', help='draw robust against clean accuracy, with 95 %% intervals')
args = parser.parse_args()
for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, 'reconfigure'):          # a path that the terminal's encoding does not know
        stream.reconfigure(errors='backslashreplace')

# what makes the number, beside the weights: of the report itself, and of its entry 'evaluated'
OF_REPORT = ('dataset', 'norm', 'eps_pixels')
OF_EVALUATION = ('images', 'step_size', 'steps', 'restarts', 'seed', 'branch', 'search', 'precision')
AUTOATTACK = ('autoattack', 'aa-fast', 'apgd-', 'fab-t', 'square')      # how their rows begin
# no reason to refuse, and worth a line
MACHINE = ('device', 'torch', 'torchvision', 'tf32', 'autoattack', 'pyautoattack')

def load(path):
    try:
        with open(path) as f:
            report = json.load(f)
        if not report['complete']:
            raise ValueError
        for row in report['results'].values():
            row['accuracy']
        for k in (*OF_REPORT, 'images'):
            report[k]
        return report
    except OSError as e:
        parser.error(f'cannot read {path}: {e.strerror}')
    except (ValueError, KeyError, TypeError, AttributeError):
        parser.error(f'{path} is not a report of evaluate.py, or of one that was stopped early')

def refuse_different(k, values):
    """values: of k, one per report; None where a report, of an early version, does not say. -> is it unsaid?"""
    for path, value in zip(args.reports, values):
        if None not in (value, values[0]) and value != values[0]:
            parser.error(f'not comparable: {k} is {values[0]} in {args.reports[0]}, {value} in {path}')
    return None in values and any(v is not None for v in values)

def p_value(only_a, only_b):
    """Two-sided: the smaller of the two counts, or fewer, under a fair coin."""
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n)

# -----------------------------------------------------------------------------
# may they be compared?
reports = [load(path) for path in args.reports]
evaluated = [r.get('evaluated', {}) for r in reports]
rows = [row for row in reports[0]['results'] if all(row in r['results'] for r in reports)]
asked = list(OF_EVALUATION)
if any(row.strip().startswith(AUTOATTACK) for row in rows):
    asked += ['batch_size']                     # it draws its noise per batch
if any(row.startswith('transfer') for row in rows):
    asked += ['transfer_from']
for k in OF_REPORT:
    refuse_different(k, [r[k] for r in reports])
unsaid = [k for k in asked if refuse_different(k, [e.get(k) for e in evaluated])]
if not all('images' in e for e in evaluated):           # their digest; without it, how many and which
    refuse_different('images', [r['images'] for r in reports])
if not rows:
    names = '; '.join(f'{path}: {", ".join(r["results"])}' for path, r in zip(args.reports, reports))
    parser.error(f'not comparable: no row is common ({names})')
lengths = set()
for path, r in zip(args.reports, reports):
    for row in rows:
        if 'robust' not in r['results'][row]:
            parser.error(f'{path} is without the verdict on every image: evaluate again')
        lengths.add(len(r['results'][row]['robust']))
if len(lengths) > 1:
    parser.error(f'not comparable: verdicts on {" and ".join(map(str, sorted(lengths)))} images')

# -----------------------------------------------------------------------------
# the table
def first_row(*patterns):
    for pattern in patterns:
        for row in rows:
            if re.fullmatch(pattern, row):
                return row
    return None

clean, pgd, aa = first_row('clean'), first_row(r'pgd-\d+'), first_row(r'autoattack \(.*', 'aa-fast .*')
judge = aa or pgd or rows[-1]           # the row that sorts
if args.scatter and (clean is None or judge == clean):
    parser.error('--scatter: the reports have no clean and robust accuracy in common')

def figure(report, row):
    return f'{report["results"][row]["accuracy"]:.2f}' if row else '-'

def interval(result):
    return '{:.2f} - {:.2f}'.format(*result['interval']) if 'interval' in result else '-'

def worst(result):
    if 'class_worst' not in result:
        return '-'
    c = str(result['class_worst'])
    return f'{result["per_class"][c]:.2f} ({c})'

first = reports[0]
print(f"{first['dataset']}, {first['images']}, {first['norm']} {first['eps_pixels']:g}/255")
if unsaid:
    print(f'note: not every report says its {", ".join(unsaid)}')
for k in MACHINE:
    known = sorted({str(e[k]) for e in evaluated if k in e})
    if len(known) > 1:
        print(f'note: {k} differs: {", ".join(known)}')
titles = [clean or 'clean', pgd or 'pgd', (aa or 'autoattack').split(' (')[0]]
print(f"\n{titles[0]:>8}{titles[1]:>10}{titles[2]:>12}   {'95 % interval':>15}{'worst class':>14}  report "
      f'(sorted by, interval and worst class of: {judge})')
order = sorted(range(len(reports)), key=lambda i: -reports[i]['results'][judge]['accuracy'])
for i in order:
    r = reports[i]
    print(f'{figure(r, clean):>8}{figure(r, pgd):>10}{figure(r, aa):>12}   {interval(r["results"][judge]):>15}'
          f'{worst(r["results"][judge]):>14}  {args.reports[i]}')

# -----------------------------------------------------------------------------
# paired tests against the first report
for path, other in zip(args.reports[1:], reports[1:]):
    print(f'\na: {args.reports[0]}\nb: {path}')
    print(f"{'accuracy in percent':<36}{'a':>8}{'b':>8}{'b - a':>8}{'only a':>8}{'only b':>8}{'p':>9}")
    for row in rows:
        a, b = first['results'][row], other['results'][row]
        pairs = list(zip(a['robust'], b['robust']))
        only_a, only_b = pairs.count(('1', '0')), pairs.count(('0', '1'))
        p = p_value(only_a, only_b)
        verdict = 'larger than the noise' if p < 0.05 else 'within the noise'
        print(f"{row:<36}{a['accuracy']:8.2f}{b['accuracy']:8.2f}{b['accuracy'] - a['accuracy']:8.2f}"
              f'{only_a:8}{only_b:8}{p:9.4f}  {verdict}')
if len(reports) > 3:
    print(f'\nnote: {len(reports) - 1} comparisons: one in twenty looks larger than the noise by chance')

# -----------------------------------------------------------------------------
# the picture: clean accuracy to the right, robust accuracy up
if args.scatter:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        parser.error('--scatter needs matplotlib: pip install matplotlib')
    picture = Figure(figsize=(6, 5), layout='constrained')
    axes = picture.subplots()
    for path, r in zip(args.reports, reports):
        points = [r['results'][row] for row in (clean, judge)]
        x, y = [p['accuracy'] for p in points]
        if all('interval' in p for p in points):
            (x0, x1), (y0, y1) = [p['interval'] for p in points]
            axes.plot([x0, x1], [y, y], color='0.7', zorder=1)
            axes.plot([x, x], [y0, y1], color='0.7', zorder=1)
        axes.plot(x, y, 'o', color='black', zorder=2)
        label = os.path.join(*os.path.normpath(path).split(os.sep)[-2:]).removesuffix('.json')
        axes.annotate(label, (x, y), xytext=(4, 4), textcoords='offset points', fontsize=7)
    axes.set(xlabel='clean accuracy, %', ylabel=f'{judge}, %', title=f'{first["dataset"]}, {first["images"]}')
    try:
        picture.savefig(args.scatter, format='png', dpi=150)
    except OSError as e:
        parser.error(f'cannot write {args.scatter}: {e.strerror}')
    print(args.scatter)
