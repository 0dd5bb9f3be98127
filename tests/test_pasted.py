"""What is pasted into somebody else's code says what is wrong there, and is right where ours never goes."""
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import attacks, data, losses, models
from support import checkpoint
from test_smoke import X, net

@pytest.mark.parametrize('sharper', [10, 100])
def test_in_l2_a_confident_network_is_attacked_as_any_other(sharper):
    """Twenty nats apart, the squares of the gradient of a cross-entropy underflow."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3072, 10).requires_grad_(False)
    x = torch.rand(8, 3, 32, 32)
    y = layer(x.flatten(1)).argmax(1)
    moved = {}
    for scale in (1, sharper):
        def objective(x_adv):           # its gradient is the same but for its length, which is not taken
            z = layer(x_adv.flatten(1)).gather(1, y[:, None])[:, 0]
            return -z * 10.0 ** (1 - scale / 3)
        x_adv = attacks.pgd(objective, x, eps=0.5, step_size=0.125, norm='L2', init='zero')
        moved[scale] = (x_adv - x).flatten(1).norm(dim=1)
    torch.testing.assert_close(moved[sharper], moved[1], rtol=1e-3, atol=1e-3)
    assert moved[1].min() > 0.4

@pytest.mark.parametrize('x, says', [
    ((255 * X).byte(), 'uint8: images are floats'), (255 * X, 'images are in'), (X - 0.5, 'images are in'),
    (X * float('nan'), 'images are in')])
def test_pgd_refuses_what_is_no_image_in_0_to_1(x, says):
    with pytest.raises(ValueError, match=says) as e:
        attacks.pgd(lambda x: x.sum((1, 2, 3)), x)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('wrong, says', [
    (dict(eps=8.0), 'eps is 8 to 8: in units'), (dict(eps=-0.1), 'eps is -0.1'),
    (dict(eps=torch.full((len(X),), 8.0)), 'eps is 8 to 8: in units'), (dict(eps=torch.ones(3)), 'one value'),
    (dict(eps=128, norm='L2'), 'eps is 128'), (dict(restarts=0), 'restarts 0'),
    (dict(step_size=2.0), 'step_size is 2'), (dict(step_size=[2.0] * 10), 'step_size is 2'),
    (dict(step_size=[0.1, 0.1]), '2 step sizes for 10 steps'), (dict(step_size=torch.ones(10)), 'one value'),
    (dict(step_size=[0.1] * 9 + [8.0]), 'step_size is 8'),
    (dict(eps=torch.tensor([-0.1, 0.1])), 'one value')])
def test_pgd_refuses_a_slip_instead_of_a_weaker_attack(wrong, says):
    with pytest.raises(ValueError, match=says):
        attacks.pgd(lambda x: x.flatten(1).sum(1), X, **wrong)

@pytest.mark.parametrize('objective', [lambda x: x.mean(), lambda x: x.flatten(1)], ids=['mean', 'pixels'])
def test_pgd_wants_one_value_per_image(objective):
    """The best of several restarts would be that of the batch."""
    with pytest.raises(ValueError, match="reduction='none'"):
        attacks.pgd(objective, X, restarts=2)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_images_in_half_precision_are_refused(dtype):
    with pytest.raises(ValueError, match='too coarse for eps'):
        attacks.pgd(lambda x_adv: x_adv.flatten(1).sum(1), X.to(dtype))

def test_an_optimiser_within_awp_is_told_that_its_step_would_be_lost(net):
    def objective():
        return F.cross_entropy(net(X), torch.zeros(len(X), dtype=torch.int64))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match='optimizer.step.. comes after it'):
        with attacks.weights_perturbed(net, objective, gamma=0.01):
            objective().backward()
            optimizer.step()
    with attacks.weights_perturbed(net, objective, gamma=0.01):
        objective().backward()
    before = net.conv1.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(net.conv1.weight, before)
    with pytest.raises(ValueError, match='takes part'), attacks.attack_mode(net):
        with attacks.weights_perturbed(net, objective, gamma=0.01):
            pass

def test_awp_within_an_autocast_around_the_whole_step(net):
    """Autocast keeps the weights it has cast until its block ends."""
    def objective():
        return F.cross_entropy(net(X).float(), torch.zeros(len(X), dtype=torch.int64))
    with attacks.frozen_statistics(net), torch.autocast('cpu', torch.bfloat16):
        before = objective().item()
        with attacks.weights_perturbed(net, objective, gamma=0.05):
            perturbed = objective().item()
        after = objective().item()
    assert perturbed > before + 0.01 and after == before

@pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning', 'ignore:.*torch.jit:FutureWarning')
def test_what_cannot_be_attacked_stays_in_its_mode():
    net = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(RuntimeError), attacks.attack_mode(net):
        pass
    assert net.training

def test_x_adv_is_detached_from_eps_too():
    eps = torch.full((len(X),), 0.03, requires_grad=True)
    assert not attacks.pgd(lambda x: x.flatten(1).sum(1), X, eps=eps).requires_grad

def test_in_l2_an_image_without_a_gradient_stays_where_denormals_are_zero():
    torch.set_flush_denormal(True)
    try:
        x_adv = attacks.pgd(lambda x: 0 * x.flatten(1).sum(1), X, norm='L2', init='zero')
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(x_adv, X)

def test_a_schedule_of_another_name():
    with pytest.raises(ValueError, match='constant linear cosine'):
        attacks.step_sizes(0.1, 3, 'exp')

def test_a_branch_of_another_name_is_not_the_main_one(net):
    with pytest.raises(ValueError, match="'main' or 'aux'"), models.bn_branch(net, 'auxiliary'):
        pass

def test_mean_and_std_come_together_and_as_anything(net):
    for half in (dict(mean=[0.5] * 3), dict(std=[0.2] * 3)):
        with pytest.raises(ValueError, match='both, or neither'):
            models.build('resnet18', 10, width=4, **half)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    build_args = models.build('resnet18', 10, width=4, mean=mean, std=std.numpy()).build_args
    assert build_args['mean'] == [0.5] * 3 and build_args['std'] == [0.25] * 3

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_kl_of_logits_in_half_precision_is_not_negative(dtype):
    z = torch.randn(256, 10, generator=torch.Generator().manual_seed(0))
    near = z + 0.05 * torch.randn(256, 10, generator=torch.Generator().manual_seed(1))
    z, near = z.to(dtype), near.to(dtype)
    assert losses.kl(near, z).min() > -1e-6
    torch.testing.assert_close(losses.kl(near, z), losses.kl(near.double(), z.double()).float())

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', ['mart', 'logit_mse', 'trades', 'softmax_kl'])
def test_a_loss_of_confident_logits_in_half_precision_is_that_in_fp32(name, dtype):
    g = torch.Generator().manual_seed(0)
    loss = losses.METHODS[name].loss
    half = {k: (4 * torch.randn(64, 10, generator=g)).to(dtype).requires_grad_() for k in losses.needs(loss)}
    full = {k: v.detach().float().requires_grad_() for k, v in half.items()}
    for given in half, full:
        if 'y' in given:
            given['y'] = torch.arange(64) % 10
    value, expected = loss(**half), loss(**full)
    torch.testing.assert_close(value.float(), expected, rtol=0.02, atol=0.02)
    value.float().mean().backward()
    expected.mean().backward()
    torch.testing.assert_close(half['logits_adv'].grad.float(), full['logits_adv'].grad, rtol=0.05, atol=1e-3)

def test_a_hybrid_activation_does_not_break_the_compiled_graph():
    """As it did at each of the seventeen; PyTorch 2.7 still breaks it once."""
    net = models.build('resnet18', 10, width=4, activation='hybrid')
    assert torch._dynamo.explain(net)(X).graph_count <= 2

@pytest.mark.parametrize('name, activation', [
    *[('resnet18', activation) for activation in models.ACTIVATIONS], ('torchvision-resnet18', 'relu')])
def test_a_network_can_be_saved_whole(name, activation):
    net = models.build(name, 10, activation=activation, mean=[0.5] * 3, std=[0.25] * 3).eval()
    again = pickle.loads(pickle.dumps(net))             # what torch.save(net) does
    assert torch.equal(again(X[:2]), net(X[:2]))

def test_a_teacher_s_weights_alone_are_said_to_be_of_images_as_they_are(tmp_path):
    torch.save(models.build('resnet18', 10, width=4).state_dict(), tmp_path / 'w.pt')
    for flag, other in (('--model', 'else --mean and --std'),
                        ('--teacher-model', 'else --teacher-model FILE.py')):
        _, meta = checkpoint.load_checkpoint(tmp_path / 'w.pt', 'resnet18', 10, width=4, flag=flag)
        assert other in meta['weights']

def test_a_standard_teacher_read_at_x_adv_teaches_nothing_and_read_at_x_does():
    """AdaAD's target moves with the attack: a student that falls with its standard teacher has no loss."""
    eps, step_size = 0.2, 0.05
    torch.manual_seed(0)
    d = data.load('digits')
    x, x_test = [data.to_float(images)[:, :1, ::4, ::4].contiguous()
                 for images in (d.x_train, d.x_test[:200])]

    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def train(net, loss, lr):
        optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9)
        for _ in range(300):
            batch = torch.randint(len(x), (128,))
            loss(x[batch], d.y_train[batch]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def robust(net):
        y = d.y_test[:200]
        with attacks.attack_mode(net):
            x_adv = attacks.pgd(lambda x_adv: losses.ce(net(x_adv), y), x_test, eps=eps, step_size=step_size,
                                steps=20)
        return (net(x_adv).argmax(1) == y).float().mean().item()

    teacher = network()
    train(teacher, lambda x, y: losses.ce(teacher(x), y), lr=0.1)

    def student(method):
        net = network()
        net.load_state_dict(teacher.state_dict())

        def loss(x, y):
            t_logits = teacher(x).detach()
            def objective(x_adv):
                given = dict(logits_adv=net(x_adv), t_logits=t_logits, t_logits_adv=teacher(x_adv))
                return method.inner(**{name: given[name] for name in losses.needs(method.inner)})
            with attacks.attack_mode(net):
                x_adv = attacks.pgd(objective, x, eps=eps, step_size=step_size, steps=5, init='normal')
            given = dict(logits=net(x), logits_adv=net(x_adv), t_logits=t_logits,
                         t_logits_adv=teacher(x_adv).detach())
            return method.loss(**{name: given[name] for name in losses.needs(method.loss)}, scale=1.0)

        train(net, loss, lr=0.05)
        return robust(net)

    assert robust(teacher) < 0.05
    assert student(losses.METHODS['adaad']) < 0.05
    assert student(losses.METHODS['rslad']) > 0.25
