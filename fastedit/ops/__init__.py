"""Operations on tensors in which knowledge editing spends its time; usable with nothing else of fastedit.

Every function here picks its backend by device (:mod:`fastedit.ops.backend`); ``torch.ops.fastedit.*`` are
the same operations for graphs and other libraries.
"""

from .backend import use_backend
from .covariance import CovarianceAccumulator, covariance_, covariance_reference
from .key_index import FaissIndex, KeyIndex
from .low_rank import low_rank_update_, low_rank_update_reference
from .masked_update import (
    MaskedAdamState,
    masked_adam_,
    masked_adam_reference,
    masked_sgd_,
    masked_sgd_reference,
)
from .masks import BitMask, IndexMask, PhiloxMask
from .neuron_select import (
    Selection,
    gather_square,
    gather_square_reference,
    neuron_scores,
    neuron_scores_reference,
    neuron_select,
    neuron_select_keys,
    neuron_select_reference,
)
from .retrieval import max_inner_product, max_inner_product_reference, nearest_key, nearest_key_reference
from .routing import route, routing_score, routing_score_reference
from .solve import CovarianceFactor, DualSolver, Projector, RidgeSolver, ridge_factors
from .ties import ties_merge, ties_merge_reference

__all__ = [
    "BitMask",
    "CovarianceAccumulator",
    "CovarianceFactor",
    "DualSolver",
    "FaissIndex",
    "IndexMask",
    "KeyIndex",
    "MaskedAdamState",
    "PhiloxMask",
    "Projector",
    "RidgeSolver",
    "Selection",
    "covariance_",
    "covariance_reference",
    "gather_square",
    "gather_square_reference",
    "low_rank_update_",
    "low_rank_update_reference",
    "masked_adam_",
    "masked_adam_reference",
    "masked_sgd_",
    "masked_sgd_reference",
    "max_inner_product",
    "max_inner_product_reference",
    "nearest_key",
    "nearest_key_reference",
    "neuron_scores",
    "neuron_scores_reference",
    "neuron_select",
    "neuron_select_keys",
    "neuron_select_reference",
    "ridge_factors",
    "route",
    "routing_score",
    "routing_score_reference",
    "ties_merge",
    "ties_merge_reference",
    "use_backend",
]
