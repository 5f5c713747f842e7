"""Writes the reference that `tests/tests/parity.rs` is held to: Aquila2 in plain PyTorch, in float64.

The model is written out from the architecture (arXiv 2408.07410, section 2 and Table 1; RMSNorm arXiv 1910.07467; RoPE
arXiv 2104.09864 in the rotate-half layout of Hugging Face's Llama; grouped-query attention arXiv 2305.13245; SwiGLU
arXiv 2002.05202; AdamW arXiv 1711.05101) and shares no code with the runtime. Gradients are PyTorch's autograd.

One file per case, `reference/<case>.safetensors`. S sequences, T context, V vocabulary, N steps:

    tokens              u32 [N, S, T+1]   batch n; position t predicts t+1
    loss_f64, loss_f32  f64 [S]           summed token loss of each sequence of batch 0, by the model in either precision
    weight.<name>       f32               initial weights, Hugging Face Llama names
    gradient.<name>     f32               of (sum of token losses of batch 0) / (S*T), computed in float64
    step.learning_rate  f64 [N]
    step.loss           f64 [N]           mean token loss of batch n before update n
    step.gradient_norm  f64 [N]           global L2 norm before clipping
    final.<name>        f32               weights after N AdamW updates, computed in float64

The header's metadata is one entry, `reference` (several would be written in no fixed order), a JSON object: `shape`,
`optimizer`, `torch` (the version that computed it), `f32_gradient_error`: by tensor, the relative Frobenius error of
PyTorch's own float32 gradients against float64, and `f32_final_error`: that of its float32 ten-step run, relative to
how far the tensor moved. They say what float32 can be asked for.

Clipping is the runtime's: scale = min(1, clip / norm). (torch.nn.utils.clip_grad_norm_ divides by norm + 1e-6.)
Weight decay is not applied to norm weights.

Run: python tests/parity/make_reference.py     (needs torch, numpy and safetensors; deterministic)
"""

import json
import math
import pathlib

import numpy
import torch
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).resolve().parent / "reference"

# Small, and chosen so that no two dimensions agree by accident. `wide_gqa` has the 6:2 grouping; `mha` a head of 6
# elements (no multiple of any vector width); `odd` a single key-value head, a context of 17 and one layer.
CASES = {
    "wide_gqa": dict(layers=2, hidden=48, ffn=64, heads=6, kv_heads=2, context=16, vocabulary=70, sequences=4),
    "mha": dict(layers=3, hidden=30, ffn=62, heads=5, kv_heads=5, context=11, vocabulary=53, sequences=2),
    "odd": dict(layers=1, hidden=48, ffn=88, heads=4, kv_heads=1, context=17, vocabulary=300, sequences=3),
}
# Between the smallest and the largest norm of the case's ten steps: some are clipped and some are not.
CLIP_NORM = {"wide_gqa": 2.5, "mha": 5.0, "odd": 2.1}
OPTIMIZER = dict(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, peak_learning_rate=4e-3)
NORM_EPS = 1e-5
ROPE_THETA = 10_000.0
STEPS = 10


def tensor_shapes(shape):
    """Name and shape of every parameter, `[out_features, in_features]` for a projection."""
    hidden, ffn, vocabulary = shape["hidden"], shape["ffn"], shape["vocabulary"]
    kv_width = shape["kv_heads"] * (hidden // shape["heads"])
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(shape["layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[prefix + "self_attn.k_proj.weight"] = (kv_width, hidden)
        shapes[prefix + "self_attn.v_proj.weight"] = (kv_width, hidden)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (ffn, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, ffn)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def initial_weights(shape, generator):
    """Weights large enough that attention is far from uniform, so that a wrong position or mask shows."""
    weights = {}
    for name, dims in tensor_shapes(shape).items():
        if name.endswith("norm.weight"):
            weights[name] = 0.5 + torch.rand(dims, generator=generator, dtype=torch.float32)
        else:
            scale = 1.0 if "embed" in name else 1.2 / math.sqrt(dims[-1])
            weights[name] = scale * torch.randn(dims, generator=generator, dtype=torch.float32)
    return weights


def rms_norm(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + NORM_EPS) * weight


def rotate(x):
    """RoPE on `x` [sequences, heads, positions, head_dim]: element i turns with element i + head_dim/2."""
    positions, head_dim = x.shape[-2], x.shape[-1]
    half = head_dim // 2
    frequency = ROPE_THETA ** (-torch.arange(half, dtype=torch.float64) * 2 / head_dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency[None, :]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(x, w, prefix, shape):
    sequences, positions, hidden = x.shape
    heads, kv_heads = shape["heads"], shape["kv_heads"]
    head_dim = hidden // heads

    def project(name, count):
        y = x @ w[prefix + name + ".weight"].T
        return y.view(sequences, positions, count, head_dim).transpose(1, 2)

    q = rotate(project("q_proj", heads))
    k = rotate(project("k_proj", kv_heads))
    v = project("v_proj", kv_heads)
    outputs = []
    for head in range(heads):
        kv_head = head // (heads // kv_heads)  # consecutive query heads share a key-value head
        scores = q[:, head] @ k[:, kv_head].transpose(-1, -2) / math.sqrt(head_dim)
        future = torch.ones(positions, positions, dtype=torch.bool).triu(1)
        outputs.append(torch.softmax(scores.masked_fill(future, -math.inf), dim=-1) @ v[:, kv_head])
    return torch.cat(outputs, dim=-1) @ w[prefix + "o_proj.weight"].T


def sequence_losses(w, tokens, shape):
    """Summed token loss of each sequence; `tokens` [sequences, context + 1]."""
    x = w["model.embed_tokens.weight"][tokens[:, :-1]]
    for layer in range(shape["layers"]):
        prefix = f"model.layers.{layer}."
        x = x + attention(rms_norm(x, w[prefix + "input_layernorm.weight"]), w, prefix + "self_attn.", shape)
        y = rms_norm(x, w[prefix + "post_attention_layernorm.weight"])
        gate = y @ w[prefix + "mlp.gate_proj.weight"].T
        up = y @ w[prefix + "mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[prefix + "mlp.down_proj.weight"].T
    logits = rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T
    token_losses = -torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, 1:, None])
    return token_losses.sum(dim=(1, 2))


def parameters(weights, dtype):
    return {name: value.to(dtype).clone().requires_grad_(True) for name, value in weights.items()}


def loss_and_gradients(weights, tokens, shape, dtype):
    w = parameters(weights, dtype)
    losses = sequence_losses(w, tokens, shape)
    (losses.sum() / (tokens.shape[0] * (tokens.shape[1] - 1))).backward()
    return losses.detach(), {name: value.grad for name, value in w.items()}


def learning_rate(step):
    """Four steps of warm-up, then a fall: a rate that is off by one step does not go unseen."""
    peak = OPTIMIZER["peak_learning_rate"]
    return peak * (step + 1) / 4 if step < 4 else peak * (1 - (step - 3) / 10)


def train(weights, batches, shape, clip_norm, dtype):
    """Ten AdamW steps, one batch each."""
    w = parameters(weights, dtype)
    steady = [value for name, value in w.items() if name.endswith("norm.weight")]
    decaying = [value for name, value in w.items() if not name.endswith("norm.weight")]
    optimizer = torch.optim.AdamW(
        [
            dict(params=decaying, weight_decay=OPTIMIZER["weight_decay"]),
            dict(params=steady, weight_decay=0.0),
        ],
        betas=(OPTIMIZER["beta1"], OPTIMIZER["beta2"]),
        eps=OPTIMIZER["eps"],
        foreach=False,
        fused=False,
    )
    losses, norms, rates = [], [], []
    for step, tokens in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)
        loss = sequence_losses(w, tokens, shape).sum() / (tokens.shape[0] * (tokens.shape[1] - 1))
        loss.backward()
        norm = torch.sqrt(sum((value.grad.double() ** 2).sum() for value in w.values()))
        scale = min(1.0, clip_norm / norm.item())
        for value in w.values():
            value.grad.mul_(scale)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
        rates.append(learning_rate(step))
    return losses, norms, rates, {name: value.detach() for name, value in w.items()}


def relative_error(ours, theirs, reference_size):
    return ((ours.double() - theirs.double()).norm() / reference_size.double().norm()).item()


def make(case, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = initial_weights(shape, generator)
    dims = (STEPS, shape["sequences"], shape["context"] + 1)
    # Each batch repeats one sequence of the first, so that ten steps visibly learn something.
    batches = torch.randint(shape["vocabulary"], dims, generator=generator)
    batches[1:, 0] = batches[0, 0]

    loss_f64, gradients = loss_and_gradients(weights, batches[0], shape, torch.float64)
    loss_f32, gradients_f32 = loss_and_gradients(weights, batches[0], shape, torch.float32)
    clip_norm = CLIP_NORM[case]
    losses, norms, rates, final = train(weights, batches, shape, clip_norm, torch.float64)
    _, _, _, final_f32 = train(weights, batches, shape, clip_norm, torch.float32)
    assert min(norms) < clip_norm < max(norms), f"{case}: clipping is not tested either way: {norms}"

    f32_gradient_error = {n: relative_error(gradients_f32[n], gradients[n], gradients[n]) for n in weights}
    f32_final_error = {n: relative_error(final_f32[n], final[n], final[n] - weights[n].double()) for n in weights}

    def f64(values):
        return numpy.asarray(values, dtype=numpy.float64)

    tensors = {
        "tokens": batches.numpy().astype(numpy.uint32),
        "loss_f64": loss_f64.numpy(),
        "loss_f32": loss_f32.double().numpy(),
        "step.learning_rate": f64(rates),
        "step.loss": f64(losses),
        "step.gradient_norm": f64(norms),
    }
    for name in weights:
        tensors["weight." + name] = weights[name].numpy()
        tensors["gradient." + name] = gradients[name].float().numpy()
        tensors["final." + name] = final[name].float().numpy()
    reference = {
        "shape": shape | dict(norm_eps=NORM_EPS, rope_theta=ROPE_THETA),
        "optimizer": OPTIMIZER | dict(clip_norm=clip_norm, steps=STEPS),
        "f32_gradient_error": f32_gradient_error,
        "f32_final_error": f32_final_error,
        "torch": torch.__version__,
        "seed": seed,
    }
    path = HERE / f"{case}.safetensors"
    save_file(tensors, path, metadata={"reference": json.dumps(reference)})
    count = sum(value.numel() for value in weights.values())
    print(
        f"{path.name}: {path.stat().st_size} bytes, {count} parameters, loss {losses[0]:.4f} -> {losses[-1]:.4f}, "
        f"norms {min(norms):.3f} to {max(norms):.3f}, worst float32 error: "
        f"gradient {max(f32_gradient_error.values()):.1e}, ten steps {max(f32_final_error.values()):.1e}"
    )


def main():
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    HERE.mkdir(parents=True, exist_ok=True)
    print("torch", torch.__version__)
    for index, (case, shape) in enumerate(CASES.items()):
        make(case, shape, seed=20_240 + index)


if __name__ == "__main__":
    main()
