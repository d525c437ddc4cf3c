"""GRACE: a codebook of keys, values and radii in the place of a layer's output."""

import torch


def cdist_float32(key, query):
    return torch.cdist(key.float(), query.float())


def perturb_values(chosen_value, num_pert, device):
    return chosen_value + torch.randn(chosen_value.shape, device=device)


class GRACE(torch.nn.Module):
    def __init__(self, config, model, layer):
        super().__init__()
        self.config, self.model, self.layer, self.log_dict = config, model, layer, {}
        model.requires_grad_(False)
        owner, _, name = layer.replace("[", ".").replace("]", "").rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, name, GRACEAdapter(config, getattr(module, name)))
        self.adapter = getattr(module, name)

    def edit(self, config, tokens, edit_id):
        adapter = self.adapter
        adapter.key_id = (tokens["labels"] == -100).sum() - 1
        adapter.training, adapter.edit_label, adapter.edit_id = True, tokens["labels"], edit_id
        self.losses = []
        for step in range(config.n_iter):
            adapter.iter = step
            outputs = self.model(**tokens)
            if step == 0:
                optimizer = torch.optim.Adam(self.model.parameters(), config.edit_lr)
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            self.losses.append(outputs.loss.detach().cpu().numpy())
        self.loss = outputs.loss
        adapter.training = False
        self.log_dict["chosen_key"] = adapter.chosen_key
        self.log_dict["nkeys"] = len(adapter.keys)


class GRACEAdapter(torch.nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer, self.training, self.key_id, self.iter = config, layer, False, -1, 0
        self.init_epsilon, self.replacement, self.num_pert = config.eps, config.replacement, 1
        self.device, self.value_shape = layer.weight.device, layer.weight.shape[0]

    def init_key_value(self, query, value):
        return (
            query.detach(),
            value,
            torch.tensor(self.init_epsilon).view(1),
            [self.edit_label],
            [self.edit_id],
        )

    def add_key(self, new_key, new_value, new_edit_id):
        return (
            torch.vstack([self.keys, new_key.detach()]),
            torch.nn.Parameter(torch.vstack([self.values, new_value]).detach()),
            torch.vstack([self.epsilons.view(-1, 1), torch.tensor(self.init_epsilon).view(1, 1)]),
            [*self.key_labels, self.edit_label],
            [*self.edit_ids, new_edit_id],
        )

    def label_match(self, edit_label, key_label):
        return edit_label.float().mean() == key_label.float().mean()

    def split_epsilons_in_half(self, nearest_key, smallest_distance):
        self.epsilons[nearest_key] = smallest_distance / 2 - 1e-5
        self.epsilons[-1] = smallest_distance / 2

    def forward(self, *args):
        out = self.layer(*args)
        if not self.training and "keys" not in self.__dict__:
            return out
        last = args[0].shape[1] - 1
        if not self.training and self.key_id == -1:
            self.key_id = last
        place = min(self.key_id, last)
        query = args[0][:, place]
        if self.config.val_init == "cold":
            value = torch.nn.Parameter(torch.rand(1, self.value_shape))
        else:
            value = torch.nn.Parameter(out[:, place].detach())
        book = None
        if "keys" not in self.__dict__ or self.keys.nelement() == 0:
            book = self.init_key_value(query, value)
        elif self.iter == 0:
            distance, nearest = cdist_float32(self.keys, query).min(0)
            near = distance <= self.init_epsilon + self.epsilons[nearest]
            if not near or not self.label_match(self.edit_label, self.key_labels[nearest]):
                book = self.add_key(query, value, self.edit_id)
            elif distance > self.epsilons[nearest]:
                if self.config.eps_expand == "moving_average":
                    self.keys[nearest] = (self.keys[nearest] + query) / 2
                self.epsilons[nearest] = distance
        if book is not None:
            split = "keys" in self.__dict__ and self.keys.nelement() and near
            self.keys, self.values, self.epsilons, self.key_labels, self.edit_ids = book
            if split:
                self.split_epsilons_in_half(nearest, distance)
        distance, self.chosen_key = cdist_float32(self.keys, query).min(0)
        covered = (distance <= self.epsilons[self.chosen_key].view(-1))[:, None]
        chosen = self.values[self.chosen_key].to(out.dtype)
        if self.replacement == "replace_all":
            return torch.where(covered[:, None], chosen[:, None], out)
        out[:, place] = torch.where(covered, chosen, out[:, place])
        return out
