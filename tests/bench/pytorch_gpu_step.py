"""The other side of `tarazed gpu-check --bench`: a PyTorch training step of the same model on the same GPU.

    python tests/bench/pytorch_gpu_step.py CONFIG.toml MICRO_BATCHES [DEVICE]

Reads the shape, the micro-batch and AdamW of a run's config (`configs/gpu-*.toml`). A step is MICRO_BATCHES micro-batches of
`batch.micro_batch_sequences` sequences of random ids, one clipping, one update: what the other side does. DEVICE is `cuda`
unless it says otherwise.

Speaks one JSON object a line on stdout: first {"ready": ..., "parameters": ..., "tokens_per_step": ...}, then for each line
`step` on stdin {"seconds": ..., "loss": ...}. The driver starts it, alternates the sides, and takes medians.

PyTorch as its users run it fast: torch.compile of the whole model, bf16 by autocast over fp32 weights, fused query-key-value
and gate-up projections, scaled_dot_product_attention (enable_gqa where heads are grouped), fused AdamW, TF32 for what is left
in fp32, gradients set to none, one synchronisation a step. Losses are read once a step.
"""

import json
import pathlib
import sys
import time
import tomllib

import torch
import torch.nn as nn
import torch.nn.functional as F


class Layer(nn.Module):
    def __init__(self, shape):
        super().__init__()
        hidden = shape["hidden"]
        self.heads, self.kv_heads = shape["heads"], shape["kv_heads"]
        self.head_dim, self.ffn, self.eps = hidden // shape["heads"], shape["ffn"], shape["norm_eps"]
        self.attention_norm = nn.Parameter(torch.ones(hidden))
        self.qkv = nn.Linear(hidden, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, hidden, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(hidden))
        self.gate_up = nn.Linear(hidden, 2 * self.ffn, bias=False)
        self.down = nn.Linear(self.ffn, hidden, bias=False)

    def forward(self, x, cos, sin):
        sequences, positions, hidden = x.shape
        qkv = self.qkv(F.rms_norm(x, (hidden,), self.attention_norm, self.eps))
        qkv = qkv.view(sequences, positions, self.heads + 2 * self.kv_heads, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.out(y.transpose(1, 2).reshape(sequences, positions, hidden))
        gate, up = self.gate_up(F.rms_norm(x, (hidden,), self.mlp_norm, self.eps)).split(self.ffn, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Decoder(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.eps = shape["norm_eps"]
        self.embed = nn.Parameter(torch.empty(shape["vocabulary"], shape["hidden"]))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape["layers"]))
        self.norm = nn.Parameter(torch.ones(shape["hidden"]))
        self.head = nn.Parameter(torch.empty(shape["vocabulary"], shape["hidden"]))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=shape["init_std"])
            else:
                nn.init.constant_(parameter, shape["norm_init"])
        half = shape["hidden"] // shape["heads"] // 2
        frequency = shape["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(shape["context"], dtype=torch.float64)[:, None] * frequency[None, :]
        self.register_buffer("cos", angle.cos().float())
        self.register_buffer("sin", angle.sin().float())

    def forward(self, inputs, targets):
        """Summed token loss of `inputs` and `targets` [sequences, context]."""
        x = F.embedding(inputs, self.embed)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = F.linear(F.rms_norm(x, (x.shape[-1],), self.norm, self.eps), self.head)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


# What a config may leave out, as the runtime has it (README.md).
MODEL_DEFAULTS = {"rope_theta": 10000.0, "norm_eps": 1e-5, "init_std": 0.02, "norm_init": 1.0}
OPTIMIZER_DEFAULTS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}


def read(path):
    config = tomllib.loads(pathlib.Path(path).read_text())
    model = MODEL_DEFAULTS | config["model"]
    optimizer = OPTIMIZER_DEFAULTS | config["optimizer"]
    return model, optimizer, config["batch"]["micro_batch_sequences"]


class Trainer:
    def __init__(self, model, optimizer, sequences, micro_batches, device):
        torch.manual_seed(1)
        self.device, self.clip_norm = device, optimizer["clip_norm"]
        self.micro_batches = micro_batches
        self.tokens_per_step = micro_batches * sequences * model["context"]
        ids = (micro_batches, sequences, model["context"] + 1)
        self.tokens = torch.randint(model["vocabulary"], ids, device=device)
        self.model = Decoder(model).to(device)
        self.loss = torch.compile(self.model, dynamic=False) if device == "cuda" else self.model
        groups = [
            dict(params=[p for p in self.model.parameters() if p.dim() > 1], weight_decay=optimizer["weight_decay"]),
            dict(params=[p for p in self.model.parameters() if p.dim() == 1], weight_decay=0.0),
        ]
        betas = (optimizer["beta1"], optimizer["beta2"])
        self.optimizer = torch.optim.AdamW(
            groups, lr=optimizer["learning_rate"], betas=betas, eps=optimizer["eps"], fused=True
        )

    def synchronize(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def step(self):
        self.synchronize()
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for tokens in self.tokens:
            with torch.autocast(self.device, dtype=torch.bfloat16):
                loss = self.loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) / self.tokens_per_step
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm, foreach=True)
        self.optimizer.step()
        loss = total.item()
        self.synchronize()
        return time.perf_counter() - start, loss


def say(**fields):
    print(json.dumps(fields), flush=True)


def main():
    model, optimizer, sequences = read(sys.argv[1])
    device = sys.argv[3] if len(sys.argv) > 3 else "cuda"
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(model, optimizer, sequences, int(sys.argv[2]), device)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    say(ready=torch.__version__, parameters=parameters, tokens_per_step=trainer.tokens_per_step)
    for line in sys.stdin:
        if line.strip() != "step":
            break
        seconds, loss = trainer.step()
        say(seconds=seconds, loss=loss)


if __name__ == "__main__":
    main()
