"""A stand-in for EasyEdit with its module names and signatures, written for these tests: plain loops in torch."""

import os

os.environ["CUDA_LAUNCH_BLOCKING"] = "1"

from .models.alphaedit import AlphaEdit_main
from .models.emmet import emmet_main
from .models.grace import GRACE
from .models.memit import memit_main
from .models.rome import rome_main
from .models.ultraedit import ULTRAEDIT
from .models.wise import WISE
from .util import alg_dict

__all__ = [
    "GRACE",
    "ULTRAEDIT",
    "WISE",
    "AlphaEdit_main",
    "alg_dict",
    "emmet_main",
    "memit_main",
    "rome_main",
]
