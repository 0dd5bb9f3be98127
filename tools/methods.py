"""
The table of methods in the README, made of the losses' signatures and docstrings.

$ python -m tools.methods
"""
from losses import METHODS, asked_for, hparams
from support.describe import as_flag

def table():
    """METHODS as the README shows it, made of signatures and docstrings."""
    rows = ['| `--loss` | minimises | its attack climbs | flags | labels | teacher | source |',
            '|---|---|---|---|---|---|---|']
    for name, method in METHODS.items():
        source, formula = [line.strip() for line in method.loss.__doc__.splitlines()[:2]]
        authors, title, _ = source.partition(',')               # the title stands in the docstring
        climbs = method.inner.__doc__ if method.inner else '-'
        flags = ' '.join(f'`{as_flag(k, not v if isinstance(v, bool) else v)}`'   # of a switch the other way
                         for k, v in hparams(method.loss).items())
        names = asked_for(method)
        teachers = [method.teacher, any(n.startswith('s_') for n in names) and 'standard',
                    'guide_logits' in names and 'trains along']
        cells = (f'`{name}`', formula, climbs, flags or '-', 'y' if 'y' in names else '**none**',
                 ' + '.join(filter(None, teachers)) or '-', authors if title else '-')
        rows.append('| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |')
    return '\n'.join(rows)

if __name__ == '__main__':
    print(table())
