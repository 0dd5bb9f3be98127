"""
Reports of evaluate.py side by side, or all that lies in a folder as a table.

$ python -m tools.compare runs/                             # every run and report in it, as far as it got
$ python -m tools.compare a.json b.json c.json              # each against the first: more than noise?
$ python -m tools.compare runs/*/best.eval-*.json --scatter clean-robust.png

Of a folder: clean, PGD and AutoAttack accuracy in percent with their 95 % intervals, the worst class, and the
flags that differ; of a run without a report the last validation. Nothing is refused, so mind what differs.

Of reports: first a table, the most robust on top; then, for every row that all have, each against the first,
paired by image. p is McNemar's exact test: of the images that one of the two withstands and the other does
not, how likely is a split at least as uneven if both were equally robust? It knows the noise of the images,
not that of the training seed. Reports that differ in anything that makes the number are refused.
"""
import argparse
import math
import os
import re

from support import refusals
from support.files import Refused, atomic, cannot_write, plain_output, say
from support.refusals import refuse
from support.summary import wilson
from tools import reading

# what makes the number, beside the weights: of the report itself, and of its entry 'evaluated'
OF_REPORT = ('dataset', 'norm', 'eps_pixels')
OF_EVALUATION = ('images', 'step_size', 'steps', 'restarts', 'seed', 'branch', 'search', 'precision')
AUTOATTACK = ('autoattack', 'aa-fast', 'apgd-', 'fab-t', 'square')      # how their rows begin
# no reason to refuse, and worth a line
MACHINE = ('device', 'torch', 'torchvision', 'tf32', 'autoattack', 'pyautoattack')

# a table's columns, and the rows of a report that they show
AA = r'autoattack \(.*'
COLUMNS = {'clean': ['clean'], 'PGD': [r'pgd-\d+'], 'AutoAttack': [AA, 'aa-fast .*']}

def worst(result):
    """Its lowest accuracy of a class, and which."""
    if 'class_worst' not in result:             # an early report
        return '-'
    c = str(result['class_worst'])
    return f'{result["per_class"][c]:.2f} ({c})'

# -----------------------------------------------------------------------------
# a folder

def found(folder):
    """The logs in a folder, path -> (configuration, epochs), and the reports, path -> content, finished or
    not. Any other JSON is left out."""
    logs, reports = {}, {}
    def unreadable(problem):
        say(f'note: cannot read {problem.filename}: {problem.strerror}')
    for root, folders, names in os.walk(folder, onerror=unreadable):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(root, name)
            try:
                if name.endswith('.jsonl'):
                    logs[path] = reading.load_log(path)
                elif name.endswith('.json'):
                    reports[path] = reading.load(path, unfinished=True)
            except Refused as e:
                if name.endswith('.jsonl') or isinstance(e.__cause__, OSError):
                    say(f'note: {e}')
    return logs, reports

def belongs(report, log):
    """Is it of the run with this log? It lies in the folder of log.jsonl, or as NAME.*.json beside
    NAME.jsonl."""
    if os.path.basename(log) == 'log.jsonl':
        return os.path.dirname(report) == os.path.dirname(log)
    return report.startswith(log.removesuffix('.jsonl').removesuffix('.log') + '.')

def percent(result):
    """Its accuracy and interval, to a tenth and to a point."""
    low, high = result['interval']
    return f'{result["accuracy"]:.1f} ({low:.0f}-{high:.0f})'

def row_of_report(report):
    """Its cells, and what they depend on: the flags of the run and of the evaluation."""
    rows = {title: reading.row_of(report, *patterns) for title, patterns in COLUMNS.items()}
    cells = [report['results']['clean']['n']]
    cells += [percent(report['results'][row]) if row else '-' for row in rows.values()]
    if rows['AutoAttack'] and not re.fullmatch(AA, rows['AutoAttack']):
        cells[-1] += '*'
    judge = rows['AutoAttack'] or rows['PGD'] or list(report['results'])[-1]
    cells.append(worst(report['results'][judge]))

    flags = reading.flags_of(report['trained'].get('run', {}))
    flags['checkpoint'] = os.path.basename(report['checkpoint'])
    flags['attacked on'] = f'{report["dataset"]}, {report["norm"]} {report["eps_pixels"]:g}/255'
    asked = {**report['args'], **report.get('evaluated', {})}
    for flag in ('draw', 'steps', 'step_size', 'restarts', 'branch', 'activation'):
        flags[f'attacked with {flag}'] = asked.get(flag)
    return cells, flags

def row_of_log(config, epochs):
    """The same of a run without a report: its last validation, on held-out training images."""
    n = config.get('val_images')
    cells = [n or '-']
    for column in ('val_clean', 'val_pgd20'):
        accuracy = epochs[-1].get(column) if epochs else None
        if accuracy is None or not n:
            cells.append('-')
        else:
            cells.append(percent(dict(accuracy=accuracy, interval=wilson(round(n * accuracy / 100), n))))
    return [*cells, '-', '-'], reading.flags_of(config)

def overview(folder):
    """Prints the table of a folder."""
    logs, reports = found(folder)
    if not logs and not reports:
        refuse(f'{folder}: neither a log.jsonl nor a report of evaluate.py in it')

    rows = []               # name, cells, flags
    for path, report in reports.items():
        name = os.path.relpath(path, folder).removesuffix('.json')
        rows.append((name if report['complete'] else f'{name} (unfinished)', *row_of_report(report)))
    for path, (config, epochs) in logs.items():
        if not any(belongs(report, path) for report in reports):
            name = os.path.relpath(path, folder).removesuffix('.jsonl').removesuffix('log').rstrip('/.')
            name += f' (held out, epoch {len(epochs)} of {config.get("epochs")})'
            rows.append((name, *row_of_log(config, epochs)))
    rows.sort(key=lambda row: row[0])

    # of the flags that differ, what is usual is said once; the loss in every row
    flags = reading.differing([row[2] for row in rows])
    usual = {}
    for flag in dict.fromkeys(flag for one in flags for flag in one):
        values = [one.get(flag) or False for one in flags]
        usual[flag] = max(values, key=values.count)
    said = {flag: value for flag, value in usual.items() if value and flag != 'loss'}

    say(f'{folder}: {len(logs)} runs, {len(reports)} reports; accuracy in percent, with its 95 % interval; '
        'the worst class under the last attack of the row')
    if said:
        say(f'unless the row says otherwise: {reading.in_words(said)}')
    say(f"\n{'n':>6}{'clean':>15}{'PGD':>15}{'AutoAttack':>15}{'worst class':>13}  of")
    for (name, cells, whole), own in zip(rows, flags):
        shown = {'loss': whole['loss']} if 'loss' in whole else {}
        for flag, value in own.items():
            if (value or False) != usual[flag]:
                shown[flag] = value
        n, clean, pgd, aa, last = cells
        say(f'{n:>6}{clean:>15}{pgd:>15}{aa:>15}{last:>13}  {name}  {reading.in_words(shown)}'.rstrip())
    if any(cells[3].endswith('*') for _, cells, _ in rows):
        say('', "* of AutoAttack's four attacks only APGD-CE and APGD-T")

# -----------------------------------------------------------------------------
# reports, image by image

def p_value(only_a, only_b):
    """Two-sided: the smaller of the two counts, or fewer, under a fair coin."""
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n)

def common_rows(paths, reports):
    """The rows that all reports have, 'clean' at least. Raises Refused if they may not be compared; prints
    what is worth a note."""
    evaluated = [report.get('evaluated', {}) for report in reports]
    rows = [row for row in reports[0]['results'] if all(row in report['results'] for report in reports)]
    asked = list(OF_EVALUATION)
    if any(row.strip().startswith(AUTOATTACK) for row in rows):
        asked += ['batch_size']                     # it draws its noise per batch
    if any(row.startswith('transfer') for row in rows):
        asked += ['transfer_from']

    for key in OF_REPORT:
        reading.refuse_different(key, paths, [report[key] for report in reports])
    for key in asked:
        reading.refuse_different(key, paths, [e.get(key) for e in evaluated])
    if not all('images' in e for e in evaluated):           # their digest; without it, how many and which
        reading.refuse_different('images', paths, [report['images'] for report in reports])
    attacks = [(set(report['args'].get('attacks') or ()) - {'clean'}, report['args'].get('transfer_from'),
                report['args'].get('verify')) for report in reports]
    if any(a != attacks[0] for a in attacks):       # of other attacks "all of the above" is another number
        rows = [row for row in rows if not row.startswith('all ')]
    lengths = set()
    for path, report in zip(paths, reports):
        for row in rows:
            if 'robust' not in report['results'][row]:
                refuse(f'{path} is without the verdict on every image: evaluate again')
            lengths.add(len(report['results'][row]['robust']))
    if len(lengths) > 1:
        refuse(f'not comparable: verdicts on {" and ".join(map(str, sorted(lengths)))} images')

    first = reports[0]
    say(f"{first['dataset']}, {first['images']}, {first['norm']} {first['eps_pixels']:g}/255")
    unsaid = [key for key in asked if 0 < sum(e.get(key) is None for e in evaluated) < len(reports)]
    if unsaid:
        say(f'note: not every report says its {", ".join(unsaid)}')
    for key in MACHINE:
        known = sorted({str(e[key]) for e in evaluated if key in e})
        if len(known) > 1:
            say(f'note: {key} differs: {", ".join(known)}')
    return rows

def table(paths, reports, clean, pgd, aa, judge):
    """Prints a line per report, the most robust on top. clean, pgd, aa: rows, or None; judge: the one that
    sorts."""
    titles = [clean or 'clean', pgd or 'pgd', (aa or 'autoattack').split(' (')[0]]
    say(f"\n{titles[0]:>8}{titles[1]:>10}{titles[2]:>12}   {'95 % interval':>15}{'worst class':>14}  report "
        f'(sorted by, interval and worst class of: {judge})')
    order = sorted(range(len(reports)), key=lambda i: -reports[i]['results'][judge]['accuracy'])
    for i in order:
        results = reports[i]['results']
        a, b, c = [f'{results[row]["accuracy"]:.2f}' if row else '-' for row in (clean, pgd, aa)]
        low, high = results[judge]['interval']
        span = f'{low:.2f} - {high:.2f}'
        say(f'{a:>8}{b:>10}{c:>12}   {span:>15}{worst(results[judge]):>14}  {paths[i]}')

def against_first(paths, reports, rows):
    """Prints the paired tests."""
    for path, other in zip(paths[1:], reports[1:]):
        say(f'\na: {paths[0]}\nb: {path}')
        say(f"{'accuracy in percent':<36}{'a':>8}{'b':>8}{'b - a':>8}{'only a':>8}{'only b':>8}{'p':>9}")
        for row in rows:
            a, b = reports[0]['results'][row], other['results'][row]
            pairs = list(zip(a['robust'], b['robust']))
            only_a, only_b = pairs.count(('1', '0')), pairs.count(('0', '1'))
            p = p_value(only_a, only_b)
            verdict = 'larger than the noise' if p < 0.05 else 'within the noise'
            say(f"{row:<36}{a['accuracy']:8.2f}{b['accuracy']:8.2f}{b['accuracy'] - a['accuracy']:8.2f}"
                f'{only_a:8}{only_b:8}{p:9.4f}  {verdict}')
    if len(reports) > 3:
        say(f'\nnote: {len(reports) - 1} comparisons: one in twenty looks larger than the noise by chance')

def scatter(file, paths, reports, clean, judge):
    """The picture: clean accuracy to the right, robust accuracy up, each with its 95 % interval."""
    try:
        import matplotlib
        from support import drawing
    except ImportError:
        refuse('--scatter needs matplotlib: pip install matplotlib')
    first = reports[0]
    with matplotlib.rc_context(drawing.STYLE):
        figure, [[axes]] = drawing.sheet(f'{first["dataset"]}, {first["images"]}', 4.2)
        labels = reading.labels(paths, reports)
        colours = drawing.colours(len(reports))
        for i, report in enumerate(reports):
            x, y = report['results'][clean], report['results'][judge]
            axes.plot(x['interval'], [y['accuracy']] * 2, color='0.8', linewidth=0.8, zorder=1)
            axes.plot([x['accuracy']] * 2, y['interval'], color='0.8', linewidth=0.8, zorder=1)
            axes.plot(x['accuracy'], y['accuracy'], drawing.MARKERS[i % 8], color=colours[i], label=labels[i],
                      zorder=2)
        axes.set(xlabel='clean accuracy, %', ylabel=f'{judge}, %')
        drawing.with_legend(figure)
        with atomic(file) as tmp:
            figure.savefig(tmp, format='png', dpi=200)
    say(file)

def side_by_side(paths, picture=None):
    """Prints the comparison of reports. picture: where the scatter plot goes."""
    reports = [reading.load(path) for path in paths]
    rows = common_rows(paths, reports)
    common = dict(results=dict.fromkeys(rows))
    clean, pgd, aa = [reading.row_of(common, *patterns) for patterns in COLUMNS.values()]
    judge = aa or pgd or rows[-1]
    if picture and (clean is None or judge == clean):
        refuse('--scatter: the reports have no clean and robust accuracy in common')
    table(paths, reports, clean, pgd, aa, judge)
    against_first(paths, reports, rows)
    if picture:
        scatter(picture, paths, reports, clean, judge)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(prog='python -m tools.compare', description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    refusals.one_line(parser)
    plain_output()
    parser.add_argument('paths', nargs='+', metavar='PATH', help='reports, or folders')
    parser.add_argument('--scatter', metavar='PNG',
                        help='draw robust against clean accuracy, with 95 %% intervals')
    args = parser.parse_args()
    folders = [path for path in args.paths if os.path.isdir(path)]
    if folders and (len(folders) < len(args.paths) or args.scatter):
        parser.error('folders are for a table alone: name no report beside them, and no --scatter')
    for i, folder in enumerate(folders):
        if i:
            say('')
        overview(folder)
    try:
        if not folders:
            side_by_side(args.paths, args.scatter)
    except OSError as e:
        parser.error(cannot_write(args.scatter, e))
