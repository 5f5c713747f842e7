"""The other side of `bench_step`: a PyTorch training step of the same model, one command at a time.

Started by the driver (`tests/src/bin/bench_step/`), which alternates it with the runtime in one run:

    python tests/bench/pytorch_step.py FOLDER eager|compiled

FOLDER holds `config.json` (model shape, batch, optimizer, threads) and `inputs.safetensors` (initial weights under
Hugging Face Llama names, and `tokens` u32 [batches, sequences, context + 1]): both sides start from the same weights and
see the same batches, so their losses can be compared line by line.

Speaks one JSON object a line on stdout: first {"ready": …}, then for each `step N` on stdin
{"seconds": …, "cpu_seconds": …, "loss": …, "gradient_norm": …, "peak_mib": …}, the whole optimizer update of batch N: zero_grad, forward and backward in
micro-batches, clipping, AdamW.

What is done to let PyTorch run as fast as it will in exact fp32: fused query-key-value and gate-up projections,
scaled_dot_product_attention with enable_gqa, F.rms_norm, F.cross_entropy, fused AdamW, set_to_none, foreach clipping,
no autocast, float32 matmul precision "highest", inductor's freezing left off (it is for inference), and the micro-batch
is not imposed: before the first step each divisor offered by the driver is timed and the fastest is kept (the gradient is the
same sum). The memory allocator and OpenMP run as installed.
"""

import json
import math
import pathlib
import resource
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file


class Layer(nn.Module):
    def __init__(self, shape, weights, prefix):
        super().__init__()

        def linear(*names):
            weight = torch.cat([weights[prefix + name + ".weight"] for name in names])
            module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            module.weight = nn.Parameter(weight)
            return module

        self.heads, self.kv_heads = shape["heads"], shape["kv_heads"]
        self.head_dim = shape["hidden"] // shape["heads"]
        self.ffn, self.eps = shape["ffn"], shape["norm_eps"]
        self.attention_norm = nn.Parameter(weights[prefix + "input_layernorm.weight"])
        self.qkv = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.out = linear("self_attn.o_proj")
        self.mlp_norm = nn.Parameter(weights[prefix + "post_attention_layernorm.weight"])
        self.gate_up = linear("mlp.gate_proj", "mlp.up_proj")
        self.down = linear("mlp.down_proj")

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
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Decoder(nn.Module):
    def __init__(self, shape, weights):
        super().__init__()
        self.eps = shape["norm_eps"]
        self.embed = nn.Parameter(weights["model.embed_tokens.weight"])
        self.layers = nn.ModuleList(Layer(shape, weights, f"model.layers.{i}.") for i in range(shape["layers"]))
        self.norm = nn.Parameter(weights["model.norm.weight"])
        self.head = nn.Parameter(weights["lm_head.weight"])
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
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


class Trainer:
    def __init__(self, config, inputs, mode):
        self.config = config
        self.batches = inputs.pop("tokens").long()
        self.model = Decoder(config["model"], inputs)
        self.loss = self.model if mode == "eager" else torch.compile(self.model, dynamic=False)
        decaying = [p for p in self.model.parameters() if p.dim() > 1]
        steady = [p for p in self.model.parameters() if p.dim() == 1]
        o = config["optimizer"]
        groups = [dict(params=decaying, weight_decay=o["weight_decay"]), dict(params=steady, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(
            groups, lr=o["learning_rate"], betas=(o["beta1"], o["beta2"]), eps=o["eps"], fused=True
        )

    def accumulate(self, tokens, micro_batch):
        """Gradients of the mean token loss; returns that loss."""
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        total = 0.0
        for start in range(0, len(tokens), micro_batch):
            part = slice(start, start + micro_batch)
            loss = self.loss(inputs[part], targets[part]) / targets.numel()
            loss.backward()
            total += loss.item()
        return total

    def calibrate(self):
        """Times each micro-batch offered and keeps the fastest; weights and moments are untouched."""
        seconds = {}
        for micro_batch in self.config["micro_batch_candidates"]:
            for warm in (False, True, True):
                self.optimizer.zero_grad(set_to_none=True)
                start = time.perf_counter()
                self.accumulate(self.batches[0], micro_batch)
                if warm:
                    seconds[micro_batch] = min(seconds.get(micro_batch, math.inf), time.perf_counter() - start)
        self.optimizer.zero_grad(set_to_none=True)
        self.micro_batch = min(seconds, key=seconds.get)
        return seconds

    def step(self, index):
        tokens = self.batches[index % len(self.batches)]
        start, cpu = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.accumulate(tokens, self.micro_batch)
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config["optimizer"]["clip_norm"], foreach=True
        )
        self.optimizer.step()
        return time.perf_counter() - start, time.process_time() - cpu, loss, norm.item()


def say(**fields):
    print(json.dumps(fields), flush=True)


def main():
    folder, mode = pathlib.Path(sys.argv[1]), sys.argv[2]
    config = json.loads((folder / "config.json").read_text())
    torch.set_num_threads(config["threads"])
    torch.set_float32_matmul_precision("highest")
    trainer = Trainer(config, load_file(folder / "inputs.safetensors"), mode)
    calibration = trainer.calibrate()
    say(
        ready=mode,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        micro_batch=trainer.micro_batch,
        calibration_seconds={str(k): round(v, 4) for k, v in calibration.items()},
    )
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command != "step":
            break
        seconds, cpu_seconds, loss, norm = trainer.step(int(argument))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        say(seconds=seconds, cpu_seconds=cpu_seconds, loss=loss, gradient_norm=norm, peak_mib=peak)


if __name__ == "__main__":
    main()
