"""
Networks for small images, and torchvision's for large ones. Images in [0, 1] in, logits out.

    net = build('resnet18', num_classes=10)                      # 32x32 stem; the others: NAMES
    net = build('resnet18', 10, width=16)                        # a quarter of the channels, for a CPU

State-dict keys are those of the pytorch-cifar family (conv1 bn1 layer1.0.conv1 ... shortcut linear) and, for
wrn, of the TRADES code (block1.layer.0 ... fc; without its sub_block1, which nothing calls), so that the
released checkpoints load.
"""
import re
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# activations, by name

ALPHA = 10.0        # an attribute of the class would break the graph of torch.compile

class HybridReLU(torch.autograd.Function):
    """Smooth adversarial training as Dallaire & David have it: ReLU forward, and backward the derivative of
    softplus(ALPHA u) / ALPHA, in attack and update. (Xie et al. 2020: a smooth function both ways.)"""
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return u.relu()
    @staticmethod
    def backward(ctx, grad):
        return grad * torch.sigmoid(ALPHA * ctx.saved_tensors[0])

def softplus(u):
    return F.softplus(u, beta=ALPHA)

ACTIVATIONS = {'relu': F.relu, 'silu': F.silu, 'hybrid': HybridReLU.apply, 'softplus': softplus}

class Net(nn.Module):
    """A module whose nonlinearity build() may replace."""
    act = staticmethod(F.relu)

# -----------------------------------------------------------------------------
# blocks

def conv(in_planes, planes, size, stride=1, groups=1):
    return nn.Conv2d(in_planes, planes, size, stride, padding=size // 2, groups=groups, bias=False)

def projection(in_planes, planes, stride):
    """Identity where shapes agree, else 1x1 convolution and BN."""
    if stride == 1 and in_planes == planes:
        return nn.Sequential()
    return nn.Sequential(conv(in_planes, planes, 1, stride), nn.BatchNorm2d(planes))

class BasicBlock(Net):
    expansion = 1
    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(in_planes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.shortcut = projection(in_planes, planes, stride)
    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(out)) + self.shortcut(x))

class Bottleneck(Net):
    expansion = 4
    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(in_planes, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
        self.shortcut = projection(in_planes, 4 * planes, stride)
    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        return self.act(self.bn3(self.conv3(out)) + self.shortcut(x))

class PreActBlock(Net):
    expansion = 1
    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_planes), conv(in_planes, planes, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), conv(planes, planes, 3)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(conv(in_planes, planes, 1, stride))
    def forward(self, x):
        out = self.act(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, 'shortcut') else x
        return self.conv2(self.act(self.bn2(self.conv1(out)))) + shortcut

class PreActBlockOfX(PreActBlock):
    """Wong et al.'s (fast_adversarial): the same keys, but the shortcut projects x, not the activated x."""
    def forward(self, x):
        shortcut = self.shortcut(x) if hasattr(self, 'shortcut') else x
        return self.conv2(self.act(self.bn2(self.conv1(self.act(self.bn1(x)))))) + shortcut

class WideBlock(Net):
    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_planes), conv(in_planes, planes, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), conv(planes, planes, 3)
        self.convShortcut = conv(in_planes, planes, 1, stride) if in_planes != planes else None
    def forward(self, x):
        out = self.act(self.bn1(x))
        shortcut = self.convShortcut(out) if self.convShortcut else x
        return self.conv2(self.act(self.bn2(self.conv1(out)))) + shortcut

class InvertedResidual(Net):
    def __init__(self, in_planes, planes, expansion, stride):
        super().__init__()
        hidden = expansion * in_planes
        self.conv1, self.bn1 = conv(in_planes, hidden, 1), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = conv(hidden, hidden, 3, stride, groups=hidden), nn.BatchNorm2d(hidden)
        self.conv3, self.bn3 = conv(hidden, planes, 1), nn.BatchNorm2d(planes)
        self.shortcut = projection(in_planes, planes, stride) if stride == 1 else None
    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.shortcut is not None else out

# -----------------------------------------------------------------------------
# networks. self.normalize is the first layer, and the identity unless the data's mean and std are given

class Normalize(nn.Module):
    """(x - mean) / std per channel. Buffers, so .to(device) moves them;
    not in the state dict, so foreign ones load."""
    def __init__(self, mean, std):
        super().__init__()
        for name, value in (('mean', mean), ('std', std)):
            self.register_buffer(name, torch.tensor(value).view(1, -1, 1, 1), persistent=False)
    def forward(self, x):
        return (x - self.mean) / self.std

class ResNet(Net):
    """He et al. 2016, stem for 32x32: 3x3, stride 1, no pooling (the ImageNet stem costs 10 points here)."""
    def __init__(self, block, depths, num_classes, width=64, normalize=None, channels=3):
        super().__init__()
        self.normalize = normalize or nn.Identity()
        self.conv1, self.bn1 = conv(channels, width, 3), nn.BatchNorm2d(width)
        planes = width
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                blocks.append(block(planes, width * 2 ** i, stride=2 if i > 0 and j == 0 else 1))
                planes = width * 2 ** i * block.expansion
            setattr(self, f'layer{i + 1}', nn.Sequential(*blocks))
        self.linear = nn.Linear(planes, num_classes)
    def forward(self, x):
        out = self.act(self.bn1(self.conv1(self.normalize(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean((2, 3)))

class PreActResNet(ResNet):
    """He et al. 2016b with the final BN of Rice et al. 2020 and HAT."""
    def __init__(self, block, depths, num_classes, width=64, normalize=None, channels=3):
        super().__init__(block, depths, num_classes, width, normalize, channels)
        del self.bn1
        self.bn = nn.BatchNorm2d(self.linear.in_features)
    def forward(self, x):
        out = self.conv1(self.normalize(x))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(self.act(self.bn(out)).mean((2, 3)))

class WideResNet(Net):
    """Zagoruyko & Komodakis 2016, keys and initialisation of the TRADES code. width: channels of the stem."""
    def __init__(self, depth, widen, num_classes, width=16, normalize=None, channels=3):
        super().__init__()
        self.normalize = normalize or nn.Identity()
        self.conv1 = conv(channels, width, 3)
        planes = width
        for i in range(3):
            out, blocks = width * widen * 2 ** i, []
            for j in range((depth - 4) // 6):
                blocks.append(WideBlock(planes, out, stride=2 if i > 0 and j == 0 else 1))
                planes = out
            setattr(self, f'block{i + 1}', nn.Sequential())
            getattr(self, f'block{i + 1}').layer = nn.Sequential(*blocks)
        self.bn1, self.fc = nn.BatchNorm2d(planes), nn.Linear(planes, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
        nn.init.zeros_(self.fc.bias)
    def forward(self, x):
        out = self.block3(self.block2(self.block1(self.conv1(self.normalize(x)))))
        return self.fc(self.act(self.bn1(out)).mean((2, 3)))

class MobileNetV2(Net):
    """Sandler et al. 2018, strides for 32x32. width: channels of the stem, 32 in the
    paper; the rest scales with it."""
    def __init__(self, num_classes, width=32, normalize=None, channels=3):
        super().__init__()
        scale = lambda channels: max(1, channels * width // 32)
        self.normalize = normalize or nn.Identity()
        self.conv1, self.bn1 = conv(channels, width, 3), nn.BatchNorm2d(width)
        planes, blocks = width, []
        for expansion, out, depth, stride in [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2),
                                              (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]:
            for j in range(depth):
                blocks.append(InvertedResidual(planes, scale(out), expansion, stride if j == 0 else 1))
                planes = scale(out)
        self.layers = nn.Sequential(*blocks)
        self.conv2, self.bn2 = conv(planes, scale(1280), 1), nn.BatchNorm2d(scale(1280))
        self.linear = nn.Linear(scale(1280), num_classes)
    def forward(self, x):
        out = self.act(self.bn1(self.conv1(self.normalize(x))))
        out = self.act(self.bn2(self.conv2(self.layers(out))))
        return self.linear(out.mean((2, 3)))

class Activation(nn.Module):
    """A nonlinearity in the place of nn.ReLU."""
    def __init__(self, name):
        super().__init__()
        self.act = ACTIVATIONS[name]
    def forward(self, x):
        return self.act(x)

def of_torchvision(name, num_classes, normalize):
    """torchvision's ResNet for 224x224, its keys unchanged; what standardises the images goes before it."""
    with torch.device('cpu'):           # up to torch 2.7 its import fails where tensors are made on 'meta'
        import torchvision
    try:
        net = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    except ValueError as e:
        raise ValueError(f'unknown model torchvision-{name}: {e}') from e
    net.normalize = normalize or nn.Identity()
    net.register_forward_pre_hook(_normalized)
    return net

def _normalized(net, inputs):
    return net.normalize(*inputs)

NAMES = ('resnet18 resnet34 resnet50 preactresnet18 preactresnet18-fast wrn-DEPTH-WIDEN (wrn-28-10, '
         'wrn-34-10, ...) mobilenetv2, for ImageNet torchvision-resnet50 torchvision-wide_resnet50_2 ...')

def build(name, num_classes, *, width=None, mean=None, std=None, activation='relu', dual_bn=False,
          channels=3):
    """name: see NAMES. width: channels of the first layer, None for the paper's. mean, std: a float per
    channel, in units of [0, 1]; None for no normalisation. activation: see ACTIVATIONS. dual_bn: every BN has
    an auxiliary twin, see bn_branch. channels: of the images, 1 for grey. Raises ValueError for an unknown
    name, and for one of mean and std alone."""
    if width is not None and width < 1:
        raise ValueError(f'width {width}: the first layer needs at least one channel')
    if (mean is None) != (std is None):
        raise ValueError('mean and std: both, or neither')
    if mean is not None:                                # tensors and arrays, too
        mean, std = [float(m) for m in mean], [float(s) for s in std]
    net = _network(name, num_classes, Normalize(mean, std) if mean else None,
                   channels, {'width': width} if width else {})
    if activation not in ACTIVATIONS:
        raise ValueError(f'unknown activation {activation!r}; known: {" ".join(ACTIVATIONS)}')
    for module in list(net.modules()):
        if isinstance(module, Net):
            module.act = ACTIVATIONS[activation]
        for key, child in list(module.named_children()):
            if dual_bn and type(child) is nn.BatchNorm2d:
                setattr(module, key, DualBatchNorm2d(child.num_features))
            elif activation != 'relu' and type(child) is nn.ReLU:
                setattr(module, key, Activation(activation))
    # what a checkpoint stores
    net.build_args = dict(name=name, num_classes=num_classes, width=width, mean=mean, std=std,
                      activation=activation, dual_bn=dual_bn, channels=channels)
    return net

class DualBatchNorm2d(nn.BatchNorm2d):
    """Xie et al. 2020, "Adversarial Examples Improve Image Recognition": BN for clean images, with the usual
    keys, and an auxiliary one for adversarial images, affine parameters included. SyncBatchNorm's
    convert_sync_batchnorm would throw the auxiliary one away."""
    auxiliary = False
    def __init__(self, num_features):
        super().__init__(num_features)
        self.aux = nn.BatchNorm2d(num_features)
    def forward(self, x):
        return self.aux(x) if self.auxiliary else super().forward(x)

@contextmanager
def bn_branch(net, name):
    """For the time of the block net normalises with its 'main' or its 'aux' BN; None: as before the block.
    Without dual BN: no effect. With activation checkpointing backward belongs in the block, too. Raises
    ValueError for another name."""
    if name not in ('main', 'aux', None):
        raise ValueError(f"the branch is 'main' or 'aux', not {name!r}")
    layers = [m for m in net.modules() if name and isinstance(m, DualBatchNorm2d)]
    before = [m.auxiliary for m in layers]
    for m in layers:
        m.auxiliary = name == 'aux'
    try:
        yield
    finally:
        for m, auxiliary in zip(layers, before):
            m.auxiliary = auxiliary

def _network(name, num_classes, normalize, channels, size):
    depths = {'resnet18': (2, 2, 2, 2), 'resnet34': (3, 4, 6, 3), 'resnet50': (3, 4, 6, 3),
              'preactresnet18': (2, 2, 2, 2), 'preactresnet18-fast': (2, 2, 2, 2)}
    if name in depths:
        net = PreActResNet if name.startswith('preact') else ResNet
        block = {'resnet50': Bottleneck, 'preactresnet18': PreActBlock,
                 'preactresnet18-fast': PreActBlockOfX}.get(name, BasicBlock)
        return net(block, depths[name], num_classes, normalize=normalize, channels=channels, **size)
    if wrn := re.fullmatch(r'wrn-(\d+)-(\d+)', name):
        depth, widen = map(int, wrn.groups())
        if depth >= 10 and depth % 6 == 4 and widen > 0:
            return WideResNet(depth, widen, num_classes, normalize=normalize, channels=channels, **size)
        raise ValueError(f'{name}: a wide ResNet has a depth of 6n+4 (28, 34, 70) '
                         'and a widening factor of at least 1')
    if re.fullmatch(r'torchvision-(resnet|resnext|wide_resnet)\w+', name):
        if size:
            raise ValueError(f'{name} has one width: leave --width out')
        if channels != 3:
            raise ValueError(f'{name} takes images of three channels, these have {channels}')
        return of_torchvision(name.split('-', 1)[1], num_classes, normalize)
    if name == 'mobilenetv2':
        return MobileNetV2(num_classes, normalize=normalize, channels=channels, **size)
    raise ValueError(f'unknown model {name!r}; known: {NAMES}')
