"""Golden vectors of the published implementations: whatever cases the data folder holds."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastedit import Fact

# Which of our methods a case belongs to, by the case's name; the first match counts.
METHOD_OF_CASE = [
    (r"memit_seq", "memit-cache"),
    (r"memit", "memit"),
    (r"rrome", "r-rome"),
    (r"prome", "p-rome"),
    (r"rome", "rome"),
    (r"emmet", "emmet"),
    (r"alphaedit", "alphaedit"),
    (r"nse", "nse"),
    (r"grace", "grace"),
    (r"wise", "wise"),
]


# Hyper-parameters that a case's name stands for and its configuration does not list.
PARAMS_OF_CASE: dict[str, dict[str, Any]] = {"memit_rect": {"rect": 0.4}}


@dataclass
class GoldenCase:
    """One case: its description, arrays, facts in batches, and the model it was run on."""

    name: str
    method: str
    folder: Path
    model_folder: Path
    data: dict[str, Any]

    def __post_init__(self) -> None:
        with np.load(self.folder / f"{self.name}.npz") as stored:
            self.arrays = dict(stored)

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    @property
    def hparams(self) -> dict[str, Any]:
        return self.data["hparams"]

    @property
    def batches(self) -> list[list[Fact]]:
        by_index = {request["index"]: request for request in self.data["requests"]}
        return [[fact_of(by_index[index]) for index in batch] for batch in self.data["batches"]]

    def covariance(self) -> dict[int, Tensor]:
        index = json.loads((self.folder / "index.json").read_text())
        with np.load(self.folder / index["covariance"]) as stored:
            return {layer: torch.from_numpy(stored[f"cov_L{layer}"]) for layer in self.data["layers"]}

    def null_spaces(self) -> dict[int, Tensor]:
        index = json.loads((self.folder / "index.json").read_text())
        with np.load(self.folder / index.get("null_space", "nullspace_P.npz")) as stored:
            return {layer: torch.from_numpy(stored[f"P_L{layer}"]) for layer in self.data["layers"]}

    def load_model(self, *, eager: bool = False) -> tuple[Any, Any]:
        """The model, with plain attention if ``eager``, and its tokenizer."""
        from transformers import AutoModelForCausalLM

        from fastedit.models.loading import load_model

        model, tokenizer = load_model(str(self.model_folder), device="cpu")
        if eager:
            plain = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
            plain.to(model.dtype).load_state_dict(model.state_dict())
            model = plain.eval()
        return model, tokenizer


def fact_of(request: dict[str, Any]) -> Fact:
    return Fact(request["prompt"], request["subject"], request["target_new"], case_id=request["case_id"])


def find_cases() -> list[str]:
    """Names of all cases in the data folder; none if it is not set."""
    root = os.environ.get("FASTEDIT_TEST_DATA")
    index = Path(root) / "golden" / "index.json" if root else None
    if index is None or not index.exists():
        return []
    return sorted(json.loads(index.read_text())["cases"])


def load_case(name: str) -> GoldenCase:
    folder = Path(os.environ["FASTEDIT_TEST_DATA"]) / "golden"
    index = json.loads((folder / "index.json").read_text())
    method = next((method for pattern, method in METHOD_OF_CASE if re.match(pattern, name)), name)
    data = json.loads((folder / index["cases"][name]["data"]).read_text())
    return GoldenCase(name, method, folder, (folder / index["model"]).resolve(), data)
