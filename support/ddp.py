"""
Several processes, one per GPU: torchrun --nproc-per-node 2 train_adv.py ... Each takes its share of every
batch. Gradients are averaged by hand and not by DistributedDataParallel: a step has two or three forwards,
AWP takes one more gradient, and the 45 MB of a ResNet-18 take a millisecond.
"""
import os
import sys

import torch
import torch.distributed as dist

from support.files import Refused

def init():
    """-> rank, number of processes, device. All but the first process print nothing. Raises Refused."""
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = torch.device('cpu')
    if torch.cuda.is_available():
        here, gpus = int(os.environ.get('LOCAL_WORLD_SIZE', 1)), torch.cuda.device_count()
        if here > gpus:                     # in every process: one that went on would wait for the others
            raise Refused(f'{here} processes on {gpus} GPUs: start as many processes as there are GPUs')
        device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        hook = sys.excepthook       # torch's own, set here, holds back what a hook prints before it exits
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo')
        sys.excepthook = hook
    if rank > 0:
        sys.stdout = open(os.devnull, 'w')
    return rank, world, device

def end():
    """Of a process that has saved everything: gloo's threads abort it now and then while Python takes it
    apart, and torchrun would call that a failure."""
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def any_rank(*flags):
    """Each of the flags, true if it is true in any process: all act in the same step."""
    if world_size() == 1:
        return flags
    raised = torch.tensor(flags, dtype=torch.float32)       # on the CPU: no wait for a GPU
    dist.all_reduce(raised)
    return raised.bool().tolist()

def gather(thing):
    """[thing of rank 0, of rank 1, ...], in every process. thing: whatever can be pickled."""
    if world_size() == 1:
        return [thing]
    things = [None] * world_size()
    dist.all_gather_object(things, thing)
    return things

def buffers(*networks):
    """BN statistics and the like of all of them; a network may be None."""
    return [buffer for net in networks if net for buffer in net.buffers()]

@torch.no_grad()
def average(tensors):
    """Their mean over the processes, in place and in one message. Integers and None are left alone."""
    if world_size() == 1:
        return
    tensors = [t for t in tensors if t is not None and t.is_floating_point()]
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for t, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(mean.view_as(t))

@torch.no_grad()
def broadcast(*networks):
    """Every process's networks become those of rank 0: a seed of ours does not reach numpy's generator, which
    code of one's own may draw from. A network may be None."""
    if world_size() == 1:
        return
    for net in networks:
        for tensor in net.state_dict().values() if net else ():
            value = tensor.contiguous()             # NCCL takes no other layout
            dist.broadcast(value, 0)
            tensor.copy_(value)

class Summed(torch.autograd.Function):
    """The sum over all processes; so is the gradient."""
    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total
    @staticmethod
    def backward(ctx, grad):
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

class SyncBatchNorm2d(torch.nn.BatchNorm2d):
    """BN that normalises, in training, with mean and variance of all processes. (torch's own wants a GPU.)"""
    def forward(self, x):
        if not self.training or world_size() == 1:
            return super().forward(x)
        f = x.float()                                   # also under autocast, as torch's
        mean = Summed.apply(f.mean((0, 2, 3))) / world_size()
        var = Summed.apply((f - mean[:, None, None]).square().mean((0, 2, 3))) / world_size()
        if self.track_running_stats:
            n = x.numel() / x.shape[1] * world_size()
            with torch.no_grad():
                self.num_batches_tracked += 1           # no momentum: the mean of all batches, for --swa
                momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(var * n / (n - 1), momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (f * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x.dtype)

def sync_bn(*networks):
    """Every BN of the networks becomes a SyncBatchNorm2d; keys and weights stay. A network may be None."""
    for net in networks:
        for module in net.modules() if net else ():
            if type(module) is torch.nn.BatchNorm2d:
                module.__class__ = SyncBatchNorm2d
