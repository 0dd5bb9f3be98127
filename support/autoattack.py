"""
AutoAttack by its authors (Croce & Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble
of Diverse Parameter-free Attacks"), one of its four attacks and one batch at a time: what an
evaluation needs that is stopped and continued, shared, and reported stage by stage.

    for name in PARTS:                                              # of its version standard, in its order
        x_adv, broken, warnings = one_part(name, net, x[alive], y[alive], eps=8/255)
        ...                                                         # alive: those that net still gets right

Image by image the result of one call of theirs with the same seed and batch size. Their package is called
autoattack where it was installed from their repository, and pyautoattack on PyPI: the first is taken if both
are there, and package() says which, and its version.
"""
import importlib.metadata
import importlib.util
import logging


PARTS = ['apgd-ce', 'apgd-t', 'fab-t', 'square']
FAST = PARTS[:2]                    # these two break nearly every image that AutoAttack breaks

def package():
    """(name, version) of the package that is used. Raises ImportError where there is none."""
    for name in ('autoattack', 'pyautoattack'):
        if importlib.util.find_spec(name):
            try:
                return name, importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:         # a folder on the path, not installed
                return name, 'unknown'
    raise ImportError('AutoAttack is not installed: pip install pyautoattack')

def one_part(name, net, x, y, *, eps, norm='Linf', seed=0, classes=10):
    """x fp32 (B,C,H,W) in [0, 1] and y (B,): one batch, all classified correctly. -> x_adv (B,C,H,W), how
    many of them it says it broke, and its own warnings (randomised, zero gradients, Square wins). net gives
    fp32 logits for at least four classes."""
    # it takes views of x and of its gradient, which channels_last memory refuses: contiguous outside, any
    # layout inside
    logits = lambda x: net(x.flatten(1).view(x.shape))
    AutoAttack = importlib.import_module(package()[0]).AutoAttack
    aa = AutoAttack(logits, norm=norm, eps=eps, seed=seed, version='standard', device=x.device)
    aa.attacks_to_run = [name]
    aa.apgd_targeted.n_target_classes = aa.fab.n_target_classes = min(9, classes - 1)
    warnings, log, listener = [], logging.getLogger('auto-attack'), logging.Handler(logging.WARNING)
    propagate, log.propagate = log.propagate, False
    listener.emit = lambda record: warnings.append(record.getMessage())
    log.addHandler(listener)
    try:
        x_adv, taken_for = aa.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))
    finally:
        log.removeHandler(listener)
        log.propagate = propagate
    return x_adv, (taken_for != y).sum().item(), warnings
