"""Loads what `tarazed export` writes outside of it, and holds its likelihoods against those of `tarazed eval`.

The model below is Llama as Hugging Face has it, written out in plain PyTorch from the keys of `config.json` alone; it shares no
code with the runtime. Text becomes tokens by the `tokenizers` library from `tokenizer.json`. Where `transformers` is installed,
its `LlamaForCausalLM` must load the folder without a missing or superfluous tensor and give the same logits.

    python tests/parity/check_export.py target/release/tarazed RUN[@STEP]

Needs torch, safetensors and tokenizers. The run's model must have no rows behind its tokenizer's last token: `eval` counts them
in its softmax, and an export has none. Both sides compute in f32; a wrong order of rotated pairs moves the logits of a tiny
model by 5e-3, so what is allowed lies far below.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

# Of a log-likelihood, in nats for each token; of logits, relative to the largest.
LIKELIHOOD_ERROR_MAX = 1e-5
LOGIT_ERROR_MAX = 1e-5
# Each choice begins with a space, so that both sides cut the text at the same place.
QUESTIONS = [
    {"question": "The old river", "choices": [" carried the first snow.", " snow first the carried.", " is"]},
    {"question": "A checkpoint is", "choices": [" whole", " 训练的一步", " </s> spelt out"]},
    {"question": "训练状态", "choices": [" 已经提交。", " fn main() {}"]},
]


def rms_norm(x, weight, eps):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rotate(x, theta):
    """RoPE on `x` [heads, positions, head_dim]: element i turns with element i + head_dim/2."""
    positions, head_dim = x.shape[-2:]
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(x, w, prefix, config):
    heads, kv_heads, head_dim = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    positions = x.shape[0]

    def project(name, count):
        return (x @ w[f"{prefix}{name}.weight"].T).view(positions, count, head_dim).transpose(0, 1)

    theta = config["rope_parameters"]["rope_theta"]
    q, k = rotate(project("q_proj", heads), theta), rotate(project("k_proj", kv_heads), theta)
    k, v = (part.repeat_interleave(heads // kv_heads, dim=0) for part in (k, project("v_proj", kv_heads)))
    scores = q @ k.transpose(-1, -2) / math.sqrt(head_dim)
    future = torch.ones(positions, positions, dtype=torch.bool).triu(1)
    mixed = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1) @ v
    return mixed.transpose(0, 1).reshape(positions, heads * head_dim) @ w[f"{prefix}o_proj.weight"].T


def logits(w, tokens, config):
    """Logits `[positions, vocabulary]` of one sequence."""
    eps = config["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        x = x + attention(rms_norm(x, w[f"{prefix}input_layernorm.weight"], eps), w, f"{prefix}self_attn.", config)
        y = rms_norm(x, w[f"{prefix}post_attention_layernorm.weight"], eps)
        gate, up = y @ w[f"{prefix}mlp.gate_proj.weight"].T, y @ w[f"{prefix}mlp.up_proj.weight"].T
        x = x + (torch.nn.functional.silu(gate) * up) @ w[f"{prefix}mlp.down_proj.weight"].T
    return rms_norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def load(folder):
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return weights, config, tokenizer


def sequences(config, tokenizer):
    """Tokens of each question with each choice, and how many of them are the choice's."""
    for question in QUESTIONS:
        for choice in question["choices"]:
            before = tokenizer.encode(question["question"], add_special_tokens=False).ids
            after = tokenizer.encode(choice, add_special_tokens=False).ids
            yield [config["bos_token_id"], *before, *after], len(after)


def check_transformers(folder, found):
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return "transformers is not installed"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM", type(model)
    assert not any(info.values()), info
    worst = 0.0
    for tokens, ours in found:
        theirs = model(torch.tensor([tokens])).logits[0]
        worst = max(worst, ((theirs - ours).abs().max() / theirs.abs().max()).item())
    assert worst <= LOGIT_ERROR_MAX, f"logits differ by {worst:.1e} from transformers'"
    return f"logits within {worst:.1e} of those of transformers"


def check_folder(folder, told):
    """`told`: what `tarazed eval` gives each question with each choice, in order."""
    weights, config, tokenizer = load(folder)
    worst, found = 0.0, []
    for (tokens, scored), theirs in zip(sequences(config, tokenizer), told, strict=True):
        ours = logits(weights, tokens, config)
        found.append((tokens, ours))
        likelihoods = torch.log_softmax(ours.double(), dim=-1)[:-1].gather(-1, torch.tensor(tokens[1:])[:, None])
        assert theirs["tokens"] == scored, "the same text, other tokens"
        likelihood = likelihoods[-scored:].sum().item()
        worst = max(worst, abs(likelihood - theirs["log_likelihood"]) / scored)
    assert worst <= LIKELIHOOD_ERROR_MAX, f"log-likelihoods differ by {worst:.1e} a token from those of eval"
    return f"{len(found)} log-likelihoods within {worst:.1e} a token of eval's; {check_transformers(folder, found)}"


@torch.no_grad()
def main(program, run):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as base:
        folder, questions = pathlib.Path(base, "exported"), pathlib.Path(base, "questions.jsonl")
        questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
        export = [program, "export", run, "--to", folder, "--dtype", "f32"]
        said = subprocess.run(export, check=True, stdout=subprocess.PIPE, text=True).stdout
        assert "left out" not in said, f"this model has rows that stand for no token: {said}"
        score = [program, "eval", run, "--set", questions, "--json"]
        told = json.loads(subprocess.run(score, check=True, stdout=subprocess.PIPE).stdout)
        results = told["sets"][0]["result"]["results"]
        assert not any(result["cut"] for result in results), "the context is too short for this check"
        print(check_folder(folder, [choice for result in results for choice in result["choices"]]))


if __name__ == "__main__":
    main(*sys.argv[1:])
