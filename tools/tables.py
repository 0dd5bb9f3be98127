"""
The papers' tables, as data for tools/reproduce.py: rows with their flags, and the numbers that the papers
print.

A number is as printed, but for zeros at its end; None: the paper has none; '?': it stands in a picture that
our copy of the paper lacks; '49.23 (2nd)': second-hand, read elsewhere and not in our copy. Papers:
1 Al-Najjar et al., "Adversarial Training without Hard Labels"; 2 Zi et al., "Revisiting Adversarial
Robustness Distillation" (as a review tells it); 3 Dallaire & David, "Mixture of techniques"; 4 Chen & Lee,
"LTD: Low Temperature Distillation".
"""
from typing import NamedTuple

class Row(NamedTuple):
    flags: str                      # the method, in every scale; {NAME} is the best.pt of Table.first[NAME]
    paper: dict = {}                # dataset -> a number per column, () for none. A row has these datasets
    settings: str | None = None     # flags at scale paper, where they are not the table's
    cpu: bool = True                # trained at scale cpu if no --rows are named
    script: str = 'train_adv.py'

class Table(NamedTuple):
    title: str
    rows: dict
    columns: dict                   # title -> (name in EVALUATIONS, row of the report, field)
    settings: str = ''              # flags at scale paper beside those of a row
    first: dict = {}                # name -> Row of a network that rows need, trained once
    seeds: tuple = (0,)             # at scale paper
    epochs: int = 20                # at scale cpu
    notes: tuple = ()
    picture: str | None = None      # 'tsne' or 'scatter'
    budget: str | None = None       # one scale only: the flags beside those of a row
    folder: str | None = None       # where its runs lie, if they are not to be named by their flags

AA = 'autoattack (worst case)'
WHITE_BOX = '--attacks fgsm pgd pgd-trades cw autoattack'
BLACK_BOX = '--attacks square --transfer-from {source} --no-audit'

# name -> checkpoint, flags of evaluate.py, and a word that has to be among the row's flags
EVALUATIONS = {
    'best':       ('best', WHITE_BOX, ''),
    'last':       ('last', f'{WHITE_BOX} --no-audit', ''),
    'best-black': ('best', BLACK_BOX, ''),
    'last-black': ('last', BLACK_BOX, ''),
    # paper 3: FGSM and PGD of two steps at 0.1 and 0.5 of the range; and, for comparison, what is usual today
    'last-weak':  ('last', '--attacks fgsm weak strong --eps 25.5 --no-audit', ''),
    'last-half':  ('last', '--attacks fgsm --eps 127.5 --no-audit', ''),
    'last-8':     ('last', '--attacks pgd autoattack --eps 8', ''),
    # small. A hybrid activation may mask its own gradients; AdvProp also through its auxiliary BN
    'pgd':        ('best', '--n 1000 --attacks pgd', ''),
    'autoattack': ('best', '--n 200 --attacks autoattack --batch-size 200 --compile', ''),
    'pgd-relu':   ('best', '--n 1000 --attacks pgd --activation relu', 'hybrid'),
    'pgd-aux':    ('best', '--n 1000 --attacks pgd --branch aux', 'advprop'),
}

BEST_AND_LAST = {
    'clean, best': ('best', 'clean', 'accuracy'), 'AutoAttack, best': ('best', AA, 'accuracy'),
    'clean, last': ('last', 'clean', 'accuracy'), 'AutoAttack, last': ('last', AA, 'accuracy'),
}
BEST = dict(list(BEST_AND_LAST.items())[:2])

# -----------------------------------------------------------------------------
# small: every method at one small budget on CIFAR-10, for a CPU. Two teachers: {standard} is trained once, on
# all training images, with the student's architecture; ROBUST is a row, the best on the hold-out

ROBUST = '--teacher runs/small/pgd_at-warm-s0/best.pt'
STANDARD = '--teacher {standard}'

def small(flags):
    return Row(flags, {'cifar10': ()})

SMALL = Table(
    'Every method at one small budget on CIFAR-10',
    rows={
        'standard':      small('--loss standard'),
        'als':           small('--loss als'),
        'pgd_at':        small('--loss pgd_at'),
        'nat_adv':       small('--loss nat_adv'),
        'alp':           small('--loss alp'),
        'trades':        small('--loss trades'),
        'trades-beta5':  small('--loss trades --beta 5'),
        'mart':          small('--loss mart'),
        'dkl':           small('--loss dkl'),
        'lbgat':         small('--loss lbgat'),
        'hat':           small(f'--loss hat {STANDARD}'),
        'ltd':           small(f'--loss ltd {STANDARD}'),
        'softmax_kl':    small(f'--loss softmax_kl --beta 0.2 {STANDARD}'),
        'softmax_kl-reverse': small(f'--loss softmax_kl --beta 0.2 --reverse {STANDARD}'),
        'logit_mse':     small(f'--loss logit_mse --beta 0.2 {STANDARD}'),
        # options that go with any loss
        'fast':          small('--loss pgd_at --steps 1 --step-size 10'),
        'free':          small('--loss pgd_at --free 4'),
        'pgd_at-warm':   small('--loss pgd_at --warm-start {standard}'),
        'logit_mse-warm': small(f'--loss logit_mse --beta 0.2 {STANDARD} --warm-start teacher'),
        'logit_mse-awp': small(f'--loss logit_mse --beta 0.2 {STANDARD} --awp 0.005'),
        'logit_mse-ema': small(f'--loss logit_mse --beta 0.2 {STANDARD} --ema 0.995'),
        'trades-awp':    small('--loss trades --awp 0.005'),
        'trades-ema':    small('--loss trades --ema 0.995'),
        # paper 3: AdvProp, adversarial label smoothing, smooth adversarial training, and their mixtures
        'advprop':       small('--loss advprop'),
        'nat_adv-als':   small('--loss nat_adv --targets als'),
        'nat_adv-smooth-act': small('--loss nat_adv --activation hybrid'),
        'advprop-als':   small('--loss advprop --targets als'),
        'advprop-act':   small('--loss advprop --activation hybrid'),
        'als-act':       small('--loss nat_adv --targets als --activation hybrid'),
        'advprop-als-act': small('--loss advprop --targets als --activation hybrid'),
        # with a robust teacher
        'ard':           small(f'--loss ard {ROBUST}'),
        'rslad':         small(f'--loss rslad {ROBUST}'),
        'iad1':          small(f'--loss iad1 {ROBUST}'),
        'iad2':          small(f'--loss iad2 {ROBUST} --standard-teacher {{standard}}'),
        'adaad':         small(f'--loss adaad {ROBUST}'),
        'adaad-standard': small(f'--loss adaad {STANDARD}'),    # what everyone tries once
        'rslad-standard': small(f'--loss rslad {STANDARD}'),
        'kd_swa':        small(f'--loss kd_swa {ROBUST} --standard-teacher {{standard}}'),
    },
    columns={
        'clean': ('pgd', 'clean', 'accuracy'), 'PGD-20': ('pgd', 'pgd-20', 'accuracy'),
        'AutoAttack': ('autoattack', AA, 'accuracy'),
        "PGD-20, ReLU's gradients": ('pgd-relu', 'pgd-20', 'accuracy'),
        'PGD-20, auxiliary BN': ('pgd-aux', 'pgd-20', 'accuracy'),
    },
    budget='--model resnet18 --width 8 --subset 5000 --epochs 3 --batch-size 64 --lr 0.1 --compile',
    folder='runs/small',
    first={'standard': Row('--out runs/small/teacher', settings='--model resnet18 --width 8 --epochs 15',
                           script='train_teacher.py')},
    notes=('No paper has this table. AutoAttack attacks a hybrid activation with the gradients of ReLU.',))

# -----------------------------------------------------------------------------
# paper 1, section 4: ResNet-18, SGD with Nesterov momentum 0.9, weight decay 5e-4, one cycle to 0.2, 100
# epochs, batch 128, PGD-10 at 8/255 with 2/255, selection by PGD-20: the defaults of train_adv.py, and so no
# flags. "Average scores over three runs"

TEACHER = {'standard': Row('', script='train_teacher.py')}          # the same recipe without an adversary

def both(c10, c100):
    return {'cifar10': c10, 'cifar100': c100}

DIRECTION = ('softmax_kl: read as the paper writes TRADES, equation 4 is KL(student || teacher), which is '
             "--reverse; distillation's usual direction is the default here. Both stand beside the one "
             'number of the paper, which is that of the logits in table 1 less its "Delta".')
HOLD_OUT = 'Selected on 1,000 held-out training images; the paper says "validation set" and not which.'
SWEEP = {           # beta: CIFAR-10 and CIFAR-100 of the logits, CIFAR-10 and CIFAR-100 of the softmax
    '0.05': ((81.12, 50.90), (52.88, 22.39), (79.96, 49.91), (55.73, 24.33)),
    '0.1':  ((84.06, 50.76), (59.08, 23.93), (81.62, 49.63), (57.68, 25.09)),
    '0.2':  ((86.33, 50.56), (62.25, 24.20), (84.71, 49.46), (58.74, 23.56)),
    '0.3':  ((86.92, 49.84), (63.96, 23.82), (85.93, 48.66), (59.57, 22.83)),
    '0.4':  ((87.71, 48.97), (65.12, 23.32), (84.68, 47.26), (60.14, 22.17)),
}
BETAS = {}
for beta, (logits10, logits100, softmax10, softmax100) in SWEEP.items():
    flags, three = f'--beta {beta} {STANDARD}', beta in ('0.1', '0.2', '0.4')
    softmax = both(softmax10, softmax100)
    BETAS[f'logit_mse-{beta}'] = Row(f'--loss logit_mse {flags}', both(logits10, logits100), cpu=three)
    BETAS[f'softmax_kl-{beta}'] = Row(f'--loss softmax_kl {flags}', softmax, cpu=three)
    BETAS[f'softmax_kl-{beta}-reverse'] = Row(f'--loss softmax_kl --reverse {flags}', softmax,
                                              cpu=beta == '0.2')
P1_TABLE1 = Table('Al-Najjar et al., table 1: the effect of beta', rows=BETAS, columns=BEST, first=TEACHER,
                  seeds=(0, 1, 2), notes=(DIRECTION, HOLD_OUT))

def compared(standard, pgd_at, trades, hat, softmax_kl, logit_mse):
    """The rows of tables 2 and 3 and of figure 1, each with its numbers on both datasets. HAT's beta is 2.5
    on CIFAR-10 and 3.5 on CIFAR-100."""
    return {
        'standard':   Row('', both(*standard), script='train_teacher.py'),
        'pgd_at':     Row('--loss pgd_at', both(*pgd_at)),
        'trades':     Row('--loss trades --beta 5', both(*trades)),
        'hat':        Row(f'--loss hat --beta 2.5 {STANDARD}', {'cifar10': hat[0]}),
        'hat-3.5':    Row(f'--loss hat --beta 3.5 {STANDARD}', {'cifar100': hat[1]}),
        'softmax_kl': Row(f'--loss softmax_kl --beta 0.2 {STANDARD}', both(*softmax_kl)),
        'logit_mse':  Row(f'--loss logit_mse --beta 0.2 {STANDARD}', both(*logit_mse)),
    }

REVERSE = Row(f'--loss softmax_kl --beta 0.2 --reverse {STANDARD}', cpu=False,
              paper=both((84.71, 49.46, None, None), (58.74, 23.56, None, None)))
P1_TABLE2 = Table(
    'Al-Najjar et al., table 2: comparison with baseline methods',
    rows={**compared(
        standard=((95.11, 0.0, None, None), (76.49, 0.0, None, None)),
        pgd_at=((84.96, 47.17, 85.71, 46.26), (56.41, 22.49, 58.93, 22.63)),
        trades=((84.09, 50.26, 84.05, 49.97), (57.23, 23.83, 57.24, 23.72)),
        hat=((85.45, 49.68, 85.9, 49.14), (58.39, 23.78, 58.39, 23.77)),
        softmax_kl=((84.71, 49.46, None, None), (58.74, 23.56, None, None)),
        logit_mse=((86.33, 50.56, 86.07, 50.63), (62.25, 24.20, 62.68, 24.16))),
          'softmax_kl-reverse': REVERSE},
    columns=BEST_AND_LAST, first=TEACHER, seeds=(0, 1, 2),
    notes=(DIRECTION, HOLD_OUT,
           'HAT: the paper states beta alone; gamma 0.5 is that of its authors for CIFAR-10.',
           'standard: that of seed 0 is the teacher of all others, and selected by clean accuracy.'))

ABSENT = ((), ())
P1_TABLE3 = Table(
    'Al-Najjar et al., table 3: class-wise standard deviation of clean and robust accuracy',
    rows=compared(
        standard=ABSENT, softmax_kl=ABSENT,
        logit_mse=((6.9, 16.0), (15.3, 17.9)), hat=((8.8, 16.5), (15.7, 17.9)),
        trades=((9.0, 17.0), (16.3, 18.3)), pgd_at=((9.4, 17.8), (19.0, 18.2))),
    columns={'std of clean, best': ('best', 'clean', 'class_std'),
             'std of AutoAttack, best': ('best', AA, 'class_std')},
    first=TEACHER, seeds=(0, 1, 2),
    notes=('Over the classes, of accuracy in percent. On n images of K classes noise alone makes up to '
           '50 sqrt(K / n) of it: 5 points at n = 1,000 and ten classes.',
           'The paper does not say whether best or last, nor which standard deviation: best, and that of the '
           'population; with ten classes that of a sample is 5 % larger.'))

P1_FIGURE1 = Table(
    'Al-Najjar et al., figure 1: t-SNE of the logits of 300 test images per class',
    rows=compared(ABSENT, ABSENT, ABSENT, ABSENT, ABSENT, ABSENT), columns=BEST,
    first=TEACHER, picture='tsne',
    notes=('The paper attacks with "the setup described in section 4", PGD-10 at 8/255 with 2/255; the '
           'pictures here are under PGD-20, of the first 300 images of a class, where the paper draws them.',
           "The paper's picture is not in our copy of it."))

# -----------------------------------------------------------------------------
# paper 2: 300 epochs, lr 0.1 divided by ten at 215, 260 and 285, momentum 0.9, weight decay 2e-4, batch 128,
# PGD-10 at 8/255 with 2/255; SAT, TRADES, ARD, IAD "consistent to that in their papers": --recipe paper. Its
# tables are pictures in our copy; second-hand are AutoAttack on the best ResNet-18s, and two of their clean
# accuracies

P2_NOTES = (
    "The paper's tables are pictures that our copy lacks: only AutoAttack on the best ResNet-18s is known, "
    'second-hand. The review says that the best RSLAD is 2.26 points ahead, and 51.49 - 49.23 is that.',
    "The paper's teacher is the released TRADES WRN-34-10; here one is trained, by TRADES' recipe. At scale "
    'cpu it is the row trades, no larger than the student.', 'PGD by TRADES: 20 steps of 0.003 of the range.',
    'iad1: the review says "IAD" alone. ard and iad1 drop the rate twice, as in their papers; in the code '
    'that the authors of this one say they ran, the second drop never happens.')
KNOWN = {
    'pgd_at': ('83.38 (2nd)', '45.83 (2nd)'), 'trades': ('?', '49.23 (2nd)'), 'ard': ('?', '49.19 (2nd)'),
    'iad1': ('?', '49.10 (2nd)'), 'rslad': ('83.38 (2nd)', '51.49 (2nd)'),
}
P2 = '--epochs 300 --schedule step --lr 0.1 --milestones 0.7167 0.8667 0.95 --weight-decay 2e-4 --no-nesterov'
LOSSES = {
    'standard': '', 'pgd_at': '--loss pgd_at', 'trades': '--loss trades',
    'ard': '--loss ard --teacher {robust}',
    'iad1': '--loss iad1 --teacher {robust}', 'rslad': '--loss rslad --teacher {robust}',
}

def students(columns, known=()):
    """Rows of ResNet-18 and MobileNetV2. known: method -> numbers of the ResNet-18, where some are known."""
    rows = {}
    for network, model in (('', ''), ('mobilenetv2-', '--model mobilenetv2')):
        for name, flags in LOSSES.items():
            numbers = ('?',) * columns if network or name not in known else known[name]
            rows[f'{network}{name}'] = Row(f'{flags} {model}'.strip(), {'cifar10': numbers}, cpu=not network,
                                           settings=None if flags else P2,
                                           script='train_adv.py' if flags else 'train_teacher.py')
    return rows

def by_checkpoint(columns):
    """Each of the columns (title -> row of the report) at best and at last."""
    return {f'{title}, {which}': (f'{which}{evaluation}', row, 'accuracy')
            for which in ('best', 'last') for title, (evaluation, row) in columns.items()}

FIRST = {
    'robust': Row('--loss trades', settings='--recipe paper --model wrn-34-10'),
    'source': Row('--loss pgd_at --model resnet50', settings='--recipe paper'),
}
P2_WHITEBOX = Table(
    'Zi et al., white-box robustness on CIFAR-10 (table 2 in the review)',
    rows=students(12, {name: (clean, *'????', aa, *'??????') for name, (clean, aa) in KNOWN.items()}),
    columns=by_checkpoint({
        'clean': ('', 'clean'), 'FGSM': ('', 'fgsm'), 'PGD-20 (SAT)': ('', 'pgd-20'),
        'PGD-20 (TRADES)': ('', 'pgd-trades'), 'CW-20': ('', 'cw-20'), 'AutoAttack': ('', AA)}),
    settings='--recipe paper', first={'robust': FIRST['robust']}, notes=P2_NOTES)
P2_BLACKBOX = Table(
    'Zi et al., black-box robustness on CIFAR-10 (table 4 in the review)',
    rows=students(6),
    columns=by_checkpoint({
        'PGD-20, transferred': ('-black', 'transfer'), 'CW-20, transferred': ('-black', 'transfer-cw'),
        'Square': ('-black', 'square')}),
    settings='--recipe paper', first=FIRST,
    notes=(P2_NOTES[1],
           'Transferred from "a robust ResNet-50"; how it was trained is not said: by PGD-AT here.',
           "The paper's table is a picture that our copy lacks."))

# -----------------------------------------------------------------------------
# paper 3: ResNet-18, 100 epochs, "a decreasing learning rate", PGD of two steps at eps 0.1 (25.5 pixels) with
# "a very small step-size", 2/255 as in the heading of its column, from x itself; table 2: eps and step 0.5.
# It mentions no selection: last

WEAK = '--eps 25.5 --step-size 2 --steps 2 --init zero'
HALF = '--eps 127.5 --step-size 127.5 --steps 2 --init zero'
P3_COLUMNS = {
    'clean': ('last-weak', 'clean', 'accuracy'), 'FGSM 0.1': ('last-weak', 'fgsm', 'accuracy'),
    'PGD-2 0.1, step 2/255': ('last-weak', 'weak', 'accuracy'), 'FGSM 0.5': ('last-half', 'fgsm', 'accuracy'),
    'PGD-2 0.5, step 0.5': ('last-weak', 'strong', 'accuracy'),
    'AutoAttack 8/255': ('last-8', AA, 'accuracy'),
}
P3_NOTES = (
    'The paper states no optimiser, learning rate and batch (the defaults here), of the schedule '
    '"decreasing" (a cosine at scale paper), no alpha of ALS (0.1) and no branch of BN for the attack of '
    'AdvProp (the auxiliary one). The attack starts at x; the loss is the mean of the two cross-entropies. '
    'AutoAttack is not in the paper; it attacks the hybrid activation (SAT) with the gradients of ReLU, FGSM '
    'and PGD with its own.',
    'AdvProp is evaluated through its main BN, as in the paper.')
P3 = dict(settings='--schedule cosine')

def p3(flags, *numbers):
    return Row(flags, {'cifar10': numbers})

P3_TABLE1 = Table(
    'Dallaire & David, table 1: AdvProp, ALS and SAT, alone and together',
    rows={
        'traditional':  p3('--loss standard', 91.87, 47.18, 40.85, 42.51, 11.28, None),
        'adversarial':  p3(f'--loss nat_adv {WEAK}', 92.11, 75.92, 79.84, 60.60, 28.40, None),
        'advprop':      p3(f'--loss advprop {WEAK}', 93.16, 59.46, 56.04, 50.91, 18.07, None),
        'advprop-main': p3(f'--loss advprop --craft-branch main {WEAK}',
                           93.16, 59.46, 56.04, 50.91, 18.07, None)._replace(cpu=False),
        'als':          p3('--loss als', 90.61, 48.51, 41.65, 41.44, 14.49, None),
        'sat':          p3(f'--loss nat_adv --activation hybrid {WEAK}',
                           91.55, 75.53, 78.23, 60.63, 32.07, None),
        'als-sat':      p3(f'--loss nat_adv --targets als --activation hybrid {WEAK}',
                           91.73, 74.87, 78.04, 59.23, 33.18, None),
        'sat-advprop':  p3(f'--loss advprop --activation hybrid {WEAK}',
                           93.15, 58.59, 52.74, 49.90, 19.48, None),
        'als-advprop':  p3(f'--loss advprop --targets als {WEAK}', 93.14, 59.14, 56.23, 49.16, 19.90, None),
        'als-sat-advprop': p3(f'--loss advprop --targets als --activation hybrid {WEAK}',
                              92.38, 56.96, 49.79, 47.46, 18.32, None),
    },
    columns=P3_COLUMNS, **P3,
    notes=(*P3_NOTES, 'advprop-main: crafted through the main BN, as algorithm 1 reads to the letter.'))
P3_TABLE2 = Table(
    'Dallaire & David, table 2: trained with eps and step 0.5',
    rows={
        'sat':         p3(f'--loss nat_adv --activation hybrid {HALF}',
                          90.79, 61.61, 41.45, 60.27, 85.21, None),
        'advprop':     p3(f'--loss advprop {HALF}', 91.52, 54.46, 49.20, 45.47, 10.35, None),
        'adversarial': p3(f'--loss nat_adv {HALF}', 90.97, 65.81, 45.39, 64.54, 81.19, None),
    },
    columns=P3_COLUMNS, **P3,
    notes=(*P3_NOTES, 'Within 0.5 every image can be made grey: an accuracy above chance there says that the '
           'attack is weak, and one above that at 0.1 that gradients are masked.'))
P3_FIGURE4 = P3_TABLE1._replace(
    title='Dallaire & David, figure 4: accuracy on the test set against robustness', picture='scatter',
    notes=(*P3_NOTES, "The paper's picture is not in our copy; its points are those of table 1, and its two "
           'attackers are taken to be the two PGDs.'))

# -----------------------------------------------------------------------------
# paper 4, appendix A.2: WRN-34-10, 120 epochs, lr 0.1 divided by ten at 80 and 100, Nesterov momentum 0.9,
# weight decay 5e-4, PGD-8; lambda "about 6.0": ltd's --recipe paper. Teachers have the same architecture and
# configuration

WRN = '--model wrn-34-10'
STEPS = '--epochs 120 --schedule step --lr 0.1 --milestones 0.6667 0.8333 --weight-decay 5e-4 --nesterov'
P4 = dict(settings=f'{WRN} --recipe paper', first={
    'standard':   Row('', settings=f'{WRN} {STEPS}', script='train_teacher.py'),
    'standard20': Row('', settings=f'--model wrn-34-20 {STEPS}', script='train_teacher.py'),
})
P4_NOTES = ('The paper does not say whether its numbers are of the best epoch or of the last; they stand '
            'beside best. Nor does it state the step of the attack: 2/255 here. Section 4.2 says that the '
            'attack uses y, equation 29 and its framework, TRADES, that it climbs the KL, as here; '
            '--inner ce is the other reading. BN is in eval mode in the attack, as in the code of TRADES.',
            "TRADES' 84.92 and 53.08 are of its authors' network, trained and attacked at 0.031, "
            'not at 8/255.')
# Wu et al.'s own settings (their code), of which paper 4 states nothing. Of CIFAR-10 it quotes their
# TRADES-AWP, which counts epochs from 1, and perturbs from epoch 10 on; of CIFAR-100 their AT-AWP
TRADES_AWP = ('--epochs 200 --schedule step --lr 0.1 --milestones 0.495 0.745 --weight-decay 5e-4 '
              '--no-nesterov --awp-warmup 0.045')
AT_AWP = ('--epochs 200 --schedule step --lr 0.1 --milestones 0.5 0.75 --weight-decay 5e-4 --no-nesterov '
          '--awp-warmup 0 --normalize --attack-bn moving')

P4_TABLE1 = Table(
    'Chen & Lee, table 1 (CIFAR-100: table 2): with and without LTD',
    rows={
        'trades':      Row('--loss trades', {'cifar10': (84.92, 53.08, None, None)}),
        'trades-same': Row('--loss trades', both((), ()), settings=f'{WRN} {STEPS} --steps 8', cpu=False),
        'ltd':         Row(f'--loss ltd --tau 5 {STANDARD}', both((85.63, 55.09, None, None), ())),
        'awp':         Row('--loss trades --awp 0.005', settings=f'{WRN} {TRADES_AWP}',
                           paper=both((85.36, 56.17, None, None), ())),
        'at-awp':      Row('--loss pgd_at --awp 0.01', settings=f'{WRN} {AT_AWP}',
                           paper={'cifar100': (60.38, 28.86, None, None)}),
        'awp-ltd':     Row(f'--loss ltd --tau 5 --awp 0.005 {STANDARD}',
                           paper=both((85.21, 56.90, None, None), (64.32, 31.13, None, None)),
                           settings=f'{WRN} --recipe paper --awp-warmup 0.075'),
        'awp-ltd-wrn-34-20': Row('--loss ltd --tau 5 --awp 0.005 --teacher {standard20}',
                                 {'cifar10': (86.28, 58.19, None, None)}, cpu=False,
                                 settings='--model wrn-34-20 --recipe paper --awp-warmup 0.075'),
    },
    columns=BEST_AND_LAST, **P4,
    notes=(*P4_NOTES,
           "trades, awp, at-awp: the paper quotes their authors' networks, and so they have their authors' "
           "settings here (but at-awp also rotates images); trades-same has LTD's, which tells the labels' "
           "part from the settings'. On CIFAR-100 the paper's number of AWP is that of at-awp.",
           'AWP of LTD: gamma and warm-up are not stated; 0.005, and from epoch 10 on, are those of the code '
           'it builds on. The temperature on CIFAR-100 is not stated: 5 here.'))
P4_TABLE4 = Table(
    'Chen & Lee, table 4: TRADES + LTD after each of the attacks of AutoAttack',
    rows={'ltd': Row(f'--loss ltd --tau 5 {STANDARD}', {'cifar10': (85.63, 58.37, 55.09, 55.09, 55.09)})},
    columns={'clean': ('best', 'clean', 'accuracy'),
             'APGD-CE': ('best', 'autoattack, after apgd-ce', 'accuracy'),
             '+ APGD-T': ('best', 'autoattack, after apgd-t', 'accuracy'),
             '+ FAB-T': ('best', 'autoattack, after fab-t', 'accuracy'),
             '+ Square': ('best', 'autoattack, after square', 'accuracy')}, **P4, notes=P4_NOTES)
P4_TABLE5 = Table(
    'Chen & Lee, table 5: the order in which x and x_adv update BN',
    rows={order: Row(f'--loss ltd --tau 5 --bn-order {order} {STANDARD}', {'cifar10': (*numbers, None, None)})
          for order, numbers in {'adv-nat': (85.89, 54.95), 'nat-adv': (85.63, 55.09), 'nat': (10.0, '\\*'),
                                 'adv': (10.0, '\\*')}.items()},
    columns=BEST_AND_LAST, **P4,
    notes=(*P4_NOTES, "nat and adv: the paper's trainings failed; how it passes the other images through BN "
           'is not stated: here in training mode, and the running statistics stay.'))
TEMPERATURES = {
    '1': (84.51, 54.38), '2': (84.96, 54.90), '3': (85.48, 55.03), '5': (86.20, 55.09), '8': (85.23, 54.63),
    '10': (84.72, 53.56), '12': (77.45, 43.85), '15': (94.72, 0.00), '20': (94.39, 0.00),
    '50': (86.63, '\\*'),
}
COOL = {}
for tau, numbers in TEMPERATURES.items():
    COOL[f'T={tau}'] = Row(f'--loss ltd --tau {tau} {STANDARD}', {'cifar10': (*numbers, None, None)},
                           cpu=tau in ('1', '3', '5', '10', '15'))
P4_TABLE6 = Table(
    'Chen & Lee, table 6: the temperature of the teacher',
    rows={'trades': Row('--loss trades', {'cifar10': (84.92, 53.08, None, None)}), **COOL},
    columns=BEST_AND_LAST, **P4, epochs=10,
    notes=(*P4_NOTES, "The paper's clean accuracy at T=5 is 86.20 here and 85.63 in its tables 1 and 4, of "
           'the same method. That at T=50 is perhaps of the first step of its search, '
           'on clean images alone.'))

TABLES = {
    'small': SMALL,
    'p1-table1': P1_TABLE1, 'p1-table2': P1_TABLE2, 'p1-table3': P1_TABLE3, 'p1-figure1': P1_FIGURE1,
    'p2-whitebox': P2_WHITEBOX, 'p2-blackbox': P2_BLACKBOX,
    'p3-table1': P3_TABLE1, 'p3-table2': P3_TABLE2, 'p3-figure4': P3_FIGURE4,
    'p4-table1': P4_TABLE1, 'p4-table4': P4_TABLE4, 'p4-table5': P4_TABLE5, 'p4-table6': P4_TABLE6,
}
