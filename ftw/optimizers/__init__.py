"""From the state of an optimizer to its next update, as an affine function of the next gradient.

With the second moment fixed, the next change of a parameter is ``-(offset + operator(g))``. The operator is P, the
geometry of the selection; the offset (momentum, weight decay) does not depend on the choice of samples. Every function
takes the state of one parameter and has the same form::

    f(state arrays ..., step, *, lr, ..., anticipate=None, damping=0.0) -> LinearUpdate(offset, operator)

``step`` is the number of steps already taken, t = step + 1 the next one. ``anticipate=a`` folds a gradient, usually the
target's, into the second moment before it is used; without it P explodes on entries that were never touched, and so
does it, less, without ``damping``. With a = the gradient that is really applied and no damping,
``-(offset + operator(a))`` is the real change. Coupled weight decay changes the gradient: a is then
``g + weight_decay * param``. Hyper-parameters are Python floats under the names of ``torch.optim``; ``step`` and ``lr``
may be 0-d arrays.

===================  =========================================================  ====================
function             response P                                                 operator
===================  =========================================================  ====================
sgd                  lr (1 - dampening), with Nesterov lr (1 + mu (1 - damp.))  Scale
adam, adamw          lr (1 - b1) / (1 - b1^t) / (sqrt(v^) + eps)                Diagonal
nadam                the same with Nesterov's schedule of momenta               Diagonal
radam                the same, rectified; no v while t is small                 Diagonal, Scale
adamax               lr (1 - b1) / (1 - b1^t) / u                               Diagonal
adagrad              lr / (1 + (t - 1) lr_decay) / (sqrt(sum) + eps)            Diagonal
rmsprop              lr / (sqrt(v) + eps), v less the squared mean if centered  Diagonal
adadelta             lr sqrt(u + eps) / sqrt(v + eps)                           Diagonal
adafactor            row^-1/2 g col^-1/2, with torch's step sizes               Kronecker, Diagonal
hf_adafactor         the same, with those of fairseq and transformers           Kronecker, Diagonal
lion                 lr (1 - b1) / abs(c): a surrogate, see its text            Diagonal
asgd                 eta                                                        Scale
schedule_free_sgd    gamma (1 - mu (1 - c)), c the share of z in the average    Scale
schedule_free_adamw  gamma (1 - b1 (1 - c)) / (sqrt(v^) + eps)                  Diagonal
soap                 Adam in the eigenbases of Shampoo                          Rotated
muon                 derivative of the polar factor                             Polar
===================  =========================================================  ====================
"""

from ._adagrad import adadelta, adagrad, rmsprop
from ._adam import adam, adamax, adamw, nadam, radam
from ._factored import adafactor, hf_adafactor
from ._matrix import muon, soap
from ._schedule_free import schedule_free_adamw, schedule_free_sgd
from ._sign import asgd, lion, sgd
from ._update import LinearUpdate

__all__ = [
    "LinearUpdate",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "asgd",
    "hf_adafactor",
    "lion",
    "muon",
    "nadam",
    "radam",
    "rmsprop",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "sgd",
    "soap",
]
