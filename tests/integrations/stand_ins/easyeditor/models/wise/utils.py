"""When to stop, and how far activations moved."""


class EarlyStopMeter:
    def __init__(self):
        self.val, self.pre = 1e9, 0

    def update(self, val):
        self.pre, self.val = self.val, val

    def stop(self):
        return abs(self.val - self.pre) <= 1e-4 and self.val <= 0.02
