import torch


class TokenizedDataset:
    def __init__(self, texts, tokenizer, maxlen):
        self.texts, self.tokenizer, self.maxlen = texts, tokenizer, maxlen

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        ids = self.tokenizer(self.texts[i]["text"])["input_ids"][: self.maxlen]
        return {"input_ids": ids, "position_ids": list(range(len(ids))), "attention_mask": [1] * len(ids)}


def length_collation(token_size):
    def collate(items):
        longest = max(len(item["input_ids"]) for item in items)
        pad = {k: [item[k] + [0] * (longest - len(item[k])) for item in items] for k in items[0]}
        return [{k: torch.tensor(rows) for k, rows in pad.items()}]

    return collate


def flatten_masked_batch(data, mask):
    return data[mask.bool()]
