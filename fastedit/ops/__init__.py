"""Operations on tensors in which knowledge editing spends its time; usable with nothing else of fastedit.

Every function here picks its backend by device (:mod:`fastedit.ops.backend`); ``torch.ops.fastedit.*`` are
the same operations for graphs and other libraries.
"""

from .backend import use_backend
from .covariance import CovarianceAccumulator, covariance_, covariance_reference
from .low_rank import low_rank_update_, low_rank_update_reference
from .solve import CovarianceFactor, DualSolver, Projector, RidgeSolver, ridge_factors

__all__ = [
    "CovarianceAccumulator",
    "CovarianceFactor",
    "DualSolver",
    "Projector",
    "RidgeSolver",
    "covariance_",
    "covariance_reference",
    "low_rank_update_",
    "low_rank_update_reference",
    "ridge_factors",
    "use_backend",
]
