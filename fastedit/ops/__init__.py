"""Operations on tensors in which knowledge editing spends its time; usable with nothing else of fastedit.

Every function here picks its backend by device (:mod:`fastedit.ops.backend`); ``torch.ops.fastedit.*`` are
the same operations for graphs and other libraries.
"""

from .backend import use_backend
from .covariance import covariance_, covariance_reference
from .key_index import FaissIndex, KeyIndex
from .low_rank import DualSolver, low_rank_update_, low_rank_update_reference
from .retrieval import (
    max_inner_product,
    max_inner_product_reference,
    nearest_key,
    nearest_key_reference,
)
from .routing import route, routing_score, routing_score_reference

__all__ = [
    "DualSolver",
    "FaissIndex",
    "KeyIndex",
    "covariance_",
    "covariance_reference",
    "low_rank_update_",
    "low_rank_update_reference",
    "max_inner_product",
    "max_inner_product_reference",
    "nearest_key",
    "nearest_key_reference",
    "route",
    "routing_score",
    "routing_score_reference",
    "use_backend",
]
