from torch import nn


def get_module(model, name):
    return model.get_submodule(name)


def get_shape(module):
    shape = tuple(module.weight.shape)
    return shape[::-1] if isinstance(module, nn.Linear) else shape
