"""Does selection pay on a model and data of one's own? ``python -m ftw_torch.trial``, or `run` from Python."""

from .arms import ARMS, Learner
from .errors import TrialError
from .experiment import run
from .race import Outcome
from .result import Result, Row
from .verdict import Difference

__all__ = ["ARMS", "Difference", "Learner", "Outcome", "Result", "Row", "TrialError", "run"]
