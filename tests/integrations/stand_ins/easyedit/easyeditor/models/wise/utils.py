"""When to stop, and how far activations moved."""


class EarlyStopMeter:
    def __init__(self):
        self.val, self.pre = 1e9, 0

    def update(self, val):
        self.pre, self.val = self.val, val

    def stop(self):
        return abs(self.val - self.pre) <= 1e-4 and self.val <= 0.02


class EditingMeanAct:
    def __init__(self, min_a=1e9):
        self.min_a = min_a

    def update(self, val):
        self.min_a = min(self.min_a, val)

    def min_act(self):
        return self.min_a
