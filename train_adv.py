"""
Adversarial training, with or without a teacher, with or without labels.

$ python train_adv.py --loss logit_mse --beta 0.2                      # trains its teacher first
$ python train_adv.py --loss logit_mse --beta 0.2 --dataset digits     # no download, no GPU, four minutes
$ torchrun --nproc-per-node 8 train_adv.py --loss trades --batch-size 1024 --lr 0.8

The defaults are the recipe of Al-Najjar et al., section 4: ResNet-18, SGD with Nesterov momentum 0.9, weight
decay 5e-4, one cycle, cosine up to 0.2 and down to 0, 100 epochs, batch 128, PGD-10 at 8/255 with step 2/255,
selection by PGD-20. support/ keeps a run alive; of the training step it has what several processes and
--compile need: ddp's means and BN, and speed.Folded.
"""
import argparse
import contextlib
import time

import torch
from torch.optim.lr_scheduler import MultiStepLR, OneCycleLR
from torch.optim.swa_utils import update_bn

import data
import models
from attacks import attack_mode, frozen_statistics, pgd, scaled, step_sizes, weights_perturbed
from losses import INNERS, METHODS, TARGETS, Softened, asked_for, hparams, needs
from models import bn_branch
from support import checkpoint, ddp, describe, files, refusals, runs, speed, validation

# -----------------------------------------------------------------------------
# flags. A default of None is filled in below: by the dataset, the method, or as the help says
parser = argparse.ArgumentParser(description=__doc__, epilog=describe.TABLE_HELP, allow_abbrev=False,
                                 add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter)
refusals.one_line(parser)
files.plain_output()

arg = parser.add_argument_group('method').add_argument
arg('--loss', default='logit_mse', choices=METHODS, help='see README.md; its hyper-parameters are flags')
arg('--inner', choices=INNERS, help="what the attack maximises (default: the method's own)")
arg('--targets', choices=TARGETS, help='soft in place of hard labels in every cross-entropy')
arg('--smoothing', type=float, default=0.1, help='of --targets')
arg('--recipe', default='default', choices=['default', 'paper'], help="paper: the method's own settings")
arg('--teacher', metavar='PT', help='frozen teacher (default: a standard one, trained if need be)')
arg('--standard-teacher', metavar='PT', help='second teacher, of iad2 and kd_swa')
arg('--teacher-model', help='its architecture, if the file holds weights only (default: --model)')
arg('--guide-model', help='architecture of the guide of lbgat (default: --model)')
arg('--guide-width', type=int, help="default: --width, or with --guide-model its paper's")

arg = parser.add_argument_group('attack, in pixels (0..255)').add_argument
arg('--eps', type=float, help="radius (default: the dataset's, 8 for CIFAR; of L2 128, the usual 0.5)")
arg('--step-size', type=float, help='default: eps / 4')
arg('--steps', type=int, default=10)
arg('--norm', default='Linf', choices=['Linf', 'L2'])
arg('--init', default='uniform', choices=['uniform', 'normal', 'zero'], help='TRADES and kin: normal')
arg('--attack-bn', default='eval', choices=['eval', 'train', 'moving'],
    help="BN in the attack: running statistics; the batch's; the batch's, updating the running ones")
arg('--step-schedule', default='constant', choices=['constant', 'linear', 'cosine'], help='within one attack')
arg('--eps-ramp', type=float, default=0, metavar='SHARE', help='eps grows from 0 over this share of training')
arg('--free', type=int, default=0, metavar='M', help='M updates per batch, no PGD; divide --epochs by M')

arg = parser.add_argument_group('data and model').add_argument
arg('--dataset', default='cifar10', help=f'{" ".join(data.DATASETS)}, or the NAME of DIR/NAME.npz')
arg('--data-dir', default='data', metavar='DIR')
arg('--augment', choices=data.AUGMENT, help="default: the dataset's; none for your own files")
arg('--subset', type=int, metavar='N', help='N training images only: the first')
arg('--subset-seed', type=int, metavar='SEED', help='draw the --subset at random instead')
arg('--extra', metavar='NPZ', help='images without labels')
arg('--extra-fraction', type=float, default=0.5, help='share of them in every batch')
arg('--model', default='resnet18', help=f'{models.NAMES}, or FILE.py:FUNCTION')
arg('--width', type=int, help="channels of the first layer (default: the paper's)")
arg('--normalize', action=argparse.BooleanOptionalAction, default=False, help='the model standardises images')
arg('--activation', default='relu', choices=models.ACTIVATIONS, help='hybrid: softplus backward only')
arg('--dual-bn', action='store_true', help="AdvProp's auxiliary BN for adversarial images")
arg('--craft-branch', default='aux', choices=['main', 'aux'], help='of --dual-bn: used by the attack')
arg('--eval-branch', default='main', choices=['main', 'aux'], help='of --dual-bn: used in validation')
arg('--bn-order', default='nat-adv', choices=['nat-adv', 'adv-nat', 'nat', 'adv'],
    help='order of the student forwards; nat, adv: only that one updates BN statistics')
arg('--warm-start', metavar='PT', help="start from these weights; 'teacher': from the teacher's")

arg = parser.add_argument_group('optimisation').add_argument
arg('--epochs', type=int, default=100)
arg('--batch-size', type=int, default=128, help='of all processes together')
arg('--accumulate', type=int, default=1, metavar='K', help='a batch in K parts: less memory; BN sees a part')
arg('--lr', type=float, default=0.2, help='maximum of the schedule')
arg('--schedule', default='onecycle', choices=['onecycle', 'cosine', 'step'], help='cosine: no warm-up')
arg('--milestones', type=float, nargs='+', default=[0.5, 0.75], help='of --schedule step, shares of training')
arg('--nesterov', action=argparse.BooleanOptionalAction, default=True)
arg('--weight-decay', type=float, default=5e-4)
arg('--awp', type=float, default=0, metavar='GAMMA', help='adversarial weight perturbation (usual: 0.005)')
arg('--awp-warmup', type=float, default=0.1, metavar='SHARE', help='share of training before it')
arg('--ema', type=float, default=0, metavar='DECAY', help='averaged weights (usual: 0.995)')
arg('--swa', type=float, default=0, metavar='SHARE', help='average epochs past this share of training')

arg = parser.add_argument_group('machine and run').add_argument
arg('--seed', type=int, default=0)
arg('--amp', default='auto', choices=['auto', 'bf16', 'fp16', 'off'], help='auto: bf16 where native')
arg('--compile', action='store_true', help='faster after a minute; a CPU needs a C++ compiler')
arg('--sync-bn', action='store_true', help='under torchrun: BN statistics of the whole batch')
arg('--out', metavar='DIR', help='default: runs/DATASET-MODEL-..., with every flag that differs')
arg('--resume', action='store_true', help='continue the run in --out')
arg('--save-minutes', type=float, default=10, help='save a state to resume from this often')
arg('--dry-run', action='store_true', help='say what would be done and how long')

# defaults, later ones win: script, dataset, norm, method, recipe, inner. A flag that is given wins over all
first, _ = parser.parse_known_args()
method = METHODS[first.loss]
parser.set_defaults(**data.defaults(first.dataset, first.data_dir))
if first.model != parser.get_default('model'):      # the dataset's width is the default model's
    parser.set_defaults(width=None)
if first.norm == 'L2':
    parser.set_defaults(eps=128.0)
parser.set_defaults(**method.settings)
if first.recipe == 'paper':
    parser.set_defaults(**(method.recipe or {}))
if first.inner and INNERS[first.inner].objective is not method.inner:
    inner = INNERS[first.inner]
    method = method._replace(inner=inner.objective, fp16_scale=inner.fp16_scale)
    parser.set_defaults(init=inner.init)

arg = parser.add_argument_group(f'hyper-parameters of {first.loss}').add_argument
hp = {**hparams(method.loss), **method.datasets.get(first.dataset, {})}
for name, default in hp.items():
    arg(f'--{name}', help=f'default: {describe.as_flag(name, default)}', **describe.flag_of(default))
parser.add_argument('-h', '--help', action='help')
args, unknown = parser.parse_known_args()
refusals.unknown(unknown, args.loss, hp)
hp = {name: getattr(args, name) for name in hp}

# -----------------------------------------------------------------------------
# device, data, models. Wrong input is refused here, before any work
rank, world, device = ddp.init()
my_share = slice(rank, None, world)             # of every batch
loss_inputs, inner_inputs = needs(method.loss), needs(method.inner)
wanted = asked_for(method)
pseudo_labels = bool(args.extra) and 'y' in wanted              # the teacher labels the extra images
if pseudo_labels:
    wanted.add('t_logits')
shape = dict(width=args.width, activation=args.activation)
refusals.training(args, method, hp, parser.get_default, world)
args.out = args.out or describe.name(args, parser.get_default, hp)
refusals.attack(args)
run = runs.Run(args)

dtype = speed.precision(args.amp, device)      # None: fp32, and then without TF32 either
d = data.load(args.dataset, args.data_dir, subset=args.subset, subset_seed=args.subset_seed,
              augment=args.augment, device=device)
extra = data.open_images(args.extra, d.x_train.shape[1:]) if args.extra else None
notes = [*refusals.images(args, d.x_train, world), data.missing_classes(d, args.subset)]
refusals.radius(args.norm, [args.eps], d.x_train)
if args.normalize:
    shape['mean'], shape['std'] = d.statistics()

torch.manual_seed(args.seed)
student = checkpoint.build(args.model, d, dual_bn=args.dual_bn, **shape)
guide = None
if 'guide_logits' in wanted:
    shape.update(refusals.guide_shape(args))
    guide = checkpoint.build(args.guide_model or args.model, d, '--guide-model', **shape)

networks, about_teachers = checkpoint.load_teachers(args, wanted, d, device)
teacher, standard_teacher = networks.get('teacher'), networks.get('standard_teacher')
if args.warm_start:
    checkpoint.warm_start(student, args, d)
ddp.broadcast(student, guide)
if args.sync_bn:
    ddp.sync_bn(student, guide)
refusals.awp(args.awp, student)
averaged = checkpoint.copied(student) if args.ema or args.swa else None

net, guide_net, teacher_net, standard_net = student, guide, teacher, standard_teacher
attacked_net = student
# The speed block. Without it the results are the same up to rounding. Checkpoints hold `student`, never `net`
if args.compile:
    torch._dynamo.config.recompile_limit = 64       # one graph per network and mode
    net, guide_net, teacher_net, standard_net = [
        f and torch.compile(f, dynamic=False) for f in (student, guide, teacher, standard_teacher)]
    attacked_net = net
    if args.attack_bn == 'eval' and speed.folding_pays(student, dtype, device):
        attacked_net = speed.Folded(student)        # BN folded into the convolutions

# -----------------------------------------------------------------------------
# optimiser and schedule
steps_per_epoch = max(1, len(d.y_train) // args.batch_size)
total_steps = args.epochs * steps_per_epoch * max(1, args.free)
parameters = list(student.parameters()) + (list(guide.parameters()) if guide else [])
optimizer = torch.optim.SGD(parameters, lr=args.lr, momentum=0.9, nesterov=args.nesterov,
                            weight_decay=args.weight_decay)
if args.schedule == 'step':
    scheduler = MultiStepLR(optimizer, [round(m * total_steps) for m in args.milestones], gamma=0.1)
else:
    # momentum stays 0.9 as in the paper; 25 % of warm-up as in HAT's code. PyTorch divides by zero at 4 steps
    scheduler = OneCycleLR(optimizer, args.lr, total_steps=max(5, total_steps), cycle_momentum=False,
                           pct_start=0.25 if args.schedule == 'onecycle' else 0.0)
scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
if rank:        # each process draws its own attack noise
    torch.manual_seed(args.seed + 1_000_003 * rank)

# -----------------------------------------------------------------------------
# the two halves of the min-max problem

def logits_of(network, x):
    """fp32 logits of fp32 images; only the network itself runs in reduced precision."""
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        return network(x).float()

def craft(x, y):
    """Inner maximisation: x_adv (B,3,H,W), PGD on method.inner."""
    if method.inner is None:
        return x
    ramp = min(1.0, step / total_steps / args.eps_ramp) if args.eps_ramp else 1.0
    eps, step_size = ramp * args.eps / 255, ramp * args.step_size / 255
    if args.free:       # Shafahi et al. 2019, no PGD: the last update's gradient has moved delta
        return (x + delta.clamp(-eps, eps)).clamp(0, 1).requires_grad_()

    fixed = {}                  # what does not depend on x_adv is computed once per attack
    with attack_mode(student, bn=args.attack_bn), bn_branch(student, 'main'), torch.no_grad():
        if 'y' in inner_inputs:
            fixed['y'] = y
        if 'logits' in inner_inputs:
            fixed['logits'] = logits_of(attacked_net, x)
        if 't_logits' in inner_inputs:
            fixed['t_logits'] = logits_of(teacher_net, x)

    def objective(x_adv):
        inputs = dict(fixed)
        if 'logits_adv' in inner_inputs:
            inputs['logits_adv'] = logits_of(attacked_net, x_adv)
        if 't_logits_adv' in inner_inputs:
            inputs['t_logits_adv'] = logits_of(teacher_net, x_adv)
        return method.inner(**inputs)

    if dtype is torch.float16:
        objective = scaled(objective, method.fp16_scale)
    with attack_mode(student, bn=args.attack_bn), bn_branch(student, args.craft_branch):
        return pgd(objective, x, eps=eps, step_size=step_sizes(step_size, args.steps, args.step_schedule),
                   steps=args.steps, init=args.init, norm=args.norm)

def student_logits(x, kind, moves_bn):
    """kind: 'nat' goes through the main BN, 'adv' through the auxiliary one, if there are two."""
    moves_bn = moves_bn and kind in args.bn_order.split('-')
    branch = bn_branch(student, 'aux' if kind == 'adv' else 'main')
    statistics = contextlib.nullcontext() if moves_bn else frozen_statistics(student)
    with branch, statistics:
        return logits_of(net, x)

def loss_on(x, x_adv, y, moves_bn=True):
    """Outer minimisation: method.loss, (B,). Only what it asks for is computed; x goes before x_adv, unless
    --bn-order says otherwise. moves_bn=False: no BN statistic and no class mean changes."""
    inputs = {}
    if 'logits' in loss_inputs and args.bn_order != 'adv-nat':
        inputs['logits'] = student_logits(x, 'nat', moves_bn)
    if 'logits_adv' in loss_inputs:
        inputs['logits_adv'] = student_logits(x_adv, 'adv', moves_bn)
    if 'logits_helper' in loss_inputs:                          # HAT
        inputs['logits_helper'] = student_logits(x + hp['h'] * (x_adv - x), 'adv', moves_bn)
    if 'logits' in loss_inputs and args.bn_order == 'adv-nat':
        inputs['logits'] = student_logits(x, 'nat', moves_bn)
    if 'guide_logits' in loss_inputs:                           # LBGAT
        with contextlib.nullcontext() if moves_bn else frozen_statistics(guide):
            inputs['guide_logits'] = logits_of(guide_net, x)
    with torch.no_grad():
        if 't_logits' in loss_inputs:
            inputs['t_logits'] = logits_of(teacher_net, x)
        if 't_logits_adv' in loss_inputs:
            inputs['t_logits_adv'] = logits_of(teacher_net, x_adv)
        if 's_logits_adv' in loss_inputs:
            inputs['s_logits_adv'] = logits_of(standard_net, x_adv)
    if 'y' in loss_inputs:
        inputs['y'] = Softened(y, TARGETS[args.targets], args.smoothing) if args.targets else y
    if 'progress' in loss_inputs:
        inputs['progress'] = step / total_steps
    if 'class_p' in loss_inputs:                                # DKL: of the epoch before
        inputs['class_p'] = class_p[y]
        if moves_bn:
            class_sum.index_add_(0, y, (inputs['logits'].detach() / hp['T']).softmax(1))
    return method.loss(**inputs, **hp)

def awp(x, x_adv, y):
    """Context in which the student's weights are perturbed; does nothing without --awp."""
    if not args.awp or step < args.awp_warmup * total_steps:
        return contextlib.nullcontext()
    def objective():
        return scaler.scale(loss_on(x, x_adv.detach(), y, moves_bn=False).mean())
    return weights_perturbed(student, objective, gamma=args.awp, average=ddp.average)

def update(x, y):
    """One step of the optimiser. -> the loss, on the device: .item() would wait for a GPU."""
    global delta
    if args.free and len(delta) == 0:
        delta = torch.zeros_like(x)
    total = 0.0
    for part in range(args.accumulate):
        x_part, y_part = x[part::args.accumulate], y[part::args.accumulate]
        x_adv = craft(x_part, y_part)
        with awp(x_part, x_adv, y_part):
            loss = loss_on(x_part, x_adv, y_part).mean() / args.accumulate
            scaler.scale(loss).backward()
        total += loss.detach()
    if args.free:                       # the step is eps
        eps = args.eps / 255
        delta = (delta + eps * x_adv.grad.nan_to_num(0.0).sign()).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x             # as in Wong et al.'s code of it
    ddp.average([p.grad for p in parameters])
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    scheduler.step()
    return total

@torch.no_grad()
def move_average(weight):
    """averaged += weight (student - averaged), BN statistics and all."""
    for a, s in zip(averaged.state_dict().values(), student.state_dict().values()):
        if a.is_floating_point():
            a.lerp_(s, weight)
        else:
            a.copy_(s)

def validate(model):
    """Clean accuracy, PGD-20 accuracy (%) and mean clean CE on the held-out training images."""
    return validation.clean_and_pgd(model, d.x_val, d.y_val, eps=args.eps / 255, norm=args.norm,
                                    branch=args.eval_branch, progress=run.progress)

# -----------------------------------------------------------------------------
# the run
epoch, batch, step, averages, best, step_losses = 1, 0, 0, 0, -1.0, []
delta = torch.zeros(0, device=device)                       # --free's perturbation

# DKL: row c is the mean softmax of class c, in the last epoch and, summed, in this one
K = d.classes if 'class_p' in loss_inputs else 0
class_p = torch.full((K, K), 1 / d.classes, device=device)
class_sum = torch.zeros(K, K, device=device)

def state():
    """What the next step depends on, beside the flags."""
    return dict(epoch=epoch, batch=batch, step=step, averages=averages, best=best, delta=delta,
                class_p=class_p, class_sum=class_sum, step_losses=step_losses, student=student, guide=guide,
                averaged=averaged, optimizer=optimizer, scheduler=scheduler, scaler=scaler)

def pseudo_label(x):
    """(B,): the teacher's prediction, the label of images that have none."""
    with torch.no_grad():
        return logits_of(teacher_net, x).argmax(1)

def training_batches():
    """x, y of the rest of this epoch, this process's share of each batch."""
    return data.epoch(d, args.batch_size, args.seed, epoch, first=batch, share=my_share, extra=extra,
                      fraction=args.extra_fraction, label=pseudo_label if pseudo_labels else None)

config = dict(vars(args), hparams=hp, teachers=about_teachers, pseudo_labels=pseudo_labels, processes=world,
              precision=str(dtype or torch.float32), code=checkpoint.code_of(student, guide),
              **data.facts(d, extra), **describe.environment(device))
describe.summary(config, student, notes)
with run.guarded():             # Ctrl-C, full disk, out of memory: what was saved holds
    checkpoint.check_teachers(networks, about_teachers, args, d)
    saved = run.begin(config, state)        # of --resume: modules, optimiser and generators are loaded
    if saved:
        epoch, batch, step, best = (saved[k] for k in ('epoch', 'batch', 'step', 'best'))
        averages, step_losses = saved['averages'], list(torch.tensor(saved['step_losses'], device=device))
        delta, class_p, class_sum = (saved[k].to(device) for k in ('delta', 'class_p', 'class_sum'))
    if args.dry_run:
        step = total_steps      # past the warm-up of AWP
        run.estimate(update, training_batches(), validate, student, total_steps, args.epochs)

    while epoch <= args.epochs:
        student.train()
        if guide:
            guide.train()
        t0, images = time.perf_counter(), 0
        for x, y in run.progress(training_batches(), f'epoch {epoch}', total=steps_per_epoch, initial=batch):
            for _ in range(max(1, args.free)):
                step_losses.append(update(x, y))
                step += 1
                if args.ema:                        # early weights are soon forgotten
                    move_average(1 - min(args.ema, (1 + step) / (10 + step)))
            batch += 1
            images += world * len(x)
            run.save_if_due(state)
        losses = torch.stack(step_losses)
        img_per_s = images / (time.perf_counter() - t0)
        run.save_state(state)           # the validation may take longer than a signal waits

        if args.swa and epoch > args.swa * args.epochs:
            averages += 1
            move_average(1 / averages)
            update_bn(data.epoch(d, args.batch_size, args.seed, epoch, share=my_share), averaged)
        # losses and BN statistics: means over the processes
        ddp.average([losses, class_sum, *ddp.buffers(student, guide, averaged)])
        if 'class_p' in loss_inputs:
            seen = class_sum.sum(1, keepdim=True)
            class_p = torch.where(seen > 0, class_sum / seen, class_p)
            class_sum.zero_()
        model = averaged if args.ema or averages else student                   # what is judged and kept
        clean, robust, val_loss = validate(model)
        runs.check_finite(val_loss, epoch)
        score, rule = (robust, 'PGD-20') if method.inner else (clean, 'clean accuracy')
        rule += f' on {len(d.y_val)} held-out training images'      # the test set takes no part
        run.row(epoch=epoch, lr=scheduler.get_last_lr()[0], loss=losses.mean().item(), val_clean=clean,
                val_pgd20=robust, img_per_s=img_per_s, peak_gib=describe.peak_gib(device))
        known = dict(epoch=epoch, val_clean=clean, val_pgd20=robust, **about_teachers)
        if score >= best:                               # ties go to the later, more annealed epoch
            best = score
            run.save_model('best.pt', model, selected_by=rule, **known)
        run.save_model('last.pt', model, selected_by='last epoch', **known)
        epoch, batch, step_losses = epoch + 1, 0, []
    run.finish(best, score, rule)
