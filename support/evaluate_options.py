"""
The flags of evaluate.py, what the checkpoint says where they say nothing, and which of them do not go
together.
"""
import re

import data, models
from support import refusals
from support.autoattack import PARTS
from support.checkpoint import is_ours
from support.files import Refused

DEFAULT = ['clean', 'fgsm', 'pgd', 'cw', 'autoattack']

def add_args(parser):
    g = parser.add_argument_group('data and attack, in pixels (0..255); a checkpoint of ours says it itself')
    g.add_argument('--dataset', help=f'{" ".join(data.DATASETS)}, or the NAME of DIR/NAME.npz')
    g.add_argument('--data-dir', metavar='DIR')
    g.add_argument('--eps', type=float, help="radius (default: the dataset's, 8 for CIFAR; of --norm L2 128, the usual 0.5)")
    g.add_argument('--step-size', type=float, help='default: eps / 4')
    g.add_argument('--norm', choices=['Linf', 'L2'])
    g = parser.add_argument_group("somebody else's weights")
    g.add_argument('--model', help=f'{models.NAMES}, or FILE.py:FUNCTION that returns the network')
    g.add_argument('--width', type=int, help="channels of the first layer (default: the paper's)")
    g.add_argument('--mean', type=float, nargs=3,
                   help='of the normalisation it was trained with, in [0, 1] (default: none)')
    g.add_argument('--std', type=float, nargs=3)
    g = parser.add_argument_group('evaluation')
    g.add_argument('--branch', choices=['main', 'aux'], help='of dual BN (default: as validated in training)')
    g.add_argument('--activation', choices=models.ACTIVATIONS,
                   help="of foreign weights (default: relu), or another than the checkpoint's: relu attacks "
                        "a hybrid with ReLU's own gradients")
    g.add_argument('--attacks', nargs='+', metavar='NAME',
                   choices=[*DEFAULT, 'aa-fast', *PARTS, 'weak', 'strong'],
                   help=f'{" ".join(DEFAULT)} (the default); aa-fast: its first two parts; or a part alone: '
                        f"{' '.join(PARTS)}; weak, strong: Dallaire et al.'s, PGD of 2 steps from x, eps 0.1 "
                        'and step 2/255, eps 0.5 and step 0.5, in units of [0, 1]')
    g.add_argument('--transfer-from', metavar='PT', help='also PGD crafted on this network')
    g.add_argument('--sweep-eps', nargs='+', type=float, default=[], metavar='EPS',
                   help='also PGD at each of these, in pixels, the step in proportion')
    g.add_argument('--sweep-steps', nargs='+', type=int, default=[], metavar='K', help='also PGD of so many')
    g.add_argument('--n', type=int, help='the first N test images (default: all)')
    g.add_argument('--steps', type=int, default=20, help='of pgd and cw')
    g.add_argument('--restarts', type=int, default=1, help='of pgd and cw')
    g.add_argument('--individual', action='store_true',
                   help='run every part of AutoAttack also on the images that the parts before it broke: '
                        'its accuracy alone')
    g.add_argument('--batch-size', type=int,
                   help='default: 250, on a CPU 50, which its cache holds, fewer if they are large; '
                        'AutoAttack draws its noise per batch')
    g.add_argument('--compile', action='store_true',
                   help='faster after a minute: the attacks search on the compiled network, '
                        'the verdict is eager')
    g.add_argument('--fast', action='store_true',
                   help='--compile, BN folded, and AutoAttack in bf16 first, on a GPU that has it')
    g.add_argument('--no-audit', dest='audit', action='store_false',
                   help='skip the search for masked gradients on the first 100 images')
    g.add_argument('--save-adv', metavar='PT',
                   help="keep every image's worst x_adv within eps, float32; on the way, as much disk per "
                        'attack')
    g.add_argument('--verify', metavar='PT', help='what --save-adv kept, judged again; alone: no attack')
    g.add_argument('--figures', action='store_true', help='draw the report (figures.py)')
    g.add_argument('--seed', type=int, default=0)
    g.add_argument('--shard', default='0/1', metavar='I/N',
                   help='the I-th of N processes that evaluate together; they have to see one folder')
    g.add_argument('--out', metavar='JSON', help='default: beside the checkpoint')

def resolve(args, ckpt):
    """Fill in what args leaves open, from ckpt, the content of args.checkpoint, if it is one of ours. -> the
    run that it was trained in, {} if unknown, and --shard as two numbers. Raises Refused, one line, for
    what cannot be evaluated."""
    args.attacks = args.attacks or (['clean'] if args.verify else DEFAULT)
    args.compile = args.compile or args.fast
    for name in ('steps', 'restarts', 'batch_size', 'sweep_steps'):
        value = getattr(args, name) if name != 'sweep_steps' else min(args.sweep_steps, default=1)
        if value is not None and value < 1:
            raise Refused(f'--{name.replace("_", "-")} {value}: at least 1')
    shard = re.fullmatch(r'(\d+)/(\d+)', args.shard)
    shard = shard and (int(shard[1]), int(shard[2]))
    if not shard or shard[0] >= shard[1]:
        raise Refused(f'--shard {args.shard}: I/N with I from 0 to N-1')
    ours = is_ours(ckpt)
    if ours and (args.model or args.width or args.mean):
        raise Refused(f'{args.checkpoint} says itself what it is: drop --model, --width, --mean and --std')
    if (args.mean is None) != (args.std is None):
        raise Refused('--mean and --std go together')
    run = ckpt.get('run', {}) if ours else {}
    args.dataset = args.dataset or run.get('dataset', 'cifar10')
    args.data_dir = args.data_dir or run.get('data_dir', 'data')
    trained = run.get('norm', 'Linf')
    args.norm = args.norm or trained
    if args.eps is None and args.norm == trained:       # 8 of Linf would be nothing in L2
        args.eps = run.get('eps')
    if args.eps is None:
        args.eps = 128.0 if args.norm == 'L2' else data.row(args.dataset, args.data_dir)['eps']
    refusals.attack(args)
    for value in args.sweep_eps:
        if value and (value < 1 or args.norm == 'Linf' and value > 255):
            raise Refused(f'--sweep-eps {value:g}: eps is in pixels, 0 or 1 to 255 (L2: 255 times the usual radius)')
    if args.norm == 'L2' and {'weak', 'strong'} & set(args.attacks):
        raise Refused('weak and strong are Linf attacks')
    if args.fast and (args.individual or set(PARTS) & set(args.attacks)):
        raise Refused('--fast is for autoattack as a whole: what a part alone leaves has no second search')
    if args.model and '.py:' in args.model and (args.width or args.mean or args.activation):
        raise Refused(f'{args.model} makes the whole network: '
                         'drop --width, --mean, --std and --activation')
    if not ours and args.model is None:
        raise Refused(f'{args.checkpoint} holds weights only: '
                         'name their architecture with --model (and --width)')
    return run, shard
