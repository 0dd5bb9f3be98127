"""
Two reports of evaluate.py side by side, paired by image: which difference is larger than the noise?

$ python -m tools.compare a.eval-Linf-8-n10000.json b.eval-Linf-8-n10000.json

p is McNemar's exact test: of the images that one of the two withstands and the other does not, how likely is
a split at least as uneven if both were equally robust? It knows the noise of the images, not that of the
training seed.
"""
import argparse, json, math

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 allow_abbrev=False)
parser.error = lambda message: parser.exit(2, f'{parser.prog}: error: {message}\n')
parser.add_argument('a')
parser.add_argument('b')
args = parser.parse_args()

def load(path):
    try:
        with open(path) as f:
            report = json.load(f)
        if not report['complete']:
            raise ValueError
        pixels = report.get('evaluated', {}).get('images')              # None: of an early version
        return dict({k: report[k] for k in ('results', 'dataset', 'images', 'norm', 'eps_pixels')},
                    pixels=pixels)
    except OSError as e:
        parser.error(f'cannot read {path}: {e.strerror}')
    except (ValueError, KeyError, TypeError):
        parser.error(f'{path} is not a report of evaluate.py, or of one that was stopped early')

def p_value(only_a, only_b):
    """Two-sided: the smaller of the two counts, or fewer, under a fair coin."""
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n)

a, b = load(args.a), load(args.b)
for k in ('dataset', 'images', 'norm', 'eps_pixels', 'pixels'):
    if a[k] != b[k] and None not in (a[k], b[k]):
        parser.error(f'not comparable: {k} is {a[k]} in {args.a}, {b[k]} in {args.b}')
rows = [row for row in a['results'] if row in b['results']]
if not all('robust' in r['results'][row] for r in (a, b) for row in rows):
    parser.error('a report without the verdict on every image: evaluate again')
print(f"{a['dataset']}, {a['images']}, {a['norm']} {a['eps_pixels']:g}/255")
print(f"{'accuracy in percent':<36}{'a':>8}{'b':>8}{'b - a':>8}{'only a':>8}{'only b':>8}{'p':>9}")
for row in rows:
    pairs = list(zip(a['results'][row]['robust'], b['results'][row]['robust']))
    only_a, only_b = pairs.count(('1', '0')), pairs.count(('0', '1'))
    accuracy = [r['results'][row]['accuracy'] for r in (a, b)]
    p = p_value(only_a, only_b)
    verdict = 'larger than the noise' if p < 0.05 else 'within the noise'
    print(f'{row:<36}{accuracy[0]:8.2f}{accuracy[1]:8.2f}{accuracy[1] - accuracy[0]:8.2f}'
          f'{only_a:8}{only_b:8}{p:9.4f}  {verdict}')
