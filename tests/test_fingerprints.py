"""Every way of training still leaves in the weights and BN statistics what it did, on every processor.
A change that is meant writes them anew: python tests/fingerprints.py --json tests/fingerprints.json"""
import json
import pathlib
import subprocess
import sys

from fingerprints import TOLERANCE, apart

HERE = pathlib.Path(__file__).parent
STORED = json.loads((HERE / 'fingerprints.json').read_text())

def test_every_way_of_training_leaves_what_it_did(tmp_path):
    # a process of its own, since it makes float64 the default
    done = subprocess.run([sys.executable, str(HERE / 'fingerprints.py'),
                           '--json', str(tmp_path / 'found.json')], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    found = json.loads((tmp_path / 'found.json').read_text())
    assert found.keys() == STORED.keys()
    differ = {name: apart(f, STORED[name]) for name, f in found.items() if apart(f, STORED[name]) > TOLERANCE}
    assert not differ

def test_the_comparison_could_fail():
    """The orders of the BN forwards, for instance, are further apart than a processor's rounding."""
    orders = [STORED[f'bn-order-{order}'] for order in ('nat-adv', 'adv-nat', 'nat', 'adv')]
    assert all(apart(a, b) > 1000 * TOLERANCE for i, a in enumerate(orders) for b in orders[:i])
