"""Tests run on one thread each: small models gain nothing from more, and a busy machine slows threads down."""

import torch

torch.set_num_threads(1)
