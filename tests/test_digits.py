"""The README's first command on real images, as a newcomer runs it. About three minutes on two cores."""
import json
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent.parent

def python(cwd, script, *argv):
    done = subprocess.run([sys.executable, str(HERE / script), *argv], cwd=cwd,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

def test_teacher_falls_and_student_stands(tmp_path):
    out = python(tmp_path, 'train_adv.py', '--loss', 'logit_mse', '--beta', '0.2', '--dataset', 'digits')
    assert 'training it first' in out
    accuracy = {}
    for run in ('digits-resnet18-w8-teacher', 'digits-resnet18-w8-logit_mse-beta0.2-s0'):
        python(tmp_path, 'evaluate.py', f'runs/{run}/best.pt', '--attacks', 'pgd', '--out', f'{run}.json')
        results = json.loads((tmp_path / f'{run}.json').read_text())['results']
        accuracy[run] = results['clean']['accuracy'], results['pgd-20']['accuracy']
        assert (tmp_path / f'runs/{run}/training.png').stat().st_size > 1000
    (teacher_clean, teacher_pgd), (student_clean, student_pgd) = accuracy.values()
    assert teacher_clean > 95 and teacher_pgd < 5
    assert student_clean > 95 and student_pgd > 85
