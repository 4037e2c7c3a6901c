"""Run by torchrun: logits of a decoder split over two processes, compared with the whole one."""

import sys

import torch
import torch.distributed as dist

from danlu.models.decoder.heads import DanluForCausalLM

torch.set_num_threads(1)
dist.init_process_group("gloo")
ids = torch.arange(1, 13)[None] % 50
whole = DanluForCausalLM.from_pretrained(sys.argv[1]).eval()
parts = DanluForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto").eval()
split = parts.model.layers[0].mlp.up_proj.weight
assert tuple(getattr(split, "_local_tensor", split).shape) == (24, 32), split.shape
with torch.no_grad():
    error = (parts(ids).logits - whole(ids).logits).abs().max().item()
if dist.get_rank() == 0:
    print("error", error)
dist.destroy_process_group()
