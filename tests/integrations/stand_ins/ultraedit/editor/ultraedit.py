import math

import torch
from nets import RunningMeanStd
from util import get_module, get_shape


class ULTRAEDIT:
    def __init__(self, config, model):
        self.config, self.model = config, model
        self.lifelong_normalizer = {}

    def predict_param_shifts(self):
        config, shifts = self.config, {}
        folder = (
            f"{config.editor.cache_dir}/{config.model.name}_{config.dataset.name}_{config.editor.name}"
            f"_{config.dataset.n_edits}_{config.num_seq}"
        )
        edits, size = config.dataset.n_edits, config.dataset.batch_size
        for number, name in enumerate(config.model.edit_modules):
            d_in, d_out = get_shape(get_module(self.model, name))
            keys = torch.cat(
                [
                    torch.load(f"{folder}/{number}_{i}_keys.pth", weights_only=True)
                    for i in range(math.ceil(edits / size))
                ]
            )
            grads = torch.cat(
                [
                    torch.load(f"{folder}/{number}_{i}_values_grad.pth", weights_only=True)
                    for i in range(math.ceil(edits // size))
                ]
            )
            both = torch.cat((keys, pad_tensor(grads, len(keys))), -1)
            usual_keys, usual_grads = self.lifelong_normalizer[str((d_in, d_out))](both).split(
                [d_in, d_out], -1
            )
            wanted = -config.editor.lr * (usual_keys * usual_keys).sum(-1, keepdim=True) * usual_grads
            shifts[name] = torch.linalg.solve(keys.T @ keys + torch.eye(d_in), keys.T @ wanted)
        return shifts


def pad_tensor(tensor, target_length, dim=0, padding_value=0):
    missing = target_length - len(tensor)
    return torch.cat((tensor, torch.full((missing, tensor.shape[1]), float(padding_value))))
