"""tools/compare.py: reports that are no comparison are refused by name; the others make a sorted table."""
import json

import pytest

from test_smoke import run

SETTINGS = dict(images='20: abc', step_size=2.0, steps=20, restarts=1, seed=0, branch='main', search='float32, eager',
                precision='float32', batch_size=50, transfer_from=None, weights='any', torch='2')
AA = 'autoattack (worst case)'

def result(mask):
    return dict(robust=mask, accuracy=100 * mask.count('1') / len(mask), interval=[1.0, 99.0], class_worst=3,
                per_class={'3': 12.5, '4': 50.0})

@pytest.fixture
def write(tmp_path):
    def written(name, rows=('clean', 'pgd-20', AA), right=10, report={}, **evaluated):
        results = {row: result('1' * (20 if row == 'clean' else right) + '0' * (0 if row == 'clean' else 20 - right))
                   for row in rows}
        content = dict(dataset='d', images='first 20 of 99 test images', norm='Linf', eps_pixels=8, complete=True,
                       results=results, evaluated=dict(SETTINGS, **evaluated))
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
    dict(step_size=0.5), dict(steps=10), dict(restarts=2), dict(seed=1), dict(branch='aux'), dict(batch_size=25),
    dict(search='bfloat16, compiled'), dict(images='20: other'), dict(report=dict(norm='L2')),
    dict(report=dict(eps_pixels=4)), dict(report=dict(dataset='e'))])
def test_what_makes_the_number_is_refused_by_name(change, write, capsys):
    a, b = write('a.json'), write('b.json', **change)
    name = next(iter(change.get('report', change)))
    for order in ((a, b), (b, a), (a, a, b)):
        assert f'not comparable: {name} is' in refused(capsys, *order)

def test_what_does_not_make_the_number_is_no_reason(write, capsys):
    a = write('a.json', rows=('clean', 'pgd-20'))
    run('tools/compare.py', a, write('b.json', rows=('clean', 'pgd-20'), batch_size=25, weights='others', torch='3'))
    assert 'note: torch differs: 2, 3' in capsys.readouterr().out

def test_no_common_row_is_an_error(write, capsys):
    assert 'no row is common' in refused(capsys, write('a.json'), write('b.json', rows=('other',)))

def test_many_reports_make_a_sorted_table_and_a_picture(write, tmp_path, capsys):
    paths = [write(f'{right}.json', right=right) for right in (10, 3, 17, 12)]
    run('tools/compare.py', *paths, '--scatter', tmp_path / 'p.png')
    out = capsys.readouterr().out
    table = [line.split() for line in out.splitlines() if '12.50 (3)' in line]
    assert [line[2] for line in table] == ['85.00', '60.00', '50.00', '15.00']
    assert table[0] == ['100.00', '85.00', '85.00', '1.00', '-', '99.00', '12.50', '(3)', str(paths[2])]
    assert out.count(f'a: {paths[0]}') == 3 and out.count(AA) == 4         # its tests, and the title
    assert (tmp_path / 'p.png').read_bytes().startswith(b'\x89PNG')
