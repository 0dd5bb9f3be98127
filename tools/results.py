"""
The table of what lies in results/TABLE: ours beside the paper's, as markdown; and the pictures that are
tables of papers.
"""
import math
import os
import re
import statistics
from typing import NamedTuple

from support.files import Refused, say
from tools import reading
from tools.plan import FIRST_EPOCHS, all_flags, evaluations, filled, first_jobs, record, text_of

class Measured(NamedTuple):
    reports: dict                   # name of the evaluation -> report
    epochs: list                    # of the log
    seconds: float                  # of an epoch, without validation; NaN if unknown

def measured(plan, name, seed):
    """Of one finished run of the present commands, or None."""
    kept = f'{plan.results}/{name}-s{seed}'
    if text_of(f'{kept}.command') != record(plan, name, seed):
        return None
    try:
        reports = {evaluation: reading.load(f'{kept}.{evaluation}.json')
                   for evaluation in evaluations(plan, name, seed)}
        config, epochs = reading.load_log(f'{kept}.jsonl')
    except Refused as e:
        say(f'note: {name}, seed {seed}, is left out: {e}')
        return None
    rates = [e['img_per_s'] for e in epochs if e['img_per_s']]      # 0: continued after an epoch's last batch
    return Measured(reports, epochs, config['train_images'] / statistics.median(rates) if rates else math.nan)

def find(plan, names):
    """name of the row -> {seed: Measured}."""
    found = {}
    files = os.listdir(plan.results) if os.path.isdir(plan.results) else []
    for name in names:
        matches = [re.fullmatch(re.escape(name) + r'-s(\d+)\.command', file) for file in files]
        runs = {seed: measured(plan, name, seed) for seed in sorted(int(m[1]) for m in matches if m)}
        found[name] = {seed: run for seed, run in runs.items() if run}
    return found

# -----------------------------------------------------------------------------
# cells

def figure(values):
    """mean, and with several seeds ± standard deviation."""
    spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.1f}{spread}'

def cell(column, runs, number):
    """Ours, with the interval of the images (over seeds: the mean of its ends), and the paper's number."""
    evaluation, result, field = column
    text = '-'
    results = [run.reports[evaluation]['results'][result] for run in runs if evaluation in run.reports]
    if results:
        text = figure([r[field] for r in results])
        if field == 'accuracy':
            low, high = map(statistics.mean, zip(*[r['interval'] for r in results]))
            text += f' ({low:.1f}-{high:.1f})'
    return text if number is None else f'{text} / *{number}*'

def images_of(runs, evaluation):
    """n of the first report there is."""
    for run in runs:
        if evaluation in run.reports:
            return f', n={run.reports[evaluation]["results"]["clean"]["n"]}'
    return ''

def hold_out(runs):
    """Accuracy under PGD-20 of best.pt, with its epoch, and of last.pt; a teacher's is clean. Which epoch is
    best the reports say: standard training chooses by clean accuracy, which this column does not show."""
    key = 'val_pgd20' if 'val_pgd20' in runs[0].epochs[0] else 'val_clean'
    last = figure([run.epochs[-1][key] for run in runs]) + (', clean' if key == 'val_clean' else '')
    epochs = []
    for run in runs:
        chosen = [report['trained']['epoch'] for report in run.reports.values()
                  if report['checkpoint'].endswith('best.pt')]
        if not chosen:                      # the table is of last.pt alone
            return f'- / {last}'
        epochs.append(chosen[0])
    values = [e[key] for run, epoch in zip(runs, epochs) for e in run.epochs if e['epoch'] == epoch]
    return f'{figure(values)} ({" ".join(map(str, epochs))}) / {last}'

# -----------------------------------------------------------------------------
# the table

def notes_on(plan):
    """How to read a cell, and at what scale."""
    notes = ["Ours (95 % interval of the test images; ± standard deviation over seeds) / *the paper's*. *?*: "
             'in a picture that our copy of the paper lacks; (2nd): second-hand. A number from one seed '
             'orders nothing whose intervals overlap.']
    epochs = plan.epochs or plan.table.epochs
    if plan.table.budget is not None:
        notes.append(f'Every row: `python train_adv.py {plan.table.budget}` and its flags.')
    elif plan.scale == 'cpu':
        notes.append(f'Scale cpu: {plan.dataset}, ResNet-18 of width {plan.width}, {epochs} epochs '
                     f"(a teacher: {FIRST_EPOCHS}), one cycle to 0.2, whatever the paper has: not the "
                     "paper's setting.")
    else:
        notes.append(f"Scale paper: {plan.dataset}, the paper's own settings.")
    if plan.scale:
        notes.append('1,000 training images are held out. A test image counts as robust if it and its '
                     'adversarial image are both right.')
    return [f'- {note}' for note in notes + list(plan.table.notes)]

def markdown(plan, found):
    """The table, and every command that made it. found: what find() returns."""
    table = plan.table
    every = [run for runs in found.values() for run in runs.values()]
    titles = [title + images_of(every, column[0]) for title, column in table.columns.items()]
    heads = ['row', *titles, 'on the hold-out, best (epoch) / last', 's/epoch', 'seeds', 'flags']
    lines = [f'# {table.title}', '', *notes_on(plan), '',
             f'| {" | ".join(heads)} |', '|---' * len(heads) + '|']
    commands = []
    for name, runs in found.items():
        some, row = list(runs.values()), table.rows[name]
        if not some and table.budget is not None:
            continue
        numbers = row.paper[plan.dataset] or (None,) * len(titles)
        cells = [cell(column, some, number) for column, number in zip(table.columns.values(), numbers)]
        if some:
            cells += [hold_out(some), f'{statistics.median(run.seconds for run in some):.0f}']
        else:
            cells += ['-', '-']
        cells += [' '.join(map(str, runs)) or '-', f'`{filled(plan, row.flags) or row.script}`']
        lines.append(f'| {name} | {" | ".join(cells)} |')
        for seed in runs:
            commands += [f'python {job.command}' for job in first_jobs(plan, all_flags(plan, name)).values()]
            commands += record(plan, name, seed).splitlines()
    return '\n'.join([*lines, '', 'The commands:', '', '```sh', *dict.fromkeys(commands), '```', ''])

# -----------------------------------------------------------------------------
# pictures

def scatter(plan, found):
    """Robust against clean accuracy, a panel for each of two attackers: a Figure. Full: ours;
    hollow: the paper's."""
    from support import drawing
    columns, colours = plan.table.columns, drawing.colours(len(found))
    figure, [panels] = drawing.sheet(f'{plan.table.title}; full: ours, hollow: the paper', 3.8, columns=2)
    for axes, k in zip(panels, (2, 4)):
        for i, (name, runs) in enumerate(found.items()):
            look = dict(color=colours[i], marker=drawing.MARKERS[i % 10], linestyle='none')
            numbers = plan.table.rows[name].paper[plan.dataset] or (None,) * len(columns)
            if isinstance(numbers[0], float) and isinstance(numbers[k], float):
                axes.plot(numbers[0], numbers[k], markerfacecolor='none', **look)
            ours = [[run.reports[e]['results'][result][field] for run in runs.values()]
                    for e, result, field in columns.values()]
            if runs:
                axes.plot(statistics.mean(ours[0]), statistics.mean(ours[k]), label=name, **look)
        axes.set(xlabel='clean accuracy, %', ylabel=f'{list(columns)[k]}, %')
    return drawing.with_legend(figure)

def draw(plan, found):
    """The picture of a table that is one, if it is not there or older than a report."""
    if plan.table.picture == 'scatter':
        import matplotlib
        from support import drawing
        with matplotlib.rc_context(drawing.STYLE):
            drawing.save(scatter(plan, found), f'{plan.results}/figure')
        say(f'{plan.results}/figure.png')
    if plan.table.picture == 'tsne':
        reports = [os.path.join(plan.base, evaluations(plan, name, seed)['best'].product)
                   for name, runs in found.items() for seed in runs]
        last = f'{plan.results}/eps.png'            # the last that is drawn
        if not all(map(os.path.exists, reports)):   # the networks are elsewhere
            return
        if not os.path.exists(last) or max(map(os.path.getmtime, reports)) > os.path.getmtime(last):
            from tools import figures
            # 300 of every class are more than the reports' images at scale cpu
            figures.draw(reports, out=plan.results, data_dir=os.path.abspath(plan.data_dir), n=10_000)
