"""The table from which an editor takes its method."""

from ..models.memit.memit_main import execute_memit

ALG_DICT = {"MEMIT": execute_memit}
