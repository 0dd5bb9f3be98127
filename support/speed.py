"""
What makes a training faster and changes nothing else: precision, memory layout, BN folded into convolutions.
What each wins: python -m tools.bench.
"""
import copy
import warnings

import torch
import torch.nn as nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models import DualBatchNorm2d, MobileNetV2, PreActBlock, PreActBlockOfX, ResNet, WideBlock, WideResNet

def folded(net):
    """A frozen copy of net in eval mode, each BN folded into the convolution before it. The same function,
    up to rounding."""
    net = copy.deepcopy(net).eval().requires_grad_(False)
    for m in net.modules():
        for conv, bn in ('conv1', 'bn1'), ('conv2', 'bn2'), ('conv3', 'bn3'), ('0', '1'):
            if (not isinstance(m, (PreActBlock, WideBlock, WideResNet))         # there BN comes first
                    and type(getattr(m, bn, None)) is nn.BatchNorm2d):
                setattr(m, conv, fuse_conv_bn_eval(getattr(m, conv), getattr(m, bn)))
                setattr(m, bn, nn.Identity())
    return net

class Folded:
    """net in eval mode, folded and compiled; folded anew where its weights or statistics have changed
    since."""
    def __init__(self, net):
        self.net, self.copy, self.versions = net, folded(net), None
        self.compiled = torch.compile(self.copy, dynamic=False)

    def __call__(self, x):
        # PyTorch counts what is done in place
        versions = [t._version for t in [*self.net.parameters(), *self.net.buffers()]]
        if versions != self.versions:
            self.copy.load_state_dict(folded(self.net).state_dict())
            self.versions = versions
        return self.compiled(x)

def folding_pays(net, dtype, device):
    """True where attacking Folded(net) is faster: on a CPU that computes in bf16 by 11 to 18 % (ResNet-18 of
    width 16), in fp32 by nothing beyond noise; not measured on a GPU (tools/bench.py --add folded). Requires
    plain BN layers, each directly after a convolution."""
    kinds = {type(m) for m in net.modules()}
    return (device.type == 'cpu' and dtype is torch.bfloat16 and isinstance(net, (ResNet, MobileNetV2))
            and not kinds & {PreActBlock, PreActBlockOfX, DualBatchNorm2d})

def layout(device):
    """Memory format: channels_last on a GPU.
    On a CPU it is no faster in fp32, and its backward crashes below 8 channels."""
    return torch.channels_last if device.type == 'cuda' else torch.contiguous_format

def autocast_dtype(amp, device):
    """'auto', 'bf16', 'fp16' or 'off' -> torch dtype of the autocast, None for fp32. auto is bf16
    where the hardware computes in it, fp16 on older GPUs, off on older CPUs, where emulated bf16
    is slower than fp32."""
    cuda = device.type == 'cuda'
    native = (torch.cuda.is_bf16_supported(including_emulation=False) if cuda else
              torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if amp == 'auto':
        amp = 'bf16' if native else 'fp16' if cuda else 'off'
    return {'bf16': torch.bfloat16, 'fp16': torch.float16, 'off': None}[amp]

def precision(amp, device):
    """-> autocast_dtype(amp, device), for a training. Where it is None, convolutions and matrix products are
    fp32 without TF32."""
    dtype = autocast_dtype(amp, device)
    if dtype is torch.float16:      # GradScaler skips steps that overflow; the schedule goes on
        warnings.filterwarnings('ignore', r'Detected call of `lr_scheduler.step')
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = dtype is not None
    torch.set_float32_matmul_precision('high' if dtype else 'highest')
    return dtype
