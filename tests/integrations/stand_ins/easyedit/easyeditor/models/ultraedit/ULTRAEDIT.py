"""UltraEdit's solve."""

import torch


def pad_tensor(tensor, target_length, dim=0, padding_value=0):
    missing = target_length - len(tensor)
    return torch.cat((tensor, torch.zeros(missing, tensor.shape[1]))) if missing > 0 else tensor


def get_shape(module):
    return tuple(module.weight.shape)[::-1]


def get_module(module, name):
    return module.get_submodule(name)


class ULTRAEDIT:
    def __init__(self, model, config, lifelong_normalizer):
        self.model, self.config, self.lifelong_normalizer = model, config, lifelong_normalizer

    def predict_param_shifts(self, module_kv_map):
        shifts = {}
        for number, name in enumerate(self.config.inner_params):
            d_in, d_out = get_shape(get_module(self.model, name))
            pairs = list(module_kv_map[number].values())
            keys = torch.cat([pair["keys"] for pair in pairs])
            gradients = torch.cat([pair["values_grad"] for pair in pairs])
            features = self.lifelong_normalizer[str((d_in, d_out))](torch.cat((keys, gradients), -1))
            usual, wanted = features.split([d_in, d_out], -1)
            wanted = -self.config.lr * usual.square().sum(-1, keepdim=True) * wanted
            shifts[name] = torch.linalg.solve(keys.T @ keys + torch.eye(d_in), keys.T @ wanted)
        return shifts
