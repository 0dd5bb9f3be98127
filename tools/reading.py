"""
Reports of evaluate.py and logs of trainings: read, checked, told apart, and the network and images that they
are of.
"""
import json
import os
import re

import torch

import data
import models
from support.checkpoint import fingerprint, load_checkpoint
from support.describe import NOT_THE_RUN
from support.files import Refused
from support.imagenet import in_memory

# of a configuration, what follows from the rest or is said elsewhere
DERIVED = {'hparams', 'teachers', 'teacher_meta', 'data', 'classes', 'train_images', 'val_images',
           'precision', 'device_type', 'tf32', 'processes', 'extra_labels', 'pseudo_labels'}

def load(path, unfinished=False):
    """A report of evaluate.py. unfinished: also of one that was stopped. Raises Refused."""
    try:
        with open(path) as f:
            report = json.load(f)
        stopped = report['complete'] is False and not unfinished
        sound = stopped or is_sound(report)
    except OSError as e:
        raise Refused(f'cannot read {path}: {e.strerror}') from e
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise Refused(f'{path} is not a report of evaluate.py')
    if stopped:
        raise Refused(f'{path} is not complete: evaluate.py was stopped, and the same command continues')
    return report

def is_sound(report):
    """Is there what its readers ask for? May raise KeyError and the like."""
    for key in ('checkpoint', 'fingerprint', 'images', 'dataset', 'norm', 'args', 'trained'):
        report[key]
    if not isinstance(report['args'], dict) or not isinstance(report['trained'], dict):
        return False
    for row in report['results'].values():
        low, high = row['interval']
        if not (0 <= row['accuracy'] <= 100 and low <= high and len(row['per_class'])):
            return False
    return report['eps_pixels'] > 0 and report['model']['num_classes'] > 1 and 'clean' in report['results']

def refuse_different(name, paths, values):
    """Raises Refused if a value differs from the first; None, where an early report does not say, never
    does."""
    for path, value in zip(paths, values):
        if None not in (value, values[0]) and value != values[0]:
            raise Refused(f'not comparable: {name} is {values[0]} in {paths[0]}, {value} in {path}')

def comparable(paths):
    """label -> report. Raises Refused unless they are of one dataset and radius."""
    reports = [load(path) for path in paths]
    for name in ('dataset', 'norm', 'eps_pixels'):
        refuse_different(name, paths, [report[name] for report in reports])
    return dict(zip(labels(paths, reports), reports))

def load_log(path):
    """A log.jsonl: its configuration, and a dict per epoch. Raises Refused."""
    try:
        with open(path) as f:
            config, *rows = [json.loads(line) for line in f] or [{}]
        if not isinstance(config, dict):
            raise ValueError
        return config, [row for row in rows if {'epoch', 'loss', 'val_clean'} <= set(row)]
    except (OSError, ValueError, TypeError) as e:
        raise Refused(f'{path} is not the log of a training ({type(e).__name__})') from e

def flags_of(config):
    """Of a run's configuration, what was chosen: flag -> value."""
    return {flag: value for flag, value in config.items() if flag not in NOT_THE_RUN | DERIVED}

def differing(settings):
    """settings: a dict each of flag -> value. The same without the flags that all have, with the same value;
    what is None is left out."""
    kept = []
    for flag in dict.fromkeys(flag for one in settings for flag in one):
        values = {str(one[flag]) for one in settings if flag in one}
        if len(values) > 1:
            kept.append(flag)
    return [{flag: one[flag] for flag in kept if one.get(flag) is not None} for one in settings]

def in_words(flags):
    """{'beta': 6.0, 'awp': 0.005} -> 'beta 6, awp 0.005'."""
    words = []
    for flag, value in flags.items():
        words.append(f'{flag} {value:g}' if isinstance(value, float) else f'{flag} {value}')
    return ', '.join(words)

def labels(paths, reports):
    """A label per report: its method; of several with one method also the flags or images that differ; at
    last, the end of its path. Raises Refused for the same report twice."""
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise Refused('the same report twice')
    methods, settings = [], []
    for report in reports:
        hparams = {k: v for k, v in report['trained'].get('hparams', {}).items() if v not in (None, False)}
        name = report['trained'].get('loss') or os.path.basename(report['checkpoint'])
        methods.append(f'{name} {in_words(hparams)}'.strip())
        settings.append({**flags_of(report['trained'].get('run', {})), 'images': report['images']})

    named = list(methods)
    for method in set(methods):
        same = [i for i, other in enumerate(methods) if other == method]
        for i, flags in zip(same, differing([settings[i] for i in same])):
            if flags:
                named[i] = f'{method}; {in_words(flags)}'
    if len(set(named)) < len(named):
        return [short(path, paths) for path in paths]
    return named

def short(path, paths):
    """As much of the end of path as tells it from the other paths."""
    parts = os.path.abspath(path).removesuffix('.json').split(os.sep)
    for k in range(1, len(parts)):
        end = os.sep.join(parts[-k:])
        if sum(os.path.abspath(other).endswith(f'{end}.json') for other in paths) == 1:
            return end
    return path

def row_of(report, *patterns):
    """The name of the first row of the report that matches one of the patterns, in their order, or None."""
    for pattern in patterns:
        for row in report['results']:
            if re.fullmatch(pattern, row):
                return row
    return None

def swept(report):
    """The points of figures.against_eps that a report has from --sweep-eps; [] if there are none."""
    results = report['results']
    points = {}
    for row, result in results.items():
        if match := re.fullmatch(r'pgd-\d+ at eps (.+)', row):
            points[float(match[1])] = result
    if not points:
        return []
    points[0.0] = results['clean']
    if at_eps := row_of(report, f'pgd-{report["args"].get("steps", 20)}'):
        points[report['eps_pixels']] = results[at_eps]
    return [(eps, result['accuracy'], *result['interval']) for eps, result in points.items()]

# -----------------------------------------------------------------------------
# what they are of

def load_network(path, report, model=None):
    """The network that was evaluated. model: FILE.py:FUNCTION of a network of one's own, whose code is not
    run because a report names it. Raises Refused, also if path holds another one."""
    config = report['model']
    if '.py:' in config['name'] and not model:
        raise Refused(f'{path} is of a network of one\'s own, whose code is run only if you name it: '
                      f'--model {config["name"]}, if you trust that file')
    options = {k: config[k] for k in ('width', 'mean', 'std', 'activation') if k in config}
    name = model if '.py:' in config['name'] else config['name']
    net, _ = load_checkpoint(path, name, config['num_classes'], **options)
    if options.get('activation', net.build_args['activation']) != net.build_args['activation']:
        weights = net.state_dict()                              # evaluate.py --activation
        net = models.build(**dict(net.build_args, activation=options['activation'])).eval()
        net.load_state_dict(weights)
    if fingerprint(net) != report['fingerprint']:
        raise Refused(f'{path} is not what was evaluated (fingerprint {fingerprint(net)}, in the report '
                      f'{report["fingerprint"]}): name another --checkpoint, or none')
    return net

def find_checkpoint(path, report):
    """The one that the report in path names, where it was or beside the report; None if it is in neither."""
    beside = os.path.join(os.path.dirname(path), os.path.basename(report['checkpoint']))
    for file in (report['checkpoint'], beside):
        if os.path.exists(file):
            return file
    return None

def images_of(report, d, n, device):
    """x (B,3,H,W) and y of the test images that were evaluated, or, of another number, of the first n."""
    evaluated = report['results']['clean']['n']
    index = torch.arange(min(n or evaluated, len(d.y_test)))
    if n in (None, evaluated) and report['args'].get('draw'):
        generator = torch.Generator().manual_seed(report['args']['seed'])       # as evaluate.py --draw
        index = torch.randperm(len(d.y_test), generator=generator)[:evaluated].sort().values
    index = index.to(device)
    return data.to_float(in_memory(d.x_test[index], device)).contiguous(), d.y_test[index]

def networks(paths, checkpoints, reports, model=None):
    """Every network that was evaluated, once, and the epochs logged beside it: label -> network, label ->
    rows. checkpoints: of the reports; one for all, 'none', or None for those that they name. model: see
    load_network. Raises Refused."""
    if checkpoints is None or isinstance(checkpoints, (str, os.PathLike)):
        checkpoints = [checkpoints]
    if len(checkpoints) == 1:
        checkpoints = checkpoints * len(paths)
    if len(checkpoints) != len(paths):
        raise Refused(f'{len(checkpoints)} checkpoints for {len(paths)} reports')
    nets, logs = {}, {}
    for path, file, (label, report) in zip(paths, checkpoints, reports.items()):
        file = file or find_checkpoint(path, report)
        known = [reports[other]['fingerprint'] for other in nets]
        if file in (None, 'none') or report['fingerprint'] in known:
            continue
        nets[label] = load_network(file, report, model)
        log = os.path.join(os.path.dirname(file), 'log.jsonl')
        rows = load_log(log)[1] if os.path.exists(log) else []
        if rows:
            logs[label] = rows
    return nets, logs
