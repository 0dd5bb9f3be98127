"""The README's first command and its evaluation, on real images, as a newcomer runs them.
About five minutes on two cores."""
import json, pathlib, subprocess, sys

HERE = pathlib.Path(__file__).parent.parent

def python(cwd, script, *argv):
    done = subprocess.run([sys.executable, str(HERE / script), *argv], cwd=cwd,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

def test_teacher_falls_and_student_stands(tmp_path):
    out = python(tmp_path, 'train_adv.py', '--loss', 'logit_mse', '--beta', '0.2', '--dataset', 'digits')
    assert 'training it first' in out
    attacks = {'digits-resnet18-w8-teacher': ['pgd'],
               'digits-resnet18-w8-logit_mse-beta0.2-s0': ['pgd', 'autoattack']}
    accuracy = {}
    for run, names in attacks.items():
        python(tmp_path, 'evaluate.py', f'runs/{run}/best.pt', '--n', '50', '--attacks', *names,
               '--out', 'e.json')
        results = json.loads((tmp_path / 'e.json').read_text())['results']
        accuracy[run] = {k: v['accuracy'] for k, v in results.items()}
        assert (tmp_path / f'runs/{run}/curves.png').stat().st_size > 1000
    teacher, student = accuracy.values()
    assert teacher['clean'] > 95 and teacher['pgd-20'] < 5
    assert student['clean'] > 95 and student['pgd-20'] > 85
    assert student['pgd-20'] - 5 <= student['autoattack (worst case)'] <= student['pgd-20']
