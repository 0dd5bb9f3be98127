"""
A checkpoint in pieces small enough to be carried: in half precision, and joined again to one in fp32.
"""
from support import checkpoint, files
from support.files import Refused

PIECE = 15_000_000                  # bytes

def split(path, start):
    """The checkpoint's weights in half precision: start-1.pt, start-2.pt, ..., each at most PIECE bytes."""
    known = checkpoint.read(path)
    weights, pieces, room = known.pop('state_dict'), [{}], PIECE - 200_000
    for name, value in weights.items():
        value = value.half() if value.is_floating_point() else value
        size = value.numel() * value.element_size()
        if size > room:
            pieces.append({})
            room = PIECE - 200_000
        room -= size
        pieces[-1][name] = value
    # the first is written last: where it is, the others are there, and of the same epoch
    for k, piece in reversed(list(enumerate(pieces, 1))):
        meta = known if k == 1 else dict(epoch=known['epoch'])
        files.save(f'{start}-{k}.pt', dict(meta, state_dict=piece, piece=k, pieces=len(pieces)))

def join(start):
    """start-1.pt and so on -> start.pt, a checkpoint in fp32. Raises Refused."""
    first = checkpoint.read(f'{start}-1.pt')
    if not isinstance(first, dict) or 'pieces' not in first:
        raise Refused(f'{start}-1.pt is no piece that this tool has written')
    for k in range(2, first.pop('pieces') + 1):
        piece = checkpoint.read(f'{start}-{k}.pt')
        if piece['epoch'] != first['epoch']:
            raise Refused(f'{start}-{k}.pt is of epoch {piece["epoch"]}, {start}-1.pt of {first["epoch"]}')
        first['state_dict'].update(piece['state_dict'])
    del first['piece']
    for name, value in first['state_dict'].items():
        if value.is_floating_point():
            first['state_dict'][name] = value.float()
    files.save(f'{start}.pt', first)
