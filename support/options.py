"""
The options of train_adv.py that go with any loss: their flags, and which of them do not go together.
"""
import losses
from support.files import Refused
from losses import needs

def add_args(parser):
    g = parser.add_argument_group('with any loss')
    g.add_argument('--awp', type=float, default=0, metavar='GAMMA', help='adversarial weights (usual: 0.005)')
    g.add_argument('--awp-warmup', type=float, default=0.1, metavar='SHARE',
                   help='of the training, without it')
    g.add_argument('--ema', type=float, default=0, metavar='DECAY', help='averaged weights (usual: 0.995)')
    g.add_argument('--swa', type=float, default=0, metavar='SHARE',
                   help='equal average of the weights, after every epoch past this share of the training')
    g.add_argument('--free', type=int, default=0, metavar='M',
                   help='free adversarial training, no PGD: M updates per batch, so M times as many in an '
                        'epoch; each moves the perturbation, which is carried over')
    g.add_argument('--warm-start', metavar='PT',
                   help="start from these weights; 'teacher': from the teacher's")
    g.add_argument('--dual-bn', action='store_true', help="AdvProp's auxiliary BN for adversarial images")
    g.add_argument('--craft-branch', default='aux', choices=['main', 'aux'],
                   help='of --dual-bn: crafts x_adv')
    g.add_argument('--eval-branch', default='main', choices=['main', 'aux'],
                   help='of --dual-bn: is validated')
    g.add_argument('--bn-order', default='nat-adv', choices=['nat-adv', 'adv-nat', 'nat', 'adv'],
                   help='order of the forwards of x and x_adv; nat, adv: only that one moves BN statistics')
    g.add_argument('--extra', metavar='NPZ', help='images without labels')
    g.add_argument('--extra-fraction', type=float, default=0.5, metavar='F', help='of every batch')

def check(args, method, hp):
    """Raises Refused, one line, for what cannot be trained. hp: the hyper-parameters of method.loss."""
    for low, high, flags in [(0, 1e9, ['awp', 'free', *hp]), (1, 1e9, ['steps']),
                             (1e-3, 1e9, [k for k in ('tau', 'T') if k in hp]),
                             (0, 1, ['eps_ramp', 'awp_warmup', 'ema', 'swa', 'smoothing', 'extra_fraction'])]:
        for flag in flags:
            if not low <= getattr(args, flag) <= high:
                raise Refused(f'--{flag.replace("_", "-")} {getattr(args, flag)}: a number, '
                                 f'at least {low:g}' + (f' and at most {high}' if high == 1 else ''))
    asked = losses.inputs(method)
    wants_teacher = any(name.startswith('t_') for name in asked)
    labels_extra = bool(args.extra) and 'y' in asked                # by the teacher
    n_extra = round(args.extra_fraction * args.batch_size)
    shares = [hp[k] for k in ('alpha', 'gamma') if k in hp] if args.loss in losses.SHARES else []
    both = {'logits', 'logits_adv'} <= set(needs(method.loss))
    for wrong, message in [
            (args.teacher and not wants_teacher and not labels_extra,
             f'--loss {args.loss} takes no --teacher'),
            (args.standard_teacher and 's_logits_adv' not in asked,
             f'--loss {args.loss} takes no --standard-teacher'),
            (args.extra and not 0 < n_extra < args.batch_size,
             f'--extra-fraction {args.extra_fraction}: {n_extra} of {args.batch_size} images without a '
             'label, and a batch needs both kinds'),
            (method.teacher == 'robust' and not args.teacher,
             f'--loss {args.loss} learns from a robust teacher: pass --teacher, '
             'for instance the best.pt of a --loss trades run'),
            (args.inner and wants_teacher and not method.teacher and not args.teacher,
             f'--inner {args.inner} needs a --teacher'),
            (sum(shares) > 1, f'--loss {args.loss}: alpha and gamma are shares, at most 1 together'),
            (losses.METHODS[args.loss].inner is None and (args.inner or args.free),
             f'--loss {args.loss} attacks nothing'),
            (args.inner and args.free, '--free has no attack for --inner to change'),
            (args.targets and ('y' not in needs(method.loss) or args.loss in ('als', 'iad1')
                               or args.loss == 'ard' and hp['alpha'] == 1),
             f'--targets: --loss {args.loss} takes no cross-entropy to a label'),
            (args.recipe == 'paper' and args.dataset == 'imagenet',
             "--recipe paper: those recorded are for CIFAR; --dataset imagenet brings LTD's for ImageNet"),
            (args.ema and args.swa, '--ema and --swa: one average of the weights at a time'),
            (args.swa and args.dual_bn, "--swa would need the auxiliary BN's statistics again: use --ema"),
            (not args.dual_bn and (args.craft_branch, args.eval_branch) != ('aux', 'main'),
             '--craft-branch and --eval-branch are of --dual-bn'),
            (args.free and (args.norm != 'Linf' or args.accumulate > 1),
             '--free steps in Linf, and on whole batches'),
            (args.sync_bn and args.dual_bn, '--sync-bn: not with --dual-bn'),
            ((args.bn_order != 'nat-adv' or args.dual_bn) and not both, f'--bn-order and --dual-bn: --loss '
             f'{args.loss} does not put both x and x_adv through the student'),
            (args.dual_bn and args.bn_order in ('nat', 'adv'),
             f'--bn-order {args.bn_order} would leave one BN of --dual-bn without statistics'),
            (args.swa == 1, '--swa 1: no epoch is left to average'),
            (args.warm_start == 'teacher' and not (wants_teacher or labels_extra),
             f'--warm-start teacher: --loss {args.loss} has none, name a file')]:
        if wrong:
            raise Refused(message)
