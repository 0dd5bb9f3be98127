"""An evaluation that is killed at any moment, or shared by several processes, ends in the same report."""
import json, pathlib, random, subprocess, sys, time

import pytest

from support import checkpoint
from test_smoke import run

HERE = pathlib.Path(__file__).parent.parent
FLAGS = '--n 24 --batch-size 4 --eps 24 --attacks fgsm pgd cw aa-fast apgd-t --steps 10 --restarts 2'.split()

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    out = tmp_path_factory.mktemp('model')
    run('train_adv.py', '--loss', 'pgd_at', '--dataset', 'synthetic', '--width', 4, '--epochs', 2,
        '--out', out)
    return out / 'last.pt'

@pytest.fixture(scope='module')
def expected(model):
    run('evaluate.py', model, *FLAGS, '--out', model.parent / 'whole.json')
    return report(model.parent / 'whole.json')

def report(path):
    r = json.loads(path.read_text())
    assert r['complete']
    for row in r['results'].values():
        del row['seconds']
    return r['results'], r['notes'], r['fingerprint'], r['images']

def start(model, out, *flags):
    command = [sys.executable, str(HERE / 'evaluate.py'), str(model), *FLAGS, '--out', str(out), *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

def test_killed_three_times(model, expected, tmp_path):
    out, random_ = tmp_path / 'e.json', random.Random(0)
    batches = lambda: len(list(tmp_path.glob('e.json.state/*.pt')))
    kills = 0
    while kills < 3:
        done, process = batches(), start(model, out)
        while batches() < done + 2 and process.poll() is None:      # after two batches more, and then some
            time.sleep(0.02)
        time.sleep(random_.random() / 4)
        assert process.poll() is None, 'over before it could be killed: make it longer'
        process.kill()
        process.communicate()
        kills += 1
    assert batches() >= 6
    assert start(model, out).wait() == 0
    assert report(out) == expected and not batches()

def test_four_shards(model, expected, tmp_path):
    shards = [start(model, tmp_path / 'e.json', '--shard', f'{i}/4') for i in range(4)]
    assert [process.wait() for process in shards] == [0] * 4
    assert report(tmp_path / 'e.json') == expected and not (tmp_path / 'e.json.state').exists()

def test_half_of_another_evaluation_is_refused(model, tmp_path, capsys):
    process = start(model, tmp_path / 'e.json')
    while not list(tmp_path.glob('e.json.state/*.pt')):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    net, meta = checkpoint.load_checkpoint(model)
    net.linear.bias.data += 1
    del meta['config']
    checkpoint.save_checkpoint(tmp_path / 'other.pt', net, **meta)
    for argv, says in [([model, *FLAGS, '--seed', 1], 'seed was 0, is 1'),
                       ([tmp_path / 'other.pt', *FLAGS], 'weights was')]:
        with pytest.raises(SystemExit) as e:
            run('evaluate.py', *argv, '--out', tmp_path / 'e.json')
        err = capsys.readouterr().err
        assert e.value.code == 2 and says in err and err.count('\n') == 1
