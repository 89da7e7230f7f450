"""One thread per test process: tiny models gain nothing from more, and cores shared with other processes lose much."""

import torch

torch.set_num_threads(1)
