"""Score programs and masks: what lies between ``q @ k.T`` and softmax, understood instead of matched."""
