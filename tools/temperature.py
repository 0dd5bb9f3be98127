"""
The temperature of low temperature distillation (Chen & Lee, section 4.3), searched in two steps on held-out
training images; the test set takes no part.

$ python -m tools.temperature --width 8 --epochs 10 --compile         # on a CPU: a training per temperature
$ python -m tools.temperature --threshold 90 --model wrn-34-10 --recipe paper --teacher runs/x/best.pt
$ python -m tools.temperature --dry-run --grid 1 2 5 10 20 --width 8      # the trainings of both steps

1. tau_max: the highest of --grid whose student, trained by equation 28 on clean images only, ends above
   --threshold.
2. Of the temperatures up to tau_max, the one whose best.pt, trained by all of equation 28, is most robust;
   --refine tries N more between the best and its better neighbour. Robust is an image that withstands PGD-20
   on the cross-entropy and on the margin. Beside each point stands the masking audit (support/audit.py): at
   high temperatures PGD sees nothing and robustness is an illusion, so a point under suspicion is shown and
   not chosen.

Flags that are not named below go to train_adv.py. What is trained is taken, what was cut is continued, and a
point that was judged is not judged again: --out holds them all.
"""
import argparse
import json
import math
import os
import shlex
import sys

import torch
import torch.nn.functional as F

import data
from attacks import attack_mode, cw_margin, pgd
from support import audit, checkpoint, files, refusals
from support.summary import wilson
from support.files import Refused, atomic, say
from support.shards import progress
from tools.plan import Job, Place, folder_of, head, log_of, shown
from tools.reproduce import train

GRID = [1, 2, 3, 5, 8, 10, 12, 15, 20, 50]          # table 6
DROP = 5.0              # points that a student on clean images may lose to its teacher, without --threshold

# -----------------------------------------------------------------------------
# trainings

def job_of(flags, tau, clean_only):
    """The training at one temperature. clean_only: equation 28 without its second term, and BN that sees x
    alone."""
    command = f'train_adv.py --loss ltd --tau {tau:g} {flags}'
    if clean_only:
        command += ' --beta 0 --steps 1 --bn-order nat'     # the attack has no weight: as short as it may be
    return Job(folder_of(command), command)

def trained(place, job):
    """Trains it if need be; -> its folder. Raises Refused if that fails."""
    problem = train(place, job)
    if problem:
        raise Refused(f'{problem}: the same command continues')
    return os.path.join(place.base, job.product)

def tau_max(grid, accuracy, threshold):
    """The highest of the grid whose accuracy(tau) is above the threshold, from the top down; None if none
    is."""
    for tau in sorted(grid, reverse=True):
        if accuracy(tau) > threshold:
            return tau
    return None

def better_neighbour(points, best):
    """Of the temperatures beside best in points (tau -> robustness), the more robust; None if there is
    none."""
    order = sorted(points)
    k = order.index(best)
    beside = order[max(0, k - 1):k] + order[k + 1:k + 2]
    return max(beside, key=points.get, default=None)

# -----------------------------------------------------------------------------
# a point: the held-out images under two attacks, and the audit

def judge(net, x, y, eps, norm, audited):
    """x (N,C,H,W) and y (N,), held out. -> figures of one student, as JSON. eps: in units of [0, 1]. audited:
    images for the audit."""
    def on_cross_entropy(x_adv, y):
        return F.cross_entropy(net(x_adv), y, reduction='none')
    def on_margin(x_adv, y):
        return cw_margin(net(x_adv), y)
    size, right = (500 if x.is_cuda else 50), {'clean': [], 'pgd': [], 'margin': []}
    torch.manual_seed(0)
    with attack_mode(net):
        for _, (x_part, y_part) in progress(list(zip(x.split(size), y.split(size))), 'held-out images'):
            with torch.no_grad():
                right['clean'].append(net(x_part).argmax(1) == y_part)
            for name, climbed in (('pgd', on_cross_entropy), ('margin', on_margin)):
                x_adv = pgd(lambda x_adv: climbed(x_adv, y_part), x_part,
                            eps=eps, step_size=eps / 4, steps=20, norm=norm)
                with torch.no_grad():
                    right[name].append(net(x_adv).argmax(1) == y_part)
    right = {name: torch.cat(parts) for name, parts in right.items()}
    right['robust'] = right['clean'] & right['pgd'] & right['margin']
    figures = {name: 100 * mask.float().mean().item() for name, mask in right.items()}
    checks = audit.audit(net, x[:audited], y[:audited], eps=eps, norm=norm)
    interval = wilson(right['robust'].sum().item(), len(y))
    return dict(figures, n=len(y), interval=interval, audit=audit.overall(checks),
                suspicious=[check.name for check in checks if check.verdict == 'suspicious'])

def choose(points):
    """The temperature of the most robust point that the audit does not suspect, the lower of a tie; None
    without one. points: tau -> what judge() returns."""
    sound = [tau for tau, point in points.items() if not point['suspicious']]
    return max(sorted(sound), key=lambda tau: points[tau]['robust'], default=None)

def table(step1, points, threshold, highest, best):
    """Both steps as markdown."""
    lines = ['# The temperature of the teacher, on held-out training images', '',
             f'Step 1: trained on clean images only, above {threshold:.1f} %: tau_max = {highest or "none"}',
             '',             '| tau | clean |', '|---|---|']
    lines += [f'| {tau:g} | {clean:.1f} |' for tau, clean in sorted(step1.items())]
    if points:
        n = next(iter(points.values()))['n']
        lines += ['', f'Step 2: n={n}; best: {best or "none that the audit does not suspect"}', '',
                  '| tau | clean | PGD-20 on CE | on the margin | both (95 %) | epoch | masking audit |',
                  '|---' * 7 + '|']
    for tau, p in sorted(points.items()):
        low, high = p['interval']
        verdict = p['audit'].removeprefix('masking audit: ')
        lines.append(f'| {tau:g} | {p["clean"]:.1f} | {p["pgd"]:.1f} | {p["margin"]:.1f} | {p["robust"]:.1f} '
                     f'({low:.1f}-{high:.1f}) | {p["epoch"]} | {verdict} |')
    return '\n'.join([*lines, ''])

# -----------------------------------------------------------------------------

class Search:
    """The points of both steps. judged: what --out held already, of the same flags."""
    def __init__(self, args, flags, place):
        self.args, self.flags, self.place = args, flags, place
        self.step1, self.points, self.dataset = {}, {}, None
        self.judged = {}
        if os.path.exists(args.out):
            self.judged = self.begun()
        files.check_writable(args.out)

    def begun(self):
        """The points in --out. Raises Refused for anything but a search with these flags."""
        try:
            with open(self.args.out) as f:
                before = json.load(f)
            flags, points = before['flags'], dict(before['points'])
            sound = all({'clean', 'robust', 'audit'} <= point.keys() for point in points.values())
        except OSError as e:
            raise Refused(f'cannot read {self.args.out}: {e.strerror}') from e
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise Refused(f'{self.args.out} is there already, and no search: choose another --out') from e
        if flags != self.flags:
            raise Refused(f'{self.args.out} holds a search with other flags ({flags or "none"}): '
                          'choose another --out')
        if not sound:
            raise Refused(f'{self.args.out} is there already, and damaged: choose another --out')
        return points

    def accuracy(self, tau):
        """Step 1: clean accuracy, in percent, on the hold-out after the last epoch."""
        folder = trained(self.place, job_of(self.flags, tau, clean_only=True))
        self.step1[tau] = log_of(folder)[1][-1]['val_clean']
        say(f'step 1, tau {tau:g}: {self.step1[tau]:.1f} % clean, trained on clean images only')
        return self.step1[tau]

    def teacher_accuracy(self, tau):
        """On the hold-out, as its own training stored it, or else as ours found it."""
        config, _ = log_of(trained(self.place, job_of(self.flags, tau, clean_only=True)))
        teacher = config['teachers']['teacher']
        return teacher['val_clean'] if teacher['stored_clean'] is None else teacher['stored_clean']

    def hold_out(self, args):
        """Images and labels; of the dataset nothing else is looked at. args: of train_adv.py."""
        if self.dataset is None:
            device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
            d = data.load(args.dataset, self.place.data_dir, subset=args.subset, subset_seed=args.subset_seed,
                          augment=args.augment, device=device)
            self.dataset = data.to_float(d.x_val).contiguous(), d.y_val
        return self.dataset

    def point(self, tau):
        """Step 2: trains and judges one temperature."""
        job = job_of(self.flags, tau, clean_only=False)
        best = f'{trained(self.place, job)}/best.pt'
        args = head(job.command)['args']
        net, meta = checkpoint.load_checkpoint(best, args.model)
        known = self.judged.get(f'{tau:g}')
        asked = dict(fingerprint=checkpoint.fingerprint(net), audited=self.args.audited)
        if not known or any(known.get(k) != v for k, v in asked.items()):
            x, y = self.hold_out(args)
            known = judge(net.to(x.device), x, y, meta['eps'] / 255, meta['norm'], self.args.audited)
            known.update(asked, epoch=meta['epoch'], checkpoint=f'{job.product}/best.pt')
        self.points[tau] = known
        say(f'step 2, tau {tau:g}: {known["clean"]:.1f} % clean, {known["robust"]:.1f} % robust; '
            f'{known["audit"]}')
        self.write()

    def write(self, **more):
        step1 = {f'{tau:g}': clean for tau, clean in self.step1.items()}
        points = {f'{tau:g}': point for tau, point in self.points.items()}
        content = dict(step1=step1, points={**self.judged, **points}, flags=self.flags, **more)
        with atomic(self.args.out) as tmp, open(tmp, 'w') as f:
            json.dump(content, f, indent=1)

    def run(self):
        grid = sorted(self.args.grid)
        threshold = self.args.threshold
        if threshold is None:
            threshold = self.teacher_accuracy(grid[-1]) - DROP
        highest = tau_max(grid, self.accuracy, threshold)
        for tau in [tau for tau in grid if highest and tau <= highest]:
            self.point(tau)
        for _ in range(self.args.refine):
            best = choose(self.points)
            beside = best and better_neighbour({tau: p['robust'] for tau, p in self.points.items()}, best)
            between = beside and float(f'{math.sqrt(best * beside):.3g}')
            if not between or between in self.points:
                break
            self.point(between)
        best = choose(self.points)
        self.write(threshold=threshold, tau_max=highest, tau_best=best)
        text = table(self.step1, self.points, threshold, highest, best)
        with atomic(f'{os.path.splitext(self.args.out)[0]}.md') as tmp, open(tmp, 'w') as f:
            f.write(text)
        say(text)

def main(argv=None):
    parser = argparse.ArgumentParser(prog='python -m tools.temperature', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    refusals.one_line(parser)
    files.plain_output()
    arg = parser.add_argument
    arg('--grid', nargs='+', type=float, default=GRID, metavar='TAU')
    arg('--threshold', type=float, metavar='PERCENT',
        help=f"of clean accuracy (default: the teacher's, less {DROP:g})")
    arg('--refine', type=int, default=0, metavar='N')
    arg('--audited', type=int, default=100, metavar='N', help='held-out images of the audit (default: 100)')
    arg('--data-dir', default='data')
    arg('--runs', default='runs', metavar='DIR', help='where runs lie and go: a folder called runs')
    arg('--out', default='results/temperature.json', metavar='JSON', help='points; the table goes beside it')
    arg('--dry-run', action='store_true', help='print the trainings of both steps')
    args, rest = parser.parse_known_args(argv)
    runs = os.path.abspath(args.runs)
    for taken in ('--loss', '--tau', '--out', '--resume', '--bn-order'):
        if any(word.split('=')[0] == taken for word in rest):
            parser.error(f'{taken} is set by this tool')
    if min(args.grid) < 1:
        parser.error(f'--grid {min(args.grid):g}: temperatures are at least 1')
    if not all(math.isfinite(value) for value in (*args.grid, args.threshold or 0)):
        parser.error('--grid and --threshold: finite numbers')
    if args.out.endswith('.md'):
        parser.error(f'--out {args.out}: that is the table, which goes beside it; a name that ends in .json')
    if args.refine < 0 or args.audited < 1:
        parser.error('--refine is at least 0, --audited at least 1')
    if os.path.basename(runs) != 'runs':
        parser.error(f'--runs {args.runs}: a folder called runs, as the training scripts name it')
    place = Place(os.path.dirname(runs), os.path.dirname(os.path.abspath(args.out)), args.data_dir)
    flags = shlex.join(rest)
    if args.dry_run:
        for clean_only in (True, False):
            for tau in sorted(args.grid, reverse=clean_only):
                say(shown(place, job_of(flags, tau, clean_only)))
        sys.exit()
    search = Search(args, flags, place)
    try:
        search.run()
    except KeyboardInterrupt:
        sys.exit('\nstopped; the same command continues')

if __name__ == '__main__':
    main()
