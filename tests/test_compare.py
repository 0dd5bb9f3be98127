"""tools/compare.py: reports that are no comparison are refused by name; the others make a sorted table, and a
folder one of all that lies in it."""
import json

import pytest

from test_smoke import HERE, run

SETTINGS = dict(images='20: abc', step_size=2.0, steps=20, restarts=1, seed=0, branch='main',
                search='float32, eager', precision='float32', batch_size=50, transfer_from=None,
                weights='any', torch='2')
AA = 'autoattack (worst case)'

def result(mask):
    return dict(robust=mask, n=len(mask), accuracy=100 * mask.count('1') / len(mask), interval=[1.0, 99.0],
                class_worst=3, per_class={'3': 12.5, '4': 50.0})

@pytest.fixture
def write(tmp_path):
    def written(name, rows=('clean', 'pgd-20', AA), right=10, report={}, **evaluated):
        results = {row: result('1' * right + '0' * (20 - right)) for row in rows}
        if 'clean' in rows:
            results['clean'] = result('1' * 20)
        content = dict(dataset='d', images='first 20 of 99 test images', norm='Linf', eps_pixels=8,
                       complete=True, results=results, evaluated=dict(SETTINGS, **evaluated),
                       checkpoint=f'{name}/best.pt', fingerprint='0', model=dict(num_classes=10),
                       trained={}, args={})
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(dict(content, **report)))
        return tmp_path / name
    return written

def refused(capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run('tools/compare.py', *argv)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and err.count('\n') == 1 and out == ''
    return err

@pytest.mark.parametrize('change', [
    dict(step_size=0.5), dict(steps=10), dict(restarts=2), dict(seed=1), dict(branch='aux'),
    dict(batch_size=25), dict(search='bfloat16, compiled'), dict(images='20: other'),
    dict(report=dict(norm='L2')), dict(report=dict(eps_pixels=4)), dict(report=dict(dataset='e'))])
def test_what_makes_the_number_is_refused_by_name(change, write, capsys):
    a, b = write('a.json'), write('b.json', **change)
    name = next(iter(change.get('report', change)))
    for order in ((a, b), (b, a), (a, a, b)):
        assert f'not comparable: {name} is' in refused(capsys, *order)

@pytest.mark.parametrize('change', [
    dict(args=[]), dict(trained=None), dict(results={'clean': dict(result('1'), interval=['a', 1])}),
    dict(results={'clean': dict(result('1'), per_class=5)}), dict(results=[])])
def test_what_was_edited_by_hand_is_no_report(change, write, capsys):
    edited = write('b.json', report=change)
    assert 'is not a report of evaluate.py' in refused(capsys, write('a.json'), edited)

def test_what_does_not_make_the_number_is_no_reason(write, capsys):
    a = write('a.json', rows=('clean', 'pgd-20'))
    b = write('b.json', rows=('clean', 'pgd-20'), batch_size=25, weights='others', torch='3')
    run('tools/compare.py', a, b)
    assert 'note: torch differs: 2, 3' in capsys.readouterr().out

def test_rows_that_not_all_have_are_left_out(write, capsys):
    a, b = write('a.json', rows=('clean', 'pgd-20')), write('b.json', rows=('clean', 'cw-20'))
    run('tools/compare.py', a, b)
    out = capsys.readouterr().out
    assert 'pgd-20' not in out and 'cw-20' not in out and 'within the noise' in out
    assert 'is not a report' in refused(capsys, a, write('b.json', rows=('cw-20',)))

def test_all_of_other_attacks_is_another_row(write, capsys):
    rows = 'clean', 'pgd-20', 'all of the above'
    a, b = [write(f'{name}.json', rows=rows, report=dict(args=dict(attacks=attacks)))
            for name, attacks in (('a', ['pgd', 'fgsm']), ('b', ['pgd', 'cw']))]
    run('tools/compare.py', a, b)
    assert 'all of the above' not in capsys.readouterr().out
    run('tools/compare.py', a, a)
    assert 'all of the above' in capsys.readouterr().out
    b = write('v.json', rows=rows, report=dict(args=dict(attacks=['pgd', 'fgsm'], verify='a.adv')))
    run('tools/compare.py', a, b)
    assert 'all of the above' not in capsys.readouterr().out

def test_many_reports_make_a_sorted_table_and_a_picture(write, tmp_path, capsys):
    paths = [write(f'{right}.json', right=right) for right in (10, 3, 17, 12)]
    run('tools/compare.py', *paths, '--scatter', tmp_path / 'p.png')
    out = capsys.readouterr().out
    table = [line.split() for line in out.splitlines() if '12.50 (3)' in line]
    assert [line[2] for line in table] == ['85.00', '60.00', '50.00', '15.00']
    assert table[0] == ['100.00', '85.00', '85.00', '1.00', '-', '99.00', '12.50', '(3)', str(paths[2])]
    assert out.count(f'a: {paths[0]}') == 3 and out.count(AA) == 4         # its tests, and the title
    assert (tmp_path / 'p.png').read_bytes().startswith(b'\x89PNG')

# -----------------------------------------------------------------------------
# a folder

def trained(**flags):
    run = dict(dict(loss='trades', lr=0.1, awp=0.0, out='elsewhere'), **flags)
    return dict(trained=dict(loss='trades', run=run))

def logged(path, epochs, **flags):
    path.parent.mkdir(exist_ok=True)
    rows = [dict(epoch=e + 1, loss=1.0, val_clean=40.0 + e, val_pgd20=20.0 + e) for e in range(epochs)]
    config = dict(loss='trades', lr=0.1, epochs=9, val_images=200, **flags)
    path.write_text(''.join(json.dumps(row) + '\n' for row in [config, *rows]))

def table(capsys, *folders):
    """name -> the rest of its row."""
    capsys.readouterr()
    run('tools/compare.py', *folders)
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith('  of'))
    cut = lines[start].index('of')
    rows = {}
    for line in lines[start + 1:]:
        if line.strip() and not line.startswith('*'):
            name, _, flags = line[cut:].partition('  ')
            rows[name] = ' '.join(line[:cut].split()), flags
    return rows, '\n'.join(lines)

def test_a_folder_becomes_a_table(write, tmp_path, capsys):
    write('a/best.json', report=trained(seed=0, beta=6.0))
    write('b/best.json', rows=('clean', 'pgd-20'), right=13, report=trained(seed=1, beta=6.0))
    weak = trained(seed=0, beta=6.0, awp=0.005)
    write('c/best.json', rows=('clean', 'aa-fast (two)'), right=4, report=weak)
    logged(tmp_path / 'a/log.jsonl', 9)
    logged(tmp_path / 'd/log.jsonl', 2, beta=5.0)
    (tmp_path / 'speed.json').write_text('{"rows": []}')
    rows, out = table(capsys, tmp_path)
    assert list(rows) == ['a/best', 'b/best', 'c/best', 'd (held out, epoch 2 of 9)']
    assert rows['a/best'] == ('20 100.0 (1-99) 50.0 (1-99) 50.0 (1-99) 12.50 (3)', 'loss trades')
    assert rows['b/best'] == ('20 100.0 (1-99) 65.0 (1-99) - 12.50 (3)', 'loss trades, seed 1')
    assert rows['c/best'] == ('20 100.0 (1-99) - 20.0 (1-99)* 12.50 (3)', 'loss trades, awp 0.005')
    assert rows['d (held out, epoch 2 of 9)'] == ('200 41.0 (34-48) 21.0 (16-27) - -', 'loss trades, beta 5')
    assert '2 runs, 3 reports' in out and 'only APGD-CE and APGD-T' in out
    # what all have, and where they lie, is no news
    assert 'unless the row says otherwise: beta 6\n' in out
    assert 'lr' not in out and 'elsewhere' not in out

def test_a_run_in_work_is_in_the_table(write, tmp_path, capsys):
    write('a/best.json', rows=('clean', 'pgd-20'), report=dict(trained(), complete=False))
    logged(tmp_path / 'b/log.jsonl', 0)
    logged(tmp_path / 'c/log.jsonl', 1)
    with open(tmp_path / 'c/log.jsonl', 'a') as f:
        f.write('{"epoch": 2, "lo')
    rows, out = table(capsys, tmp_path)
    assert list(rows) == ['a/best (unfinished)', 'b (held out, epoch 0 of 9)']
    assert f'note: {tmp_path}/c/log.jsonl is not the log of a training' in out

def test_reports_beside_a_named_log_are_of_its_run(write, tmp_path, capsys):
    """As in results/small: trades.jsonl has a report, trades-awp.jsonl has none."""
    write('trades.pgd.json', report=trained())
    logged(tmp_path / 'trades.jsonl', 9)
    logged(tmp_path / 'trades-awp.jsonl', 9, awp=0.005)
    assert list(table(capsys, tmp_path)[0]) == ['trades-awp (held out, epoch 9 of 9)', 'trades.pgd']

def test_the_results_of_this_repository_make_a_table(capsys):
    rows, out = table(capsys, HERE / 'results/small')
    report = json.loads((HERE / 'results/small/mart-s0.pgd.json').read_text())['results']
    cells, flags = rows['mart-s0.pgd']
    clean, pgd = [report[row]['accuracy'] for row in ('clean', 'pgd-20')]
    assert cells.startswith(f'1000 {clean:.1f} (') and f' {pgd:.1f} (' in cells
    assert flags.startswith('loss mart') and len(rows) >= 100 and 'None' not in out

def test_a_folder_of_nothing_and_a_folder_beside_a_report_are_refused(write, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    assert 'neither a log.jsonl nor a report' in refused(capsys, tmp_path / 'empty')
    assert 'folders are for a table alone' in refused(capsys, tmp_path / 'empty', write('a.json'))
